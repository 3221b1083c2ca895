"""LFM by its equations: one row, one document, one token at a time where that is clearest; float64; no shared code."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def rotated(x: Tensor, position: int, base: float) -> Tensor:
    half = x.shape[-1] // 2
    angle = position * base ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def document_forward(w: dict[str, Tensor], config, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits `[T, V]` of one document and, per layer, the router probabilities' logits `[T, E]`."""
    c, T = config, len(ids)
    x = c.embedding_multiplier * w["embedding.weight"][ids]
    router_logits = []
    for i in range(c.num_layers):
        p = f"layers.{i}."
        u = rms(x, w[p + "attention_norm.weight"], c.layernorm_epsilon)
        x = x + attention({n: w[f"{p}attention.{n}.weight"] for n in "qkvo"}, c, u)
        if c.liquid is not None and i % c.liquid.interval == 0:
            x = liquid(w, p, c, x)
        u = rms(x, w[p + "moe_norm.weight"], c.layernorm_epsilon)
        logits = u @ w[p + "moe.router.weight"].T
        router_logits.append(logits)
        rows = []
        for t in range(T):
            probability = logits[t].softmax(0)
            experts = (logits[t] + bias_of(w, i)).topk(c.ffn.moe_router_topk).indices
            top = probability[experts]
            y = torch.zeros_like(u[t])
            for weight, e in zip(top / top.sum(), experts.tolist(), strict=True):
                gate, up, down = (w[f"{p}moe.experts.{e}.{n}.weight"] for n in ("gate", "up", "down"))
                y = y + weight * (down @ (F.silu(gate @ u[t]) * (up @ u[t])))
            rows.append(y)
        x = x + torch.stack(rows)
    head = w["head.weight" if c.untie_embeddings_and_output_weights else "embedding.weight"][: c.vocab_size]
    return c.logit_multiplier * rms(x, w["final_norm.weight"], c.layernorm_epsilon) @ head.T, router_logits


def bias_of(w: dict[str, Tensor], layer: int) -> Tensor:
    """What the choice of experts adds to the router's logits."""
    drift, mean = (w.get(f"layers.{layer}.moe.balance.{name}", torch.zeros(())) for name in ("drift", "mean"))
    return (drift - mean).detach()


def attention(w: dict[str, Tensor], c, u: Tensor) -> Tensor:
    T, K = len(u), c.head_size
    q, k, v = (torch.stack([(w[n] @ u[t]).view(-1, K) for t in range(T)]) for n in "qkv")
    q, k = (torch.stack([rotated(x[t], t, c.attention.rotary_base) for t in range(T)]) for x in (q, k))
    if c.attention.qk_norm:
        q, k = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    group = c.attention.num_attention_heads // c.attention.num_query_groups
    rows = []
    for t in range(T):
        heads = []
        for h in range(c.attention.num_attention_heads):
            weight = (k[: t + 1, h // group] @ q[t, h] / K**0.5).softmax(0)
            heads.append(weight @ v[: t + 1, h // group])
        rows.append(w["o"] @ torch.cat(heads))
    return torch.stack(rows)


def liquid(w: dict[str, Tensor], p: str, c, x: Tensor) -> Tensor:
    q, N, gain = c.liquid, c.liquid.reservoir_size, w[p + "liquid_norm.weight"]
    u = rms(x, gain, c.layernorm_epsilon) if q.norm == "pre" else x
    drive = u @ w[p + "liquid.input.weight"].T + w[p + "liquid.input.bias"]
    drive = drive * (q.input_scaling if q.norm == "pre" else 1.0)
    states = [torch.zeros(q.num_reservoirs * N, dtype=x.dtype)]
    for t in range(len(x)):
        z = torch.cat([w[f"{p}liquid.reservoirs.{j}.weight"] @ states[-1].split(N)[j] for j in range(q.num_reservoirs)])
        states.append((1 - q.leak_rate) * states[-1] + q.leak_rate * torch.tanh(z + drive[t]))
    y = torch.stack(states[1:]) @ w[p + "liquid.output.weight"].T + w[p + "liquid.output.bias"]
    return x + y if q.norm == "pre" else rms(x + y, gain, c.layernorm_epsilon)


def step_loss(w: dict[str, Tensor], config, rows: Tensor, lengths: list[list[int]]) -> Tensor:
    """The differentiated loss of one optimizer step: CE over its labels, balance per row, z per token."""
    c = config
    nats, labels, balance, z = 0.0, 0, 0.0, 0.0
    for row, row_lengths in zip(rows, lengths, strict=True):
        router: list[list[Tensor]] = [[] for _ in range(c.num_layers)]
        for document in row.split(row_lengths):
            logits, router_logits = document_forward(w, c, document)
            nats = nats + F.cross_entropy(logits[:-1], document[1:], reduction="sum")
            labels += len(document) - 1
            for layer, found in enumerate(router_logits):
                router[layer].append(found)
        for layer, found in enumerate(map(torch.cat, router)):
            probability = found.softmax(-1)
            share = torch.zeros(c.ffn.num_moe_experts, dtype=torch.float64)
            for expert in (found + bias_of(w, layer)).topk(c.ffn.moe_router_topk).indices.flatten().tolist():
                share[expert] += 1 / (len(row) * c.ffn.moe_router_topk)
            if c.ffn.balance.scope == "step":
                share = w[f"layers.{layer}.moe.balance.shares"].detach()
            balance = balance + c.ffn.num_moe_experts * (share * probability.mean(0)).sum() / c.num_layers
            z = z + found.logsumexp(-1).square().mean() / c.num_layers
    return nats / labels + (c.ffn.balance.coeff * balance + c.ffn.moe_z_loss_coeff * z) / len(rows)
