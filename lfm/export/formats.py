"""The formats of `lfm export` by name: one module each, which is imported when it is asked for."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lfm.errors import UserError
from lfm.export.incoming import Incoming
from lfm.export.source import Source
from lfm.files import exists, shown


@dataclass(frozen=True)
class Settings:
    """What every format is told."""

    dtype: torch.dtype = torch.float32
    """Of trained tensors; what must be exact stays in float32."""
    licence: str | None = None
    """Of the weights, as their owner says; None: nothing is said."""


@dataclass(frozen=True)
class Format:
    module: str
    """With `write(source, out, settings)`; `compare(source, out, settings)`, which yields lines of what it measured
    and raises RuntimeError for a result that is wrong; `read(place)`, if it can be imported."""
    is_folder: bool
    help: str

    def _module(self) -> Any:
        return import_module(self.module)

    def write(self, source: Source, out: Path, settings: Settings) -> None:
        """Fill the empty folder `out`, or write the file `out`."""
        self._module().write(source, out, settings)

    def compare(self, source: Source, out: Path, settings: Settings) -> list[str]:
        return list(self._module().compare(source, out, settings))

    def read(self, place: Path) -> Incoming:
        return self._module().read(place)


FORMATS = {
    "hf": Format("lfm.export.huggingface", True, "a folder for Hugging Face transformers, with its model code"),
    "safetensors": Format("lfm.export.single_file", False, "one file with weights, configuration and tokenizer"),
    "onnx": Format("lfm.export.onnx_graphs", True, "a folder of ONNX graphs, for a prompt and for one token"),
}


def read(place: Path) -> Incoming:
    """What lies at `place`, in whichever format.  Raises UserError where it is none that can be read."""
    if not exists(place):
        raise UserError(f"{shown(place)} does not exist; give a folder or file that `lfm export` wrote")
    if exists(place / "prefill.onnx") or place.suffix == ".onnx":
        raise UserError(
            f"{shown(place)} is of --format onnx, whose graphs have no weights by name; "
            "give what --format hf or safetensors wrote"
        )
    if exists(place / "checkpoints") or exists(place / "manifest.json"):
        raise UserError(f"{shown(place)} is a run or checkpoint already; give it to --checkpoint as it is")
    return FORMATS["hf" if place.is_dir() else "safetensors"].read(place)
