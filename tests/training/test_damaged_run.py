"""Every file of a run folder that is read or written, in every way in which one breaks.

What a checkpoint holds is an error that names the file; what is written anew at each start is; records are said to be
broken, and stay as they are or are kept aside.  Nothing hangs, is lost, or used in silence.
"""

import os
import shutil
import signal

import pytest
import yaml

from lfm.checkpoint import folder as checkpoint
from lfm.checkpoint.manifest import read_manifest
from lfm.data.consumed import read_record
from lfm.errors import UserError
from lfm.inference.load import open_model
from lfm.training.loop import train
from tests.data.damage import cut, empty, flip, forbid, put_fifo, put_folder, put_loop, without_privileges
from tests.training.tiny_run import rewrite_manifest, tiny_run

STEP = "checkpoints/step_00000002/"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_data):
    """Two finished runs of other seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        train(tiny_run(folder / str(seed), text_data, "training.steps=2", f"seed={seed}"))
    return folder


@pytest.fixture
def run(runs, tmp_path, text_data):
    """A copy of the first, which its command would go on with; a hang ends the test."""
    shutil.copytree(runs / "1", tmp_path, symlinks=True, dirs_exist_ok=True)
    (tmp_path / "lfm_debug/stopped").write_text("2 SIGTERM\n")
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    yield tiny_run(tmp_path, text_data, "training.steps=2", "seed=1")
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def of_another_run(runs):
    def replace(path):
        folder = next(parent for parent in path.parents if parent.name == "lfm_debug")
        path.write_bytes((runs / "2/lfm_debug" / path.relative_to(folder)).read_bytes())

    return replace


DAMAGES = [flip, cut, empty, put_folder, put_loop, put_fifo, forbid, "of_another_run"]
NO_FILE = (put_folder, put_loop, put_fifo, forbid)


def name_of(damage):
    return getattr(damage, "__name__", damage)


@pytest.fixture(params=DAMAGES, ids=name_of)
def damage(request, of_another_run):
    return of_another_run if request.param == "of_another_run" else request.param


@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "__0_0.distcp", "tokenizer.json"])
def test_a_damaged_file_of_a_checkpoint_is_named(name, damage, run, runs):
    path = run.folder / STEP / name
    if name == "tokenizer.json" and damage.__name__ == "replace":
        path.write_bytes(path.read_bytes() + b" ")  # both runs have the same
    else:
        damage(path)
    for use in (lambda: train(run), lambda: open_model(run.folder, device="cpu")):
        with without_privileges(), pytest.raises(UserError) as found:
            use()
        # Another run's manifest fits none of the files.
        named = (name, ".distcp") if name == "manifest.json" else (name,)
        assert any(each in str(found.value) for each in named) and len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "stopped"])
def test_what_every_start_writes_anew_does_no_harm(name, damage, run):
    path = run.folder / name
    if name == "stopped" and damage.__name__ == "replace":
        path.write_text("9 of another run\n")
    else:
        damage(path)
    if damage is put_folder:
        with pytest.raises(UserError, match=rf"{name} cannot be used \(Is a directory\); "):
            train(run)
        path.rmdir()
    with without_privileges():
        train(run)
    assert not (run.folder / "stopped").exists()
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["seed"] == 1


def test_a_damaged_lock_is_named_or_still_one(damage, run):
    path = run.folder / ".lock"
    path.write_bytes(b"some content")
    damage(path)
    with without_privileges():
        if damage in NO_FILE:
            with pytest.raises(UserError, match=r"run folder \S+ cannot be written; set output=DIR \(.*\)"):
                train(run)
        else:
            train(run)


@pytest.mark.parametrize("name", ["consumed.txt", "metrics.jsonl"])
def test_a_damaged_record_is_said_and_kept(name, damage, run, capsys):
    path = run.folder / name
    if damage is flip and name == "metrics.jsonl":  # a letter may become another
        flip(path, b":")
    else:
        damage(path)
    content = path.read_bytes() if damage not in NO_FILE else b""
    with without_privileges():
        train(run)
    said = capsys.readouterr().err
    if damage in NO_FILE:
        assert name in said and ("is not written from now on" in said or f"logging to {name} is off" in said)
        path.chmod(0o644) if damage is forbid else None
        assert not list(run.folder.glob(f"{name}.*-*"))
        return
    kept = [each.read_bytes() for each in run.folder.glob(f"{name}*")]
    assert content in kept or any(content.startswith(each) for each in kept)  # half a line at the end is a crash's
    if name == "consumed.txt":
        assert "consumed.txt lacks steps" in said  # what it still has ends before the checkpoint
        assert damage is not flip or "line 2 cannot be read and is left out; the file as it was is kept as" in said
    elif damage is flip:
        assert "metrics.jsonl: line 2 cannot be read and is left out; the file as it was is kept as" in said


def test_a_run_whose_files_are_whole_says_nothing(run, capsys):
    train(run)
    assert capsys.readouterr().err == "" and read_record(run.folder)[-1].step == 2
    assert os.listdir(run.folder / "checkpoints") == ["step_00000002"]


def test_counters_of_what_the_model_has_not_are_one_sentence(run):
    path = run.folder / STEP
    changes = {"reservoir_warmup": {}, "reservoir_calm_steps": {}}
    rewrite_manifest(path, counters=read_manifest(path)["counters"] | changes)
    with pytest.raises(UserError, match=r"counters of reservoir layers \[\] and"):
        train(run)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "loop", "forbidden/run", "file/run"])
def test_a_checkpoint_that_cannot_be_looked_for_is_one_sentence(path, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    (tmp_path / "forbidden").mkdir(mode=0)
    with (
        without_privileges(),
        pytest.raises(UserError, match=r"(cannot be (looked at|read)|is no path that can be used) \(") as found,
    ):
        checkpoint.find(tmp_path / path)
    assert "\0" not in str(found.value) and len(str(found.value)) < 700
