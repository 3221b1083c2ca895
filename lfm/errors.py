"""The errors that are no bugs."""


class UserError(ValueError):
    """Something the user typed, or a file the user pointed at, is wrong.  `str(error)` is one clear sentence."""


class NonFiniteError(RuntimeError):
    """A loss, a gradient norm, a weight or a logit is NaN or infinite; nothing is made of it.  Exit code 3."""
