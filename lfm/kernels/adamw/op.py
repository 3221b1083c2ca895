"""`adamw_`: checks and the choice of path."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lfm.kernels.adamw.reference import adamw_reference_
from lfm.kernels.backend import Backend, draw, runs_triton


def adamw_(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    corrections: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float = 1.0,
    working: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """One update of fp32 tensors of one shape, in place; decay is decoupled (Loshchilov & Hutter 2019, 1711.05101).

    corrections: fp32 `[2]` on the same device, 1 / (1 - beta^step) of either beta.  scale: a factor on the gradient.
    working: a copy of the parameter in another dtype, which is given its new value.  Raises ValueError for shapes that
    disagree.
    """
    beside = [grad, exp_avg, exp_avg_sq, *([] if working is None else [working])]
    if any(tensor.shape != parameter.shape for tensor in beside):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (parameter, *beside))
        raise ValueError(f"parameter, grad, exp_avg, exp_avg_sq and working have shapes {shapes}; they must agree")
    how = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "scale": scale, "working": working}
    dense = all(tensor.is_contiguous() for tensor in (parameter, *beside)) and parameter.dtype == torch.float32
    if (dense or backend == "triton") and runs_triton(parameter, backend, _comparison):
        from lfm.kernels.adamw.kernel import adamw_kernel_

        adamw_kernel_(parameter, grad, exp_avg, exp_avg_sq, corrections, **how)
    else:
        adamw_reference_(parameter, grad, exp_avg, exp_avg_sq, corrections, **how)


def _comparison(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    corrections = torch.tensor([1.25, 3.5], device=device)

    def updated(backend: Backend) -> list[Tensor]:
        p, g, m, v = (draw(i, 9001, device=device, dtype=dtype) for i in range(4))
        v, working = v.square(), torch.empty_like(p, dtype=torch.bfloat16)
        how = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "scale": 0.7}
        adamw_(p, g, m, v, corrections, working=working, backend=backend, **how)
        return [p, m, v, working]

    names = ("the parameter", "the first moment", "the second moment", "the working copy")
    yield from zip(names, updated("triton"), updated("reference"), strict=True)
