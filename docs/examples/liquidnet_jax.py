"""LiquidNet in JAX: an exported model continues a text, greedily.

    pip install jax safetensors tokenizers
    python docs/examples/liquidnet_jax.py MODEL "Once upon a time" [NUM_TOKENS]

MODEL is a file of `lfm export --format safetensors`, or a folder of `--format hf`.  The equations are those of
docs/families/liquidnet.md; the recurrence is an associative scan over the tokens.  Everything is in float32.  A text is
one document; there is no packing, no gradient and no training here.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from safetensors import safe_open
from safetensors.flax import load_file
from tokenizers import Tokenizer

# GPUs and TPUs multiply float32 in less than float32 otherwise.
jax.config.update("jax_default_matmul_precision", "highest")


class Config(NamedTuple):
    """Keys of the run's `model:`, or of config.json, of which the forward pass needs to know."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    delta_min: float
    layernorm_epsilon: float


def load(place: Path) -> tuple[Config, dict[str, jax.Array], Tokenizer]:
    """The configuration, the weights by name and the tokenizer of an exported model."""
    if place.is_dir():
        files = sorted(place.glob("model*.safetensors"))
        tree = json.loads((place / "config.json").read_text(encoding="utf-8"))
        kind = tree["model_type"].removeprefix("lfm_training_")
        tokenizer = (place / "tokenizer.json").read_text(encoding="utf-8")
    else:
        files = [place]
        with safe_open(str(place), framework="np") as opened:
            metadata = opened.metadata() or {}
        if "lfm.model" not in metadata:
            sys.exit(f"error: {place} has no model's configuration; give a file of `lfm export --format safetensors`")
        tree, tokenizer = json.loads(metadata["lfm.model"]), metadata["lfm.tokenizer"]
        kind = tree["kind"]
    if kind != "liquidnet":
        sys.exit(f"error: {place} is of kind {kind}, and this example reads liquidnet; export a run of that kind")
    weights = {name: x.astype(jnp.float32) for file in files for name, x in load_file(str(file)).items()}
    return Config(*(tree[key] for key in Config._fields)), weights, Tokenizer.from_str(tokenizer)


def empty_state(config: Config, batch: int) -> jax.Array:
    """`[L, B, D]`, before the first token."""
    return jnp.zeros((config.num_layers, batch, config.hidden_size))


@partial(jax.jit, static_argnums=0)
def forward(
    config: Config, weights: dict[str, jax.Array], ids: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits `[B, T, V]` of ids `[B, T]` that follow the tokens of `state`, and the state `[L, B, D]` after them."""
    scale, eps, after = (2 * config.num_layers) ** -0.5, config.layernorm_epsilon, []
    embedding = weights["embedding.weight"]
    x = embedding[ids]
    for layer in range(config.num_layers):
        w = {name: weights[f"layers.{layer}.{name}"] for name in NAMES}
        z = rms_norm(x, w["liquid_norm.weight"], eps)
        v = jnp.tanh(z @ w["liquid.value.weight"].T)
        delta = jax.nn.softplus(z @ w["liquid.delta.weight"].T + w["liquid.delta.bias"]) + config.delta_min
        h = leaky_scan(delta, v, state[layer])
        after.append(h[:, -1])
        x = x + scale * (jax.nn.sigmoid(z @ w["liquid.gate.weight"].T) * h) @ w["liquid.output.weight"].T
        z = rms_norm(x, w["mlp_norm.weight"], eps)
        inner = jax.nn.silu(z @ w["mlp.gate.weight"].T) * (z @ w["mlp.up.weight"].T)
        x = x + scale * inner @ w["mlp.down.weight"].T
    x = rms_norm(x, weights["final_norm.weight"], eps)
    return x @ embedding[: config.vocab_size].T, jnp.stack(after)


NAMES = (
    *("liquid_norm.weight", "liquid.value.weight", "liquid.delta.weight", "liquid.delta.bias", "liquid.gate.weight"),
    *("liquid.output.weight", "mlp_norm.weight", "mlp.gate.weight", "mlp.up.weight", "mlp.down.weight"),
)
"""Of a layer's tensors; matrices are `[out, in]`."""


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def leaky_scan(delta: jax.Array, v: jax.Array, start: jax.Array) -> jax.Array:
    """`h_t = exp(-delta_t) h_{t-1} + (1 - exp(-delta_t)) v_t`, all `[B, T, D]`, from `start [B, D]`."""
    keep, add = jnp.exp(-delta), -jnp.expm1(-delta) * v
    add = add.at[:, 0].add(keep[:, 0] * start)

    def after(first, second):
        """Two maps `h -> keep h + add`, one behind the other."""
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(after, (keep, add), axis=1)[1]


def continuation(config: Config, weights: dict[str, jax.Array], prompt: list[int], num_tokens: int) -> list[int]:
    """The ids that follow a prompt of at least one, each the likeliest."""
    logits, state = forward(config, weights, jnp.array([prompt]), empty_state(config, 1))
    made = [int(logits[0, -1].argmax())]
    while len(made) < num_tokens:
        logits, state = forward(config, weights, jnp.array([made[-1:]]), state)
        made.append(int(logits[0, -1].argmax()))
    return made


def main() -> None:
    if len(sys.argv) not in (3, 4):
        sys.exit('usage: liquidnet_jax.py MODEL "TEXT" [NUM_TOKENS]')
    config, weights, tokenizer = load(Path(sys.argv[1]))
    tokenizer.encode_special_tokens = True  # their names in a text are ordinary text, as in training
    prompt = tokenizer.encode(sys.argv[2]).ids
    if not prompt:
        sys.exit("error: the text has no tokens; give some to be continued")
    made = continuation(config, weights, prompt, int(sys.argv[3]) if len(sys.argv) == 4 else 50)
    print(tokenizer.decode(prompt + made, skip_special_tokens=False))


if __name__ == "__main__":
    main()
