"""What the kernels take; elsewhere, so that a choice of path need not import Triton."""

WIDTHS = (16, 32, 64, 128, 256, 512)
TOKENS = 16
"""With traces at a time: the depth of a tensor core's product."""
EVALUATIONS = 16
"""Of a token, for the same reason."""
