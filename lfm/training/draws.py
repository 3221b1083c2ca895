"""Random draws of training, such as dropout: a function of (seed, step, row), whatever was drawn before and by whom."""

import hashlib

import torch


def seed_of_draws(seed: int, step: int, first_row: int) -> int:
    """For torch's generators, before the micro-batch of optimizer step `step` that begins with row `first_row` of it.

    So a resumed run draws as an uninterrupted one, and a row in any process as in the one that has all rows, where
    micro-batches are cut alike.
    """
    digest = hashlib.blake2b(f"draws:{seed}:{step}:{first_row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_draws(seed: int, device: torch.device) -> None:
    """Of torch's generators of the host and of this device: `torch.manual_seed` goes through those of every kind of
    device that torch knows, which takes as long as launching a small step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.default_generators[_index(device)].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
