import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.ops.case import COPY_BYTES_PER_SECOND, MATMUL_FLOPS_PER_SECOND, floor, rate
from benchmarks.table import OPS, kernels_table

ROOT = Path(__file__).resolve().parents[2]


def bench(*flags):
    return subprocess.run([sys.executable, ROOT / "launch/bench.py", *flags], capture_output=True, text=True)


def test_an_unknown_op_is_named_with_those_there_are():
    done = bench("--op", "nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --op nothing is not one of ") and "reservoir" in done.stderr
    assert "case" not in done.stderr


def test_make_bench_writes_what_the_tables_read():
    plan = subprocess.run(["make", "-n", "bench"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    ops = re.search(r"for op in ([^;]*);.* --op \$op --out benchmarks/results/op_\$op[.]json", plan)
    assert ops is not None and set(ops[1].split()) == set(OPS)
    table = kernels_table()
    for op in OPS:
        is_recorded = (ROOT / f"benchmarks/results/op_{op}.json").exists()
        assert f"| {op} |" in table if is_recorded else op in table.rpartition("Nothing is recorded of")[2]


def test_a_result_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    done = bench("--op", "reservoir", "--out", tmp_path / "file/result.json")
    assert done.returncode == 2 and done.stderr.startswith("error: folder ") and "cannot be written" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_time():
    done = bench("--op", "reservoir")
    assert done.returncode == 2 and "no GPU" in done.stderr


def test_the_floor_is_the_larger_of_arithmetic_and_traffic():
    assert floor(MATMUL_FLOPS_PER_SECOND, 0.5 * COPY_BYTES_PER_SECOND) == (1.0, "flops")
    assert floor(MATMUL_FLOPS_PER_SECOND, 2 * COPY_BYTES_PER_SECOND) == (2.0, "bytes")


def test_the_rate_is_of_what_sets_the_floor():
    assert rate("flops", 3e14, 1e9, 0.5) == "600 TFLOP/s"
    assert rate("bytes", 3e14, 1e12, 0.5) == "2.00 TB/s"


@pytest.mark.gpu
def test_a_case_within_its_limits_is_timed():
    done = bench("--op", "reservoir", "--only", "forward B=1 L=128 w=64")
    assert done.returncode == 0, done.stderr
    assert "x the floor" in done.stdout and "NOT TIMED" not in done.stdout
