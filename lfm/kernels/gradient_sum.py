"""Where products put the gradient of a weight: into its fp32 sum, inside the product, now or later."""

from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import Tensor

from lfm.kernels.accumulation import accumulate_

Product = Callable[[Tensor, bool], None]
"""`product(total, add)` writes a gradient into `total`, or adds it where `add`."""


class Later(Protocol):
    """Keeps what need not be done at once."""

    def put(self, work: Callable[[], None]) -> None: ...


class GradientSum:
    """The sum of a parameter's gradients over the micro-batches of a step.

    An engine gives a parameter one by `give_sum`.  A product whose weight has one adds its gradient
    to `total` itself and returns none to autograd; what other operations return to autograd reaches `add` through the
    hook of `give_sum`.
    """

    def __init__(self, total: Tensor, *, after: Callable[[], None] | None = None, later: Later | None = None) -> None:
        """`total`: contiguous, of the parameter's shape, in fp32 or wider; `after` is called behind each addition;
        `later` takes products that need not be made before the pass goes on, None: all are made at once."""
        self.total, self.after, self.later = total, after, later
        self.is_empty = True
        """Nothing was added yet: the next gradient is written over what `total` holds."""

    def start(self) -> None:
        """Before the first micro-batch of a step: no need to fill `total` with zeros."""
        self.is_empty = True

    def finish(self) -> None:
        """After the last: a parameter that had no gradient has one of zeros."""
        if self.is_empty:
            self.total.zero_()
            self.is_empty = False

    def put(self, product: Product) -> None:
        """Make it now, or leave it to `later`."""
        if self.later is None:
            self._make(product)
        else:
            self.later.put(lambda: self._make(product))

    def add(self, gradient: Tensor, *, factor: Tensor | None = None) -> None:
        """A gradient that is there already, times `factor`, a tensor of one number, if given."""
        self._make(lambda total, add: accumulate_(total, gradient, factor=factor, add=add))

    def _make(self, product: Product) -> None:
        product(self.total, not self.is_empty)
        self.is_empty = False
        if self.after is not None:
            self.after()


def give_sum(parameter: Tensor, found: GradientSum) -> None:
    """Make it the parameter's; what operations leave to autograd is added to it too, and freed."""
    cast(Any, parameter).gradient_sum = found

    def add(parameter: Tensor) -> None:
        if parameter.grad is not None:  # hooks run where all was left to the products too
            found.add(parameter.grad)
            parameter.grad = None

    parameter.register_post_accumulate_grad_hook(add)


def gradient_sum(weight: Tensor) -> GradientSum | None:
    """That of a parameter that has one."""
    return getattr(weight, "gradient_sum", None)
