"""Runs whose disk fills up, empties again, forbids or breaks: nothing is lost, and it is said at once."""

import json
import os
import resource
import shutil
import signal
import subprocess
import threading

import numpy as np
import pytest
import torch

from lfm.checkpoint import folder as checkpoint
from lfm.checkpoint.manifest import read_manifest
from lfm.data.consumed import read_record
from lfm.errors import NonFiniteError, UserError
from lfm.evaluation.held_out import HeldOut
from lfm.inference.load import open_model
from lfm.training.local_engine import LocalEngine
from lfm.training.loop import train
from lfm.training.metrics_file import read_metrics
from tests.data.damage import forbid, without_privileges
from tests.training.tiny_run import checkpoint_tensors, tiny_run


class Tmpfs:
    """A file system of 4 MiB."""

    def __init__(self, folder):
        self.folder = folder
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip("needs the right to mount a tmpfs (root); the quota's case shows the same")

    def fill(self):
        with open(self.folder / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    def free(self):
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self):
        subprocess.run(["umount", self.folder], check=True)


class Quota:
    """The limit on a file's size: what is small can still be written."""

    def __init__(self, folder):
        self.folder, (self.before, self.hard) = folder, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, self.hard))

    def free(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.before, self.hard))

    close = free


@pytest.fixture(params=[Tmpfs, Quota])
def disk(request, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    made = request.param(folder)
    yield made
    made.close()


@pytest.fixture
def before_step(monkeypatch):
    """What happens in the world before an update, by its number; what was being saved is saved, or failed, by then."""
    events, start_step = {}, LocalEngine.start_step

    def start(self, step, total_steps):
        for thread in threading.enumerate():
            if thread.name == "saver":
                thread.join()
        events.get(step + 1, lambda _: None)(self)
        start_step(self, step, total_steps)

    monkeypatch.setattr(LocalEngine, "start_step", start)
    return events


def steps_of(run):
    return [int(path.name.removeprefix("step_")) for path in checkpoint.whole_checkpoints(run.folder / "checkpoints")]


@pytest.mark.parametrize("background", [True, False], ids=["asynchronous", "synchronous"])
def test_a_failed_save_is_told_within_a_step_and_made_again(background, disk, before_step, text_data, capsys):
    told = []
    before_step[3] = lambda _: disk.fill()
    before_step[6] = lambda _: (told.append(capsys.readouterr().err), disk.free())
    how = [f"checkpoint.asynchronous={str(background).lower()}", "checkpoint.keep=1", "training.steps=7"]
    run = tiny_run(disk.folder, text_data, "checkpoint.every_steps=2", *how)
    before_step[5] = lambda _: told.append(steps_of(run))
    train(run)
    assert told[0] == [2] and steps_of(run) == [7]
    assert told[1].count("step_00000004") == 1 and "the checkpoint before, step_00000002, is intact" in told[1]
    assert "the next save tries again" in told[1]
    path = run.folder / "checkpoints/step_00000007"
    checkpoint.verify(path, read_manifest(path))
    assert [entry.step for entry in read_record(run.folder)] == list(range(1, 8))


@pytest.mark.parametrize("background", [True, False], ids=["asynchronous", "synchronous"])
def test_a_best_state_that_could_not_be_saved_is_not_the_best(background, disk, before_step, text_data, monkeypatch):
    planned = iter([6.0, 5.0, 3.0, 4.5, 4.4, 4.6])
    monkeypatch.setattr(
        "lfm.training.loop.evaluate", lambda *_, **__: HeldOut(10 * next(planned), 10, 10, np.zeros(512), True, 0.0)
    )
    before_step[3] = lambda _: disk.fill()
    before_step[4] = lambda _: disk.free()
    keys = ["validation.every_steps=1", "checkpoint.keep_best=true", "checkpoint.keep=1", "training.steps=6"]
    keys += [f"checkpoint.asynchronous={str(background).lower()}", "checkpoint.every_steps=0"]
    run = tiny_run(disk.folder, text_data, *keys)
    train(run)
    best = run.folder / "checkpoints/best"
    assert best.resolve().name == "step_00000005"
    assert read_manifest(best)["progress"]["best_validation"] == 4.4


def test_a_stop_after_a_failed_save_saves(disk, before_step, text_data):
    before_step[1] = lambda _: disk.fill()
    before_step[4] = lambda _: (disk.free(), os.kill(os.getpid(), signal.SIGTERM))
    run = tiny_run(disk.folder, text_data, "checkpoint.every_steps=2", "training.steps=9")
    assert train(run).step == 4
    assert steps_of(run) == [4] and (run.folder / "stopped").read_text() == "4 SIGTERM\n"


def test_a_failed_save_is_made_again_at_the_end_even_where_none_is_due(disk, before_step, text_data):
    before_step[1] = lambda _: disk.fill()
    before_step[5] = lambda _: disk.free()
    run = tiny_run(
        disk.folder, text_data, "checkpoint.every_steps=3", "checkpoint.save_at_end=false", "training.steps=5"
    )
    train(run)
    assert steps_of(run) == [5]


@pytest.mark.parametrize("stop", [False, True], ids=["at_the_end", "on_a_signal"])
def test_the_last_chance_that_fails_ends_the_run_and_names_what_is_there(stop, disk, before_step, text_data):
    before_step[3] = lambda _: disk.fill()
    if stop:
        before_step[5] = lambda _: os.kill(os.getpid(), signal.SIGTERM)
    run = tiny_run(disk.folder, text_data, "checkpoint.every_steps=2")
    with pytest.raises(UserError, match="the checkpoint before, step_00000002, is intact"):
        train(run)
    assert steps_of(run) == [2] and not list((run.folder / "checkpoints").glob(".writing-*"))


def test_a_full_disk_at_the_start_is_one_sentence(disk, text_data):
    run = tiny_run(disk.folder, text_data)
    disk.fill()
    if isinstance(disk, Quota):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, disk.hard))
    try:
        with pytest.raises(UserError, match=r"(No space left on device|File too large).*; .*set output=DIR"):
            train(run)
    finally:
        disk.free()
    assert not list(disk.folder.rglob("*.tmp"))


# The last state is looked at.


def resumed(run_folder, text_data, *more):
    return tiny_run(run_folder, text_data, "optimizer.lr=1e39", "checkpoint.keep=1", *more)


@pytest.mark.parametrize("when", ["saved", "validated"])
def test_an_update_that_destroys_the_model_is_not_saved(when, tmp_path, text_data):
    run = tiny_run(tmp_path, text_data, "training.steps=2")
    train(run)
    validation = "validation.every_steps=0" if when == "saved" else "validation.every_steps=3"
    often = ["training.steps=4", "checkpoint.every_steps=1", validation]
    words = r"step 3: (master|exp)\S+ is not finite after" if when == "saved" else "step 3: the validation loss is"
    with pytest.raises(
        NonFiniteError, match=f"{words}.*; this state is not saved, step_00000002 is the newest that is"
    ):
        train(resumed(tmp_path, text_data, *often, "checkpoint.keep_best=true"))
    assert steps_of(run) == [2] and not (run.folder / "checkpoints/best").exists()
    for record in (run.folder / "metrics.jsonl").read_text().splitlines():
        json.loads(record, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))


def test_an_absurd_validation_loss_is_told_and_the_checkpoint_before_it_kept(before_step, tmp_path, text_data, capsys):
    def blow_up(engine):
        with torch.no_grad():
            engine.model.final_norm.weight.mul_(1e30)

    before_step[3] = blow_up
    often = ["validation.every_steps=1", "checkpoint.every_steps=2", "checkpoint.keep=1", "training.steps=6"]
    run = tiny_run(tmp_path, text_data, *often)
    train(run)
    assert steps_of(run) == [2, 6]
    warning = capsys.readouterr().err.splitlines()[0]
    assert "step 3: the validation loss of" in warning and "step_00000002 is kept until it falls" in warning


def test_a_checkpoint_with_weights_that_are_not_finite_generates_nothing(tmp_path, text_data):
    from lfm.checkpoint.saver import Saver

    run = tiny_run(tmp_path, text_data, "training.steps=1")
    train(run)
    path = run.folder / "checkpoints/step_00000001"
    tensors, manifest = checkpoint_tensors(path)
    tensors["master.embedding.weight"][5, 0] = torch.nan
    kept = {key: manifest[key] for key in ("config", "progress", "counters", "data")}
    tokenizer = (path / "tokenizer.json").read_bytes()
    shutil.rmtree(path)
    with Saver(path.parent, keep=9, asynchronous=False) as saver:
        saver.save(1, tensors, kept, tokenizer)
    with pytest.raises(NonFiniteError, match=r"master\.embedding\.weight is not finite; use an earlier checkpoint"):
        open_model(run.folder, device="cpu")


# What cannot be looked at is not absent; what cannot be read is not thrown away.


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("what", ["checkpoints", "."])
def test_a_folder_that_cannot_be_read_is_not_an_empty_one(what, tmp_path, text_data):
    run = tiny_run(tmp_path, text_data, "training.steps=2")
    train(run)
    before, folder = snapshot(run.folder), run.folder / what
    forbid(folder)
    try:
        with without_privileges(), pytest.raises(UserError, match=r"lfm_debug.*Permission denied"):
            train(tiny_run(tmp_path, text_data))
    finally:
        folder.chmod(0o755)
    assert snapshot(run.folder) == before


def test_a_checkpoint_behind_a_broken_link_is_not_an_absent_one(tmp_path, text_data):
    run = tiny_run(tmp_path, text_data, "training.steps=4")
    train(run)
    newest = run.folder / "checkpoints/step_00000004"
    newest.rename(tmp_path / "moved")
    newest.symlink_to(tmp_path / "not there now")
    with pytest.raises(UserError, match="step_00000004 has the name of a checkpoint and is no folder"):
        train(tiny_run(tmp_path, text_data))


def test_history_behind_a_damaged_line_is_kept(tmp_path, text_data, capsys):
    run = tiny_run(tmp_path, text_data, "training.steps=4", "logging.steps_per_epoch=2")
    train(run)
    originals = {}
    for name in ("consumed.txt", "metrics.jsonl", "loss_log.csv"):
        path = run.folder / name
        lines = path.read_bytes().splitlines(keepends=True)
        lines[1] = b"\xff" + lines[1][1:]
        originals[name] = b"".join([*lines, b"half a li"])
        path.write_bytes(originals[name])
    train(tiny_run(tmp_path, text_data, "logging.steps_per_epoch=2"))
    said = capsys.readouterr().err
    for name, content in originals.items():
        assert (run.folder / f"{name}.damaged-1").read_bytes() == content
        assert f"{name}: line 2 cannot be read and is left out; the file as it was is kept as {name}.damaged-1" in said
    with pytest.raises(UserError, match="goes from step 1 to step 3"):
        read_record(run.folder)
    assert {r["step"] for r in read_metrics(run.folder / "metrics.jsonl")} >= {1, 3, 4, 5, 6}
    train(tiny_run(tmp_path, text_data, "logging.steps_per_epoch=2", "training.steps=7"))
    assert not list(run.folder.glob("*.damaged-2"))  # it is whole now


# Links and copies.


def test_a_copy_made_with_links_followed_goes_on(tmp_path, text_data, capsys):
    best = ["checkpoint.keep_best=true", "validation.every_steps=1", "checkpoint.keep=1", "optimizer.lr=1e-3"]
    run = tiny_run(tmp_path, text_data, *best, "training.steps=2")
    train(run)
    copy = tmp_path / "copy" / "lfm_debug"
    shutil.copytree(run.folder, copy)  # follows links
    assert not (copy / "checkpoints/best").is_symlink() and (run.folder / "checkpoints/best").is_symlink()
    train(tiny_run(tmp_path / "copy", text_data, *best, "training.steps=4"))
    assert os.readlink(copy / "checkpoints/best") in ("step_00000003", "step_00000004")
    assert (copy / "checkpoints/abandoned_best/manifest.json").exists()
    assert "best is now abandoned_best" in capsys.readouterr().out


def test_files_and_folders_that_lie_behind_links_stay_there(tmp_path, text_data):
    run = tiny_run(tmp_path, text_data, "training.steps=2", "checkpoint.keep=1")
    train(run)
    elsewhere = tmp_path / "large disk"
    elsewhere.mkdir()
    for name in ("metrics.jsonl", "consumed.txt", "checkpoints"):
        shutil.move(run.folder / name, elsewhere / name)
        (run.folder / name).symlink_to(elsewhere / name)
    moved = shutil.move(elsewhere / "checkpoints/step_00000002", elsewhere / "step_2")
    (elsewhere / "checkpoints/step_00000002").symlink_to(moved)
    train(tiny_run(tmp_path, text_data, "training.steps=4", "checkpoint.keep=1"))
    assert all((run.folder / name).is_symlink() for name in ("metrics.jsonl", "consumed.txt", "checkpoints"))
    assert len(read_record(run.folder)) == 4 and steps_of(run) == [4]
    # Of a checkpoint that is a link the link is dropped: somebody put its data elsewhere on purpose.
    assert os.listdir(elsewhere / "checkpoints") == ["step_00000004"] and (elsewhere / "step_2/manifest.json").exists()
