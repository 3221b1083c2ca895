"""Model families by `model.kind`."""

from typing import Any

from lfm.config import Config
from lfm.models.language_model import LanguageModel
from lfm.models.lfm import LFM, LFMConfig

FAMILIES: dict[type, type[LanguageModel]] = {LFMConfig: LFM}
"""Configuration class -> model class, which is built from it."""

ModelConfig = LFMConfig


class _Tree(Config):
    model: ModelConfig


def parse(tree: dict[str, Any], *, source: str) -> ModelConfig:
    """The configuration that `tree` (with its `kind`) describes.  Raises UserError naming `source`."""
    return _Tree.from_tree({"model": tree}, source=source).model


def build(config: ModelConfig) -> LanguageModel:
    """The model, uninitialised; safe under `torch.device("meta")`."""
    return FAMILIES[type(config)](config)  # type: ignore[call-arg]
