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
_SKIPPED = "nav|head|header|footer|noscript|svg|form|button|select"
_BLOCKS = (
    "address|article|aside|blockquote|body|br|caption|center|dd|details|div|dl|dt|fieldset|figcaption|figure|h1|h2|h3|h4|"
    "h5|h6|hr|li|main|ol|option|p|section|summary|table|tbody|td|tfoot|th|thead|tr|ul"
)
_REST_OF_TAG = r'(?![a-zA-Z0-9])[^>"]*(?:"[^"]*"[^>"]*)*>'
# All small or all capital letters: to ignore case would take twice as long.
_REGION_TAG = re.compile(rf"<(/?(?:{_SKIPPED}|pre|{_SKIPPED.upper()}|PRE)){_REST_OF_TAG}")
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCKS}|{_BLOCKS.upper()}){_REST_OF_TAG}")
_TAG = re.compile(rf"</?[a-zA-Z][a-zA-Z0-9]*{_REST_OF_TAG}")
_SPACES = re.compile("  +")
_SPACES_IN_LINE = re.compile(r"(?<=\S)  +")
_MANY_NEWLINES = re.compile(r"\n\n\n+")

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

    A few passes of regular expressions rather than html.parser, which is ten times slower.  What they do not understand
    stays as text.
    """
    # `split` gives text, tag, text, tag, ..., text.
    page = _RAW.sub("", page).replace("\r", "").replace("&nbsp;", " ").replace("\u00a0", " ")
    text, *rest = _REGION_TAG.split(page)
    kept = [_text_of_region(text, preformatted=False)]
    preformatted = 0
    pairs = zip(rest[0::2], rest[1::2], strict=True)
    for tag, text in pairs:
        tag = tag.lower()
        if tag == "pre":
            preformatted += 1
            kept.append("\n")
        elif tag == "/pre":
            preformatted -= 1
            kept.append("\n")
        elif tag[0] != "/":
            text = _text_after_element(tag, pairs)
        kept.append(_text_of_region(text, preformatted=preformatted > 0))
    lines = html.unescape("".join(kept)).split("\n")
    return _MANY_NEWLINES.sub("\n\n", "\n".join([line.rstrip(" \t") for line in lines])).strip("\n ")


def _text_of_region(text: str, *, preformatted: bool) -> str:
    """Without tags; where no line is as the page has it, blocks make them."""
    if preformatted:
        return _SPACES_IN_LINE.sub(" ", _TAG.sub("", _BLOCK_TAG.sub("\n", text)))
    text = _TAG.sub("", _BLOCK_TAG.sub("\n", text.replace("\n", " ")))
    return _SPACES.sub(" ", text.replace("\t", " ")).replace("\n ", "\n")


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
