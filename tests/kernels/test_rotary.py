import pytest
import torch

from lfm.kernels.rotary import rotated_heads
from lfm.layers.rotary import rotary_tables
from tests.comparison import assert_close

# The CPU interprets the kernels.  Its interpreter cuts fp32 off to bf16 where a GPU rounds, hence fp16 there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _outputs_and_grads(backend, qkv, tables, grads, **heads):
    qkv = qkv.detach().clone().requires_grad_()
    outputs = rotated_heads(qkv, *tables, backend=backend, **heads)
    torch.autograd.backward(outputs, [grad.to(qkv.dtype) for grad in grads])
    return {**dict(zip("qkv", outputs, strict=True)), "grad": qkv.grad}


def _tables(B, T, K, dtype):
    positions = (torch.arange(T, device=DEVICE) + 1000 * torch.arange(B, device=DEVICE)[:, None]).long()
    return rotary_tables(positions, head_size=K, base=1e4, dtype=dtype)


def _compare(B, T, H, G, K, dtype, bound, strided=False):
    qkv = torch.randn(T, B, (H + 2 * G) * K, device=DEVICE).to(dtype).transpose(0, 1)
    qkv = qkv if strided else qkv.contiguous()
    # As attention returns them: some in the order of heads, some of positions.
    grads = [torch.randn(B, T, n, K, device=DEVICE).to(dtype).transpose(1, 2) for n in (H, G, G)]
    grads[1] = grads[1].contiguous()
    heads = {"head_size": K, "num_groups": G}
    got = _outputs_and_grads("triton", qkv, _tables(B, T, K, torch.float32), grads, **heads)
    if DEVICE == "cuda":
        again = _outputs_and_grads("triton", qkv, _tables(B, T, K, torch.float32), grads, **heads)
        assert all(torch.equal(got[name], again[name]) for name in got)
    assert got["q"].dtype == got["grad"].dtype == dtype
    want = _outputs_and_grads("reference", qkv.double(), _tables(B, T, K, torch.float64), grads, **heads)
    assert_close(got, want, bound)
    assert torch.equal(got["v"], qkv.unflatten(-1, (-1, K)).transpose(1, 2)[:, H + G :])


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 5e-4)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("B, T, H, G, K", [(1, 1, 1, 1, 2), (2, 3, 12, 4, 16), (3, 4, 3, 1, 6)])
def test_the_kernel_equals_the_definition(B, T, H, G, K, dtype, bound):
    _compare(B, T, H, G, K, dtype, bound)


def test_a_projection_whose_sequence_comes_first_in_memory_is_read_as_it_is():
    _compare(2, 5, 4, 2, 8, torch.float32, 1e-6, strided=True)


def test_queries_and_keys_lie_in_the_order_of_positions():
    """So that attention takes them, and hands its output on, without a copy."""
    qkv = torch.randn(2, 5, 32, device=DEVICE)
    q, k, _ = rotated_heads(qkv, *_tables(2, 5, 8, torch.float32), head_size=8, num_groups=1, backend="triton")
    assert q.transpose(1, 2).is_contiguous() and k.transpose(1, 2).is_contiguous()


def test_a_cached_key_keeps_neither_queries_nor_the_projection_alive():
    qkv = torch.randn(1, 5, 32, device=DEVICE)
    _, k, _ = rotated_heads(qkv, *_tables(1, 5, 8, torch.float32), head_size=8, num_groups=1, backend="triton")
    assert k.untyped_storage().nbytes() == k.numel() * k.element_size()


@pytest.mark.parametrize("width, head_size, groups", [(32, 7, 1), (30, 8, 1), (32, 8, 2)])
def test_heads_that_do_not_fit_are_refused(width, head_size, groups):
    tables = torch.zeros(1, 1, 2, head_size // 2)
    with pytest.raises(ValueError, match=f"no heads of head_size={head_size}, num_groups={groups}"):
        rotated_heads(torch.zeros(1, 2, width), tables, tables, head_size=head_size, num_groups=groups)


def test_tables_of_other_positions_are_refused():
    tables = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="not \\[1, 1, 2, 4\\]"):
        rotated_heads(torch.zeros(1, 2, 32), tables, tables, head_size=8, num_groups=1)


@pytest.mark.gpu
@pytest.mark.parametrize("B, T, H, G, K", [(1, 8192, 24, 8, 128), (3, 1001, 10, 2, 96)])
def test_large_projections_equal_float64(B, T, H, G, K):
    _compare(B, T, H, G, K, torch.bfloat16, 3e-3)
