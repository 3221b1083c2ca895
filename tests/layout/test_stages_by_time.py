"""Stages by measured time: the schedule that is simulated, the tables of cards, the sizes that come of both."""

import json
import math

import pytest

from lfm.layout.balance import moves
from lfm.layout.config import ParallelConfig
from lfm.layout.fastest import fastest_sizes, step_time
from lfm.layout.layout import Layout, check_layout
from lfm.layout.simulate import Times, schedule, simulated_time
from lfm.layout.stage_times import StageTimes, stage_times
from lfm.models.lfm import LFMConfig
from lfm.training.run import RunConfig
from tests.training.tiny_run import ROOT

FLAGSHIP = LFMConfig.model_validate(RunConfig.load(ROOT / "configs/lfm_3b.yaml").model.model_dump())
H200 = "NVIDIA H200"


def h200(rows: int = 2, tensor: int = 1, **changes) -> StageTimes:
    found = stage_times(FLAGSHIP.model_copy(update=changes), H200, rows=rows, tensor=tensor)
    assert found is not None
    return found


def checked(card: str | None, world: int, rows: int = 2, model=FLAGSHIP, **keys) -> Layout:
    parallel = ParallelConfig(zero_stage=1, **keys)
    return check_layout(
        model, parallel, world, global_batch_size=8 * world, micro_batch_size=rows, half=True, card=card
    )


def sizes_of(layout: Layout) -> tuple[int, ...]:
    return tuple(len(chunk) for chunk in layout.chunk_layers)


# The schedule.


@pytest.mark.parametrize("micro_batches", [4, 8, 12])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("stages", [2, 4])
def test_the_simulated_order_is_megatron_cores(stages, chunks, micro_batches):
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules", reason="needs the extra `parallel`")
    table = schedules.get_schedule_table(micro_batches, chunks, stages)
    for stage in range(stages):
        passes = list(schedule(stage, stages, chunks, micro_batches))
        forward = [(micro_batch, chunk) for is_forward, chunk, micro_batch in passes if is_forward]
        backward = [(micro_batch, chunk) for is_forward, chunk, micro_batch in passes if not is_forward]
        assert forward == [(m, c * stages + stage) for m, c in table]
        assert backward == [(m, (chunks - 1 - c) * stages + stage) for m, c in table]
        # After the warm-up one of each in turn.
        warm_up = next(i for i, (is_forward, *_) in enumerate(passes) if not is_forward) - 1
        steady = [is_forward for is_forward, *_ in passes[warm_up : 2 * len(forward) - warm_up]]
        if len(forward) > warm_up + 1:
            assert steady == [True, False] * (len(steady) // 2)
            assert warm_up == (stages - stage - 1) * (1 if chunks == 1 else 2) + (chunks - 1) * stages


def test_equal_stages_take_the_time_of_the_textbook():
    """Narayanan et al. 2021: (m + p - 1) passes of a stage, and with v chunks m + (p - 1) / v."""
    stages, micro_batches = 4, 12
    for chunks in (1, 2, 3):
        each = Times(1 / chunks, 1 / chunks, 1 / chunks)
        found = simulated_time([each] * (stages * chunks), stages, micro_batches)
        assert found == pytest.approx(3 * (micro_batches + (stages - 1) / chunks))


def test_a_transfer_delays_the_first_and_the_last_micro_batch():
    chunks = [Times(1, 1, 1)] * 2
    # Never later than the neighbour has time for it, between two micro-batches.
    assert simulated_time(chunks, 2, 1, transfer=0.25) == 6.5
    assert simulated_time(chunks, 2, 1, transfer=0.25, keep=0) == 5.5


# ms of a step, 8 rows a GPU in micro-batches of 2: without gradients that wait, and with them right behind.
SIMULATED = {
    "PP2": ((12, 8), 2, 1511, 1470),
    "PP2/VP2": ((6, 6, 6, 2), 2, 1420, 1402),
    "PP4": ((6, 6, 6, 2), 4, 1645, 1586),
    "PP4, seven first": ((7, 6, 6, 1), 4, 1714, 1620),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_the_flagships_simulated_steps(name):
    sizes, stages, together, behind = SIMULATED[name]
    times = h200()
    for keep, want in ((None, together), (0, behind)):
        found = simulated_time(times.chunks(sizes), stages, 4 * stages, transfer=times.transfer, keep=keep)
        assert round(found) == want


def test_smaller_micro_batches_shorten_four_stages_and_kept_gradients_more_so():
    times = h200(rows=1)
    found = [
        simulated_time(times.chunks((6, 6, 6, 2)), 4, 32, transfer=times.transfer, keep=keep) for keep in (None, 0, 1)
    ]
    assert [round(each) for each in found] == [1522, 1493, 1481]


def test_long_steps_are_extrapolated_exactly():
    times = h200()
    for sizes, stages in (((5, 7, 7, 1), 2), ((6, 6, 6, 2), 4)):
        whole = simulated_time(times.chunks(sizes), stages, 64, transfer=times.transfer)
        assert step_time(times, sizes, stages, 64, keep=None) == pytest.approx(whole, rel=1e-3)


# The tables.


@pytest.mark.parametrize("path", sorted((ROOT / "lfm/layout/costs").glob("*.json")), ids=lambda path: path.stem)
def test_a_table_counts_the_measured_model_as_the_code_does(path):
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert FLAGSHIP.reservoir is not None
    reservoirs = FLAGSHIP.reservoir.cost(FLAGSHIP.hidden_size).flops
    assert parts["layer"]["flops_per_token"] == FLAGSHIP.layer_cost(1).flops
    assert parts["reservoirs"]["flops_per_token"] == reservoirs
    assert FLAGSHIP.layer_cost(0).flops == FLAGSHIP.layer_cost(1).flops + reservoirs
    assert parts["head"]["flops_per_token"] == FLAGSHIP.head_flops
    assert parts["embedding"]["elements_per_token"] == FLAGSHIP.hidden_size


def test_the_flagship_takes_what_was_measured():
    times = h200()
    assert times.layers[1] == Times(3.9, 6.1, 2.75) and times.head == Times(42, 1, 19)
    assert tuple(times.layers[4]) == pytest.approx((4.85, 7.02, 3.21))
    assert sum(chunk.total for chunk in times.chunks((6, 6, 6, 2))) == pytest.approx(330, abs=1)
    assert times.transfer == pytest.approx(0.36, abs=0.005)


def test_other_sizes_take_measured_rates():
    assert h200(rows=1).layers[1] == pytest.approx(h200().layers[1].times(0.5))
    assert h200(vocab_size=2 * FLAGSHIP.vocab_size).head == pytest.approx((84, 2, 38))
    split = h200(tensor=2)
    assert split.layers[1] == pytest.approx(h200().layers[1].times(0.5))
    # Tensor ranks run the recurrence whole.
    assert split.layers[0].forward - split.layers[1].forward == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("card", "changes"),
    [
        ("NVIDIA A100-SXM4-80GB", {}),
        (None, {}),
        (H200, {"ffn": {"kind": "swiglu", "ffn_hidden_size": 8192}}),
        (H200, {"liquid": {"kind": "diagonal"}}),
    ],
    ids=["another card", "a CPU", "no experts", "another liquid"],
)
def test_what_was_not_measured_is_balanced_by_flops(card, changes):
    model = LFMConfig.model_validate({**FLAGSHIP.model_dump(), **changes})
    assert stage_times(model, card, rows=2, tensor=1) is None
    layout = checked(card, 2, model=model, pipeline=2)
    assert layout.card is None and sizes_of(layout) == sizes_of(checked(None, 2, model=model, pipeline=2))
    assert layout.describe().endswith("by FLOPs")


# The sizes.


def test_stages_of_the_flagship_on_h200():
    assert sizes_of(checked(H200, 2, pipeline=2)) == (12, 8)
    assert sizes_of(checked(H200, 2, pipeline=2, virtual_pipeline=2)) == (1, 6, 11, 2)
    assert sizes_of(checked(H200, 4, pipeline=4)) == (6, 6, 6, 2)
    assert (
        checked(H200, 2, pipeline=2).describe().endswith("stages 12 | 8 + head, balance 0.98 by times on NVIDIA H200")
    )
    assert checked(H200, 2).card is None and "by" not in checked(H200, 2).describe()


def test_layers_set_by_hand_stay():
    layout = checked(H200, 2, pipeline=2, stage_layers=(10, 10))
    assert sizes_of(layout) == (10, 10) and layout.card == H200


@pytest.mark.parametrize(("stages", "chunks"), [(2, 2), (2, 4), (4, 2), (4, 3)])
def test_moving_no_layer_shortens_the_step(stages, chunks):
    times = h200()
    sizes = fastest_sizes(times, stages, chunks, 4 * stages, keep=0)
    assert sum(sizes) == 20 and min(sizes) >= 1 and len(sizes) == stages * chunks
    best = step_time(times, sizes, stages, 4 * stages, keep=0)
    assert all(step_time(times, moved, stages, 4 * stages, keep=0) >= best for moved in moves(sizes))
    assert not math.isnan(best)


def test_the_page_says_what_is_simulated():
    times, page = h200(), (ROOT / "docs/parallelism.md").read_text(encoding="utf-8")
    of_one = 4 * times.chunks((20,))[0].total
    assert f"({round(of_one, -1):,.0f} ms)" in page

    def cell(stages: int, sizes: tuple[int, ...], *keeps: int | None) -> str:
        steps = [
            simulated_time(times.chunks(sizes), stages, 4 * stages, transfer=times.transfer, keep=keep)
            for keep in keeps
        ]
        return f"{', '.join(map(str, sizes))}: " + ", ".join(f"{of_one / step:.0%}" for step in steps)

    for stages in (2, 4):
        by_flops = sizes_of(checked(None, stages, pipeline=stages))
        plain, interleaved = (
            sizes_of(checked(H200, stages, pipeline=stages, virtual_pipeline=chunks)) for chunks in (1, 2)
        )
        cells = [cell(stages, by_flops, None), cell(stages, plain, 1), cell(stages, interleaved, 0)]
        row = next(line for line in page.splitlines() if line.startswith(f"| {stages} | {cells[0].partition(':')[0]}:"))
        assert row == f"| {stages} | {' | '.join(cells)} |"
