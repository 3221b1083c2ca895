"""Model families by `model.kind`."""

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Union, cast, get_type_hints

from pydantic import Field

from lfm.config import Config
from lfm.layers.parts import PLAIN, Parts
from lfm.models.decoder import Decoder
from lfm.models.language_model import FamilyConfig, LanguageModel

_CLASSES = {
    "lfm": "LFM",
    "laerc": "LAERC",
    "liquidlm": "LiquidLM",
    "liquidnn": "MiniLiquidGPT",
    "liquidnet": "LiquidNet",
    "transformer": "Transformer",
    "lstm": "LSTM",
}
"""Kind, which is the name of the family's module here too -> its model class, whose `config` names the config class."""


def _families() -> dict[type[FamilyConfig], type[LanguageModel]]:
    models = [getattr(import_module(f"lfm.models.{kind}"), name) for kind, name in _CLASSES.items()]
    return {get_type_hints(model)["config"]: model for model in models}


FAMILIES = _families()
"""Configuration class -> model class, which is built from it alone."""

if TYPE_CHECKING:
    ModelConfig = FamilyConfig
else:
    ModelConfig = Annotated[Union[tuple(FAMILIES)], Field(discriminator="kind")]  # noqa: UP007


class _Tree(Config):
    model: ModelConfig


def parse(tree: dict[str, Any], *, source: str) -> ModelConfig:
    """The configuration that `tree` (with its `kind`) describes.  Raises UserError naming `source`."""
    return _Tree.from_tree({"model": tree}, source=source).model


def build(config: ModelConfig, parts: Parts = PLAIN, layers: Sequence[int] | None = None) -> LanguageModel:
    """The model, initialised with seed 0 unless it is built under `torch.device("meta")`.

    With `parts` or `layers` it is built for a layout, of these parts or of these layers alone (see `Decoder`), and not
    initialised; what a family makes of them is in its config's `lays_out`.
    """
    family = cast(Any, FAMILIES[type(config)])
    if parts is PLAIN and layers is None:
        return family(config)
    if issubclass(family, Decoder):
        return family(config, parts=parts, layers=layers)
    assert parts.tensor_size == 1 and (layers is None or len(layers) == config.num_layers), "see its lays_out"
    return family(config)
