"""What arms are matched by: exact counts of parameters and FLOPs, before anything runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lfm.errors import UserError
from lfm.experiments.ablation import TEXT, AblationConfig, Planned


@dataclass(frozen=True)
class Size:
    """Of one arm's model on the set's own rows."""

    active_non_embedding: int
    """Trainable parameters that a token uses, without embedding and output projection."""
    trainable: int
    frozen: int
    total: int
    flops_per_token: float
    """Forward and backward, of rows that are one document."""

    @classmethod
    def of(cls, planned: Planned) -> "Size":
        counts = planned.run.model.count_parameters()
        return cls(
            counts.active_non_embedding,
            counts.trainable,
            counts.frozen,
            counts.total,
            planned.run.model.flops_per_token(),
        )

    def stored(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def sizes_of(runs: Mapping[str, Planned]) -> dict[str, Size]:
    return {arm: Size.of(planned) for arm, planned in runs.items()}


def _matched(size: Size, by: str) -> float:
    return size.active_non_embedding if by == "parameters" else size.flops_per_token


def check_matched(ablation: AblationConfig, sizes: Mapping[str, Size]) -> None:
    """Raises UserError, saying by how much, for an arm that is further from the first one than match.tolerance."""
    by, tolerance = ablation.match.by, ablation.match.tolerance
    if by == "seconds":
        return
    first, *others = sizes
    wanted, what = _matched(sizes[first], by), _WORDS[by]
    apart = {arm: _matched(sizes[arm], by) / wanted - 1 for arm in others}
    beyond = {arm: share for arm, share in apart.items() if abs(share) > tolerance}
    if beyond:
        arm = max(beyond, key=lambda arm: abs(beyond[arm]))
        others = len(beyond) - 1
        more = f" (and {others} more {'arm is' if others == 1 else 'arms are'} too far)" if others else ""
        raise UserError(
            f"arm {arm} has {_matched(sizes[arm], by):,.0f} {what} and arm {first} {wanted:,.0f}, which is "
            f"{beyond[arm]:+.1%} where match.tolerance={tolerance:g} allows {tolerance:.1%}{more}; change its size "
            f"under arms.{arm}.set.model, or set match.tolerance={abs(beyond[arm]) + 5e-4:.3f}"
        )


_WORDS = {"parameters": "active parameters outside of the embedding", "flops": "FLOPs a token", "seconds": "seconds"}


def plan_text(ablation: AblationConfig, runs: Mapping[str, Planned], sizes: Mapping[str, Size]) -> str:
    """The text of `--plan`: every arm's exact sizes, its rates, and what all runs together take."""
    first = next(iter(sizes))
    by, match = ablation.match.by, ablation.match
    column = "" if by == "seconds" else f"against {first}"
    head = ["arm", "active, no embedding", "trainable", "frozen", "total", "FLOPs a token", column, "learning rates"]
    rows = []
    for arm, size in sizes.items():
        apart = "" if by == "seconds" else f"{_matched(size, by) / _matched(sizes[first], by) - 1:+.2%}"
        counts = (size.active_non_embedding, size.trainable, size.frozen, size.total, round(size.flops_per_token))
        rates = "untrained" if ablation.arms[arm].untrained else ", ".join(f"{r:g}" for r in ablation.rates_of(arm))
        rows.append([arm, *(f"{count:,}" for count in counts), apart, rates])
    widths = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)]
    if by == "seconds":
        matched = f"{match.seconds:g} s of training a run, 10 steps at least, by a pilot's speed"
    else:
        matched = f"within {match.tolerance:.1%} of {first}"
    lines = [*(_line(row, widths) for row in (head, *rows)), "", *_totals(ablation, runs, sizes)]
    return "\n".join([*lines, f"matched by {_WORDS[by]}: {matched}"])


def _line(cells: list[str], widths: list[int]) -> str:
    """Numbers to the right, the first and the last cell to the left."""
    first, *middle, last = cells
    aligned = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
    return "  ".join([first.ljust(widths[0]), *aligned, last])


def _totals(ablation: AblationConfig, runs: Mapping[str, Planned], sizes: Mapping[str, Size]) -> list[str]:
    further = len(ablation.seeds) - 1
    counts = {arm: len(ablation.rates_of(arm)) + further for arm in runs}
    trained = {arm: planned for arm, planned in runs.items() if not planned.untrained}
    run = next(iter(trained.values())).run
    steps, rows, row = run.training.steps, run.training.global_batch_size, run.model.seq_length
    what = f"{rows:,} rows of {row:,} a step"
    if ablation.match.by != "seconds":
        flops = sum(counts[arm] * sizes[arm].flops_per_token * steps * rows * row for arm in trained)
        what += f", {steps:,} steps, {steps * rows * row:,} tokens a run; {flops:.3g} FLOP in all"
    each = f"each rate of an arm with one seed, its best with {further} more"
    lines = [f"{sum(counts.values())} runs on {TEXT}, {each}: {what}"]
    if ablation.probes is not None:
        probes = ablation.probes
        count = len(probes.tasks) * sum(len(ablation.rates_of(arm)) for arm in runs)
        steps = f"{probes.steps:,} steps of {probes.global_batch_size} rows each"
        lines.append(f"{count} runs on probes ({', '.join(probes.tasks)}): {steps}")
    return lines
