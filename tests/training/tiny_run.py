"""A run of seconds: real text, a real tokenizer, every kind of layer; its command line, and what it leaves behind."""

import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from lfm.checkpoint.folder import hash_files
from lfm.checkpoint.manifest import manifest_bytes
from lfm.training.metrics_file import read_metrics
from lfm.training.run import RunConfig
from lfm.training.state import Progress

ROOT = Path(__file__).parent.parent.parent
PYTHON = sys.executable

TINY = [
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.attention.num_attention_heads=2",
    "model.attention.num_query_groups=1",
    "model.seq_length=64",
    "model.vocab_size=512",
    "model.ffn.moe_ffn_hidden_size=32",
    "model.liquid.interval=2",
    "model.liquid.reservoir_size=16",
    "model.liquid.chunk_length=16",
    "training.steps=6",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    "optimizer.lr_at_width=null",
    "schedule.warmup_steps=2",
    "validation.every_steps=3",
    "validation.max_rows=8",
    "checkpoint.every_steps=2",
    "samples.every_steps=0",
    "samples.sampling.max_new_tokens=4",
    "logging.every_steps=1",
    "logging.tensorboard=false",
]


def manifest_fields(step: int, *, seed: int = 0, counters: dict[str, Any] | None = None, model: Any = None) -> Any:
    """What a manifest holds besides what the saver adds, of a run that is none."""
    return {
        "config": {"name": "none", "seed": seed, "model": model or {"kind": "lfm"}},
        "progress": asdict(Progress(step)) | {"best_validation": None},
        "counters": counters or {"optimizer_step": step, "reservoir_warmup": {}, "reservoir_calm_steps": {}},
        "data": {"position": 0, "seed": seed, "data_checksum": "none"},
    }


def rewrite_manifest(checkpoint: Path, **changes: Any) -> None:
    """As somebody does who knows how it is made: with hashes of the files as they are now, and its checksum."""
    path = checkpoint / "manifest.json"
    tree = {**json.loads(path.read_bytes()), **changes}
    tree["files"] = hash_files(checkpoint, tree["files"], threads=1)
    path.write_bytes(manifest_bytes({key: value for key, value in tree.items() if key not in ("format", "checksum")}))


def tiny_overrides(output: Path, data: Path, *more: str) -> list[str]:
    return [*TINY, f"output={output}", f"data.path={data}", *more]


def tiny_run(output: Path, data: Path, *more: str) -> RunConfig:
    return RunConfig.load(ROOT / "configs/lfm_debug.yaml", tiny_overrides(output, data, *more))


def pretrain_command(output: Path, data: Path, *more: str) -> list[str]:
    config = str(ROOT / "configs/lfm_debug.yaml")
    return [PYTHON, str(ROOT / "launch/pretrain.py"), "--config", config, *tiny_overrides(output, data, *more)]


def checkpoint_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The stored tensors by global name, and the manifest."""
    manifest = json.loads((path / "manifest.json").read_text())
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP announces that no process group is in use
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors, manifest


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """Bit for bit, and with the same progress."""
    (tensors_a, manifest_a), (tensors_b, manifest_b) = checkpoint_tensors(a), checkpoint_tensors(b)
    assert tensors_a.keys() == tensors_b.keys()
    for name, tensor in tensors_a.items():
        assert torch.equal(tensor, tensors_b[name]), f"{name} differs"
    for key in ("step", "progress", "counters", "data", "frozen"):
        assert manifest_a[key] == manifest_b[key], key


def losses(folder: Path) -> list[tuple[int, float]]:
    """Step and cross entropy of every training record."""
    return [(r["step"], r["cross_entropy"]) for r in read_metrics(folder / "metrics.jsonl") if "cross_entropy" in r]
