"""Files as they lie on real disks: what is no regular file, may not be read, or has a name that cannot be printed."""

import os
import resource
from pathlib import Path

import pytest

from lfm.errors import UserError
from lfm.files import exists, listed, open_file, read_file, shown


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


@pytest.mark.parametrize("reader", [open_file, read_file])
def test_what_is_no_regular_file_is_named_at_once(reader, tmp_path, fifo):
    (tmp_path / "loop").symlink_to("loop")
    for path in (fifo, tmp_path, Path("/dev/zero"), tmp_path / "loop", tmp_path / "absent", tmp_path / "a\0b"):
        with pytest.raises(UserError) as found:
            reader(path)
        assert path.name.replace("\0", "\\x00") in str(found.value)


def test_absence_is_told_from_not_being_able_to_look(tmp_path, fifo):
    assert not exists(tmp_path / "absent") and not exists(fifo / "below a file")
    assert listed(tmp_path / "absent") == [] and listed(tmp_path) == [fifo]
    (tmp_path / "broken").symlink_to("nowhere")
    assert exists(fifo) and exists(tmp_path / "broken")
    for look in (exists, listed):
        with pytest.raises(UserError, match="too long"):
            look(Path("x" * 5000))
    # Without free descriptors no folder can be read, whoever asks: what is there must not count as none.
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(UserError, match="Too many open files"):
            listed(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_every_name_can_be_printed():
    assert shown(Path(os.fsdecode("é \xff".encode("latin-1")) + "漢\n\0")) == "\\xe9 \\xff漢\\x0a\\x00"
    assert len(shown(Path("x" * 5000))) < 400
