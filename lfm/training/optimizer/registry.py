"""Optimizers by `optimizer.kind`; AdamW where none is named."""

from typing import Annotated

from pydantic import Field

from lfm.config import default_kind
from lfm.training.optimizer.adamw import AdamWConfig
from lfm.training.optimizer.lion import LionConfig

OptimizerConfig = Annotated[
    Annotated[AdamWConfig | LionConfig, Field(discriminator="kind")],
    default_kind("adamw"),
]
