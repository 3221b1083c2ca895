import pytest
import torch

from lfm.layers.documents import IGNORED_LABEL, Counts, Documents, Rows


def test_positions_restart_and_labels_stop_at_document_ends():
    documents = Documents.from_lengths([[3, 2], [1, 4]], "cpu")
    ids = torch.arange(10).view(2, 5)
    x = IGNORED_LABEL
    assert documents.positions.tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert documents.labels(ids).tolist() == [[1, 2, x, 4, x], [x, 7, 8, 9, x]]
    assert documents.num_labels == (documents.labels(ids) != x).sum() == 6
    assert documents.attended_pairs == 6 + 3 + 1 + 10
    assert documents.boundaries.tolist() == [0, 3, 5, 6, 10] and documents.longest == 4
    assert documents.slice_rows(1, 2).boundaries.tolist() == [0, 1, 5]


def test_padding_tokens_have_no_labels():
    documents = Documents.from_lengths([[3, 1, 1, 1]], "cpu")
    assert documents.labels(torch.zeros(1, 6, dtype=torch.int64)).tolist() == [[0, 0] + [IGNORED_LABEL] * 4]


@pytest.mark.parametrize("lengths", [[[3, 2], [4]], [[3, 0]], [[-1, 4]]])
def test_lengths_that_make_no_rows_are_refused(lengths):
    with pytest.raises(ValueError, match="document lengths"):
        Documents.from_lengths(lengths, "cpu")


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_labels_are_later_ids_of_the_same_document_that_may_be_labels(ahead, masked):
    lengths = [[3, 1, 6], [10], [1, 1, 4, 4]]
    ids = torch.arange(30).view(3, 10)
    mask = torch.rand(3, 10) < 0.6 if masked else None
    documents = Documents.from_lengths(lengths, "cpu", mask)
    want, which = torch.full_like(ids, IGNORED_LABEL), [torch.tensor(row).cumsum(0).tolist() for row in lengths]
    for row in range(3):
        for t in range(10 - ahead):
            end = next(end for end in which[row] if t < end)
            if t + ahead < end and (mask is None or mask[row, t + ahead]):
                want[row, t] = ids[row, t + ahead]
    assert documents.labels(ids, ahead).tolist() == want.tolist()
    if ahead == 1:
        assert documents.labels_by_row == tuple((want != IGNORED_LABEL).sum(1).tolist())
        assert documents.counts == Counts(labels=documents.num_labels, rows=3, documents=5)
        part = documents.slice_rows(1, 3)
        assert part.num_labels == (want[1:] != IGNORED_LABEL).sum()
        assert torch.equal(part.labels(ids[1:]), want[1:])


def test_a_mask_of_all_true_is_none():
    documents = Documents.from_lengths([[3, 2]], "cpu", torch.ones(1, 5, dtype=torch.bool))
    plain = Documents.from_lengths([[3, 2]], "cpu")
    ids = torch.arange(5)[None]
    assert torch.equal(documents.labels(ids), plain.labels(ids)) and documents.counts == plain.counts


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"label_mask has shape \[1, 4\]"):
        Documents.from_lengths([[3, 2]], "cpu", torch.ones(1, 4, dtype=torch.bool))


def test_nothing_is_divided_by_zero():
    counts = Documents.from_lengths([[1, 1]], "cpu").counts
    assert counts == Counts(labels=0, rows=1, documents=0) and counts.of("label") == counts.of("document") == 1


def test_rows_are_cut_with_all_their_columns():
    documents = Documents.from_lengths([[3], [1, 2]], "cpu")
    rows = Rows(torch.arange(6).view(2, 3), documents, {"class": torch.tensor([4, 5])})
    part = rows.slice(1, 2)
    assert part.ids.tolist() == [[3, 4, 5]] and part.documents.lengths == ((1, 2),)
    assert part.extras["class"].tolist() == [5]
