"""`launch/bench.py --model`, on CPUs: operations stand for kernels, and are attributed by the same code."""

import importlib
import json
import os
import subprocess
import sys
from operator import attrgetter

import pytest
import torch

from benchmarks.model.command import _layout
from benchmarks.model.measure import RandomRows
from benchmarks.model.parts import COMPUTE, DATA_WAIT, FUNCTIONS, IN_PARALLEL, PARTS, STEP
from benchmarks.model.plot import COLOURS
from benchmarks.model.routing import forced_balance
from benchmarks.model.waterfall import Event, Waterfall, scaled, waterfalls
from launch.bench import main as bench_main
from lfm.commands import pretrain
from lfm.data.stream import BatchStream, open_split
from lfm.kernels.router import choose_experts
from lfm.layers import router
from lfm.training.run import RunConfig
from lfm.training.start import local_engine
from tests.launch.test_launch import main  # noqa: F401  (a fixture)
from tests.training.tiny_run import PYTHON, ROOT, tiny_overrides, tiny_run

SHORT = ("--warmup", "1", "--steps", "2", "--profiled-steps", "1")


def bench(*flags):
    command = [PYTHON, str(ROOT / "launch/bench.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def assert_refused(found, words):
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert found.returncode == 2 and len(errors) == 1 and words in errors[0], found.stderr


@pytest.fixture(scope="module")
def measured(tmp_path_factory, text_data):
    folder = tmp_path_factory.mktemp("bench")
    out, plot = folder / "found.json", folder / "found.png"
    overrides = tiny_overrides(folder / "runs", text_data)
    found = bench("--model", "configs/lfm_debug.yaml", *SHORT, "--out", out, "--plot", plot, *overrides)
    assert found.returncode == 0, found.stderr
    return found.stdout, json.loads(out.read_text()), plot


def test_the_parts_sum_to_the_step(measured):
    (row,) = measured[1]["layouts"]
    for one in (row, row["balanced"]):
        assert sum(one["waterfall"]["parts"].values()) == pytest.approx(one["step_ms"], rel=0.01)
        assert 1e3 * row["tokens_per_step"] / one["step_ms"] == pytest.approx(one["tokens_per_second_per_gpu"])
        assert one["steps_measured"] == 2 and one["range"][0] <= one["tokens_per_second_per_gpu"] <= one["range"][1]


def test_no_part_is_empty_that_this_model_has(measured):
    (row,) = measured[1]["layouts"]
    has = set(COMPUTE) - {"feed-forward", "weight gradients"}
    for one in (row, row["balanced"]):
        parts = one["waterfall"]["parts"]
        assert {part for part in has if parts[part] <= 0} == set()
        absent = ("feed-forward", "weight gradients", "exchange", "collectives", "bubble")
        assert {parts[part] for part in absent} == {0.0}


def test_forced_balance_gives_equal_loads_and_real_routing_does_not(measured):
    (row,) = measured[1]["layouts"]
    assert row["routing"] == "real" and set(row["balanced"]["expert_load_max_over_mean"]) == {1.0}
    assert min(row["expert_load_max_over_mean"]) > 1.0


def test_the_table_says_that_speeds_of_a_dry_run_mean_nothing(measured):
    text, _, plot = measured
    assert "speeds mean nothing" in text and "| part | real routing | balanced routing |" in text
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model", "configs/none.yaml"], "configs/none.yaml"),
        (["--model", "configs/lfm_debug.yaml", "data.path=nowhere"], "or give --random-ids"),
        (["--model", "configs/lfm_debug.yaml", "--steps", "0"], "--steps 0 is less than 1"),
        (["--model", "configs/lfm_debug.yaml", "--gpus", "0", "--random-ids"], "--gpus 0"),
        (["--model", "configs/lfm_debug.yaml", "--gpus", "2", "--random-ids"], "zero_stage"),
        (["--model", "configs/lfm_debug.yaml", "--only", "head", "--random-ids"], "--only head goes with --op"),
        (["--model", "configs/lstm_debug.yaml", "--routing", "balanced", "--random-ids"], "no experts"),
    ],
)
def test_what_cannot_be_benched_is_one_sentence(flags, words, main):  # noqa: F811
    assert_refused(main("bench", *flags), words)


@pytest.mark.parametrize("start", [pretrain.main, bench_main])
def test_processes_that_cut_matrices_say_so_before_cuda_starts(start, monkeypatch, capsys):
    """Asking for the card's name starts CUDA, which reads CUDA_DEVICE_MAX_CONNECTIONS then."""
    name, found = "CUDA_DEVICE_MAX_CONNECTIONS", []
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)

    def card(device):
        found.append(os.environ.get(name))
        return "NVIDIA H200"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", card)
    keys = ["training.device=cuda", "training.dtype=float32", "parallel.tensor=2", "parallel.zero_stage=1"]
    keys += ["parallel.sequence_parallel=true", "model.attention.num_query_groups=1"]  # which two do not share out
    what = ["--config"] if start is pretrain.main else ["--random-ids", "--gpus", "2", "--model"]
    more = ["--dry-run", "--world-size", "2"] if start is pretrain.main else []
    monkeypatch.setattr("sys.argv", ["command", *what, "configs/lfm_debug.yaml", *more, *keys])
    with pytest.raises(SystemExit) as end:
        start()
    assert end.value.code == 2 and "num_query_groups=1" in capsys.readouterr().err
    assert found == ["1"]


def test_a_benched_pipeline_has_the_stages_that_training_gives_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    keys = ["training.device=cuda", "training.dtype=bfloat16", "parallel.pipeline=2", "parallel.zero_stage=1"]
    layout = _layout(RunConfig.load("configs/lfm_3b.yaml", keys), 2)
    assert layout is not None and "by times on NVIDIA H200" in layout.describe()


def test_a_launchers_processes_need_the_gpus_of_their_own_machine_alone(monkeypatch, capsys):
    launcher = {
        "RANK": 0,
        "WORLD_SIZE": 4,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "a",
        "MASTER_PORT": 1,
    }
    for name, value in launcher.items():
        monkeypatch.setenv(name, str(value))
    keys = ["training.device=cuda", "training.dtype=float32", "training.global_batch_size=8", "parallel.zero_stage=1"]
    keys += ["training.micro_batch_size=1"]
    command = ["bench.py", "--random-ids", "--routing", "balanced", "--model", "configs/lstm_debug.yaml", *keys]
    for visible, words in ((2, "has no experts"), (1, "2 processes of this machine want a GPU each and 1 are visible")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as end:
            bench_main()
        assert end.value.code == 2 and words in capsys.readouterr().err


def test_an_op_and_a_model_exclude_each_other():
    found = bench("--op", "head", "--model", "configs/lfm_debug.yaml")
    assert found.returncode == 2 and "not allowed with" in found.stderr


def test_forced_balance_replaces_the_choice_alone():
    logits = torch.randn(2, 6, 4, requires_grad=True)
    want = choose_experts(logits, 2)
    with forced_balance():
        got = router.choose_experts(logits, 2)
    assert router.choose_experts is choose_experts
    assert torch.equal(got.load, torch.full((2, 4), 3))
    assert torch.equal(got.load[0], torch.bincount(got.experts[0].flatten(), minlength=4))
    assert (got.experts[..., 0] != got.experts[..., 1]).all()
    for name in ("weights", "means"):
        assert torch.equal(getattr(got, name), getattr(want, name))


def test_random_rows_are_dealt_as_the_data_are(tmp_path, text_data):
    run = tiny_run(tmp_path, text_data)
    engine = local_engine(run, torch.device("cpu"))
    stream = BatchStream(
        open_split(run.data, "train", seq_length=64, vocab_size=512), seed=run.seed, rows_per_step=4, take=slice(2, 4)
    )
    rows = RandomRows(run, slice(2, 4))
    assert rows.next().ids.shape == stream.next().ids.shape
    assert not torch.equal(RandomRows(run, slice(0, 2)).next().ids, RandomRows(run, slice(2, 4)).next().ids)
    assert engine.forward_backward(RandomRows(run, slice(None)).next()).attended_pairs == 4 * 64 * 65 // 2


def test_every_function_that_is_marked_is_there():
    for module, path, part in (*FUNCTIONS, *IN_PARALLEL):
        assert part in COMPUTE and callable(attrgetter(path)(importlib.import_module(module)))


def kernel(name, start, end, *, launch=0, operation=0):
    return Event(name, start, end, on_device=True, thread=7, correlation=launch, operation=operation)


def host(name, start, end, **more):
    return Event(name, start, end, thread=1, torch_thread=1, **more)


def of_a_gpu():
    """A step of 100 ns: a forward matrix product in attention, its backward on another thread, communication."""
    return [
        host(STEP, 0, 100, is_range=True),
        host(DATA_WAIT, 0, 10, is_range=True),
        host("lfm: attention", 10, 20, is_range=True),
        host("aten::mm", 11, 19, sequence=5, correlation=1),
        host("cudaLaunchKernel", 12, 13, correlation=900),
        kernel("gemm", 20, 40, launch=900, operation=1),
        # The node of the product, on autograd's thread.
        Event(
            "autograd::engine::evaluate_function: MmBackward0",
            21,
            30,
            thread=2,
            torch_thread=2,
            sequence=5,
            forward_thread=1,
            correlation=2,
        ),
        Event("cuLaunchKernelEx", 22, 23, thread=2, torch_thread=2, correlation=901),
        kernel("gemm", 40, 50, launch=901),
        # What the profiler itself did has no number, and says nothing of kernels that have none.
        host("Activity Buffer Request", 14, 15),
        # Its launch was not recorded: the operation around it says where it belongs.
        kernel("gemm", 50, 55, operation=2),
        host("c10d::alltoall_base_", 31, 34, correlation=3),
        host("nccl:all_to_all", 32, 34, is_range=True),
        host("cudaLaunchKernelExC", 32, 33, correlation=902),
        kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 52, 65, launch=902),
        kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 65, 70),
        kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 68, 72),
        kernel("elementwise", 80, 90),
    ]


def test_kernels_belong_to_ranges_nodes_and_operations_and_overlap_counts_once():
    (fall,) = waterfalls(of_a_gpu())
    parts = {part: round(1e6 * ms) for part, ms in fall.parts.items() if ms}
    assert parts == {
        "data wait": 10,
        "attention": 35,
        "exchange": 10,  # 3 of 13 ns are hidden behind a product
        "bubble": 4,
        "collectives": 3,  # they share the 2 ns in which both run
        "other": 10,
        "host gaps": 28,
    }
    assert sum(parts.values()) == 100 and fall.kernels == 7


def test_every_part_has_a_colour():
    assert set(COLOURS) == set(PARTS)


def test_scaling_takes_the_profilers_time_from_gaps_first():
    parts = dict.fromkeys(PARTS, 0.0) | {"head": 60.0, "collectives": 20.0, "host gaps": 20.0}
    fall = Waterfall(parts, profiled_ms=100.0, gaps_profiled_ms=20.0, kernels=3)
    for step, head, collectives, gaps in ((120, 60, 20, 40), (90, 60, 20, 10), (70, 60, 10, 0), (30, 30, 0, 0)):
        found = scaled(fall, step).parts
        assert (found["head"], found["collectives"], found["host gaps"]) == pytest.approx((head, collectives, gaps))
        assert sum(found.values()) == pytest.approx(step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys, part",
    [
        (["parallel.expert=2"], "exchange"),
        (["parallel.pipeline=2"], "bubble"),
        (["parallel.tensor=2", "parallel.sequence_parallel=true"], "collectives"),
    ],
    ids=["ep2", "pp2", "tp2"],
)
def test_two_processes_are_certified_and_communicate(tmp_path, text_data, keys, part):
    out = tmp_path / "found.json"
    overrides = [*tiny_overrides(tmp_path / "runs", text_data), "training.micro_batch_size=1", "parallel.zero_stage=1"]
    overrides += ["model.attention.num_query_groups=2", *keys]
    found = bench("--model", "configs/lfm_debug.yaml", "--gpus", 2, *SHORT, "--out", out, *overrides)
    assert found.returncode == 0, found.stderr
    assert "certified" in found.stdout
    (row,) = json.loads(out.read_text())["layouts"]
    assert row["gpus"] == 2 and row["waterfall"]["parts"][part] > 0
    is_pipeline = "pipeline" in keys[0]
    assert ("waiting" in row) == is_pipeline == (row["waterfall"]["parts"]["weight gradients"] > 0)


@pytest.mark.slow
def test_a_launchers_processes_are_benched_together(tmp_path, text_data):
    out = tmp_path / "found.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611"]
    overrides = [*tiny_overrides(tmp_path / "runs", text_data), "training.micro_batch_size=1", "parallel.zero_stage=1"]
    command = [*torchrun, "launch/bench.py", "--model", "configs/lfm_debug.yaml", *SHORT, "--out", out, *overrides]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("| part |") == 1
    (row,) = json.loads(out.read_text())["layouts"]
    assert row["gpus"] == 2 and len(row["waterfall_by_rank"]) == 2
