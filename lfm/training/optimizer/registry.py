"""Optimizers by `optimizer.kind`; AdamW where none is named."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from lfm.training.optimizer.adamw import AdamWConfig
from lfm.training.optimizer.lion import LionConfig


def _named(tree: Any) -> Any:
    return {"kind": "adamw", **tree} if isinstance(tree, dict) else tree


OptimizerConfig = Annotated[
    Annotated[AdamWConfig | LionConfig, Field(discriminator="kind")],
    BeforeValidator(_named),
]
