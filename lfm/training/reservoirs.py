"""What keeps chunked reservoirs right while they train: long enough warm-ups, and weights that forget."""

import warnings
from collections.abc import Mapping
from typing import Any

from lfm.kernels.reservoir import WARMUP_NOTCHES, contraction
from lfm.layers.liquid import Liquid
from lfm.training.guards import Masters

RAISE_ABOVE = 2e-3
"""Residuals up to here are fine: rounding the exchanged state to bf16 alone leaves 3e-4 to 1e-3."""

LOWER_BELOW = 1e-3
CALM_STEPS_TO_LOWER = 500

CONTRACTION_INTERVAL = 100
"""Updates from one look at whether trained reservoirs still forget to the next."""


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


class ReservoirGuard:
    """Moves each layer's warm-up by its residuals, and scales down trained reservoirs that come to forget too slowly.

    `liquids`: those of this process, by layer, of the `config.reservoir_layers` of the model.  `speaks`: of the
    processes that hold the same layers, one says what happens to them.
    """

    def __init__(self, config: Any, liquids: Mapping[int, Any], *, speaks: bool = True) -> None:
        layers = config.reservoir_layers
        self.config, self.liquids, self.speaks = config, liquids, speaks
        self.warmups: dict[int, int] = {layer: config.reservoir_warmup for layer in layers}
        self.calm_steps: dict[int, int] = {layer: 0 for layer in layers}
        self.mean_gains: dict[int, float] = dict.fromkeys(layers, 1.0)
        """Of each layer's tanh in the last step, over all rows of it."""

    def after_backward(self, measured: Mapping[str, Mapping[int, Any]]) -> None:
        self.mean_gains = dict(measured.get("reservoir_gain", {}))
        for layer, residual in measured.get("reservoir_residual", {}).items():
            calm = self.calm_steps[layer] + 1 if residual < LOWER_BELOW else 0
            warmup = next_warmup(self.warmups[layer], residual, calm)
            self.calm_steps[layer] = 0 if warmup != self.warmups[layer] else calm
            self.warmups[layer] = warmup
        self._set_warmups()

    def after_update(self, update: int, masters: Masters) -> bool:
        # Other families' reservoirs are frozen.
        trained = {layer: liquid for layer, liquid in self.liquids.items() if isinstance(liquid, Liquid)}
        must_forget = [i for i, liquid in trained.items() if liquid.config.must_forget(self.config.seq_length)]
        if not must_forget or update % CONTRACTION_INTERVAL:
            return False
        return any([self._contract(layer, trained[layer], update, masters) for layer in must_forget])

    def record(self) -> dict[str, Any]:
        return {}

    def state(self) -> dict[str, Any]:
        return {
            "reservoir_warmup": {str(layer): warmup for layer, warmup in self.warmups.items()},
            "reservoir_calm_steps": {str(layer): calm for layer, calm in self.calm_steps.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.calm_steps = {int(layer): calm for layer, calm in state["reservoir_calm_steps"].items()}
        self.warmups = {int(layer): warmup for layer, warmup in state["reservoir_warmup"].items()}
        self._set_warmups()

    def _set_warmups(self) -> None:
        for layer, liquid in self.liquids.items():
            liquid.warmup = self.warmups[layer]

    def _contract(self, layer: int, liquid: Liquid, update: int, masters: Masters) -> bool:
        factors = contraction(masters.master_of(liquid.reservoirs), liquid.config.leak_rate, self.mean_gains[layer])
        if (factors == 1).all():
            return False
        if self.speaks:
            warnings.warn(
                f"update {update}: reservoirs of layer {layer} came to forget too slowly for a warm-up of "
                f"{WARMUP_NOTCHES[-1]} steps and were scaled by {[round(factor, 3) for factor in factors.tolist()]}",
                RuntimeWarning,
                stacklevel=2,
            )
        masters.scale_master(liquid.reservoirs, factors)
        return True
