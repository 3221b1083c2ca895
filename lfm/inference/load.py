"""A checkpoint's model, for use."""

from pathlib import Path
from typing import Any, Literal

import torch

from lfm.checkpoint.folder import find, verify
from lfm.checkpoint.manifest import TOKENIZER_NAME, read_manifest
from lfm.checkpoint.matching import check_layers
from lfm.checkpoint.tensors import load_tensors
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.files import expanded
from lfm.kernels.backend import working_dtype
from lfm.models.global_names import global_views, moving_names
from lfm.models.initialization import materialize
from lfm.models.language_model import LanguageModel
from lfm.models.registry import build, parse


def load_model(
    path: Path | str, *, device: torch.device, dtype: torch.dtype
) -> tuple[LanguageModel, dict[str, Any], Path]:
    """A verified checkpoint's model in evaluation mode, its manifest, and the checkpoint's path."""
    checkpoint = find(expanded(path))
    manifest = read_manifest(checkpoint)
    verify(checkpoint, manifest)
    config = parse(manifest["config"]["model"], source=str(checkpoint / "manifest.json"))
    model = materialize(lambda: build(config), device=device, dtype=dtype)
    views = global_views(model, lambda _, tensor: tensor)
    kinds = {name.removeprefix("frozen."): "frozen" for name in manifest["frozen"]}
    kinds |= dict.fromkeys(moving_names(model), "moving")
    keys = {f"{kinds.get(name, 'master')}.{name}": tensor for name, tensor in views.items()}
    load_tensors(checkpoint, manifest, keys)
    check_layers(checkpoint, manifest, config)
    for layer, warmup in manifest["counters"]["reservoir_warmup"].items():
        model.liquids[int(layer)].warmup = warmup
    return model.eval(), manifest, checkpoint


def open_model(path: Path | str, *, device: Literal["auto", "cpu", "cuda"]) -> tuple[LanguageModel, Tokenizer, Path]:
    """A verified checkpoint's model, in `working_dtype` of the device, its tokenizer, and the checkpoint's path."""
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for and no GPU is visible; use --device cpu")
    where = torch.device("cuda" if cuda else "cpu")
    model, _, checkpoint = load_model(path, device=where, dtype=working_dtype(where))
    return model, Tokenizer.from_file(checkpoint / TOKENIZER_NAME), checkpoint
