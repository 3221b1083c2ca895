"""The errors that are no bugs."""

import re

PASSWORD = r"(?<=\w)(?::/{1,2}[^/\s:@]*):([^/\s]*)@"
"""In a URL, scheme://user:password@host, or in the path that was made of one, which has lost a slash."""


class UserError(ValueError):
    """Something the user typed, or a file the user pointed at, is wrong.  `str(error)` is one clear sentence.

    Passwords in its URLs are not shown.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(without_passwords(sentence))


class NonFiniteError(RuntimeError):
    """A loss, a gradient norm, a weight or a logit is NaN or infinite; nothing is made of it.  Exit code 3."""


def without_passwords(text: str) -> str:
    """`text` with *** in place of each password of a URL, also where it comes again without the scheme."""
    for password in re.findall(PASSWORD, text):
        text = text.replace(f":{password}@", ":***@")
    return text
