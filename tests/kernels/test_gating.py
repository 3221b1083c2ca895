import pytest
import torch

from lfm.kernels.gating import gated, joined_norm, scaled_sum
from lfm.kernels.gating.reference import gated_reference, joined_norm_reference, scaled_sum_reference
from lfm.kernels.gradient_sum import GradientSum, give_sum
from tests.comparison import assert_close

# The CPU interprets the kernels; its interpreter has no bf16.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [(torch.float32, 3e-6), (torch.float16, 3e-3)]


def leaves(*shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def outputs_and_grads(fn, given):
    outputs = fn(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    grads = torch.autograd.grad(outputs, given, weights)
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"gradient {i}": grad for i, grad in enumerate(grads)}


def compare(fn, reference, given, bound):
    got = outputs_and_grads(fn, given)
    want = outputs_and_grads(reference, [x.detach().double().requires_grad_() for x in given])
    assert_close(got, want, bound)


@pytest.mark.parametrize("dtype, bound", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("rows, D", [((1,), 3), ((2, 7), 64), ((700,), 20), ((3,), 1100)], ids=str)
def test_the_norm_of_both_halves(rows, D, dtype, bound):
    given = leaves((*rows, D), (*rows, D), (1,), (2 * D,), (2 * D,), dtype=dtype)

    def definition(x, *others):
        return x, *joined_norm_reference(x, *others, 1e-5)

    compare(lambda *parts: joined_norm(*parts, eps=1e-5, backend="triton"), definition, given, bound)


@pytest.mark.parametrize("dtype, bound", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 1500)], ids=str)
def test_the_gate_and_the_scaled_sum(shape, dtype, bound):
    compare(lambda *x: gated(*x, backend="triton"), gated_reference, leaves(shape, shape, shape, dtype=dtype), bound)
    given = leaves(shape, shape, (1,), dtype=dtype)
    compare(lambda *x: scaled_sum(*x, backend="triton"), scaled_sum_reference, given, bound)


def test_parts_that_nobody_uses_have_no_gradient():
    given = leaves((4, 6), (4, 6), (1,), (12,), (12,), dtype=torch.float32)
    wide = [x.detach().double().requires_grad_() for x in given]
    for used in (
        lambda x, s, z: z.sum(),
        lambda x, s, z: (s * s).sum() + x.sum(),
        lambda x, s, z: (s * z[..., :6]).sum(),
    ):
        got = torch.autograd.grad(used(*joined_norm(*given, eps=1e-5, backend="triton")), given)
        want = torch.autograd.grad(
            used(wide[0], *joined_norm_reference(*wide, 1e-5)), wide, allow_unused=True, materialize_grads=True
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_parameters_add_up_their_own_gradients():
    x, y, log_scale, weight, bias = leaves((50, 6), (50, 6), (1,), (12,), (12,), dtype=torch.float16)
    want = torch.autograd.grad(joined_norm(x, y, log_scale, weight, bias, eps=1e-5, backend="triton")[2].sum(), bias)[0]
    sums = {
        name: GradientSum(torch.zeros(p.shape, device=DEVICE))
        for name, p in (("s", log_scale), ("w", weight), ("b", bias))
    }
    for parameter, found in zip((log_scale, weight, bias), sums.values(), strict=True):
        give_sum(parameter, found)
    for _ in range(2):
        z = joined_norm(x, y, log_scale, weight, bias, eps=1e-5, backend="triton")[2]
        scaled_sum(z, z, log_scale, backend="triton").sum().backward()
    assert not any(found.is_empty for found in sums.values()) and bias.grad is None
    scale = 1 + log_scale.detach().float()
    torch.testing.assert_close(sums["b"].total, 2 * scale * want.float(), rtol=5e-3, atol=1e-2)


def test_shapes_that_disagree_are_named():
    x, one = torch.zeros(2, 3), torch.zeros(1)
    with pytest.raises(ValueError, match=r"weight, bias have shapes \[\[2, 3\], \[2, 3\], \[1\], \[3\], \[3\]\]"):
        joined_norm(x, x, one, x[0], x[0], eps=1e-5)
    with pytest.raises(ValueError, match=r"logits, a, b have shapes"):
        gated(x, x, x[0])
    with pytest.raises(ValueError, match=r"scale must be \[1\]"):
        scaled_sum(x, x, x[0])


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 512])
def test_bf16_on_a_gpu(D):
    given = leaves((64, 128, D), (64, 128, D), (1,), (2 * D,), (2 * D,), dtype=torch.bfloat16)

    def definition(x, *others):
        return x, *joined_norm_reference(x, *others, 1e-5)

    got = outputs_and_grads(lambda *parts: joined_norm(*parts, eps=1e-5, backend="triton"), given)
    want = outputs_and_grads(definition, [x.detach().double().requires_grad_() for x in given])
    # One number, a sum that may come out near zero: next to the norm of its summands.
    summands = (want["gradient 1"] * given[1]).norm()
    assert (got.pop("gradient 2") - want.pop("gradient 2")).abs() < 2e-2 * summands
    assert_close(got, want, 1e-2)
