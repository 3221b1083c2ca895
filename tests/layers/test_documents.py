import pytest
import torch

from lfm.layers.documents import IGNORED_LABEL, Documents


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
