"""Model families by `model.kind`."""

from collections.abc import Sequence
from typing import Annotated, Any, cast

from pydantic import Field

from lfm.config import Config
from lfm.layers.parts import PLAIN, Parts
from lfm.models.decoder import Decoder
from lfm.models.laerc import LAERC, LAERCConfig
from lfm.models.language_model import LanguageModel
from lfm.models.lfm import LFM, LFMConfig
from lfm.models.liquidlm import LiquidLM, LiquidLMConfig
from lfm.models.liquidnet import LiquidNet, LiquidNetConfig
from lfm.models.liquidnn import LiquidNNConfig, MiniLiquidGPT
from lfm.models.lstm import LSTM, LSTMConfig
from lfm.models.transformer import Transformer, TransformerConfig

FAMILIES: dict[type, type[LanguageModel]] = {
    LFMConfig: LFM,
    LAERCConfig: LAERC,
    LiquidLMConfig: LiquidLM,
    LiquidNNConfig: MiniLiquidGPT,
    LiquidNetConfig: LiquidNet,
    TransformerConfig: Transformer,
    LSTMConfig: LSTM,
}
"""Configuration class -> model class, which is built from it alone."""

ModelConfig = Annotated[
    LFMConfig | LAERCConfig | LiquidLMConfig | LiquidNNConfig | LiquidNetConfig | TransformerConfig | LSTMConfig,
    Field(discriminator="kind"),
]


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
