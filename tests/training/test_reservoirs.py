from lfm.kernels.reservoir import WARMUP_NOTCHES
from lfm.training.reservoirs import next_warmup


def test_warmup_follows_the_residual():
    assert next_warmup(64, 1.5e-3, 10_000) == 64
    assert next_warmup(64, 3e-3, 0) == 96
    assert next_warmup(64, 5e-2, 0) == 96
    assert next_warmup(64, float("nan"), 0) == 96
    assert next_warmup(64, 9e-4, 499) == 64
    assert next_warmup(64, 9e-4, 500) == 32
    assert next_warmup(WARMUP_NOTCHES[0], 0.0, 500) == WARMUP_NOTCHES[0]
    assert next_warmup(WARMUP_NOTCHES[-1], 1.0, 0) == WARMUP_NOTCHES[-1]
    assert next_warmup(50, 1.0, 0) == 64
