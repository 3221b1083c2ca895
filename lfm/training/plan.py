"""What a run will take, before anything is allocated: exact counts, FLOPs, and an estimate of memory."""

from lfm.layers.loss import CHUNK_ELEMENTS
from lfm.layers.moe import MoEConfig
from lfm.layout.layout import Layout
from lfm.models.lfm import LFMConfig
from lfm.training.run import RunConfig
from lfm.training.schedule import highest_factor, warmup_of

_GIB = 2**30


def _half(run: RunConfig) -> bool:
    """Whether the plan is for weights of two bytes: `auto` plans for a GPU, wherever the plan is made."""
    t = run.training
    return t.dtype in ("bfloat16", "float16") or (t.dtype == "auto" and t.device != "cpu")


def _weights(run: RunConfig) -> str:
    """The dtype of the plan, in words."""
    if run.training.dtype == "float16":
        return "float16"
    return "bfloat16, as on a GPU" if _half(run) else "float32"


def memory_estimate(run: RunConfig, layout: Layout) -> dict[str, float]:
    """Bytes by purpose for one process of the pipeline stage that needs the most on its device.

    Weights, gradients and optimizer state are exact, but for the engines' padding and communication buffers and the
    layers that ZeRO-3 gathers.  Activations, of LFM alone, are an estimate: the tensors that autograd keeps for the
    micro-batches in flight, counted per layer from the shapes in the forward pass.  LFM-3B on one H200, with one row
    and with two a micro-batch: 71.5 and 88.9 GiB estimated, 68.9 and 85.6 measured.
    """
    stages = (stage_memory(run, layout, rank) for rank in range(layout.pipeline))
    return max(stages, key=lambda memory: sum(_on_device(run, memory, layout).values()))


def _on_device(run: RunConfig, memory: dict[str, float], layout: Layout) -> dict[str, float]:
    offloaded = ("fp32 masters", run.optimizer.state_title) if layout.offload_optimizer else ()
    return {name: value for name, value in memory.items() if name not in offloaded}


def stage_memory(run: RunConfig, layout: Layout, rank: int) -> dict[str, float]:
    """Bytes by purpose for one process of pipeline stage `rank`, offloaded or not."""
    m, half = run.model, _half(run)
    size = 2 if half else 4
    first, last = rank == 0, rank == layout.pipeline - 1

    layers = [m.layer_cost(layer) for chunk in layout.stage_chunks(rank) for layer in chunk]
    # Tied weights are one matrix only where embedding and head are on the same stage.
    vocabularies = 1 if first and last and m.is_tied else first + last
    dense = sum(layer.sharded / layout.tensor + layer.replicated for layer in layers)
    dense += vocabularies * m.padded_vocab_size * m.hidden_size / layout.tensor + last * m.norm_parameters
    if not m.is_tied:
        dense += last * (m.head_parameters - m.vocab_size * m.hidden_size)  # a bias
    experts = sum(layer.experts for layer in layers) / (layout.expert * layout.expert_tensor)

    def held(sharding_stage: int) -> float:
        """Elements of what ZeRO splits over the data ranks from this stage on."""
        split = layout.zero_stage >= sharding_stage
        return dense / layout.data + experts / layout.expert_data if split else dense + experts

    memory = {
        "weights": held(3) * size + sum(layer.frozen for layer in layers) * 4,
        "fp32 gradients": held(2) * 4,
        "fp32 masters": held(1) * 4 if half or layout.zero_stage else 0,
        run.optimizer.state_title: held(1) * run.optimizer.bytes_per_parameter,
    }
    return memory | _activations(run, m, layout, rank) if isinstance(m, LFMConfig) else memory


def _activations(run: RunConfig, m: LFMConfig, layout: Layout, rank: int) -> dict[str, float]:
    t, tp, D, half = run.training, layout.tensor, m.hidden_size, _half(run)
    size, last = 2 if half else 4, rank == layout.pipeline - 1
    num_layers = sum(len(chunk) for chunk in layout.stage_chunks(rank))
    tokens = t.micro_batch_size * m.seq_length
    residual = 2 * D  # stream and norm output
    # Queries, keys and values of the projection, queries and keys rotated, attention's output, the projection's.
    kv = 2 * m.attention.num_query_groups * m.head_size if m.attention is not None else 0
    attention = residual + (D + kv) + (D + kv / 2) + 2 * D if m.attention is not None else 0
    if isinstance(m.ffn, MoEConfig):
        ffn = residual + m.ffn.moe_router_topk * _expert_row(m.hidden_size, m.ffn) + D
    else:
        ffn = residual + 3 * m.ffn.ffn_hidden_size + D
    # Tensor ranks split everything but the recurrence, which each of them runs whole.
    width = m.reservoir.num_reservoirs * m.reservoir.reservoir_size * tp if m.reservoir is not None else 2 * D
    liquid = (residual + 3 * width) * len(m.liquid_layers) / m.num_layers
    kept = {
        "none": attention + ffn + liquid,
        "selective": attention + 2 * D,
        "full": D,
    }[t.recompute]
    again = {"none": 0, "selective": ffn + liquid, "full": attention + ffn + liquid}[t.recompute]
    in_flight = _in_flight(layout, rank)
    chunk_logits = min(CHUNK_ELEMENTS["cuda" if half else "cpu"], tokens * m.vocab_size / tp)
    waiting = _waiting_elements(run, m, layout, rank) + last * _waiting_logits(run, m, layout)
    return {
        "activations (estimate)": tokens * size / tp * (kept * num_layers * in_flight + again),
        "loss (estimate)": last * (chunk_logits * (size if half else 4 + size) + m.vocab_size * D / tp * 4),
        **({"waiting weight gradients (estimate)": tokens * size / tp * waiting} if waiting else {}),
    }


def _waiting_elements(run: RunConfig, m: LFMConfig, layout: Layout, rank: int) -> float:
    """A token's, in inputs and output gradients of the products whose weights' gradients wait."""
    if run.training.recompute != "none":
        return 0
    D = m.hidden_size
    # What goes into columns and comes out of rows is whole on every tensor rank, while the rest is cut.
    whole = D * layout.tensor
    attention = 2 * whole + 2 * D + 2 * m.attention.num_query_groups * m.head_size if m.attention is not None else 0
    if isinstance(m.ffn, MoEConfig):
        rows = 2 * (whole if layout.expert == 1 else D)
        ffn = m.ffn.moe_router_topk * (rows + 3 * m.ffn.moe_ffn_hidden_size)
    else:
        ffn = 2 * whole + 3 * m.ffn.ffn_hidden_size
    layers = max(len(chunk) for chunk in layout.stage_chunks(rank))
    return layout.waiting_passes * layers * (attention + ffn)


def _waiting_logits(run: RunConfig, m: LFMConfig, layout: Layout) -> float:
    """A token's, where the head's weight gradient waits: of the pass itself, and of those kept."""
    waits = layout.pipeline > 1 and run.training.recompute == "none" and not m.is_tied
    return (1 + layout.waiting_passes) * m.vocab_size if waits else 0


def _in_flight(layout: Layout, rank: int) -> float:
    """Micro-batches whose activations stage `rank` holds: 1F1B starts as many forward passes as there are stages
    behind; interleaved, two chunks for each and a whole round."""
    behind, vp = layout.pipeline - rank - 1, layout.virtual_pipeline
    started = behind + 1 if vp == 1 else (2 * behind + (vp - 1) * layout.pipeline + 1) / vp
    return min(started, layout.num_micro_batches)


def _expert_row(hidden_size: int, moe: MoEConfig) -> int:
    """Elements kept for one row of an expert: input, gate and up, their gradient or activation, output."""
    return 2 * hidden_size + 4 * moe.moe_ffn_hidden_size


def worst_routing_bytes(run: RunConfig, layout: Layout) -> float:
    """What one process would hold beyond the estimate if every token near it chose its experts; 0 where capacity
    drops them, and where all experts are on every process: then rows are as many under any routing."""
    m, t = run.model, run.training
    assert isinstance(m, LFMConfig)
    if m.moe is None or m.moe.moe_capacity_factor is not None:
        return 0.0
    k, here = m.moe.moe_router_topk, m.moe.num_moe_experts // layout.expert
    rows = t.micro_batch_size * m.seq_length / layout.tensor * (layout.expert * min(k, here) - k)
    size = 2 if _half(run) else 4
    layers = [len([layer for chunk in layout.stage_chunks(r) for layer in chunk]) for r in range(layout.pipeline)]
    # With recomputation, of one layer at a time.
    kept = max(n * _in_flight(layout, r) for r, n in enumerate(layers)) if t.recompute == "none" else 1
    return rows * size * _expert_row(m.hidden_size, m.moe) * kept


def _worst_routing(run: RunConfig, layout: Layout) -> str:
    more = worst_routing_bytes(run, layout)
    if not more:
        return "under the worst routing: no more"
    return f"under the worst routing, every token to the experts of one process: {more / _GIB:.1f} GiB more"


def peak_rate(run: RunConfig) -> str:
    """The highest learning rate, in words: `optimizer.lr` is at another width, or a warm-up ends late."""
    optimizer, depth_rate = run.optimizer, getattr(run.model, "depth_rate", 1.0)
    peak = optimizer.peak_lr(run.model.hidden_size) * highest_factor(run.schedule, run.training.steps)
    width = "" if optimizer.lr_at_width is None else f" (lr {optimizer.lr:g} at width {optimizer.lr_at_width})"
    depth = "" if depth_rate == 1.0 else f", {depth_rate * peak:.3g} of the matrices that write to the stream"
    return f"peak learning rate: {peak:.3g}{width}{depth}"


def short_warmup(run: RunConfig) -> str | None:
    """What is wrong where a run ends before its warm-up does; None: it does not."""
    steps = run.training.steps
    warmup = warmup_of(run.schedule, steps)
    if warmup <= steps:
        return None
    return (
        f"the warm-up of {warmup:,} steps does not end in training.steps={steps}, and the learning rate reaches "
        f"{highest_factor(run.schedule, steps):.0%} of its peak; set schedule.warmup_steps"
    )


def plan(run: RunConfig, layout: Layout) -> str:
    """The text of `--dry-run`."""
    m, t = run.model, run.training
    counts = m.count_parameters()
    memory = memory_estimate(run, layout)
    tokens = t.global_batch_size * m.seq_length
    flops = m.flops_per_token()
    device = _on_device(run, memory, layout)
    where = "one process" if layout.pipeline == 1 else "one process of the fullest stage"
    host = sum(memory.values()) - sum(device.values())
    stored = (4 + run.optimizer.bytes_per_parameter) * (counts.trainable + counts.padding)
    lines = [
        f"layout {layout.name}: {layout.describe()}",
        counts.report(),
        f"FLOPs: {flops / 1e9:.2f} GFLOP per token at {m.seq_length} (forward + backward, causal attention)",
        f"work: {tokens:,} tokens per optimizer step, {tokens * t.steps:,} in {t.steps:,} steps, "
        f"{flops * tokens * t.steps:.3g} FLOP",
        peak_rate(run),
        *filter(None, [short_warmup(run)]),
        f"memory of {where}, weights in {_weights(run)}: "
        + ", ".join(f"{name} {value / _GIB:.1f}" for name, value in device.items()),
        f"memory in all: {sum(device.values()) / _GIB:.1f} GiB{'' if m.kind == 'lfm' else ' and activations'}"
        + (f", on the host {host / _GIB:.1f} GiB" if host else ""),
        *([_worst_routing(run, layout)] if m.kind == "lfm" else []),
        f"one checkpoint: {stored / _GIB:.1f} GiB",
    ]
    return "\n".join(lines)
