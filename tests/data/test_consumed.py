import resource
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lfm.data.batch import Batch
from lfm.data.consumed import CONSUMED_NAME, START, Consumed, ConsumedRecord, chained, read_record
from lfm.errors import UserError


def a_step(num_rows=6, T=5):
    ids = torch.arange(num_rows * T).view(num_rows, T)
    return ids, [[T - 2, 2] for _ in range(num_rows)]


def write(folder, digests, *, start=0, chain=START):
    record = ConsumedRecord(folder, resumed_step=start, chain=chain)
    for step, digest in enumerate(digests, start=start + 1):
        chain = chained(chain, step, digest)
        record.add(Consumed(step, digest, chain))
    record.sync()
    return chain


@given(st.lists(st.integers(0, 6), max_size=4))
def test_a_step_has_one_digest_however_it_is_cut(cuts):
    bounds = [0, *sorted(cuts), 6]
    for step in (Batch(*a_step()), a_step_with_columns()):
        parts = [step[a:b].digest(first=a) for a, b in pairwise(bounds)]
        assert sum(parts) % 2**64 == step.digest()


def test_any_other_step_has_another_digest():
    ids, lengths = a_step()
    digest = Batch(ids, lengths).digest()
    changed = ids.clone()
    changed[3, 4] += 1
    others = [
        Batch(changed, lengths).digest(),
        Batch(ids[[1, 0, 2, 3, 4, 5]], lengths).digest(),
        Batch(ids[:5], lengths[:5]).digest(),
        Batch(ids, [*lengths[:5], [2, 3]]).digest(),
        Batch(ids, [*lengths[:5], [5]]).digest(),
        Batch(ids, lengths).digest(first=1),
    ]
    assert len({digest, *others}) == 7
    assert Batch(torch.stack([ids, ids], 2)[:, :, 0], lengths).digest() == digest  # a view that is not contiguous


def a_step_with_columns() -> Batch:
    ids, lengths = a_step()
    mask = torch.arange(ids.numel()).view(ids.shape) % 3 > 0
    return Batch(ids, lengths, mask, {"class": torch.arange(len(ids)), "weight": torch.ones(len(ids), 2)})


def test_mask_and_further_columns_are_in_the_digest():
    step = a_step_with_columns()
    plain = Batch(step.ids, step.lengths)
    assert Batch(step.ids, step.lengths, torch.ones_like(step.label_mask)).digest() == plain.digest()
    other_mask = step.label_mask.clone()
    other_mask[2, 1] ^= True
    others = [
        plain,
        Batch(step.ids, step.lengths, step.label_mask),
        Batch(step.ids, step.lengths, other_mask, step.extras),
        Batch(step.ids, step.lengths, step.label_mask, {**step.extras, "class": torch.zeros(6, dtype=torch.int64)}),
        Batch(step.ids, step.lengths, step.label_mask, {"class": step.extras["class"]}),
        Batch(step.ids, step.lengths, step.label_mask, {"kind": step.extras["class"], "weight": step.extras["weight"]}),
    ]
    assert len({step.digest(), *(other.digest() for other in others)}) == 7


def test_digests_and_chains_are_the_same_on_every_machine_and_version():
    assert f"{Batch(*a_step()).digest():016x}" == "aad77660983930ea"
    assert chained(START, 1, 7) == "199f00d917d34d083ebe5ead854352fc"


def test_a_record_goes_on_from_the_step_of_the_checkpoint(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    chain = write(whole, range(9))
    write(parts, [0, 1, 2, 3, 99, 98])
    with open(parts / CONSUMED_NAME, "a", encoding="utf-8") as file:
        file.write("7 00")  # cut short by a crash
    kept = read_record(parts)[3]
    assert write(parts, range(4, 9), start=4, chain=kept.chain) == chain
    assert (parts / CONSUMED_NAME).read_bytes() == (whole / CONSUMED_NAME).read_bytes()


def test_a_record_that_did_not_lead_to_the_checkpoint_is_kept_under_another_name(tmp_path, capsys):
    write(tmp_path, range(4))
    write(tmp_path, [7, 8], start=4, chain="f" * 32)
    assert [entry.step for entry in read_record(tmp_path)] == [5, 6]
    assert "consumed.txt.abandoned-1" in capsys.readouterr().err
    assert len((tmp_path / "consumed.txt.abandoned-1").read_text().splitlines()) == 4


def test_steps_that_a_full_disk_kept_out_are_written_when_there_is_room(tmp_path, capsys):
    record, chain = ConsumedRecord(tmp_path, resumed_step=0, chain=START), START
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(1, 7):
        if step == 3:  # room for half a line
            resource.setrlimit(resource.RLIMIT_FSIZE, (130, limits[1]))
        if step == 5:
            record.sync()
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        chain = chained(chain, step, step)
        record.add(Consumed(step, step, chain))
    assert [entry.step for entry in read_record(tmp_path)] == list(range(1, 7))
    said = capsys.readouterr().err
    assert said.count("cannot be written") == 1 and said.count("is written again, and lacks nothing") == 1


@pytest.mark.parametrize("full", [False, True], ids=["written", "waiting"])
def test_a_record_that_is_cut_back_goes_on_from_there(full, tmp_path, capsys):
    record, chains = ConsumedRecord(tmp_path, resumed_step=0, chain=START), [START]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(1, 7):
        if full and step in (3, 4):  # step 3 comes to be on the disk, by a write of 3 and 4 that failed
            resource.setrlimit(resource.RLIMIT_FSIZE, (130 if step == 3 else 190, limits[1]))
        chains.append(chained(chains[-1], step, step))
        record.add(Consumed(step, step, chains[-1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    record.truncate(4, chain=chains[4])
    assert [entry.step for entry in read_record(tmp_path)] == [1, 2, 3, 4]
    record.add(Consumed(5, 9, chained(chains[4], 5, 9)))
    assert [(entry.step, entry.digest) for entry in read_record(tmp_path)][-2:] == [(4, 4), (5, 9)]
    record.truncate(7, chain=START)
    assert "consumed.txt lacks steps 6 to 7" in capsys.readouterr().err


def test_a_record_that_cannot_be_written_is_given_up_with_one_message(tmp_path, capsys):
    (tmp_path / CONSUMED_NAME).mkdir()
    write(tmp_path, range(4))
    assert capsys.readouterr().err.count("consumed.txt is not written from now on") == 1


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda text: text.replace("3 0000000000000002", "3 0000000000000003"), "the chain of step 3 does not follow"),
        (lambda text: text.replace(text.splitlines(keepends=True)[1], ""), "goes from step 1 to step 3"),
        (lambda text: "", "has no steps"),
    ],
)
def test_a_record_that_was_changed_is_an_error(change, words, tmp_path):
    write(tmp_path, range(4))
    path = tmp_path / CONSUMED_NAME
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=rf"consumed\.txt .*{words}"):
        read_record(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"consumed\.txt cannot be read"):
        read_record(tmp_path)
