"""LFM for Hugging Face transformers: grouped-query attention, liquid layers in every n-th layer, experts or SwiGLU.

Needs torch and transformers alone.  Modules have the names that the checkpoints' tensors have, so weights are loaded by
name.  What generation carries from token to token is a `State`: keys and values, which grow, and liquid states, which
do not; padding never enters it, on whichever side it stands.  The loss is that of the next token, without the routers'
balance losses, and experts are dropless.
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


class LFMConfig(ModelSection):
    """`attention`: num_attention_heads, num_query_groups, rotary_base, qk_norm; or None.  `liquid`: of kind reservoir
    or diagonal, in layers 0, interval, 2 interval, ...; or None.  `ffn`: of kind moe or swiglu.
    """

    model_type = "lfm_training_lfm"
    attribute_map = {"num_hidden_layers": "num_layers", "max_position_embeddings": "seq_length"}

    def __init__(
        self,
        vocab_size=128_256,
        vocab_size_multiple=1024,
        hidden_size=3072,
        num_layers=20,
        seq_length=8192,
        layernorm_epsilon=1e-5,
        embedding_multiplier=1.0,
        logit_multiplier=1.0,
        untie_embeddings_and_output_weights=False,
        attention=None,
        liquid=None,
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
        self.liquid: Any = liquid
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


class Reservoir(nn.Module):
    """A recurrent matrix: frozen, or trained where `connections` has one."""

    connections: Tensor

    def __init__(self, size: int, trained: bool) -> None:
        super().__init__()
        self.trained = trained
        if trained:
            self.weight = nn.Parameter(torch.zeros(size, size))
            self.register_buffer("connections", torch.zeros(size, size, dtype=torch.bool))
        else:
            self.register_buffer("weight", torch.zeros(size, size, dtype=torch.float32))

    def matrix(self) -> Tensor:
        return wide(self.weight * self.connections if self.trained else self.weight)


class Liquid(nn.Module):
    """`W_out h + b_out` with `h_t = (1-a) h_{t-1} + a tanh(R h_{t-1} + s_in (W_in u_t + b_in))` for each reservoir."""

    def __init__(self, hidden_size: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.num_reservoirs, self.size = config["num_reservoirs"], config["reservoir_size"]
        self.leak_rate, self.input_scaling = config["leak_rate"], config["input_scaling"]
        width = self.num_reservoirs * self.size
        self.input, self.output = nn.Linear(hidden_size, width), nn.Linear(width, hidden_size)
        trained = config["train_reservoir"]
        self.reservoirs: Any = nn.ModuleList(Reservoir(self.size, trained) for _ in range(self.num_reservoirs))

    def forward(self, u: Tensor, state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs `[B, T, D]`, and the states `[B, R, N]` after the last token, from those before the first."""
        drive = wide(self.input_scaling * self.input(u)).unflatten(-1, (self.num_reservoirs, self.size))
        weight = torch.stack([reservoir.matrix() for reservoir in self.reservoirs])
        a = self.leak_rate

        def step(h: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
            return ((1 - a) * h[0] + a * torch.tanh(torch.einsum("rnm,brm->brn", weight, h[0]) + x),)

        states, (state,) = over_time(step, (state,), (drive,), mask)
        return self.output(states.flatten(-2).to(u.dtype)), state


class Balance(nn.Module):
    """What the router's choice adds to its logits, `drift - mean`, as far as training kept it."""

    def __init__(self, num_experts: int, config: dict[str, Any]) -> None:
        super().__init__()
        has_bias = config["kind"] == "bias"
        kept = {"drift": has_bias, "mean": has_bias and config["mean_decay"] is not None}
        kept["shares"] = config["scope"] == "step"  # of training alone
        for name, is_kept in kept.items():
            if is_kept:
                self.register_buffer(name, torch.zeros(num_experts, dtype=torch.float32))

    def bias(self) -> Tensor | float:
        return getattr(self, "drift", 0.0) - getattr(self, "mean", 0.0)


class Router(nn.Module):
    """Logits of experts, in at least float32; no nn.Linear, so that no adapter takes it for one."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def forward(self, u: Tensor) -> Tensor:
        return F.linear(wide(u), wide(self.weight))


class MoE(nn.Module):
    """`sum_i w_i expert_i(u)` over the chosen experts, w a softmax of their logits; dropless."""

    def __init__(self, hidden_size: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.top_k, count = config["moe_router_topk"], config["num_moe_experts"]
        self.router = Router(hidden_size, count)
        self.balance = Balance(count, config["balance"])
        self.experts = nn.ModuleList(SwiGLU(hidden_size, config["moe_ffn_hidden_size"]) for _ in range(count))

    def forward(self, u: Tensor) -> Tensor:
        rows = u.flatten(0, 1)
        logits = self.router(rows)
        ranked, y = logits + self.balance.bias(), torch.zeros_like(rows)
        if torch.compiler.is_exporting():
            # ONNX has no stable sort, but the first of equal ones in its TopK; and every expert reads every token,
            # because how many each has is not known.
            chosen = ranked.topk(self.top_k, dim=-1).indices
            share = torch.zeros_like(logits).scatter(-1, chosen, logits.gather(-1, chosen).softmax(-1)).to(rows.dtype)
            for e, expert in enumerate(self.experts):
                y = y + share[:, e, None] * expert(rows)
            return y.view_as(u)
        # Stable: which of two equal ones comes first is then defined.
        chosen = ranked.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        weights = logits.gather(-1, chosen).softmax(-1)
        for e, expert in enumerate(self.experts):
            row, place = (chosen == e).nonzero(as_tuple=True)
            y = y.index_add(0, row, (weights[row, place, None].to(rows.dtype)) * expert(rows[row]))
        return y.view_as(u)


class Block(nn.Module):
    """`x += Attention; x += Liquid (every n-th layer); x += MoE or SwiGLU`, each of the normalized x."""

    def __init__(self, config: LFMConfig, layer: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.layernorm_epsilon
        self.attends, self.has_liquid = config.attention is not None, layer in liquid_layers(config)
        self.routes = config.ffn["kind"] == "moe"
        self.liquid_is_normed_behind = self.has_liquid and config.liquid.get("norm") == "post"
        if self.attends:
            self.attention_norm, self.attention = RMSNorm(D, eps), Attention(D, config.attention)
        if self.has_liquid:
            is_diagonal = config.liquid["kind"] == "diagonal"
            self.liquid_norm = RMSNorm(D, eps)
            self.liquid = DiagonalLiquid(D, config.liquid["delta_min"]) if is_diagonal else Liquid(D, config.liquid)
        if self.routes:
            self.moe_norm, self.moe = RMSNorm(D, eps), MoE(D, config.ffn)
        else:
            self.mlp_norm, self.mlp = RMSNorm(D, eps), SwiGLU(D, config.ffn["ffn_hidden_size"])

    def read_liquid(self, x: Tensor, state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.liquid_is_normed_behind:
            y, state = self.liquid(x, state, mask)
            return self.liquid_norm(x + y), state
        y, state = self.liquid(self.liquid_norm(x), state, mask)
        return x + y, state

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + (self.moe(self.moe_norm(x)) if self.routes else self.mlp(self.mlp_norm(x)))


def liquid_layers(config: Any) -> range:
    return range(0, config.num_layers, config.liquid["interval"]) if config.liquid is not None else range(0)


class LFMForCausalLM(StatefulCausalLM):
    config_class = LFMConfig
    fp32_modules = ("balance", "delta.bias")

    def __init__(self, config: LFMConfig) -> None:
        super().__init__(config)
        if config.liquid is not None and config.liquid.get("train_reservoir") is False:
            self.fp32_modules = (*self.fp32_modules, "reservoirs")
        stored_rows = -(-config.vocab_size // config.vocab_size_multiple) * config.vocab_size_multiple
        self.embedding = nn.Embedding(stored_rows, config.hidden_size)
        self.layers: Any = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        if config.untie_embeddings_and_output_weights:
            self.head = nn.Linear(config.hidden_size, stored_rows, bias=False)
        self.finish()

    def empty_state(self, batch: int) -> State:
        c, weight = self.config, self.embedding.weight
        tensors = {}
        if c.attention is not None:
            groups, size = c.attention["num_query_groups"], c.hidden_size // c.attention["num_attention_heads"]
            nothing = weight.new_zeros(batch, groups, 0, size)
            tensors = {f"{name}.{layer}": nothing for layer in range(c.num_layers) for name in ("key", "value")}
            tensors["tokens"] = torch.zeros(batch, 0, dtype=torch.bool, device=weight.device)
        if c.liquid is not None:
            is_diagonal = c.liquid["kind"] == "diagonal"
            shape = (c.hidden_size,) if is_diagonal else (c.liquid["num_reservoirs"], c.liquid["reservoir_size"])
            zeros = wide(weight).new_zeros(batch, *shape)
            tensors |= {f"liquid.{layer}": zeros for layer in liquid_layers(c)}
        return State(0, tensors)

    def advance(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        after: dict[str, Tensor] = {}
        position = visible = None
        if self.config.attention is not None:
            new = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
            after["tokens"] = torch.cat((state["tokens"], new), 1)
            # A token's position is the number of tokens before it, whatever padding there is.
            position = after["tokens"].long().cumsum(1)[:, -x.shape[1] :] - 1
            visible = visible_keys(after["tokens"], x.shape[1])
        x = x * self.config.embedding_multiplier
        for i, block in enumerate(self.layers):
            if block.attends:
                past = (state[f"key.{i}"], state[f"value.{i}"])
                y, kept = block.attention(block.attention_norm(x), position, past, visible)
                x, after[f"key.{i}"], after[f"value.{i}"] = x + y, *kept
            if block.has_liquid:
                x, after[f"liquid.{i}"] = block.read_liquid(x, state[f"liquid.{i}"], mask)
            x = block.feed_forward(x)
        return self.final_norm(x), after

    def logits(self, hidden: Tensor) -> Tensor:
        weight = self.head.weight if hasattr(self, "head") else self.embedding.weight
        return F.linear(hidden * self.config.logit_multiplier, weight[: self.config.vocab_size])
