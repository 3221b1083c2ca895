"""What a task gave, and whether two models differ on it."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lfm.evaluation.intervals import Interval, paired_interval


@dataclass(frozen=True)
class TaskResult:
    """Of a task, or of a group of tasks."""

    name: str
    metrics: dict[str, float]
    """By name; one of a filter other than `none` is `metric,filter`."""
    num_documents: int
    by_document: dict[str, np.ndarray]
    """Values of each metric that is a mean over documents, float64 `[num_documents]`, in order of the documents."""

    def standard_error(self, metric: str) -> float | None:
        """Of a mean over documents, as if they were drawn from many; None for another metric."""
        each = self.by_document.get(metric)
        return float(each.std(ddof=1) / math.sqrt(len(each))) if each is not None and len(each) > 1 else None

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        errors = {metric: self.standard_error(metric) for metric in self.metrics}
        return {
            "documents": self.num_documents,
            "metrics": {name: value if math.isfinite(value) else None for name, value in self.metrics.items()},
            "standard_errors": {metric: error for metric, error in errors.items() if error is not None},
        }


def differences(one: TaskResult, other: TaskResult) -> dict[str, Interval]:
    """Of each mean over documents: other - one, paired by document."""
    return {
        metric: paired_interval(one.by_document[metric], other.by_document[metric])
        for metric in one.by_document
        if metric in other.by_document and one.num_documents == other.num_documents >= 2
    }
