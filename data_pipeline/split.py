"""Training or validation: decided by the text and the seed alone, so it does not depend on what else there is."""

import hashlib


def in_validation(text: bytes, seed: int, fraction: float) -> bool:
    """Whether a text, in UTF-8, is held out; equal texts always are or are not."""
    return _uniform(text, seed, b"split") < fraction


def tokenizer_key(text: bytes, seed: int) -> float:
    """A text's place among those that a tokenizer is trained on: the smallest keys are taken."""
    return _uniform(text, seed, b"tokenizer")


def _uniform(text: bytes, seed: int, purpose: bytes) -> float:
    """A number in [0, 1) drawn from (text, seed, purpose)."""
    key = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(text, digest_size=8, key=key, person=purpose).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
