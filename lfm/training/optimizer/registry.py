"""Optimizers by `optimizer.kind`: a union, discriminated by it, once there are several."""

from lfm.training.optimizer.adamw import AdamWConfig

OptimizerConfig = AdamWConfig
