import re
import subprocess
import sys

from tests.training.tiny_run import ROOT


def test_imports_point_down():
    """The contracts in pyproject.toml: layers, one owner for each foreign engine."""
    found = subprocess.run([f"{sys.prefix}/bin/lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_source_passes_the_linter():
    for command in (["check"], ["format", "--check"]):
        found = subprocess.run([f"{sys.prefix}/bin/ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


def test_the_local_engine_needs_neither_megatron_nor_deepspeed():
    code = "import lfm.training.loop, launch.pretrain, sys; print({'megatron', 'deepspeed'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


def test_no_file_is_named_for_nothing():
    names = [path.stem for folder in ("lfm", "launch", "data_pipeline") for path in (ROOT / folder).rglob("*.py")]
    assert not [name for name in names if re.fullmatch("utils?|helpers?|common|misc", name)]
