"""Model families by `model.kind`."""

from collections.abc import Sequence

from lfm.layers.parts import PLAIN, Parts
from lfm.models.lfm import LFM, LFMConfig

ModelConfig = LFMConfig


def build(config: ModelConfig, *, parts: Parts = PLAIN, layers: Sequence[int] | None = None) -> LFM:
    """The model, or the piece of it that `layers` names, uninitialised; safe under `torch.device("meta")`."""
    return LFM(config, parts=parts, layers=layers)
