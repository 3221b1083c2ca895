"""LiquidLM for Hugging Face transformers: frozen random features of the token and the clock, in front of LSTMs.

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


class LiquidLMConfig(ModelSection):
    model_type = "lfm_training_liquidlm"
    attribute_map = {"num_hidden_layers": "num_layers"}

    def __init__(
        self,
        vocab_size=50_265,
        hidden_size=1024,
        num_layers=4,
        reservoir_size=4096,
        connectivity=0.05,
        hidden_dropout=0.4,
        layernorm_epsilon=1e-5,
        seq_length=512,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.reservoir_size = reservoir_size
        self.connectivity = connectivity
        self.hidden_dropout = hidden_dropout
        self.layernorm_epsilon = layernorm_epsilon
        self.seq_length = seq_length
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def stored_connections(self) -> int:
        """Of each feature: six standard deviations above the mean of their random number, in eights."""
        mean = self.connectivity * self.hidden_size
        enough = mean + 6 * math.sqrt(mean * (1 - self.connectivity))
        return min(self.hidden_size, 8 * math.ceil(enough / 8))


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


class StackedLSTM(nn.Module):
    """`i, f, g, o = W_ih x + b_ih + W_hh h + b_hh;  c = sig(f) c + sig(i) tanh(g);  h = sig(o) tanh(c)`, a layer on the
    other, in at least float32; names, shapes and gate order are those of torch.nn.LSTM.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.num_layers, self.dropout = num_layers, dropout
        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size
            shapes = ((4 * hidden_size, width), (4 * hidden_size, hidden_size), (4 * hidden_size,), (4 * hidden_size,))
            for name, shape in zip(self.names(layer), shapes, strict=True):
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    @staticmethod
    def names(layer: int) -> list[str]:
        return [f"{name}_l{layer}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]

    def forward(self, x: Tensor, h: Tensor, c: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs `[B, T, H]` and the states `[B, L, H]` after the last token, from those before the first."""
        y, ends = wide(x), []
        for layer in range(self.num_layers):
            if layer:
                y = F.dropout(y, self.dropout, self.training)
            weights = [wide(self.get_parameter(name)) for name in self.names(layer)]
            state = (h[:, layer].contiguous(), c[:, layer].contiguous())
            if mask is None and not torch.compiler.is_exporting():
                train = torch.is_grad_enabled()
                start = [part[None] for part in state]
                y, h_end, c_end = torch.lstm(y, start, weights, True, 1, 0.0, train, False, True)
                state = (h_end[0], c_end[0])
            else:
                y, state = over_time(lambda s, x, w=weights: torch.lstm_cell(x, s, *w), state, (y,), mask)
            ends.append(state)
        return y.to(x.dtype), torch.stack([h for h, _ in ends], 1), torch.stack([c for _, c in ends], 1)


class PhaseReservoir(nn.Module):
    """`q_t = tanh(R x_t + sin(phi t) + cos(phi t))` with frozen R, sparse and stored by rows, and frozen phi."""

    values: Tensor
    columns: Tensor
    phases: Tensor

    def __init__(self, config: LiquidLMConfig) -> None:
        super().__init__()
        shape = (config.reservoir_size, config.stored_connections)
        self.hidden_size = config.hidden_size
        self.register_buffer("values", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("columns", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("phases", torch.zeros(shape[0], dtype=torch.float32))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Features `[B, T, R]` of embeddings `[B, T, D]` at positions `[B, T]`."""
        zeros = torch.zeros(len(self.values), self.hidden_size, dtype=x.dtype, device=x.device)
        dense = zeros.scatter_(1, self.columns.long(), self.values.to(x.dtype))
        # An angle of many turns has too few digits left in float32.
        exact = torch.float64 if x.device.type != "mps" else torch.float32
        angle = self.phases.to(exact) * position[..., None].to(exact)
        phase = (angle.sin() + angle.cos()).to(self.phases.dtype)
        return torch.tanh((x @ dense.T).to(phase.dtype) + phase).to(x.dtype)


class LiquidLMForCausalLM(StatefulCausalLM):
    config_class = LiquidLMConfig
    fp32_modules = ("reservoir.values", "reservoir.phases")

    def __init__(self, config: LiquidLMConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.reservoir = PhaseReservoir(config)
        self.lstm = StackedLSTM(config.reservoir_size, D, config.num_layers, config.hidden_dropout)
        self.final_norm = nn.LayerNorm(D, eps=config.layernorm_epsilon)
        self.head = nn.Linear(D, config.vocab_size)
        self.finish()

    def empty_state(self, batch: int) -> State:
        zeros = wide(self.embedding.weight).new_zeros(batch, self.config.num_layers, self.config.hidden_size)
        return State(0, {"h": zeros, "c": zeros, "position": zeros.new_zeros(batch, dtype=torch.long)})

    def advance(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        new = torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if mask is None else mask.long()
        read = state["position"][:, None] + new.cumsum(1)
        dropout = self.config.hidden_dropout
        q = F.dropout(self.reservoir(x, read - 1), dropout, self.training)
        y, h, c = self.lstm(q, state["h"], state["c"], mask)
        y = F.dropout(self.final_norm(y), dropout, self.training)
        return y, {"h": h, "c": c, "position": read[:, -1]}

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)
