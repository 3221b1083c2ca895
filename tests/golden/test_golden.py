"""Every family, and LFM under every kind of layout, computes what it computed when its golden was written.

To the bit on a processor and torch for which there is a file (`make golden` writes one); else the losses of the three
steps, next to those of another processor.
"""

from pathlib import Path

import pytest
import torch

from lfm.job.process import prepare_environment

if not torch.cuda.is_available():
    prepare_environment("cpu")  # before megatron-core or DeepSpeed are imported

from tests.golden.problems import GOLDENS, compute, dry_runs, environment_key, losses_of

FOLDER = Path(__file__).parent
ELSEWHERE = {"float32": 1e-5, "bfloat16": 1e-3}
"""Largest relative deviation of a loss on another processor, by dtype of the weights."""


QUICK = ("lfm_dp2_z1", "lfm_tp2_pp2")
"""Of the layouts; the others take as long, and the certificate has them too."""


def _marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if GOLDENS[name].layout is None or name in QUICK else (pytest.mark.slow,)


@pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(name)) for name in GOLDENS])
def test_three_updates_are_the_golden_ones(name):
    # The fixture of all tests fills torch.empty and picks other kernels; a golden is what a user's run computes.
    torch.use_deterministic_algorithms(False)
    text = compute(name)
    same = FOLDER / f"{name}.{environment_key()}.txt"
    if same.exists():
        assert text == same.read_text(encoding="utf-8")
        return
    others = sorted(FOLDER.glob(f"{name}.*.txt"))
    assert others, f"there is no golden of {name}; make golden"
    bound = ELSEWHERE["bfloat16" if name.endswith("bf16") else "float32"]
    assert losses_of(text) == pytest.approx(losses_of(others[0].read_text(encoding="utf-8")), rel=bound)


def test_every_preset_plans_what_it_planned():
    assert dry_runs() == (FOLDER / "dry_runs.txt").read_text(encoding="utf-8")


def test_every_golden_file_belongs_to_a_golden():
    names = {path.name.split(".")[0] for path in FOLDER.glob("*.txt")}
    assert names == {*GOLDENS, "dry_runs"}
