import itertools

import pytest
import torch

from lfm.errors import UserError
from lfm.training.schedule import ScheduleConfig, highest_factor, lr_factor


def _curve(steps=100, **config):
    return [lr_factor(ScheduleConfig(**config), step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warmup_is_linear_and_starts_above_zero(kind):
    assert _curve(kind=kind, warmup_steps=10)[:11] == pytest.approx([i / 10 for i in range(1, 11)] + [1.0], abs=1e-3)


def test_cosine_ends_at_the_ratio_and_never_rises():
    curve = _curve(kind="cosine", warmup_steps=10, min_lr_ratio=0.1)[10:]
    assert curve[-1] == pytest.approx(0.1) and all(a >= b for a, b in itertools.pairwise(curve))
    assert curve[44] == pytest.approx(0.55, abs=0.01)


def test_wsd_is_stable_and_then_falls_linearly():
    curve = _curve(kind="wsd", warmup_steps=10, min_lr_ratio=0.0, decay_fraction=0.2)
    assert curve[9:80] == [1.0] * 71
    assert curve[80:] == pytest.approx([1 - i / 20 for i in range(1, 21)])


def test_a_warmup_longer_than_the_run_is_all_warmup():
    assert _curve(5, kind="cosine", warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize(
    ("config", "steps", "highest"),
    [
        ({"warmup_steps": 10}, 5, 0.5),
        ({"warmup_steps": 10}, 10, 1.0),
        ({"warmup_steps": 0}, 3, 0.775),
        ({"warmup_fraction": 0.5}, 1, 1.0),
        ({"kind": "one_cycle", "warmup_steps": 4}, 9, 1.0),
        ({"kind": "constant", "warmup_steps": 4}, 1, 0.25),
    ],
)
def test_the_highest_rate_is_that_of_the_last_warmup_step(config, steps, highest):
    config = ScheduleConfig(**config)
    assert highest_factor(config, steps) == pytest.approx(highest)
    assert highest_factor(config, steps) == max(lr_factor(config, step, steps) for step in range(steps))


def test_linear_falls_to_nothing_after_a_warmup_by_share():
    curve = _curve(200, kind="linear", warmup_fraction=0.05, min_lr_ratio=0.0)
    assert curve[9] == 1.0 and curve[10:] == pytest.approx([1 - i / 190 for i in range(1, 191)])


def test_one_cycle_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=200, pct_start=0.1, div_factor=25, final_div_factor=1e4
    )
    expected = []
    for _ in range(200):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 200:
            theirs.step()
    ours = _curve(200, kind="one_cycle", warmup_fraction=0.1, min_lr_ratio=1 / 25e4)
    assert ours == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_laercs_published_rates_after_each_epoch():
    """OpenWebText preset: 5 epochs of 2,000 updates at 4e-4; after update k the rate logged is that of update k + 1."""
    config = ScheduleConfig(kind="cosine", warmup_fraction=0.01, hold_fraction=0.1, min_lr_ratio=0.1)
    rates = [f"{4e-4 * lr_factor(config, 2000 * epoch, 10_000):.2e}" for epoch in range(1, 6)]
    assert rates == ["3.91e-04", "3.14e-04", "1.91e-04", "8.30e-05", "4.00e-05"]


def test_a_hold_needs_a_decay_after_it():
    with pytest.raises(UserError, match="hold_steps=5"):
        ScheduleConfig.from_tree({"kind": "constant", "hold_steps": 5}, source="test")
