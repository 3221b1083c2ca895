"""CUDA C++ compiled at first use into a plain shared library, for ctypes: seconds, and no headers of torch's."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from lfm.kernels.backend import compute_capability
from lfm.kernels.recording import not_recording

TIMEOUT_SECONDS = 300
HOPPER_FLAGS = ("-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC")


class Unavailable(Exception):
    """Why this process cannot have a compiled kernel."""


def require_hopper(device: torch.device) -> None:
    """Raise Unavailable on a GPU that does not run code for sm_90a."""
    capability = compute_capability(device)
    if capability != (9, 0):
        raise Unavailable(f"{torch.cuda.get_device_name(device)} has compute capability {capability}, not (9, 0)")


def runs(prepare: Callable[[torch.device], None], device: torch.device, without: str) -> bool:
    """Whether `prepare(device)`, which compiles, loads and tests a kernel, ends well on a Hopper GPU; if not, one
    warning says what happens `without` the kernel, and why."""
    try:
        require_hopper(device)
        with not_recording():
            prepare(device)
    except (Unavailable, OSError, RuntimeError) as error:
        warnings.warn(f"{without} on {device}, without its kernel: {error}", RuntimeWarning, stacklevel=3)
        return False
    return True


def compile_library(source: Path, flags: tuple[str, ...]) -> Path:
    """The shared library of `source`, in torch's cache of extensions; compiled by one process while others wait.

    The lock is the system's, so a compiler that is killed leaves none behind; the library appears under its name only
    when it is whole.
    """
    texts = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.cuh")))]
    digest = hashlib.sha256(b"".join(texts) + "\0".join(flags).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    target = cache / "lfm" / f"{source.stem}_{digest}.so"
    if target.exists():
        return target
    nvcc = find_nvcc()
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            temporary = target.with_suffix(f".{os.getpid()}.tmp")
            try:
                libraries = Path(nvcc).parent.parent / "lib"  # where pip's has the runtime it links
                command = [nvcc, *flags, f"-L{libraries}", "-o", str(temporary), str(source)]
                done = subprocess.run(
                    command, capture_output=True, encoding="utf-8", errors="replace", timeout=TIMEOUT_SECONDS
                )
                if done.returncode != 0:
                    raise Unavailable(f"{nvcc} failed on {source.name}: {done.stderr.strip()[-500:]}")
                os.replace(temporary, target)
            except subprocess.TimeoutExpired:
                raise Unavailable(f"{nvcc} took more than {TIMEOUT_SECONDS} s on {source.name}") from None
            finally:
                temporary.unlink(missing_ok=True)
    return target


def find_nvcc() -> str:
    """CUDA's compiler: of CUDA_HOME if that is set, else on the PATH, where CUDA installs itself, or pip's."""
    home = os.environ.get("CUDA_HOME")
    candidates = ["nvcc", "/usr/local/cuda/bin/nvcc", *(f"{folder}/nvidia/cu13/bin/nvcc" for folder in sys.path)]
    found = next(filter(None, map(shutil.which, [f"{home}/bin/nvcc"] if home else candidates)), None)
    if found is None:
        where = f"under CUDA_HOME={home}" if home else "on the PATH"
        raise Unavailable(
            f"there is no nvcc {where}; install the CUDA toolkit of torch's CUDA version (13.0: `pip install "
            "'lfm-training[cuda]'`), or set CUDA_HOME"
        )
    return found
