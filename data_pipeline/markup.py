"""Marked-up files to the text in them."""

import html
import re
from collections.abc import Iterator
from typing import Literal

Markup = Literal["none", "html", "pod", "dictionary", "wordnet"]
"""dictionary: a dictd database, unpacked; wordnet: a data.* file of WordNet, of which the glosses are taken."""

_PART_CHARACTERS = 8192  # of a dictionary, whose single entries are too short for documents

# Script and style hold anything, so they end at their own end tag alone.
_RAW = re.compile(r"<(?:([sS][cC][rR][iI][pP][tT]|[sS][tT][yY][lL][eE])\b.*?</\1\s*>|!--.*?-->|[!?][^>]*>)", re.DOTALL)
_TAG = re.compile(r'<(/?[a-zA-Z][a-zA-Z0-9]*)[^>"]*(?:"[^"]*"[^>"]*)*>')
_SPACES_AT_END = re.compile(r"[ \t\r]+$", re.MULTILINE)
_SPACES = re.compile(r"(?<=\S)  +")
_MANY_NEWLINES = re.compile(r"\n\n\n+")

_SKIPPED = frozenset(("nav", "head", "header", "footer", "noscript", "svg", "form", "button", "select"))
_BLOCKS = frozenset(
    "address article aside blockquote body br caption center dd details div dl dt fieldset figcaption figure h1 h2 h3 "
    "h4 h5 h6 hr li main ol option p section summary table tbody td tfoot th thead tr ul".split()
)
_KINDS = {
    **dict.fromkeys(_SKIPPED, "skip"),
    **dict.fromkeys((slash + name for name in _BLOCKS for slash in ("", "/")), "block"),
    "pre": "pre",
    "/pre": "pre",
}
_POD_COMMAND = re.compile(r"^=begin\b.*?^=end\b[^\n]*|^=for\b.*?(?:\n\n|\Z)|^=\w+[ \t]*", re.DOTALL | re.MULTILINE)
_POD_CODE = re.compile(r"[A-Z](?:<<+ (.*?) >>+|<([^<>]*)>)", re.DOTALL)
_ENTRY = re.compile(r"\n(?=\S)")


def texts_of_markup(text: str, markup: Markup, *, origin: str) -> Iterator[tuple[str, str]]:
    """The texts in a file's content, each with its origin."""
    if markup == "none":
        yield text, origin
    elif markup == "html":
        yield text_of_html(text), origin
    elif markup == "pod":
        yield text_of_pod(text), origin
    else:
        entries = _ENTRY.split(text) if markup == "dictionary" else _glosses(text)
        for number, part in enumerate(_joined(entries), start=1):
            yield part, f"{origin}:part {number}"


def text_of_html(page: str) -> str:
    """The text of a page, a line a block; without scripts, styles, navigation, headers, footers and forms.

    A scan over tags rather than html.parser, which is ten times slower.  What it does not understand stays as text.
    """
    # `split` gives text, tag, text, tag, ..., text.
    pieces = iter(_TAG.split(_RAW.sub("", page)))
    kept = [next(pieces)]
    preformatted = 0
    pairs = zip(pieces, pieces, strict=True)
    for tag, text in pairs:
        kind = _KINDS.get(tag)
        if kind is None:
            kind = _KINDS.get(tag.lower())
        if kind == "skip":
            text = _text_after_element(tag.lower(), pairs)
        elif kind == "block":
            kept.append("\n")
            text = text if preformatted > 0 else text.lstrip()
        elif kind == "pre":
            preformatted += 1 if tag[0] != "/" else -1
            kept.append("\n")
        kept.append(text if preformatted > 0 else text.replace("\n", " "))
    return _tidy(html.unescape("".join(kept)))


def _text_after_element(name: str, pairs: Iterator[tuple[str, str]]) -> str:
    """Go on to the end tag of an element, over those of the same name in it, and return the text after it."""
    depth = 1
    for tag, text in pairs:
        tag = tag.lower()
        depth += (tag == name) - (tag == "/" + name)
        if depth == 0:
            return text
    return ""


def text_of_pod(page: str) -> str:
    """Perl's documentation without its commands; formatting codes give way to what they format."""
    page = _POD_COMMAND.sub("", page)
    for _ in range(3):  # they nest
        page = _POD_CODE.sub(lambda match: match[1] or match[2] or "", page)
    return page


def _tidy(text: str) -> str:
    text = _SPACES_AT_END.sub("", _SPACES.sub(" ", text.replace("\u00a0", " ")))
    return _MANY_NEWLINES.sub("\n\n", text).strip("\n ")


def _glosses(text: str) -> Iterator[str]:
    for line in text.splitlines():
        before, bar, gloss = line.partition(" | ")
        if bar and not line.startswith(" "):  # the licence is indented
            yield f"{before.split()[4].replace('_', ' ')}: {gloss.strip()}"


def _joined(entries: Iterator[str] | list[str]) -> Iterator[str]:
    """Consecutive entries in parts of a few thousand characters."""
    part, size = [], 0
    for entry in entries:
        part.append(entry)
        size += len(entry)
        if size >= _PART_CHARACTERS:
            yield "\n".join(part)
            part, size = [], 0
    if part:
        yield "\n".join(part)
