"""How commands end: refusals of the system as one sentence, bugs with their traceback."""

import os
from pathlib import Path

import pytest

from lfm.exits import command


def loop(folder: Path) -> None:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    (folder / "a").read_bytes()


REFUSALS = {
    "a loop of links": (loop, "error: {folder}/a: Too many levels of symbolic links"),
    "a folder": (lambda folder: folder.read_bytes(), "error: {folder}: Is a directory"),
    "no path": (lambda folder: os.write(1 << 20, b""), "error: Bad file descriptor, at line "),
    "a long name": (lambda folder: os.stat("n" * 5000), "error: nnn"),
    "a NUL": (lambda folder: os.stat("a\0b"), "error: a path holds a NUL character, at line "),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_system_refuses_is_one_sentence_and_exit_code_2(case, tmp_path, capsys):
    work, sentence = REFUSALS[case]
    with pytest.raises(SystemExit, match="2"):
        command(work)(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(sentence.format(folder=tmp_path)) and len(line) < 600


def test_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError):
        command(lambda: 1 / 0)()
    assert capsys.readouterr().err == ""


def test_where_an_error_comes_from_is_told_to_who_asks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LFM_TRACEBACK", "1")
    with pytest.raises(SystemExit, match="2"):
        command(tmp_path.read_bytes)()
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said and "IsADirectoryError" in said
    assert said.splitlines()[-1] == f"error: {tmp_path}: Is a directory"
