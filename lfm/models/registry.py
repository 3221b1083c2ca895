"""Model families by `model.kind`."""

from lfm.models.lfm import LFM, LFMConfig

ModelConfig = LFMConfig


def build(config: ModelConfig) -> LFM:
    """The plain single-device model, uninitialised; safe under `torch.device("meta")`."""
    return LFM(config)
