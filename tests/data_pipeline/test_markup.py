import time
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.labelled import _definition
from data_pipeline.markup import text_of_html, text_of_pod, texts_of_markup


class Reference(HTMLParser):
    """The words outside what is skipped, by the standard library."""

    SKIPPED = ("nav", "head", "header", "footer", "script", "style")

    def __init__(self):
        super().__init__()
        self.depth, self.words = 0, []

    def handle_starttag(self, tag, attrs):
        self.depth += tag in self.SKIPPED
        self.words.append(" ")

    def handle_endtag(self, tag):
        self.depth -= tag in self.SKIPPED
        self.words.append(" ")

    def handle_data(self, data):
        if self.depth == 0:
            self.words.append(data)


inline = st.sampled_from(
    ["one", "two &amp; three", "&lt;p&gt;", " caf&eacute; ", "4 < 5", "<br/>", '<img alt="a > b">']
)
element = st.recursive(
    inline,
    lambda inner: st.builds(
        lambda tag, parts: f'<{tag} class="x">{"".join(parts)}</{tag}>',
        st.sampled_from(["p", "div", "nav", "header", "footer", "li", "td", "pre"]),
        st.lists(inner, max_size=4),
    ),
)


@given(st.lists(element, max_size=5))
def test_pages_give_the_words_that_html_parser_gives(parts):
    page = "<!DOCTYPE html><head><title>t</title><style>p > a {}</style></head><script>1 < 2</script>" + "".join(parts)
    reference = Reference()
    reference.feed(page)
    reference.close()
    assert "".join(text_of_html(page).split()) == "".join("".join(reference.words).split())


def test_blocks_are_lines_and_preformatted_text_keeps_its_lines():
    page = "<h1>A\nb</h1><p>one <b>t</b>wo</p><pre>x = 1\n  y = 2\n</pre><ul><li>z</ul>"
    assert text_of_html(page).replace("\n\n", "\n").split("\n") == ["A b", "one two", "x = 1", "  y = 2", "z"]


def test_old_pages_with_capital_tags_and_crlf_are_read_too():
    page = "<HTML><HEAD><TITLE>t</TITLE></HEAD><P>One\r\n  two&nbsp; three<BR>four<PRE>\r\n  a  b\r\n</PRE>\r\n"
    assert text_of_html(page) == "One two three\nfour\n\n  a b"


def test_pod_loses_commands_and_codes():
    page = "=head1 NAME\n\nB<perl> - C<< a->b >> I<B<x>>\n\n=begin html\n\n<p>\n\n=end html\n\n=cut\n"
    assert text_of_pod(page).split() == ["NAME", "perl", "-", "a->b", "x"]


def test_dictionaries_give_parts_of_several_entries_and_wordnet_its_glosses():
    entries = [f"word{i}\n   meaning {i} " + "x" * 500 for i in range(40)]
    parts = [text for text, _ in texts_of_markup("\n".join(entries), "dictionary", origin="d")]
    assert len(parts) == 3 and "\n".join(parts) == "\n".join(entries)
    line = "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived  \n"
    [(text, origin)] = texts_of_markup("  1 This software | licence\n" + line, "wordnet", origin="data.noun")
    assert (text, origin) == ("entity: that which is perceived", "data.noun:part 1")


def test_references_to_far_characters_are_none():
    assert text_of_html("a&#" + "9" * 5000 + ";b&#x" + "f" * 99 + ";c&#65;") == "a\ufffdb\ufffdcA"


def test_glosses_without_fields_are_left_out():
    assert list(texts_of_markup("a b | c\n", "wordnet", origin="data.noun")) == []


ENDLESS = {
    text_of_html: ["<a ", "<p", '<p a="', "<!--", "<script>", "<Style>", "<!", "<?x", "<nav ", '<a "', '"<p>', "&#9"],
    text_of_pod: ["=begin\n", "=for x\n", "A<< ", "A<", "B< >>", "\n=end\n=begin\n"],
    _definition: ["[", "--A", '--A"', "Note", "[x]"],
}


@pytest.mark.parametrize("scan, unit", [(scan, unit) for scan, units in ENDLESS.items() for unit in units])
def test_time_is_proportional_to_what_is_never_closed(scan, unit):
    """A megabyte takes well under a second; were it quadratic, more than ten minutes."""

    def seconds(size):
        text = unit * (size // len(unit))
        start = time.process_time()
        scan(text)
        return time.process_time() - start

    small, middle, large = (min(seconds(size) for _ in range(2)) for size in (250_000, 500_000, 1_000_000))
    assert large < 20
    # Four times as much takes about four times as long, where quadratic would be sixteen.
    assert large < 8 * max(small, 0.05) and middle < 4 * max(small, 0.05)
