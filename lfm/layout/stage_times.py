"""What the parts of a model take on a card, from times measured there on one size of the family.

A table a card lies in `costs/`.  Another size takes the FLOPs of its own part at the rate of the measured one, the
embedding its elements; the head forms the gradient of its input in the forward pass.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from lfm.layout.simulate import Times

if TYPE_CHECKING:  # the model's module needs torch, its arithmetic does not
    from lfm.models.registry import ModelConfig


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds of one micro-batch on one process."""

    card: str
    layers: tuple[Times, ...]
    embedding: Times
    head: Times
    transfer: float
    """Of what one stage sends the next."""

    @property
    def costs(self) -> list[float]:
        """Of the layers, the embedding with the first; not of the head."""
        first, *rest = (layer.total for layer in self.layers)
        return [first + self.embedding.total, *rest]

    def chunks(self, sizes: Sequence[int]) -> list[Times]:
        """Of the model's chunks when they have these numbers of layers."""
        found, first = list[Times](), 0
        for size in sizes:
            found.append(functools.reduce(Times.plus, self.layers[first : first + size]))
            first += size
        found[0] = found[0].plus(self.embedding)
        found[-1] = found[-1].plus(self.head)
        return found


def stage_times(model: "ModelConfig", card: str | None, *, rows: int, tensor: int) -> StageTimes | None:
    """Of a micro-batch of `rows` rows under tensor-parallel size `tensor`.

    None where there is no table of the card, or none of what the model is made of.
    """
    from lfm.models.lfm import LFMConfig

    table = _tables().get(card or "")
    # Tables are of attention, experts and reservoirs; other parts run at rates of their own.
    if table is None or not isinstance(model, LFMConfig) or model.moe is None or model.attention is None:
        return None
    if model.liquid is not None and model.reservoir is None:
        return None
    tokens = rows * model.seq_length

    def part(name: str, work: float, split: int = tensor) -> Times:
        measured = table["parts"][name]
        per_token = measured.get("flops_per_token") or measured["elements_per_token"]
        return Times(**measured["milliseconds"]).times(work / per_token * tokens / table["tokens"] / split)

    # Tensor ranks run the recurrence whole.
    of_reservoirs = model.reservoir.cost(model.hidden_size).flops if model.reservoir is not None else 0.0
    layers = []
    for layer in range(model.num_layers):
        has_reservoirs = layer in model.reservoir_layers
        rest = model.layer_cost(layer).flops - has_reservoirs * of_reservoirs
        times = part("layer", rest)
        layers.append(times.plus(part("reservoirs", of_reservoirs, split=1)) if has_reservoirs else times)
    two_bytes = 2 * tokens * model.hidden_size / tensor
    return StageTimes(
        card=table["card"],
        layers=tuple(layers),
        embedding=part("embedding", model.hidden_size),
        head=part("head", model.head_flops),
        transfer=two_bytes / table["gigabytes_per_second"] / 1e6,
    )


@functools.cache
def _tables() -> dict[str, Any]:
    """By the name that the driver gives the card."""
    files = (file for file in resources.files("lfm.layout").joinpath("costs").iterdir() if file.name.endswith(".json"))
    tables = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {table["card"]: table for table in tables}
