"""LFM: decoder of grouped-query attention, liquid reservoirs in every n-th layer and a mixture of experts in each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lfm.config import Depth, Tokens, Vocabulary, Width
from lfm.kernels.reservoir import RecurrenceStats, make_reservoir
from lfm.layers.attention import Attention, Backend, KeyValueCache, check_heads
from lfm.layers.documents import Documents, Rows
from lfm.layers.head import Head, Hidden
from lfm.layers.liquid import Liquid, LiquidConfig
from lfm.layers.moe import MoE, Routing
from lfm.layers.norm import RMSNorm
from lfm.layers.parts import PLAIN, Parts
from lfm.layers.rotary import rotary_tables
from lfm.models.language_model import (
    FamilyConfig,
    LanguageModel,
    ParameterCounts,
    Recompute,
    State,
    generator_of,
)
from lfm.models.losses import (
    Losses,
    Measured,
    Measurements,
    Objective,
    Term,
    reservoir_measured,
    reservoir_measurements,
)


class LFMConfig(FamilyConfig):
    recompute_choices: ClassVar[tuple[Recompute, ...]] = ("none", "selective", "full")
    changeable: ClassVar[frozenset[str]] = frozenset(
        {
            *("seq_length", "attention_backend", "moe_capacity_factor", "moe_aux_loss_coeff", "moe_aux_loss_scope"),
            *("moe_z_loss_coeff", "liquid.backend", "liquid.chunk_length", "liquid.warmup", "liquid.tolerance"),
        }
    )
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

    @property
    def head_flops(self) -> float:
        """The part of `flops_per_token` that the output projection takes."""
        return 6.0 * self.vocab_size * self.hidden_size

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


@dataclass
class Diagnostics:
    """Auxiliary terms and measurements of one forward pass, by layer."""

    routing: dict[int, Routing]
    recurrence: dict[int, RecurrenceStats]

    def sums(self, num_layers: int) -> dict[str, Float[Tensor, ""]]:
        """Over rows, of the mean over all layers of the model: the summands of the layers that are here."""
        balance = torch.stack([routing.balance_loss for routing in self.routing.values()])
        z = torch.stack([routing.z_loss for routing in self.routing.values()])
        return {"balance_loss": balance.sum() / num_layers, "z_loss": z.sum() / num_layers}

    def measure(self) -> Measurements:
        load = {layer: routing.load for layer, routing in self.routing.items()}
        return {"expert_load": load, **reservoir_measurements(self.recurrence)}


class Block(nn.Module):
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
        self,
        x: Float[Tensor, "B T D"],
        pending: Float[Tensor, "B T D"] | None,
        *,
        rotary: tuple[Tensor, Tensor],
        documents: Documents | None,
        cache: KeyValueCache | None,
        liquid_state: Tensor | None,
        stats: RecurrenceStats | None,
        streaming: bool,
        recompute: Recompute,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"], KeyValueCache | None, Tensor | None, Routing]:
        """Takes and returns the residual stream as two summands, x and what the part before put out (None after the
        embedding): each part adds them in one pass with its norm.

        `streaming` keeps the cache and takes the exact recurrence, as what is read in pieces must."""
        # Selective recompute: the two parts whose activations are large and cheap to make again.
        part = _checkpointed if recompute == "selective" else _plain
        x, u = self.attention_norm.of_sum(x, pending)
        y, cache = self.attention(u, rotary=rotary, documents=documents, cache=cache, keep_cache=streaming)
        if self.has_liquid:
            starts = documents.starts if documents is not None else None
            x, y, liquid_state = part(self._liquid, x, y, liquid_state, starts, stats, streaming)
        x, y, routing = part(self._moe, x, y)
        return x, y, cache, liquid_state, routing

    def _liquid(
        self,
        x: Tensor,
        y: Tensor,
        state: Tensor | None,
        starts: Tensor | None,
        stats: RecurrenceStats | None,
        exact: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        if self.post_norm:
            x = x + y
            y, final = self.liquid(x, state=state, starts=starts, stats=stats, exact=exact)
            return self.liquid_norm.of_sum(x, y)[1], None, final
        x, u = self.liquid_norm.of_sum(x, y)
        y, final = self.liquid(u, state=state, starts=starts, stats=stats, exact=exact)
        return x, y, final

    def _moe(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Routing]:
        x, u = self.moe_norm.of_sum(x, y)
        output, routing = self.moe(u)
        return x, output, routing


def _plain(fn, *args, **kwargs):
    return fn(*args, **kwargs)


def _checkpointed(fn, *args, **kwargs):
    # There is no dropout: nothing random happens inside, so the RNG state need not be kept.
    return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class LFM(LanguageModel):
    """Pre-norm decoder: `x += Attention; x += Liquid (every n-th layer); x += MoE`; logits from the final norm.

    `layers` makes it a piece of the model: those layers alone, with the embedding if they begin at the first and the
    head if they end at the last.  Modules carry global layer numbers, so a piece's names are the whole model's.
    """

    def __init__(self, config: LFMConfig, *, parts: Parts = PLAIN, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        self.config, self.parts = config, parts
        layers = range(config.num_layers) if layers is None else layers
        self.is_first, self.is_last = layers[0] == 0, layers[-1] == config.num_layers - 1
        tied = not config.untie_embeddings_and_output_weights
        if self.is_first or (self.is_last and tied):
            self.embedding = parts.vocabulary_embedding(config.padded_vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(layer): Block(config, layer, parts) for layer in layers})
        if self.is_last:
            self.final_norm = RMSNorm(config.hidden_size, eps=config.layernorm_epsilon, parts=parts)
            self.head = Head(
                config.hidden_size,
                config.vocab_size,
                stored_rows=config.padded_vocab_size,
                tied_to=self.embedding if tied else None,
                parts=parts,
            )

    @property
    def liquids(self) -> dict[int, Liquid]:
        """Liquid layers by layer index."""
        return {
            int(layer): cast(Liquid, block.liquid)
            for layer, block in self.layers.items()
            if int(layer) in self.config.liquid_layers
        }

    def advance(
        self, ids: Int[Tensor, "B T"], state: State | None = None, documents: Documents | None = None
    ) -> tuple[Float[Tensor, "B T D"], LFMState]:
        if state is not None:
            caches = state.caches if isinstance(state, LFMState) else []
            state.check_like(self._state_of_shape(len(ids), caches[0].key.shape[2] if caches else 0))
            assert isinstance(state, LFMState)
        hidden, state, _ = self.hidden(ids, state=state, documents=documents, keep_state=True)
        assert state is not None
        return hidden, state

    def empty_state(self, batch: int) -> None:
        """An empty cache has no tensors."""
        return None

    def _state_of_shape(self, batch: int, length: int) -> LFMState:
        """A state after `length` tokens without its values."""
        c = self.config

        def shaped(*shape: int) -> Tensor:
            return torch.empty(*shape, device="meta")

        key, counts = shaped(batch, c.num_query_groups, length, c.head_size), shaped(batch).long()
        cache = KeyValueCache(key, key, counts)
        reservoirs = (batch, c.liquid.num_reservoirs, c.liquid.reservoir_size) if c.liquid is not None else ()
        liquid = {layer: shaped(*reservoirs) for layer in c.liquid_layers}
        return LFMState(counts, [cache] * c.num_layers, liquid)

    def loss_parts(self, rows: Rows, objective: Objective, *, recompute: Recompute = "none") -> Iterator[Losses]:
        x, _, found = self.run_layers(self.embedding(rows.ids), documents=rows.documents, recompute=recompute)
        yield Losses(self.objective_sums(x, rows, objective) | found.sums(self.config.num_layers), found.measure)

    def initial_tensor(self, name: str, shape: Sequence[int], seed: int) -> Tensor:
        return initial_tensor(name, shape, self.config, seed)

    def objective_sums(
        self, x: Float[Tensor, "B T D"], rows: Rows, objective: Objective
    ) -> dict[str, Float[Tensor, ""]]:
        """From the last layer's output."""
        return objective.sums(Hidden(self.final_norm(x), self.parts), self.head, rows)

    def hidden(
        self,
        ids: Int[Tensor, "B T"],
        *,
        state: LFMState | None = None,
        documents: Documents | None = None,
        keep_state: bool = False,
        recompute: Recompute = "none",
    ) -> tuple[Float[Tensor, "B T D"], LFMState | None, Diagnostics]:
        """Final normalised hidden states; `documents=None` without a state means one document a row."""
        if state is None:
            documents = documents or Documents.whole_rows(ids.shape[0], ids.shape[1], ids.device)
        x, state, found = self.run_layers(
            self.embedding(ids), state=state, documents=documents, keep_state=keep_state, recompute=recompute
        )
        return self.final_norm(x), state, found

    def run_layers(
        self,
        x: Float[Tensor, "B T D"],
        *,
        documents: Documents | None,
        state: LFMState | None = None,
        keep_state: bool = False,
        recompute: Recompute = "none",
    ) -> tuple[Float[Tensor, "B T D"], LFMState | None, Diagnostics]:
        """The layers that are here, after the prefix of `state`, or over whole rows of `documents`."""
        if state is not None:
            positions = state.position[:, None] + torch.arange(x.shape[1], device=x.device)
        else:
            assert documents is not None
            positions = documents.positions
        rotary = rotary_tables(
            positions,
            head_size=self.config.head_size,
            base=self.config.rotary_base,
            dtype=torch.promote_types(x.dtype, torch.float32),
        )
        found = Diagnostics({}, {layer: RecurrenceStats() for layer in self.liquids})
        caches: list[KeyValueCache | None] = []
        liquid: dict[int, Tensor] = {}
        run = _checkpointed if recompute == "full" else _plain
        pending: Tensor | None = None
        for layer, block in ((int(name), block) for name, block in self.layers.items()):
            if recompute == "full" and pending is not None:
                x, pending = x + pending, None  # one tensor to keep for the recomputation, not two
            x, pending, cache, liquid_state, routing = run(
                block,
                x,
                pending,
                rotary=rotary,
                documents=documents,
                cache=state.caches[layer] if state else None,
                liquid_state=state.liquid.get(layer) if state else None,
                stats=found.recurrence.get(layer),
                streaming=keep_state,
                recompute=recompute,
            )
            caches.append(cache)
            if liquid_state is not None:
                liquid[layer] = liquid_state
            found.routing[layer] = routing
        new_state = None
        if keep_state:
            new_state = LFMState(positions[:, -1] + 1, [cache for cache in caches if cache is not None], liquid)
        assert pending is not None
        return x + pending, new_state, found


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
