"""Marked-up files to the text in them."""

import html
import re
from collections.abc import Iterator
from typing import Literal

Markup = Literal["none", "html", "pod", "dictionary", "wordnet"]
"""dictionary: a dictd database, unpacked; wordnet: a data.* file of WordNet, of which the glosses are taken."""

_HIDDEN = "\ud800"  # in no text that was read from bytes
_PART_CHARACTERS = 8192  # of a dictionary, whose single entries are too short for documents

_RAW = re.compile(r"<(?:([sS][cC][rR][iI][pP][tT]|[sS][tT][yY][lL][eE])\b|[!?])")
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

# `html` makes an int of the digits, and Python refuses thousands of them.
_FAR_REFERENCE = re.compile(r"&#(?:[0-9]{8,}|[xX][0-9a-fA-F]{8,});?")

_POD_COMMAND = re.compile(r"^=(\w+)[ \t]*", re.MULTILINE)
_POD_END = re.compile(r"^=end\b[^\n]*", re.MULTILINE)
_POD_CODE = re.compile(r"[A-Z](?:<<+ (.*?) >>+|<([^<>]*)>)", re.DOTALL)
_POD_CODE_END = re.compile(" >>+")
_POD_SHORT_CODE = re.compile(r"[A-Z]()<([^<>]*)>")
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
    stays as text.  The time is proportional to the page, whatever is in it: an expression that looks for an end is only
    tried where there is one.
    """
    # `split` gives text, tag, text, tag, ..., text.
    page = _without_raw(page).replace("\r", "").replace("&nbsp;", " ").replace("\u00a0", " ")
    text, *rest = _REGION_TAG.split(_hide_unclosed(page))
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
    text = "".join(kept).replace(_HIDDEN, "<")
    lines = html.unescape(_FAR_REFERENCE.sub("\ufffd", text)).split("\n")
    return _MANY_NEWLINES.sub("\n\n", "\n".join([line.rstrip(" \t") for line in lines])).strip("\n ")


def _text_of_region(text: str, *, preformatted: bool) -> str:
    """Without tags; where no line is as the page has it, blocks make them."""
    if preformatted:
        return _SPACES_IN_LINE.sub(" ", _without_tags(text))
    text = _without_tags(text.replace("\n", " "))
    return _SPACES.sub(" ", text.replace("\t", " ")).replace("\n ", "\n")


def _without_tags(text: str) -> str:
    text = _BLOCK_TAG.sub("\n", _hide_unclosed(text))
    return _TAG.sub("", _hide_unclosed(text))


def _hide_unclosed(text: str) -> str:
    """With `_HIDDEN` in place of each < that no tag can begin with, since the > that would end it is not there.

    A tag ends at the next > outside its quotes, that is, at the next one with as many quotes before it, even or odd.
    """
    parts = text.split('"')
    for first in (0, 1):
        for i in range(len(parts) - 1 - (len(parts) - 1 - first) % 2, -1, -2):
            before, closed, after = parts[i].rpartition(">")
            if "<" in after:
                parts[i] = before + closed + after.replace("<", _HIDDEN)
            if closed:
                break
    return '"'.join(parts)


def _without_raw(page: str) -> str:
    """Without scripts, styles, comments and declarations.

    Script and style hold anything, so they end at their own end tag alone.
    """
    kept, at = [], 0
    unclosed: set[str] = set()
    for start in _RAW.finditer(page):
        if start.start() < at:
            continue
        ends = [rf"</{start[1]}\s*>"] if start[1] else ["-->"] if page.startswith("<!--", start.start()) else []
        ends += [] if start[1] else [">"]
        for end in ends:
            if end in unclosed:
                continue
            found = re.compile(end).search(page, start.end() + (2 if end == "-->" else 0))
            if found is not None:
                kept.append(page[at : start.start()])
                at = found.end()
                break
            unclosed.add(end)
    return "".join(kept) + page[at:]


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
    page = _without_pod_commands(page)
    for _ in range(3):  # they nest
        # Behind the last >> none that is opened by << is closed, and looking for its end would take the rest each time.
        last = _POD_CODE_END.match(page, max(0, page.rfind(" >>")))
        cut = last.end() if last is not None else 0
        page = "".join(
            code.sub(lambda match: match[1] or match[2] or "", part)
            for code, part in ((_POD_CODE, page[:cut]), (_POD_SHORT_CODE, page[cut:]))
        )
    return page


def _without_pod_commands(page: str) -> str:
    """=begin goes with all to its =end, =for with its paragraph, of other commands the word alone."""
    kept, at, unclosed = [], 0, False
    for command in _POD_COMMAND.finditer(page):
        if command.start() < at:
            continue
        end = command.end()
        if command[1] == "begin" and not unclosed:
            found = _POD_END.search(page, end)
            unclosed = found is None
            end = found.end() if found is not None else end
        elif command[1] == "for":
            blank = page.find("\n\n", command.end(1))
            end = blank + 2 if blank >= 0 else len(page)
        kept.append(page[at : command.start()])
        at = end
    return "".join(kept) + page[at:]


def _glosses(text: str) -> Iterator[str]:
    for line in text.splitlines():
        before, bar, gloss = line.partition(" | ")
        fields = before.split()
        if bar and len(fields) > 4 and not line.startswith(" "):  # the licence is indented
            yield f"{fields[4].replace('_', ' ')}: {gloss.strip()}"


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
