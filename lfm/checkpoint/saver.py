"""Write checkpoints: every rank its share, in the background if asked for, whole or not at all."""

import copy
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lfm.checkpoint.folder import (
    BEST,
    TEMPORARY,
    hash_files,
    io_threads,
    mark_best,
    remove,
    remove_unfinished,
    whole_checkpoints,
)
from lfm.checkpoint.manifest import MANIFEST_NAME, TOKENIZER_NAME, manifest_bytes
from lfm.checkpoint.stored_tensors import METADATA_NAME
from lfm.checkpoint.tensors import tensor_hash
from lfm.errors import UserError
from lfm.files import listed, reason, sync, write_durably
from lfm.talk import complain

T = TypeVar("T")


class Saver:
    """Writes `folder/step_N` and drops all but the newest `keep` checkpoints.

    `group` is a gloo group of all ranks which nothing else uses; None: one process.  An asynchronous saver writes from
    a copy in host memory of this rank's share.  At most one save is under way, so that there is never a second copy;
    the one is kept for the next save, which spares allocating it anew.

    Leaving it as a context waits for the save under way, however the context ends; an error that ends it comes before
    one of that save, which is then printed.
    """

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool, group: dist.ProcessGroup | None = None) -> None:
        self.folder, self.keep, self.asynchronous, self.group = folder, keep, asynchronous, group
        self.rank, self.world_size = (group.rank(), group.size()) if group is not None else (0, 1)
        self.last_seconds = 0.0
        """From the call of the last finished save until its checkpoint was whole."""
        self.spared: Path | None = None
        """A checkpoint that stays, whatever its age."""
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        manifest: dict[str, Any],
        tokenizer: bytes,
        *,
        owned: bool = False,
        best: bool = False,
    ) -> float:
        """Save this rank's `tensors` with the others' as `step`; returns the seconds that training was held.

        `best`: the link to the best checkpoint moves to this one, which stays when newer ones come.
        `owned`: nothing else changes the tensors any more, so that an asynchronous save needs no copy.

        Collective.  A DTensor is one rank's shard; other keys are given by one rank.  `manifest` and `tokenizer` are
        rank 0's.  Raises UserError on every rank, with the earlier checkpoints intact, when this save (in the
        background: the one before) could not be written on any of them.
        """
        start = time.perf_counter()
        self.wait()
        if not self.asynchronous:
            self._write(step, tensors, manifest, tokenizer, start, best)
            return self.last_seconds
        manifest = copy.deepcopy(manifest)
        try:
            share: Mapping[str, Tensor] | Exception = tensors if owned else self._copy_to_host(tensors)
        except (RuntimeError, MemoryError) as error:
            share = error  # for the thread to tell the other ranks, which go on to wait for this one

        def write() -> None:
            try:
                self._write(step, share, manifest, tokenizer, start, best)
            except BaseException as error:
                self._error = error

        # No daemon: an interpreter that ends while one is inside torch aborts.
        self._thread = threading.Thread(target=write, name="saver")
        self._thread.start()
        return time.perf_counter() - start

    @property
    def has_failed(self) -> bool:
        """Whether a background save ended in an error that `wait` has not raised yet; ranks come to see it in turn."""
        return self._error is not None

    def wait(self) -> None:
        """Wait for the save under way, if any; raises its error, on all ranks alike."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, _: type[BaseException] | None, cause: BaseException | None, __: TracebackType | None) -> None:
        try:
            self.wait()
        except UserError as error:
            if cause is None:
                raise
            if self.rank == 0:
                complain(str(error))

    @torch.no_grad()
    def _copy_to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._host = {key: buffer for key, buffer in self._host.items() if key in tensors}
        meshes: dict[DeviceMesh, DeviceMesh] = {}
        copies = {}
        for key, tensor in tensors.items():
            local, buffer = _local(tensor), self._host.get(key)
            if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
                buffer = self._host[key] = torch.empty(local.shape, dtype=local.dtype)
            copies[key] = buffer.copy_(local)
            if isinstance(tensor, DTensor):
                mesh = tensor.device_mesh
                if mesh.device_type != "cpu" and mesh not in meshes:
                    meshes[mesh] = DeviceMesh.from_group(mesh.get_group(), "cpu")
                # On a mesh of another device the copy would be moved back there.
                copies[key] = DTensor.from_local(
                    buffer, meshes.get(mesh, mesh), tensor.placements, shape=tensor.shape, stride=tensor.stride()
                )
        return copies

    def _write(
        self,
        step: int,
        share: Mapping[str, Tensor] | Exception,
        manifest: dict[str, Any],
        tokenizer: bytes,
        start: float,
        best: bool,
    ) -> None:
        """Collective, over `group` alone: each step ends with all ranks knowing that it went well on all."""
        final, temporary = self.folder / f"step_{step:08d}", self.folder / f"{TEMPORARY}step_{step:08d}"
        need = 0

        def measure() -> int:
            if isinstance(share, Exception):
                raise share
            return sum(_local(tensor).nbytes for tensor in share.values())

        def prepare() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.folder)
            if need > shutil.disk_usage(self.folder).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
            temporary.mkdir()

        def write() -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
            assert not isinstance(share, Exception)
            writer = _Writer(temporary, threads=io_threads(self.world_size))
            dcp_save(dict(share), storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            names = [path.name for path in listed(temporary) if path.name.startswith(f"__{self.rank}_")]
            if self.rank == 0:
                write_durably(temporary / TOKENIZER_NAME, tokenizer)
                names += [METADATA_NAME, TOKENIZER_NAME]
            frozen = {key: tensor_hash(tensor) for key, tensor in share.items() if key.startswith("frozen.")}
            return frozen, hash_files(temporary, names, io_threads(self.world_size))

        def finish() -> None:
            frozen = {key: digest for part, _ in written for key, digest in part.items()}
            files = {name: entry for _, part in written for name, entry in part.items()}
            for name, entry in files.items():
                if not (temporary / name).exists() or (temporary / name).stat().st_size != entry["bytes"]:
                    raise UserError(
                        f"checkpoint file {temporary / name}, written by another rank, is not seen by rank 0; "
                        "set output=DIR to a folder that all hosts share"
                    )
            whole = {"step": step, **manifest, "frozen": frozen, "files": files}
            write_durably(temporary / MANIFEST_NAME, manifest_bytes(whole))
            sync(temporary)
            os.rename(temporary, final)
            sync(self.folder)
            try:
                tidy()
            except (UserError, OSError) as error:  # the checkpoint is there
                complain(f"{final} is saved, and what should change beside it cannot ({error})")

        def tidy() -> None:
            if best:
                mark_best(final)
            kept = {os.path.realpath(path) for path in (self.folder / BEST, self.spared) if path is not None}
            for old in whole_checkpoints(self.folder)[: -self.keep]:
                if os.path.realpath(old) not in kept:
                    remove(old)

        def on_every_rank(work: Callable[[], T]) -> list[T]:
            return self._on_every_rank(work, lambda error: self._explained(error, final, need))

        def on_rank_0(work: Callable[[], None]) -> None:
            on_every_rank(work if self.rank == 0 else lambda: None)

        try:
            need = sum(on_every_rank(measure))
            on_rank_0(prepare)
            written = on_every_rank(write)
            on_rank_0(finish)
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.last_seconds = time.perf_counter() - start

    def _on_every_rank(self, work: Callable[[], T], explained: Callable[[BaseException], Exception]) -> list[T]:
        """What `work` returns on each rank, by rank; the first rank's error, if any, is raised on all of them."""
        result, cause, error = None, None, None
        try:
            result = work()
        except (Exception, CheckpointException) as raised:
            cause, error = raised, explained(raised)
        outcomes: list[Any] = [(result, error)]
        if self.group is not None:
            outcomes *= self.world_size
            try:
                dist.all_gather_object(outcomes, (result, error), group=self.group)
            except RuntimeError as lost:
                # A rank is gone; why this one failed, if it did, says more than that it cannot tell.
                raise error or lost from cause
        for _, found in outcomes:
            if found is not None:
                raise found from cause
        return [result for result, _ in outcomes]

    def _explained(self, error: BaseException, final: Path, need: int) -> Exception:
        """`error` as every rank will raise it: something that another process can read back."""
        rank = self.rank
        if isinstance(error, CheckpointException):
            rank, (error, _) = next(iter(error.failures.items()))
            if not isinstance(error, Exception):
                raise error  # an interrupt
        if isinstance(error, UserError):
            return error
        if not isinstance(error, OSError):
            return RuntimeError(f"checkpoint {final}: {type(error).__name__} on rank {rank}: {error}")
        free = shutil.disk_usage(_existing(self.folder)).free
        if error.errno == errno.ENOSPC and free < need:
            why = f"needs {_amount(need)} and the disk has {_amount(free)} free; free some space or set"
        elif error.errno == errno.EFBIG:
            why = f"could not be written by rank {rank}: a file is larger than `ulimit -f` allows; raise that or set"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = f"could not be written: {reason(error)}, and it needs {_amount(need)}; free some space or set"
        else:
            why = f"could not be written by rank {rank} ({error}); make the folder writable or set"
        return UserError(f"checkpoint {final} {why} output=DIR; {self._earlier()}")

    def _earlier(self) -> str:
        try:
            earlier = whole_checkpoints(self.folder)
        except UserError:
            return "earlier checkpoints were not touched"
        return f"the checkpoint before, {earlier[-1].name}, is intact" if earlier else "there is no earlier checkpoint"


class _Files(FileSystem):
    """Keeps the errors of writes: DCP lets a helper thread that meets one die unheard, and goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[Exception] = []
        self.several_threads = False
        """While they write an error ends none of them, so that none still writes when the first error is raised."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        opened = False
        try:
            with super().create_stream(path, mode) as stream:
                opened = True
                yield stream
            return
        except Exception as error:
            # torch.save hides the OSError behind an error of its own, which would not survive the way to other ranks.
            self.errors.append(_os_error(error) or error)
        if not self.several_threads:
            raise self.errors[-1] from None
        if not opened:
            with suppress(OSError), open(os.devnull, "wb") as nowhere:
                yield nowhere


class _Writer(FileSystemWriter):
    def __init__(self, path: Path, *, threads: int) -> None:
        # No copying ahead: it would open a CUDA context on device 0 in a thread of every rank.
        super().__init__(path, thread_count=threads, sync_files=True, per_thread_copy_ahead=0)
        self.files = self.fs = _Files()

    def write_data(self, plan: Any, planner: Any) -> Any:
        self.files.several_threads = True
        written = super().write_data(plan, planner)
        self.files.several_threads = False
        if self.files.errors:
            raise self.files.errors[0]
        missing = len(plan.items) - len(written.value())
        if missing:
            raise RuntimeError(f"{missing} of {len(plan.items)} tensors were not written")
        return written


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError that `error` is or comes from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
