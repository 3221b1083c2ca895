"""RUN/medical/step_N.json and .safetensors: heads and calibration of one checkpoint, beside it and never inside it."""

import base64
import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, ValidationError, model_validator
from torch import Tensor
from typing_extensions import Self

from lfm.checkpoint.manifest import MANIFEST_NAME
from lfm.errors import UserError
from lfm.export.packages import require
from lfm.files import exists, json_checksum, read_file, ready_folder, shown, write_durably
from lfm.medical.calibration import Certificate, Scaling, binomial_tail
from lfm.medical.head import HeadConfig, UncertaintyHead
from lfm.medical.questions import Task
from lfm.medical.selective import Calibrated

FORMAT = 4
"""1: heads that read log-probabilities as they are, and have a temperature alone; 2: heads that read their mean, and no
names of groups; 3: scalings that read the head alone."""
HeadName = Literal["correct", "known", "correct_without_liquid"]
"""At the end of the answer; at the end of the question; the first without recurrent states, for comparison."""
HEADS: tuple[HeadName, ...] = ("correct", "known", "correct_without_liquid")

Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Base64 = Annotated[str, StringConstraints(pattern=r"^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Rate = Annotated[FiniteFloat, Field(gt=0, lt=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Data(_Part):
    """Of which questions something was learnt."""

    sources: list[str]
    sha256: Hash
    questions: Count
    groups: Count
    accuracy: Share
    date: str
    group_hashes: Base64
    """Of the groups' names, 8 bytes each, sorted, as base64: other questions are not to be of these groups."""

    def shared_with(self, names: Iterable[str]) -> list[str]:
        """Those of these names that are among its own, sorted."""
        own = base64.b64decode(self.group_hashes)
        known = {own[i : i + _HASH_BYTES] for i in range(0, len(own), _HASH_BYTES)}
        return sorted(name for name in set(names) if group_hash(name) in known)


_HASH_BYTES = 8


def group_hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=_HASH_BYTES).digest()


class StoredCertificate(_Part):
    risk: Rate
    delta: Rate
    threshold: Share | None
    questions: Count
    answered: Count
    wrong: Count

    @model_validator(mode="after")
    def _check(self) -> Self:
        """What its counts do not certify is none, whoever wrote it."""
        if not self.wrong <= self.answered <= self.questions:
            raise ValueError("its counts contradict each other")
        if self.threshold is not None and binomial_tail(self.wrong, self.answered, self.risk) > self.delta:
            raise ValueError("its counts do not certify it")
        return self


class Form(_Part):
    """How the questions of a calibration were asked."""

    options: list[list[str]] = []
    """Sorted, of each set whose questions all have the same."""
    has_others: bool = True
    """Whether there are questions with options of their own, or free answers."""
    endings: list[str] = []
    """Last lines of the questions, where they are few; none: they are not."""
    fewest_options: Count = 0
    most_options: Count = 0


class StoredScaling(_Part):
    head_weight: Annotated[FiniteFloat, Field(ge=0)]
    answer_weight: Annotated[FiniteFloat, Field(ge=0)]
    offset: FiniteFloat


class Calibration(_Part):
    data: Data
    form: Form
    scalings: dict[HeadName, StoredScaling]
    certificate: StoredCertificate

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "known" in self.scalings and self.scalings["known"].answer_weight:
            raise ValueError("at the end of a question there is no answer to weigh")
        return self

    @property
    def by_head(self) -> dict[HeadName, Scaling]:
        return {head: Scaling(**stored.model_dump()) for head, stored in self.scalings.items()}


class Cost(_Part):
    """FLOPs forward, and the head's share of the backbone's for questions and answers of that length."""

    head: FiniteFloat
    backbone: FiniteFloat
    share: FiniteFloat


class TaskHeads(_Part):
    heads: dict[HeadName, dict[str, Any]]
    fit: Data
    cost: Cost
    calibration: Calibration | None = None


class Record(_Part):
    format: Literal[4]
    checkpoint: str
    manifest_sha256: Hash
    """Of the checkpoint's manifest.json, which holds the hash of each of its files."""
    dtype: str
    """Of the backbone's weights and activations when the heads were fitted."""
    tensors_sha256: Hash
    tasks: dict[Task, TaskHeads]
    checksum: str


def stored_at(checkpoint: Path) -> Path:
    """The JSON file of a checkpoint, which need not exist; its tensors are beside it."""
    real = Path(os.path.realpath(checkpoint))
    run = real.parent.parent if real.parent.name == "checkpoints" else real.parent
    return run / "medical" / f"{real.name}.json"


def backbone_hash(checkpoint: Path) -> str:
    return hashlib.sha256(read_file(checkpoint / MANIFEST_NAME)).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def write(
    checkpoint: Path, tasks: Mapping[Task, TaskHeads], heads: Mapping[str, Mapping[str, UncertaintyHead]], dtype: str
) -> Path:
    """Replace what is stored.  A process that dies between the two files leaves a record whose hash does not match."""
    save = require("safetensors.torch", purpose="storing a head", extra="medical").save
    path = stored_at(checkpoint)
    ready_folder(path.parent)
    tensors = {
        f"{task}.{name}.{key}": tensor.contiguous()
        for task, of_task in heads.items()
        for name, head in of_task.items()
        for key, tensor in head.state_dict().items()
    }
    data = save(tensors, metadata={"format": "pt"})
    record = {
        "format": FORMAT,
        "checkpoint": Path(os.path.realpath(checkpoint)).name,
        "manifest_sha256": backbone_hash(checkpoint),
        "dtype": dtype,
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        "tasks": {name: task.model_dump() for name, task in tasks.items()},
    }
    write_durably(path.with_suffix(".safetensors"), data)
    write_durably(path, json.dumps(record | {"checksum": json_checksum(record)}, indent=1).encode() + b"\n")
    return path


def read(checkpoint: Path) -> tuple[Record, dict[str, dict[str, UncertaintyHead]]]:
    """Record and heads by task and name.

    Raises UserError, naming the file, where there is none, it is damaged or changed, or it is of other weights.
    """
    path = stored_at(checkpoint)
    again = f"fit and calibrate again: lfm medical fit --checkpoint {shown(checkpoint)} --data DIR"
    if not exists(path):
        raise UserError(f"medical mode needs a calibrated head, and there is no {shown(path)}; {again}")
    try:
        tree = json.loads(read_file(path))
        checksum = json_checksum(tree)
        if tree.get("format") in range(1, FORMAT):
            raise UserError(f"{shown(path)} is of an earlier version, whose heads read other numbers; {again}")
        record = Record.model_validate(tree)
    except (ValueError, ValidationError, RecursionError, AttributeError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{shown(path)} is no record of a head; {again}") from None
    if record.checksum != checksum:
        raise UserError(f"{shown(path)} was changed or is damaged: its checksum does not match its contents; {again}")
    if record.manifest_sha256 != backbone_hash(checkpoint):
        raise UserError(f"{shown(path)} is of another checkpoint than {shown(checkpoint)}; {again}")
    file = path.with_suffix(".safetensors")
    data = read_file(file)
    if record.tensors_sha256 != hashlib.sha256(data).hexdigest():
        raise UserError(f"{shown(file)} was changed or is damaged: its hash is not that of {path.name}; {again}")
    load = require("safetensors.torch", purpose="reading a head", extra="medical").load
    try:
        tensors = load(data)
        heads = {task: _built(task, of.heads, tensors) for task, of in record.tasks.items()}
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{shown(file)} does not hold the heads of {path.name} ({error}); {again}") from None
    return record, heads


def _built(task: str, configs: Mapping[HeadName, Any], tensors: Mapping[str, Tensor]) -> dict[str, UncertaintyHead]:
    found: dict[str, UncertaintyHead] = {}
    for name, tree in configs.items():
        head, prefix = UncertaintyHead(HeadConfig.model_validate(tree)), f"{task}.{name}."
        head.load_state_dict({key: tensors[prefix + key] for key in head.state_dict()})
        if not all(torch.isfinite(tensor).all() for tensor in head.state_dict().values()):
            raise ValueError(f"{prefix}* is not finite")
        found[name] = head.eval()
    return found


def open_calibrated(checkpoint: Path, task: Task, dtype: torch.dtype) -> Calibrated:
    """What judges answers of this kind.  Raises UserError as `read` does, and where nothing was calibrated for them, or
    the backbone computed in another dtype then."""
    record, heads = read(checkpoint)
    path, here = shown(stored_at(checkpoint)), dtype_name(dtype)
    of = record.tasks.get(task)
    if of is None or of.calibration is None:
        done = "fitted and not calibrated" if of is not None else "not fitted"
        raise UserError(
            f"{path}: the head for answers of kind {task} is {done}; lfm medical {'calibrate' if of else 'fit'} "
            f"--checkpoint {shown(checkpoint)} --task {task} --data DIR"
        )
    if record.dtype != here:
        raise UserError(
            f"{path} was calibrated with a backbone in {record.dtype}, and here it computes in {here}, with other "
            "probabilities; use the same device, or fit and calibrate here"
        )
    calibration, scalings = of.calibration, of.calibration.by_head
    if "correct" not in heads[task] or "correct" not in scalings:
        raise UserError(f"{path} has no head that says whether an answer is correct; fit and calibrate again")
    data = calibration.data
    return Calibrated(
        head=heads[task]["correct"],
        scaling=scalings["correct"],
        certificate=Certificate(**calibration.certificate.model_dump()),
        known_head=heads[task].get("known") if "known" in scalings else None,
        known_scaling=scalings.get("known"),
        form=calibration.form,
        calibrated_on=f"{', '.join(data.sources)} ({data.questions:,} questions, {data.date}, {data.sha256[:8]})",
    )
