"""LiquidNet: attention-free decoder of diagonal liquid layers and SwiGLU, with a state of one vector a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from lfm.config import Depth, Tokens, Vocabulary, Width
from lfm.kernels.reservoir import RecurrenceStats
from lfm.layers.cost import Cost
from lfm.layers.diagonal_liquid import DiagonalLiquid, check_delta_min, diagonal_cost, initial_delta_bias
from lfm.layers.mlp import SwiGLU, SwiGLUConfig
from lfm.layers.norm import RMSNorm
from lfm.layers.parts import Parts
from lfm.layers.residual import ResidualStream
from lfm.models.decoder import Block, Context, Decoder, Memory
from lfm.models.initialization import generator_of
from lfm.models.language_model import FamilyConfig, Recompute
from lfm.models.state import State


class LiquidNetConfig(FamilyConfig):
    recompute_choices: ClassVar[tuple[Recompute, ...]] = ("none", "full")
    kind: Literal["liquidnet"] = "liquidnet"
    """Model family."""
    hidden_size: Width = 384
    num_layers: Depth = 6
    ffn: SwiGLUConfig = SwiGLUConfig(ffn_hidden_size=1024)
    seq_length: Tokens = 512
    """Tokens of a training row; the state carries over any length."""
    vocab_size: Vocabulary = 50_257
    vocab_size_multiple: Width = 256
    """The embedding is stored with its rows padded to this multiple; published sizes count them."""
    delta_min: float = Field(default=1e-5, ge=0)
    """Smallest decay rate: no channel's half-life exceeds ln 2 / delta_min tokens."""
    layernorm_epsilon: float = Field(default=1e-6, gt=0)
    init_method_std: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "LiquidNetConfig":
        check_delta_min(self.delta_min)
        return self

    @property
    def lays_out(self) -> frozenset[str]:
        return frozenset({"data", "tensor", "pipeline"})

    @property
    def has_wide_parameters(self) -> bool:
        return True

    def tensor_divides(self, *, experts_are_whole: bool = False) -> dict[str, int]:
        sizes = {key: getattr(self, key) for key in ("hidden_size", "seq_length", "padded_vocab_size")}
        return sizes | {"ffn.ffn_hidden_size": self.ffn.ffn_hidden_size}

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_size_multiple) * self.vocab_size_multiple

    @property
    def counts_padding(self) -> bool:
        return True

    def layer_cost(self, layer: int, attended: float | None = None) -> Cost:
        D = self.hidden_size
        return diagonal_cost(D) + self.ffn.cost(D) + Cost(replicated=2 * D)


@dataclass
class LiquidNetState(State):
    hidden: list[Float[Tensor, "B D"]]
    """By layer, at least fp32."""


class LiquidNetBlock(Block):
    """`x += c liquid(norm(x)); x += c mlp(norm(x))` with c = 1 / sqrt(2 num_layers)."""

    def __init__(self, config: LiquidNetConfig, parts: Parts) -> None:
        super().__init__()
        self.residual_scale = (2 * config.num_layers) ** -0.5
        self.liquid_norm = RMSNorm(config.hidden_size, eps=config.layernorm_epsilon, parts=parts)
        self.liquid = DiagonalLiquid(config.hidden_size, delta_min=config.delta_min, parts=parts)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.layernorm_epsilon, parts=parts)
        self.mlp = SwiGLU(config.hidden_size, config.ffn, parts)

    def forward(
        self, stream: ResidualStream, context: Context, memory: Memory, stats: RecurrenceStats | None
    ) -> tuple[ResidualStream, Memory, None]:
        stream, z = stream.normed(self.liquid_norm)
        y, final = self.liquid(z, state=memory, starts=context.starts, scale=self.residual_scale)
        stream, z = stream.plus(y).normed(self.mlp_norm)
        return stream.plus(self.mlp(z, scale=self.residual_scale)), final, None


class LiquidNet(Decoder):
    """Blocks over an embedding that is also the output projection; no positions, no dropout."""

    config: LiquidNetConfig

    def make_block(self, layer: int) -> LiquidNetBlock:
        return LiquidNetBlock(self.config, self.parts)

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, eps=self.config.layernorm_epsilon, parts=self.parts)

    def empty_state(self, batch: int) -> LiquidNetState:
        return self.blank_state(batch, 0).map(
            lambda blank: torch.zeros_like(blank, device=self.embedding.weight.device)
        )

    def blank_state(self, batch: int, length: int) -> LiquidNetState:
        c, dtype = self.config, torch.promote_types(self.embedding.weight.dtype, torch.float32)
        blank = torch.empty(batch, c.hidden_size, dtype=dtype, device="meta")
        return LiquidNetState([blank] * c.num_layers)

    def memories(self, state: LiquidNetState) -> dict[int, Memory]:
        return dict(enumerate(state.hidden))

    def state(self, memories: Mapping[int, Memory], positions: Int[Tensor, "B T"] | None) -> LiquidNetState:
        return LiquidNetState(list(memories.values()))

    def initial_tensor(self, name: str, shape: Sequence[int], seed: int) -> Tensor:
        """The whole initial value of the tensor with this global name, at least fp32, from (seed, name) alone.

        | tensor | distribution |
        | --- | --- |
        | gains | 1 |
        | bias of delta | half-lives at z = 0 log-spaced from 1 to 4096 tokens over the channels |
        | liquid output, mlp down | 0: a fresh model is its embedding |
        | every other matrix, embedding | N(0, init_method_std) |
        """
        if name.endswith("norm.weight"):
            return torch.ones(*shape)
        if name.endswith("liquid.delta.bias"):
            return initial_delta_bias(shape[0], self.config.delta_min)
        if name.endswith(("liquid.output.weight", "mlp.down.weight")):
            return torch.zeros(*shape)
        return torch.empty(*shape).normal_(0, self.config.init_method_std, generator=generator_of(seed, name))
