"""The README is true: every command in its bash blocks runs, in order, and its table is the recorded results."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.training.tiny_run import PYTHON, ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line]

# What makes a training run take seconds; everything else is as printed.
SHORT = [
    "training.steps=2",
    "validation.max_rows=4",
    "samples.sampling.max_new_tokens=4",
    "logging.tensorboard=false",
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that looks like the repository, so that data/ and runs/ are made there."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "launch", "lfm", "data_pipeline", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 8 and any("--dry-run" in command for command in COMMANDS)


@pytest.mark.parametrize(
    "command",
    # What certify computes, and four ranks, have tests of their own.
    [pytest.param(each, marks=pytest.mark.slow if re.search("certify|per-node 4", each) else ()) for each in COMMANDS],
)
def test_a_command_of_the_readme_runs(command, checkout):
    words = shlex.split(command)
    assert words[0].startswith(".venv/bin/")
    program = words[0].removeprefix(".venv/bin/")
    start = [PYTHON] if program == "python" else [PYTHON, f"{sys.prefix}/bin/{program}"]
    training = "launch/pretrain.py" in words and not {"--dry-run", "--help"} & set(words)
    found = subprocess.run(
        [*start, *words[1:], *(SHORT if training else [])],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0, target


def test_the_table_is_made_from_the_recorded_results():
    command = [PYTHON, str(ROOT / "benchmarks/table.py"), "--check"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
