import torch

from lfm.data.batch import Batch


def a_batch() -> Batch:
    mask = torch.arange(12).view(3, 4) % 2 == 0
    return Batch(torch.arange(12).view(3, 4), [[4], [1, 3], [2, 2]], mask, {"class": torch.tensor([7, 8, 9])})


def test_a_part_has_the_same_rows_of_every_column():
    part = a_batch()[1:3]
    assert len(part) == 2 and part.lengths == [[1, 3], [2, 2]]
    assert part.ids.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]] and part.extras["class"].tolist() == [8, 9]
    assert torch.equal(part.label_mask, a_batch().label_mask[1:])


def test_rows_that_fill_a_batch_have_no_label():
    batch = a_batch()
    for filled in (batch.filled(2), Batch(batch.ids, batch.lengths).filled(2)):
        rows = filled.to("cpu")
        assert len(filled) == 5 and rows.documents.labels_by_row[3:] == (0, 0)
        assert rows.documents.labels_by_row[:3] == filled[:3].to("cpu").documents.labels_by_row
    assert batch.filled(0).digest() == batch.digest()


def test_a_model_is_given_every_column():
    rows = a_batch().to("cpu")
    assert torch.equal(rows.ids, a_batch().ids) and rows.extras["class"].tolist() == [7, 8, 9]
    assert torch.equal(rows.documents.label_mask, a_batch().label_mask)
    assert rows.documents.counts.labels == 1 + 1 + 0  # ids 2, 6 and none of the last row
