import pytest
import torch

from lfm.kernels.column_sum import column_sum
from tests.comparison import assert_close

# The CPU interprets the kernels.  Its interpreter cuts fp32 off to bf16 where a GPU rounds, hence fp16 there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 5e-4)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (33, 7), (128, 128), (129, 24), (700, 250)], ids=str)
def test_the_kernel_equals_the_definition(shape, dtype, bound):
    x = torch.randn(shape, device=DEVICE).to(dtype)
    got = column_sum(x, backend="triton")
    assert got.dtype == dtype and got.shape == shape[1:]
    assert_close({"sum": got}, {"sum": x.double().sum(0)}, bound)
    assert torch.equal(column_sum(x, backend="triton"), got)


def test_rows_may_lie_apart():
    x = torch.randn(200, 96, device=DEVICE)
    for view in (x[::3, 8:72], x[:1].expand(200, -1), x.T):
        got = column_sum(view, backend="triton")
        assert torch.allclose(got, view.sum(0), rtol=1e-5, atol=1e-4)


def test_no_rows_sum_to_zero():
    assert torch.equal(column_sum(torch.empty(0, 5, device=DEVICE), backend="triton"), torch.zeros(5, device=DEVICE))
    assert column_sum(torch.empty(5, 0, device=DEVICE), backend="triton").shape == (0,)


def test_ones_are_counted_beyond_the_range_of_their_dtype():
    x = torch.ones(5000, 3, device=DEVICE, dtype=torch.float16)
    assert torch.equal(column_sum(x, backend="triton"), torch.full((3,), 5000.0).half().to(DEVICE))


def test_other_ranks_are_named():
    with pytest.raises(ValueError, match=r"x has shape \[2, 3, 4\]; a column sum needs \[n, D\]"):
        column_sum(torch.zeros(2, 3, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 1536), (65536, 3072), (12345, 1000)], ids=str)
def test_bf16_sums_at_full_width(shape):
    x = torch.randn(shape, device="cuda").bfloat16()
    got = column_sum(x)
    assert_close({"sum": got}, {"sum": x.double().sum(0)}, 3e-3)
    assert torch.equal(column_sum(x), got)
