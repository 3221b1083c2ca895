"""LiquidNet for Hugging Face transformers: diagonal liquid layers, whose decay each token chooses, and SwiGLU.

Needs torch and transformers alone.  Modules have the names that the checkpoints' tensors have, so weights are loaded by
name.  What generation carries from token to token is a `State` of constant size; padding never enters it, on whichever
side it stands.  The loss is that of the next token.
"""

# pyright: reportIncompatibleMethodOverride=false
# The methods of transformers that are overridden have other parameters in every version.

import inspect
import math
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


class LiquidNetConfig(ModelSection):
    """`ffn`: ffn_hidden_size."""

    model_type = "lfm_training_liquidnet"
    attribute_map = {"num_hidden_layers": "num_layers"}

    def __init__(
        self,
        vocab_size=50_257,
        vocab_size_multiple=256,
        hidden_size=384,
        num_layers=6,
        seq_length=512,
        layernorm_epsilon=1e-6,
        delta_min=1e-5,
        ffn=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.vocab_size_multiple = vocab_size_multiple
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.seq_length = seq_length
        self.layernorm_epsilon = layernorm_epsilon
        self.delta_min = delta_min
        self.ffn: Any = ffn
        kwargs.setdefault("tie_word_embeddings", False)  # the model itself uses the embedding as its head
        super().__init__(**kwargs)


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


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    """`down(SiLU(gate u) * (up u))`, no biases.  Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.up = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.down = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(u)) * self.up(u))


class DecayRate(nn.Module):
    """`W_delta z + b_delta`, the bias in at least float32; no nn.Linear, so that no adapter takes it for one."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, z: Tensor) -> Tensor:
        return wide(F.linear(z, self.weight)) + wide(self.bias)


class DiagonalLiquid(nn.Module):
    """`W_y (o * h)`, where every channel forgets at its own rate, and all comes from the same input z:

    v = tanh(W_v z)    delta = softplus(W_delta z + b_delta) + delta_min    o = sigmoid(W_o z)
    h_t = alpha_t h_{t-1} + (1 - alpha_t) v_t,    alpha = exp(-delta)
    """

    def __init__(self, hidden_size: int, delta_min: float) -> None:
        super().__init__()
        self.delta_min = delta_min
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.delta = DecayRate(hidden_size)
        self.gate = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, z: Tensor, state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs `[B, T, D]`, and the state `[B, D]` after the last token, from that before the first."""
        x = self.delta(z)
        # exp(-softplus(x)) is sigmoid(-x).  Whichever of alpha and 1 - alpha is small is computed, so that both have
        # all their digits.
        small = math.exp(-self.delta_min) * torch.sigmoid(-x.abs())
        gain = torch.where(x > 0, 1 - small, -math.expm1(-self.delta_min) + small)
        alpha = torch.where(x > 0, small, 1 - gain)
        if mask is not None:
            alpha, gain = alpha.masked_fill(~mask[..., None], 1), gain.masked_fill(~mask[..., None], 0)
        h = scanned(alpha, gain * wide(self.value(z)).tanh(), state)
        return self.output(self.gate(z).sigmoid() * h.to(z.dtype)), h[:, -1]


def scanned(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """All `h_t = a_t h_{t-1} + b_t` `[B, T, D]` from `h_{-1} = start`, in log T passes.

    Hillis & Steele 1986: after pass n, (a, b) at t take h from 2^n steps before to t.
    """
    if torch.compiler.is_exporting():  # the number of passes is the length's
        return over_time(lambda h, a, b: (a * h[0] + b,), (start,), (a, b), None)[0]
    b = torch.cat((b[:, :1] + a[:, :1] * start[:, None], b[:, 1:]), 1)
    step = 1
    while step < b.shape[1]:
        b = torch.cat((b[:, :step], b[:, step:] + a[:, step:] * b[:, :-step]), 1)
        a = torch.cat((a[:, :step], a[:, step:] * a[:, :-step]), 1)
        step *= 2
    return b


class Block(nn.Module):
    """`x += c liquid(norm(x)); x += c mlp(norm(x))` with c = 1 / sqrt(2 num_layers)."""

    def __init__(self, config: LiquidNetConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.layernorm_epsilon
        self.residual_scale = (2 * config.num_layers) ** -0.5
        self.liquid_norm, self.liquid = RMSNorm(D, eps), DiagonalLiquid(D, config.delta_min)
        self.mlp_norm, self.mlp = RMSNorm(D, eps), SwiGLU(D, config.ffn["ffn_hidden_size"])

    def forward(self, x: Tensor, state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        y, state = self.liquid(self.liquid_norm(x), state, mask)
        x = x + self.residual_scale * y
        return x + self.residual_scale * self.mlp(self.mlp_norm(x)), state


class LiquidNetForCausalLM(StatefulCausalLM):
    config_class = LiquidNetConfig
    fp32_modules = ("delta.bias",)

    def __init__(self, config: LiquidNetConfig) -> None:
        super().__init__(config)
        stored_rows = -(-config.vocab_size // config.vocab_size_multiple) * config.vocab_size_multiple
        self.embedding = nn.Embedding(stored_rows, config.hidden_size)
        self.layers: Any = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.finish()

    def empty_state(self, batch: int) -> State:
        zeros = wide(self.embedding.weight).new_zeros(batch, self.config.hidden_size)
        return State(0, {f"hidden.{layer}": zeros for layer in range(self.config.num_layers)})

    def advance(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        after = {}
        for i, block in enumerate(self.layers):
            x, after[f"hidden.{i}"] = block(x, state[f"hidden.{i}"], mask)
        return self.final_norm(x), after

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight[: self.config.vocab_size])
