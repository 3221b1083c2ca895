"""RunConfig: everything one training run is, as one tree; and the folder it leaves behind."""

import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from lfm.checkpoint.config import CheckpointConfig
from lfm.config import Config, Count, CountOrZero, PathText, Rows
from lfm.data.stream import DataConfig
from lfm.files import expanded, held_alone, remove_temporaries, shown, write_durably
from lfm.inference.sampling import SamplingConfig
from lfm.kernels.backend import working_dtype
from lfm.layout.config import ParallelConfig
from lfm.medical.config import MedicalConfig
from lfm.models.registry import ModelConfig
from lfm.objectives.next_token import NEXT_TOKEN
from lfm.objectives.registry import ObjectiveConfig
from lfm.training.metrics import LoggingConfig
from lfm.training.optimizer.adamw import AdamWConfig
from lfm.training.optimizer.registry import OptimizerConfig
from lfm.training.recorder import CudaGraph
from lfm.training.schedule import ScheduleConfig


class TrainingConfig(Config):
    steps: Count
    """Optimizer steps of the whole run."""
    global_batch_size: Rows
    """Rows of one optimizer step."""
    micro_batch_size: Rows = 1
    """Rows of one forward and backward pass."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations made again in backward: none; those of liquid and MoE; those of whole layers."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA or ROCm GPU where one is visible, else the CPU; mps, of Apple's chips, has not been tested."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Working weights and activations; auto: bfloat16 (with fp32 masters) on a GPU, float16 on one that has no
    bfloat16 (compute capability below 8.0), float32 on a CPU."""
    cuda_graph: CudaGraph = "auto"
    """Record the steps of one process whole, and replay them without launching every kernel: auto, on a CUDA GPU where
    the device alone can make them; required, end the run where it cannot."""
    initial_loss_scale: float = Field(default=2.0**16, ge=1, le=2.0**60)
    """Of float16: what the loss is multiplied by at the start.  It halves, and the update is skipped, when a gradient
    overflows; it doubles after 2000 updates without."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if math.frexp(self.initial_loss_scale)[0] != 0.5:
            raise ValueError(
                f"initial_loss_scale={self.initial_loss_scale:g} is no power of two; take one near it, such as "
                f"{2.0 ** round(math.log2(self.initial_loss_scale)):.0f}"
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide global_batch_size={self.global_batch_size}"
            )
        return self


class ValidationConfig(Config):
    every_steps: CountOrZero = 1000
    """0: only at the end."""
    max_rows: Count = 512
    """So many rows of the validation split are scored, at equal distances."""
    patience: CountOrZero = 0
    """Stop early after this many validations in a row without a better loss; 0: never."""


class SamplesConfig(Config):
    every_steps: CountOrZero = 0
    """Generate from the prompts this often while training; 0: only at the end."""
    prompts: tuple[str, ...] = ()
    sampling: SamplingConfig = SamplingConfig()


class EvaluationConfig(Config):
    tasks: tuple[str, ...] = ()
    """Of lm-evaluation-harness or this project: names, YAML files or folders of them; needs the extra `lm-eval`."""
    include_path: tuple[PathText, ...] = ()
    """Folders of more tasks to be named."""
    every_steps: CountOrZero = 0
    """Score the tasks this often while training; 0: only at the end."""
    limit: Count | None = None
    """Only the first so many documents of each task; null: all."""
    num_fewshot: int | None = Field(default=None, ge=0, le=1000)
    """Worked examples before each question; null: the task's own number."""
    batch_size: Rows = 8
    """Requests scored at once."""


class RunConfig(Config):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Run folder under `output`; auto: the family's own name for a model of these dimensions."""
    output: PathText = "runs"
    seed: int = Field(default=1234, ge=0, lt=2**63)
    """Of initialisation, data order and random draws."""
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    objective: ObjectiveConfig = NEXT_TOKEN
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    validation: ValidationConfig = ValidationConfig()
    samples: SamplesConfig = SamplesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    medical: MedicalConfig = MedicalConfig()
    """Of generate and chat with this run's checkpoints; training does not read it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        kind, choices = self.model.kind, self.model.recompute_choices
        if self.training.recompute not in choices:
            raise ValueError(
                f"training.recompute={self.training.recompute} is not for model.kind={kind}; "
                f"choose from {', '.join(choices)}"
            )
        if self.training.device == "mps" and self.parallel.zero_stage > 0:
            raise ValueError(
                f"training.device=mps does not go with parallel.zero_stage={self.parallel.zero_stage}: several "
                "processes need CUDA or CPUs"
            )
        if self.evaluation.tasks and self.parallel.zero_stage > 0:
            raise ValueError(
                "evaluation.tasks are scored by a model in one process, which does not go with "
                f"parallel.zero_stage={self.parallel.zero_stage}; score checkpoints by `lfm eval --tasks` instead"
            )
        if self.training.cuda_graph == "required" and self.parallel.zero_stage > 0:
            raise ValueError(
                f"training.cuda_graph=required does not go with parallel.zero_stage={self.parallel.zero_stage}: only "
                "steps of one process are recorded; set training.cuda_graph=auto or parallel.zero_stage=0"
            )
        if self.training.dtype == "float16" and self.parallel.zero_stage > 0:
            raise ValueError(
                f"training.dtype=float16 does not go with parallel.zero_stage={self.parallel.zero_stage}: its loss "
                "scale is one process's; set training.dtype=bfloat16 or parallel.zero_stage=0"
            )
        return self

    @property
    def folder(self) -> Path:
        return expanded(self.output) / (self.model.run_name if self.name == "auto" else self.name)

    @property
    def device(self) -> torch.device:
        name = self.training.device
        return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")

    @property
    def card(self) -> str | None:
        """The name of this process's GPU, if it trains on one."""
        on_a_gpu = self.device.type == "cuda" and torch.cuda.is_available()
        return torch.cuda.get_device_name(self.device) if on_a_gpu else None

    @property
    def dtype(self) -> torch.dtype:
        name = self.training.dtype
        return getattr(torch, name) if name != "auto" else working_dtype(self.device)


def write_run_files(run: RunConfig, step: int) -> None:
    """`config.yaml` (resolved) and `environment.json` (command, commit, versions, hardware) of the run folder.

    Those of each start, at the step it goes on from, are kept in `starts/`: a resumed run may differ in either.
    """
    for folder in (run.folder / "starts" / f"step_{step:08d}", run.folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / "config.yaml", run.to_yaml().encode())
        write_durably(folder / "environment.json", json.dumps(environment(), indent=1).encode() + b"\n")


@contextmanager
def owning_folder(run: RunConfig) -> Iterator[None]:
    """Make the run folder and hold it alone.  Raises UserError when it cannot be written or another process has it."""
    with held_alone(
        run.folder / ".lock",
        unwritable=f"run folder {shown(run.folder)} cannot be written; set output=DIR",
        taken=f"another process trains in {shown(run.folder)}; wait for it, or give name=NAME",
    ):
        starts = [path for path in run.folder.glob("starts/*") if path.is_dir()]
        for folder in (run.folder, run.folder / "plots", run.folder / "samples", *starts):
            remove_temporaries(folder)
        yield


def environment() -> dict[str, Any]:
    """What a recorded number must be read with."""
    packages = ("torch", "triton", "numpy", "mosaicml-streaming", "tokenizers", "megatron-core", "deepspeed")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": sys.argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "cpu": platform.processor() or platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": gpu,
        "gpus": torch.cuda.device_count(),
    }


def _commit() -> str | None:
    """Commit of the checkout this code runs from, with `-dirty` when it has changes; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
