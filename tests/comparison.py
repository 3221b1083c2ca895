"""How tests compare tensors: by the norm of the difference over the norm of the truth."""

from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, in float64; NaN and a wrong shape never pass a bound."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    difference = (got.detach().double() - want.detach().double()).norm()
    return float(difference / want.detach().double().norm().clamp_min(1e-300))


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    """Every named tensor within `bound`; the message names the worst one."""
    assert got.keys() == want.keys()
    errors = {name: relative_error(got[name], want[name]) for name in want}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    assert errors[worst] < bound, f"{worst}: relative error {errors[worst]:.2e} >= {bound:.0e}"
