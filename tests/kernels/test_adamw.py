import pytest
import torch

from lfm.kernels.adamw import adamw_

# The CPU interprets the kernels; its interpreter has no bf16.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOW = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def corrections(step: int) -> torch.Tensor:
    return torch.tensor([1 / (1 - beta**step) for beta in HOW["betas"]], device=DEVICE)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("shape", [(1,), (5, 1000), (2049,)], ids=str)
def test_several_updates_are_those_of_torch(backend, shape):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(shape, generator=generator).to(DEVICE)
    grads = [torch.randn(shape, generator=generator).to(DEVICE) * 10.0**i for i in range(-2, 2)]
    theirs = torch.nn.Parameter(first.double())
    optimizer = torch.optim.AdamW([theirs], **HOW)
    ours, m, v = first.clone(), torch.zeros_like(first), torch.zeros_like(first)
    working = torch.empty_like(first, dtype=torch.float16)
    for step, grad in enumerate(grads, 1):
        theirs.grad = 0.3 * grad.double()
        optimizer.step()
        adamw_(ours, grad, m, v, corrections(step), **HOW, scale=0.3, working=working, backend=backend)
    state = optimizer.state[theirs]
    for got, want in ((ours, theirs), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        torch.testing.assert_close(got.double(), want.detach(), rtol=2e-6, atol=1e-7)
    assert torch.equal(working, ours.half())


def test_without_scale_and_copy():
    a, b = ([torch.full((7,), float(i + 1), device=DEVICE) for i in range(4)] for _ in range(2))
    adamw_(*a, corrections(1), **HOW, backend="triton")
    adamw_(*b, corrections(1), **HOW, backend="reference")
    for got, want in zip(a, b, strict=True):
        torch.testing.assert_close(got, want)


def test_wrong_shapes_are_named():
    x = torch.zeros(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"have shapes \[2\], \[3\]"):
        adamw_(x, torch.zeros(3, device=DEVICE), x, x, corrections(1), **HOW)


@pytest.mark.gpu
def test_a_large_tensor_on_a_gpu():
    tensors = [torch.rand(8, 2304, 3072, device="cuda") for _ in range(4)]
    other, working = [tensor.clone() for tensor in tensors], torch.empty_like(tensors[0], dtype=torch.bfloat16)
    adamw_(*tensors, corrections(3), **HOW, scale=0.5, working=working, backend="triton")
    adamw_(*other, corrections(3), **HOW, scale=0.5, backend="reference")
    for got, want in zip(tensors, other, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(working, tensors[0].bfloat16())
