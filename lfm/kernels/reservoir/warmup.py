"""How many warm-up steps the chunked recurrence takes: a whole number per layer, part of the saved training state."""

WARMUP_NOTCHES = (32, 64, 96, 128, 192, 256, 384)

RAISE_ABOVE = 2e-3
"""Residuals up to here are fine: rounding the exchanged state to bf16 alone leaves 3e-4 to 1e-3."""

LOWER_BELOW = 1e-3
CALM_STEPS_TO_LOWER = 500


def next_warmup(current: int, residual_max: float, calm_steps: int) -> int:
    """Warm-up for the next training step.

    `residual_max` is the largest forward or backward residual of this step, `calm_steps` the number of consecutive
    steps, this one included, whose residual stayed below 1e-3; the caller restarts that count whenever the answer
    differs from `current`.  Rises by one notch at once, falls by one notch after 500 calm steps.
    """
    if not residual_max <= RAISE_ABOVE:  # written so that a NaN raises too
        return next((notch for notch in WARMUP_NOTCHES if notch > current), current)
    if residual_max < LOWER_BELOW and calm_steps >= CALM_STEPS_TO_LOWER:
        return next((notch for notch in reversed(WARMUP_NOTCHES) if notch < current), current)
    return current
