"""What `--dry-run` says one process holds, against sums made by hand from the counts of the model."""

import pytest

from lfm.layout.layout import Layout, check_layout
from lfm.training.plan import memory_estimate, plan, stage_memory, worst_routing_bytes
from lfm.training.run import RunConfig
from tests.training.tiny_run import ROOT

PARALLEL = {"DP4": [], "EP4": ["expert=4"], "TP2": ["tensor=2", "sequence_parallel=true"], "PP2": ["pipeline=2"]}


def planned(*overrides: str, world: int = 4, config: str = "lfm_3b") -> tuple[RunConfig, Layout]:
    run = RunConfig.load(ROOT / f"configs/{config}.yaml", overrides)
    batch = dict(global_batch_size=run.training.global_batch_size, micro_batch_size=run.training.micro_batch_size)
    return run, check_layout(run.model, run.parallel, world, **batch)


def with_layout(name: str, zero_stage: int = 1, *overrides: str) -> tuple[RunConfig, Layout]:
    keys = [f"parallel.{key}" for key in (*PARALLEL[name], f"zero_stage={zero_stage}")]
    return planned(*keys, *overrides)


def test_one_process_holds_everything():
    run, layout = planned(world=1)
    counts = run.model.count_parameters()
    stored = counts.trainable + counts.padding
    memory = memory_estimate(run, layout)
    assert memory["weights"] == 2 * stored + 4 * counts.frozen
    assert (memory["fp32 gradients"], memory["fp32 masters"], memory["AdamW moments"]) == (
        4 * stored,
        4 * stored,
        8 * stored,
    )


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_each_zero_stage_divides_one_thing_more_by_the_data_ranks(zero_stage):
    run, layout = with_layout("DP4", zero_stage)
    counts = run.model.count_parameters()
    stored, memory = counts.trainable + counts.padding, memory_estimate(run, layout)
    assert memory["fp32 masters"] == stored and memory["AdamW moments"] == 2 * stored
    assert memory["fp32 gradients"] == 4 * stored / (4 if zero_stage >= 2 else 1)
    assert memory["weights"] - 4 * counts.frozen == 2 * stored / (4 if zero_stage >= 3 else 1)


def test_expert_ranks_hold_their_experts_alone():
    run, layout = with_layout("EP4")
    counts = run.model.count_parameters()
    experts = 20 * 8 * 3 * 3072 * 1152
    dense, memory = counts.trainable + counts.padding - experts, memory_estimate(run, layout)
    assert memory["fp32 gradients"] == 4 * (dense + experts / 4)
    assert memory["fp32 masters"] == 4 * (dense / 4 + experts / 4)


def test_tensor_ranks_hold_all_gains_routers_and_reservoirs_and_half_of_the_rest():
    run, layout = with_layout("TP2")
    counts = run.model.count_parameters()
    # two gains and a router in each layer; a gain and an output bias in each liquid one; the final gain
    replicated = 20 * (2 * 3072 + 8 * 3072) + 5 * 2 * 3072 + 3072
    local = (counts.trainable + counts.padding - replicated) / 2 + replicated
    memory = memory_estimate(run, layout)
    assert memory["weights"] == 2 * local + 4 * counts.frozen
    assert memory["fp32 masters"] == 4 * local / 2
    whole = memory_estimate(*with_layout("DP4"))
    assert whole["activations (estimate)"] / 2 < memory["activations (estimate)"] < whole["activations (estimate)"]


@pytest.mark.parametrize("tied", [True, False])
def test_stages_together_hold_the_model_and_a_second_copy_of_tied_weights(tied):
    run, layout = with_layout("PP2", 1, f"model.untie_embeddings_and_output_weights={not tied}")
    counts = run.model.count_parameters()
    stages = [stage_memory(run, layout, rank) for rank in range(2)]
    copy = tied * run.model.padded_vocab_size * 3072
    assert sum(stage["fp32 gradients"] for stage in stages) == 4 * (counts.trainable + counts.padding + copy)
    assert stages[0]["loss (estimate)"] == 0 < stages[1]["loss (estimate)"]
    # The first of two stages keeps two micro-batches of its layers, the last keeps one of its own.
    layers = [sum(len(chunk) for chunk in layout.stage_chunks(rank)) for rank in range(2)]
    activations = [stage["activations (estimate)"] for stage in stages]
    assert activations[0] * layers[1] == pytest.approx(2 * activations[1] * layers[0])
    # A pass's products, of tokens x (inputs + outputs): qkv, out, and for each of two experts gate-up and down.
    products = (3072 + 5120) + (3072 + 3072) + 2 * (3072 + 2 * 1152 + 1152 + 3072)
    waiting = [stage["waiting weight gradients (estimate)"] for stage in stages]
    # And the logits of the pass itself and of the one kept, where the head's gradient waits.
    logits = [0, 0 if tied else 2 * run.model.vocab_size]
    assert waiting == [2 * 8192 * (products * n + head) for n, head in zip(layers, logits, strict=True)]
    fullest = memory_estimate(run, layout)
    assert fullest == max(stages, key=lambda stage: sum(stage.values()))


def test_tensor_ranks_keep_whole_what_goes_into_columns_and_comes_out_of_rows():
    run, layout = with_layout("TP2", 1, "parallel.pipeline=2")
    stages = [stage_memory(run, layout, rank) for rank in range(2)]
    products = (3072 + 5120 / 2) + (3072 / 2 + 3072) + 2 * (3072 + 2 * 1152 / 2 + 1152 / 2 + 3072)
    tokens = run.training.micro_batch_size * 8192
    layers = [sum(len(chunk) for chunk in layout.stage_chunks(rank)) for rank in range(2)]
    waiting = [stage["waiting weight gradients (estimate)"] for stage in stages]
    logits = [0, 2 * run.model.vocab_size / 2]
    assert waiting == [2 * tokens * (products * n + head) for n, head in zip(layers, logits, strict=True)]


@pytest.mark.parametrize("keys", [["parallel.virtual_pipeline=2"], ["training.recompute=full"]], ids=str)
def test_gradients_that_do_not_wait_hold_nothing(keys):
    assert not any("waiting" in name for name in memory_estimate(*with_layout("PP2", 1, *keys)))


def test_offloaded_optimizer_state_is_counted_on_the_host():
    run, layout = planned("parallel.zero_stage=2", "parallel.offload_optimizer=true")
    text = plan(run, layout)
    assert "masters" not in text and "moments" not in text
    host = 12 * (run.model.count_parameters().trainable + run.model.count_parameters().padding) / 4
    assert f"on the host {host / 2**30:.1f} GiB" in text


@pytest.mark.parametrize("kind", ["transformer", "laerc", "liquidlm", "liquidnn", "lstm"])
def test_other_families_hold_what_zero_leaves_them(kind):
    run, layout = planned(
        "parallel.zero_stage=1", "training.dtype=bfloat16", "training.micro_batch_size=1", config=f"{kind}_debug"
    )
    counts, memory = run.model.count_parameters(), memory_estimate(run, layout)
    held = counts.trainable + counts.padding
    assert memory["weights"] == 2 * held + 4 * counts.frozen and memory["fp32 gradients"] == 4 * held
    assert memory["AdamW moments"] == 2 * memory["fp32 masters"] == 8 * held / 4
    assert "GiB and activations\n" in plan(run, layout)


def test_the_plan_of_a_small_run_names_its_layout():
    run, layout = planned(config="lfm_debug", world=1)
    assert plan(run, layout).startswith("layout DP1 Z0: world 1, local engine, 1 micro-batch\n")


@pytest.mark.parametrize("recompute, layers", [("selective", 1), ("none", 20)])
def test_the_worst_routing_brings_every_token_of_the_group_to_one_process(recompute, layers):
    run, layout = with_layout("EP4", 1, f"training.recompute={recompute}")
    tokens = run.training.micro_batch_size * 8192
    row = 2 * (2 * 3072 + 4 * 1152)
    # Four processes' tokens, each with both its choices here, in place of one process's.
    assert worst_routing_bytes(run, layout) == layers * tokens * (4 * 2 - 2) * row
    assert "under the worst routing, every token to the experts of one process" in plan(run, layout)


def test_routing_changes_no_memory_where_every_expert_is_here_or_capacity_drops():
    assert "under the worst routing: no more" in plan(*planned(world=1))
    run, layout = with_layout("EP4", 1, "model.ffn.moe_capacity_factor=1.25")
    assert worst_routing_bytes(run, layout) == 0
