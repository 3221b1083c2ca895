"""A checkpoint's model, for use."""

from pathlib import Path
from typing import Any, Literal

import torch

from lfm.checkpoint.manifest import TOKENIZER_NAME
from lfm.checkpoint.matching import check_layers
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.export.hub import located
from lfm.export.source import Source
from lfm.inference.int8 import use_int8
from lfm.kernels.backend import working_dtype
from lfm.models.language_model import LanguageModel


def load_model(
    path: Path | str, *, device: torch.device, dtype: torch.dtype
) -> tuple[LanguageModel, dict[str, Any], Path]:
    """A verified checkpoint's model in evaluation mode, its manifest, and the checkpoint's path.

    `path` may be `hf://user/name` too.
    """
    source = Source(located(path))
    model = source.model(dtype, device)
    check_layers(source.path, source.manifest, source.config)
    for layer, warmup in source.manifest["counters"]["reservoir_warmup"].items():
        model.liquids[int(layer)].warmup = warmup
    return model, source.manifest, source.path


def open_model(
    path: Path | str, *, device: Literal["auto", "cpu", "cuda"], int8: bool = False
) -> tuple[LanguageModel, Tokenizer, Path]:
    """A verified checkpoint's model, in `working_dtype` of the device, its tokenizer, and the checkpoint's path.

    `int8`: as `lfm.inference.int8` has it.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for and no GPU is visible; use --device cpu")
    where = torch.device("cuda" if cuda else "cpu")
    model, _, checkpoint = load_model(path, device=where, dtype=working_dtype(where))
    if int8:
        use_int8(model)
    return model, Tokenizer.from_file(checkpoint / TOKENIZER_NAME), checkpoint
