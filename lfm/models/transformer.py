"""Transformer: plain pre-norm decoder of grouped-query attention and SwiGLU, the control of the recurrent families."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lfm.config import Depth, Tokens, Vocabulary, Width
from lfm.layers.attention import Attention, Backend, KeyValueCache, check_heads
from lfm.layers.documents import Documents, Rows
from lfm.layers.head import Head, Hidden
from lfm.layers.mlp import SwiGLU
from lfm.layers.norm import RMSNorm
from lfm.layers.rotary import rotary_tables
from lfm.models.language_model import (
    FamilyConfig,
    LanguageModel,
    ParameterCounts,
    Recompute,
    State,
    generator_of,
)
from lfm.models.losses import Losses, Objective


class TransformerConfig(FamilyConfig):
    recompute_choices: ClassVar[tuple[Recompute, ...]] = ("none", "full")
    kind: Literal["transformer"] = "transformer"
    """Model family."""
    hidden_size: Width = 384
    num_layers: Depth = 6
    num_attention_heads: Width = 6
    num_query_groups: Width = 6
    """Key/value heads."""
    ffn_hidden_size: Width = 1024
    seq_length: Tokens = 512
    """Context in tokens: the length of a training row and the most that prompt and continuation may reach."""
    vocab_size: Vocabulary = 50_257
    vocab_size_multiple: Width = 256
    """The embedding is stored with its rows padded to this multiple."""
    rotary_base: float = Field(default=10_000.0, gt=1)
    layernorm_epsilon: float = Field(default=1e-6, gt=0)
    init_method_std: float = Field(default=0.02, gt=0)
    attention_backend: Backend = "auto"
    """auto: the fastest one for the rows at hand.  flash: the package flash-attn 4, else flash-attn 2.  flex applies on
    a GPU to rows that 128 divides, elsewhere it means sdpa.  reference is dense, for tests."""

    @model_validator(mode="after")
    def _check(self) -> "TransformerConfig":
        check_heads(self.hidden_size, self.num_attention_heads, self.num_query_groups)
        return self

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_size_multiple) * self.vocab_size_multiple

    @property
    def context_limit(self) -> int:
        return self.seq_length

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer's matrices."""
        D, groups = self.hidden_size, self.num_query_groups * self.head_size
        return 2 * D * D + 2 * D * groups + 3 * D * self.ffn_hidden_size

    def count_parameters(self) -> ParameterCounts:
        """Exact counts without the padded vocabulary rows."""
        D, embedding = self.hidden_size, self.vocab_size * self.hidden_size
        total = embedding + self.num_layers * (self.layer_matrices + 2 * D) + D
        return ParameterCounts(
            total=total,
            trainable=total,
            frozen=0,
            active=total,
            active_non_embedding=total - embedding,
            padding=(self.padded_vocab_size - self.vocab_size) * D,
        )

    def flops_per_token(self, attended: float | None = None) -> float:
        """Of the matrix products; `attended` is by default the causal mean (seq_length + 1) / 2 of whole rows."""
        D, attended = self.hidden_size, (self.seq_length + 1) / 2 if attended is None else attended
        return 6.0 * (self.num_layers * (self.layer_matrices + 2 * D * attended) + self.vocab_size * D)


@dataclass
class TransformerState(State):
    position: Int[Tensor, " B"]
    """Tokens seen."""
    caches: list[KeyValueCache]
    """By layer."""

    @classmethod
    def stack(cls, states: Sequence[Any]) -> "TransformerState":
        """One batch from several states, prefixes of different lengths allowed."""
        return cls(
            torch.cat([state.position for state in states]),
            [KeyValueCache.stack(list(caches)) for caches in zip(*(state.caches for state in states), strict=True)],
        )


class Block(nn.Module):
    """`x += attention(norm(x)); x += mlp(norm(x))`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = Attention(
            config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups,
            backend=config.attention_backend,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = SwiGLU(config.hidden_size, ffn_hidden_size=config.ffn_hidden_size)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        rotary: tuple[Tensor, Tensor],
        documents: Documents | None,
        cache: KeyValueCache | None,
        keep_cache: bool,
    ) -> tuple[Float[Tensor, "B T D"], KeyValueCache | None]:
        y, cache = self.attention(
            self.attention_norm(x), rotary=rotary, documents=documents, cache=cache, keep_cache=keep_cache
        )
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Transformer(LanguageModel):
    """Blocks over an embedding that is also the output projection; positions by rotation."""

    config: TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.head = Head(
            config.hidden_size,
            config.vocab_size,
            stored_rows=config.padded_vocab_size,
            tied_to=self.embedding,
        )

    def advance(
        self, ids: Int[Tensor, "B T"], state: State | None = None, documents: Documents | None = None
    ) -> tuple[Float[Tensor, "B T D"], TransformerState]:
        assert state is None or documents is None
        if state is None:
            before = None
            documents = documents or Documents.whole_rows(ids.shape[0], ids.shape[1], ids.device)
            positions = documents.positions
        else:
            before = state.caches if isinstance(state, TransformerState) else []
            state.check_like(self._blank_state(len(ids), before[0].key.shape[2] if before else 0, "meta"))
            assert isinstance(state, TransformerState)
            positions = state.position[:, None] + torch.arange(ids.shape[1], device=ids.device)
        hidden, caches = self._run(ids, positions, documents, before, keep_cache=True)
        return hidden, TransformerState(positions[:, -1] + 1, [cache for cache in caches if cache is not None])

    def empty_state(self, batch: int) -> TransformerState:
        return self._blank_state(batch, 0, self.embedding.weight.device)

    def loss_parts(self, rows: Rows, objective: Objective, *, recompute: Recompute = "none") -> Iterator[Losses]:
        documents = rows.documents
        hidden, _ = self._run(rows.ids, documents.positions, documents, None, keep_cache=False, recompute=recompute)
        yield Losses(objective.sums(Hidden(hidden), self.head, rows))

    def initial_tensor(self, name: str, shape: Sequence[int], seed: int) -> Tensor:
        """The whole initial value of the tensor with this global name, fp32, from (seed, name) alone.

        | tensor | distribution |
        | --- | --- |
        | gains | 1 |
        | attention o, mlp down | N(0, init_method_std / sqrt(2 num_layers)) |
        | every other matrix, embedding | N(0, init_method_std) |
        """
        if name.endswith("norm.weight"):
            return torch.ones(*shape)
        std = self.config.init_method_std
        if name.endswith(("attention.o.weight", "mlp.down.weight")):
            std /= (2 * self.config.num_layers) ** 0.5
        return torch.empty(*shape).normal_(0, std, generator=generator_of(seed, name))

    def _blank_state(self, batch: int, length: int, device: torch.device | str) -> TransformerState:
        """A state after `length` tokens, with zeros for what they left."""
        c = self.config

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        shape = (batch, c.num_query_groups, length, c.head_size)
        key, value = (zeros(*shape, dtype=self.embedding.weight.dtype) for _ in range(2))
        return TransformerState(zeros(batch), [KeyValueCache(key, value, zeros(batch)) for _ in range(c.num_layers)])

    def _run(
        self,
        ids: Tensor,
        positions: Tensor,
        documents: Documents | None,
        caches: list[KeyValueCache] | None,
        *,
        keep_cache: bool,
        recompute: Recompute = "none",
    ) -> tuple[Tensor, list[KeyValueCache | None]]:
        """Final hidden states, normalised, and the cache of each layer with these tokens in it."""
        x = self.embedding(ids)
        rotary = rotary_tables(
            positions,
            head_size=self.config.head_size,
            base=self.config.rotary_base,
            dtype=torch.promote_types(x.dtype, torch.float32),
        )
        new_caches = []
        for layer, block in enumerate(self.layers):
            options = {
                "rotary": rotary,
                "documents": documents,
                "cache": caches[layer] if caches is not None else None,
                "keep_cache": keep_cache,
            }
            if recompute == "full":
                # There is no dropout: nothing random happens inside, so the RNG state need not be kept.
                x, cache = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, **options)
            else:
                x, cache = block(x, **options)
            new_caches.append(cache)
        return self.final_norm(x), new_caches
