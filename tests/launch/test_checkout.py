"""Commands from a checkout that is not installed: `-S` leaves out what an installation adds to the search path."""

import os
import site
import subprocess
import sys

from tests.training.tiny_run import ROOT

# Runs the scripts up to their first import of this project, and prints where that would be found.
LOOK = """
import runpy, sys
from importlib.machinery import PathFinder

class Found(Exception): pass

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("lfm", "data_pipeline", "benchmarks"):
            raise Found(PathFinder.find_spec(name))

sys.meta_path.insert(0, Finder)
before = sys.path[:]
for script in sys.argv[1:]:
    sys.path[:] = [script.rpartition("/")[0], *before[1:]]
    try:
        runpy.run_path(script)
    except Found as found:
        print(script, found.args[0] and found.args[0].submodule_search_locations[0])
"""


def run(*words, cwd=ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(site.getsitepackages())}
    return subprocess.run(
        [sys.executable, "-S", *map(str, words)], capture_output=True, text=True, cwd=cwd, env=environment
    )


def test_every_script_finds_its_own_checkout_first(tmp_path):
    scripts = [str(path) for part in ("launch", "benchmarks") for path in (ROOT / part).glob("[a-z]*.py")]
    found = run("-c", LOOK, *scripts, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    places = dict(line.split() for line in found.stdout.splitlines())
    assert sorted(places) == sorted(scripts)
    assert {place.rpartition("/")[0] for place in places.values()} == {str(ROOT)}


def test_commands_run_from_a_checkout_that_is_not_installed(tmp_path):
    commands = [("launch/pretrain.py",), ("-m", "data_pipeline.audit"), ("-m", "data_pipeline.verify")]
    for command in commands:
        found = run(*command, "--help")
        assert found.returncode == 0 and found.stdout.startswith("usage: "), found.stderr
