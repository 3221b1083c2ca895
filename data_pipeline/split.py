"""Training or validation: decided by the text and the seed alone, so it does not depend on what else there is."""

import hashlib


def in_validation(text: bytes, seed: int, fraction: float) -> bool:
    """Whether a text, in UTF-8, is held out; equal texts always are or are not."""
    return _uniform(text, seed, b"split") < fraction


def tokenizer_key(text: bytes, seed: int) -> float:
    """A text's place among those that a tokenizer is trained on: the smallest keys are taken."""
    return _uniform(text, seed, b"tokenizer")


def split_of_group(group: str, seed: int, *, validation_fraction: float, test_fraction: float) -> str:
    """train, validation or test: the same for all rows of a group."""
    place = _uniform(group.encode(), seed, b"group")
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "train"


def row_key(text: bytes, seed: int) -> float:
    """A row's place among those of its group: the smallest keys are taken."""
    return _uniform(text, seed, b"row")


def _uniform(text: bytes, seed: int, purpose: bytes) -> float:
    """A number in [0, 1) drawn from (text, seed, purpose)."""
    key = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(text, digest_size=8, key=key, person=purpose).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
