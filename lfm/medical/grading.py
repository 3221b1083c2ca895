"""The stated grader of free answers: equal words."""

import re
import string


def graded(text: str) -> str:
    """Lower-case words without punctuation and articles (Rajpurkar et al. 2016, arXiv 1606.05250, section 6)."""
    text = "".join(" " if character in string.punctuation else character for character in text.lower())
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer is the reference but for case, punctuation, articles and blanks.  A synonym counts as wrong."""
    return graded(answer) == graded(reference) != ""
