"""The transformer by its equations: one document, one head and one query at a time; no shared code."""

import torch
from torch import Tensor


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * gain


def rotated(x: Tensor, position: int, base: float) -> Tensor:
    """Pairs (j, j + K/2) turned by position * base^(-2j / K)."""
    K, out = len(x), []
    for j in range(K):
        angle = torch.tensor(position * base ** (-2 * (j % (K // 2)) / K), dtype=torch.float64)
        partner = -x[j + K // 2] if j < K // 2 else x[j - K // 2]
        out.append(x[j] * angle.cos() + partner * angle.sin())
    return torch.stack(out)


def document_forward(w: dict[str, Tensor], config, ids: Tensor) -> Tensor:
    """Logits `[T, V]` of one document."""
    c, K = config, config.hidden_size // config.attention.num_attention_heads
    E, m = w["embedding.weight"], c.embedding_multiplier
    head = w["head.weight"] if c.untie_embeddings_and_output_weights else E
    keys: list[list[list[Tensor]]] = [[[] for _ in range(c.attention.num_query_groups)] for _ in range(c.num_layers)]
    values: list[list[list[Tensor]]] = [[[] for _ in range(c.attention.num_query_groups)] for _ in range(c.num_layers)]
    rows = []

    def normed(x: Tensor) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() if c.attention.qk_norm else x

    for t, token in enumerate(ids):
        x = m * E[token]
        for i in range(c.num_layers):
            p = f"layers.{i}.attention."
            u = rms(x, w[f"layers.{i}.attention_norm.weight"], c.layernorm_epsilon)
            k, v = (w[f"{p}{n}.weight"] @ u for n in "kv")
            for g in range(c.attention.num_query_groups):
                keys[i][g].append(normed(rotated(k.split(K)[g], t, c.attention.rotary_base)))
                values[i][g].append(v.split(K)[g])
            heads = []
            for h, q in enumerate((w[p + "q.weight"] @ u).split(K)):
                g = h // (c.attention.num_attention_heads // c.attention.num_query_groups)
                scores = torch.stack(keys[i][g]) @ normed(rotated(q, t, c.attention.rotary_base)) / K**0.5
                heads.append(scores.exp() / scores.exp().sum() @ torch.stack(values[i][g]))
            x = x + w[p + "o.weight"] @ torch.cat(heads)
            p = f"layers.{i}.mlp."
            u = rms(x, w[f"layers.{i}.mlp_norm.weight"], c.layernorm_epsilon)
            gate = w[p + "gate.weight"] @ u
            x = x + w[p + "down.weight"] @ (gate / (1 + (-gate).exp()) * (w[p + "up.weight"] @ u))
        rows.append(c.logit_multiplier * head[: c.vocab_size] @ rms(x, w["final_norm.weight"], c.layernorm_epsilon))
    return torch.stack(rows)


def batch_loss(w: dict[str, Tensor], config, rows: Tensor, lengths: list[list[int]]) -> Tensor:
    """Cross entropy summed over the labels of packed rows, in nats."""
    nats = torch.zeros((), dtype=torch.float64)
    for row, row_lengths in zip(rows, lengths, strict=True):
        for document in row.split(row_lengths):
            logits = document_forward(w, config, document)
            for t in range(len(document) - 1):
                nats = nats + logits[t].exp().sum().log() - logits[t, document[t + 1]]
    return nats
