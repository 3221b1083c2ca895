"""Training commands of several processes, as a user or a scheduler starts them, and what becomes of the processes."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.training.tiny_run import ROOT

_LAUNCHER_VARIABLES = re.compile(r"(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(TORCHELASTIC|SLURM)_.*|LOCAL_SIZE")


def torchrun(num_ranks: int, command: list[str]) -> list[str]:
    return [f"{sys.prefix}/bin/torchrun", "--standalone", "--nproc-per-node", str(num_ranks), *command[1:]]


def deepspeed(num_ranks: int, command: list[str]) -> list[str]:
    port = ["--master_port", str(free_port())]
    return [f"{sys.prefix}/bin/deepspeed", *port, "--num_gpus", str(num_ranks), *command[1:]]


_reserved: list[socket.socket] = []


def free_port() -> int:
    """A port that stays free until a rank listens on it, however long its imports take.

    The kernel gives a bound port to no connection or other server, but for a server that reuses addresses, as torch's.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    _reserved.append(holder)
    return holder.getsockname()[1]


def bare(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """The variables of a scheduler that knows nothing of this project."""
    names = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()}


def slurm(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What srun sets, and the rendezvous that a batch script exports."""
    names = {"PROCID": rank, "NTASKS": num_ranks, "LOCALID": rank, "STEP_ID": 0, "JOB_ID": 1}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {f"SLURM_{name}": str(value) for name, value in names.items()} | address


class Job:
    """Commands, each with variables; everything that they start is found again by a further variable.

    All write to the file `output`, but the first command to `first_stdout`, if that is given.
    """

    def __init__(
        self, output: Path, *commands: tuple[list[str], Mapping[str, str]], first_stdout: int | None = None
    ) -> None:
        self.file, job = output, uuid.uuid4().hex
        self.mark = f"LFM_TEST_JOB={job}"
        inherited = {name: v for name, v in os.environ.items() if not _LAUNCHER_VARIABLES.fullmatch(name)}
        inherited |= {"PYTHONPATH": str(ROOT), "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "LFM_TEST_JOB": job}
        self.processes = []
        with open(output, "w", encoding="utf-8") as file:
            for command, variables in commands:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env=inherited | variables,
                        cwd=ROOT,
                        stdout=file if first_stdout is None or self.processes else first_stdout,
                        stderr=file,
                        start_new_session=True,
                    )
                )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        for pid in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    @property
    def output(self) -> str:
        return self.file.read_text()

    def running(self) -> list[int]:
        """Processes of the job, launchers and their helpers too, that have not ended."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self.mark in _environment(pid)]

    def ranks(self) -> dict[int, int]:
        """Process id by rank."""
        found = {}
        for pid in self.running():
            variables = dict(entry.partition("=")[::2] for entry in _environment(pid))
            rank = variables.get("RANK", variables.get("SLURM_PROCID"))
            if rank is not None and any(word.endswith("launch/pretrain.py") for word in _read(pid, "cmdline")):
                found[int(rank)] = pid
        return found

    def named(self, word: str) -> list[int]:
        """Processes of whose command's first words one matches the expression `word`."""
        return [pid for pid in self.running() if any(re.search(word, w) for w in _read(pid, "cmdline")[:4])]

    def step(self) -> int:
        """The last step whose record was printed; 0 before."""
        return max((int(step) for step in re.findall(r"^step (\d+)/", self.output, re.MULTILINE)), default=0)

    def wait(self, seconds: float = 400) -> list[int]:
        """Exit codes of the commands, once no process of the job is left."""
        until(lambda: all(p.poll() is not None for p in self.processes) and not self.running(), seconds, self)
        return [process.returncode for process in self.processes]


def until(condition: Callable[[], object], seconds: float, job: Job) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened for {seconds} s; output:\n{job.output}"
        time.sleep(0.02)


def _read(pid: int, name: str) -> list[str]:
    """Of a process that may have ended: then nothing, as of a zombie."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _environment(pid: int) -> list[str]:
    return _read(pid, "environ")
