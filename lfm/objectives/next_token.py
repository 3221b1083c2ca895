"""Next-token prediction; with a label mask it is fine-tuning on the answers alone."""

from typing import Literal

from torch import Tensor

from lfm.config import Config
from lfm.layers.documents import Rows
from lfm.layers.head import Head, Hidden
from lfm.models.losses import Term


class NextToken(Config):
    """Cross entropy of each id that may be a label, given those before it in its document."""

    kind: Literal["next_token"] = "next_token"
    """What is trained for."""

    @property
    def terms(self) -> tuple[Term, ...]:
        return (Term("cross_entropy", "label"),)

    @property
    def by_position(self) -> bool:
        return True

    def sums(self, hidden: Hidden, head: Head, rows: Rows) -> dict[str, Tensor]:
        states = hidden.cut
        labels = rows.documents.labels(rows.ids)[:, : states.shape[1]]
        return {"cross_entropy": head.cross_entropy(states, labels)}


NEXT_TOKEN = NextToken()
