import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_only_launchers_above_this_process_are_watched(tmp_path):
    """mpirun -> worker is watched; a shell whose arguments merely name deepspeed is not."""
    worker = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from lfm.job.launchers import Launchers\n"
        "launchers = Launchers()\n"
        "print(launchers.gone(), flush=True)\n"
        "deadline = time.monotonic() + 2\n"
        "while launchers.gone() is None and time.monotonic() < deadline: time.sleep(0.05)\n"
        "print(launchers.gone(), flush=True)\n"
    )
    script = '"$0" -c "$1"; true deepspeed torchrun'
    parents = [
        subprocess.Popen(
            [name, "-c", script, sys.executable, worker], executable="/bin/sh", stdout=subprocess.PIPE, text=True
        )
        for name in ("mpirun", "sh")
    ]
    for parent, told in zip(parents, (f"mpirun (pid {parents[0].pid})", "None"), strict=True):
        assert parent.stdout is not None and parent.stdout.readline() == "None\n"
        parent.kill()
        parent.wait()
        assert parent.stdout.readline() == told + "\n"
