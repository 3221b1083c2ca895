import pytest
import torch
import torch.nn.functional as F

from lfm.kernels.cross_entropy import cross_entropy_, joined_sums, scaled, shard_gradient_, shard_sums
from tests.comparison import assert_close

# The CPU interprets the kernels.  Its interpreter cuts fp32 off to bf16 where a GPU rounds, hence fp16 there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _truth(logits, labels):
    logits = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    losses.sum().backward()
    return {"losses": losses, "gradient": logits.grad}


def _compare(n, V, dtype, bounds, scale=1.0):
    logits = (scale * torch.randn(n, V, device=DEVICE)).to(dtype)
    labels = torch.randint(0, V, (n,), device=DEVICE)
    labels[: n // 3] = -100
    got = []
    for _ in range(2 if DEVICE == "cuda" else 1):
        gradient = logits.clone()
        got.append({"losses": cross_entropy_(gradient, labels, backend="triton"), "gradient": gradient})
    assert all(torch.equal(got[0][name], got[-1][name]) for name in got[0])
    want = _truth(logits, labels)
    for name, bound in zip(("losses", "gradient"), bounds, strict=True):
        assert_close({name: got[0][name]}, {name: want[name]}, bound)
    assert (got[0]["losses"][: n // 3] == 0).all() and (got[0]["gradient"][: n // 3] == 0).all()
    kept = logits.clone()
    assert torch.equal(cross_entropy_(kept, labels, gradient=False, backend="triton"), got[0]["losses"])
    assert torch.equal(kept, logits)


@pytest.mark.parametrize(
    "dtype, bounds", [(torch.float32, (1e-6, 1e-6)), (torch.float16, (1e-6, 5e-4))], ids=["fp32", "fp16"]
)
@pytest.mark.parametrize("n, V", [(1, 2), (5, 300), (4, 8200), (3, 20_011)])
def test_the_kernel_equals_the_definition(n, V, dtype, bounds):
    _compare(n, V, dtype, bounds)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("V, padding", [(300, 20), (8191, 1), (20_011, 53)])
def test_memory_between_rows_changes_nothing(V, padding, backend):
    labels = torch.tensor([V - 1, -100, 0], device=DEVICE)
    whole = torch.full((3, V + padding + 2), torch.nan, device=DEVICE)
    logits = whole[:, :V].copy_(torch.randn(3, V, device=DEVICE))
    want = logits.clone()
    alone = cross_entropy_(want, labels, backend=backend)
    assert torch.equal(cross_entropy_(logits, labels, padding=padding, backend=backend), alone)
    assert torch.equal(logits, want) and whole[:, V + padding :].isnan().all()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("V", [300, 8191])
def test_a_bias_is_added_to_every_row(V, backend):
    logits, bias = torch.randn(5, V, device=DEVICE), torch.randn(V, device=DEVICE)
    labels = torch.tensor([V - 1, -100, 0, 7, 7], device=DEVICE)
    want = _truth(logits + bias, labels)
    losses = cross_entropy_(logits, labels, bias=bias, backend=backend)
    assert_close({"losses": losses, "gradient": logits}, {k: x.detach() for k, x in want.items()}, 1e-6)
    with pytest.raises(ValueError, match=r"bias has shape \[2\]; it must be \["):
        cross_entropy_(logits, labels, bias=bias[:2])


def test_padding_that_is_not_there_is_refused():
    logits, labels = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"padding=1 is more than the 0 elements between two rows"):
        cross_entropy_(logits, labels, padding=1)


@pytest.mark.parametrize("n, V", [(5, 300), (3, 20_011)])
def test_weights_of_rows_multiply_losses_and_gradients(n, V):
    logits = torch.randn(n, V, device=DEVICE)
    labels, weights = torch.randint(0, V, (n,), device=DEVICE), torch.randn(n, device=DEVICE)
    labels[0], weights[1] = -100, 0.0
    want = {name: value.detach() for name, value in _truth(logits, labels).items()}
    for backend in ("triton", "reference"):
        gradient = logits.clone()
        losses = cross_entropy_(gradient, labels, token_weights=weights, backend=backend)
        weighted = {"losses": want["losses"] * weights, "gradient": want["gradient"] * weights[:, None]}
        assert_close({"losses": losses, "gradient": gradient}, weighted, 1e-6)
        assert losses[0] == 0 and (gradient[:2] == 0).all()


def test_weights_of_another_shape_or_dtype_are_refused():
    logits, labels = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    for weights in (torch.ones(2), torch.ones(3, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="token_weights is"):
            cross_entropy_(logits, labels, token_weights=weights)


def test_logits_far_apart_stay_finite():
    logits = torch.full((2, 300), -1e4, device=DEVICE)
    logits[:, 7] = 1e4
    labels = torch.tensor([7, 8], device=DEVICE)
    losses = cross_entropy_(logits, labels, backend="triton")
    assert losses.tolist() == [0, 2e4]
    assert logits[0].abs().max() == 0 and logits[1, 7] == 1 and logits[1, 8] == -1


def test_a_logit_that_is_not_a_number_reaches_the_loss():
    logits = torch.randn(2, 300, device=DEVICE)
    logits[1, 5] = torch.nan
    losses = cross_entropy_(logits, torch.tensor([0, 1], device=DEVICE), backend="triton")
    assert losses.isfinite().tolist() == [True, False]


def test_columns_past_the_vocabulary_are_left_alone():
    padded = torch.randn(4, 70, device=DEVICE)
    want, before = padded[:, :65].clone(), padded[:, 65:].clone()
    labels = torch.tensor([0, 64, 3, -100], device=DEVICE)
    losses = cross_entropy_(padded[:, :65], labels, backend="triton")
    assert torch.equal(padded[:, 65:], before)
    assert_close({"losses": losses, "gradient": padded[:, :65]}, _truth(want, labels), 1e-6)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="must be \\[n, V\\]"):
        cross_entropy_(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64))


def _in_shards(logits, labels, factors, widths, backend):
    """Losses and the gradient, from each shard alone and the sums of all."""
    starts = [sum(widths[:i]) for i in range(len(widths))]
    shards = [s.clone() for s in logits.split(widths, 1)]
    own = [labels - start for start in starts]
    sums = [shard_sums(*pair, backend=backend) for pair in zip(shards, own, strict=True)]
    log_normalizer, label_logit = joined_sums(torch.stack(sums))
    for shard, label in zip(shards, own, strict=True):
        shard_gradient_(shard, label, log_normalizer, factors, backend=backend)
    return {"losses": (log_normalizer - label_logit) * factors, "gradient": torch.cat(shards, 1)}


def _compare_shards(n, widths, dtype, bounds, backend):
    logits = (2 * torch.randn(n, sum(widths), device=DEVICE)).to(dtype)
    # One label in each shard's first and last column, and rows without a label.
    ends = [end for i, width in enumerate(widths) if width for end in (sum(widths[:i]), sum(widths[: i + 1]) - 1)]
    labels = torch.tensor((ends * n)[:n], device=DEVICE)
    labels[1::3] = -100
    factors = torch.randn(n, device=DEVICE).masked_fill(labels < 0, 0)
    want = _truth(logits, labels)
    want = {"losses": want["losses"].detach() * factors, "gradient": want["gradient"] * factors[:, None]}
    got = _in_shards(logits, labels, factors, widths, backend)
    assert (got["gradient"][1::3] == 0).all()
    for name, bound in zip(("losses", "gradient"), bounds, strict=True):
        assert_close({name: got[name]}, {name: want[name]}, bound)


@pytest.mark.parametrize(
    "dtype, bounds", [(torch.float32, (1e-6, 1e-6)), (torch.float16, (1e-6, 5e-4))], ids=["fp32", "fp16"]
)
@pytest.mark.parametrize("n, widths", [(6, [1, 1]), (7, [40, 40, 17, 0]), (5, [8200, 20_011])], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_shards_of_the_vocabulary_give_what_the_whole_gives(n, widths, dtype, bounds, backend):
    _compare_shards(n, widths, dtype, bounds, backend)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_shard_of_small_logits_beside_one_of_large_ones_stays_finite(backend):
    logits = torch.full((2, 300), -1e4, device=DEVICE)
    logits[:, 7] = 1e4
    got = _in_shards(logits, torch.tensor([7, 208], device=DEVICE), torch.ones(2, device=DEVICE), [100, 200], backend)
    assert got["losses"].tolist() == [0, 2e4]
    assert got["gradient"][0].abs().max() == 0 and got["gradient"][1, 7] == 1 and got["gradient"][1, 208] == -1


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5, 1001)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_scaled_gradient_is_rounded_once(shape, dtype):
    x, factor = torch.randn(shape, device=DEVICE).to(dtype), torch.tensor(1 / 3, device=DEVICE)
    got = scaled(x, factor, torch.float16, backend="triton")
    assert torch.equal(got, (x.float() * factor).half()) and torch.equal(got, scaled(x, factor, torch.float16))


def test_a_factor_of_several_numbers_is_refused():
    with pytest.raises(ValueError, match=r"factor has shape \[2\]"):
        scaled(torch.zeros(3), torch.zeros(2), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("n, V", [(512, 128_256), (100, 50_257)])
def test_large_vocabularies_equal_float64(n, V):
    _compare(n, V, torch.bfloat16, (1e-6, 3e-3), scale=2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [[64_128, 64_128], [25_129, 25_128]], ids=str)
def test_large_shards_equal_float64(widths):
    _compare_shards(512, widths, torch.bfloat16, (1e-6, 3e-3), "triton")


@pytest.mark.gpu
def test_large_gradients_are_scaled_bit_for_bit():
    x, factor = torch.randn(128_256, 257, device="cuda"), torch.tensor(0.37, device="cuda")
    assert torch.equal(scaled(x, factor, torch.bfloat16), (x * factor).bfloat16())
