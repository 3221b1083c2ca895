"""Streams that cannot be written, each a real one; what whole commands do: tests/launch/test_streams.py."""

import fcntl
import io
import logging
import os
import sys
import time

import pytest
from tqdm import tqdm

from lfm.talk import Voice, say, talking, warn


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
