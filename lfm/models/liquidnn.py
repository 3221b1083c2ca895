"""MiniLiquidGPT (liquid-nn): liquid time-constant cells whose Hebbian synapses adapt while they read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from lfm.config import Depth, DepthOrZero, Tokens, Vocabulary, Width
from lfm.errors import UserError
from lfm.kernels.backend import widest
from lfm.kernels.liquid_cell import Integration, Integrator, TraceMode, Traces
from lfm.layers.cost import Cost
from lfm.layers.documents import Documents, Rows
from lfm.layers.head import Head, Hidden
from lfm.layers.liquid_cell import LiquidCell
from lfm.models.initialization import generator_of
from lfm.models.language_model import FamilyConfig, LanguageModel, Recompute
from lfm.models.losses import Losses, Objective
from lfm.models.state import State


class LiquidNNConfig(FamilyConfig):
    changeable: ClassVar[frozenset[str]] = frozenset(
        {"seq_length", "dropout", "trace_mode", "trace_grad", "bptt_window", "plastic_from"}
    )
    row_is_one_pass: ClassVar[bool] = False
    kind: Literal["liquidnn"] = "liquidnn"
    """Model family."""
    hidden_size: Width = 256
    num_fast: DepthOrZero = 2
    """Cells of `fast_steps`, which are never plastic; they come first."""
    num_deep: DepthOrZero = 2
    """Cells of `deep_steps`, plastic when plasticity is on."""
    fast_steps: Depth = 1
    """ODE steps a token."""
    deep_steps: Depth = 3
    """ODE steps a token."""
    integrator: Integrator = "rk2"
    """rk2: midpoint where a cell makes two steps or more, Euler where it makes one; exponential is stable always."""
    adaptive_steps: bool = False
    """Take more steps, at most 5, where a step would be longer than the least time constant of the token."""
    seq_length: Tokens = 129
    """Length of a training row in tokens; one more than the labels in it."""
    vocab_size: Vocabulary = 50_257
    max_positions: Tokens = 512
    """Of positions: until_max."""
    positions: Literal["any", "until_max"] = "any"
    """Position signal of every token, or (as published) of those before max_positions, and 0 after them."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Of each cell's output, which is its state too."""
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    trace_mode: TraceMode = "per_sequence"
    """batch_mean (as published): traces grow by the batch's mean, so that the sequences of a batch see each other."""
    trace_grad: bool = True
    """Differentiate trace updates inside a window; false (as published): log_eta and logit_decay stay as they start."""
    bptt_window: Tokens = 16
    """Tokens that a gradient reaches back: hidden states and traces are detached between windows of this length."""
    plastic_from: float = Field(default=0.5, ge=0, le=1)
    """Share of the training steps after which plasticity is on; 1: never, and then off by default afterwards."""

    @model_validator(mode="after")
    def _check(self) -> "LiquidNNConfig":
        if self.hidden_size % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} is odd, and positions are pairs of sine and cosine; "
                f"the nearest is {self.hidden_size + 1}"
            )
        if self.num_layers == 0:
            raise ValueError("num_fast=0 and num_deep=0 leave no cell; the least is num_deep=1")
        return self

    def needs_host(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return "the host reads how many steps the time constants of a token need" if self.adaptive_steps else None

    @property
    def num_layers(self) -> int:
        return self.num_fast + self.num_deep

    @property
    def norm_parameters(self) -> int:
        return 2 * self.hidden_size

    def layer_cost(self, layer: int, attended: float | None = None) -> Cost:
        """Plasticity counts for the share of training in which it is on; adaptive steps count as if none were added.

        The plastic parameters of fast cells are trainable, but no token uses them.
        """
        D, is_fast = self.hidden_size, layer < self.num_fast
        steps, plastic = (self.fast_steps, 0.0) if is_fast else (self.deep_steps, 1 - self.plastic_from)
        evaluations = 2 * steps if self.integrator == "rk2" and steps > 1 else steps
        # Of a trace: alpha * M, decay and outer product, norm and its factor; of both, the products with vectors.
        traces = 2 * (1 + 3 + 3) + 2 * (1 + evaluations)
        forward = (4 + 6 * evaluations + plastic * traces) * D * D
        synapse, norm = 2 * D * D + D + 2, 2 * D
        weights = 2 * synapse + 3 * D * D + 2 * D + norm
        idle = 2 * (D * D + 2) if is_fast else 0
        return Cost(replicated=weights, idle=idle, forward=forward, backward=2 * forward)


@dataclass
class LiquidNNState(State):
    """`hidden` has one entry a cell, `traces` one a deep cell; at least fp32."""

    position: Int[Tensor, " B"]
    """Tokens seen."""
    hidden: list[Float[Tensor, "B D"]]
    traces: list[Traces]


def reset_hidden(state: LiquidNNState) -> LiquidNNState:
    """The start of a sequence that keeps the traces of the last one."""
    return replace(state, position=torch.zeros_like(state.position), hidden=[torch.zeros_like(h) for h in state.hidden])


def reset_traces(state: LiquidNNState) -> LiquidNNState:
    """The same place in the sequence, with nothing learned from it."""
    return replace(state, traces=[Traces(torch.zeros_like(m.ih), torch.zeros_like(m.hh)) for m in state.traces])


def trace_norms(state: LiquidNNState) -> list[tuple[Float[Tensor, " B"], Float[Tensor, " B"]]]:
    """Frobenius norms of (M_ih, M_hh) of each deep cell."""
    return [(torch.linalg.matrix_norm(m.ih), torch.linalg.matrix_norm(m.hh)) for m in state.traces]


class MiniLiquidGPT(LanguageModel):
    """Cells above each other, `s_i = dropout(norm(cell(x, s_i) + x))` being both state and output; tied logits.

    `plastic` turns plasticity on and off, at any time: off, traces neither act nor change.  `start_step` sets it
    while training; a new model has it on, unless its training never has.
    """

    config: LiquidNNConfig
    evaluation_modes = ("plasticity_off", "plasticity_on")

    @property
    def plastic(self) -> bool:
        return self.evaluation_mode == "plasticity_on"

    @plastic.setter
    def plastic(self, value: bool) -> None:
        self.evaluation_mode = self.evaluation_modes[int(value)]

    def __init__(self, config: LiquidNNConfig) -> None:
        super().__init__()
        self.config = c = config
        self.plastic = c.plastic_from < 1
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.cells = nn.ModuleList(
            LiquidCell(
                c.hidden_size,
                integration=Integration(
                    c.integrator, c.fast_steps if i < c.num_fast else c.deep_steps, c.adaptive_steps
                ),
                trace_mode=c.trace_mode,
                trace_grad=c.trace_grad,
            )
            for i in range(c.num_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(c.hidden_size, c.layernorm_epsilon) for _ in range(c.num_layers))
        self.final_norm = nn.LayerNorm(c.hidden_size, c.layernorm_epsilon)
        self.head = Head(c.hidden_size, c.vocab_size, tied_to=self.embedding)

    def advance(
        self, ids: Int[Tensor, "B T"], state: State | None = None, documents: Documents | None = None
    ) -> tuple[Float[Tensor, "B T D"], LiquidNNState]:
        B, T = ids.shape
        empty = self.empty_state(B)
        if documents is not None:
            if state is not None:
                raise ValueError("documents and state exclude each other: a streamed sequence is one document")
            return self._run(ids, empty, documents.positions, _fresh(documents))
        if state is None:
            state = empty
        state.check_like(empty)
        assert isinstance(state, LiquidNNState)
        return self._run(ids, state, state.position[:, None] + torch.arange(T, device=ids.device), None)

    def empty_state(self, batch: int) -> LiquidNNState:
        c, weight = self.config, self.embedding.weight

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)

        def trace() -> Tensor:
            # What all sequences share is one matrix, until one of them begins anew.
            return zeros(1, D, D).expand(batch, D, D) if c.trace_mode == "batch_mean" else zeros(batch, D, D)

        D = c.hidden_size
        return LiquidNNState(
            position=torch.zeros(batch, dtype=torch.long, device=weight.device),
            hidden=[zeros(batch, D) for _ in range(c.num_layers)],
            traces=[Traces(trace(), trace()) for _ in range(c.num_deep)],
        )

    def loss_parts(self, rows: Rows, objective: Objective, *, recompute: Recompute = "none") -> Iterator[Losses]:
        if not objective.by_position:
            raise ValueError(f"{type(objective).__name__} is of whole rows, and windows are differentiated one by one")
        state, fresh = self.empty_state(len(rows.ids)), _fresh(rows.documents)
        # The last token of a row has no label, so nothing needs its output.
        end = max(1, rows.ids.shape[1] - 1)
        for start in range(0, end, self.config.bptt_window):
            stop = min(start + self.config.bptt_window, end)
            window = rows.columns(start, stop + 1)  # with the id that is the last one's label
            here = (rows.ids[:, start:stop], state.detach(), rows.documents.positions[:, start:stop])
            hidden, state = self._run(*here, None if fresh is None else fresh[:, start:stop])
            yield Losses(objective.sums(Hidden(hidden), self.head, window))

    def start_step(self, step: int, total_steps: int) -> None:
        self.plastic = step >= int(total_steps * self.config.plastic_from)

    @contextmanager
    def evaluating(self, mode: str) -> Iterator[None]:
        if mode not in self.evaluation_modes:
            raise ValueError(f"evaluation mode {mode!r} is not one of {list(self.evaluation_modes)}")
        before, self.plastic = self.plastic, mode == "plasticity_on"
        try:
            yield
        finally:
            self.plastic = before

    def initial_tensor(self, name: str, shape: Sequence[int], seed: int) -> Tensor:
        """
        | tensor | distribution |
        | --- | --- |
        | embedding | N(0, 0.02) |
        | synapses' weight | N(0, 0.5 / sqrt(hidden_size)) |
        | alpha | N(0, 0.01) |
        | log_eta, logit_decay | -3, 3: a rate of 0.00146, a decay of 0.953 |
        | weight and bias of tau_input, tau_output | U(+-1 / sqrt(inputs)) |
        | gains, other biases | 1, 0 |
        """
        parts = name.split(".")
        if parts[0] in ("norms", "final_norm"):
            return torch.ones(*shape) if parts[-1] == "weight" else torch.zeros(*shape)
        if parts[-1] in ("log_eta", "logit_decay"):
            return torch.full((*shape,), -3.0 if parts[-1] == "log_eta" else 3.0)
        tensor, generator, D = torch.empty(*shape), generator_of(seed, name), self.config.hidden_size
        if parts[-2] in ("tau_input", "tau_output"):
            bound = (2 * D if parts[-2] == "tau_input" else D) ** -0.5
            return tensor.uniform_(-bound, bound, generator=generator)
        if parts[-1] == "bias":
            return tensor.zero_()
        std = 0.02 if parts[0] == "embedding" else 0.01 if parts[-1] == "alpha" else 0.5 * D**-0.5
        return tensor.normal_(0, std, generator=generator)

    def _run(
        self,
        ids: Int[Tensor, "B T"],
        state: LiquidNNState,
        positions: Int[Tensor, "B T"],
        fresh: Bool[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T D"], LiquidNNState]:
        """Final hidden states after `state`, which a row forgets before the tokens that are `fresh`."""
        c, dtype = self.config, self.embedding.weight.dtype
        x = self.embedding(ids).to(state.hidden[0].dtype)
        x = x + self._position_signal(positions, x.dtype)
        hidden, traces = [], list(state.traces)
        # No cell waits for one above it, so each reads all tokens before the next one begins.
        for i, (cell, norm) in enumerate(zip(self.cells, self.norms, strict=True)):
            is_plastic = self.plastic and i >= c.num_fast
            keep = F.dropout(torch.ones_like(x), c.dropout) if self.training and c.dropout else None
            before = traces[i - c.num_fast] if is_plastic else None
            x, after = cast(LiquidCell, cell)(x, state.hidden[i], norm, keep=keep, fresh=fresh, traces=before)
            hidden.append(x[:, -1].clone())  # the state holds no window
            if after is not None:
                traces[i - c.num_fast] = after
        out = F.layer_norm(x, *_wide_norm(self.final_norm))
        return out.to(dtype), LiquidNNState(positions[:, -1] + 1, hidden, traces)

    def _position_signal(self, positions: Int[Tensor, "B T"], dtype: torch.dtype) -> Float[Tensor, "B T D"]:
        """Sines and cosines of wavelengths from 2 pi to 20,000 pi tokens, interleaved."""
        D = self.config.hidden_size
        # In fp64: fp32 angles of far positions would be wrong by more than rounding.
        frequency = 10_000.0 ** (-torch.arange(0, D, 2, dtype=widest(positions.device), device=positions.device) / D)
        angle = positions[..., None] * frequency
        signal = torch.stack((angle.sin(), angle.cos()), -1).flatten(-2).to(dtype)
        if self.config.positions == "until_max":
            signal = signal.masked_fill((positions >= self.config.max_positions)[..., None], 0)
        return signal


def turn_plasticity_off(model: LanguageModel) -> None:
    """For all that the model reads from now on.  Raises UserError for one that has no plasticity."""
    if not isinstance(model, MiniLiquidGPT):
        raise UserError(f"--no-plasticity is for kind liquidnn, and this is a model of kind {model.config.kind}")
    model.plastic = False


def _fresh(documents: Documents) -> Bool[Tensor, "B T"] | None:
    """Where a document begins; None: nowhere but in the first column, before which there is nothing to forget."""
    return None if documents.row_is_one_document else documents.starts


def _wide_norm(norm: nn.LayerNorm) -> tuple[tuple[int, ...], Tensor, Tensor, float]:
    wide = torch.promote_types(norm.weight.dtype, torch.float32)
    return norm.normalized_shape, norm.weight.to(wide), norm.bias.to(wide), norm.eps
