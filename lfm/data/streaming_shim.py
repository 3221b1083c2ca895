"""The one module that imports mosaicml-streaming, and only the parts of it that read, write and fetch shard files.

`import streaming` pulls in transformers and torchvision, fails where torchvision's operators do not match torch (any
CPU build), and takes four times as long as all that is needed here.  So its two package initialisers are skipped: empty
packages stand in for `streaming` and `streaming.base` while the submodules load, and are removed afterwards, so that a
later `import streaming` elsewhere in the process still gets the real thing.
"""

import importlib
import importlib.util
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGES = ("streaming", "streaming.base")
_import_lock = threading.Lock()


def make_writer(
    folder: Path, columns: dict[str, str], *, compression: str | None, hashes: Sequence[str], shard_bytes: int
) -> Any:
    """An `MDSWriter` into an absent or empty local `folder`; `write(sample)` rows, then `finish()`."""
    writer = _load("streaming.base.format").MDSWriter
    return writer(
        out=str(folder), columns=columns, compression=compression, hashes=sorted(hashes), size_limit=shard_bytes
    )


def decompress(algorithm: str, data: bytes) -> bytes:
    """Undo the writer's `compression`.  Raises whatever the algorithm raises on damaged data."""
    return _load("streaming.base.compression").decompress(algorithm, data)


def download(remote: str, local: Path, timeout_seconds: float) -> None:
    """Copy one remote file (s3://, hf://, file://, a path, ...) to `local`.  Not every scheme heeds the timeout."""
    remote = remote.removeprefix("file://")
    _load("streaming.base.storage.download").CloudDownloader.direct_download(remote, str(local), timeout_seconds)


def _load(name: str) -> ModuleType:
    with _import_lock:
        if name in sys.modules:
            return sys.modules[name]
        if "streaming" in sys.modules:
            return importlib.import_module(name)
        spec = importlib.util.find_spec("streaming")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("mosaicml-streaming is not installed; run `make setup`")
        root = Path(next(iter(spec.submodule_search_locations)))
        for package, folder in zip(_PACKAGES, (root, root / "base"), strict=True):
            bare = ModuleType(package)
            bare.__path__ = [str(folder)]
            sys.modules[package] = bare
        try:
            # First of all: its submodules import each other in a circle, which closes from any other point.
            importlib.import_module("streaming.base.format")
            return importlib.import_module(name)
        finally:
            for package in _PACKAGES:
                del sys.modules[package]
