"""The tables and the picture of docs/performance.md, from whatever is recorded in a folder of results."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.model.waterfall import table

Result = dict[str, Any]
_NONE = "Nothing is recorded."


def recorded(folder: Path, kind: str) -> dict[str, Result]:
    """`KIND_NAME.json` of the folder by NAME, such as `model_lfm_3b` of `launch/bench.py` or of scale_out.py."""
    files = sorted(folder.glob(f"{kind}_*.json"))
    return {path.stem.removeprefix(f"{kind}_"): json.loads(path.read_text(encoding="utf-8")) for path in files}


def where(result: Result) -> str:
    environment, runs = result["environment"], result["runs"]
    device = f"{environment['gpus']} {environment['gpu']}" if environment["gpu"] else "CPUs, where speeds mean nothing"
    return (
        f"{device}, torch {environment['versions']['torch']}, commit {(environment['commit'] or 'unknown')[:7]}, "
        f"{result['date']}, {runs} run"
    )


def speeds(results: dict[str, Result]) -> str:
    """Tokens/s of every layout and routing, before and now."""
    lines = [
        "| run | layout | routing | tokens/s a GPU (slowest to fastest step) | MFU attended | step, ms | "
        "load, max over mean | peak GiB | host gaps |",
        "| --- " * 9 + "|",
    ]
    for name, result in results.items():
        for state, row in _rows(result):
            for routing, one in _routings(row):
                slow, fast = one["range"]
                loads, memory = one["expert_load_max_over_mean"], [m for m in one["peak_memory_gib"] if m is not None]
                gaps = one["waterfall"]["parts"]["host gaps"] / one["step_ms"]
                lines.append(
                    f"| {name}{state} | {row['layout']} | {routing} | {one['tokens_per_second_per_gpu']:,.0f} "
                    f"({slow:,.0f} to {fast:,.0f}) | {_percent(one['mfu_attended'])} | {one['step_ms']:,.0f} | "
                    f"{f'{sum(loads) / len(loads):.2f}' if loads else ''} | "
                    f"{f'{max(memory):.1f}' if memory else ''} | {gaps:.1%} |"
                )
    if len(lines) == 2:
        return _NONE
    return "\n".join([*lines, "", "; ".join(f"{name}: {where(result)}" for name, result in results.items()) + "."])


def waterfalls(results: dict[str, Result], picture: Path) -> str:
    """A table of parts for every run, a column for each layout and routing."""
    blocks = []
    for name, result in results.items():
        columns = bars({"": result})
        if columns:
            blocks.append("\n".join([f"**{name}**", "", *table(columns)]))
    if not blocks:
        return _NONE
    shown = [f"![how a step is spent]({picture.name})"] if picture.exists() else []
    return "\n\n".join([*blocks, *shown])


def bars(results: dict[str, Result]) -> dict[str, dict[str, float]]:
    """Milliseconds by part, of all layouts and routings."""
    found = {}
    for name, result in results.items():
        for state, row in _rows(result):
            for routing, one in _routings(row):
                start = f"{name}: " if name else ""
                found[f"{start}{row['layout']}{state}, {routing}"] = one["waterfall"]["parts"]
    return found


def peers(results: dict[str, Result]) -> str:
    """Libraries that train a model of the same shape."""
    lines = ["| peer | GPUs | tokens/s a GPU (slowest to fastest step) | MFU | peak GiB | on |", "| --- " * 6 + "|"]
    for result in results.values():
        for row in result["peers"]:
            slow, fast = row["range"]
            memory, rate = row["peak_memory_gib"], row["tokens_per_second_per_gpu"]
            lines.append(
                f"| {row['name']} | {row['gpus']} | {rate:,.0f} ({slow:,.0f} to {fast:,.0f}) "
                f"| {_percent(row['mfu'])} | {f'{memory:.1f}' if memory is not None else ''} | {where(result)} |"
            )
    return "\n".join(lines) if results else _NONE


def collectives(results: dict[str, Result]) -> str:
    """Bus bandwidth by collective, size and CUDA_DEVICE_MAX_CONNECTIONS, and what products hide."""
    lines = []
    for name, result in results.items():
        cases = sorted(result.get("nccl", []), key=lambda case: case["connections"])
        if not cases:
            continue
        heads = " | ".join(f"{case['connections']} connections" for case in cases)
        lines += [f"| {name}, GB/s of the bus | {heads} |", "| --- " * (len(cases) + 1) + "|"]
        for rows in zip(*(case["rows"] for case in cases), strict=True):
            rates = " | ".join(f"{row['bus_gb_per_second']:,.0f}" for row in rows)
            lines.append(f"| {rows[0]['collective']}, {rows[0]['size']} | {rates} |")
        buckets = [case["reduce_scatter_in_buckets"] for case in cases]
        times = " | ".join(f"{each['bus_gb_per_second']:,.0f}, {1e3 * each['seconds']:,.1f} ms" for each in buckets)
        lines.append(
            f"| reduce_scatter, {buckets[0]['bytes'] / 1e9:.1f} GB in {buckets[0]['buckets']} buckets | {times} |"
        )
        for rows in zip(*(case["beside_products"] for case in cases), strict=True):
            hidden = " | ".join(f"{row['hidden']:.0%}" for row in rows)
            lines.append(f"| {rows[0]['collective']} beside products as long: hidden | {hidden} |")
        lines.append("")
    return "\n".join(lines).rstrip() or _NONE


def small(results: dict[str, Result]) -> str:
    """Steps of small families, kernel by kernel and replayed, and peers beside them: `small_NAME.json` of
    `benchmarks/small.py`."""
    lines = [
        "| preset | tokens/s kernel by kernel | replayed (slowest to fastest window) | step, ms: wall, busy "
        "| kernels | losses and norms | floor, tokens/s |",
        "| --- " * 7 + "|",
    ]
    for result in results.values():
        for row in (row for row in result["rows"] if "failure" not in row):
            new = row.get("replayed", {} if "parity" in row else row)
            wall = (
                f"{new['step_milliseconds']:.2f}, {new['busy_milliseconds']:.2f}" if "busy_milliseconds" in new else ""
            )
            rate = f"{new['tokens_per_second']:,.0f} ({new['range'][0]:,.0f} to {new['range'][1]:,.0f})" if new else ""
            first = f"{row['plain']['tokens_per_second']:,.0f}" if "plain" in row else "as it is"
            floor = f"{row['floor_tokens_per_second']:,.0f}" if "floor_tokens_per_second" in row else ""
            launches = f"{new['launches']:.0f}" if "launches" in new else ""
            lines.append(f"| {row['name']} | {first} | {rate} | {wall} | {launches} | {_losses(row)} | {floor} |")
    if len(lines) == 2:
        return _NONE
    return "\n".join([*lines, "", "; ".join(f"{name}: {where(result)}" for name, result in results.items()) + "."])


def _losses(row: Result) -> str:
    if "parity" not in row:
        return ""
    parity = row["parity"]
    if parity["to_the_bit"]:
        return f"{parity['steps']} steps equal to the bit"
    own = f"of two runs kernel by kernel {parity['plain_to_plain']:.0e}"
    return f"{parity['steps']} steps within {parity['largest_difference']:.0e}; {own}"


def plot(results: dict[str, Result], picture: Path) -> None:
    """Every waterfall as a bar; nothing where there is none."""
    found = bars(results)
    if found:
        from benchmarks.model.plot import plot_waterfalls

        plot_waterfalls(found, "how a step is spent", picture)


def _rows(result: Result) -> Iterator[tuple[str, Result]]:
    """Layouts that have a waterfall, those of the commit before first, with what marks them."""
    for state, layouts in ((", before", result.get("before", {}).get("layouts", [])), ("", result["layouts"])):
        yield from ((state, row) for row in layouts if "waterfall" in row)


def _routings(row: Result) -> Iterator[tuple[str, Result]]:
    yield row["routing"], row
    if "balanced" in row:
        yield "balanced", row["balanced"]


def _percent(share: float | None) -> str:
    return f"{share:.1%}" if share is not None else ""
