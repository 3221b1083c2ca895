"""A sweep's thousands of small launches as one CUDA graph, captured once per shape and replayed.

A step of the loop is one kernel of a few microseconds with Triton and seven without; from Python they cost more to
launch than to run.
Only training captures: its shapes repeat.  The first pass alone is captured, without the guard, which the caller
applies to the residual that comes out.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from lfm.kernels.recording import capturing

_MOST_GRAPHS = 16
"""Kept at once; one of LFM-3B's holds about 150 MB.  Warm-ups move by notches, so few are ever live."""

_graphs: "OrderedDict[Hashable, _Captured]" = OrderedDict()


class _Captured:
    def __init__(self, run: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor | None, ...]) -> None:
        self.inputs: list[Tensor | None] = [None if x is None else x.detach().clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(*self.inputs)  # libraries initialise outside the capture
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # The backward of autograd runs, and captures, in a thread of its own.
        with capturing(self.graph):
            self.outputs = run(*self.inputs)

    def replay(self, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        for static, x in zip(self.inputs, inputs, strict=True):
            if static is not None and x is not None:
                static.copy_(x)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)


def replayed(
    run: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor | None, ...], options: Hashable
) -> tuple[Tensor, ...]:
    """`run(*inputs)` through a captured graph; `options` names everything besides the inputs that `run` depends on.

    `run` must not wait for the device, and must depend on its inputs' values only through device memory.
    """
    shapes = tuple(None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in inputs)
    key = (options, shapes)
    captured = _graphs.get(key)
    if captured is None:
        captured = _graphs[key] = _Captured(run, inputs)
        if len(_graphs) > _MOST_GRAPHS:
            _graphs.popitem(last=False)
    _graphs.move_to_end(key)
    return captured.replay(inputs)
