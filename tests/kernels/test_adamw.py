import itertools

import pytest
import torch

from lfm.kernels.adamw import adamw_
from lfm.kernels.adamw.kernel import LARGE

# The CPU interprets the kernels; its interpreter has no bf16.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOW = {"betas": (0.9, 0.95), "eps": 1e-8}


def shared(step: int, *, scale: float = 1.0, refused: float = 0.0) -> torch.Tensor:
    return torch.tensor([*(1 / (1 - beta**step) for beta in HOW["betas"]), scale, refused], device=DEVICE)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_several_updates_of_several_tensors_are_those_of_torch(backend):
    generator = torch.Generator().manual_seed(0)
    shapes, lrs, decays = [(1,), (5, 1000), (2049,), (0,)], [0.01, 0.02, 0.01, 0.3], [0.1, 0.0, 0.3, 0.0]
    first = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    theirs = [torch.nn.Parameter(x.double()) for x in first]
    groups = [{"params": [p], "lr": lr, "weight_decay": w} for p, lr, w in zip(theirs, lrs, decays, strict=True)]
    optimizer = torch.optim.AdamW(groups, **HOW)
    ours, m, v = [x.clone() for x in first], [torch.zeros_like(x) for x in first], [torch.zeros_like(x) for x in first]
    workings = [torch.empty_like(x, dtype=torch.float16) if i != 2 else None for i, x in enumerate(first)]
    for step in range(1, 4):
        grads = [torch.randn(shape, generator=generator).to(DEVICE) * 10.0 ** (step - 3) for shape in shapes]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = 0.3 * grad.double()
        optimizer.step()
        how = {**HOW, "weight_decays": decays, "workings": workings, "backend": backend}
        adamw_(ours, grads, m, v, torch.tensor(lrs, device=DEVICE), shared(step, scale=0.3), **how)
    for i, parameter in enumerate(theirs):
        state = optimizer.state[parameter]
        for got, want in ((ours[i], parameter), (m[i], state["exp_avg"]), (v[i], state["exp_avg_sq"])):
            torch.testing.assert_close(got.double(), want.detach(), rtol=2e-6, atol=1e-7)
        assert workings[i] is None or torch.equal(workings[i], ours[i].half())


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_refused_update_changes_nothing(backend):
    tensors = [[torch.full((7,), float(i + 1), device=DEVICE)] for i in range(4)]
    before, working = [each[0].clone() for each in tensors], torch.zeros(7, dtype=torch.float16, device=DEVICE)
    tensors[1][0].fill_(torch.nan)
    numbers = torch.tensor([0.01], device=DEVICE), shared(1, scale=torch.nan, refused=1.0)
    adamw_(*tensors, *numbers, **HOW, weight_decays=[0.1], workings=[working], backend=backend)
    assert all(torch.equal(tensors[i][0], before[i]) for i in (0, 2, 3)) and not working.any()


def test_without_copies():
    a, b = ([[torch.full((7,), float(i + 1), device=DEVICE)] for i in range(4)] for _ in range(2))
    numbers, how = (torch.tensor([0.01], device=DEVICE), shared(1)), {**HOW, "weight_decays": [0.1], "workings": [None]}
    adamw_(*a, *numbers, **how, backend="triton")
    adamw_(*b, *numbers, **how, backend="reference")
    for got, want in zip(a, b, strict=True):
        torch.testing.assert_close(got, want)


def test_wrong_shapes_are_named():
    x, lrs = torch.zeros(2, device=DEVICE), torch.zeros(1, device=DEVICE)
    with pytest.raises(ValueError, match=r"have shapes \[2\], \[3\]"):
        wrong = torch.zeros(3, device=DEVICE)
        adamw_([x], [wrong], [x], [x], lrs, shared(1), **HOW, weight_decays=[0.0], workings=[None])
    with pytest.raises(ValueError, match=r"lrs has shape \[1\] and shared \[4\]; they must be \[2\]"):
        adamw_([x, x], [x, x], [x, x], [x, x], lrs, shared(1), **HOW, weight_decays=[0.0] * 2, workings=[None] * 2)


@pytest.mark.gpu
def test_large_tensors_on_a_gpu():
    shapes = [(8, 2304, 3072), (LARGE - 1,), (300,), (LARGE,)]
    tensors = [[torch.rand(shape, device="cuda") for shape in shapes] for _ in range(4)]
    other = [[tensor.clone() for tensor in each] for each in tensors]
    workings = [torch.empty_like(x, dtype=torch.bfloat16) for x in tensors[0]]
    numbers = torch.tensor([0.01, 0.02, 0.03, 0.04], device="cuda"), shared(3, scale=0.5)
    how = {**HOW, "weight_decays": [0.1, 0.0, 0.1, 0.2]}
    adamw_(*tensors, *numbers, **how, workings=workings, backend="triton")
    adamw_(*other, *numbers, **how, workings=[None] * 4, backend="reference")
    for got, want in zip(itertools.chain(*tensors), itertools.chain(*other), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(copy, x.bfloat16()) for copy, x in zip(workings, tensors[0], strict=True))
