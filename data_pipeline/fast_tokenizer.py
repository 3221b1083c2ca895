"""tiktoken in place of Hugging Face `tokenizers`, where it provably gives the same ids: three times as fast for GPT-2.

A byte-level BPE of tokenizer.json has the same merges as tiktoken's ranks if its ids rise in the order of its merges
and each token, merged from single bytes by the ranks below its own, is last joined from the two pieces that its merge
names.  Then at any moment of merging any text, the pieces of a token are those it would have on its own, so that both
algorithms make the same joins.  That, checked here for every token, leaves how text is cut into words before merging:
two regular expression engines, compared on hard cases and on documents of the corpus at hand.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from data_pipeline import extras
from lfm.data.tokenizer import END_OF_DOCUMENT, Tokenizer, byte_alphabet, pieces_before

_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

HARD_TEXTS = (
    "",
    " ",
    "\n",
    "a",
    " a  b   c    d\n\n\n e \t\tf\r\n\r\ng \u00a0h\u2003i\u3000j\u200bk\ufeffl",
    "I'm you're he'll we've it's I'd can't 'twas 'S 'LL don\u2019t '' 's's",
    "1 12 123 1234 12345.678,9 3\u00b2 \u00bd \u0664\u0665 \u2167 \u4e00\u4e8c \u0967\u0968",
    "<|endoftext|> <|endoftext|><|endoftext|>x <|im_start|> </s> <s>",
    "cafe\u0301 caf\u00e9 \u1e9e\u00df \u0130i\u0131I \u01c5 \u02b0 \u0928\u093f \u0e01\u0e33 \u05e9\u05b8",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093 \ud55c\uad6d\uc5b4",
    "\U0001f600\U0001f468\u200d\U0001f469 \U0001f1e9\U0001f1ea",
    "\u0000\u0001\u007f\u0080\u0085\u00ad\u2028\u2029\ue000\uffff\U0010ffff",
    "def f(x):\n    if x<=0:\n\t\treturn -x**2 # ____ ==== !!!\n" * 3,
    "a" * 300 + " " * 300 + "\n" * 300 + "=" * 300 + "7" * 300,
    "http://a.b/c?d=e&f=%20 A_b-C \\u00e9 \u201cq\u201d \u2026\u2014 \u20ac5 x\u0302\u0303y",
)


class FastEncoder:
    """Ids of texts by tiktoken.  `make` it."""

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding

    def encode(self, text: str) -> np.ndarray | None:
        """The ids of `text`, uint32 `[n]`; None where tiktoken gives up, as on a million spaces in a row."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # the regular expression ran out of stack
            return None

    @classmethod
    def make(cls, tokenizer: Tokenizer) -> "FastEncoder | str":
        """The fast twin of `tokenizer`, or why there is none."""
        if not extras.has("tiktoken"):
            return "tiktoken is not installed (`pip install 'lfm-training[fast-tokenizer]'`)"
        definition = json.loads(tokenizer.definition)
        pattern = _pattern(definition)
        if pattern is None:
            return "the tokenizer is no plain byte-level BPE"
        ranks = _ranks(definition, tokenizer.control_names)
        if isinstance(ranks, str):
            return ranks
        tiktoken = extras.require("tiktoken", extra="fast-tokenizer", purpose="the fast tokenizer")
        # One name is needed: searching for none at all is slow.  It stays ordinary text.
        names = {END_OF_DOCUMENT: tokenizer.vocab_size}
        try:
            return cls(tiktoken.Encoding("lfm", pat_str=pattern, mergeable_ranks=ranks, special_tokens=names))
        except Exception as error:  # the Rust side raises what it likes for a pattern it cannot read
            return f"tiktoken cannot read the tokenizer ({' '.join(str(error).split())})"


def first_difference(fast: FastEncoder, tokenizer: Tokenizer, texts: Iterable[str]) -> str | None:
    """The beginning of the first of the hard cases and `texts` that the two encode differently; None if none."""
    for text in chain(HARD_TEXTS, texts):
        ids = fast.encode(text)
        if ids is not None and ids.tolist() != tokenizer.encode(text):
            return repr(text[:80])
    return None


def _pattern(definition: dict[str, Any]) -> str | None:
    """The regular expression that cuts text into words; None where the definition does anything else to it."""
    model = definition["model"]
    plain = model.get("type") == "BPE" and definition.get("normalizer") is None
    plain = plain and not any(model.get(key) for key in ("dropout", "byte_fallback", "unk_token"))
    plain = plain and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    # Names of special tokens are ordinary text; those of others are not.
    plain = plain and all(token["special"] for token in definition.get("added_tokens", []))
    if not plain:
        return None
    match definition.get("pre_tokenizer"):
        case {"type": "ByteLevel", "add_prefix_space": False, **rest} if rest.get("use_regex", True):
            return _GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


def _ranks(definition: dict[str, Any], control_names: Collection[str]) -> dict[bytes, int] | str:
    """Each token's bytes and id, which is its rank; or why ranks cannot stand for the merges."""
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    special = {token["content"] for token in definition.get("added_tokens", [])}.union(control_names)
    try:
        ranks = {
            bytes(byte_of[character] for character in token): rank
            for token, rank in definition["model"]["vocab"].items()
            if token not in special
        }
        merges = [_pair(merge, byte_of) for merge in definition["model"]["merges"]]
    except KeyError:
        return "the vocabulary holds more than bytes"
    if any(bytes([byte]) not in ranks for byte in range(256)):
        return "the vocabulary lacks a byte"
    made = [left + right for left, right in merges]
    order = [ranks.get(token, -1) for token in made]
    if order != sorted(set(order)) or len(made) + 256 != len(ranks):
        return "its ids are not in the order of its merges"
    for (left, right), token in zip(merges, made, strict=True):
        if pieces_before(token, ranks[token], ranks) != [left, right]:
            return f"the merge that makes {token!r} does not follow from its ids"
    return ranks


def _pair(merge: Sequence[str] | str, byte_of: dict[str, int]) -> tuple[bytes, bytes]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return bytes(byte_of[character] for character in left), bytes(byte_of[character] for character in right)
