"""Random draws of training, such as dropout: a function of (seed, step, row), whatever was drawn before and by whom."""

import hashlib


def seed_of_draws(seed: int, step: int, first_row: int) -> int:
    """For torch's generators, before the micro-batch of optimizer step `step` that begins with row `first_row` of it.

    So a resumed run draws as an uninterrupted one, and a row in any process as in the one that has all rows, where
    micro-batches are cut alike.
    """
    digest = hashlib.blake2b(f"draws:{seed}:{step}:{first_row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
