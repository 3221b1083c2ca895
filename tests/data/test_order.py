import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lfm.data.order import random_order, row_order

seeds = st.integers(0, 2**63 - 1)
num_rows = st.integers(1, 200)


@given(seeds, num_rows, st.integers(0, 5))
def test_each_row_is_used_once_an_epoch(seed, num_rows, epoch):
    rows = row_order(seed, num_rows, epoch * num_rows, num_rows)
    assert rows.dtype == np.int64
    assert sorted(rows) == list(range(num_rows))


@given(seeds, num_rows, st.integers(0, 500), st.lists(st.integers(0, 70), max_size=8))
def test_order_does_not_depend_on_how_it_is_asked_for(seed, num_rows, start, counts):
    whole = row_order(seed, num_rows, start, sum(counts))
    pieces, position = [], start
    for count in counts:
        pieces.append(row_order(seed, num_rows, position, count))
        position += count
    assert list(whole) == [row for piece in pieces for row in piece]


def test_epochs_and_seeds_differ_in_order():
    first, second = row_order(0, 100, 0, 100), row_order(0, 100, 100, 100)
    assert list(first) != list(second)
    assert list(first) != list(row_order(1, 100, 0, 100))
    assert list(first) != list(range(100))


def test_order_is_the_same_on_every_machine_and_version():
    assert row_order(7, 10, 5, 10).tolist() == [4, 9, 7, 6, 1, 9, 8, 2, 0, 3]


@given(seeds, num_rows, st.integers(0, 500), st.lists(st.integers(0, 70), max_size=8))
def test_random_order_does_not_depend_on_how_it_is_asked_for(seed, num_rows, start, counts):
    whole = random_order(seed, num_rows, 0, start + sum(counts))
    assert whole.dtype == np.int64
    assert len(whole) == 0 or (whole.min() >= 0 and whole.max() < num_rows)
    position = start
    for count in counts:
        assert list(random_order(seed, num_rows, position, count)) == list(whole[position : position + count])
        position += count


def test_random_order_is_the_same_on_every_machine_and_version():
    assert random_order(7, 10**12, 5, 3).tolist() == [39059783732, 508507347152, 314606432294]
    assert random_order(8, 10**12, 5, 3).tolist() != [39059783732, 508507347152, 314606432294]
