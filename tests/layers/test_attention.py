import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.layers.attention import Attention, AttentionConfig, _block_mask, attend
from lfm.layers.documents import Documents
from lfm.layers.rotary import rotary_tables
from tests.comparison import assert_close


def _outputs_and_grads(backend, q, k, v, documents):
    leaves = {name: t.clone().requires_grad_() for name, t in zip("qkv", (q, k, v), strict=True)}
    y = attend(*leaves.values(), documents, backend=backend)
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y))
    return {"y": y, **{name: t.grad for name, t in leaves.items()}}


LENGTHS = [[[256], [256]], [[100, 156], [1, 254, 1]], [[37, 1, 90, 128], [128, 128]]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=["one", "packed", "many"])
def test_document_attention_equals_the_dense_definition(lengths):
    q = torch.randn(2, 6, 256, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 256, 16, dtype=torch.float64)
    documents = Documents.from_lengths(lengths, "cpu")
    want = _outputs_and_grads("reference", q, k, v, documents)
    assert_close(_outputs_and_grads("sdpa", q, k, v, documents), want, 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[[1024]], [[300, 1, 500, 223]], [[128] * 8]], ids=["one", "packed", "equal"])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_gpu_backends_equal_the_dense_definition(backend, lengths):
    q = torch.randn(1, 6, 1024, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 2, 1024, 128, device="cuda", dtype=torch.bfloat16)
    documents = Documents.from_lengths(lengths, "cuda")
    want = _outputs_and_grads("reference", q.double(), k.double(), v.double(), documents)
    assert_close(_outputs_and_grads(backend, q, k, v, documents), want, 1e-2)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_block_mask_covers_exactly_the_visible_pairs(lengths):
    total = sum(lengths)
    lengths = [*lengths, 128 - total % 128] if total % 128 else lengths
    documents = Documents.from_lengths([lengths], "cpu")
    mask = _block_mask(documents)
    T = sum(lengths)
    document = documents.starts.long().cumsum(1)[0]
    visible = (document[:, None] == document) & torch.ones(T, T, dtype=torch.bool).tril()
    blocks = visible.view(T // 128, 128, T // 128, 128).permute(0, 2, 1, 3).flatten(2)

    def chosen(counts, indices):
        found = torch.zeros(T // 128, T // 128, dtype=torch.bool)
        for i in range(T // 128):
            found[i, indices[0, 0, i, : counts[0, 0, i]].long()] = True
        return found

    partial, full = chosen(mask.kv_num_blocks, mask.kv_indices), chosen(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & full).any()
    assert torch.equal(partial | full, blocks.any(-1))
    assert blocks.all(-1)[full].all()
    index = torch.arange(T)
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(mask.mask_mod(zero, zero, index[:, None], index[None]), visible)


def test_query_head_reads_the_group_it_belongs_to():
    q, v = torch.randn(1, 6, 4, 8), torch.zeros(1, 2, 4, 8)
    v[:, 1] = 1.0
    y = attend(q, torch.randn(1, 2, 4, 8), v, Documents.whole_rows(1, 4, "cpu"))
    assert torch.allclose(y[0, :, 0, 0], torch.tensor([0.0, 0, 0, 1, 1, 1]))


@pytest.mark.parametrize("prefix", [1, 5, 600])
def test_attention_with_a_cache_continues_the_sequence(prefix):
    torch.manual_seed(1)
    layer = Attention(32, AttentionConfig(num_attention_heads=4, num_query_groups=2)).double()
    T = prefix + 520  # more than one query block
    x = torch.randn(2, T, 32, dtype=torch.float64)
    positions = torch.arange(T).expand(2, T)

    def tables(part):
        return rotary_tables(positions[:, part], head_size=8, base=1e4, dtype=torch.float64)

    whole, _ = layer(x, rotary=tables(slice(None)))
    first, cache = layer(x[:, :prefix], rotary=tables(slice(prefix)), keep_cache=True)
    kept = cache.key.clone()
    second, _ = layer(x[:, prefix:], rotary=tables(slice(prefix, None)), cache=cache)
    assert torch.allclose(torch.cat((first, second), 1), whole, atol=1e-12)
    assert torch.equal(cache.key, kept), "a state was written in place"
