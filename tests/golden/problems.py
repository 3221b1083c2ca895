"""Golden runs: three updates of every family's debug preset, and of LFM under layouts, to the last bit.

A run's rows are random ids from a counter-based generator, which no version of a tokenizer or data set changes.  What
it computed is a text: a line a step, a hash of every kind of state, held-out loss, greedy ids, names of measurements.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from lfm.data.batch import Batch
from lfm.inference.sampling import SamplingConfig, generate
from lfm.job.fork import run_ranks
from lfm.job.process import Process
from lfm.training.certificate import LAYOUTS
from lfm.training.engine import Engine
from lfm.training.local_engine import LocalEngine
from lfm.training.metrics import training_record
from lfm.training.run import RunConfig
from tests.parallel.engine_numbers import join, whole_state
from tests.parallel.engine_numbers import state as share_of

ROOT = Path(__file__).parent.parent.parent
STEPS, ROWS, MICRO_BATCH = 3, 8, 2
SMALL = (
    "model.vocab_size=1000",
    "model.seq_length=64",
    f"training.global_batch_size={ROWS}",
    f"training.micro_batch_size={MICRO_BATCH}",
    f"training.steps={STEPS}",
    "training.device=cpu",
)


@dataclass(frozen=True)
class Golden:
    """A preset of `configs/`, what is changed of it, and the layout's name (None: the local engine)."""

    preset: str
    overrides: tuple[str, ...] = ()
    layout: str | None = None

    @property
    def run(self) -> RunConfig:
        return RunConfig.load(ROOT / f"configs/{self.preset}.yaml", [*SMALL, *self.overrides])

    def batch(self, step: int) -> Batch:
        """Rows `[ROWS, T]` of packed documents; step -1 is held out."""
        model, draws = self.run.model, np.random.Generator(np.random.Philox(key=step + 1))
        T = model.seq_length
        ids = draws.integers(0, model.vocab_size, (ROWS, T))
        ends = [sorted({T, *draws.integers(1, T, row).tolist()}) for row in range(ROWS)]
        return Batch(torch.from_numpy(ids), [[b - a for a, b in zip([0, *row], row, strict=False)] for row in ends])


BF16 = ("training.dtype=bfloat16",)
FAMILIES = ("lfm", "transformer", "liquidnet", "laerc", "liquidlm", "liquidnn", "lstm")
LFM_VARIANTS = {
    "untied": ("model.untie_embeddings_and_output_weights=true",),
    "no_liquid": ("model.liquid=null",),
    "post_norm": ("model.liquid.norm=post",),
    "trained_reservoir": ("model.liquid.train_reservoir=true",),
    "capacity": ("model.ffn.moe_capacity_factor=1.0", "model.ffn.balance.scope=batch"),
    "selective": ("training.recompute=selective",),
    "full": ("training.recompute=full",),
}
LAYOUTS_IN_FP32 = (
    *("dp2_z1", "tp2", "pp2", "pp2_interleaved", "ep2", "dp2_z2", "dp2_z3", "tp2_ep2"),
    *("pp4_uneven", "ep4", "tp2_pp2", "tp2_dp2_z2"),
)
LAYOUTS_IN_BF16 = ("dp2_z1", "tp2_pp2")

GOLDENS = {
    **{f"{family}": Golden(f"{family}_debug") for family in FAMILIES},
    **{f"{family}_bf16": Golden(f"{family}_debug", BF16) for family in FAMILIES},
    **{f"lfm_{name}": Golden("lfm_debug", changed) for name, changed in LFM_VARIANTS.items()},
    **{f"lfm_{name}": Golden("lfm_debug", (), name) for name in LAYOUTS_IN_FP32},
    **{f"lfm_{name}_bf16": Golden("lfm_debug", BF16, name) for name in LAYOUTS_IN_BF16},
}


def compute(name: str) -> str:
    """The text of a golden, computed anew."""
    golden = GOLDENS[name]
    if golden.layout is None:
        found = [_steps(_local_engine(golden.run), golden)]
    else:
        world, _, _ = LAYOUTS[golden.layout]
        found = run_ranks(_on_a_rank, world, name, timeout_seconds=240)
    lines = [*found[0]["lines"], *_hashes(found), *found[0]["after"]]
    return "".join(line + "\n" for line in lines)


def dry_runs() -> str:
    """What `--dry-run` says of every preset, which no machine changes."""
    from lfm.layout.layout import check_layout
    from lfm.training.plan import plan

    texts = []
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        run = RunConfig.load(path)
        p = run.parallel
        world = max(p.tensor * p.pipeline, p.expert) * (2 if p.zero_stage else 1)
        layout = check_layout(
            run.model,
            p,
            world,
            global_batch_size=run.training.global_batch_size,
            micro_batch_size=run.training.micro_batch_size,
        )
        texts.append(f"# {path.name}\n{plan(run, layout)}\n")
    return "\n".join(texts)


def _local_engine(run: RunConfig) -> LocalEngine:
    return LocalEngine(
        run.model,
        run.optimizer,
        seed=run.seed,
        device=torch.device("cpu"),
        dtype=run.dtype,
        micro_batch_size=run.training.micro_batch_size,
        recompute=run.training.recompute,
    )


def _on_a_rank(process: Process, name: str) -> dict[str, Any]:
    from lfm.layout.layout import check_layout
    from lfm.training.parallel_engine import ParallelEngine

    golden = GOLDENS[name]
    assert golden.layout is not None
    run, (world, parallel, recompute) = golden.run, LAYOUTS[golden.layout]
    layout = check_layout(run.model, parallel, world, global_batch_size=ROWS, micro_batch_size=MICRO_BATCH)
    engine = ParallelEngine(
        run.model,
        run.optimizer,
        join(process, layout),
        seed=run.seed,
        dtype=run.dtype,
        micro_batch_size=MICRO_BATCH,
        recompute=recompute,
    )
    return _steps(engine, golden)


def _steps(engine: Engine, golden: Golden) -> dict[str, Any]:
    lines, run, keys = [], golden.run, []
    for step in range(STEPS):
        engine.start_step(step, STEPS)
        result = engine.forward_backward(golden.batch(step)[engine.rows_of_step(ROWS)])
        norm = engine.step(run.optimizer.lr)
        keys = sorted(training_record(result))
        lines.append(f"step {step + 1} loss {result.loss.hex()} norm {norm.hex()} digest {result.digest:016x}")
    nats, labels = engine.evaluate(golden.batch(-1))
    after = [f"held_out {(nats / labels).hex()}"]
    if isinstance(engine, LocalEngine):
        engine.model.eval()
        sampling = SamplingConfig(greedy=True, max_new_tokens=8)
        chosen = generate(engine.model, [[1, 2, 3], [500]], sampling, end_of_document=None)
        after += ["greedy " + " ".join(f"{a},{b}" for a, b in chosen)]
    return {"lines": lines, "state": share_of(engine), "after": [*after, "measured " + " ".join(keys)]}


def _hashes(ranks: list[dict[str, Any]]) -> Iterator[str]:
    """One for every kind of state, over its whole tensors by name."""
    kinds: dict[str, xxhash.xxh3_64] = {}
    for key, tensor in sorted(whole_state(ranks).items()):
        digest = kinds.setdefault(key.partition(".")[0], xxhash.xxh3_64())
        digest.update(f"{key} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return (f"state {kind} {digest.hexdigest()}" for kind, digest in kinds.items())


def losses_of(text: str) -> list[float]:
    """The losses of a golden's steps."""
    return [float.fromhex(line.split()[3]) for line in text.splitlines() if line.startswith("step ")]


def environment_key() -> str:
    """What the bits of a CPU run depend on besides this code: the processor, by which libraries choose kernels and the
    sizes of blocks, and torch."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = [line.partition(":") for line in file]
    about = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    processor = [about.get(name, "any") for name in ("vendor_id", "cpu family", "model")]
    capability = torch.backends.cpu.get_cpu_capability()
    if torch.cpu._is_amx_tile_supported():  # bf16 products are then rounded otherwise; a virtual machine may hide it
        capability += "_amx"
    parts = [*processor, capability, "torch" + torch.__version__.partition("+")[0]]
    return "_".join(parts).lower().replace(" ", "")
