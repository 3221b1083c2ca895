"""Which layouts are legal, what is derived from one, and that every refusal shows a way out that works."""

import itertools
import re
import subprocess
import sys
from typing import get_args

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lfm.errors import UserError
from lfm.layout import table
from lfm.layout.balance import balance, balanced_sizes, stage_loads
from lfm.layout.config import ParallelConfig
from lfm.layout.layout import Layout, check_layout
from lfm.layout.rules import RULES, Request, first_broken
from lfm.models.lfm import LFMConfig
from lfm.models.registry import FAMILIES, ModelConfig, parse
from lfm.training.run import RunConfig
from tests.nested import nested
from tests.training.tiny_run import ROOT

FLAGSHIP = RunConfig.load(ROOT / "configs/lfm_3b.yaml").model


def model_of(**changes) -> LFMConfig:
    sizes = dict(
        hidden_size=96,
        num_layers=6,
        num_attention_heads=12,
        num_query_groups=12,
        seq_length=48,
        vocab_size=90,
        vocab_size_multiple=12,
        num_moe_experts=6,
        moe_ffn_hidden_size=24,
        liquid={"num_reservoirs": 3, "reservoir_size": 8, "interval": 2},
    )
    return LFMConfig.model_validate(nested(**{**sizes, **changes}))


def of_kind(kind: str, **changes) -> ModelConfig:
    """A small model of another family."""
    tree: dict = {"hidden_size": 24, "seq_length": 48, "vocab_size": 90}
    if kind in ("transformer", "liquidnet"):
        tree |= {"num_layers": 6, "ffn_hidden_size": 60, "vocab_size_multiple": 12}
    if kind == "transformer":
        tree |= {"num_attention_heads": 12, "num_query_groups": 6}
    if kind in ("laerc", "lstm"):
        tree |= {"num_layers": 6}
    return parse({"kind": kind, **nested(**{**tree, **changes})}, source="a test")


def check(model, world, *, rows=24, micro=1, half=False, **keys) -> Layout:
    sizes = {"global_batch_size": rows, "micro_batch_size": micro}
    return check_layout(model, ParallelConfig(**keys), world, **sizes, half=half)


def follow(message: str, keys: dict, world: int, micro: int) -> tuple[dict, int, int]:
    """What a user has after pasting the key=value text of a refusal, and starting as many processes as it says."""
    keys = dict(keys)
    number = re.search(r"the nearest number of processes is (\d+)", message)
    for section, key, value in re.findall(r"(parallel|training)\.(\w+)=(\S+)", message.rpartition("; ")[2]):
        if section == "parallel":
            keys[key] = yaml.safe_load(value)
        else:
            assert key == "micro_batch_size"
            micro = int(value)
    return keys, int(number[1]) if number else world, micro


TP2 = dict(tensor=2, sequence_parallel=True, zero_stage=1)
PP2 = dict(pipeline=2, zero_stage=1)

# name: (model changes, world, keys with `rows`, `micro` and `half`, what is refused, the way out)
REFUSED = {
    "heads": (
        {},
        8,
        TP2 | dict(tensor=8),
        "parallel.tensor=8 does not divide attention.num_attention_heads=12",
        "parallel.tensor=4",
    ),
    "query_groups": (
        dict(num_query_groups=2),
        4,
        TP2 | dict(tensor=4),
        "parallel.tensor=4 does not divide attention.num_query_groups=2",
        "parallel.tensor=2",
    ),
    "sequence": (
        dict(seq_length=46),
        4,
        TP2 | dict(tensor=4),
        "parallel.tensor=4 does not divide seq_length=46",
        "parallel.tensor=2",
    ),
    "vocabulary": (
        dict(vocab_size_multiple=2),
        4,
        TP2 | dict(tensor=4),
        "parallel.tensor=4 does not divide padded_vocab_size=90",
        "parallel.tensor=2",
    ),
    "liquid": (
        dict(liquid={"num_reservoirs": 3, "reservoir_size": 2}),
        4,
        TP2 | dict(tensor=4),
        "parallel.tensor=4 does not divide liquid.num_reservoirs x liquid.reservoir_size=6",
        "parallel.tensor=2",
    ),
    "expert_width": (
        dict(moe_ffn_hidden_size=6),
        4,
        TP2 | dict(tensor=4),
        "parallel.tensor=4 does not divide ffn.moe_ffn_hidden_size=6",
        "parallel.tensor=2",
    ),
    "experts": (
        {},
        4,
        dict(expert=4, zero_stage=1),
        "parallel.expert=4 does not divide ffn.num_moe_experts=6",
        "parallel.expert=2",
    ),
    "expert_ranks": (
        {},
        4,
        dict(expert=6, zero_stage=1),
        "parallel.tensor=1 x pipeline=1 with expert=6 does not fit on 4 processes: it takes a multiple of 6",
        "parallel.expert=2",
    ),
    "world": (
        {},
        9,
        PP2,
        "parallel.tensor=1 x pipeline=2 with expert=1 does not fit on 9 processes: it takes a multiple of 2",
        "parallel.pipeline=3",
    ),
    "sequence_parallel": (
        {},
        2,
        dict(tensor=2, zero_stage=1),
        "parallel.tensor=2 does not go with parallel.sequence_parallel=false",
        "parallel.sequence_parallel=true",
    ),
    "no_tensor": (
        {},
        2,
        dict(sequence_parallel=True, zero_stage=1),
        "parallel.sequence_parallel=true does not go with parallel.tensor=1",
        "parallel.sequence_parallel=false",
    ),
    "zero_0": ({}, 2, {}, "parallel.zero_stage=0 does not go with world size 2", "parallel.zero_stage=1"),
    "pipeline_zero_2": (
        {},
        4,
        PP2 | dict(zero_stage=2),
        "parallel.zero_stage=2 does not go with parallel.pipeline=2",
        "parallel.zero_stage=1",
    ),
    "pipeline_zero_3": (
        {},
        4,
        PP2 | dict(zero_stage=3),
        "parallel.zero_stage=3 does not go with parallel.pipeline=2",
        "parallel.zero_stage=1",
    ),
    "expert_zero_3": (
        {},
        4,
        dict(expert=2, zero_stage=3),
        "parallel.zero_stage=3 does not go with parallel.expert=2",
        "parallel.zero_stage=2",
    ),
    "tensor_expert_zero_2": (
        {},
        4,
        TP2 | dict(expert=2, zero_stage=2),
        "parallel.zero_stage=2 does not go with parallel.expert=2 and parallel.tensor=2",
        "parallel.zero_stage=1",
    ),
    "interleaved_without_pipeline": (
        {},
        2,
        dict(virtual_pipeline=2, zero_stage=1),
        "parallel.virtual_pipeline=2 does not go with parallel.pipeline=1",
        "parallel.virtual_pipeline=1",
    ),
    "interleaved_micro_batches": (
        {},
        2,
        PP2 | dict(virtual_pipeline=2, rows=6, micro=2),
        "parallel.virtual_pipeline=2 with 3 micro-batches does not go with parallel.pipeline=2",
        "parallel.virtual_pipeline=1",
    ),
    "layers": (
        {},
        2,
        PP2 | dict(virtual_pipeline=4),
        "parallel.pipeline=2 x parallel.virtual_pipeline=4 is more than num_layers=6",
        "parallel.virtual_pipeline=3",
    ),
    "stage_count": (
        {},
        2,
        PP2 | dict(stage_layers=(2, 2, 2)),
        "parallel.stage_layers=[2, 2, 2] must be 2 numbers that sum to num_layers=6",
        "parallel.stage_layers=null",
    ),
    "stage_sum": (
        {},
        2,
        PP2 | dict(stage_layers=(4, 3)),
        "parallel.stage_layers=[4, 3] must be 2 numbers that sum to num_layers=6",
        "parallel.stage_layers=null",
    ),
    "stage_layers_of_chunks": (
        {},
        2,
        PP2 | dict(stage_layers=(1, 2, 2, 1)),
        "parallel.stage_layers=[1, 2, 2, 1] must be 2 numbers",
        "parallel.virtual_pipeline=2",
    ),
    "batch": (
        {},
        2,
        dict(zero_stage=1, rows=6, micro=6),
        "training.global_batch_size=6 is not a multiple of 12, data-parallel size 2 x training.micro_batch_size=6",
        "training.micro_batch_size=3",
    ),
    "offload": (
        {},
        2,
        dict(zero_stage=1, offload_optimizer=True),
        "parallel.offload_optimizer=true does not go with parallel.zero_stage=1",
        "parallel.zero_stage=2",
    ),
    "no_tensor_parallelism": (
        dict(kind="laerc"),
        4,
        TP2 | dict(pipeline=2),
        "parallel.tensor=2 does not go with model.kind=laerc: this model is spread over data and pipeline alone",
        "parallel.tensor=1 parallel.sequence_parallel=false",
    ),
    "no_pipeline": (
        dict(kind="lstm"),
        4,
        PP2,
        "parallel.pipeline=2 does not go with model.kind=lstm: this model is spread over data alone",
        "parallel.pipeline=1",
    ),
    "no_experts": (
        dict(kind="transformer"),
        4,
        dict(expert=2, zero_stage=1),
        "parallel.expert=2 does not go with model.kind=transformer: this model is spread over data and tensor and "
        "pipeline alone",
        "parallel.expert=1",
    ),
    "channels": (
        dict(kind="liquidnet", hidden_size=22),
        4,
        TP2 | dict(tensor=4),
        "parallel.tensor=4 does not divide hidden_size=22",
        "parallel.tensor=2",
    ),
    "several_passes": (
        dict(kind="liquidnn"),
        2,
        dict(zero_stage=2),
        "parallel.zero_stage=2 does not go with model.kind=liquidnn: its rows are differentiated in several passes",
        "parallel.zero_stage=1",
    ),
    "wide_parameters": (
        dict(kind="liquidnet"),
        2,
        dict(zero_stage=3, half=True),
        "parallel.zero_stage=3 does not go with model.kind=liquidnet in bfloat16: some of its parameters stay in fp32",
        "parallel.zero_stage=2",
    ),
    "two_mistakes": (
        {},
        4,
        dict(tensor=5, pipeline=2),
        "parallel.tensor=5 does not divide attention.num_attention_heads=12",
        "parallel.tensor=2 parallel.sequence_parallel=true parallel.zero_stage=1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_keys_and_the_nearest_legal_layout(case):
    changes, world, keys, refused, way_out = REFUSED[case]
    batch = dict(rows=keys.get("rows", 24), micro=keys.get("micro", 1), half=keys.get("half", False))
    keys = {key: value for key, value in keys.items() if key not in batch}
    model = of_kind(**changes) if "kind" in changes else model_of(**changes)
    with pytest.raises(UserError) as error:
        check(model, world, **keys, **batch)
    message = str(error.value)
    assert message.startswith(refused) and "\n" not in message
    assert message.endswith(f"; the nearest legal layout is {way_out}"), message
    keys, world, batch["micro"] = follow(message, keys, world, batch["micro"])
    check(model, world, **keys, **batch)


def test_every_rule_has_a_refusal_above():
    broken = set()
    for changes, world, keys, *_ in REFUSED.values():
        keys = dict(keys)
        batch = keys.pop("rows", 24), keys.pop("micro", 1), keys.pop("half", False)
        model = of_kind(**changes) if "kind" in changes else model_of(**changes)
        request = Request(model, ParallelConfig(**keys), world, *batch)
        broken.add(RULES.index(first_broken(request)))
    assert broken == set(range(len(RULES)))


@pytest.mark.parametrize("kind", [get_args(config.model_fields["kind"].annotation)[0] for config in FAMILIES])
def test_the_page_says_what_each_family_is_spread_over(kind):
    model = model_of() if kind == "lfm" else of_kind(kind)
    words = ", ".join(key for key in ("data", "tensor", "pipeline", "expert") if key in model.lays_out)
    assert f"| {kind} | {words} |" in (ROOT / "docs/parallelism.md").read_text()
    assert check(model, 2, zero_stage=1).name == "DP2 Z1"
    assert check(model, 1).describe() == "world 1, local engine, 24 micro-batches"


def test_without_a_legal_layout_another_number_of_processes_is_named():
    with pytest.raises(UserError) as error:
        check(model_of(), 7, rows=4, zero_stage=1)
    assert str(error.value).endswith(
        "no layout of 7 processes is legal, the nearest number of processes is 6 with parallel.tensor=3 "
        "parallel.sequence_parallel=true"
    )
    check(model_of(), 6, rows=4, zero_stage=1, tensor=3, sequence_parallel=True)


def test_a_search_that_changes_everything_ends_in_a_legal_layout():
    keys = dict(tensor=5, pipeline=3, virtual_pipeline=9, expert=3, zero_stage=3, offload_optimizer=True)
    with pytest.raises(UserError) as error:
        check(FLAGSHIP, 4096, rows=7, micro=5, stage_layers=(3,), **keys)
    keys, world, micro = follow(str(error.value), keys, 4096, 5)
    check(FLAGSHIP, world, rows=7, micro=micro, **keys)


SIZES = st.sampled_from([1, 1, 2, 3, 4, 6, 8])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_layout_is_consistent_or_refused_with_one_that_is(data):
    heads = data.draw(st.sampled_from([1, 2, 4, 6, 8, 12]))
    model = model_of(
        hidden_size=2 * heads,
        num_layers=data.draw(st.integers(1, 9)),
        num_attention_heads=heads,
        num_query_groups=data.draw(st.sampled_from([n for n in (1, 2, 4, 6) if heads % n == 0])),
        seq_length=data.draw(st.sampled_from([24, 32, 30])),
        num_moe_experts=data.draw(st.sampled_from([2, 3, 4, 6, 8])),
        moe_ffn_hidden_size=data.draw(st.sampled_from([7, 12, 16, 24])),
        vocab_size_multiple=data.draw(st.sampled_from([1, 8, 24])),
        liquid=data.draw(st.sampled_from([None, {"num_reservoirs": 3, "reservoir_size": 4, "interval": 2}])),
    )
    keys = dict(
        tensor=data.draw(SIZES),
        pipeline=data.draw(SIZES),
        virtual_pipeline=data.draw(st.sampled_from([1, 1, 1, 2, 3])),
        expert=data.draw(SIZES),
        sequence_parallel=data.draw(st.booleans()),
        stage_layers=data.draw(st.none() | st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)),
        zero_stage=data.draw(st.integers(0, 3)),
        offload_optimizer=data.draw(st.booleans()),
    )
    world = data.draw(st.integers(1, 3)) * data.draw(st.sampled_from([1, keys["tensor"] * keys["pipeline"]]))
    rows, micro = data.draw(st.sampled_from([4, 6, 24])), data.draw(st.sampled_from([1, 2, 4]))
    try:
        found = check(model, world, rows=rows, micro=micro, **keys)
    except UserError as error:
        message = str(error)
        keys, world, micro = follow(message, keys, world, micro)
        found = check(model, world, rows=rows, micro=micro, **keys)  # the way out is legal
        assert "\n" not in message
    assert_consistent(found, model, world, rows, micro)


def assert_consistent(found: Layout, model: LFMConfig, world: int, rows: int, micro: int) -> None:
    assert found.world == world == found.tensor * found.pipeline * found.data
    assert world == found.pipeline * found.expert * found.expert_tensor * found.expert_data
    assert found.num_micro_batches * micro * found.data == rows
    assert len(found.chunk_layers) == found.pipeline * found.virtual_pipeline and all(found.chunk_layers)
    assert list(itertools.chain(*found.chunk_layers)) == list(range(model.num_layers))
    chunks = [found.stage_chunks(rank) for rank in range(found.pipeline)]
    assert tuple(itertools.chain(*zip(*chunks, strict=True))) == found.chunk_layers
    assert 0 < found.balance <= 1 + 1e-12
    assert found.name and f"world {world}" in found.describe()


@st.composite
def small_partitions(draw):
    costs = draw(st.lists(st.floats(0.5, 2), min_size=2, max_size=9))
    chunks = draw(st.integers(1, len(costs)))
    return costs, draw(st.floats(0, 6)), chunks


def every_partition(num_layers: int, chunks: int):
    for cuts in itertools.combinations(range(1, num_layers), chunks - 1):
        yield [end - start for start, end in zip((0, *cuts), (*cuts, num_layers), strict=True)]


@settings(max_examples=100, deadline=None)
@given(small_partitions())
def test_one_chunk_a_stage_is_balanced_as_well_as_can_be(partition):
    costs, head, chunks = partition
    found = max(stage_loads(costs, head, balanced_sizes(costs, head, chunks, 1), chunks))
    best = min(max(stage_loads(costs, head, sizes, chunks)) for sizes in every_partition(len(costs), chunks))
    assert found <= best * (1 + 1e-12)


@settings(max_examples=100, deadline=None)
@given(small_partitions(), st.integers(2, 3))
def test_interleaved_chunks_are_never_worse_than_the_largest_chunks_made_small(partition, per_stage):
    costs, head, _ = partition
    assume(len(costs) >= 2 * per_stage)
    sizes = balanced_sizes(costs, head, 2, per_stage)
    assert sum(sizes) == len(costs) and min(sizes) >= 1 and len(sizes) == 2 * per_stage
    start = balanced_sizes(costs, head, 2 * per_stage, 1)
    assert max(stage_loads(costs, head, sizes, 2)) <= max(stage_loads(costs, head, start, 2))


@pytest.mark.parametrize(
    "stages, chunks, least", [(2, 2, 0.97), (2, 3, 0.96), (4, 2, 0.87)], ids=["PP2/VP2", "PP2/VP3", "PP4/VP2"]
)
def test_the_flagship_is_balanced_when_interleaved(stages, chunks, least):
    keys = dict(pipeline=stages, virtual_pipeline=chunks, zero_stage=1)
    assert check(FLAGSHIP, stages, **keys).balance >= least


# Balance of LFM-3B over pipeline stages, from the FLOPs of its layers and head.
BALANCE = {
    "2 equal": ((10, 10), 0.83),
    "2 by hand": ((12, 8), 0.95),
    "4 equal": ((5, 5, 5, 5), 0.62),
    "4 by hand": ((7, 6, 6, 1), 0.90),
    "5 equal": ((4, 4, 4, 4, 4), 0.54),
}


@pytest.mark.parametrize("case", BALANCE)
def test_balance_of_given_stages(case):
    stage_layers, want = BALANCE[case]
    stages = len(stage_layers)
    found = check(FLAGSHIP, stages, rows=20, pipeline=stages, zero_stage=1, stage_layers=stage_layers)
    assert round(found.balance, 2) == want
    assert tuple(len(chunk) for chunk in found.chunk_layers) == stage_layers


@pytest.mark.parametrize("stage_layers, want", [((13, 7), 0.97), ((6, 6, 7, 1), 0.90), ((4, 5, 5, 5, 1), 0.81)])
def test_automatic_stages_of_the_flagship(stage_layers, want):
    stages = len(stage_layers)
    found = check(FLAGSHIP, stages, rows=20, pipeline=stages, zero_stage=1)
    assert tuple(len(chunk) for chunk in found.chunk_layers) == stage_layers
    assert round(found.balance, 2) == want
    page = (ROOT / "docs/parallelism.md").read_text()
    assert f"| {stages} | " in page and f"{', '.join(map(str, stage_layers))} + head: {want:.2f} |" in page


def test_the_head_of_the_flagship_costs_as_much_as_five_and_a_half_layers():
    assert round(FLAGSHIP.head_flops / FLAGSHIP.layer_cost(1).flops, 1) == 5.5
    assert FLAGSHIP.layer_cost(0).flops > FLAGSHIP.layer_cost(1).flops, "layer 0 is liquid"


def test_balance_is_mean_over_largest():
    assert balance([3.0, 1.0]) == 2 / 3 and balance([2.0, 2.0]) == 1


def test_a_layout_says_what_it_is():
    keys = dict(tensor=2, sequence_parallel=True, pipeline=2, expert=2, zero_stage=1)
    found = check(FLAGSHIP, 8, rows=512, **keys)
    assert found.name == "TP2+SP x PP2 x DP2 EP2 Z1"
    assert found.describe() == (
        "world 8 = tensor 2 x pipeline 2 x data 2, sequence parallel, expert 2 (expert-data 2), ZeRO-1, "
        "256 micro-batches; stages 13 | 7 + head, balance 0.97 by FLOPs"
    )
    assert (found.expert_tensor, found.expert_data) == (1, 2)
    interleaved = check(FLAGSHIP, 2, pipeline=2, virtual_pipeline=2, zero_stage=1)
    assert interleaved.name == "PP2/VP2 Z1"
    assert "stages 7+6 | 6+1 + head" in interleaved.describe()
    assert check(FLAGSHIP, 1).describe() == "world 1, local engine, 24 micro-batches"
    assert check(FLAGSHIP, 2, zero_stage=3, offload_optimizer=True).name == "DP2 Z3+offload"


def test_experts_are_cut_by_width_without_expert_parallelism():
    found = check(FLAGSHIP, 4, tensor=2, sequence_parallel=True, zero_stage=1)
    assert (found.expert_tensor, found.expert_data, found.data) == (2, 2, 2)


SHIPPED = {"lfm_3b_8gpu": 8, "lfm_3b_32gpu": 32, "lfm_3b_256gpu": 256}


def test_every_shipped_run_with_a_layout_is_known_here():
    found = {path.stem for path in (ROOT / "configs").glob("*.yaml") if RunConfig.load(path).parallel.zero_stage}
    assert found == set(SHIPPED)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_run_is_legal(path):
    run, world = RunConfig.load(path), SHIPPED.get(path.stem, 1)
    batch = dict(rows=run.training.global_batch_size, micro=run.training.micro_batch_size)
    found = check(run.model, world, **batch, **dict(run.parallel))
    assert_consistent(found, run.model, world, batch["rows"], batch["micro"])
    if world > 1:
        page = (ROOT / "docs/parallelism.md").read_text()
        *names, zero = re.split(r" (?=EP|Z)", found.name)
        assert f"| `configs/{path.name}` | {world} | {', '.join([*names, f'ZeRO-{zero[1]}'])} |" in page


def test_the_documented_table_is_what_the_rules_say(tmp_path, monkeypatch):
    page = (ROOT / "docs/parallelism.md").read_text()
    assert table.compatibility_table() in page, "run python -m lfm.layout.table docs/parallelism.md"
    emptied = tmp_path / "page.md"
    emptied.write_text(page.replace(table.compatibility_table(), ""))
    monkeypatch.setattr(sys, "argv", ["table", str(emptied)])
    table.main()
    assert emptied.read_text() == page


def test_the_documented_table_knows_what_goes_together():
    rows = dict(re.findall(r"^\| ([A-Z+a-z ]+?) \| (.*) \|$", table.compatibility_table(), re.M))
    answers = {name: [cell.split()[0] for cell in cells.split(" | ")] for name, cells in rows.items()}
    assert answers["one process"] == ["yes", "yes", "yes", "yes", "no", "yes", "yes"]
    assert answers["DP"] == ["no", "yes", "yes", "yes", "no", "yes", "yes"]
    assert answers["TP+SP x PP x EP"] == ["no", "yes", "no", "no", "no", "no", "no"]
    assert answers["EP"] == ["no", "yes", "yes", "no", "no", "yes", "no"]


def test_the_arithmetic_needs_no_torch():
    code = "import sys, lfm.layout.layout; print({'torch', 'megatron', 'deepspeed'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == "set()", found.stderr
