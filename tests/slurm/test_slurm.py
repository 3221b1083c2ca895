"""The job scripts on a real Slurm of four pretended nodes: at a time limit, at failures and at mistakes."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_run import PYTHON, ROOT, tiny_overrides

TOOLS = [shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for tool in ("slurmctld", "slurmd", "munged")]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(None in TOOLS, reason="needs Slurm: apt-get install --no-install-recommends slurm-wlm munge"),
]
TRAIN, PREPARE = "slurm/train_3b.sh", "slurm/prepare_shards.sh"
LONG = ["training.steps=100000", "checkpoint.every_steps=0", "validation.every_steps=0", "logging.every_steps=20"]


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "LFM_PYTHON": PYTHON}

    def call(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = self.environment | variables
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)

    def submit(self, script: str, *overrides: str, log: Path, options: tuple[str, ...] = (), **variables: str) -> str:
        """Submit on CPUs, one task a node; the job's id."""
        if script == TRAIN:
            options = ("--ntasks-per-node=1", "--gpus-per-node=0", *options)
            variables = {"LFM_CONFIG": "configs/lfm_debug.yaml"} | variables
        options = ("--parsable", "--cpus-per-task=1", "--mem=1000", f"--output={log}", *options)
        found = self.call("sbatch", *options, script, *overrides, **variables)
        assert found.returncode == 0, found.stderr
        return found.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode, ..."""
        text = self.call("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, number: str, state: str, *, log: Path, restarts: int = 0) -> None:
        """Until the job is in `state`.  A requeued job, which Slurm lets wait for two minutes, goes on at once."""

        def reached() -> bool:
            job = self.job(number)
            if job["JobState"] == "PENDING" and state != "PENDING" and job["Restarts"] != "0":
                self.call("scontrol", "update", f"JobId={number}", "StartTime=now")
            return (job["JobState"], job["Restarts"]) == (state, str(restarts))

        wait_until(reached, log)

    def exit_code(self, number: str, log: Path) -> int:
        """Of an ended job that was not requeued."""
        wait_until(lambda: self.job(number)["JobState"] in ("COMPLETED", "FAILED"), log)
        assert self.job(number)["Restarts"] == "0"
        return int(self.job(number)["ExitCode"].split(":")[0])


def wait_until(condition: Callable[[], Any], log: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, (
            f"not reached in {seconds} s:\n{log.read_text(encoding='utf-8') if log.exists() else 'no log'}"
        )
        time.sleep(0.2)


def wait_for_line(log: Path, pattern: str) -> None:
    wait_until(lambda: log.exists() and re.search(pattern, log.read_text(encoding="utf-8"), re.MULTILINE), log)


@pytest.fixture(scope="module")
def cluster():
    # Not pytest's own folder: a socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    script = str(Path(__file__).with_name("cluster.sh"))
    try:
        started = subprocess.run([script, "start", str(folder)], capture_output=True, text=True)
        assert started.returncode == 0, started.stderr
        yield Cluster(folder)
    finally:
        subprocess.run([script, "stop", str(folder)], check=True, capture_output=True)


def losses(run: Path) -> dict[int, tuple[float, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in records if "loss" in r}


def test_a_stopped_job_requeues_resumes_and_has_the_losses_of_an_unstopped_one(cluster, tmp_path, text_data):
    """Two nodes each, side by side; the signal is the one that Slurm sends before the time limit."""
    steps = 100
    log, jobs = {name: tmp_path / f"{name}.log" for name in ("whole", "stopped")}, {}
    for name in log:
        more = [
            f"training.steps={steps}",
            "parallel.zero_stage=1",
            "checkpoint.every_steps=0",
            "validation.every_steps=0",
        ]
        overrides = tiny_overrides(tmp_path, text_data, *more, f"name={name}")
        jobs[name] = cluster.submit(TRAIN, *overrides, options=("--nodes=2",), log=log[name])
    wait_for_line(log["stopped"], r"^0: step 5/")
    cluster.call("scancel", "--batch", "--signal=USR1", jobs["stopped"])
    cluster.wait(jobs["stopped"], "PENDING", restarts=1, log=log["stopped"])
    (saved,) = (tmp_path / "stopped" / "checkpoints").glob("step_*")
    step = int(saved.name.removeprefix("step_"))
    assert 5 <= step < steps
    assert {path.name.split("_")[2] for path in saved.glob("*.distcp")} == {"0", "1"}, "both ranks wrote"
    assert (tmp_path / "stopped" / "stopped").read_text() == f"{step} SIGUSR1\n"

    for name in log:
        cluster.wait(jobs[name], "COMPLETED", restarts=int(name == "stopped"), log=log[name])
    text = log["stopped"].read_text()
    assert f"saved after step {step}; back in the queue" in text
    assert re.search(rf"restart 1: 2 ranks on .*\n(.*\n)*0: resuming from .* at step {step}\n", text), text
    assert text.endswith("slurm: the run is complete\n")
    assert not (tmp_path / "stopped" / "stopped").exists()
    found = losses(tmp_path / "stopped")
    assert set(found) == set(range(1, steps + 1))
    assert found == losses(tmp_path / "whole")


def test_the_restart_limit_ends_the_requeueing(cluster, tmp_path, text_data):
    log = tmp_path / "log"
    overrides = tiny_overrides(tmp_path, text_data, *LONG)
    job = cluster.submit(TRAIN, *overrides, options=("--nodes=1",), log=log, LFM_MAX_RESTARTS="0")
    wait_for_line(log, "^0: step 20/")
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    assert cluster.exit_code(job, log) == 1
    assert re.search(r"error: saved after step \d+, but this was restart 0 and LFM_MAX_RESTARTS=0", log.read_text())


def test_a_signal_while_the_ranks_start_is_not_lost(cluster, tmp_path, text_data):
    log = tmp_path / "log"
    job = cluster.submit(TRAIN, *tiny_overrides(tmp_path, text_data, *LONG), options=("--nodes=1",), log=log)
    wait_for_line(log, "^slurm: job")
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, "PENDING", restarts=1, log=log)
    cluster.call("scancel", job)


def test_a_preempted_job_requeues_and_an_interrupted_one_does_not(cluster, tmp_path, text_data):
    """Slurm preempts with SIGTERM to the ranks; SIGINT is how a user ends a run for good."""
    log, jobs = {name: tmp_path / f"{name}.log" for name in ("TERM", "INT")}, {}
    for name in log:
        overrides = tiny_overrides(tmp_path, text_data, *LONG, f"name={name}")
        jobs[name] = cluster.submit(TRAIN, *overrides, options=("--nodes=1",), log=log[name])
    for name in log:
        wait_for_line(log[name], "^0: step 20/")
        cluster.call("scancel", f"--signal={name}", jobs[name])
    cluster.wait(jobs["TERM"], "PENDING", restarts=1, log=log["TERM"])
    assert cluster.exit_code(jobs["INT"], log["INT"]) == 0
    assert "stopped by SIGINT and saved after step" in log["INT"].read_text()
    cluster.call("scancel", jobs["TERM"])


def test_a_cancelled_job_stays_cancelled(cluster, tmp_path, text_data):
    log = tmp_path / "log"
    job = cluster.submit(TRAIN, *tiny_overrides(tmp_path, text_data, *LONG), options=("--nodes=1",), log=log)
    wait_for_line(log, "^0: step 20/")
    cluster.call("scancel", job)
    wait_until(lambda: cluster.call("squeue", "--noheader", f"--jobs={job}").stdout == "", log)
    assert cluster.job(job)["JobState"] == "CANCELLED" and cluster.job(job)["Restarts"] == "0"


@pytest.mark.parametrize("where", ["before", "in"])
def test_a_failing_run_is_not_requeued_and_its_exit_code_arrives(where, cluster, tmp_path, text_data):
    """Mistakes in the configuration are found before the ranks start, others by the ranks."""
    log = tmp_path / "log"
    mistake = {"before": "optimizer.lr=-1", "in": "data.path=/no/such/folder"}[where]
    overrides = tiny_overrides(tmp_path, text_data, mistake)
    job = cluster.submit(TRAIN, *overrides, options=("--nodes=1",), log=log)
    assert cluster.exit_code(job, log) == 2
    assert len(re.findall("^(0: )?error: ", log.read_text(), re.M)) == 1
    assert mistake.split("=")[0] in log.read_text()


def test_the_exit_code_reaches_one_who_waits_for_the_job(cluster, tmp_path):
    variables = {"LFM_CONFIG": "configs/no.yaml"}
    options = ("--wait", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", f"--output={tmp_path}/log")
    assert cluster.call("sbatch", *options, TRAIN, **variables).returncode == 2


def test_shards_are_made_once(cluster, tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number}: " + "the same words again and again " * 20)
    config = tmp_path / "data.yaml"
    sources = [{"kind": "text", "paths": [str(tmp_path / "text")]}]
    tree = {"output": str(tmp_path / "data"), "sources": sources, "tokenizer": {"train_vocab_size": 300}}
    config.write_text(json.dumps(tree | {"seq_length": 64, "validation_fraction": 0.2}))
    log = tmp_path / "log"
    for _ in range(2):
        job = cluster.submit(PREPARE, "seed=1", log=log, LFM_CONFIG=str(config))
        assert cluster.exit_code(job, log) == 0, log.read_text()
    assert "data is ready, after" in log.read_text()
    assert log.read_text().endswith("already prepared: same config, same inputs\n")


def test_ranks_run_in_the_container_that_is_named(cluster, tmp_path, text_data):
    container, log = tmp_path / "container", tmp_path / "log"
    container.write_text(f'#!/bin/bash\necho "inside: ${{*:1:2}}" >>{tmp_path}/seen\nexec "${{@:2}}"\n')
    container.chmod(0o755)
    overrides = tiny_overrides(tmp_path, text_data, "training.steps=1")
    variables = {"CONTAINER_EXEC": f"{container} --option", "LFM_PYTHON": PYTHON}
    job = cluster.submit(TRAIN, *overrides, options=("--nodes=1",), log=log, **variables)
    assert cluster.exit_code(job, log) == 0, log.read_text()
    assert (tmp_path / "seen").read_text() == f"inside: --option {PYTHON}\n" * 2


MISTAKES = {
    "config": ({"LFM_CONFIG": "configs/no.yaml"}, r"LFM_CONFIG=configs/no\.yaml does not exist; configs/ holds"),
    "python": ({"LFM_PYTHON": "/no/python"}, "/no/python does not exist; run make setup, or set LFM_PYTHON"),
    "container": ({"CONTAINER_EXEC": "no_such_engine exec"}, "CONTAINER_EXEC starts with no_such_engine"),
    "site": ({"LFM_SITE": "/no/site.sh"}, "LFM_SITE=/no/site.sh does not exist"),
    "restarts": ({"LFM_MAX_RESTARTS": "many"}, "LFM_MAX_RESTARTS=many is not a whole number"),
    "root": ({"LFM_ROOT": "/tmp"}, "/tmp is not the repository's root"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(case, cluster, tmp_path):
    variables, words = MISTAKES[case]
    log = tmp_path / "log"
    job = cluster.submit(TRAIN, options=("--nodes=1",), log=log, **variables)
    assert cluster.exit_code(job, log) == 2
    assert re.fullmatch(rf"error: .*{words}.*\n", log.read_text()), log.read_text()


@pytest.mark.parametrize("script", [TRAIN, PREPARE])
def test_a_job_script_started_outside_a_job_says_how_to_submit_it(script, cluster):
    found = cluster.call("bash", script)
    assert found.returncode == 2
    assert found.stderr == f"error: not inside a Slurm allocation; submit with: sbatch {script}\n"


@pytest.mark.parametrize("script", [TRAIN, PREPARE])
def test_the_shipped_resources_are_ones_that_slurm_takes(script, cluster):
    found = cluster.call("sbatch", "--test-only", script)
    assert found.returncode == 0, found.stderr


def test_the_shipped_resources_fit_the_shipped_layout():
    text = (ROOT / TRAIN).read_text()
    nodes, tasks = (re.search(rf"^#SBATCH --{key}=(\d+)$", text, re.M)[1] for key in ("nodes", "ntasks-per-node"))
    config = re.search(r"LFM_CONFIG:-(\S+)}", text)[1]
    command = [
        PYTHON,
        "launch/pretrain.py",
        "--config",
        config,
        "--folder",
        "--world-size",
        str(int(nodes) * int(tasks)),
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "runs/lfm_3b_32gpu\n"), found.stderr
    assert (ROOT / config).read_text().startswith(f"# LFM-3B on {nodes} nodes of {tasks} GPUs")
