"""Files as they lie on real disks: what is no regular file, may not be read, or has a name that cannot be printed."""

import os
import resource
import select
import threading
from pathlib import Path

import pytest

from lfm.errors import UserError
from lfm.files import (
    exists,
    held_alone,
    keep_aside,
    listed,
    open_file,
    read_file,
    read_lines,
    refusing,
    remove_tree,
    shown,
    write_durably,
    write_out,
)


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


def test_a_lock_that_cannot_be_one_is_named_at_once_and_what_it_leads_to_is_not_cut(tmp_path, fifo):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "other").write_text("content")
    (tmp_path / "link").symlink_to("other")
    (tmp_path / "folder").mkdir()
    long = tmp_path / ("x" * 5000)
    for lock in (fifo, tmp_path / "loop", tmp_path / "folder", tmp_path / "other" / "lock", tmp_path / "a\0b", long):
        with pytest.raises(UserError, match=r"^unwritable \("), held_alone(lock, unwritable="unwritable", taken=""):
            pass
    with held_alone(tmp_path / "link", unwritable="", taken=""):
        with pytest.raises(UserError, match=r"^taken$"), held_alone(tmp_path / "other", unwritable="", taken="taken"):
            pass
    assert (tmp_path / "other").read_text() == "content"


def test_a_write_that_fails_leaves_nothing_and_is_one_sentence(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder cannot be used \(Is a directory\); way out$"), refusing("way out"):
        write_durably(tmp_path / "folder", b"content")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^File too large; way out$"), refusing("way out"):
            write_durably(tmp_path / "file", bytes(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["folder"]


def test_links_are_written_through_and_removed_alone(tmp_path):
    (tmp_path / "behind").mkdir()
    (tmp_path / "link").symlink_to("behind/file")
    write_durably(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "behind") == ["file"]
    (tmp_path / "folder").symlink_to("behind")
    remove_tree(tmp_path / "folder")
    remove_tree(tmp_path / "absent")
    assert sorted(os.listdir(tmp_path)) == ["behind", "link"] and read_file(tmp_path / "link") == b"content"


def test_a_line_that_cannot_be_read_leaves_the_others_and_a_copy(tmp_path, capsys):
    path = tmp_path / "history"
    path.write_bytes(b"1\n2\n3\n4")
    assert read_lines(path, int) == [("1\n", 1), ("2\n", 2), ("3\n", 3)] and capsys.readouterr().err == ""
    for number in (1, 2):
        path.write_bytes(b"1\n\xff%d\n\0\n3\n" % number)
        assert read_lines(path, int) == [("1\n", 1), ("3\n", 3)]
        assert (tmp_path / f"history.damaged-{number}").read_bytes() == path.read_bytes()
        assert "line 2 and 1 more cannot be read and is left out" in capsys.readouterr().err
    assert keep_aside(path, b"", "damaged").name == "history.damaged-3"


def test_a_pipe_gets_all_that_is_written_out_and_one_without_a_reader_is_refused(fifo):
    with pytest.raises(OSError, match="No such device or address"):
        write_out(fifo, b"x")
    data = os.urandom(1 << 20)  # more than a pipe holds
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = threading.Thread(target=write_out, args=(fifo, data))
    writer.start()
    select.select([reader], [], [])
    os.set_blocking(reader, True)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == data
    writer.join()
