"""LAERC for Hugging Face transformers: frozen random recurrent networks, gated against the direct path.

Needs torch and transformers alone.  Modules have the names that the checkpoints' tensors have, so weights are loaded by
name.  What generation carries from token to token is a `State` of constant size; padding never enters it, on whichever
side it stands.  The loss is that of the next token.
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


class LAERCConfig(ModelSection):
    model_type = "lfm_training_laerc"
    attribute_map = {"num_hidden_layers": "num_layers"}

    def __init__(
        self,
        vocab_size=50_257,
        hidden_size=512,
        num_layers=16,
        seq_length=1024,
        reservoir_multiple=4.0,
        reservoir_mlp_multiple=1.0,
        ffn_multiple=4.0,
        use_reservoir=True,
        keep_input_norm=False,
        layernorm_epsilon=1e-5,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.seq_length = seq_length
        self.reservoir_multiple = reservoir_multiple
        self.reservoir_mlp_multiple = reservoir_mlp_multiple
        self.ffn_multiple = ffn_multiple
        self.use_reservoir = use_reservoir
        self.keep_input_norm = keep_input_norm
        self.layernorm_epsilon = layernorm_epsilon
        kwargs.setdefault("tie_word_embeddings", False)  # the model itself uses the embedding as its head
        super().__init__(**kwargs)

    @property
    def reservoir_size(self) -> int:
        return int(self.hidden_size * self.reservoir_multiple)


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


class Reservoir(nn.Module):
    """`r_t = tanh(U h_t + b_u + W r_{t-1} + b_w)`, all of it frozen and in at least float32."""

    input_weight: Tensor
    input_bias: Tensor
    recurrent_weight: Tensor
    recurrent_bias: Tensor

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        shapes = {"input_weight": (size, hidden_size), "input_bias": (size,)}
        shapes |= {"recurrent_weight": (size, size), "recurrent_bias": (size,)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))

    def forward(self, h: Tensor, state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """States `[B, T, R]`, and the last one `[B, R]`, from that before the first token."""
        drive = F.linear(h.to(self.input_weight.dtype), self.input_weight, self.input_bias + self.recurrent_bias)
        weight = self.recurrent_weight
        states, (state,) = over_time(lambda r, x: (torch.tanh(F.linear(r[0], weight) + x),), (state,), (drive,), mask)
        return states.to(h.dtype), state


class MLP(nn.Module):
    """`down GELU(up x)`."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(input_size, hidden_size), nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """`m = g rho + (1 - g) x`, then `m + a FFN(norm(m))`; there is no other residual connection.

    `rho = exp(s) MLP(norm(r))` is read out of the reservoir, which sees norm(x); the gate g sees the raw input, as
    norm([x; rho]).  Without a reservoir rho is 0.
    """

    def __init__(self, config: LAERCConfig) -> None:
        super().__init__()
        D, R, eps = config.hidden_size, config.reservoir_size, config.layernorm_epsilon
        self.use_reservoir = config.use_reservoir
        if config.use_reservoir or config.keep_input_norm:
            self.input_norm = nn.LayerNorm(D, eps=eps)
        if config.use_reservoir:
            self.reservoir, self.readout_norm = Reservoir(D, R), nn.LayerNorm(R, eps=eps)
            self.readout = MLP(R, int(D * config.reservoir_mlp_multiple), D)
            self.readout_log_scale = nn.Parameter(torch.zeros(()))
        self.gate_norm, self.gate = nn.LayerNorm(2 * D, eps=eps), MLP(2 * D, D, D)
        self.ffn_norm, self.ffn = nn.LayerNorm(D, eps=eps), MLP(D, int(D * config.ffn_multiple), D)
        self.ffn_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, state: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rho = torch.zeros_like(x)
        if self.use_reservoir:
            states, state = self.reservoir(self.input_norm(x), state, mask)
            rho = self.readout_log_scale.exp() * self.readout(self.readout_norm(states))
        gate = self.gate(self.gate_norm(torch.cat((x, rho), -1))).sigmoid()
        m = gate * rho + (1 - gate) * x
        return m + self.ffn_scale * self.ffn(self.ffn_norm(m)), state


class LAERCForCausalLM(StatefulCausalLM):
    config_class = LAERCConfig
    fp32_modules = ("reservoir",)

    def __init__(self, config: LAERCConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers: Any = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.finish()

    def empty_state(self, batch: int) -> State:
        zeros = wide(self.embedding.weight).new_zeros(batch, self.config.reservoir_size)
        count = self.config.num_layers if self.config.use_reservoir else 0
        return State(0, {f"reservoir.{layer}": zeros for layer in range(count)})

    def advance(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        after = {}
        for i, block in enumerate(self.layers):
            x, reservoir = block(x, state.tensors.get(f"reservoir.{i}"), mask)
            if reservoir is not None:
                after[f"reservoir.{i}"] = reservoir
        return self.final_norm(x), after

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight)
