from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

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
