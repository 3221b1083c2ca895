"""A file of text in pieces, of which the last are held out: a book is one document, and is split by position."""

import codecs
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lfm.files import open_file

_BLOCK_BYTES = 1 << 20
_LONGEST_STEP_BACK = 4096
"""From where a cut is due, for the end of a line or a word."""


@dataclass(frozen=True)
class Piece:
    """Bytes `start` to `end` of a file."""

    start: int
    end: int
    held_out: bool


def first_bad_byte(path: Path) -> int | None:
    """Where a file stops being text in UTF-8, a NUL included; None: nowhere.  Raises UserError if it cannot be read."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    with open_file(path) as file:
        while True:
            block = file.read(_BLOCK_BYTES)
            begun = len(decoder.getstate()[0])  # of a character whose end is in this block
            nul = block.find(b"\0")
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return position - begun + error.start
            if nul >= 0:
                return position + nul
            if not block:
                return None
            position += len(block)


def cut(path: Path, num_bytes: int, *, tail: float, piece_bytes: int) -> list[Piece]:
    """Pieces of about `piece_bytes` of a text in UTF-8; of those that are held out, the first begins at the share
    1 - `tail` of it or a little before.

    Each ends at the end of a line, else of a word, else of a character.
    """
    pieces: list[Piece] = []
    start, end_of_training = 0, num_bytes - max(1, int(num_bytes * tail))
    with open_file(path) as file:
        while start < num_bytes:
            held_out = start >= end_of_training
            due = min(start + piece_bytes, num_bytes if held_out else end_of_training)
            if due == num_bytes:
                end = due
            else:
                # The text that is held out becomes at most twice as long.
                room = num_bytes - due if due == end_of_training else piece_bytes // 2
                end = _end_of_line(file, start, due, min(room, _LONGEST_STEP_BACK))
            if due == end_of_training:
                end_of_training = end
            if end > start:
                pieces.append(Piece(start, end, held_out))
            start = end
    return pieces


def _end_of_line(file: BinaryIO, start: int, due: int, longest_step: int) -> int:
    first = max(start, due - max(longest_step, 4))  # a character has no more bytes
    file.seek(first)
    before = file.read(due - first + 1)  # with the byte behind the cut
    for sign in (b"\n", b" "):
        place = before.rfind(sign, 0, due - first)
        if place >= 0:
            return first + place + 1
    end = due
    while end > first and before[end - first] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end
