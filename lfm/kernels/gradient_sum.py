"""Where products put the gradient of a weight: into its fp32 sum, inside the product, now or later."""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from lfm.kernels.accumulation import accumulate_

Product = Callable[[Tensor, bool], None]
"""`product(total, add)` writes a gradient into `total`, or adds it where `add`."""


class Later(Protocol):
    """Keeps what need not be done at once."""

    def put(self, work: Callable[[], None]) -> None: ...


class Together:
    """Small gradients that wait for each other, to be added to their sums in one launch: a model has hundreds of them,
    and each alone takes as long."""

    LARGEST = 1 << 16
    """Elements; larger ones would be kept for no gain."""

    def __init__(self) -> None:
        self._waiting: list[tuple[GradientSum, Tensor]] = []

    def put(self, found: "GradientSum", gradient: Tensor) -> None:
        self._waiting.append((found, gradient))

    def clear(self) -> None:
        """Forget all of it, after a backward pass that did not end."""
        for found, _ in self._waiting:
            found.waits = False
        self._waiting.clear()

    def add(self) -> None:
        """All that wait: behind a backward pass, and before something else is added to one of their sums."""
        waiting, self._waiting = self._waiting, []
        while waiting:  # once, but where a sum has several of them
            first: dict[int, tuple[GradientSum, Tensor]] = {}
            more = [item for item in waiting if first.setdefault(id(item[0]), item) is not item]
            for is_empty, op in ((True, torch._foreach_copy_), (False, torch._foreach_add_)):  # pyright: ignore[reportPrivateImportUsage]
                chosen = [(found, gradient) for found, gradient in first.values() if found.is_empty is is_empty]
                if chosen:
                    with torch.no_grad():
                        op([found.total for found, _ in chosen], [gradient for _, gradient in chosen])
            for found, _ in first.values():
                found.is_empty = found.waits = False
            waiting = more


class GradientSum:
    """The sum of a parameter's gradients over the micro-batches of a step.

    An engine gives a parameter one by `give_sum`.  A product whose weight has one adds its gradient
    to `total` itself and returns none to autograd; what other operations return to autograd reaches `add` through the
    hook of `give_sum`.
    """

    def __init__(
        self,
        total: Tensor,
        *,
        after: Callable[[], None] | None = None,
        later: Later | None = None,
        together: Together | None = None,
    ) -> None:
        """`total`: contiguous, of the parameter's shape, in fp32 or wider; `after` is called behind each addition;
        `later` takes products that need not be made before the pass goes on, None: all are made at once; `together`
        small gradients, until its owner has them added, None: each is added by itself."""
        assert after is None or together is None
        self.total, self.after, self.later, self.together = total, after, later, together
        self.is_empty = True
        """Nothing was added yet: the next gradient is written over what `total` holds."""
        self.waits = False
        """Whether `together` has a gradient for it."""

    def start(self) -> None:
        """Before the first micro-batch of a step: no need to fill `total` with zeros."""
        self.is_empty = True

    def finish(self) -> None:
        """After the last: a parameter that had no gradient has one of zeros."""
        assert not self.waits, "a gradient still waits for others"
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
        if self.together is not None and factor is None and gradient.numel() <= Together.LARGEST:
            self.together.put(self, gradient)
            self.waits = True
            return
        self._make(lambda total, add: accumulate_(total, gradient, factor=factor, add=add))

    def _make(self, product: Product) -> None:
        if self.waits and self.together is not None:
            self.together.add()
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
