"""What commands do when nobody hears them, and with signals that were ignored when they started."""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lfm.checkpoint import folder as checkpoint
from lfm.checkpoint.manifest import read_manifest
from lfm.training.loop import train
from tests.training.tiny_run import PYTHON, ROOT, pretrain_command, tiny_run

LONG = ["training.steps=100000", "checkpoint.every_steps=0", "validation.every_steps=0"]


def start(words: list[object], redirections: str = "", **options) -> subprocess.Popen:
    command = f"{shlex.join(map(str, words))} {redirections}"
    command = command if "|" in redirections else f"exec {command}"
    return subprocess.Popen(["bash", "-c", command], cwd=ROOT, **options)


def steps(folder: Path) -> int:
    file = folder / "lfm_debug/metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def wait_for(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended with {process.poll()}"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def assert_saved_at_its_last_step(folder: Path) -> None:
    run = folder / "lfm_debug"
    (saved,) = checkpoint.whole_checkpoints(run / "checkpoints")
    checkpoint.verify(saved, read_manifest(saved))
    assert (run / "stopped").read_text().split()[0] == str(int(saved.name.removeprefix("step_")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_data):
    """Three runs that nobody hears, at the same time; (process, folder) by name."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("full", "broken", "closed")}
    unread, full = os.pipe()
    os.write(full, b" " * (fcntl.fcntl(full, fcntl.F_SETPIPE_SZ, 4096) - 100))

    def ignore() -> None:  # as `nohup` does, and `sh` for its background jobs
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    # wandb, where it is installed, prints much of its own.
    more = {"broken": ["logging.wandb=offline"]}
    words = {name: pretrain_command(folder, text_data, *LONG, *more.get(name, [])) for name, folder in folders.items()}
    started = {
        "full": start(words["full"], "2>/dev/full", stdout=full),
        "broken": start(words["broken"], "2>&1", stdout=subprocess.PIPE),
        "closed": start(words["closed"], "<&- >&- 2>&-", preexec_fn=ignore),
    }
    yield {name: (process, folders[name]) for name, process in started.items()}
    for process in started.values():
        process.kill()
        process.wait()
    os.close(unread), os.close(full)


def test_a_stop_signal_saves_where_stdout_is_a_full_pipe_and_stderr_a_full_disk(runs):
    process, folder = runs["full"]
    wait_for(lambda: steps(folder) >= 3, process)
    process.terminate()
    assert process.wait(60) == 0
    assert_saved_at_its_last_step(folder)


def test_a_stop_signal_saves_after_tee_is_gone(runs):
    """Ctrl-C goes to `tee` too; a launcher sends the signal once more."""
    process, folder = runs["broken"]
    wait_for(lambda: steps(folder) >= 3, process)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert_saved_at_its_last_step(folder)


def test_signals_that_were_ignored_stay_ignored_and_closed_streams_are_no_matter(runs):
    process, folder = runs["closed"]
    wait_for(lambda: steps(folder) >= 3, process)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    before = steps(folder)
    wait_for(lambda: steps(folder) >= before + 20, process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    assert_saved_at_its_last_step(folder)


@pytest.mark.slow
def test_a_limit_to_the_size_of_files_is_named_and_logs_that_meet_it_are_given_up_in_a_line_each(tmp_path, text_data):
    often = ["training.steps=40", "logging.tensorboard=true", *LONG[1:]]
    words = shlex.join(pretrain_command(tmp_path, text_data, *often))
    limited = ["bash", "-c", f"ulimit -f 12; exec {words}"]
    found = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2, found.stderr
    *warnings, error = found.stderr.splitlines()
    told = [re.match(r"warning: (logging to )?(\S+) is (off|not drawn)", line) for line in warnings]
    assert sorted(one[2] for one in told) == ["metrics.jsonl", "plots/loss.png", "tensorboard"], found.stderr
    assert re.fullmatch(
        r"error: checkpoint .*step_00000040 could not be written by rank 0: a file is larger than `ulimit -f` allows; "
        r"raise that or set output=DIR; there is no earlier checkpoint",
        error,
    )
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_data_set_is_made_where_nothing_can_be_said(tmp_path, text_data):
    config = tmp_path / "data.json"
    made = json.loads((text_data / "report.json").read_text())["config"]
    config.write_text(json.dumps(made | {"output": str(tmp_path / "data")}))
    process = start([PYTHON, "-m", "data_pipeline.prepare", "--config", config], ">/dev/full 2>&-")
    assert process.wait(120) == 0
    assert (tmp_path / "data/report.json").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_data):
    config = tiny_run(tmp_path_factory.mktemp("trained"), text_data, "training.steps=1")
    train(config)
    return config.folder


def test_a_command_whose_output_is_not_wanted_or_cannot_be_written_says_so_in_its_exit_code(trained, text_data):
    generate = [PYTHON, "launch/generate.py", "--checkpoint", trained, "--prompt", "def ", "--max-new-tokens", "40"]
    inspect = [PYTHON, "-m", "data_pipeline.inspect", text_data]
    pipe, disk, shut, helped = (
        start(generate, "2>&1 | head -c 2; exit ${PIPESTATUS[0]}", stdout=subprocess.PIPE),
        start(generate, ">/dev/full", stderr=subprocess.PIPE),
        start(inspect, ">&-", stderr=subprocess.PIPE),
        start([*generate, "--help"], ">/dev/full", stderr=subprocess.PIPE),
    )
    try:
        out, _ = pipe.communicate(timeout=120)
        assert (out, pipe.returncode) == (b"de", 141)
        for process, reason in ((disk, "No space left on device"), (shut, "Bad file descriptor")):
            _, words = process.communicate(timeout=120)
            assert words.decode() == f"error: the standard output cannot be written ({reason}); give it another place\n"
            assert process.returncode == 2
        _, words = helped.communicate(timeout=120)
        assert helped.returncode == 2 and b"Traceback" not in words and b"Exception" not in words
    finally:
        for process in (pipe, disk, shut, helped):
            process.kill()
