"""Transformer for Hugging Face transformers: pre-norm blocks of grouped-query attention and SwiGLU.

Needs torch and transformers alone.  Modules have the names that the checkpoints' tensors have, so weights are loaded by
name.  What generation carries from token to token is a `State` of keys and values; padding never enters it, on
whichever side it stands.  The loss is that of the next token.
"""

# pyright: reportIncompatibleMethodOverride=false
# The methods of transformers that are overridden have other parameters in every version.

import inspect
from collections.abc import Mapping
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


class TransformerConfig(ModelSection):
    """`attention`: num_attention_heads, num_query_groups, rotary_base, qk_norm.  `ffn`: ffn_hidden_size."""

    model_type = "lfm_training_transformer"
    attribute_map = {"num_hidden_layers": "num_layers", "max_position_embeddings": "seq_length"}

    def __init__(
        self,
        vocab_size=50_257,
        vocab_size_multiple=256,
        hidden_size=384,
        num_layers=6,
        seq_length=512,
        layernorm_epsilon=1e-6,
        embedding_multiplier=1.0,
        logit_multiplier=1.0,
        untie_embeddings_and_output_weights=False,
        attention=None,
        ffn=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.vocab_size_multiple = vocab_size_multiple
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.seq_length = seq_length
        self.layernorm_epsilon = layernorm_epsilon
        self.embedding_multiplier = embedding_multiplier
        self.logit_multiplier = logit_multiplier
        self.untie_embeddings_and_output_weights = untie_embeddings_and_output_weights
        self.attention: Any = attention
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


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotated(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Rotary embedding of heads `[B, H, T, K]`: dimension j with j + K/2.  Su et al. 2021, arXiv 2104.09864."""
    size = x.shape[-1]
    exact = torch.float64 if x.device.type != "mps" else torch.float32
    j = torch.arange(size // 2, dtype=exact, device=x.device)
    angle = position[:, None, :, None].to(exact) * base ** (-2 * j / size)
    cos, sin = (part.to(torch.promote_types(x.dtype, torch.float32)) for part in (angle.cos(), angle.sin()))
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Attention(nn.Module):
    """Causal; query head i reads key/value head i // (heads / groups); no biases.  Ainslie et al. 2023."""

    def __init__(self, hidden_size: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.rotary_base, self.qk_norm = config["rotary_base"], config["qk_norm"]
        self.head_size = hidden_size // config["num_attention_heads"]
        width = config["num_query_groups"] * self.head_size
        self.q = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k = nn.Linear(hidden_size, width, bias=False)
        self.v = nn.Linear(hidden_size, width, bias=False)
        self.o = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self, u: Tensor, position: Tensor, past: tuple[Tensor, Tensor], visible: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`past`: keys and values `[B, G, S, K]` before `u`; `visible` `[B, 1, T, S + T]`, None: all that is before."""
        q, k, v = (part(u).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = (rotated(heads, position, self.rotary_base) for heads in (q, k))
        if self.qk_norm:
            q, k = (F.rms_norm(heads, heads.shape[-1:], eps=1e-6) for heads in (q, k))
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        causal, gqa = visible is None and q.shape[2] > 1, q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=gqa)
        return self.o(y.transpose(1, 2).flatten(2)), (k, v)


def visible_keys(tokens: Tensor, length: int) -> Tensor | None:
    """Which of the columns `[B, S]`, True where there is a token, each of the last `length` sees: `[B, 1, length, S]`.

    None: all before it and itself.  Padding sees itself, because a softmax over nothing is not defined.
    """
    columns = tokens.shape[1]
    if not torch.compiler.is_exporting() and bool(tokens.all()) and length in (1, columns):
        return None
    key = torch.arange(columns, device=tokens.device)
    query = key[columns - length :, None]
    return (((key <= query) & tokens[:, None]) | (key == query))[:, None]


class SwiGLU(nn.Module):
    """`down(SiLU(gate u) * (up u))`, no biases.  Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.up = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.down = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(u)) * self.up(u))


class Block(nn.Module):
    """`x += attention(norm(x)); x += mlp(norm(x))`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.layernorm_epsilon
        self.attention_norm, self.attention = RMSNorm(D, eps), Attention(D, config.attention)
        self.mlp_norm, self.mlp = RMSNorm(D, eps), SwiGLU(D, config.ffn["ffn_hidden_size"])


class TransformerForCausalLM(StatefulCausalLM):
    config_class = TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        stored_rows = -(-config.vocab_size // config.vocab_size_multiple) * config.vocab_size_multiple
        self.embedding = nn.Embedding(stored_rows, config.hidden_size)
        self.layers: Any = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        if config.untie_embeddings_and_output_weights:
            self.head = nn.Linear(config.hidden_size, stored_rows, bias=False)
        self.finish()

    def empty_state(self, batch: int) -> State:
        c, weight = self.config, self.embedding.weight
        groups, size = c.attention["num_query_groups"], c.hidden_size // c.attention["num_attention_heads"]
        nothing = weight.new_zeros(batch, groups, 0, size)
        tensors = {f"{name}.{layer}": nothing for layer in range(c.num_layers) for name in ("key", "value")}
        return State(0, tensors | {"tokens": torch.zeros(batch, 0, dtype=torch.bool, device=weight.device)})

    def advance(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        new = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        after = {"tokens": torch.cat((state["tokens"], new), 1)}
        # A token's position is the number of tokens before it, whatever padding there is.
        position = after["tokens"].long().cumsum(1)[:, -x.shape[1] :] - 1
        visible = visible_keys(after["tokens"], x.shape[1])
        x = x * self.config.embedding_multiplier
        for i, block in enumerate(self.layers):
            past = (state[f"key.{i}"], state[f"value.{i}"])
            y, kept = block.attention(block.attention_norm(x), position, past, visible)
            x, after[f"key.{i}"], after[f"value.{i}"] = x + y, *kept
            x = x + block.mlp(block.mlp_norm(x))
        return self.final_norm(x), after

    def logits(self, hidden: Tensor) -> Tensor:
        weight = self.head.weight if hasattr(self, "head") else self.embedding.weight
        return F.linear(hidden * self.config.logit_multiplier, weight[: self.config.vocab_size])
