"""The cross entropy of a model in one call."""

from typing import Any

from torch import Tensor

from lfm.layers.documents import Documents, Rows
from lfm.models.language_model import LanguageModel
from lfm.objectives.next_token import NEXT_TOKEN


def cross_entropy(model: LanguageModel, ids: Tensor, documents: Documents, **options: Any) -> Tensor:
    """Sum over the labels, nats; with gradients."""
    return model.losses(Rows(ids, documents), NEXT_TOKEN, **options).sums["cross_entropy"]
