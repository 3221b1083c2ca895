"""Transformer: plain pre-norm decoder of grouped-query attention and SwiGLU, the control of the recurrent families."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from lfm.config import Depth, Tokens, Vocabulary, Width
from lfm.kernels.reservoir import RecurrenceStats
from lfm.layers.attention import Attention, AttentionConfig, KeyValueCache
from lfm.layers.cost import Cost
from lfm.layers.mlp import SwiGLU, SwiGLUConfig
from lfm.layers.norm import RMSNorm
from lfm.layers.parts import Parts
from lfm.layers.residual import ResidualStream
from lfm.models.decoder import Block, Context, Decoder, Memory
from lfm.models.initialization import generator_of
from lfm.models.language_model import Recompute
from lfm.models.state import State
from lfm.models.unit_scale import UnitScaleConfig, initial_std


class TransformerConfig(UnitScaleConfig):
    recompute_choices: ClassVar[tuple[Recompute, ...]] = ("none", "full")
    changeable: ClassVar[frozenset[str]] = frozenset({"seq_length", "depth_rate", "attention.backend"})
    kind: Literal["transformer"] = "transformer"
    """Model family."""
    hidden_size: Width = 384
    num_layers: Depth = 6
    attention: AttentionConfig = AttentionConfig(num_attention_heads=6, num_query_groups=6)
    ffn: SwiGLUConfig = SwiGLUConfig(ffn_hidden_size=1024)
    seq_length: Tokens = 512
    """Context in tokens: the length of a training row and the most that prompt and continuation may reach."""
    vocab_size: Vocabulary = 50_257
    vocab_size_multiple: Width = 256
    """The embedding is stored with its rows padded to this multiple."""
    layernorm_epsilon: float = Field(default=1e-6, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "TransformerConfig":
        self.attention.check(self.hidden_size)
        return self

    @property
    def lays_out(self) -> frozenset[str]:
        return frozenset({"data", "tensor", "pipeline"})

    def tensor_divides(self, *, experts_are_whole: bool = False) -> dict[str, int]:
        return {
            "attention.num_attention_heads": self.attention.num_attention_heads,
            "attention.num_query_groups": self.attention.num_query_groups,
            "seq_length": self.seq_length,
            "padded_vocab_size": self.padded_vocab_size,
            "ffn.ffn_hidden_size": self.ffn.ffn_hidden_size,
        }

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.attention.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_size_multiple) * self.vocab_size_multiple

    @property
    def context_limit(self) -> int:
        return self.seq_length

    def layer_cost(self, layer: int, attended: float | None = None) -> Cost:
        D, attended = self.hidden_size, (self.seq_length + 1) / 2 if attended is None else attended
        return self.attention.cost(D, attended) + self.ffn.cost(D) + Cost(replicated=2 * D)


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


class TransformerBlock(Block):
    """`x += attention(norm(x)); x += mlp(norm(x))`; it carries its keys and values."""

    def __init__(self, config: TransformerConfig, parts: Parts) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.layernorm_epsilon, parts=parts)
        self.attention = Attention(config.hidden_size, config.attention, parts)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.layernorm_epsilon, parts=parts)
        self.mlp = SwiGLU(config.hidden_size, config.ffn, parts)

    def forward(
        self, stream: ResidualStream, context: Context, memory: Memory, stats: RecurrenceStats | None
    ) -> tuple[ResidualStream, Memory, None]:
        stream, u = stream.normed(self.attention_norm)
        y, cache = self.attention(
            u, rotary=context.rotary, documents=context.documents, cache=memory, keep_cache=context.streaming
        )
        stream, u = stream.plus(y).normed(self.mlp_norm)
        return stream.plus(self.mlp(u)), cache, None


class Transformer(Decoder):
    """Blocks over an embedding, which may be the output projection too; positions by rotation."""

    config: TransformerConfig

    @property
    def attends(self) -> bool:
        return True

    def make_block(self, layer: int) -> TransformerBlock:
        return TransformerBlock(self.config, self.parts)

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, eps=self.config.layernorm_epsilon, parts=self.parts)

    def empty_state(self, batch: int) -> TransformerState:
        return self.blank_state(batch, 0).map(
            lambda blank: torch.zeros_like(blank, device=self.embedding.weight.device)
        )

    def blank_state(self, batch: int, length: int) -> TransformerState:
        c, dtype = self.config, self.embedding.weight.dtype
        key = torch.empty(batch, c.attention.num_query_groups, length, c.head_size, dtype=dtype, device="meta")
        counts = torch.empty(batch, dtype=torch.int64, device="meta")
        return TransformerState(counts, [KeyValueCache(key, key, counts) for _ in range(c.num_layers)])

    def memories(self, state: TransformerState) -> dict[int, Memory]:
        return dict(enumerate(state.caches))

    def state(self, memories: Mapping[int, Memory], positions: Int[Tensor, "B T"] | None) -> TransformerState:
        assert positions is not None
        return TransformerState(positions[:, -1] + 1, list(memories.values()))

    def initial_tensor(self, name: str, shape: Sequence[int], seed: int) -> Tensor:
        """The whole initial value of the tensor with this global name, fp32, from (seed, name) alone.

        | tensor | distribution |
        | --- | --- |
        | gains | 1 |
        | matrices, embedding | normal, of `initial_std` |
        """
        if name.endswith("norm.weight"):
            return torch.ones(*shape)
        std = initial_std(name, shape, self.config)
        return torch.empty(*shape).normal_(0, std, generator=generator_of(seed, name))
