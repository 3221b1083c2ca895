"""What a run will take, before anything is allocated: exact counts, FLOPs, and an estimate of memory."""

from lfm.training.run import RunConfig

_GIB = 2**30


def _half(run: RunConfig) -> bool:
    """Whether the plan is for bf16 weights: `auto` plans for a GPU, wherever the plan is made."""
    t = run.training
    return t.dtype == "bfloat16" or (t.dtype == "auto" and t.device != "cpu")


def memory_estimate(run: RunConfig) -> dict[str, float]:
    """Bytes by purpose for the local engine.

    Weights, gradients and optimizer state are exact.  Activations are an estimate: the tensors that autograd keeps for
    one micro-batch, counted per layer from the shapes in the forward pass.
    """
    m, t = run.model, run.training
    half = _half(run)
    size = 2 if half else 4
    stored = m.count_parameters().trainable + m.count_parameters().padding
    tokens = t.micro_batch_size * m.seq_length
    D, k, F = m.hidden_size, m.moe_router_topk, m.moe_ffn_hidden_size
    kv = 2 * m.num_query_groups * m.head_size
    residual = 2 * D  # stream and norm output
    attention = (
        residual + (D + kv) * 3 + 2 * D
    )  # q k v before and after rotary and laid out, attention out, projection in
    moe = residual + k * (D + 2 * F + 2 * F + D) + D
    width = m.liquid.num_reservoirs * m.liquid.reservoir_size if m.liquid else 0
    liquid = (residual + 3 * width) * len(m.liquid_layers) / m.num_layers
    kept = {
        "none": attention + moe + liquid,
        "selective": attention + 2 * D,
        "full": D,
    }[t.recompute]
    again = {"none": 0, "selective": moe + liquid, "full": attention + moe + liquid}[t.recompute]
    chunk_logits = min(2**29 if half else 2**24, tokens * m.vocab_size)
    return {
        "weights": stored * size + m.count_parameters().frozen * 4,
        "fp32 gradients": stored * 4,
        "fp32 masters": stored * 4 if half else 0,
        "AdamW moments": stored * 8,
        "activations (estimate)": tokens * size * (kept * m.num_layers + again),
        "loss (estimate)": chunk_logits * (4 + size) + m.vocab_size * D * 4,
    }


def plan(run: RunConfig) -> str:
    """The text of `--dry-run`."""
    m, t = run.model, run.training
    counts, memory = m.count_parameters(), memory_estimate(run)
    tokens = t.global_batch_size * m.seq_length
    flops = m.flops_per_token()
    total = sum(memory.values())
    lines = [
        counts.report(),
        f"FLOPs: {flops / 1e9:.2f} GFLOP per token at {m.seq_length} (forward + backward, causal attention)",
        f"work: {tokens:,} tokens per optimizer step, {tokens * t.steps:,} in {t.steps:,} steps, "
        f"{flops * tokens * t.steps:.3g} FLOP",
        f"memory of one process, weights in {'bfloat16, as on a GPU' if _half(run) else 'float32'}: "
        + ", ".join(f"{name} {value / _GIB:.1f}" for name, value in memory.items()),
        f"memory in all: {total / _GIB:.1f} GiB",
        f"one checkpoint: {12 * (counts.trainable + counts.padding) / _GIB:.1f} GiB",
    ]
    return "\n".join(lines)
