"""LFM: decoder of grouped-query attention, liquid layers in every n-th layer, and experts or a feed-forward network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from lfm.config import Depth, Tokens, Vocabulary, Width, default_kind
from lfm.kernels.grouped_linear import never_waits
from lfm.kernels.reservoir import RecurrenceStats, make_reservoir
from lfm.layers.attention import Attention, AttentionConfig, KeyValueCache
from lfm.layers.cost import Cost
from lfm.layers.diagonal_liquid import DiagonalConfig, DiagonalLiquid, initial_delta_bias
from lfm.layers.liquid import Liquid, ReservoirConfig
from lfm.layers.mlp import SwiGLU, SwiGLUConfig
from lfm.layers.moe import MoE, MoEConfig
from lfm.layers.norm import RMSNorm
from lfm.layers.parts import Parts
from lfm.layers.residual import ResidualStream
from lfm.layers.router import Balance, Routing
from lfm.models.decoder import Block, Context, Decoder, Memory, checkpointed, plain
from lfm.models.initialization import generator_of
from lfm.models.language_model import Recompute
from lfm.models.losses import Measured, Term, reservoir_measured, router_measured
from lfm.models.state import State
from lfm.models.unit_scale import UnitScaleConfig, initial_std

LiquidConfig = Annotated[
    Annotated[ReservoirConfig | DiagonalConfig, Field(discriminator="kind")], default_kind("reservoir")
]
FFNConfig = Annotated[Annotated[MoEConfig | SwiGLUConfig, Field(discriminator="kind")], default_kind("moe")]


class LFMConfig(UnitScaleConfig):
    recompute_choices: ClassVar[tuple[Recompute, ...]] = ("none", "selective", "full")
    changeable: ClassVar[frozenset[str]] = frozenset(
        {
            *("seq_length", "depth_rate", "attention.backend", "ffn.moe_capacity_factor", "ffn.moe_z_loss_coeff"),
            *("ffn.balance.kind", "ffn.balance.coeff", "ffn.balance.scope"),
            *("ffn.balance.update_rate", "ffn.balance.mean_decay"),
            *("liquid.backend", "liquid.chunk_length", "liquid.warmup", "liquid.tolerance"),
        }
    )
    moved: ClassVar[dict[str, str]] = {
        "moe_aux_loss_coeff": "ffn.balance.coeff",
        "moe_aux_loss_scope": "ffn.balance.scope",
    }
    kind: Literal["lfm"] = "lfm"
    """Model family."""
    hidden_size: Width
    num_layers: Depth
    seq_length: Tokens = 8192
    """Context in tokens: the length of a training row and the most that prompt and continuation may reach."""
    vocab_size: Vocabulary = 128_256
    vocab_size_multiple: Width = 1024
    """The embedding is stored with its rows padded to this multiple, so that every layout can split it."""
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    attention: AttentionConfig | None
    """null: no attention; tokens then meet in liquid layers alone."""
    liquid: LiquidConfig | None = ReservoirConfig()
    """null: no liquid layers."""
    ffn: FFNConfig

    @model_validator(mode="after")
    def _check(self) -> "LFMConfig":
        if self.attention is not None:
            self.attention.check(self.hidden_size)
        if self.attention is None and self.liquid is None:
            raise ValueError("attention and liquid are both null: nothing mixes tokens; give one of them")
        return self

    @property
    def lays_out(self) -> frozenset[str]:
        return frozenset({"data", "tensor", "pipeline"} | ({"expert"} if self.moe is not None else set()))

    def needs_host(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if self.moe is None or never_waits(device, dtype, self.hidden_size, self.moe.moe_ffn_hidden_size):
            return None
        return "experts take as many rows as tokens chose them, which only their bf16 kernels take from the device"

    @property
    def has_wide_parameters(self) -> bool:
        return isinstance(self.liquid, DiagonalConfig)

    def tensor_divides(self, *, experts_are_whole: bool = False) -> dict[str, int]:
        sizes = {}
        if self.attention is not None:
            sizes["attention.num_attention_heads"] = self.attention.num_attention_heads
            sizes["attention.num_query_groups"] = self.attention.num_query_groups
        sizes |= {"seq_length": self.seq_length, "padded_vocab_size": self.padded_vocab_size}
        if self.reservoir is not None:
            width = self.reservoir.num_reservoirs * self.reservoir.reservoir_size
            sizes["liquid.num_reservoirs x liquid.reservoir_size"] = width
        elif self.liquid is not None:
            sizes["hidden_size"] = self.hidden_size
        if isinstance(self.ffn, SwiGLUConfig):
            sizes["ffn.ffn_hidden_size"] = self.ffn.ffn_hidden_size
        elif not experts_are_whole:
            sizes["ffn.moe_ffn_hidden_size"] = self.ffn.moe_ffn_hidden_size
        return sizes

    def expert_divides(self) -> dict[str, int]:
        return {"ffn.num_moe_experts": self.moe.num_moe_experts} if self.moe is not None else {}

    @property
    def reservoir(self) -> ReservoirConfig | None:
        """Of the liquid layers, if they are reservoirs."""
        return self.liquid if isinstance(self.liquid, ReservoirConfig) else None

    @property
    def moe(self) -> MoEConfig | None:
        return self.ffn if isinstance(self.ffn, MoEConfig) else None

    @property
    def head_size(self) -> int:
        """Of attention, which there must be."""
        assert self.attention is not None
        return self.hidden_size // self.attention.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_size_multiple) * self.vocab_size_multiple

    @property
    def num_parts(self) -> int:
        attends = 1 if self.attention is not None else 0
        return (1 + attends) * self.num_layers + len(self.liquid_layers)

    @property
    def context_limit(self) -> int | None:
        return self.seq_length if self.attention is not None else None

    @property
    def reservoir_layers(self) -> tuple[int, ...]:
        return self.liquid_layers if self.reservoir is not None else ()

    @property
    def reservoir_warmup(self) -> int:
        return self.reservoir.warmup if self.reservoir is not None else 0

    @property
    def terms(self) -> tuple[Term, ...]:
        if self.moe is None:
            return ()
        return (
            Term("balance_loss", "row", self.moe.balance.coeff),
            Term("z_loss", "row", self.moe.moe_z_loss_coeff),
        )

    @property
    def measured(self) -> tuple[Measured, ...]:
        reservoirs = reservoir_measured(self.reservoir_layers)
        if self.moe is None:
            return reservoirs
        return (*router_measured(tuple(range(self.num_layers)), self.moe), *reservoirs)

    @property
    def liquid_layers(self) -> tuple[int, ...]:
        return tuple(range(0, self.num_layers, self.liquid.interval)) if self.liquid else ()

    def layer_cost(self, layer: int, attended: float | None = None) -> Cost:
        D = self.hidden_size
        norm = Cost(replicated=D)
        cost = norm + self.ffn.cost(D)
        if self.attention is not None:
            cost += norm + self.attention.cost(D, (self.seq_length + 1) / 2 if attended is None else attended)
        if self.liquid is not None and layer in self.liquid_layers:
            cost += norm + self.liquid.cost(D)
        return cost


@dataclass
class LFMState(State):
    """What streaming carries: `position [B]` tokens seen and a key/value cache a layer, where there is attention, and
    the state of each liquid layer, `[B, R, N]` of reservoirs, `[B, D]` of the diagonal kind.
    """

    position: Int[Tensor, " B"] | None
    caches: list[KeyValueCache]
    liquid: dict[int, Tensor]

    @classmethod
    def stack(cls, states: Sequence[Any]) -> "LFMState":
        """One batch from several states, prefixes of different lengths allowed."""
        return cls(
            torch.cat([state.position for state in states]) if states[0].position is not None else None,
            [KeyValueCache.stack(list(caches)) for caches in zip(*(state.caches for state in states), strict=True)],
            {layer: torch.cat([state.liquid[layer] for state in states]) for layer in states[0].liquid},
        )


class LFMBlock(Block):
    """`x += Attention; x += Liquid (every n-th layer); x += MoE or SwiGLU`; it carries keys and values, and the liquid
    layer's state.
    """

    def __init__(self, config: LFMConfig, layer: int, parts: Parts) -> None:
        super().__init__()
        c, norm = config, lambda: RMSNorm(config.hidden_size, eps=config.layernorm_epsilon, parts=parts)
        self.attends = c.attention is not None
        if c.attention is not None:
            self.attention_norm = norm()
            self.attention = Attention(c.hidden_size, c.attention, parts)
        self.has_liquid, self.post_norm = layer in c.liquid_layers, False
        if self.has_liquid:
            self.liquid_norm = norm()
            if isinstance(c.liquid, DiagonalConfig):
                self.liquid = DiagonalLiquid(c.hidden_size, delta_min=c.liquid.delta_min, parts=parts)
            elif c.liquid is not None:
                self.liquid = Liquid(c.hidden_size, c.liquid, parts)
                self.post_norm = c.liquid.norm == "post"
        self.routes = c.moe is not None
        if isinstance(c.ffn, MoEConfig):
            self.moe_norm = norm()
            self.moe = MoE(c.hidden_size, c.ffn, parts)
        else:
            self.mlp_norm = norm()
            self.mlp = SwiGLU(c.hidden_size, c.ffn, parts)

    def forward(
        self, stream: ResidualStream, context: Context, memory: Memory, stats: RecurrenceStats | None
    ) -> tuple[ResidualStream, Memory, Routing | None]:
        # Selective recompute: the two parts whose activations are large and cheap to make again.
        part = checkpointed if context.recompute == "selective" else plain
        cache, liquid = memory if memory is not None else (None, None)
        if self.attends:
            stream, u = stream.normed(self.attention_norm)
            y, cache = self.attention(
                u, rotary=context.rotary, documents=context.documents, cache=cache, keep_cache=context.streaming
            )
            stream = stream.plus(y)
        if self.has_liquid:
            stream, liquid = part(self._liquid, stream, liquid, context, stats)
        stream, routing = part(self._moe if self.routes else self._mlp, stream)
        return stream, (cache, liquid), routing

    def _liquid(
        self, stream: ResidualStream, state: Tensor | None, context: Context, stats: RecurrenceStats | None
    ) -> tuple[ResidualStream, Tensor]:
        if isinstance(self.liquid, DiagonalLiquid):
            stream, u = stream.normed(self.liquid_norm)
            y, final = self.liquid(u, state=state, starts=context.starts)
            return stream.plus(y), final
        options = {"state": state, "starts": context.starts, "stats": stats, "exact": context.streaming}
        if self.post_norm:
            x = stream.summed()
            y, final = self.liquid(x, **options)
            return ResidualStream(self.liquid_norm.add_norm(x, y)[1]), final
        stream, u = stream.normed(self.liquid_norm)
        y, final = self.liquid(u, **options)
        return stream.plus(y), final

    def _moe(self, stream: ResidualStream) -> tuple[ResidualStream, Routing]:
        stream, u = stream.normed(self.moe_norm)
        output, routing = self.moe(u)
        return stream.plus(output), routing

    def _mlp(self, stream: ResidualStream) -> tuple[ResidualStream, None]:
        stream, u = stream.normed(self.mlp_norm)
        return stream.plus(self.mlp(u)), None


class LFM(Decoder):
    """Pre-norm decoder of attention, liquid layers in every n-th layer and experts; positions by rotation."""

    config: LFMConfig

    @property
    def attends(self) -> bool:
        return self.config.attention is not None

    @property
    def liquids(self) -> dict[int, Liquid]:
        here = {int(name): cast(Any, block) for name, block in self.layers.items()}
        return {layer: block.liquid for layer, block in here.items() if layer in self.config.reservoir_layers}

    @property
    def balances(self) -> dict[int, Balance]:
        blocks = {int(name): cast(Any, block) for name, block in self.layers.items()}
        return {layer: block.moe.balance for layer, block in blocks.items()} if self.config.moe is not None else {}

    def make_block(self, layer: int) -> LFMBlock:
        return LFMBlock(self.config, layer, self.parts)

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, eps=self.config.layernorm_epsilon, parts=self.parts)

    def empty_state(self, batch: int) -> LFMState | None:
        """None with attention: an empty cache has no tensors."""
        return None if self.attends else cast(LFMState, super().empty_state(batch))

    def blank_state(self, batch: int, length: int) -> LFMState:
        c, dtype = self.config, torch.promote_types(self.embedding.weight.dtype, torch.float32)

        def shaped(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        state = (batch, c.hidden_size)
        if c.reservoir is not None:
            state = (batch, c.reservoir.num_reservoirs, c.reservoir.reservoir_size)
        liquid = {layer: shaped(*state) for layer in c.liquid_layers}
        if c.attention is None:
            return LFMState(None, [], liquid)
        key, counts = shaped(batch, c.attention.num_query_groups, length, c.head_size), shaped(batch).long()
        return LFMState(counts, [KeyValueCache(key, key, counts)] * c.num_layers, liquid)

    def memories(self, state: LFMState) -> dict[int, Memory]:
        caches = dict(enumerate(state.caches))
        return {layer: (caches.get(layer), state.liquid.get(layer)) for layer in range(self.config.num_layers)}

    def state(self, memories: Mapping[int, Memory], positions: Int[Tensor, "B T"] | None) -> LFMState:
        liquid = {layer: state for layer, (_, state) in memories.items() if state is not None}
        if positions is None:
            return LFMState(None, [], liquid)
        return LFMState(positions[:, -1] + 1, [cache for cache, _ in memories.values()], liquid)

    def initial_tensor(self, name: str, shape: Sequence[int], seed: int) -> Tensor:
        return initial_tensor(name, shape, self.config, seed)


def initial_tensor(name: str, shape: Sequence[int], config: LFMConfig, seed: int) -> Tensor:
    """The whole initial value of the tensor with this global name, fp32 on the CPU, from (seed, name) alone.

    | tensor | distribution |
    | --- | --- |
    | gains | 1 |
    | biases | 0 |
    | bias of delta (diagonal) | half-lives at z = 0 log-spaced from 1 to 4096 tokens over the channels |
    | reservoirs | sparse normal, scaled to the spectral radius |
    | liquid input | N(0, 1 / sqrt(hidden_size)): a drive of RMS about 1 |
    | every other matrix, embedding | normal, of `initial_std` |
    """
    if name.endswith("norm.weight"):
        return torch.ones(*shape)
    if isinstance(config.liquid, DiagonalConfig) and name.endswith("liquid.delta.bias"):
        return initial_delta_bias(shape[0], config.liquid.delta_min)
    if name.endswith(".bias"):
        return torch.zeros(*shape)
    # A reservoir and the mask of its connections are one draw.
    draw = name.replace(".connections", ".weight")
    generator = generator_of(seed, draw)
    if ".reservoirs." in name:
        c = config.reservoir
        assert c is not None
        weight = make_reservoir(c.reservoir_size, c.connectivity, c.spectral_radius, generator)
        return (weight != 0) if name.endswith(".connections") else weight.float()
    # The drive of a reservoir has an RMS of about 1 however the model begins.
    std = config.hidden_size**-0.5 if name.endswith("liquid.input.weight") else initial_std(name, shape, config)
    return torch.empty(*shape).normal_(0, std, generator=generator)
