"""Before the first step: whether ranks, devices and the links between them are fit to train; takes about a second."""

import contextlib
import socket
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from lfm.errors import UserError
from lfm.job.process import Process

FREE_SHARE = 0.8
"""Of a GPU's memory that must be free."""
SLOW = 1 / 3
"""Of the median rate of its kind: a link below it is named."""
_PACKAGES = ("torch", "triton", "megatron-core", "deepspeed")
_REPEATS = 3


@dataclass(frozen=True)
class Report:
    """What a rank says of itself."""

    rank: int
    host: str
    device: str
    agreed: dict[str, Any]
    """What all ranks must have alike."""
    taken: str | None = None
    """Why the device's memory is not this rank's to use."""
    broken: str | None = None
    """What the device computed wrong."""
    note: str | None = None

    @property
    def name(self) -> str:
        return f"rank {self.rank} (host {self.host})"


def check(process: Process, device: torch.device, *, fingerprint: str) -> str:
    """Collective over the default process group, which one process alone need not have; the summary that rank 0 prints.

    `fingerprint` is of what must be the same on all ranks, the configuration say.  Raises, on every rank alike and
    naming rank and host, UserError where ranks differ or a GPU is in use, RuntimeError where a device or an all-reduce
    computes something else than it should.  Slow links are only named, by `slow_links`.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        reports = _gather(_report(process, device, fingerprint), process.world_size)
        refuse_unfit(reports)
        hosts = len({report.host for report in reports})
        parts = [f"{_count(len(reports), 'rank')} on {_count(hosts, 'host')}", f"torch {torch.__version__}"]
        parts += sorted({report.device for report in reports})
        notes = [f"{report.name}: {report.note}" for report in reports if report.note]
        if process.world_size > 1:
            mib = 64 if device.type == "cuda" else 1
            rate = _all_reduce_rate(reports, device, mib * 2**20)
            parts[-1] += f", {dist.get_backend()}; all-reduce {mib} MiB {rate / 1e9:.1f} GB/s"
            notes += slow_links(reports, _gather(_receive_rate(device, mib * 2**20), process.world_size))
    summary = "\n".join(["health: " + ", ".join(parts), *(f"health: warning: {note}" for note in notes)])
    if process.rank == 0:
        print(summary, flush=True)
    return summary


def _report(process: Process, device: torch.device, fingerprint: str) -> Report:
    is_gpu = device.type == "cuda"
    return Report(
        rank=process.rank,
        host=socket.gethostname(),
        device=torch.cuda.get_device_name(device) if is_gpu else "cpu",
        agreed={
            "world size": process.world_size,
            "configuration (fingerprint)": fingerprint,
            "commit": _commit(),
            **{package: _version(package) for package in _PACKAGES},
            "NCCL": ".".join(map(str, nccl.version())) if is_gpu else None,
        },
        taken=_taken(device) if is_gpu else None,
        broken=_wrong_product(device),
        note=_uncorrected_errors(device) if is_gpu else None,
    )


def refuse_unfit(reports: Sequence[Report]) -> None:
    """Raises UserError or RuntimeError for the first report that is not fit to train with the others."""
    for key in reports[0].agreed:
        # Of as many against as many, rank 0 is right.
        usual = Counter(report.agreed[key] for report in reports).most_common(1)[0][0]
        other = [report for report in reports if report.agreed[key] != usual]
        if other:
            more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
            right = next(report for report in reports if report.agreed[key] == usual)
            raise UserError(
                f"{other[0].name}{more} has {key} {other[0].agreed[key]} and {right.name} has {usual}; "
                "start every rank with the same command, files and environment"
            )
    for report in reports:
        if report.taken:
            raise UserError(f"{report.name}: {report.taken}")
        if report.broken:
            raise RuntimeError(f"{report.name}: {report.broken}; leave the node out (sbatch --exclude={report.host})")


def slow_links(reports: Sequence[Report], rates: Sequence[float]) -> list[str]:
    """A sentence for every link much slower than its kind.  `rates`, in bytes/s: what rank r receives from rank r - 1.

    Links inside a host and links between hosts are two kinds.
    """
    links = [(reports[rank - 1], report, rate) for rank, (report, rate) in enumerate(zip(reports, rates, strict=True))]
    found = []
    for kind in (True, False):
        alike = [link for link in links if (link[0].host == link[1].host) == kind]
        median = statistics.median(rate for _, _, rate in alike) if alike else 0.0
        for sender, receiver, rate in alike:
            if rate < SLOW * median:
                found.append(
                    f"{receiver.name} receives {rate / 1e9:.2f} GB/s from {sender.name}, where such links have "
                    f"{median / 1e9:.2f} GB/s"
                )
    return found


def _all_reduce_rate(reports: Sequence[Report], device: torch.device, num_bytes: int) -> float:
    """Bytes/s through each link of a ring of n ranks: 2 (n - 1) / n of the tensor in the fastest of a few calls."""
    world = len(reports)
    own = torch.arange(num_bytes // 4, dtype=torch.int32, device=device) % 1000
    wanted = own * (world * (world + 1) // 2)
    seconds = []
    wrong = False
    for _ in range(_REPEATS):
        summed = own * (dist.get_rank() + 1)
        _synchronize(device)
        start = time.perf_counter()
        dist.all_reduce(summed)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
        wrong = wrong or not torch.equal(summed, wanted)
    ends = _gather((wrong, min(seconds)), world)
    for report, (found, _) in zip(reports, ends, strict=True):
        if found:
            raise RuntimeError(
                f"{report.name}: an all-reduce of known numbers over {world} ranks gave others; "
                f"leave the node out (sbatch --exclude={report.host}) or repair its network"
            )
    return 2 * (world - 1) / world * num_bytes / max(slowest for _, slowest in ends)


def _receive_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes/s from the rank before, while every rank sends to the next."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sent = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    seconds = []
    for _ in range(_REPEATS):
        dist.barrier()
        _synchronize(device)
        start = time.perf_counter()
        operations = [
            dist.P2POp(dist.isend, sent, (rank + 1) % world),
            dist.P2POp(dist.irecv, received, (rank - 1) % world),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return num_bytes / min(seconds)


def _wrong_product(device: torch.device) -> str | None:
    """Matrix products that every order of summation makes exact, in the types that training uses."""
    generator = torch.Generator().manual_seed(0)
    # Sums of at most 256 terms of -1, 0 and 1: whole numbers that bfloat16 still holds.
    matrix = torch.randint(-1, 2, (256, 256), generator=generator)
    wanted = (matrix @ matrix).to(device)
    # On a GPU enough of them to reach all of its multiprocessors.
    batch = 256 if device.type == "cuda" else 1
    for dtype in (torch.float32, torch.bfloat16):
        factors = matrix.to(device, dtype).expand(batch, -1, -1)
        if not bool((torch.bmm(factors, factors) == wanted).all()):
            return f"{_describe(device)} computed a matrix product of small whole numbers wrong in {dtype}"
    return None


def _taken(device: torch.device) -> str | None:
    free, total = torch.cuda.mem_get_info(device)
    if free >= FREE_SHARE * total:
        return None
    return (
        f"{_describe(device)} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; end what else runs on it "
        "(nvidia-smi lists it), or choose other GPUs with CUDA_VISIBLE_DEVICES"
    )


def _uncorrected_errors(device: torch.device) -> str | None:
    """Memory errors that the GPU found but could not repair since its last reset, if nvidia-smi tells."""
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", f"--id={gpu}", "--query-gpu=ecc.errors.uncorrected.volatile.total"]
    try:
        found = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, encoding="utf-8", errors="replace", timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    errors = found.stdout.strip()
    if not errors.isdigit() or errors == "0":
        return None
    return f"{gpu} counts {errors} uncorrected memory errors since its last reset; have it reset or replaced"


def _describe(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "the CPU"


def _gather(value: Any, world_size: int) -> list[Any]:
    if world_size == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this code runs from; None outside one.  Local changes take long to look for."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")
