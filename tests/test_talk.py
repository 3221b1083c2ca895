"""Streams that cannot be written, each a real one; what whole commands do: tests/launch/test_streams.py."""

import fcntl
import io
import logging
import os
import struct
import sys
import termios
import time

import pytest
from tqdm import tqdm

from lfm.talk import Voice, say, talking, waiting, warn


def full_pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    os.write(writer, b" " * fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096))
    return reader, writer


def broken_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed() -> int:
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.close(descriptor)
    return descriptor


UNWRITABLE = {
    "a full disk": lambda: os.open("/dev/full", os.O_WRONLY),
    "a broken pipe": broken_pipe,
    "a closed descriptor": closed,
    "a full pipe": lambda: full_pipe()[1],
}


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_no_way_of_talking_fails_or_waits_at_a_stream_that_cannot_be_written(kind, monkeypatch):
    descriptor = UNWRITABLE[kind]()
    monkeypatch.setattr("sys.stdout", None)
    with open(os.devnull, "w", encoding="utf-8") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        with talking():
            assert isinstance(sys.stderr, Voice)
            monkeypatch.setattr(sys.stderr, "_descriptor", descriptor)
            monkeypatch.setattr(sys.stdout, "_descriptor", descriptor)
            start = time.monotonic()
            with tqdm(total=3, mininterval=0) as bar:
                for _ in range(3):
                    say("a line")
                    warn("a line")
                    bar.update()
            print("x" * 100_000, "\udcff", flush=True)
            logging.StreamHandler().emit(logging.makeLogRecord({"msg": "a record"}))
            assert time.monotonic() - start < 5
        assert sys.stderr is stream and sys.stdout is None


def test_a_pipe_that_is_read_again_is_written_again():
    reader, writer = full_pipe()
    voice = Voice(writer, encoding="utf-8", patience=0.05)
    print("lost", file=voice)
    os.read(reader, 1 << 16)
    print("gru\u00dfe" * 1000, file=voice, flush=True)  # more than goes in
    assert os.read(reader, 1 << 16).startswith("gru\u00dfe".encode())
    print("heard", file=voice)
    assert os.read(reader, 1 << 16) == b"heard\n"


def test_a_stream_that_is_not_the_process_s_own_is_left_alone(monkeypatch):
    notebook = io.StringIO()
    monkeypatch.setattr("sys.stdout", notebook)
    with talking():
        say("a line")
    assert notebook.getvalue() == "a line\n"


@pytest.mark.parametrize("plain", [False, True])
def test_a_terminal_sees_colours_and_that_work_goes_on_unless_it_is_to_be_plain(plain, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    main, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    monkeypatch.setattr(sys, "stderr", open(terminal, "w", encoding="utf-8"))
    with talking(), waiting("building"):
        time.sleep(0.5)
        warn("warning: watch: out")
        warn("error: no")
    sys.stderr.close()
    seen = os.read(main, 1 << 16).decode()
    assert ("building (00:00)" in seen) is not plain and ("\033[33mwarning:\033[0m watch: out" in seen) is not plain
    assert ("\033[31merror:\033[0m no" in seen) is not plain and ("warning: watch: out" in seen) is plain


def test_nothing_moves_or_shines_in_a_file(tmp_path, monkeypatch):
    with open(tmp_path / "log", "w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stderr", file)
        with waiting("building"):
            warn("error: no")
    assert (tmp_path / "log").read_text() == "error: no\n"
