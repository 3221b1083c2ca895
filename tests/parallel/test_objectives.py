"""An objective with terms over labels, rows and documents, and a mask of labels, train alike under every layout.

The terms are made up.  One reads the head, whose vocabulary tensor ranks cut; one reads whole hidden states, as a
read-out that every rank makes alike; one is no plain sum of token losses.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core", reason="needs the extra `parallel`")
pytest.importorskip("deepspeed", reason="needs the extra `parallel`")

from lfm.layers.documents import Rows
from lfm.layers.head import Head, Hidden
from lfm.layout.layout import check_layout
from lfm.models.losses import Term
from lfm.training.certificate import LAYOUTS, Numbers, Problem, certify, in_one_process
from tests.parallel.test_certificate import SMALL, problem


@dataclass(frozen=True)
class ThreeUnits:
    terms: tuple[Term, ...] = (Term("far", "label"), Term("probe", "row", 0.3), Term("surprise", "document", 0.05))
    by_position: bool = False

    def sums(self, hidden: Hidden, head: Head, rows: Rows) -> dict[str, Tensor]:
        documents = rows.documents
        losses = head.token_losses(hidden.cut, documents.labels(rows.ids))
        pieces = [row.split(lengths) for row, lengths in zip(losses, documents.lengths, strict=True)]
        surprise = torch.stack([piece.sum().square() / len(piece) for row in pieces for piece in row])
        # Of the second next id, weighted by position; weights may be negative.
        weights = rows.documents.positions.float().sin()
        far = head.cross_entropy(hidden.cut, documents.labels(rows.ids, ahead=2), token_weights=weights)
        return {"far": far, "probe": hidden.whole.tanh().mean((1, 2)).sum(), "surprise": surprise.sum()}


QUICK = ("tp2_pp2", "dp2_z2")
MADE_UP: Problem = replace(problem(), objective=ThreeUnits(), steps=1, is_masked=True)


@pytest.fixture(scope="module")
def expected() -> Numbers:
    return in_one_process(MADE_UP, "cpu")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name not in QUICK)]
)
def test_terms_of_any_unit_are_certified(name, expected):
    world, parallel, recompute = LAYOUTS[name]
    layout = check_layout(SMALL, parallel, world, global_batch_size=8, micro_batch_size=1)
    found = certify(layout, replace(MADE_UP, recompute=recompute), expected, device_type="cpu")
    assert found.beyond == []
    assert {"far", "probe", "surprise", "balance_loss", "z_loss"} < expected.steps[0].keys()
