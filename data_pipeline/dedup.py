"""Of equal or nearly equal texts, the first stays."""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from data_pipeline import extras

NUM_HASHES = 128
_NUM_BANDS = 16
_SHINGLE_WORDS = 5
_SEED = 42

_PRIME = np.uint64(0x100000001B3)
_INVERSE = np.uint64(pow(0x100000001B3, -1, 2**64))


def digest(text: bytes) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text, digest_size=16).digest()


class ExactDuplicates:
    """Finds texts that are equal to an earlier one.  Holds about 100 bytes of memory a document."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_new(self, digest: bytes) -> bool:
        """Whether this is the first text with this digest."""
        before = len(self._seen)
        self._seen.add(digest)
        return len(self._seen) > before


class NearDuplicates:
    """Finds documents whose sketch agrees with an earlier one's in `threshold` of its numbers or more.

    Candidates share one of 16 bands of 8 numbers (locality-sensitive hashing): at a similarity of 0.8, 95% of pairs do;
    at 0.9, all but one in ten thousand.  Holds about 2 kB of memory a document.
    """

    def __init__(self, threshold: float) -> None:
        self._needed = int(np.ceil(threshold * NUM_HASHES))
        self._first: list[dict[bytes, int]] = [{} for _ in range(_NUM_BANDS)]
        self._kept: list[tuple[np.ndarray, str]] = []

    def original(self, sketch: np.ndarray, origin: str) -> str | None:
        """The origin of an earlier document like this one, uint32 `[NUM_HASHES]`; None, and it is kept, if none is."""
        bands = [band.tobytes() for band in sketch.reshape(_NUM_BANDS, -1)]
        candidates = {first[band] for first, band in zip(self._first, bands, strict=True) if band in first}
        for candidate in sorted(candidates):
            kept, kept_origin = self._kept[candidate]
            if np.count_nonzero(kept == sketch) >= self._needed:
                return kept_origin
        for first, band in zip(self._first, bands, strict=True):
            first.setdefault(band, len(self._kept))
        self._kept.append((sketch, origin))
        return None


def sketches(texts: Sequence[bytes]) -> np.ndarray:
    """MinHash sketches of the sets of runs of five words, uint32 `[texts, NUM_HASHES]`.

    The share of numbers in which two sketches agree estimates the Jaccard similarity of the two sets.
    """
    rensa = extras.require("rensa", extra="dedup", purpose="near_duplicates")
    hashes = [_shingle_hashes(text) for text in texts]
    if not hashes:
        return np.empty((0, NUM_HASHES), np.uint32)
    offsets = np.cumsum([0, *map(len, hashes)]).tolist()
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(hashes), offsets, NUM_HASHES, _SEED)
    return np.array(matrix.to_rows(), np.uint32)


def _shingle_hashes(text: bytes) -> np.ndarray:
    """Hashes of all runs of five words of a text, or of all its words if it has fewer, uint64.

    The hash of bytes b[i:j] is the sum of b[k] * PRIME**(k - i), modulo 2**64, mixed: a difference of two prefix sums,
    so that all runs take a few passes over the text.
    """
    content = np.frombuffer(text, np.uint8)
    is_word = content > 32
    edges = np.flatnonzero(np.diff(is_word, prepend=False, append=False))
    starts, ends = edges[0::2], edges[1::2]
    if len(starts) > _SHINGLE_WORDS:
        starts, ends = starts[: 1 - _SHINGLE_WORDS], ends[_SHINGLE_WORDS - 1 :]
    powers, inverses = _powers(len(content) + 1)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(content * powers[:-1], dtype=np.uint64)])
    hashes = (sums[ends] - sums[starts]) * inverses[starts]
    return (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)


def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first powers of PRIME and of its inverse modulo 2**64."""
    powers, inverses = _power_table(max(1 << 16, 1 << count.bit_length()))
    return powers[:count], inverses[:count]


@functools.lru_cache(maxsize=1)
def _power_table(count: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.ones(1, np.uint64)
    return (
        np.concatenate([first, np.cumprod(np.full(count - 1, _PRIME))]),
        np.concatenate([first, np.cumprod(np.full(count - 1, _INVERSE))]),
    )
