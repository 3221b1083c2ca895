"""Model families by `model.kind`."""

from typing import Annotated, Any

from pydantic import Field

from lfm.config import Config
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


def build(config: ModelConfig) -> LanguageModel:
    """The model, initialised with seed 0 unless it is built under `torch.device("meta")`."""
    return FAMILIES[type(config)](config)  # type: ignore[call-arg]
