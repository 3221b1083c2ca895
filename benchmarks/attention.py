"""Attention with document masks on one GPU: every back end against the dense definition, then timed against the floor.

    python benchmarks/attention.py [--out benchmarks/results/attention.json]

LFM-3B's shape: 8192 tokens, 24 heads, 8 key/value heads, head size 128, bf16, laid out as `rotated_heads` leaves them.
A back end whose outputs or gradients are off prints no time; one that is not installed is left out.  The floor is the
attended FLOPs over the data sheet's 989 TFLOP/s; forward is 4, forward and backward 14 FLOPs per attended (query, key,
head, channel).
"""

import argparse
import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import torch
from torch import Tensor

from lfm.layers.attention import attend
from lfm.layers.documents import Documents
from lfm.layers.flash_attention import PACKAGES, FlashPackage, flash_attention
from lfm.training.run import environment

T, HEADS, GROUPS, K = 8192, 24, 8, 128
PATTERNS = {
    "1 document": [T],
    "8 of 1024": [1024] * 8,
    "14, log-normal": [2011, 187, 512, 90, 1203, 655, 61, 340, 1490, 233, 410, 129, 777, 94],
}
PEAK, BOUND = 989e12, 1e-2
CALLS, ROUNDS = 10, 5
CYCLES_PER_SECOND = 2e9
"""At most, of an H200."""
Attend = Callable[[Tensor, Tensor, Tensor, Documents], Tensor]


def inputs(length: int) -> list[Tensor]:
    """Queries and keys with memory of their own, values a view of the projection."""
    qkv = torch.randn(1, length, HEADS + 2 * GROUPS, K, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    q, k, v = qkv.split((HEADS, GROUPS, GROUPS), dim=1)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    return [x.detach().requires_grad_() for x in (q, k, v)]


def not_reproducible(package: FlashPackage, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """As `flash_attention`, but gradients are summed in no fixed order."""
    B, H, T, _ = q.shape
    varlen = importlib.import_module(package.module).flash_attn_varlen_func
    rows = [x.transpose(1, 2).reshape(B * T, -1, K) for x in (q, k, v)]
    starts, longest = documents.boundaries, documents.longest
    result = varlen(
        *rows, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
    )
    return (result[0] if isinstance(result, tuple) else result).view(B, T, H, K).transpose(1, 2)


def backends() -> dict[str, Attend]:
    """Those of `attend`, and every installed package of flash-attn both ways."""
    found: dict[str, Attend] = {name: functools.partial(attend, backend=name) for name in ("sdpa", "flex")}
    for package in PACKAGES:
        if package.installed:
            found[package.name] = functools.partial(flash_attention, package=package)
            found[f"{package.name}, not reproducible"] = functools.partial(not_reproducible, package)
    return found


def worst_error(run: Attend, lengths: list[int]) -> float:
    """Largest relative error of output and gradients against the dense definition in fp32, at a quarter length."""
    quarter = [max(1, n // 4) for n in lengths]
    quarter[-1] += T // 4 - sum(quarter)
    documents = Documents.from_lengths([quarter], "cuda")
    leaves = inputs(T // 4)
    found = []
    reference = functools.partial(attend, backend="reference")
    for path, leaf in ((reference, [x.detach().float().requires_grad_() for x in leaves]), (run, leaves)):
        y = path(*leaf, documents)
        weight = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y).to(y.dtype)
        found.append([y, *torch.autograd.grad(y, leaf, weight)])
    pairs = zip(*found, strict=True)
    return max(float((b.float() - a.float()).norm() / a.float().norm()) for a, b in pairs)


def milliseconds(run: Callable[[], object]) -> float:
    """Of the device: calls are queued behind a pause that is longer than the host takes to start them, as in a training
    step, where it is ahead."""
    for _ in range(3):
        run()
    began = time.perf_counter()
    for _ in range(CALLS):
        run()
    seconds_of_host = time.perf_counter() - began
    times = []
    for _ in range(ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(CYCLES_PER_SECOND * 2 * seconds_of_host))
        start.record()
        for _ in range(CALLS):
            run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / CALLS)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention.json"))
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA device")
    rows = []
    print(f"{'documents':16} {'backend':32} {'error':>8} {'forward':>9} {'fwd+bwd':>9} {'floor':>7} {'of floor':>8}")
    for pattern, lengths in PATTERNS.items():
        documents = Documents.from_lengths([lengths], "cuda")
        floor = 14 * documents.attended_pairs * HEADS * K / PEAK * 1e3
        for backend, run in backends().items():
            error = worst_error(run, lengths)
            row = {"documents": pattern, "backend": backend, "relative_error": error, "floor_ms": floor}
            rows.append(row)
            if not error < BOUND:
                print(f"{pattern:16} {backend:32} {error:8.1e}  not timed: parity is red")
                continue
            leaves = inputs(T)
            grad = torch.randn(1, T, HEADS, K, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            with torch.no_grad():
                row["forward_ms"] = milliseconds(lambda x=leaves, f=run, d=documents: f(*x, d))
            row["forward_backward_ms"] = both = milliseconds(
                lambda x=leaves, f=run, d=documents, g=grad: torch.autograd.grad(f(*x, d), x, g)
            )
            times = f"{row['forward_ms']:8.2f}  {both:8.2f}  {floor:6.2f}  {both / floor:7.1f}x"
            print(f"{pattern:16} {backend:32} {error:8.1e} {times}", flush=True)
    packages = {package.name: metadata.version(package.name) for package in PACKAGES if package.installed}
    result = {
        "date": date.today().isoformat(),
        "environment": environment(),
        "packages": packages,
        "calls": CALLS * ROUNDS,
        "rows": rows,
    }
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
