"""A checkpoint as what leaves it: its model's configuration, its tensors by global name, its tokenizer, its records.

Names do not depend on the layout that a run was trained in, so what is written by name is read by name.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lfm.checkpoint.folder import find, verify
from lfm.checkpoint.manifest import TOKENIZER_NAME, read_manifest
from lfm.checkpoint.tensors import load_tensors
from lfm.data.tokenizer import Tokenizer
from lfm.files import expanded
from lfm.models.global_names import global_views, moving_names, stored
from lfm.models.initialization import materialize
from lfm.models.language_model import FamilyConfig, LanguageModel
from lfm.models.registry import build, parse

Kind = Literal["master", "moving", "frozen"]
"""Trained; moved between steps; neither."""


@dataclass(frozen=True)
class Expected:
    """A tensor that a model has."""

    kind: Kind
    tensor: Tensor
    """On the meta device: shape and dtype."""


def expected_tensors(config: FamilyConfig, dtype: torch.dtype = torch.float32) -> dict[str, Expected]:
    """The tensors of a model by global name, as they are when it works in `dtype`."""
    model = materialize(lambda: build(config), device=torch.device("meta"), dtype=dtype)
    moving, buffers, places = moving_names(model), dict(model.named_buffers()), stored(model)

    def kind_of(name: str) -> Kind:
        return "moving" if name in moving else "frozen" if places[name].tensor in buffers else "master"

    return {name: Expected(kind_of(name), view) for name, view in global_views(model, lambda _, t: t).items()}


class Source:
    """A verified checkpoint.  Raises UserError for one that is damaged."""

    def __init__(self, path: Path | str) -> None:
        self.path = find(expanded(path))
        self.manifest: dict[str, Any] = read_manifest(self.path)
        verify(self.path, self.manifest)
        self.config: Any = parse(self.manifest["config"]["model"], source=str(self.path / "manifest.json"))

    @property
    def kind(self) -> str:
        """Of the model's family."""
        return cast(str, self.config.kind)

    @property
    def tree(self) -> dict[str, Any]:
        """The model's configuration as JSON values."""
        return self.config.model_dump(mode="json")

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(self.path / TOKENIZER_NAME)

    def record(self) -> dict[str, Any]:
        """What an import needs to know beside the model, as JSON values."""
        progress = self.manifest["progress"]
        return {
            "name": self.manifest["config"]["name"],
            **{key: progress[key] for key in ("step", "tokens", "best_validation")},
        }

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors by global name, as they are in a model that works in `dtype`."""
        wanted = expected_tensors(self.config, dtype)
        tensors = {name: torch.empty_like(wanted[name].tensor, device="cpu") for name in names}
        load_tensors(self.path, self.manifest, {f"{wanted[name].kind}.{name}": t for name, t in tensors.items()})
        return tensors

    def model(self, dtype: torch.dtype, device: torch.device | None = None) -> LanguageModel:
        """In evaluation mode, on the CPU unless told otherwise."""
        model = materialize(lambda: build(self.config), device=device or torch.device("cpu"), dtype=dtype)
        kinds = {name: of.kind for name, of in expected_tensors(self.config).items()}
        views = global_views(model, lambda _, tensor: tensor)
        load_tensors(self.path, self.manifest, {f"{kinds[name]}.{name}": view for name, view in views.items()})
        return model.eval()
