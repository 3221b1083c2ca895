"""LiquidNN (MiniLiquidGPT) for Hugging Face transformers: liquid cells on synapses that change while they read.

Needs torch and transformers alone.  Modules have the names that the checkpoints' tensors have, so weights are loaded by
name.  What generation carries from token to token is a `State` of constant size: hidden states and traces; padding
never enters it, on whichever side it stands.  `model.plastic` turns plasticity on and off at any time: off, traces
neither act nor change.  With trace_mode batch_mean the sequences of a batch see each other.  The loss is that of the
next token.
"""

# pyright: reportIncompatibleMethodOverride=false
# The methods of transformers that are overridden have other parameters in every version.

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation.utils import GenerationMixin
from transformers.utils.generic import ModelOutput


class ModelSection(PretrainedConfig):
    """The `model` section of a run's configuration: keys that the model computes with, and all others as they are."""

    keys_to_ignore_at_inference = ["state"]

    def to_diff_dict(self) -> dict[str, Any]:
        """Those that have their defaults are saved too."""
        own = set(inspect.signature(type(self).__init__).parameters) - {"self", "kwargs"}
        return super().to_diff_dict() | {key: getattr(self, key) for key in sorted(own)}


class LiquidNNConfig(ModelSection):
    """`plastic`: whether plasticity is on at first; None: if training ever had it on."""

    model_type = "lfm_training_liquidnn"

    def __init__(
        self,
        vocab_size=50_257,
        hidden_size=256,
        num_fast=2,
        num_deep=2,
        fast_steps=1,
        deep_steps=3,
        integrator="rk2",
        adaptive_steps=False,
        seq_length=129,
        max_positions=512,
        positions="any",
        dropout=0.1,
        layernorm_epsilon=1e-5,
        trace_mode="per_sequence",
        trace_grad=True,
        plastic_from=0.5,
        plastic=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_fast = num_fast
        self.num_deep = num_deep
        self.fast_steps = fast_steps
        self.deep_steps = deep_steps
        self.integrator = integrator
        self.adaptive_steps = adaptive_steps
        self.seq_length = seq_length
        self.max_positions = max_positions
        self.positions = positions
        self.dropout = dropout
        self.layernorm_epsilon = layernorm_epsilon
        self.trace_mode = trace_mode
        self.trace_grad = trace_grad
        self.plastic_from = plastic_from
        self.plastic = plastic
        kwargs.setdefault("tie_word_embeddings", False)  # the model itself uses the embedding as its head
        super().__init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        return self.num_fast + self.num_deep


class State:
    """What was read: tensors by name, whose dimension 0 is the batch.  Generation may carry it on, or reorder its rows.

    `columns` counts what was read of `input_ids`, padding included.
    """

    def __init__(self, columns: int, tensors: Mapping[str, Tensor]) -> None:
        self.columns, self.tensors = columns, dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.columns

    def reorder_cache(self, rows: Tensor) -> None:
        """Of beam search."""
        self.tensors = {name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in self.tensors.items()}


@dataclass
class CausalLMOutput(ModelOutput):
    """Loss where there were labels, logits `[B, T, vocab_size]`, and the state after the last column."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: Any = None


class StatefulCausalLM(PreTrainedModel, GenerationMixin):
    """Next-token model with a state of its own in place of a key/value cache of transformers."""

    supports_gradient_checkpointing = False
    _is_stateful = True  # what was read cannot be taken back, as assisted generation would
    fp32_modules: tuple[str, ...] = ()
    """Stay in float32 when the model is loaded in half precision."""

    def finish(self) -> None:
        """Called at the end of a model's constructor."""
        self.post_init()
        # Set behind `post_init`, because some versions look for the names among modules with parameters alone.
        self._keep_in_fp32_modules_strict = set(self.fp32_modules)

    def empty_state(self, batch: int) -> State:
        raise NotImplementedError

    def advance(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Final hidden states of the embeddings `x` `[B, T, D]`, and the tensors of the state after them.

        `mask` `[B, T]` is False where there is padding; None: nowhere.
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: State | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple:
        """`attention_mask` has the columns of `input_ids`, behind those that `state` has read or with them; 0: padding.

        `labels` are `input_ids` with -100 where there is no label; they are shifted here.
        """
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length, _ = x.shape
        mask = None if attention_mask is None else attention_mask[:, -length:].bool()
        if mask is not None and bool(mask.all()):
            mask = None
        before = self.empty_state(batch) if state is None else state
        hidden, tensors = self.advance(x, before, mask)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.logits(hidden if isinstance(keep, int) else hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        carries = use_cache if use_cache is not None else not self.training
        output = CausalLMOutput(loss, logits, State(before.columns + length, tensors) if carries else None)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        state: State | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The columns that are not read yet."""
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "state": state, "logits_to_keep": logits_to_keep}
        inputs["use_cache"] = use_cache
        if inputs_embeds is not None and state is None:
            return inputs | {"inputs_embeds": inputs_embeds}
        columns = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        unread = columns - (state.columns if state is not None else 0)
        return inputs | {"input_ids": input_ids[:, -unread:]}

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> dict:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.state is not None:
            # Beam search reorders what has one of these names; it is the same object.
            updated["state"] = updated["past_key_values"] = outputs.state
        return updated

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """There is none but the state."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, "head", None)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"the vocabulary of {type(self).__name__} is fixed at {self.config.vocab_size}")


def wide(x: Tensor) -> Tensor:
    """In at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def held(mask: Tensor | None, t: int, new: Tensor, old: Tensor) -> Tensor:
    """`new` in rows whose column `t` is a token, `old` where it is padding."""
    return new if mask is None else torch.where(mask[:, t].view(-1, *[1] * (new.dim() - 1)), new, old)


def over_time(
    step: Callable[..., tuple[Tensor, ...]], state: tuple[Tensor, ...], columns: tuple[Tensor, ...], mask: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`state = step(state, *column)` of one column of `columns` `[B, T, ...]` after the other, where it is a token.

    Returns the first part of every state `[B, T, ...]`, and the last state.
    """
    if torch.compiler.is_exporting() and columns[0].shape[1] != 1:
        # A loop of the graph's own, so that it takes any length; an exported graph has no mask.
        from torch._higher_order_ops.scan import scan

        def body(before: tuple[Tensor, ...], column: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
            after = step(before, *column)
            return after, after[0].clone()

        end, first = scan(body, state, tuple(part.transpose(0, 1) for part in columns))
        return first.transpose(0, 1), end
    first = []
    for t in range(columns[0].shape[1]):
        after = step(state, *(part[:, t] for part in columns))
        state = tuple(held(mask, t, new, old) for new, old in zip(after, state, strict=True))
        first.append(state[0])
    return torch.stack(first, 1), state


class PlasticSynapse(nn.Module):
    """`(W + alpha * M) x + b`, where M is the trace of what fired together.  Miconi et al. 2018, arXiv 1804.02464."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.alpha = nn.Parameter(torch.zeros(size, size)), nn.Parameter(torch.zeros(size, size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.log_eta, self.logit_decay = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def times(self, x: Tensor, trace: Tensor | None) -> Tensor:
        """Of vectors `[B, D]` and traces `[B, D, D]`; None: W and b alone."""
        y = F.linear(x, wide(self.weight), wide(self.bias))
        return y if trace is None else y + torch.einsum("bij,bj->bi", wide(self.alpha) * trace, x)

    def updated(self, trace: Tensor, post: Tensor, pre: Tensor, tokens: Tensor | None) -> Tensor:
        """`decay M + eta post pre^T`, then scaled down to the norm 0.3 |W| if it is longer.

        `tokens` `[B]`, where given: the outer product is their mean over the batch's rows that have one.
        """
        eta, decay = 0.03 * F.softplus(wide(self.log_eta)), wide(self.logit_decay).sigmoid()
        outer = post[:, :, None] * pre[:, None]
        if tokens is not None:
            rows = outer if torch.compiler.is_exporting() else outer[tokens]  # an exported graph has no padding
            outer = rows.mean(0, keepdim=True) if rows.shape[0] else torch.zeros_like(outer)
        trace = decay * trace + eta * outer
        largest = 0.3 * torch.linalg.vector_norm(wide(self.weight))
        squared = trace.square().sum((1, 2), keepdim=True)
        exceeds = squared > largest.square()
        norm = torch.where(exceeds, squared, 1.0).sqrt()  # 1 elsewhere: the square root of 0 has no gradient
        return trace * torch.where(exceeds, largest / (norm + 1e-8), 1.0)


class LiquidCell(nn.Module):
    """One token of `dh/dt = (z(h) - h) / tau(h)`, in at least float32.  Hasani et al. 2021, arXiv 2006.04439.

    z(h)   = tanh(ih(x) + hh(h))
    tau(h) = softplus(T2 silu(T1 [x; h] + t1) + t2) + 0.2
    """

    def __init__(self, config: LiquidNNConfig, steps: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.steps, self.integrator, self.adaptive_steps = steps, config.integrator, config.adaptive_steps
        self.ih, self.hh = PlasticSynapse(D), PlasticSynapse(D)
        self.tau_input, self.tau_output = nn.Linear(2 * D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, h: Tensor, ih: Tensor | None, hh: Tensor | None) -> Tensor:
        """The ODE's end point from `h` `[B, D]` for the input `x` `[B, D]`, with these traces."""
        drive = self.ih.times(x, ih)

        def field(h: Tensor) -> tuple[Tensor, Tensor]:
            tau = self.tau_input(torch.cat((x, h), -1).to(self.tau_input.weight.dtype))
            tau = wide(self.tau_output(F.silu(tau)))
            return torch.tanh(drive + self.hh.times(h, hh)), F.softplus(tau) + 0.2

        if not self.adaptive_steps:
            for _ in range(self.steps):
                h = self.stepped(h, field, 1 / self.steps, 0.5)
            return h
        # Each sequence has its own number of steps: the fewest that are no longer than its least time constant.
        tau = field(h)[1].detach()
        steps = (1 / tau.amin(-1, keepdim=True)).ceil().long().clamp(self.steps, max(self.steps, 5))
        most = max(self.steps, 5) if torch.compiler.is_exporting() else int(steps.max())
        for k in range(most):
            h = torch.where(k < steps, self.stepped(h, field, 1 / steps.to(h.dtype), 0.5 * (steps > 1)), h)
        return h

    def stepped(self, h: Tensor, field: Any, dt: Any, half: Any) -> Tensor:
        """One step of `dt`; rk2 takes its slope after `half` of it."""
        z, tau = field(h)
        if self.integrator == "exponential":
            return h - torch.expm1(-torch.as_tensor(dt) / tau) * (z - h)
        slope = (z - h) / tau
        if self.integrator == "rk2" and (self.steps > 1 or self.adaptive_steps):
            middle = h + dt * half * slope
            z, tau = field(middle)
            slope = (z - middle) / tau
        return h + dt * slope


class LiquidNNForCausalLM(StatefulCausalLM):
    config_class = LiquidNNConfig
    fp32_modules = ("cells",)

    def __init__(self, config: LiquidNNConfig) -> None:
        super().__init__(config)
        c = config
        self.plastic = c.plastic if c.plastic is not None else c.plastic_from < 1
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        steps = [c.fast_steps] * c.num_fast + [c.deep_steps] * c.num_deep
        self.cells: Any = nn.ModuleList(LiquidCell(c, n) for n in steps)
        self.norms: Any = nn.ModuleList(nn.LayerNorm(c.hidden_size, eps=c.layernorm_epsilon) for _ in steps)
        self.final_norm = nn.LayerNorm(c.hidden_size, eps=c.layernorm_epsilon)
        self.finish()

    def empty_state(self, batch: int) -> State:
        c, D = self.config, self.config.hidden_size
        zeros = wide(self.embedding.weight).new_zeros(batch, D)
        matrix = zeros.new_zeros(batch, D, D)
        tensors = {"position": zeros.new_zeros(batch, dtype=torch.long)}
        tensors |= {f"hidden.{i}": zeros for i in range(len(self.cells))}
        deep = range(c.num_fast, len(self.cells))
        return State(0, tensors | {f"trace.{i}.{name}": matrix for i in deep for name in ("ih", "hh")})

    def advance(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Cells above each other, `s_i = dropout(norm(cell(x, s_i) + x))` being both state and output."""
        dtype, now = x.dtype, dict(state.tensors)
        new = torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if mask is None else mask.long()
        read = now["position"][:, None] + new.cumsum(1)
        now["position"] = read[:, -1]
        inputs = wide(x) + self.position_signal(read - 1, wide(x).dtype)
        top = f"hidden.{len(self.cells) - 1}"  # the output of each column
        moving = ("hidden", "trace") if self.plastic else ("hidden",)
        names = [top, *(name for name in now if name.startswith(moving) and name != top)]

        def step(before: tuple[Tensor, ...], y: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
            after = self.stepped(dict(zip(names, before, strict=True)), y, tokens)
            return tuple(after[name] for name in names)

        y, end = over_time(step, tuple(now[name] for name in names), (inputs, new.bool()), mask)
        return normed(self.final_norm, y).to(dtype), now | dict(zip(names, end, strict=True))

    def stepped(self, now: dict[str, Tensor], y: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """The state after one column of inputs `[B, D]`, of which `tokens` `[B]` are no padding."""
        c = self.config
        for i, cell in enumerate(self.cells):
            names = (f"trace.{i}.ih", f"trace.{i}.hh")
            if self.plastic and names[0] in now:
                ih, hh = (now[name] for name in names)
                h = cell(y, now[f"hidden.{i}"], ih, hh)
                rows = tokens if c.trace_mode == "batch_mean" else None
                with torch.set_grad_enabled(c.trace_grad and torch.is_grad_enabled()):
                    now |= {names[0]: cell.ih.updated(ih, h, y, rows), names[1]: cell.hh.updated(hh, h, h, rows)}
            else:
                h = cell(y, now[f"hidden.{i}"], None, None)
            y = F.dropout(normed(self.norms[i], h + y), c.dropout, self.training)
            now[f"hidden.{i}"] = y
        return now

    def position_signal(self, position: Tensor, dtype: torch.dtype) -> Tensor:
        """Sines and cosines of wavelengths from 2 pi to 20,000 pi tokens, interleaved: `[B, T, D]`."""
        D = self.config.hidden_size
        exact = torch.float64 if position.device.type != "mps" else torch.float32
        frequency = 10_000.0 ** (-torch.arange(0, D, 2, dtype=exact, device=position.device) / D)
        angle = position[..., None] * frequency
        signal = torch.stack((angle.sin(), angle.cos()), -1).flatten(-2).to(dtype)
        if self.config.positions == "until_max":
            signal = signal.masked_fill((position >= self.config.max_positions)[..., None], 0)
        return signal

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight)


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, wide(norm.weight), wide(norm.bias), norm.eps)
