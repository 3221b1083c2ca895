import pytest
import torch

from lfm.kernels.gated_scan import gated_scan
from lfm.kernels.gated_scan.reference import gated_scan_reference
from tests.comparison import assert_close

# The CPU interprets the gate's kernels; its interpreter has no bf16.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOW = {"delta_min": 1e-5, "scale": 0.3}


def leaves(B, T, D, dtype):
    generator = torch.Generator().manual_seed(0)
    projections = torch.randn(B, T, 3 * D, generator=generator).to(DEVICE, dtype).requires_grad_()
    bias = (torch.randn(D, generator=generator) - 4).to(DEVICE).requires_grad_()
    reset = (torch.rand(B, T, generator=generator) < 0.1).to(DEVICE)
    return projections, bias, reset


def outputs_and_grads(fn, projections, bias, reset, used=(0, 1)):
    outputs = fn(projections, bias, None, reset)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(part.shape, generator=generator).to(part) for part in outputs]
    sum((weights[i] * outputs[i]).sum() for i in used).backward()
    found = {"y": outputs[0].detach(), "final": outputs[1].detach(), "projections": projections.grad, "bias": bias.grad}
    projections.grad = bias.grad = None
    return found


def fused(*given):
    return gated_scan(*given, **HOW, backend="triton")


def definition(*given):
    return gated_scan_reference(*given, HOW["delta_min"], HOW["scale"])


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["y", "final", "both"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float16, 3e-3)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 37, 136)], ids=str)
def test_the_fused_path_equals_the_definition(shape, dtype, bound, used):
    projections, bias, reset = leaves(*shape, dtype)
    got = outputs_and_grads(fused, projections, bias, reset, used)
    wide = projections.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    assert_close(got, outputs_and_grads(definition, *wide, reset, used), bound)
    assert got["projections"].dtype == dtype and got["final"].dtype == torch.float32


def test_a_state_and_no_gradient_take_the_definition():
    projections, bias, reset = leaves(2, 5, 16, torch.float32)
    state = torch.randn(2, 16, device=DEVICE)
    how = (HOW["delta_min"], HOW["scale"])
    for got, want in zip(
        fused(projections, bias, state, None), gated_scan_reference(projections, bias, state, None, *how), strict=True
    ):
        assert torch.equal(got, want)
    with torch.no_grad():
        for got, want in zip(
            fused(projections, bias, None, reset), definition(projections, bias, None, reset), strict=True
        ):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(48, 512, 384), (2, 1500, 200)], ids=str)
def test_bf16_on_a_gpu_equals_the_definition(shape):
    projections, bias, reset = leaves(*shape, torch.bfloat16)
    got, again = (outputs_and_grads(fused, projections, bias, reset) for _ in range(2))
    assert all(torch.equal(got[name], again[name]) for name in got)
    wide = projections.detach().float().requires_grad_(), bias.detach().requires_grad_()
    assert_close(got, outputs_and_grads(definition, *wide, reset), 1e-2)
