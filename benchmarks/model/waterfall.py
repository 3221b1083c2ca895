"""A profiled step as parts that sum to it: every kernel has one, and every moment has one kernel or none.

A kernel belongs to the innermost range, or backward node, that launched it; a node belongs to the range of the
operation that made it.  Without a GPU the operations of the CPU stand for kernels.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.model.parts import COMMUNICATION, COMPUTE, DATA_WAIT, IDLE, PARTS, PREFIX, STEP

_BACKWARD = "autograd::engine::evaluate_function: "


@dataclass(frozen=True)
class Event:
    """What a profiler recorded; times in ns of one clock."""

    name: str
    start: int
    end: int
    on_device: bool = False
    is_range: bool = False
    thread: int = 0
    """Of the system."""
    torch_thread: int = 0
    sequence: int = -1
    """Of a forward operation, of the node that it makes; of a backward one, of its node."""
    forward_thread: int = 0
    """`torch_thread` of the operation that made this backward's node; 0: this is none."""
    correlation: int = 0
    """Of a launch and the kernels that it started; of operations, a number of their own."""
    operation: int = 0
    """`correlation` of the operation around the launch of a kernel; 0: not known."""


@dataclass
class Waterfall:
    """Milliseconds of one step by part, in the order of PARTS; they sum to it."""

    parts: dict[str, float]
    profiled_ms: float
    """The step under the profiler, whose host is slower."""
    gaps_profiled_ms: float
    """Of host gaps in it."""
    kernels: int


def recorded(profiler: Any) -> list[Event]:
    """Of a `torch.profiler.profile` that has ended.  Its own event tree takes minutes for half a million kernels."""
    from torch._C._autograd import DeviceType

    found = []
    for event in profiler.profiler.kineto_results.events():
        on_device, is_range = event.device_type() != DeviceType.CPU, event.is_user_annotation()
        if on_device and (is_range or event.duration_ns() <= 0):
            continue  # a range's shadow on the GPU
        found.append(
            Event(
                event.name(),
                event.start_ns(),
                event.start_ns() + event.duration_ns(),
                on_device=on_device,
                is_range=is_range,
                thread=event.device_resource_id(),
                torch_thread=event.start_thread_id(),
                sequence=event.sequence_nr(),
                forward_thread=event.fwd_thread_id() if event.sequence_nr() >= 0 else 0,
                correlation=event.correlation_id(),
                operation=event.linked_correlation_id(),
            )
        )
    return found


@dataclass
class _Open:
    """A host event that has not ended."""

    event: Event
    part: str | None
    kind: str | None
    """What its kernels are if they communicate."""
    works: bool
    """Whether it is an operation or within one."""


@dataclass
class _Host:
    """What the host's events say of kernels."""

    work: list[tuple[int, int, str]] = field(default_factory=list)
    """(start, end, part) of what the CPUs computed."""
    launches: dict[int, tuple[str | None, str | None]] = field(default_factory=dict)
    """Part and kind of communication, by correlation."""
    operations: dict[int, tuple[str | None, str | None]] = field(default_factory=dict)


def waterfalls(events: Sequence[Event]) -> list[Waterfall]:
    """Of every step in it, of whatever a GPU did or, without one, the CPU."""
    device = [event for event in events if event.on_device]
    host = _read_host([event for event in events if not event.on_device])
    work = list(_kernels(device, host)) if device else host.work
    waits = [(e.start, e.end) for e in events if e.name == DATA_WAIT and not e.on_device]
    steps = sorted((e.start, e.end) for e in events if e.name == STEP and not e.on_device)
    return [_one_step(work, waits, *step) for step in steps]


def _kernels(device: Iterable[Event], host: _Host) -> Iterator[tuple[int, int, str]]:
    for kernel in device:
        part, kind = host.launches.get(kernel.correlation, (None, None))
        if part is None and kernel.operation:
            part, of_operation = host.operations.get(kernel.operation, (None, None))
            kind = kind or of_operation
        name = kernel.name.lower()
        if "nccl" in name:
            part = kind if kind == "exchange" else "bubble" if "sendrecv" in name else "collectives"
        yield kernel.start, kernel.end, part or "other"


def _read_host(events: Iterable[Event]) -> _Host:
    host, threads = _Host(), dict[int, list[_Open]]()
    nodes: dict[tuple[int, int], str | None] = {}
    times: dict[int, int] = {}

    def close(thread: int, until: int) -> None:
        """Take from the stack what has ended, and note who worked."""
        stack = threads[thread]
        while stack and stack[-1].event.end <= until:
            _work(host, stack[-1], times[thread], stack[-1].event.end)
            times[thread] = max(times[thread], stack[-1].event.end)
            stack.pop()
        if stack:
            _work(host, stack[-1], times[thread], until)
        times[thread] = max(times[thread], until)

    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        stack = threads.setdefault(event.thread, [])
        times.setdefault(event.thread, event.start)
        close(event.thread, event.start)
        outer = stack[-1] if stack else _Open(event, None, None, False)
        part = _part(event, outer.part, nodes)
        kind = _communication(event.name) or outer.kind
        if event.is_range and not event.name.startswith("nccl:"):
            kind = None  # what gloo has under way lies around whatever is computed meanwhile
        is_launch = event.name.startswith(("cu", "hip")) and event.sequence < 0 and not event.is_range
        stack.append(_Open(event, part, kind, outer.works or not (event.is_range or is_launch)))
        if event.sequence >= 0 and not event.forward_thread:
            nodes[event.torch_thread, event.sequence] = part  # the last of a number is the one that makes the node
        if is_launch:
            host.launches[event.correlation] = part, kind
        elif not event.is_range:
            host.operations[event.correlation] = part, kind
    for thread in threads:
        close(thread, 2**63 - 1)
    return host


def _part(event: Event, outer: str | None, nodes: dict[tuple[int, int], str | None]) -> str | None:
    if event.is_range:
        name = event.name.removeprefix(PREFIX)
        return name if event.name.startswith(PREFIX) and name in PARTS else outer
    if event.forward_thread:
        return nodes.get((event.forward_thread, event.sequence)) or outer
    return "accumulation" if event.name.startswith(_BACKWARD) and "AccumulateGrad" in event.name else outer


def _communication(name: str) -> str | None:
    """Which kind an operation's name says: c10d, NCCL and gloo name theirs alike but for underscores."""
    name = name.lower()
    if not name.startswith(("c10d::", "nccl:", "gloo:")):
        return None
    if "alltoall" in name.replace("_", ""):
        return "exchange"
    return "bubble" if "send" in name or "recv" in name else "collectives"


def _work(host: _Host, open_: _Open, start: int, end: int) -> None:
    if open_.works and end > start:
        host.work.append((start, end, open_.kind or open_.part or "other"))


def _one_step(work: list[tuple[int, int, str]], waits: list[tuple[int, int]], start: int, end: int) -> Waterfall:
    inside = [(max(a, start), min(b, end), part) for a, b, part in work if b > start and a < end]
    spent = dict.fromkeys(PARTS, 0.0)
    spans = [*inside, *((max(a, start), min(b, end), "data wait") for a, b in waits if b > start and a < end)]
    for length, active in _moments(spans, start, end):
        for kind in (COMPUTE, COMMUNICATION, ("data wait",)):
            here = [part for part in kind if active[part]]
            if here:
                break
        else:
            here = ["host gaps"]
        for part in here:  # at once: each has its share
            spent[part] += length / len(here) / 1e6
    return Waterfall(spent, (end - start) / 1e6, spent["host gaps"], len(inside))


def _moments(spans: Iterable[tuple[int, int, str]], start: int, end: int) -> Iterator[tuple[int, Counter[str]]]:
    """Lengths between changes, and how often each part is under way there."""
    changes = sorted([(a, 1, part) for a, _, part in spans] + [(b, -1, part) for _, b, part in spans])
    active: Counter[str] = Counter()
    now = start
    for time, change, part in changes:
        if time > now:
            yield time - now, active
            now = time
        active[part] += change
    if end > now:
        yield end - now, Counter()


def scaled(waterfall: Waterfall, step_ms: float) -> Waterfall:
    """The parts of a step of `step_ms`, as timed without a profiler, which slows the host and hardly the kernels.

    Kernels keep their times and host gaps take the difference.  Where even no gaps are too long, waiting for other
    processes has been stretched too: communication and data wait shrink in proportion, and then all.
    """
    parts, excess = dict(waterfall.parts), waterfall.profiled_ms - step_ms
    for names in (("host gaps",), (*COMMUNICATION, "data wait"), COMPUTE):
        total = sum(parts[name] for name in names)
        if names == ("host gaps",) and excess < 0:
            parts["host gaps"] -= excess
            break
        less = min(excess, total)
        for name in names:
            parts[name] *= 1 - less / total if total else 1
        excess -= less
    return Waterfall(parts, waterfall.profiled_ms, waterfall.gaps_profiled_ms, waterfall.kernels)


def mean(falls: Sequence[Waterfall]) -> Waterfall:
    """Of several steps, or of the processes of one."""
    n = len(falls)
    parts = {part: sum(fall.parts[part] for fall in falls) / n for part in PARTS}
    profiled, gaps = (sum(getattr(f, name) for f in falls) / n for name in ("profiled_ms", "gaps_profiled_ms"))
    return Waterfall(parts, profiled, gaps, round(sum(fall.kernels for fall in falls) / n))


def shares(fall: Waterfall) -> dict[str, float]:
    """Of the step: computing, communication alone, neither."""
    total = sum(fall.parts.values())
    found = {
        "compute": sum(fall.parts[part] for part in COMPUTE),
        "collective": fall.parts["collectives"],
        "send_receive": fall.parts["exchange"] + fall.parts["bubble"],
        "idle": sum(fall.parts[part] for part in IDLE),
    }
    return {**{name: value / total for name, value in found.items()}, "kernels": fall.kernels}


def table(columns: dict[str, dict[str, float]]) -> list[str]:
    """Markdown: milliseconds and share of every part that some column has; the last line is the step."""
    lines = [f"| part | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    totals = {name: sum(parts.values()) for name, parts in columns.items()}
    for part in PARTS:
        if not any(parts[part] for parts in columns.values()):
            continue
        cells = [f"{parts[part]:,.1f} ms, {parts[part] / totals[name]:.1%}" for name, parts in columns.items()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    lines.append(f"| step | {' | '.join(f'{total:,.1f} ms' for total in totals.values())} |")
    return lines
