"""A function applied to many items by several processes, with the results in the order of the items.

The processes are plain interpreters that speak pickle over their pipes: they import the function's module and nothing
of the program that started them, and end when their input does, however that program ended.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from lfm.errors import UserError

_ROOT = str(Path(__file__).resolve().parents[1])

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """`map(function, items)`, by `num_workers` processes; 0: by this one.

    `function` and items are pickled.  At most two items a process are read ahead.  Raises a UserError of the function
    as it is, its other errors as RuntimeError with their traceback, and UserError for a process that was killed.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_Worker(function)) for _ in range(num_workers)]
        idle = deque(workers)
        lock = threading.Lock()

        def call(item: Item) -> Result:
            with lock:
                worker = idle.pop()
            try:
                return worker.call(item)
            finally:
                with lock:
                    idle.append(worker)

        # One thread a process, so that there is always an idle one for `call`.
        threads = ThreadPoolExecutor(num_workers)
        stack.callback(threads.shutdown, wait=True, cancel_futures=True)
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(threads.submit(call, item))
            if len(waiting) >= 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Worker:
    """One process; used as a context."""

    def __init__(self, function: Callable[..., Any]) -> None:
        path = os.pathsep.join([_ROOT, *filter(None, sys.path)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "data_pipeline.pool"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # The processes are the parallelism: each with as many threads as cores would only get in the others' way.
            env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        self._function = pickle.dumps(function, protocol=5)

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def call(self, item: Any) -> Any:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None and answers is not None
        try:
            requests.write(self._function)
            self._function = b""
            pickle.dump(item, requests, protocol=5)
            requests.flush()
            outcome, value = pickle.load(answers)
        except (OSError, EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            reason = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with exit code {code}"
            raise UserError(
                f"a preparing process ended {reason}; if it was killed for lack of memory, set num_workers to fewer"
            ) from None
        if outcome == "mistake":
            raise UserError(value)
        if outcome == "bug":
            raise RuntimeError(f"in a preparing process:\n{value}")
        return value


def _serve() -> None:
    """Answer each item from stdin with the function's result on stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program that started this one decides
    requests = os.fdopen(os.dup(0), "rb", 1 << 20)
    answers = os.fdopen(os.dup(1), "wb", 1 << 20)
    os.dup2(2, 1)  # what libraries print is no answer
    with contextlib.suppress(EOFError, BrokenPipeError):
        function = pickle.load(requests)
        while True:
            item = pickle.load(requests)
            try:
                answer = "result", function(item)
            except UserError as error:
                answer = "mistake", str(error)
            except Exception:
                answer = "bug", traceback.format_exc()
            pickle.dump(answer, answers, protocol=5)
            answers.flush()
    os._exit(0)  # the pipe may be gone: nothing more to write


if __name__ == "__main__":
    _serve()
