"""manifest.json, the root of a checkpoint: every field typed and ranged, the whole under a checksum.

`checksum` is made as that of a data set's index.json is.  It finds damage: whoever can change a manifest can make its
checksum anew, so it does not say who wrote a checkpoint.  Older formats are read too: see `older_formats`.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    ValidationError,
    model_validator,
)
from typing_extensions import Self

from lfm.checkpoint.older_formats import migrated
from lfm.errors import UserError
from lfm.files import json_checksum, read_file, shown
from lfm.talk import complain

FORMAT = 4
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"

Count = Annotated[int, Field(ge=0, lt=2**63)]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
Layer = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,5})$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class StoredConfig(_Part):
    """The run's, as JSON.  Its keys are checked where they are used: an older config may have others."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: dict[str, Any]
    optimizer: dict[str, Any] = {}


class StoredSkip(_Part):
    """Rows of the data order that were passed over after a step."""

    step: Count
    rows: Annotated[int, Field(ge=1, lt=2**63)]


class StoredProgress(_Part):
    step: Count
    tokens: Count
    best_validation: FiniteFloat | None
    """None: there was no validation."""
    validations_without_gain: Count
    chain: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    skips: list[StoredSkip] = []


def _power_of_two(value: float) -> float:
    if math.frexp(value)[0] != 0.5:
        raise ValueError(f"{value!r} is no power of two")
    return value


class StoredCounters(_Part):
    optimizer_step: Count
    reservoir_warmup: dict[Layer, Annotated[int, Field(ge=0, le=2**20)]]
    reservoir_calm_steps: dict[Layer, Count]
    router_idle_steps: dict[Layer, list[Count]] = {}
    """Steps since each expert had a token."""
    router_uneven_steps: dict[Layer, Count] = {}
    """Steps since the layer's load was even enough."""
    loss_scale: Annotated[FiniteFloat, Field(ge=1), AfterValidator(_power_of_two)] | None = None
    """Of runs in float16."""
    calm_updates: Count = 0
    """Since the loss scale changed last."""
    skipped_updates: Count = 0
    """Whose gradients overflowed."""
    late_parameters: dict[str, Count] = {}
    """Of formats 1 and 2: updates of those parameters that had fewer than `optimizer_step`, by name."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.reservoir_warmup.keys() != self.reservoir_calm_steps.keys():
            raise ValueError("the counters are of different reservoir layers")
        if self.router_idle_steps.keys() != self.router_uneven_steps.keys():
            raise ValueError("the counters are of different routers")
        return self


class StoredPlace(_Part):
    """In the order of the data."""

    position: Count
    seed: Count
    data_checksum: str


class StoredFile(_Part):
    bytes: Count
    xxh3_64: Hash


class Manifest(_Part):
    format: Literal[1, 2, 3, 4]
    step: Count
    config: StoredConfig
    progress: StoredProgress
    counters: StoredCounters
    data: StoredPlace
    rng: Any = None
    """Of formats 1 and 2: of torch's generators, which nothing goes on from."""
    frozen: dict[Annotated[str, StringConstraints(pattern=r"^frozen\.")], Hash]
    """Hash of the values of each frozen tensor."""
    files: dict[str, StoredFile]
    checksum: str | None = None
    """sha256 of everything else; from format 2 on."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.step != self.progress.step:
            raise ValueError(f"step is {self.step} and progress.step {self.progress.step}")
        if not isinstance(self.config.model.get("kind"), str):
            raise ValueError("config.model has no kind")
        if (self.checksum is None) != (self.format == 1):
            raise ValueError("the checksum is that of another format")
        if self.format > 2 and (self.rng is not None or self.counters.late_parameters):
            raise ValueError("rng or counters.late_parameters is that of another format")
        for name in self.files:
            # Names of this folder alone: a path would lead out of it.
            if not re.fullmatch(r"\.metadata|tokenizer\.json|__\d+_\d+\.distcp", name):
                raise ValueError(f"files has {name!r}, which no checkpoint has")
        for name in (".metadata", TOKENIZER_NAME):
            if name not in self.files:
                raise ValueError(f"files lacks {name}")
        return self


def manifest_bytes(fields: dict[str, Any]) -> bytes:
    """A manifest.json of these fields, which are all but `format` and `checksum`."""
    whole = {"format": FORMAT, **fields}
    return json.dumps({**whole, "checksum": json_checksum(whole)}, indent=1).encode()


def read_manifest(checkpoint: Path, *, warn: bool = True) -> dict[str, Any]:
    """The fields of a checkpoint's manifest, after checking them all, as those of the newest format.

    Raises UserError that names the file.

    `warn`: say so when it is of format 1, in which a changed value cannot be told from a written one.
    """
    path = checkpoint / MANIFEST_NAME
    damaged = f"{shown(path)} is damaged"
    content = read_file(path)
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{damaged}: it is not valid JSON; {way_out(checkpoint)}") from None
    number = tree.get("format") if isinstance(tree, dict) else None
    if isinstance(number, float) or (type(number) is int and not 1 <= number <= FORMAT):
        raise UserError(f"checkpoint {shown(checkpoint)} has format {number}; this version reads 1 to {FORMAT}")
    if number in range(2, FORMAT + 1) and tree.get("checksum") != json_checksum(tree):
        raise UserError(f"{damaged}: its checksum does not match its contents; {way_out(checkpoint)}")
    try:
        Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        what = f"{where}: {said}" if where else said
        raise UserError(f"{damaged}: {what}; {way_out(checkpoint)}") from None
    named = re.fullmatch(r"step_(\d{8,})", Path(os.path.realpath(checkpoint)).name)
    if named is not None and int(named[1]) != tree["step"]:
        raise UserError(f"{damaged}: its step is {tree['step']} and its folder's {named[1]}; {way_out(checkpoint)}")
    if number == 1 and warn:
        complain(
            f"{shown(path)} is of format 1, which has no checksum: its files are checked, whether itself was changed "
            "cannot be"
        )
    return migrated(tree)


def way_out(checkpoint: Path) -> str:
    return f"restore it, or use another checkpoint and delete {checkpoint.name}"
