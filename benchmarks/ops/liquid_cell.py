"""A deep liquid cell of MiniLiquidGPT's base size over a window: 16 tokens, three midpoint steps, bf16 matrices.

`python benchmarks/ops/liquid_cell.py` times ways to cut the matrices, to choose `tiling_of` for another GPU.
"""

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout need not be installed

from benchmarks.ops.case import COPY_BYTES_PER_SECOND, FP32_FLOPS_PER_SECOND, Case, FloorKind, graphed, norm_ratio
from lfm.kernels.backend import Backend
from lfm.kernels.liquid_cell import CellWeights, Integration, Norm, Synapses, TraceRule, Traces, liquid_cell

T, D = 16, 256
INTEGRATION = Integration("rk2", 3)
BATCHES = (8, 64, 512)
WEIGHTS = ("input", "input_bias", "hidden", "tau", "tau_bias")
RULES = tuple(f"{part}_{name}" for name in ("ih", "hh") for part in ("alpha", "eta", "decay", "largest"))
IN_BF16 = {"input", "hidden", "tau", "alpha_ih", "alpha_hh"}
OF_THE_WINDOW_BEFORE = {"M_ih", "M_hh"}
"""Training gives these no gradient."""


class Window:
    """A cell with traces or without, forward alone or with every gradient that training takes."""

    def __init__(self, batch: int, plastic: bool) -> None:
        self.batch, self.plastic = batch, plastic

    @functools.cached_property
    def leaves(self) -> dict[str, Tensor]:
        """At the published initial scales; traces begin longer than they may be."""
        draws = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return std * torch.randn(shape, generator=draws, device="cuda")

        B, std = self.batch, D**-0.5
        found = {"x": normal(B, T, D), "state": normal(B, D), "input": normal(2 * D, D, std=std / 2)}
        found |= {"input_bias": normal(2 * D, std=std), "hidden": normal(2 * D, D, std=std / 2)}
        found |= {"tau": normal(D, D, std=std / 2), "tau_bias": normal(D, std=std)}
        found |= {"gain": 1 + normal(D, std=0.1), "bias": normal(D, std=0.1)}
        if self.plastic:
            for name in ("ih", "hh"):
                found |= {f"M_{name}": normal(B, D, D, std=2.4 / D), f"alpha_{name}": normal(D, D, std=0.01)}
                numbers = {"eta": [0.00146], "decay": [0.953], "largest": 2.0}
                found |= {f"{part}_{name}": torch.tensor(value, device="cuda") for part, value in numbers.items()}
        return {name: x.bfloat16() if name in IN_BF16 else x for name, x in found.items()}

    @functools.cached_property
    def keep(self) -> Tensor:
        draws = torch.Generator("cuda").manual_seed(1)
        return (torch.rand(self.batch, T, D, generator=draws, device="cuda") >= 0.1).float() / 0.9

    @functools.cached_property
    def upstream(self) -> Tensor:
        return torch.randn(self.batch, T, D, generator=torch.Generator("cuda").manual_seed(2), device="cuda")

    def outputs(self, leaves: dict[str, Tensor], backend: Backend) -> dict[str, Tensor]:
        synapses, traces = None, None
        if self.plastic:
            parts = [leaves[name] for name in RULES]
            rules = [TraceRule(*parts[i : i + 4], mode="per_sequence", differentiable=True) for i in (0, 4)]
            synapses, traces = Synapses(*rules), Traces(leaves["M_ih"], leaves["M_hh"])
        states, after = liquid_cell(
            leaves["x"], leaves["state"], CellWeights(*(leaves[name] for name in WEIGHTS)),
            Norm(leaves["gain"], leaves["bias"], 1e-5), INTEGRATION, keep=self.keep.to(leaves["x"].dtype),
            synapses=synapses, traces=traces, backend=backend,
        )  # fmt: skip
        return {"states": states} | ({} if after is None else {"M_ih behind": after.ih, "M_hh behind": after.hh})

    def gradients(self, dtype: torch.dtype | None, backend: Backend) -> dict[str, Tensor]:
        """All leaves in `dtype`, or in their own."""
        leaves = {name: x if dtype is None else x.to(dtype) for name, x in self.leaves.items()}
        leaves = {name: x.detach().requires_grad_(name not in OF_THE_WINDOW_BEFORE) for name, x in leaves.items()}
        wanted = [name for name in leaves if name not in OF_THE_WINDOW_BEFORE]
        states = self.outputs(leaves, backend)["states"]
        found = torch.autograd.grad(states, [leaves[name] for name in wanted], self.upstream.to(states.dtype))
        return {f"grad {name}": grad for name, grad in zip(wanted, found, strict=True)}

    def forward(self, backend: Backend) -> dict[str, Tensor]:
        """As training does: what backward needs is kept."""
        return self.outputs({name: x.detach().requires_grad_() for name, x in self.leaves.items()}, backend)

    def check_forward(self) -> dict[str, float]:
        want = self.outputs({name: x.double() for name, x in self.leaves.items()}, "reference")
        return {name: norm_ratio(x.detach(), want[name]) for name, x in self.forward("triton").items()}

    def check_gradients(self) -> dict[str, float]:
        want = self.gradients(torch.float64, "reference")
        return {name: norm_ratio(x, want[name]) for name, x in self.gradients(None, "triton").items()}

    def cases(self) -> list[Case]:
        B, E, matrix = self.batch, INTEGRATION.evaluations, D * D
        # An evaluation's three products and the drive's two; of traces M x and M h, and their growth.
        flops = 2 * B * T * matrix * (3 * E + 2 + (2 + 2 if self.plastic else 0))
        # x, keep, states and the drive; evaluations are kept for backward; the matrices; traces, read and written.
        moved = 4 * B * T * D * (5 + 5 * E) + 2 * 5 * matrix
        moved += (2 * 2 * matrix + 4 * B * 4 * matrix) if self.plastic else 0
        how = f"B={B} {'with traces' if self.plastic else 'without'}"
        return [
            self._case(f"forward {how}", self.forward, self.check_forward, flops, moved),
            self._case(
                f"forward + backward {how}",
                lambda way: self.gradients(None, way),
                self.check_gradients,
                3 * flops,
                3 * moved,
            ),
        ]

    def _case(
        self, name: str, run: Callable[[Backend], dict[str, Tensor]], check: Callable[[], dict[str, float]],
        flops: float, moved: float,
    ) -> Case:  # fmt: skip
        compute, traffic = flops / FP32_FLOPS_PER_SECOND, moved / COPY_BYTES_PER_SECOND
        kind: FloorKind = "flops" if compute > traffic else "bytes"
        peers = {"plain PyTorch, CUDA graph": graphed(lambda _: run("reference"))}
        limits = {"states": 1e-5, "M_ih behind": 1e-5, "M_hh behind": 1e-5}
        if "backward" in name:
            taken = [x for x in self.leaves if x not in OF_THE_WINDOW_BEFORE]
            limits = {f"grad {x}": 4e-3 if x in IN_BF16 else 1e-4 for x in taken}
            # What is left of a number's gradient where terms nearly cancel.
            limits |= {f"grad {x}": 1e-2 for x in taken if x.startswith(("eta", "decay", "largest"))}
        limits = {x: limit for x, limit in limits.items() if self.plastic or "behind" not in x}
        about = (max(compute, traffic), kind)
        return Case(name, graphed(lambda _: run("triton")), check, limits, *about, flops, moved, peers)


def cases() -> list[Case]:
    return [case for batch in BATCHES for plastic in (False, True) for case in Window(batch, plastic).cases()]


def main() -> None:
    from launch.bench import median_seconds
    from lfm.kernels.liquid_cell import kernel

    for plastic in (False, True):
        blocks = ((32, 3), (16, 4), (32, 2)) if plastic else ((64, 3), (32, 4), (32, 6), (64, 2))
        for (block, stages), warps, rows in itertools.product(blocks, (8, 16, 4), (16, 32) if plastic else (16,)):
            tiling = kernel.Tiling(block, rows, warps, stages, 2 if rows == 16 else 1)
            kernel.tiling_of = lambda *_, tiling=tiling: tiling
            for batch in BATCHES[:2]:
                window = Window(batch, plastic)
                runs = functools.partial(window.forward, "triton"), functools.partial(window.gradients, None, "triton")
                try:
                    times = [1e3 * median_seconds(graphed(lambda _, run=run: run()), repeats=5) for run in runs]
                except Exception as error:  # does not fit
                    print(tiling, batch, type(error).__name__, flush=True)
                    continue
                print(
                    f"{tiling} plastic={plastic} B={batch}: {times[0]:.3f} ms, {times[1]:.3f} ms with backward",
                    flush=True,
                )


if __name__ == "__main__":
    main()
