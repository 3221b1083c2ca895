"""Causal grouped-query attention with document masks that never become a dense T x T tensor."""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lfm.kernels.rotary import rotated_heads
from lfm.layers.documents import Documents
from lfm.layers.parts import PLAIN, Parts

Backend = Literal["auto", "reference", "sdpa", "flex"]

# With a cache, queries go in blocks of this many, so that the mask is [block, keys] and never [T, T].
_QUERY_BLOCK = 512
_FLEX_BLOCK = 128


@dataclass(eq=False)
class KeyValueCache:
    """Keys and values of the tokens seen so far, `[B, G, S, K]`, rotary already applied; never written in place.

    `padding[b]` slots at the left of row `b` hold no token, so that prompts of several lengths share one batch.
    """

    key: Tensor
    value: Tensor
    padding: Int[Tensor, " B"]

    def append(self, key: Tensor, value: Tensor) -> "KeyValueCache":
        return KeyValueCache(torch.cat((self.key, key), 2), torch.cat((self.value, value), 2), self.padding)

    @staticmethod
    def stack(caches: list["KeyValueCache"]) -> "KeyValueCache":
        """One batch from several, shorter ones padded on the left."""
        longest = max(cache.key.shape[2] for cache in caches)

        def pad(tensor: Tensor) -> Tensor:
            return F.pad(tensor, (0, 0, longest - tensor.shape[2], 0))

        return KeyValueCache(
            torch.cat([pad(cache.key) for cache in caches]),
            torch.cat([pad(cache.value) for cache in caches]),
            torch.cat([cache.padding + (longest - cache.key.shape[2]) for cache in caches]),
        )


def check_heads(hidden_size: int, num_attention_heads: int, num_query_groups: int) -> None:
    """Raise ValueError, naming the nearest legal value, for heads of no even size or groups that do not divide them."""
    h, n = hidden_size, num_attention_heads
    if h % n or h // n % 2:
        raise ValueError(
            f"hidden_size={h} over num_attention_heads={n} is not an even head size; "
            f"the nearest hidden_size is {max(2 * n, round(h / (2 * n)) * 2 * n)}"
        )
    if n % num_query_groups:
        legal = [g for g in range(1, n + 1) if n % g == 0]
        raise ValueError(f"num_query_groups={num_query_groups} does not divide {n} heads; choose from {legal}")


class Attention(nn.Module):
    """Query head i reads key/value head i // (H / K).  No biases.  Ainslie et al. 2023 (GQA, arXiv 2305.13245)."""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_attention_heads: int,
        num_query_groups: int,
        backend: Backend = "auto",
        parts: Parts = PLAIN,
    ) -> None:
        super().__init__()
        self.head_size = hidden_size // num_attention_heads
        widths = (hidden_size, num_query_groups * self.head_size, num_query_groups * self.head_size)
        self.widths = tuple(width // parts.tensor_size for width in widths)
        self.backend: Backend = backend
        self.qkv = parts.column_linear(hidden_size, sum(widths))
        self.out = parts.row_linear(hidden_size, hidden_size)

    def fused_parameters(self) -> dict[str, tuple[str, tuple[slice, ...]]]:
        """Global name -> (run-time parameter, index of its part)."""
        starts = [sum(self.widths[:i]) for i in range(4)]
        return {
            **{f"{n}.weight": ("qkv.weight", (slice(starts[i], starts[i + 1]),)) for i, n in enumerate("qkv")},
            "o.weight": ("out.weight", ()),
        }

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        rotary: tuple[Tensor, Tensor],
        documents: Documents | None = None,
        cache: KeyValueCache | None = None,
        keep_cache: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], KeyValueCache | None]:
        """Attend within `documents` (training, prefill), or over `cache` followed by x (streaming)."""
        qkv = self.qkv(x)
        B, T, _ = qkv.shape
        num_groups = self.widths[1] // self.head_size
        q, k, v = rotated_heads(qkv, *rotary, head_size=self.head_size, num_groups=num_groups)
        if cache is None:
            y = attend(q, k, v, documents or Documents.whole_rows(B, T, x.device), backend=self.backend)
            new_cache = KeyValueCache(k, v, torch.zeros(B, dtype=torch.int64, device=x.device)) if keep_cache else None
        else:
            new_cache = cache.append(k, v)
            y = _attend_cached(q, new_cache)
        return self.out(y.transpose(1, 2).reshape(B, T, -1)), new_cache


def choose_backend(q: Tensor, documents: Documents) -> Backend:
    """The faster path, measured on an H200 (benchmarks/results/attention.json).

    cuDNN for rows that are one document, flex_attention for packed rows; on a CPU, in fp32, or where 128 does not
    divide the row, one SDPA call for each document.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    packed = not documents.row_is_one_document and q.shape[2] % _FLEX_BLOCK == 0
    return "flex" if q.is_cuda and half and packed else "sdpa"


def attend(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T K"],
    documents: Documents,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "B H T K"]:
    """softmax(q k^T / sqrt(head_size)) v, causal, within each document; softmax in fp32."""
    if backend == "auto":
        backend = choose_backend(q, documents)
    if backend == "reference":
        return _reference(q, k, v, documents)
    if backend == "flex" and q.is_cuda and q.shape[2] % _FLEX_BLOCK == 0:
        return _flex(q, k, v, documents)
    if documents.row_is_one_document:
        return _causal(q, k, v)
    # One call per document.  Pieces come in row order, so that concatenating them rebuilds the rows.
    rows = []
    for b, lengths in enumerate(documents.lengths):
        pieces = [part[b : b + 1].split(lengths, dim=2) for part in (q, k, v)]
        rows.append(torch.cat([_causal(*piece) for piece in zip(*pieces, strict=True)], dim=2))
    return torch.cat(rows)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        # cuDNN's kernel is twice as fast as the built-in flash kernel on Hopper and takes grouped heads as they are.
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _reference(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """The definition, with a dense mask: for tests at small T."""
    groups = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) / q.shape[-1] ** 0.5
    document = documents.starts.long().cumsum(1)
    same = document[:, None, :, None] == document[:, None, None, :]
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return (scores.masked_fill(~(same & causal), -torch.inf).softmax(-1) @ v.to(wide)).to(q.dtype)


def _flex(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    return _compiled_flex()(q, k, v, block_mask=_block_mask(documents), enable_gqa=True)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=2)
def _block_mask(documents: Documents):
    """flex_attention's block mask, built from document starts block by block: O((T/128)^2) entries, never T x T.

    Key block j matters to query block i when it is not after it and not before the document of i's first query; it
    needs no mask inside when it lies whole within the document of i's last query, before the diagonal.
    """
    from torch.nn.attention.flex_attention import BlockMask

    T = documents.positions.shape[1]
    index = torch.arange(T, device=documents.positions.device)
    document_start = index - documents.positions
    block = torch.arange(T // _FLEX_BLOCK, device=index.device)
    first_needed = document_start[:, ::_FLEX_BLOCK] // _FLEX_BLOCK
    last_start = document_start[:, _FLEX_BLOCK - 1 :: _FLEX_BLOCK]
    needed = (block >= first_needed[..., None]) & (block <= block[:, None])
    full = needed & (block < block[:, None]) & (block * _FLEX_BLOCK >= last_start[..., None])
    partial = needed & ~full

    def ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32)[:, None], indices.to(torch.int32)[:, None]

    def mask(b, h, q_index, kv_index):
        return (q_index >= kv_index) & (kv_index >= document_start[b, q_index])

    return BlockMask.from_kv_blocks(*ordered(partial), *ordered(full), BLOCK_SIZE=_FLEX_BLOCK, mask_mod=mask)


def _attend_cached(q: Tensor, cache: KeyValueCache) -> Tensor:
    """New queries against everything in `cache`, whose last `T` entries are their own tokens."""
    T, S = q.shape[2], cache.key.shape[2]
    outputs = []
    for start in range(0, T, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, T)
        keys = torch.arange(S - T + stop, device=q.device)
        queries = torch.arange(S - T + start, S - T + stop, device=q.device)
        mask = (keys <= queries[:, None]) & (keys >= cache.padding[:, None, None, None])
        k, v = cache.key[:, :, : len(keys)], cache.value[:, :, : len(keys)]
        outputs.append(F.scaled_dot_product_attention(q[:, :, start:stop], k, v, attn_mask=mask, enable_gqa=True))
    return torch.cat(outputs, dim=2)
