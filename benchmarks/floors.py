"""The fewest bytes and FLOPs of every kernel of a step of LiquidNet, Transformer or LAERC: what a waterfall of a GPU is
read beside.

`python benchmarks/floors.py --config configs/liquidnet_small.yaml [key.path=value ...]`
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import torch

from benchmarks.ops.case import floor
from lfm.errors import UserError
from lfm.exits import command
from lfm.models.laerc import LAERCConfig
from lfm.models.liquidnet import LiquidNetConfig
from lfm.models.transformer import TransformerConfig
from lfm.training.run import RunConfig


@dataclass(frozen=True)
class Kernel:
    """A kernel, or several of a kind, of one step."""

    name: str
    flops: float
    """Of matrix products."""
    bytes: float
    """Each input read once, each output written once."""

    @property
    def seconds(self) -> float:
        return floor(self.flops, self.bytes)[0]


class _Counter:
    """Kernels of a step over `tokens` tokens, whose activations have so many bytes an element."""

    def __init__(self, tokens: int, element_bytes: int) -> None:
        self.tokens, self.size = tokens, element_bytes

    def product(self, name: str, inputs: int, outputs: int, *, trained: bool = True) -> Iterator[Kernel]:
        """Of a matrix, forward and both of the backward pass; its gradient is summed in fp32."""
        flops, weight = 2.0 * self.tokens * inputs * outputs, inputs * outputs
        moved = self.tokens * (inputs + outputs) * self.size
        yield Kernel(f"{name}, forward", flops, moved + weight * self.size)
        yield Kernel(f"{name}, gradient of inputs", flops, moved + weight * self.size)
        if trained:
            yield Kernel(f"{name}, gradient of weight", flops, moved + weight * 4)

    def passes(self, name: str, elements: float) -> Kernel:
        """An elementwise kernel or a scan, of so many elements a token read and written."""
        return Kernel(name, 0, self.tokens * elements * self.size)

    def head(self, hidden: int, vocabulary: int) -> Iterator[Kernel]:
        yield from self.product("head", hidden, vocabulary)
        yield self.passes("cross entropy", 2 * vocabulary)

    def swiglu(self, hidden: int, width: int) -> Iterator[Kernel]:
        yield from self.product("gate and up", hidden, 2 * width)
        yield self.passes("swiglu, forward", 3 * width)
        yield self.passes("swiglu, backward", 5 * width)
        yield from self.product("down", width, hidden)

    def norm(self, name: str, hidden: int) -> Iterator[Kernel]:
        yield self.passes(f"{name}, forward", 4 * hidden)
        yield self.passes(f"{name}, backward", 4 * hidden)


def kernels(run: RunConfig, dtype: torch.dtype) -> list[Kernel]:
    """Of a step of the run in this dtype.  Raises UserError for another family."""
    model = run.model
    count = _Counter(run.training.global_batch_size * model.seq_length, dtype.itemsize)
    if isinstance(model, LiquidNetConfig):
        D, layer = model.hidden_size, list(_liquidnet_layer(count, model))
    elif isinstance(model, TransformerConfig):
        D, layer = model.hidden_size, list(_transformer_layer(count, model))
    elif isinstance(model, LAERCConfig):
        D, layer = model.hidden_size, list(_laerc_layer(count, model))
    else:
        raise UserError(f"model.kind={model.kind} is not counted; give a config of liquidnet, transformer or laerc")
    found = [Kernel(k.name, k.flops * model.num_layers, k.bytes * model.num_layers) for k in layer]
    found += [count.passes("embedding, forward", D), count.passes("embedding, backward", D)]
    found += [*count.norm("final norm", D), *count.head(D, model.vocab_size)]
    parameters = model.count_parameters().trainable
    published = dtype.itemsize if dtype.itemsize < 4 else 0
    return [
        *found,
        Kernel("norm of the gradient", 0, 4 * parameters),
        Kernel("AdamW", 0, (28 + published) * parameters),
    ]


def _liquidnet_layer(count: _Counter, model: LiquidNetConfig) -> Iterator[Kernel]:
    D = model.hidden_size
    yield from count.norm("norms", 2 * D)
    yield from count.product("value, delta and gate", D, 3 * D)
    yield count.passes("scan, forward", 3 * D)
    yield count.passes("scan, backward", 6 * D)
    yield count.passes("output gate, forward", 3 * D)
    yield count.passes("output gate, backward", 5 * D)
    yield from count.product("liquid output", D, D)
    yield from count.swiglu(D, model.ffn.ffn_hidden_size)


def _transformer_layer(count: _Counter, model: TransformerConfig) -> Iterator[Kernel]:
    D, a = model.hidden_size, model.attention
    width = D + 2 * a.num_query_groups * (D // a.num_attention_heads)
    yield from count.norm("norms", 2 * D)
    yield from count.product("queries, keys and values", D, width)
    yield count.passes("rotation, forward", 2 * width)
    yield count.passes("rotation, backward", 2 * width)
    attended = 2.0 * count.tokens * D * (model.seq_length + 1)  # of two products, over causal pairs
    yield Kernel("attention, forward", attended, count.tokens * (width + D) * count.size)
    yield Kernel("attention, backward", 2.5 * attended, count.tokens * (2 * width + 3 * D) * count.size)
    yield from count.product("attention output", D, D)
    yield from count.swiglu(D, model.ffn.ffn_hidden_size)


def _laerc_layer(count: _Counter, model: LAERCConfig) -> Iterator[Kernel]:
    """The recurrence's steps depend on each other: it is not near this floor."""
    D, R = model.hidden_size, model.reservoir_size if model.use_reservoir else 0
    H, F, states = model.reservoir_mlp_hidden_size, model.ffn_hidden_size, 4 * count.tokens * R
    yield from count.norm("norms", D + R + 2 * D + D)
    if R:
        yield from count.product("drive", D, R, trained=False)
        for direction in ("forward", "backward"):
            yield Kernel(f"recurrence, {direction}", 2.0 * count.tokens * R * R, 3 * states)
        yield from count.product("read-out, up", R, H)
        yield from count.product("read-out, down", H, D)
    yield from count.product("gate, up", 2 * D, D)
    yield from count.product("gate, down", D, D)
    yield from count.product("feed-forward, up", D, F)
    yield from count.product("feed-forward, down", F, D)
    yield count.passes("activations, forward", 2 * (H + D + F))
    yield count.passes("activations, backward", 3 * (H + D + F))
    yield count.passes("gating, forward", 6 * D)
    yield count.passes("gating, backward", 8 * D)


def table(run: RunConfig, dtype: torch.dtype) -> str:
    """Markdown: microseconds at what an H200 was measured to move and to multiply in bf16."""
    found = kernels(run, dtype)
    lines = ["| kernels of a step | GFLOP | MB | floor, us |", "| --- | --- | --- | --- |"]
    for k in [*found, Kernel("all", sum(k.flops for k in found), sum(k.bytes for k in found))]:
        seconds = sum(each.seconds for each in found) if k.name == "all" else k.seconds
        lines.append(f"| {k.name} | {k.flops / 1e9:,.0f} | {k.bytes / 1e6:,.0f} | {seconds * 1e6:,.0f} |")
    tokens = run.training.global_batch_size * run.model.seq_length
    rate = tokens / sum(k.seconds for k in found)
    return "\n".join([*lines, "", f"{tokens:,} tokens a step: at most {rate:,.0f} tokens/s"])


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="Count a step's fewest bytes and FLOPs, kernel by kernel.")
    parser.add_argument("--config", default="configs/liquidnet_small.yaml")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of activations")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    flags = parser.parse_intermixed_args()
    print(table(RunConfig.load(flags.config, flags.overrides), getattr(torch, flags.dtype)))


if __name__ == "__main__":
    main()
