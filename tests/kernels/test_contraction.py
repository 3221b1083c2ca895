import pytest
import torch

from lfm.kernels.reservoir import contraction, make_reservoir
from lfm.kernels.reservoir.contraction import MOST_LEFT, SHRINKAGE, power_norm


def _weights(*radii, num_units=24):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([make_reservoir(num_units, 0.3, radius, generator) for radius in radii])


def test_the_power_norm_is_what_is_left_of_a_perturbation():
    weight, state = _weights(0.9, 1.4), torch.eye(24, dtype=torch.float64)
    for one in weight:
        left = state
        for _ in range(20):
            left = 0.7 * left + 0.3 * 0.8 * one @ left
        want = left.square().sum(0).mean().sqrt()
        assert power_norm(one, 0.3, 0.8, 20) == pytest.approx(float(want), rel=1e-12)


def test_what_forgets_in_time_is_left_alone():
    assert torch.equal(contraction(_weights(0.5, 0.9), 0.3, 0.6), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_does_not_is_scaled_just_as_far_as_it_must_be(dtype):
    weight = _weights(0.5, 1.5, 4.0).to(dtype)
    factors = contraction(weight, 0.3, 1.0)
    assert factors[0] == 1 and 1 > factors[1] > factors[2]
    assert (power_norm(weight * factors[:, None, None], 0.3, 1.0, 384) <= MOST_LEFT).all()
    assert (power_norm(weight * (factors / SHRINKAGE)[:, None, None], 0.3, 1.0, 384)[1:] > MOST_LEFT).all()


def test_powers_that_grow_before_they_fall_count():
    """Radius 0: all of its eigenvalues are 0, and yet it keeps a perturbation for as many steps as it has units."""
    nilpotent = torch.diag(torch.full((399,), 4.0, dtype=torch.float64), 1)[None]
    assert contraction(nilpotent, 1.0, 1.0) < 1


def test_powers_beyond_every_number_are_scaled_too():
    factor = float(contraction(_weights(1e6), 1.0, 1.0))
    assert 0 < factor < 1e-5


def test_where_no_factor_helps_nothing_is_scaled():
    assert contraction(_weights(3.0), 0.001, 1.0) == 1  # the leak alone keeps 68 % over 384 steps
    assert contraction(torch.full((1, 3, 3), torch.nan), 0.3, 1.0) == 1
    assert contraction(_weights(3.0), 0.3, float("nan")) == 1
