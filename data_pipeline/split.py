"""Training or validation: decided by the text and the seed alone, so it does not depend on what else there is."""

import hashlib

from lfm.data.format import Split


def split_of(text: str, *, seed: int, validation_fraction: float) -> Split:
    """The split a text belongs to; equal texts are always in the same one."""
    return "validation" if _uniform(text, seed, b"split") < validation_fraction else "train"


def in_tokenizer_sample(text: str, *, seed: int, fraction: float) -> bool:
    """Whether a text is among the `fraction` that the tokenizer is trained on."""
    return _uniform(text, seed, b"tokenizer") < fraction


def _uniform(text: str, seed: int, purpose: bytes) -> float:
    """A number in [0, 1) drawn from (text, seed, purpose)."""
    key = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=key, person=purpose).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
