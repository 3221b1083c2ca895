"""NCCL by itself: bus bandwidth of collectives at given sizes, and how well one runs beside matrix products."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lfm.job.process import Process

CONNECTIONS = (1, 8, 32)
"""Values of CUDA_DEVICE_MAX_CONNECTIONS, each in processes of its own: CUDA reads it once."""
_REPEATS = 10
_PRODUCT = 8192
"""Rows, columns and depth of a product that a collective runs beside; on CPUs an eighth."""


def bus_bytes(name: str, num_bytes: int, world: int) -> float:
    """What a link must carry, a direction and process, when `num_bytes` are in the larger buffer; as nccl-tests."""
    return num_bytes * {"all_reduce": 2 * (world - 1) / world, "send_receive": 1.0}.get(name, (world - 1) / world)


def measure_collectives(
    process: Process, device_type: str, connections: int, sizes: dict[str, int], gradient_bytes: int, num_buckets: int
) -> dict[str, Any]:
    """One process's part: GB/s of the bus by collective and size (name -> bytes), and the two larger cases."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = str(connections)
    from lfm.parallel import groups

    device = torch.device(device_type, process.local_rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    groups.join(process, device, timeout_seconds=120)
    rows = [_one(name, label, size, device) for label, size in sizes.items() for name in _CALLS]
    found = {
        "connections": connections,
        "rows": rows,
        "reduce_scatter_in_buckets": _in_buckets(gradient_bytes, num_buckets, device),
        "beside_products": [_beside_products(name, max(sizes.values()), device) for name in _BESIDE],
    }
    dist.barrier()
    dist.destroy_process_group()
    return found


def _all_reduce(whole: Tensor, part: Tensor) -> Any:
    return dist.all_reduce(whole, async_op=True)


def _reduce_scatter(whole: Tensor, part: Tensor) -> Any:
    return dist.reduce_scatter_tensor(part, whole, async_op=True)


def _all_gather(whole: Tensor, part: Tensor) -> Any:
    return dist.all_gather_into_tensor(whole, part, async_op=True)


def _all_to_all(whole: Tensor, part: Tensor) -> Any:
    return dist.all_to_all_single(torch.empty_like(whole), whole, async_op=True)


def _send_receive(whole: Tensor, part: Tensor) -> Any:
    """From each even process to the next."""
    rank = dist.get_rank()
    return dist.isend(whole, rank + 1) if rank % 2 == 0 else dist.irecv(whole, rank - 1)


_CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "all_to_all": _all_to_all,
    "send_receive": _send_receive,
}
_BESIDE = ("reduce_scatter", "all_to_all")
"""What layouts hide behind products."""


def _one(name: str, label: str, size: int, device: torch.device) -> dict[str, Any]:
    whole, part = _buffers(size, device)
    seconds = _median_seconds(lambda: _CALLS[name](whole, part).wait(), device)
    rate = bus_bytes(name, size, dist.get_world_size()) / seconds / 1e9
    return {"collective": name, "size": label, "bytes": size, "seconds": seconds, "bus_gb_per_second": rate}


def _in_buckets(num_bytes: int, num_buckets: int, device: torch.device) -> dict[str, Any]:
    """All fp32 gradients of a model, a layer a bucket, queued at once."""
    whole, part = _buffers(num_bytes // num_buckets, device)

    def queue() -> None:
        for work in [_reduce_scatter(whole, part) for _ in range(num_buckets)]:
            work.wait()

    seconds = _median_seconds(queue, device, repeats=3)
    rate = bus_bytes("reduce_scatter", num_bytes, dist.get_world_size()) / seconds / 1e9
    return {"bytes": num_bytes, "buckets": num_buckets, "seconds": seconds, "bus_gb_per_second": rate}


def _beside_products(name: str, size: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a collective alone, of products that take about as long, and of both together."""
    whole, part = _buffers(size, device)
    n = _PRODUCT if device.type == "cuda" else _PRODUCT // 8
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    out = torch.empty_like(a)
    alone = _median_seconds(lambda: _CALLS[name](whole, part).wait(), device)
    one_product = _median_seconds(lambda: torch.mm(a, a, out=out), device)
    # All processes queue as many.
    shared = torch.tensor(max(1, round(alone / one_product)), device=device)
    dist.broadcast(shared, 0)
    count = int(shared)

    def products() -> None:
        for _ in range(count):
            torch.mm(a, a, out=out)

    def together() -> None:
        work = _CALLS[name](whole, part)
        products()
        work.wait()

    seconds = {
        "alone": alone,
        "products": _median_seconds(products, device),
        "together": _median_seconds(together, device),
    }
    hidden = (seconds["alone"] + seconds["products"] - seconds["together"]) / min(seconds["alone"], seconds["products"])
    return {"collective": name, "bytes": size, "num_products": count, **seconds, "hidden": hidden}


def _buffers(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """fp32, of `size` bytes and of this process's part of it."""
    world = dist.get_world_size()
    elements = size // 4 // world * world
    whole = torch.ones(elements, device=device)
    return whole, whole[: elements // world].clone()


def _median_seconds(run: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    """Of the slowest process."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            dist.barrier()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        else:
            dist.barrier()
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
    slowest = torch.tensor(statistics.median(times), device=device, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)
