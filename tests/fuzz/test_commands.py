"""Whatever is typed, a command ends with 0, 2 or 3, in words of its own and in finite time."""

import contextlib
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import traceback

import pytest

from lfm.training.loop import train
from tests.fuzz.cases import World, case
from tests.training.tiny_run import PYTHON, ROOT, tiny_run

SECONDS = 60


@pytest.fixture(scope="module")
def world(tmp_path_factory, text_data):
    folder = tmp_path_factory.mktemp("fuzz")
    run = tiny_run(folder / "runs", text_data, "training.steps=1", "validation.max_rows=1", "name=fuzz")
    train(run)
    texts = folder / "texts"
    texts.mkdir()
    for i in range(6):
        (texts / f"{i}.txt").write_text(f"{i}: text of a few words, {i} of them {'x' * i}\n" * 9)
    return World(run=run.folder, data=text_data, texts=texts, arena=folder / "arena")


class TooLong(Exception):
    pass


def outcome(module: str, argv: list[str]) -> tuple[int | str, str]:
    """Exit code, or the traceback of an error that nobody expected; and what was printed."""
    printed = io.StringIO()

    def ring(number, frame):
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    old_argv, old_stdin = sys.argv, sys.stdin
    sys.argv, sys.stdin = [module, *argv], io.TextIOWrapper(io.BytesIO(b"a b\n/state\n"), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            importlib.import_module(module).main()
        return 0, printed.getvalue()
    except SystemExit as end:
        return (0 if end.code is None else end.code), printed.getvalue()
    except BaseException:
        return traceback.format_exc(), printed.getvalue()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        sys.argv, sys.stdin = old_argv, old_stdin


def check(seeds, world: World, monkeypatch) -> None:
    bad = []
    for seed in seeds:
        shutil.rmtree(world.arena, ignore_errors=True)
        world.build_arena()
        monkeypatch.chdir(world.arena)
        module, argv = case(seed, world)
        code, printed = outcome(module, argv)
        if code not in (0, 2, 3) or "Traceback" in printed:
            bad.append(f"case {seed}: {module} {[arg[:200] for arg in argv]}\n{code}\n{printed[-500:]}")
    assert not bad, f"{len(bad)} cases\n\n" + "\n\n".join(sorted(bad, key=len)[:40])


def test_commands_end_in_words_of_their_own(world, monkeypatch):
    check(range(60), world, monkeypatch)


@pytest.mark.slow
def test_many_commands_end_in_words_of_their_own(world, monkeypatch):
    check(range(60, 3060), world, monkeypatch)


@pytest.mark.slow
def test_processes_end_in_words_of_their_own(world):
    bad, environment = [], os.environ | {"PYTHONPATH": str(ROOT)}
    for seed in range(3060, 3160):
        world.build_arena()
        module, argv = case(seed, world)
        # Neither NUL nor half of a surrogate pair can be typed.
        argv = [arg.encode("utf-8", "ignore").decode().replace("\0", "") for arg in argv]
        done = subprocess.run(
            [PYTHON, "-m", module, *argv],
            input=b"a b\n",
            capture_output=True,
            cwd=world.arena,
            env=environment,
            timeout=SECONDS * 2,
        )
        if done.returncode not in (0, 2, 3) or b"Traceback" in done.stderr:
            bad.append(
                f"case {seed}: {module} {argv}\n{done.returncode}\n{done.stderr[-800:].decode(errors='replace')}"
            )
    assert not bad, f"{len(bad)} cases\n\n" + "\n\n".join(sorted(bad, key=len)[:40])
