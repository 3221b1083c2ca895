"""A run of seconds: real text, a real tokenizer, every kind of layer; and the command line that starts it."""

import sys
from pathlib import Path

from lfm.training.run import RunConfig

ROOT = Path(__file__).parent.parent.parent
PYTHON = sys.executable

TINY = [
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_attention_heads=2",
    "model.num_query_groups=1",
    "model.seq_length=64",
    "model.vocab_size=512",
    "model.moe_ffn_hidden_size=32",
    "model.liquid.interval=2",
    "model.liquid.reservoir_size=16",
    "model.liquid.chunk_length=16",
    "training.steps=6",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    "schedule.warmup_steps=2",
    "validation.every_steps=3",
    "validation.max_rows=8",
    "checkpoint.every_steps=2",
    "samples.every_steps=0",
    "samples.sampling.max_new_tokens=4",
    "logging.every_steps=1",
    "logging.tensorboard=false",
]


def tiny_overrides(output: Path, data: Path, *more: str) -> list[str]:
    return [*TINY, f"output={output}", f"data.path={data}", *more]


def tiny_run(output: Path, data: Path, *more: str) -> RunConfig:
    return RunConfig.load(ROOT / "configs/lfm_debug.yaml", tiny_overrides(output, data, *more))


def pretrain_command(output: Path, data: Path, *more: str) -> list[str]:
    config = str(ROOT / "configs/lfm_debug.yaml")
    return [PYTHON, str(ROOT / "launch/pretrain.py"), "--config", config, *tiny_overrides(output, data, *more)]
