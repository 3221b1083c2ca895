"""`adamw_`: checks and the choice of path."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lfm.kernels.adamw.reference import adamw_reference_
from lfm.kernels.backend import Backend, draw, runs_triton


def adamw_(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    lrs: Tensor,
    shared: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decays: Sequence[float],
    workings: Sequence[Tensor | None],
    backend: Backend = "auto",
) -> None:
    """One update of fp32 tensors in place, item by item; decay is decoupled (Loshchilov & Hutter 2019, 1711.05101).

    What changes from step to step lies on their device, where a CUDA graph reads it anew: lrs, fp32 `[tensors]`; and
    shared, fp32 `[4]`: 1 / (1 - beta^step) of either beta, a factor on the gradients, and whether the update is refused
    (not 0), which leaves everything as it is, whatever the gradients are.
    workings: a copy of the parameter in another dtype, which is given its new value, or None.  Raises ValueError for
    shapes that disagree.
    """
    for parameter, *others in zip(parameters, grads, exp_avgs, exp_avg_sqs, workings, strict=True):
        beside = [other for other in others if other is not None]
        if any(tensor.shape != parameter.shape for tensor in beside):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in (parameter, *beside))
            raise ValueError(f"parameter, grad, exp_avg, exp_avg_sq and working have shapes {shapes}; they must agree")
    if lrs.shape != (len(parameters),) or shared.shape != (4,):
        raise ValueError(
            f"lrs has shape {list(lrs.shape)} and shared {list(shared.shape)}; they must be [{len(parameters)}] and [4]"
        )
    if not parameters:
        return
    how = {"betas": betas, "eps": eps, "weight_decays": weight_decays, "workings": workings}
    given = [*parameters, *grads, *exp_avgs, *exp_avg_sqs, *(x for x in workings if x is not None)]
    dense = all(x.is_contiguous() for x in given) and all(x.dtype == torch.float32 for x in parameters)
    if (dense or backend == "triton") and runs_triton(parameters[0], backend, _comparison):
        from lfm.kernels.adamw.kernel import adamw_kernel_

        adamw_kernel_(parameters, grads, exp_avgs, exp_avg_sqs, lrs, shared, **how)
    else:
        adamw_reference_(parameters, grads, exp_avgs, exp_avg_sqs, lrs, shared, **how)


def _comparison(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    lrs = torch.tensor([0.01, 0.1], device=device)

    def updated(backend: Backend, refused: float) -> list[Tensor]:
        first = [[draw(i, n, device=device, dtype=dtype) for i in range(4)] for n in (9001, 70)]
        p, g, m, v = (list(each) for each in zip(*first, strict=True))
        v, working = [x.square() for x in v], torch.zeros_like(p[0], dtype=torch.bfloat16)
        shared = torch.tensor([1.25, 3.5, 0.7, refused], device=device)
        how = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decays": (0.1, 0.0), "workings": (working, None)}
        adamw_(p, g, m, v, lrs, shared, backend=backend, **how)
        return [torch.cat(p), torch.cat(m), torch.cat(v), working]

    names = ("the parameters", "the first moments", "the second moments", "the working copy")
    yield from zip(names, updated("triton", 0.0), updated("reference", 0.0), strict=True)
    # Of no update nothing is left in the working copy, which was zero.
    yield from zip(names[:3], updated("triton", 1.0)[:3], updated("reference", 1.0)[:3], strict=True)
