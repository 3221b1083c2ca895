"""The leaky tanh reservoir: its recurrence over time, its initialisation, its warm-ups and what keeps it forgetful."""

from lfm.kernels.reservoir.contraction import contraction
from lfm.kernels.reservoir.initialization import make_reservoir
from lfm.kernels.reservoir.op import RecurrenceStats, reservoir_recurrence
from lfm.kernels.reservoir.warmup import WARMUP_NOTCHES

__all__ = ["WARMUP_NOTCHES", "RecurrenceStats", "contraction", "make_reservoir", "reservoir_recurrence"]
