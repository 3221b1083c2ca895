"""Checkpoints whose author is an attacker, who knows how hashes and checksums are made: nothing of them is run."""

import io
import os
import pickle
import re
import time
import zipfile

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from lfm.checkpoint import folder as checkpoint
from lfm.checkpoint import stored_tensors
from lfm.checkpoint.manifest import read_manifest
from lfm.checkpoint.saver import Saver
from lfm.checkpoint.tensors import load_tensors
from lfm.errors import NonFiniteError, UserError
from lfm.training.loop import train
from tests.launch.test_launch import assert_refused, main  # noqa: F401  (main is a fixture)
from tests.training.tiny_run import manifest_fields, rewrite_manifest, tiny_run

STATE = {
    "master.a": torch.arange(12.0).view(3, 4),
    "frozen.mask": torch.tensor([True, False]),
    "exp_avg.s": torch.ones(()),
}


@pytest.fixture
def saved(tmp_path):
    with Saver(tmp_path, keep=1, asynchronous=False) as saver:
        saver.save(1, STATE, manifest_fields(1), b"{}")
    return tmp_path / "step_00000001"


def read(path):
    manifest = read_manifest(path)
    checkpoint.verify(path, manifest)
    targets = {key: torch.full_like(tensor, 7) for key, tensor in STATE.items()}
    load_tensors(path, manifest, targets)
    return targets


@pytest.mark.parametrize("offsets", [[0, 1], [0, 0], [1, 2]])
def test_pieces_that_overlap_do_not_make_up_a_tensor(saved, offsets):
    def change(metadata: Metadata):
        stored = metadata.state_dict_metadata["frozen.mask"]
        stored.size = torch.Size([4])
        kind = type(stored.chunks[0])
        stored.chunks = [kind(torch.Size([at]), torch.Size([2])) for at in offsets]
        return pickle.dumps(metadata)

    replace_metadata(saved, change)
    with pytest.raises(UserError, match=r"two pieces have one place|not within its tensor"):
        stored_tensors.read_metadata(saved, read_manifest(saved)["files"])


def test_members_of_enumerations_as_some_pythons_write_them(saved, monkeypatch):
    encoding = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    monkeypatch.setattr(encoding, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    file = saved / stored_tensors.METADATA_NAME
    with file.open("rb") as stream:
        metadata = pickle.load(stream)
    written = pickle.dumps(metadata)
    assert b"getattr" in written
    file.write_bytes(written)
    rewrite_manifest(saved)
    assert all(torch.equal(found, STATE[key]) for key, found in read(saved).items())


class Call:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def replace_metadata(path, change):
    file = path / stored_tensors.METADATA_NAME
    file.write_bytes(change(pickle.loads(file.read_bytes())))
    rewrite_manifest(path)


def in_place_of_all(mark):
    return lambda _: pickle.dumps(Call(os.mkdir, mark))


def deep_within(mark):
    def change(metadata: Metadata):
        metadata.planner_data = {"master.a": [Call(os.mkdir, mark)]}
        return pickle.dumps(metadata)

    return change


def by_protocol_0(mark):
    return lambda _: f"cos\nmkdir\n(V{mark}\ntR.".encode()


def through_an_attribute_of_what_is_allowed(mark):
    # Protocol 4 looks names with dots up step by step.
    name = b"Metadata.__init__.__globals__"
    module = b"torch.distributed.checkpoint.metadata"
    return lambda _: b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93."


def by_torch_load(mark):
    return lambda _: pickle.dumps(Call(torch.load, io.BytesIO))


PLANTED = [in_place_of_all, deep_within, by_protocol_0, through_an_attribute_of_what_is_allowed, by_torch_load]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_metadata_that_calls_anything_is_refused_and_not_run(plant, saved, tmp_path):
    mark = str(tmp_path / "mark")
    replace_metadata(saved, plant(mark))
    with pytest.raises(UserError, match=r"\.metadata names \S+, code that lfm does not run; use a checkpoint that"):
        read(saved)
    assert not os.path.exists(mark)


def _doubled(times):
    """A tuple of a few hundred bytes that holds the one before twice, and so on: 2^times empty ones to walk over."""
    return b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(times))


@pytest.mark.parametrize(
    "pickled",
    [
        b"}" + _doubled(60) + b"Ns.",  # a key that is hashed for ever
        b"})" + b"\x85" * 500_000 + b"Ns.",  # one whose hashing overflows the C stack
        _doubled(60) + b"\x8c\x04Sizectorch\nSize\nh<R.",  # printed for ever, were it shown
        b"Nr" + (2**31 - 1).to_bytes(4, "little") + b".",  # 16 GiB of places to remember one thing at
        b"\x96" + (2**40).to_bytes(8, "little") + b"a.",
        b"\x8b" + (2**31 - 1).to_bytes(4, "little") + b"a.",
    ],
    ids=["key", "deep key", "value", "memo", "bytearray", "long"],
)
def test_metadata_of_few_bytes_that_grow_beyond_bounds_is_refused_at_once(pickled, saved):
    (saved / stored_tensors.METADATA_NAME).write_bytes(b"\x80\x05" + pickled)
    rewrite_manifest(saved)
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"\.metadata does not describe tensors .*; use another checkpoint"):
        read(saved)
    assert time.perf_counter() - start < 30


def test_an_entry_that_is_no_tensor_is_not_unpickled(saved, tmp_path):
    """DCP's planner loads such an entry without weights_only, from a file that its metadata may name freely."""
    mark, data = str(tmp_path / "mark"), io.BytesIO()
    torch.save(Call(os.mkdir, mark), data)
    (saved / "__0_0.distcp").write_bytes(data.getvalue())

    def change(metadata: Metadata):
        metadata.state_dict_metadata["master.a"] = BytesStorageMetadata()
        for place in metadata.storage_data.values():
            place.relative_path, place.offset, place.length = "__0_0.distcp", 0, len(data.getvalue())
        return pickle.dumps(metadata)

    replace_metadata(saved, change)
    with pytest.raises(UserError, match="BytesStorageMetadata, code that lfm does not run"):
        read(saved)
    assert not os.path.exists(mark)


def test_a_piece_that_calls_anything_is_refused_and_not_run(saved, tmp_path):
    mark, data = str(tmp_path / "mark"), io.BytesIO()
    torch.save(Call(os.mkdir, mark), data)
    for file in saved.glob("*.distcp"):
        file.write_bytes(data.getvalue() + bytes(max(0, file.stat().st_size - len(data.getvalue()))))

    def change(metadata: Metadata):
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, len(data.getvalue())
        return pickle.dumps(metadata)

    replace_metadata(saved, change)
    with pytest.raises(UserError, match=r"\.distcp names \S.*, code that lfm does not run"):
        read(saved)
    assert not os.path.exists(mark)


def _packed(saved_by_torch, *, compression=zipfile.ZIP_STORED, described=None):
    """The archive of a torch.save with its entries compressed, and another pickle in it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(saved_by_torch) as source, zipfile.ZipFile(packed, "w", compression) as target:
        for entry in source.infolist():
            replaced = described if entry.filename.endswith("data.pkl") else None
            target.writestr(entry.filename, replaced or source.read(entry))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, r"a piece of \d+ bytes unpacks to 400\d+"),
        ({"described": b"\x80\x02}" + _doubled(60) + b"Ns."}, "no tensor has a BINGET"),
        ({"described": b"\x80\x02})" + b"\x85" * 500_000 + b"Ns."}, "a piece takes 5000.. bytes to describe"),
    ],
    ids=["compressed", "key", "deep key"],
)
def test_a_piece_that_grows_when_it_is_loaded_is_refused(options, why, saved):
    data = io.BytesIO()
    torch.save(torch.zeros(1_000_000).as_strided((3, 4), (0, 0)), data)
    packed = _packed(data, **options)

    def change(metadata: Metadata):
        for index, place in metadata.storage_data.items():
            if index.fqn == "master.a":
                (saved / place.relative_path).write_bytes(packed)
                place.offset, place.length = 0, len(packed)
        return pickle.dumps(metadata)

    replace_metadata(saved, change)
    manifest = read_manifest(saved)
    with pytest.raises(UserError, match=rf"__0_\d+\.distcp cannot be read as tensors \({why}"):
        load_tensors(saved, manifest, {"master.a": torch.zeros(3, 4)})


def somewhere_else(metadata):
    for place in metadata.storage_data.values():
        place.relative_path = "../step_00000001/__0_0.distcp"


def beyond_the_file(metadata):
    for place in metadata.storage_data.values():
        place.length = 2**40


def a_piece_short(metadata):
    metadata.state_dict_metadata["master.a"].chunks.clear()


def a_piece_outside(metadata):
    metadata.state_dict_metadata["master.a"].chunks[0].offsets = torch.Size([1, 0])


def of_another_shape(metadata):
    entry = metadata.state_dict_metadata["master.a"]
    entry.size = entry.chunks[0].sizes = torch.Size([4, 3])


WRONG = {
    somewhere_else: "is no file of the manifest",
    beyond_the_file: "a piece is not within __0_",
    a_piece_short: "pieces do not make up their tensor",
    a_piece_outside: "a piece is not within its tensor",
    of_another_shape: r"master\.a of checkpoint \S+ has shape \[4, 3\], not \[3, 4\]",
}


@pytest.mark.parametrize("harm", WRONG, ids=lambda harm: harm.__name__)
def test_metadata_that_does_not_describe_the_tensors_is_refused(harm, saved):
    def change(metadata):
        harm(metadata)
        return pickle.dumps(metadata)

    replace_metadata(saved, change)
    with pytest.raises(UserError, match=WRONG[harm]):
        read(saved)


def test_a_state_that_is_not_finite_is_no_start_of_anything(tmp_path):
    state = STATE | {"exp_avg.s": torch.tensor(torch.inf)}
    with Saver(tmp_path, keep=1, asynchronous=False) as saver:
        saver.save(1, state, manifest_fields(1), b"{}")
    with pytest.raises(NonFiniteError, match=r"step_00000001: exp_avg\.s is not finite; use an earlier checkpoint"):
        read(tmp_path / "step_00000001")


def test_what_was_saved_is_read_and_no_flipped_byte_of_metadata_does_harm(saved):
    for key, tensor in read(saved).items():
        assert torch.equal(tensor, STATE[key])
    file = saved / stored_tensors.METADATA_NAME
    good = file.read_bytes()
    files = read_manifest(saved)["files"]
    for place in range(0, len(good), 3):
        file.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        try:
            stored_tensors.read_metadata(saved, files)
        except UserError as error:
            assert re.search(r"\.metadata (does not describe tensors|names)", str(error))


def test_no_way_to_a_checkpoint_runs_what_it_holds(tmp_path, text_data, main):  # noqa: F811
    run = tiny_run(tmp_path, text_data, "training.steps=1", "schedule.warmup_steps=1")
    train(run)
    mark = str(tmp_path / "mark")
    planted = run.folder / "checkpoints/step_00000001"
    replace_metadata(planted, deep_within(mark))
    for more in (["training.steps=2"], ["name=other", f"checkpoint.init_from={planted}"]):
        with pytest.raises(UserError, match="code that lfm does not run"):
            train(tiny_run(tmp_path, text_data, *more))
    for command in (["generate", "--prompt", "x"], ["chat"], ["plasticity"]):
        assert_refused(main(command[0], "--checkpoint", run.folder, *command[1:]), "code that lfm does not run")
    assert not os.path.exists(mark)
