"""The certificate of a layout on a small model, without which no speed is shown."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lfm.errors import UserError
from lfm.layout.config import ParallelConfig
from lfm.layout.layout import Layout, check_layout
from lfm.models.language_model import Recompute
from lfm.training.certificate import Finding, Numbers, Problem, certify, in_one_process
from lfm.training.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]
_LEAST_ROWS = 8


def _rows(world: int) -> int:
    """That any number of data-parallel processes can share out, and stages that interleave."""
    return -(-_LEAST_ROWS // world) * world


def small_layout(small: RunConfig, parallel: ParallelConfig, world: int, dtype: torch.dtype) -> Layout:
    """Of the small model.  Raises UserError where it does not fit."""
    rows, half = _rows(world), dtype.itemsize == 2
    try:
        return check_layout(small.model, parallel, world, global_batch_size=rows, micro_batch_size=1, half=half)
    except UserError as error:
        raise UserError(f"the small model that certifies the layout, {small.name}, does not fit it: {error}") from None


class Certifier:
    """Certificates of one small run with weights in `dtype`; what one process computes is computed once."""

    def __init__(self, small: RunConfig, device_type: str, dtype: torch.dtype = torch.float32) -> None:
        self.small, self.device_type, self.dtype = small, device_type, dtype
        self._expected: Numbers | None = None

    def certify(self, parallel: ParallelConfig, world: int, recompute: Recompute = "none") -> Finding:
        """Says what it found too.  Raises UserError where the small model does not fit the layout."""
        small, began = self.small, time.monotonic()
        layout = small_layout(small, parallel, world, self.dtype)
        problem = Problem(
            small.model,
            small.optimizer,
            small.seed,
            rows=layout.num_micro_batches * layout.data,
            micro_batch_size=1,
            steps=1,
            dtype=self.dtype,
            recompute=recompute,
        )
        self._expected = self._expected or in_one_process(problem, self.device_type)
        finding = certify(layout, problem, self._expected, device_type=self.device_type)
        deviations = " ".join(f"{key} {value:.1e}" for key, value in finding.deviations.items())
        verdict = "; ".join(finding.beyond) or "certified"
        shown = f"{finding.layout} in {str(self.dtype).removeprefix('torch.')}"
        print(f"{shown}: {verdict}: {deviations} ({time.monotonic() - began:.0f} s)", flush=True)
        return finding


def small_run(kind: str) -> RunConfig:
    """The family's small config."""
    return RunConfig.load(ROOT / f"configs/{kind}_debug.yaml")


@contextmanager
def _without_launcher() -> Iterator[None]:
    """A launcher's variables are this process's own, and none of those of the processes that it starts."""
    of_ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    names = [name for name in os.environ if name in of_ranks or name.startswith(("TORCHELASTIC_", "SLURM_"))]
    kept = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(kept)


def require_certificate(run: RunConfig, world: int, device_type: str) -> None:
    """Raises UserError where the run's layout deviates from one process."""
    # The small model's stages are its own.
    parallel = run.parallel.model_copy(update={"stage_layers": None})
    with _without_launcher():
        finding = Certifier(small_run(run.model.kind), device_type).certify(parallel, world)
    if finding.beyond:
        raise UserError(f"no speed of {finding.layout}: its certificate is red: {'; '.join(finding.beyond)}")
