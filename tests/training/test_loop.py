"""Runs of seconds on real text; the interrupted ones are real processes, killed for real."""

import json
import math
import os
import re
import signal
import subprocess
import time

import pytest
import torch
import yaml

from lfm.checkpoint import folder as checkpoint
from lfm.checkpoint.manifest import read_manifest
from lfm.data.reader import ShardReader
from lfm.errors import UserError
from lfm.inference.load import load_model
from lfm.training import metrics
from lfm.training.loop import much_padding, train
from lfm.training.metrics_file import read_metrics
from lfm.training.run import owning_folder
from tests.data.corpus import make_data_set
from tests.training.tiny_run import (
    assert_same_checkpoint,
    checkpoint_tensors,
    losses,
    pretrain_command,
    rewrite_manifest,
    tiny_run,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, text_data):
    """Six steps without a stop: what every interrupted run must equal, bit for bit."""
    run = tiny_run(tmp_path_factory.mktemp("whole"), text_data, "checkpoint.keep=9")
    train(run)
    return run.folder


def test_loss_falls_and_a_run_leaves_its_files(tmp_path, text_data):
    run = tiny_run(
        tmp_path,
        text_data,
        "training.steps=60",
        "optimizer.lr=3e-3",
        "logging.tensorboard=true",
        "logging.every_steps=5",
        "checkpoint.every_steps=15",
        "checkpoint.keep=2",
        "samples.every_steps=20",
        "validation.every_steps=20",
    )
    train(run)
    records = read_metrics(run.folder / "metrics.jsonl")
    training = [r for r in records if "cross_entropy" in r]
    assert training[-1]["cross_entropy"] < training[0]["cross_entropy"] - 0.5
    validation = [r["validation_loss"] for r in records if "validation_loss" in r]
    assert len(validation) == 3 and validation[-1] < validation[0]
    assert {"tokens_per_second", "memory_gib", "lr", "grad_norm", "mfu", "eta_seconds"} <= training[0].keys()
    assert all(abs(sum(layer) - 1) < 1e-9 for r in training for layer in r["expert_load"])
    kept = checkpoint.whole_checkpoints(run.folder / "checkpoints")
    assert [path.name for path in kept] == ["step_00000045", "step_00000060"]
    assert (run.folder / "plots/loss.png").read_bytes()[:4] == b"\x89PNG"
    assert any((run.folder / "tensorboard").iterdir())
    assert "import" in (run.folder / "samples/step_00000060.txt").read_text()
    assert json.loads((run.folder / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    from lfm.training.run import RunConfig

    assert RunConfig.load(run.folder / "config.yaml") == run


def test_stopped_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, text_data):
    for _ in range(3):  # the run is stopped by a signal after two steps, twice
        process = subprocess.Popen(
            pretrain_command(tmp_path, text_data, "checkpoint.keep=9", "logging.every_steps=1"),
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in process.stdout:
            if line.startswith("step "):
                process.send_signal(signal.SIGUSR1)
                break
        rest = process.stdout.read()
        assert process.wait() == 0, rest
        if "stopped by SIGUSR1" not in rest:
            break
        step = int(checkpoint.whole_checkpoints(tmp_path / "lfm_debug/checkpoints")[-1].name.removeprefix("step_"))
        assert step == 6 or (tmp_path / "lfm_debug/stopped").read_text() == f"{step} SIGUSR1\n"
    resumed = tmp_path / "lfm_debug"
    if not (resumed / "checkpoints/step_00000006").exists():
        train(tiny_run(tmp_path, text_data, "checkpoint.keep=9"))
    assert_same_checkpoint(resumed / "checkpoints/step_00000006", uninterrupted / "checkpoints/step_00000006")
    assert losses(resumed) == losses(uninterrupted)
    assert not (resumed / "stopped").exists()


def test_kill_in_the_middle_of_a_save_loses_nothing_and_changes_nothing(uninterrupted, tmp_path, text_data):
    # A checkpoint folder under its temporary name is a save in progress: kill -9 exactly then.
    killed = 0
    for _ in range(4):
        command = pretrain_command(tmp_path, text_data, "checkpoint.keep=9")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        folder = tmp_path / "lfm_debug/checkpoints"
        before = len(checkpoint.whole_checkpoints(folder)) if folder.exists() else 0
        while process.poll() is None:
            # Let one save of this process finish, and kill it in the next.
            saving = folder.exists() and any(folder.glob(".writing-*"))
            if saving and killed < 2 and len(checkpoint.whole_checkpoints(folder)) >= before + killed:
                process.kill()
                break
            time.sleep(0.0005)
        if process.wait() == 0:
            break
        killed += 1
        for whole in checkpoint.whole_checkpoints(folder):
            checkpoint.verify(whole, read_manifest(whole))
    assert killed == 2
    resumed = tmp_path / "lfm_debug"
    assert not list(folder.glob(".writing-*"))
    assert_same_checkpoint(folder / "step_00000006", uninterrupted / "checkpoints/step_00000006")
    assert losses(resumed) == losses(uninterrupted)


def test_resuming_a_finished_run_trains_no_further(uninterrupted, text_data, capsys):
    before = (uninterrupted / "metrics.jsonl").read_text()
    train(tiny_run(uninterrupted.parent, text_data, "checkpoint.keep=9"))
    assert "resuming" in capsys.readouterr().out
    assert (uninterrupted / "metrics.jsonl").read_text() == before


def test_every_start_of_a_run_keeps_its_configuration(tmp_path, text_data):
    for steps in (2, 3):
        train(tiny_run(tmp_path, text_data, f"training.steps={steps}", "checkpoint.every_steps=1"))
    folder = tmp_path / "lfm_debug"
    configs = {path.parent.name: yaml.safe_load(path.read_text()) for path in folder.glob("starts/*/config.yaml")}
    steps = {name: config["training"]["steps"] for name, config in configs.items()}
    assert steps == {"step_00000000": 2, "step_00000002": 3}
    for name in ("config.yaml", "environment.json"):
        assert (folder / name).read_bytes() == (folder / "starts/step_00000002" / name).read_bytes()


def test_a_new_run_starts_from_weights_alone(uninterrupted, tmp_path, text_data):
    still = ["training.steps=1", "optimizer.lr=1e-12"]
    run = tiny_run(tmp_path, text_data, f"checkpoint.init_from={uninterrupted}", *still)
    train(run)
    tensors, manifest = checkpoint_tensors(run.folder / "checkpoints/step_00000001")
    weights, _ = checkpoint_tensors(uninterrupted / "checkpoints/step_00000006")
    assert manifest["progress"]["step"] == 1 and manifest["data"]["position"] == 4
    for name, tensor in weights.items():
        if name.startswith("master."):
            assert torch.allclose(tensors[name], tensor, atol=1e-10)


def test_patience_ends_a_run_early(tmp_path, text_data, capsys):
    patience = ["validation.every_steps=1", "validation.patience=2", "training.steps=50"]
    run = tiny_run(tmp_path, text_data, "optimizer.lr=1e-12", *patience)
    assert train(run).step < 50
    assert "stopped early" in capsys.readouterr().out


def test_loss_log_csv_has_the_mean_of_its_window_and_the_next_rate(tmp_path, text_data, capsys):
    options = ["logging.steps_per_epoch=4", "logging.every_steps=2", "logging.print_config=true", "name=auto"]
    run = tiny_run(tmp_path, text_data, *options)
    train(run)
    assert run.folder == tmp_path / "lfm" and '"steps_per_epoch": 4' in capsys.readouterr().out
    every = tiny_run(tmp_path, text_data, "name=every_step")
    train(every)
    by_step, lr = (
        dict(losses(every.folder)),
        [r["lr"] for r in read_metrics(every.folder / "metrics.jsonl") if "lr" in r],
    )
    header, *rows = (run.folder / "loss_log.csv").read_text().splitlines()
    assert header == "global_step,epoch,step_in_epoch,loss,lr,timestamp"
    found = [[float(value) for value in row.split(",")] for row in rows]
    assert [row[:3] for row in found] == [[2, 1, 2], [4, 1, 4], [6, 2, 2]]
    for step, _, _, loss, rate, _ in found:
        assert loss == pytest.approx((by_step[step - 1] + by_step[step]) / 2)
        assert rate == pytest.approx(lr[min(int(step), 5)])


def test_the_best_checkpoint_stays_whatever_comes_after(tmp_path, text_data, capsys):
    # With this learning rate the held-out loss falls first and then grows.
    run = tiny_run(
        tmp_path,
        text_data,
        *("optimizer.lr=1.0", "schedule.kind=constant", "training.steps=9", "validation.every_steps=1"),
        *("checkpoint.every_steps=1", "checkpoint.keep=1", "checkpoint.keep_best=true"),
    )
    train(run)
    records = read_metrics(run.folder / "metrics.jsonl")
    validated = {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}
    best = min(validated, key=lambda step: validated[step])
    assert best < 9, "the run got better to its end: this shows nothing"
    assert (run.folder / "checkpoints/best").resolve().name == f"step_{best:08d}"
    # The loss may still be absurd at the end, by the processor's order of sums; then the one before it was stays too.
    spared = re.findall(r"; (step_\d+) is kept until it falls", capsys.readouterr().err)
    is_absurd = validated[9] > 2 * math.log(run.model.vocab_size)
    kept = {f"step_{best:08d}", "step_00000009", *(spared[-1:] if is_absurd else ())}
    assert {path.name for path in checkpoint.whole_checkpoints(run.folder / "checkpoints")} == kept
    _, manifest, _ = load_model(run.folder / "checkpoints/best", device=torch.device("cpu"), dtype=torch.float32)
    assert manifest["progress"]["best_validation"] == validated[best]


def test_a_failing_logger_never_stops_training(tmp_path, text_data, monkeypatch, capsys):
    monkeypatch.setattr(metrics.Metrics, "_open_wandb", lambda *_: 1 / 0)
    run = tiny_run(tmp_path, text_data, "logging.wandb=offline", "logging.tensorboard=true", "training.steps=2")
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").mkdir()  # cannot be opened as a file
    (run.folder / "tensorboard").write_text("in the way")
    train(run)
    complaints = capsys.readouterr().err
    for name in ("metrics.jsonl", "tensorboard", "wandb"):
        assert f"logging to {name} is off" in complaints
    assert (run.folder / "checkpoints/step_00000002").exists()


@pytest.mark.slow
def test_wandb_writes_an_offline_run(tmp_path, text_data):
    pytest.importorskip("wandb", reason="needs wandb: pip install 'lfm-training[wandb]'")
    run = tiny_run(tmp_path, text_data, "logging.wandb=offline", "training.steps=2")
    train(run)
    (written,) = (run.folder / "wandb").glob("offline-run-*/*.wandb")
    content = written.read_bytes()  # records of a key and its value as JSON
    assert b"global_batch_size" in content and b"moe_ffn_hidden_size" in content


def test_a_run_whose_time_is_over_is_saved_and_goes_on(tmp_path, text_data, uninterrupted, capsys):
    run = tiny_run(tmp_path, text_data)
    train(run, deadline=time.monotonic())
    assert "stopped by the end of its time after step 0; saved, the same command goes on" in capsys.readouterr().out
    assert (run.folder / "stopped").exists()
    train(run, deadline=time.monotonic() + 600)
    assert_same_checkpoint(run.folder / "checkpoints/step_00000006", uninterrupted / "checkpoints/step_00000006")


def test_a_non_finite_loss_names_step_and_batch(tmp_path, text_data, monkeypatch):
    from lfm.errors import NonFiniteError
    from lfm.training.local_engine import LocalEngine

    forward_backward = LocalEngine.forward_backward

    def poisoned(self, batch):
        if self.state_values()["optimizer_step"] == 2:
            with torch.no_grad():
                self.model.final_norm.weight[0] = math.nan
        return forward_backward(self, batch)

    monkeypatch.setattr(LocalEngine, "forward_backward", poisoned)
    run = tiny_run(tmp_path, text_data)
    with pytest.raises(NonFiniteError, match=r"step 3: loss .* rows 0 to 1 .* is data rows \[.*with optimizer.lr=0"):
        train(run)
    assert checkpoint.whole_checkpoints(run.folder / "checkpoints")[-1].name == "step_00000002"


# Checkpoints that must be refused.


@pytest.fixture
def saved(uninterrupted, tmp_path):
    """A copy of the finished run, to damage."""
    import shutil

    return shutil.copytree(uninterrupted, tmp_path / "lfm_debug")


def _data_file(folder):
    return max((folder / "checkpoints/step_00000006").glob("*.distcp"), key=lambda path: path.stat().st_size)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": (lambda folder: _flip(_data_file(folder)), "is corrupt"),
    "cut": (lambda folder: os.truncate(_data_file(folder), 100), "has 100 bytes instead of"),
    "missing": (lambda folder: _data_file(folder).unlink(), "is missing"),
    "metadata": (lambda folder: _flip(folder / "checkpoints/step_00000006/.metadata"), "is corrupt"),
    "manifest": (
        lambda folder: os.truncate(folder / "checkpoints/step_00000006/manifest.json", 50),
        r"manifest\.json is damaged: it is not valid JSON",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(damage, saved, text_data):
    harm, words = DAMAGE[damage]
    harm(saved)
    with pytest.raises(UserError, match=words):
        train(tiny_run(saved.parent, text_data))


def test_an_earlier_checkpoint_can_be_named_and_leaves_the_later_branch_aside(saved, text_data, uninterrupted):
    _flip(_data_file(saved))
    earlier = saved / "checkpoints/step_00000004"
    train(tiny_run(saved.parent, text_data, f"checkpoint.resume={earlier}", "checkpoint.keep=1"))
    assert (saved / "checkpoints/abandoned_step_00000006").exists()
    assert [path.name for path in checkpoint.whole_checkpoints(saved / "checkpoints")] == ["step_00000006"]
    assert_same_checkpoint(saved / "checkpoints/step_00000006", uninterrupted / "checkpoints/step_00000006")


@pytest.mark.parametrize(
    "change, words",
    [
        (["model.hidden_size=64"], "another architecture: model.hidden_size is 32 there and 64 in the config"),
        (["model.liquid.leak_rate=0.5"], "another architecture: model.liquid.leak_rate"),
        (["seed=9"], "seed=1234"),
        (["checkpoint.resume=never"], "give another name"),
        (["checkpoint.resume=/no/such/run"], "neither a checkpoint nor a run folder"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, words, saved, text_data):
    with pytest.raises(UserError, match=words):
        train(tiny_run(saved.parent, text_data, *change))


def test_a_copy_beside_the_checkpoints_is_neither_resumed_from_nor_deleted(saved, text_data, capsys):
    import shutil

    copy = shutil.copytree(saved / "checkpoints/step_00000002", saved / "checkpoints/step_backup")
    train(tiny_run(saved.parent, text_data, "training.steps=8", "checkpoint.keep=1"))
    assert "step_00000006 at step 6" in capsys.readouterr().out and copy.exists()


def test_what_a_killed_process_was_writing_is_gone_after_the_next_start(saved, text_data):
    rests = [saved / name for name in (".environment.json.71.tmp", "starts/step_00000000/.config.yaml.71.tmp")]
    kept = saved / ".mine.tmp"
    for path in (*rests, kept):
        path.write_text("half")
    with owning_folder(tiny_run(saved.parent, text_data)):
        assert not any(path.exists() for path in rests) and kept.exists()


def test_two_processes_never_train_in_one_folder(saved, text_data):
    run = tiny_run(saved.parent, text_data)
    with owning_folder(run), pytest.raises(UserError, match="another process trains in"):
        train(run)


def test_data_that_vanishes_ends_the_run_after_saving_its_steps(tmp_path, text_data, monkeypatch):
    import shutil

    data = shutil.copytree(text_data, tmp_path / "data")
    run = tiny_run(tmp_path, data, "checkpoint.every_steps=0", "validation.every_steps=3")

    def vanish(*arguments, **keywords):
        shutil.rmtree(data)
        raise UserError("the data are gone")

    monkeypatch.setattr("lfm.training.loop.evaluate", vanish)
    with pytest.raises(UserError, match="gone"):
        train(run)
    assert [path.name for path in checkpoint.whole_checkpoints(run.folder / "checkpoints")] == ["step_00000003"]


def test_a_closed_pipe_behind_stdout_does_not_stop_training(tmp_path, text_data):
    process = subprocess.Popen(pretrain_command(tmp_path, text_data), stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0
    assert (tmp_path / "lfm_debug/checkpoints/step_00000006").exists()


def test_odd_lines_in_metrics_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n[1]\n{}\n\xff\n{"step": 2}\n{"ste')
    assert read_metrics(file) == [{"step": 1}, {"step": 2}]


def test_a_changed_frozen_tensor_is_found_by_its_hash(saved, text_data):
    path = saved / "checkpoints/step_00000006"
    frozen = read_manifest(path)["frozen"]
    rewrite_manifest(path, frozen={name: "0" * 16 for name in frozen})
    with pytest.raises(UserError, match="does not match its hash"):
        train(tiny_run(saved.parent, text_data))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB, really full once a checkpoint or two are on it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs (root)")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    "announced",
    [pytest.param(True, id="seen_before", marks=pytest.mark.slow), pytest.param(False, id="met_while_writing")],
)
def test_a_full_disk_leaves_the_previous_checkpoint_intact(announced, small_disk, text_data, monkeypatch):
    if not announced:  # space that others take between the look and the write
        import shutil

        usage = shutil.disk_usage(small_disk)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**40))
    run = tiny_run(small_disk, text_data, "checkpoint.every_steps=1", "checkpoint.keep=9", "training.steps=40")
    with pytest.raises(UserError, match=r"the checkpoint before, step_0000000\d, is intact"):
        train(run)
    folder = run.folder / "checkpoints"
    left = checkpoint.whole_checkpoints(folder)
    assert left and not list(folder.glob(".writing-*"))
    for path in left:
        checkpoint.verify(path, read_manifest(path))


def test_a_run_tells_its_highest_rate_and_a_warmup_that_does_not_end(tmp_path, text_data, capsys):
    keys = ["training.steps=2", "optimizer.lr=0.004", "optimizer.lr_at_width=null", "schedule.warmup_steps=8"]
    train(tiny_run(tmp_path, text_data, *keys))
    out, err = capsys.readouterr()
    assert "peak learning rate: 0.001" in out
    assert (
        err.count("the warm-up of 8 steps does not end in training.steps=2") == 1 and "reaches 25% of its peak" in err
    )


def test_a_run_that_goes_on_with_other_keys_says_which(tmp_path, text_data, capsys):
    keys = ["training.steps=2", "optimizer.lr=1e-3", "checkpoint.every_steps=0"]
    train(tiny_run(tmp_path, text_data, *keys))
    capsys.readouterr()
    train(tiny_run(tmp_path, text_data, *keys, "training.steps=3", "checkpoint.keep=7"))
    assert "other keys" not in capsys.readouterr().err, "more steps are what going on is for"
    train(tiny_run(tmp_path, text_data, *keys, "training.steps=4", "optimizer.lr=2e-3", "optimizer.weight_decay=0.5"))
    err = capsys.readouterr().err
    assert "this run goes on with other keys than before: optimizer.lr 0.001 -> 0.002, optimizer.weight_decay" in err


def test_a_part_of_the_held_out_rows_is_said_to_be_one(tmp_path, text_data, capsys):
    train(tiny_run(tmp_path, text_data, "training.steps=1", "validation.max_rows=2"))
    assert re.search(r"validation loss .*, of 2 of \d+ rows\)", capsys.readouterr().out)
    train(tiny_run(tmp_path / "all", text_data, "training.steps=1", "validation.max_rows=100000"))
    assert " rows)" not in capsys.readouterr().out


def test_rows_that_are_mostly_padding_are_told(tmp_path, text_data):
    rows = ShardReader(make_data_set(tmp_path, packing="one_document", seq_length=64) / "train")
    padding = sum(lengths.count(1) for lengths in rows.read(range(len(rows))).lengths)
    said = much_padding(rows)
    assert said is not None and f"{padding / (64 * len(rows)):.0%} of the positions of the rows are padding" in said
    assert much_padding(ShardReader(text_data / "train")) is None
