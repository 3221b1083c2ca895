import re
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lfm.errors import UserError
from lfm.layers.attention import Attention, AttentionConfig, attend, choose_backend, flash_failure
from lfm.layers.documents import Documents
from lfm.layers.flash_attention import FLASH_ATTN_2, FLASH_ATTN_4, PACKAGES, FlashPackage, flash_attention
from tests.comparison import assert_close, relative_error

# Stands for a package of flash-attn: its function, by one SDPA call a document, so that a CPU can run what calls it.
STAND_IN = """
import torch
from torch.nn.functional import scaled_dot_product_attention

def flash_attn_varlen_func(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, deterministic
):
    assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max()) and deterministic
    pieces = [x.transpose(0, 1).split(cu_seqlens_q.diff().tolist(), dim=1) for x in (q, k, v)]
    outputs = [scaled_dot_product_attention(*piece, is_causal=causal, enable_gqa=True) for piece in zip(*pieces)]
    return RESULT
"""
KIND = (torch.device("cpu"), torch.float64, 16, 3)


def _package(folder: Path, result: str, monkeypatch) -> FlashPackage:
    """An importable module under a name of its own."""
    name = f"stand_in_{folder.name}"
    (folder / f"{name}.py").write_text(STAND_IN.replace("RESULT", result))
    monkeypatch.syspath_prepend(folder)
    return FlashPackage(name, name, (9,), 128)


RIGHT = "torch.cat(outputs, dim=1).transpose(0, 1).contiguous()"


@pytest.mark.parametrize("result", [RIGHT, f"({RIGHT}, None)"], ids=["flash-attn 2's result", "flash-attn 4's"])
def test_a_package_that_attends_within_documents_passes(tmp_path, monkeypatch, result):
    assert flash_failure(_package(tmp_path, result, monkeypatch), *KIND) is None


@pytest.mark.parametrize(
    "result, words",
    [
        (f"1.02 * {RIGHT}", r"is off by 2.0e-02 in output"),
        (f"{RIGHT} + (0.1 * (k - k.detach())).repeat_interleave(3, 1)", r"is off by .* in the gradient of k"),
        (f"{RIGHT} * float('nan')", r"is off by nan in output"),
        ("undefined", r"does not run \(NameError: name 'undefined' is not defined\)"),
    ],
    ids=["output", "gradient", "nan", "broken"],
)
def test_a_package_that_is_wrong_is_found_out(tmp_path, monkeypatch, result, words):
    package = _package(tmp_path, result, monkeypatch)
    found = flash_failure(package, *KIND)
    assert found is not None and re.fullmatch(words, found), found


def test_a_package_that_cannot_be_imported_is_found_out():
    found = flash_failure(FlashPackage("absent", "lfm_absent_package", (9,), 128), *KIND)
    assert found == "does not run (ModuleNotFoundError: No module named 'lfm_absent_package')"


def test_the_comparison_may_fall_into_a_checkpointed_forward(tmp_path, monkeypatch):
    """Which must save the same tensors when it is run again, without the comparison."""
    package = _package(tmp_path, RIGHT, monkeypatch)
    seen = []

    def layer(x):
        if not seen:
            seen.append(flash_failure(package, *KIND))
        return x.sin().exp()

    x = torch.randn(3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert seen == [None] and torch.allclose(x.grad, x.cos() * x.sin().exp())


def test_rows_and_heads_keep_their_places(tmp_path, monkeypatch):
    package = _package(tmp_path, RIGHT, monkeypatch)
    q = torch.randn(2, 6, 31, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 31, 8, dtype=torch.float64)
    documents = Documents.from_lengths([[31], [20, 1, 10]], "cpu")
    y = flash_attention(q, k, v, documents, package)
    assert relative_error(y, attend(q, k, v, documents, backend="reference")) < 1e-12
    assert y.transpose(1, 2).is_contiguous()


HALF, CUDA = torch.bfloat16, torch.device("cuda")


@pytest.mark.parametrize(
    "device, dtype, num_positions, one_document, flash_attn_4, want",
    [
        (CUDA, HALF, 8192, True, True, "flash"),
        (CUDA, torch.float16, 8192, False, True, "flash"),
        (CUDA, HALF, 1000, False, True, "flash"),
        (CUDA, HALF, 8192, True, False, "sdpa"),
        (CUDA, HALF, 8192, False, False, "flex"),
        (CUDA, HALF, 1000, False, False, "sdpa"),
        (CUDA, torch.float32, 8192, False, False, "sdpa"),
        (torch.device("cpu"), HALF, 8192, False, False, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_path_that_is_there(device, dtype, num_positions, one_document, flash_attn_4, want):
    found = choose_backend(device, dtype, num_positions, row_is_one_document=one_document, flash_attn_4=flash_attn_4)
    assert found == want


@pytest.mark.parametrize(
    "package, capability, dtype, head_size, want",
    [
        (FLASH_ATTN_4, (9, 0), HALF, 128, None),
        (FLASH_ATTN_4, (10, 0), torch.float16, 64, None),
        (
            FLASH_ATTN_4,
            (8, 0),
            HALF,
            128,
            "needs a GPU of compute capability 9.x, 10.x, 11.x, not compute capability 8.0",
        ),
        (FLASH_ATTN_4, None, HALF, 128, "needs a GPU of compute capability 9.x, 10.x, 11.x, not one without CUDA"),
        (FLASH_ATTN_4, (9, 0), torch.float32, 128, "computes in bfloat16 or float16, not float32"),
        (FLASH_ATTN_4, (9, 0), HALF, 36, "takes head sizes that 8 divides up to 128, not 36"),
        (FLASH_ATTN_2, (8, 0), HALF, 256, None),
    ],
)
def test_what_a_package_lacks_is_said(package, capability, dtype, head_size, want):
    assert package.lack(capability, dtype, head_size) == want


@pytest.mark.skipif(any(package.installed for package in PACKAGES), reason="a package of flash-attn is installed")
def test_flash_without_its_package_says_what_to_install():
    with pytest.raises(UserError, match=r"pip install 'flash-attn-4\[cu13\]==4.0.0b36', or .*attention.backend=auto"):
        Attention(32, AttentionConfig(num_attention_heads=4, num_query_groups=2, backend="flash"))


def test_flash_on_a_cpu_is_refused():
    q = torch.randn(1, 2, 8, 16)
    with pytest.raises(UserError, match=r"attention.backend=flash: flash-attn-4 .*; choose attention.backend=auto"):
        attend(q, q, q, Documents.whole_rows(1, 8, "cpu"), backend="flash")


needs_flash = pytest.mark.skipif(
    not any(package.installed for package in PACKAGES), reason="flash-attn is not installed"
)


def _projection(B, T, H, G, K):
    """Views of a fused projection, as `Attention` has its values."""
    qkv = torch.randn(B, T, H + 2 * G, K, device="cuda", dtype=HALF)
    return [part.requires_grad_() for part in qkv.transpose(1, 2).split((H, G, G), dim=1)]


def _outputs_and_grads(backend, leaves, documents):
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in zip("qkv", leaves, strict=True)}
    y = attend(*leaves.values(), documents, backend=backend)
    y.backward(torch.linspace(-1, 1, y[0].numel(), device=y.device).view_as(y[:1]).expand_as(y).to(y.dtype))
    return {"y": y, **{name: leaf.grad for name, leaf in leaves.items()}}


@pytest.mark.gpu
@needs_flash
@pytest.mark.parametrize("K", [128, 64])
@pytest.mark.parametrize(
    "lengths",
    [[[1024]], [[300, 1, 500, 223]], [[128] * 8], [[1001], [400, 601]], [[20, 13, 30]]],
    ids=["one", "packed", "equal", "odd", "short"],
)
def test_flash_equals_the_dense_definition_and_itself(lengths, K):
    leaves = _projection(len(lengths), sum(lengths[0]), 6, 2, K)
    documents = Documents.from_lengths(lengths, "cuda")
    want = _outputs_and_grads("reference", [leaf.float() for leaf in leaves], documents)
    got = _outputs_and_grads("flash", leaves, documents)
    assert relative_error(got["y"], want["y"]) < 5e-3
    assert_close(got, want, 1e-2)
    for _ in range(3):
        again = _outputs_and_grads("flash", leaves, documents)
        assert all(torch.equal(got[name], again[name]) for name in got)


@pytest.mark.gpu
@needs_flash
def test_a_row_alone_equals_the_row_in_a_batch():
    lengths = [[2048], [700, 1, 1347], [64] * 32]
    leaves = _projection(3, 2048, 24, 8, 128)
    whole = _outputs_and_grads("flash", leaves, Documents.from_lengths(lengths, "cuda"))
    for b in range(3):
        row = [leaf[b : b + 1] for leaf in leaves]
        alone = _outputs_and_grads("flash", row, Documents.from_lengths(lengths[b : b + 1], "cuda"))
        assert all(torch.equal(alone[name], whole[name][b : b + 1]) for name in alone)


@pytest.mark.gpu
@needs_flash
def test_auto_is_flash_attn_4_where_it_serves():
    if not FLASH_ATTN_4.installed or FLASH_ATTN_4.lack(torch.cuda.get_device_capability(), HALF, 128):
        pytest.skip("flash-attn 4 does not serve this GPU")
    leaves = _projection(1, 1024, 6, 2, 128)
    documents = Documents.from_lengths([[500, 524]], "cuda")
    assert torch.equal(attend(*leaves, documents), attend(*leaves, documents, backend="flash"))
