"""LFM: decoder of grouped-query attention, liquid reservoirs in every n-th layer and a mixture of experts in each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from lfm.config import Depth, Tokens, Vocabulary, Width
from lfm.kernels.reservoir import RecurrenceStats, make_reservoir
from lfm.layers.attention import Attention, Backend, KeyValueCache, check_heads
from lfm.layers.liquid import Liquid, LiquidConfig
from lfm.layers.moe import MoE
from lfm.layers.norm import RMSNorm
from lfm.layers.parts import Parts
from lfm.layers.residual import ResidualStream
from lfm.layers.router import Routing
from lfm.models.decoder import Block, Context, Decoder, Memory, checkpointed, plain
from lfm.models.initialization import generator_of
from lfm.models.language_model import FamilyConfig, ParameterCounts, Recompute
from lfm.models.losses import Measured, Term, reservoir_measured
from lfm.models.state import State


class LFMConfig(FamilyConfig):
    recompute_choices: ClassVar[tuple[Recompute, ...]] = ("none", "selective", "full")
    changeable: ClassVar[frozenset[str]] = frozenset(
        {
            *("seq_length", "attention_backend", "moe_capacity_factor", "moe_aux_loss_coeff", "moe_aux_loss_scope"),
            *("moe_z_loss_coeff", "liquid.backend", "liquid.chunk_length", "liquid.warmup", "liquid.tolerance"),
        }
    )
    lays_out: ClassVar[frozenset[str]] = frozenset({"data", "tensor", "pipeline", "expert"})
    kind: Literal["lfm"] = "lfm"
    """Model family."""
    hidden_size: Width
    num_layers: Depth
    num_attention_heads: Width
    num_query_groups: Width
    """Key/value heads."""
    seq_length: Tokens = 8192
    """Context in tokens: the length of a training row and the most that prompt and continuation may reach."""
    vocab_size: Vocabulary = 128_256
    vocab_size_multiple: Width = 1024
    """The embedding is stored with its rows padded to this multiple, so that every layout can split it."""
    untie_embeddings_and_output_weights: bool = False
    rotary_base: float = Field(default=10_000.0, gt=1)
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    init_method_std: float = Field(default=0.02, gt=0)
    attention_backend: Backend = "auto"
    """auto: the fastest one for the rows at hand.  flash: the package flash-attn 4, else flash-attn 2.  flex applies on
    a GPU to rows that 128 divides, elsewhere it means sdpa.  reference is dense, for tests."""
    num_moe_experts: Width = 8
    moe_router_topk: Width = 2
    moe_ffn_hidden_size: Width
    """Width of one expert."""
    moe_capacity_factor: float | None = Field(default=None, gt=0, le=1 << 20)
    """null: dropless; else an expert takes at most ceil(factor * topk * seq_length / experts) tokens of a row."""
    moe_aux_loss_coeff: float = Field(default=0.01, ge=0)
    moe_aux_loss_scope: Literal["sequence", "batch"] = "sequence"
    """batch: over the micro-batch, which makes the loss depend on the layout."""
    moe_z_loss_coeff: float = Field(default=1e-3, ge=0)
    liquid: LiquidConfig | None = LiquidConfig()
    """null: no liquid layers."""

    @model_validator(mode="after")
    def _check(self) -> "LFMConfig":
        check_heads(self.hidden_size, self.num_attention_heads, self.num_query_groups)
        if self.liquid is not None and self.liquid.norm == "post" and self.liquid.input_scaling != 1.0:
            raise ValueError(f"liquid.input_scaling={self.liquid.input_scaling} needs liquid.norm=pre; post has none")
        if self.moe_router_topk > self.num_moe_experts:
            raise ValueError(
                f"moe_router_topk={self.moe_router_topk} is more than num_moe_experts={self.num_moe_experts}"
            )
        return self

    def tensor_divides(self, *, experts_are_whole: bool = False) -> dict[str, int]:
        sizes = {key: getattr(self, key) for key in ("num_attention_heads", "num_query_groups", "seq_length")}
        sizes["padded_vocab_size"] = self.padded_vocab_size
        if self.liquid is not None:
            width = self.liquid.num_reservoirs * self.liquid.reservoir_size
            sizes["liquid.num_reservoirs x liquid.reservoir_size"] = width
        return sizes if experts_are_whole else sizes | {"moe_ffn_hidden_size": self.moe_ffn_hidden_size}

    def expert_divides(self) -> dict[str, int]:
        return {"num_moe_experts": self.num_moe_experts}

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_size_multiple) * self.vocab_size_multiple

    @property
    def is_tied(self) -> bool:
        return not self.untie_embeddings_and_output_weights

    @property
    def context_limit(self) -> int:
        return self.seq_length

    @property
    def reservoir_layers(self) -> tuple[int, ...]:
        return self.liquid_layers

    @property
    def reservoir_warmup(self) -> int:
        return self.liquid.warmup if self.liquid else 0

    @property
    def terms(self) -> tuple[Term, ...]:
        return (
            Term("balance_loss", "row", self.moe_aux_loss_coeff),
            Term("z_loss", "row", self.moe_z_loss_coeff),
        )

    @property
    def measured(self) -> tuple[Measured, ...]:
        load = Measured("expert_load", "sum", tuple(range(self.num_layers)), width=self.num_moe_experts)
        return (load, *reservoir_measured(self.liquid_layers))

    @property
    def liquid_layers(self) -> tuple[int, ...]:
        return tuple(range(0, self.num_layers, self.liquid.interval)) if self.liquid else ()

    def layer_parameters(self, layer: int) -> "LayerParameters":
        D = self.hidden_size
        sharded = 2 * D * D + 2 * D * self.num_query_groups * self.head_size
        replicated = self.num_moe_experts * D + 2 * D
        reservoirs = 0
        if self.liquid is not None and layer in self.liquid_layers:
            width = self.liquid.num_reservoirs * self.liquid.reservoir_size
            sharded += 2 * width * D + width
            replicated += 2 * D
            reservoirs = width * self.liquid.reservoir_size
        trained = self.liquid is not None and self.liquid.train_reservoir
        return LayerParameters(
            sharded=sharded,
            experts=self.num_moe_experts * 3 * D * self.moe_ffn_hidden_size,
            replicated=replicated + (reservoirs if trained else 0),
            frozen=0 if trained else reservoirs,
        )

    def count_parameters(self) -> "ParameterCounts":
        """Exact counts of the unpadded model; tied tensors once."""
        D, E = self.hidden_size, self.num_moe_experts
        embedding = self.vocab_size * D
        head = embedding if self.untie_embeddings_and_output_weights else 0
        layers = [self.layer_parameters(layer) for layer in range(self.num_layers)]
        trainable = embedding + head + sum(layer.trainable for layer in layers) + D
        frozen = sum(layer.frozen for layer in layers)
        active = trainable - sum(layer.experts for layer in layers) // E * (E - self.moe_router_topk)
        return ParameterCounts(
            total=trainable + frozen,
            trainable=trainable,
            frozen=frozen,
            active=active,
            active_non_embedding=active - embedding - head,
            padding=(self.padded_vocab_size - self.vocab_size) * D * (2 if head else 1),
        )

    def layer_flops(self, layer: int, attended: float | None = None) -> float:
        """The part of `flops_per_token` that one layer takes."""
        D = self.hidden_size
        attended = (self.seq_length + 1) / 2 if attended is None else attended
        projections = 2 * (2 * D * D + 2 * D * self.num_query_groups * self.head_size)
        forward = projections + 4 * D * attended + self.moe_router_topk * 6 * D * self.moe_ffn_hidden_size
        forward += 2 * D * self.num_moe_experts
        if self.liquid is None or layer not in self.liquid_layers:
            return 3 * forward
        width = self.liquid.num_reservoirs * self.liquid.reservoir_size
        recurrence = 2 * width * self.liquid.reservoir_size
        return 3 * (forward + 4 * width * D + recurrence) - (0 if self.liquid.train_reservoir else recurrence)

    def flops_per_token(self, attended: float | None = None) -> float:
        """Useful FLOPs of forward and backward per token, 2 per multiply-add.

        `attended` is the mean number of keys a query attends; by default the causal mean (seq_length + 1) / 2 of rows
        that are one document.  Recomputation is not counted; frozen reservoirs need no weight gradient.
        """
        return sum(self.layer_flops(layer, attended) for layer in range(self.num_layers)) + self.head_flops


@dataclass(frozen=True)
class LayerParameters:
    """Counts of one layer by what a parallel layout does with them."""

    sharded: int
    """Cut by tensor parallelism: attention and the liquid layer's projections."""
    experts: int
    """Cut by expert parallelism, or without it by tensor parallelism."""
    replicated: int
    """Whole on every tensor rank: gains, router, output bias, trained reservoirs."""
    frozen: int
    """Reservoirs that are not trained, fp32, whole on every tensor rank."""

    @property
    def trainable(self) -> int:
        return self.sharded + self.experts + self.replicated


@dataclass
class LFMState(State):
    """What streaming carries: `position [B]` tokens seen, a key/value cache a layer, `[B, R, N]` a liquid layer."""

    position: Int[Tensor, " B"]
    caches: list[KeyValueCache]
    liquid: dict[int, Tensor]

    @classmethod
    def stack(cls, states: Sequence[Any]) -> "LFMState":
        """One batch from several states, prefixes of different lengths allowed."""
        return cls(
            torch.cat([state.position for state in states]),
            [KeyValueCache.stack(list(caches)) for caches in zip(*(state.caches for state in states), strict=True)],
            {layer: torch.cat([state.liquid[layer] for state in states]) for layer in states[0].liquid},
        )


class LFMBlock(Block):
    """`x += Attention; x += Liquid (every n-th layer); x += MoE`; it carries keys and values, and its reservoirs."""

    def __init__(self, config: LFMConfig, layer: int, parts: Parts) -> None:
        super().__init__()
        c, norm = config, lambda: RMSNorm(config.hidden_size, eps=config.layernorm_epsilon, parts=parts)
        self.attention_norm = norm()
        self.attention = Attention(
            c.hidden_size,
            num_attention_heads=c.num_attention_heads,
            num_query_groups=c.num_query_groups,
            backend=c.attention_backend,
            parts=parts,
        )
        self.has_liquid = layer in c.liquid_layers
        if c.liquid is not None and self.has_liquid:
            self.liquid_norm = norm()
            self.liquid = Liquid(c.hidden_size, c.liquid, parts)
            self.post_norm = c.liquid.norm == "post"
        self.moe_norm = norm()
        self.moe = MoE(
            c.hidden_size,
            num_experts=c.num_moe_experts,
            top_k=c.moe_router_topk,
            ffn_hidden_size=c.moe_ffn_hidden_size,
            capacity_factor=c.moe_capacity_factor,
            balance_over=c.moe_aux_loss_scope,
            parts=parts,
        )

    def forward(
        self, stream: ResidualStream, context: Context, memory: Memory, stats: RecurrenceStats | None
    ) -> tuple[ResidualStream, Memory, Routing]:
        # Selective recompute: the two parts whose activations are large and cheap to make again.
        part = checkpointed if context.recompute == "selective" else plain
        cache, reservoirs = memory if memory is not None else (None, None)
        stream, u = stream.normed(self.attention_norm)
        y, cache = self.attention(
            u, rotary=context.rotary, documents=context.documents, cache=cache, keep_cache=context.streaming
        )
        stream = stream.plus(y)
        if self.has_liquid:
            stream, reservoirs = part(self._liquid, stream, reservoirs, context, stats)
        stream, routing = part(self._moe, stream)
        return stream, (cache, reservoirs), routing

    def _liquid(
        self, stream: ResidualStream, state: Tensor | None, context: Context, stats: RecurrenceStats | None
    ) -> tuple[ResidualStream, Tensor]:
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


class LFM(Decoder):
    """Pre-norm decoder of attention, liquid reservoirs in every n-th layer and experts; positions by rotation."""

    config: LFMConfig
    attends = True

    @property
    def liquids(self) -> dict[int, Liquid]:
        here = {int(name): cast(Any, block) for name, block in self.layers.items()}
        return {layer: block.liquid for layer, block in here.items() if layer in self.config.liquid_layers}

    def make_block(self, layer: int) -> LFMBlock:
        return LFMBlock(self.config, layer, self.parts)

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, eps=self.config.layernorm_epsilon, parts=self.parts)

    def empty_state(self, batch: int) -> None:
        """An empty cache has no tensors."""
        return None

    def blank_state(self, batch: int, length: int) -> LFMState:
        c = self.config

        def shaped(*shape: int) -> Tensor:
            return torch.empty(*shape, device="meta")

        key, counts = shaped(batch, c.num_query_groups, length, c.head_size), shaped(batch).long()
        cache = KeyValueCache(key, key, counts)
        reservoirs = (batch, c.liquid.num_reservoirs, c.liquid.reservoir_size) if c.liquid is not None else ()
        liquid = {layer: shaped(*reservoirs) for layer in c.liquid_layers}
        return LFMState(counts, [cache] * c.num_layers, liquid)

    def memories(self, state: LFMState) -> dict[int, Memory]:
        return {layer: (cache, state.liquid.get(layer)) for layer, cache in enumerate(state.caches)}

    def state(self, memories: Mapping[int, Memory], positions: Int[Tensor, "B T"] | None) -> LFMState:
        assert positions is not None
        liquid = {layer: reservoirs for layer, (_, reservoirs) in memories.items() if reservoirs is not None}
        return LFMState(positions[:, -1] + 1, [cache for cache, _ in memories.values()], liquid)

    def initial_tensor(self, name: str, shape: Sequence[int], seed: int) -> Tensor:
        return initial_tensor(name, shape, self.config, seed)


def initial_tensor(name: str, shape: Sequence[int], config: LFMConfig, seed: int) -> Tensor:
    """The whole initial value of the tensor with this global name, fp32 on the CPU, from (seed, name) alone.

    | tensor | distribution |
    | --- | --- |
    | gains | 1 |
    | biases | 0 |
    | attention o, expert down, liquid output | N(0, init_method_std / sqrt(2 num_layers)) |
    | liquid input | N(0, 1 / sqrt(hidden_size)): a drive of RMS about 1 |
    | reservoirs | sparse normal, scaled to the spectral radius |
    | every other matrix, embedding | N(0, init_method_std) |
    """
    if name.endswith("norm.weight"):
        return torch.ones(*shape)
    if name.endswith(".bias"):
        return torch.zeros(*shape)
    # A reservoir and the mask of its connections are one draw.
    draw = name.replace(".connections", ".weight")
    generator = generator_of(seed, draw)
    if ".reservoirs." in name:
        assert config.liquid is not None
        radius = config.liquid.spectral_radius
        weight = make_reservoir(config.liquid.reservoir_size, config.liquid.connectivity, radius, generator)
        return (weight != 0) if name.endswith(".connections") else weight.float()
    std = config.init_method_std
    if name.endswith(("attention.o.weight", "down.weight", "liquid.output.weight")):
        std /= (2 * config.num_layers) ** 0.5
    elif name.endswith("liquid.input.weight"):
        std = config.hidden_size**-0.5
    return torch.empty(*shape).normal_(0, std, generator=generator)
