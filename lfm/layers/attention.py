"""Causal grouped-query attention with document masks that never become a dense T x T tensor."""

import functools
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from lfm.config import Config, Width
from lfm.errors import UserError
from lfm.kernels.backend import compute_capability
from lfm.kernels.rotary import rotated_heads
from lfm.layers.cost import Cost, matrices
from lfm.layers.documents import Documents
from lfm.layers.flash_attention import FLASH_ATTN_4, PACKAGES, FlashPackage, flash_attention, require_package
from lfm.layers.parts import PLAIN, Parts
from lfm.layers.stored import Stored

Backend = Literal["auto", "reference", "sdpa", "flex", "flash"]

# With a cache, queries go in blocks of this many, so that the mask is [block, keys] and never [T, T].
_QUERY_BLOCK = 512
_FLEX_BLOCK = 128
_QK_NORM_EPSILON = 1e-6


class AttentionConfig(Config):
    num_attention_heads: Width
    num_query_groups: Width
    """Key/value heads."""
    rotary_base: float = Field(default=10_000.0, gt=1)
    qk_norm: bool = False
    """Queries and keys of RMS 1 in each head, without a gain: no attention logit passes sqrt(head size)."""
    backend: Backend = "auto"
    """auto: the fastest one for the rows at hand.  flash: the package flash-attn 4, else flash-attn 2.  flex applies on
    a GPU to rows that 128 divides, elsewhere it means sdpa.  reference is dense, for tests."""

    def check(self, hidden_size: int) -> None:
        """Raise ValueError, naming the nearest legal value, for heads of no even size or groups that do not divide
        them."""
        h, n, groups = hidden_size, self.num_attention_heads, self.num_query_groups
        if h % n or h // n % 2:
            raise ValueError(
                f"hidden_size={h} over attention.num_attention_heads={n} is not an even head size; "
                f"the nearest hidden_size is {max(2 * n, round(h / (2 * n)) * 2 * n)}"
            )
        if n % groups:
            legal = [g for g in range(1, n + 1) if n % g == 0]
            raise ValueError(f"attention.num_query_groups={groups} does not divide {n} heads; choose from {legal}")

    def cost(self, hidden_size: int, attended: float) -> Cost:
        """`attended`: mean number of keys that a query sees."""
        D, products = hidden_size, 4 * hidden_size * attended
        keys_and_values = 2 * D * self.num_query_groups * (D // self.num_attention_heads)
        return matrices(sharded=2 * D * D + keys_and_values) + Cost(forward=products, backward=2 * products)


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


class SlotCache(KeyValueCache):
    """Keys and values in tensors that stay where they are, so that a step can be recorded: a token's are written into
    its row's first free slot.  `padding[b]` slots, here at the right, hold no token yet; none may be full.
    """

    def append(self, key: Tensor, value: Tensor) -> "SlotCache":
        """Of one token a row, in place."""
        assert key.shape[2] == 1
        length = self.key.shape[2]
        place = (length - self.padding).clamp(max=length - 1)[:, None, None, None].expand_as(key)
        self.key.scatter_(2, place, key)
        self.value.scatter_(2, place, value)
        return SlotCache(self.key, self.value, self.padding - 1)

    def attend(self, q: Float[Tensor, "B H 1 K"]) -> Float[Tensor, "B H 1 K"]:
        """Of the last token, against every slot that holds one; softmax in at least fp32."""
        B, H, _, K = q.shape
        G, S = self.key.shape[1:3]
        scores = q.view(B, G, H // G, K) @ self.key.transpose(-1, -2)
        free = torch.arange(S, device=q.device) >= (S - self.padding)[:, None]
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (scores.to(wide) * K**-0.5).masked_fill(free[:, None, None], -torch.inf)
        return (scores.softmax(-1).to(q.dtype) @ self.value).view(B, H, 1, K)


class Attention(nn.Module):
    """Query head i reads key/value head i // (H / K).  No biases.  Ainslie et al. 2023 (GQA, arXiv 2305.13245).

    Raises UserError for backend "flash" where no package of flash-attn is installed.
    """

    def __init__(self, hidden_size: int, config: AttentionConfig, parts: Parts = PLAIN) -> None:
        super().__init__()
        if config.backend == "flash":
            require_package()
        self.head_size = hidden_size // config.num_attention_heads
        width = config.num_query_groups * self.head_size
        widths = (hidden_size, width, width)
        self.widths = tuple(width // parts.tensor_size for width in widths)
        self.backend: Backend = config.backend
        self.qk_norm = config.qk_norm
        self.qkv = parts.column_linear(hidden_size, sum(widths))
        self.out = parts.row_linear(hidden_size, hidden_size)

    def stored(self) -> dict[str, Stored]:
        starts = [sum(self.widths[:i]) for i in range(4)]
        parts = {n: (slice(starts[i], starts[i + 1]),) for i, n in enumerate("qkv")}
        return {
            **{f"{n}.weight": Stored("qkv.weight", index, cut=0) for n, index in parts.items()},
            "o.weight": Stored("out.weight", cut=1),
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
        if self.qk_norm:  # a rotation keeps the norm: after it is as before
            q, k = _normalized(q), _normalized(k)
        if cache is None:
            y = attend(q, k, v, documents or Documents.whole_rows(B, T, x.device), backend=self.backend)
            new_cache = KeyValueCache(k, v, torch.zeros(B, dtype=torch.int64, device=x.device)) if keep_cache else None
        else:
            new_cache = cache.append(k, v)
            y = new_cache.attend(q) if isinstance(new_cache, SlotCache) else _attend_cached(q, new_cache)
        return self.out(y.transpose(1, 2).reshape(B, T, -1)), new_cache


def _normalized(heads: Float[Tensor, "B H T K"]) -> Float[Tensor, "B H T K"]:
    """Henry et al. 2020 (arXiv 2010.04245), with the RMS as the norm.  Memory stays in the order B, T, H, K."""
    x = heads.transpose(1, 2)
    return F.rms_norm(x, x.shape[-1:], eps=_QK_NORM_EPSILON).transpose(1, 2)


def choose_backend(
    device: torch.device, dtype: torch.dtype, num_positions: int, *, row_is_one_document: bool, flash_attn_4: bool
) -> Backend:
    """What "auto" means: the fastest path as measured on an H200 (benchmarks/results/attention.json, docs/kernels.md).

    On a GPU in half precision flash-attn 4, where it runs; else cuDNN's kernel for rows that are one document and
    flex_attention for packed ones.  flash-attn 2 is never chosen: torch's built-in copy of its kernel takes twice
    cuDNN's time.  On a CPU, in fp32, or where 128 does not divide a packed row, one SDPA call for each document.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    if flash_attn_4:
        return "flash"
    return "sdpa" if row_is_one_document or num_positions % _FLEX_BLOCK else "flex"


def attend(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T K"],
    documents: Documents,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "B H T K"]:
    """softmax(q k^T / sqrt(head_size)) v, causal, within each document; softmax in fp32.

    Before flash-attn first attends heads of a kind it is compared with the definition, which cannot be recorded in a
    CUDA graph.  Raises UserError where "flash" is asked for and no installed package serves these heads.
    """
    if backend == "auto":
        backend = choose_backend(
            q.device,
            q.dtype,
            q.shape[2],
            row_is_one_document=documents.row_is_one_document,
            flash_attn_4=_flash_obstacle(FLASH_ATTN_4, q, k) is None,
        )
    if backend == "flash":
        return flash_attention(q, k, v, documents, _flash_package(q, k))
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


def _flash_package(q: Tensor, k: Tensor) -> FlashPackage:
    """The first package that attends these heads; UserError says why none does."""
    obstacles = []
    for package in PACKAGES:
        obstacle = _flash_obstacle(package, q, k)
        if obstacle is None:
            return package
        obstacles.append(f"{package.name} {obstacle}")
    raise UserError(f"attention.backend=flash: {'; '.join(obstacles)}; choose attention.backend=auto")


def _flash_obstacle(package: FlashPackage, q: Tensor, k: Tensor) -> str | None:
    """Why `package` does not attend these heads, as words after its name; None: it does, and was seen to be right."""
    if not package.installed:
        return "is not installed"
    lack = package.lack(compute_capability(q.device), q.dtype, q.shape[3])
    return lack or _known_flash_failure(package, q.device, q.dtype, q.shape[3], q.shape[1] // k.shape[1])


@functools.cache
def _known_flash_failure(package: FlashPackage, device: torch.device, *kind) -> str | None:
    failure = flash_failure(package, device, *kind)
    if failure is not None:
        warnings.warn(
            f"attention: {package.name} {failure} on {torch.cuda.get_device_name(device)}; this process does without "
            "it, which is slower",
            RuntimeWarning,
            stacklevel=2,
        )
    return failure


def flash_failure(
    package: FlashPackage, device: torch.device, dtype: torch.dtype, head_size: int, heads_per_group: int
) -> str | None:
    """What is wrong with `package` next to the definition in float64, as words after its name.

    Seen on a row of three documents, laid out as `Attention` has them.  The package compiles for the head size and the
    heads of a group, so the real call finds that done.
    """
    lengths, G = [200, 1, 119], 2
    H, T = G * heads_per_group, sum(lengths)
    # A checkpoint around the first call counts what is saved inside it: these hooks keep this out of its sight.
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, T, H + 2 * G, head_size)
        qkv = torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
        weight = torch.randn((1, H, T, head_size), generator=generator, device=device).to(dtype)
        documents = Documents.from_lengths([lengths], device)

        def outputs_and_grads(x: Tensor, backend) -> dict[str, Tensor]:
            q, k, v = x.transpose(1, 2).split((H, G, G), dim=1)
            y = backend(q, k, v, documents)
            (grad,) = torch.autograd.grad(y, x, weight.to(y.dtype))
            return {"output": y.detach(), **dict(zip("qkv", grad.split((H, G, G), dim=2), strict=True))}

        want = outputs_and_grads(qkv.detach().double().requires_grad_(), _reference)
        try:
            got = outputs_and_grads(qkv, functools.partial(flash_attention, package=package))
        except Exception as error:
            return f"does not run ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    for name, right in want.items():
        error = float((got[name].double() - right).norm() / right.norm())
        bound = 5e-3 if name == "output" else 1e-2
        if not error < bound:
            return f"is off by {error:.1e} in {name if name == 'output' else f'the gradient of {name}'}"
    return None


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
