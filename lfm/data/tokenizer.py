"""Text to ids and back: a thin layer over Hugging Face `tokenizers`, and two ways to get a tokenizer without a hub."""

import base64
import binascii
import hashlib
import itertools
import json
import re
import secrets
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lfm.data.published import PUBLISHED, Published, TiktokenPattern
from lfm.errors import UserError
from lfm.files import exists, read_file, write_durably

END_OF_DOCUMENT = "<|endoftext|>"
END_OF_DOCUMENT_NAMES = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's
    "<EOT>",
)
BEGIN_OF_TEXT_NAMES = (
    "<|begin_of_text|>",
    "<s>",
    "<|startoftext|>",
    "<|bos|>",
    "<bos>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
)

# How text is cut into words before merging; the GPT-2 pattern is built into the ByteLevel pre-tokenizer.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_PATTERNS = {
    "cl100k": _CL100K,
    "qwen": _CL100K.replace(r"\p{N}{1,3}", r"\p{N}"),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

_RUNS = re.compile(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+")
_LONGEST_WORD = 1000


class Tokenizer:
    """Text to ids and back.  No id is added but to a prompt: the beginning-of-text id, where documents begin with it.

    Text is never control: what spells the name of the end of a document, of its beginning, or of any token that the
    definition marks `special`, is ordinary text, so that a document that mentions `<|endoftext|>` stays one document.
    Other added tokens are words of the vocabulary, and text that spells one gets its id.
    """

    def __init__(self, definition: bytes, *, source: str) -> None:
        """`definition` is the content of a tokenizer.json; `source` names it in errors.

        Raises UserError if it is no tokenizer or has no end-of-document token.
        """
        self._source = source
        self._inner = _loaded(definition, source)
        tree = json.loads(definition)
        self.definition = definition
        self.sha256: str = hashlib.sha256(definition).hexdigest()
        self.vocab_size: int = 1 + max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)
        """One more than the largest id."""
        added = {token["content"]: token["special"] for token in tree.get("added_tokens") or []}
        ends = [name for name in END_OF_DOCUMENT_NAMES if self._inner.token_to_id(name) is not None]
        ends.sort(key=lambda name: name not in added)  # a vocabulary may hold such a name as a word of its texts
        if not ends:
            raise UserError(
                f"{source} has no end-of-document token; one of {', '.join(END_OF_DOCUMENT_NAMES)} is needed: "
                "add one to its added_tokens"
            )
        self.eod_id: int = self._inner.token_to_id(ends[0])
        first = self._inner.encode("").ids[:1]
        self.bos_id: int | None = first[0] if first and first[0] != self.eod_id else None
        """What a document begins with, by the definition's post-processor; None: nothing."""
        begins = [] if self.bos_id is None else [self._inner.id_to_token(self.bos_id)]
        special = [name for name, is_special in added.items() if is_special]
        self.control_names = frozenset([ends[0], *begins, *special])
        """Tokens whose ids no text gets."""
        encoder = _without_control(tree, self.control_names)
        self._encoder = self._inner if encoder is None else _loaded(json.dumps(encoder).encode(), source)
        self._gives_all_back = _gives_all_back(tree)
        self._unknown_id = _unknown_id(tree)
        by_bytes = _parts(tree.get("decoder"), "decoders", {"ByteFallback"})
        names = self._inner.get_vocab(with_added_tokens=True) if by_bytes else {}
        self._fallback_ids = {i for name, i in names.items() if re.fullmatch("<0x[0-9A-Fa-f]{2}>", name)}

    @classmethod
    def from_file(cls, path: Path | str) -> "Tokenizer":
        """Read a tokenizer.json.  Raises UserError if it is missing, no tokenizer, or has no end-of-document token."""
        return cls(_read(path), source=str(path))

    def save(self, path: Path | str) -> None:
        """Write the tokenizer.json, byte for byte what was read or trained, so that its sha256 is `self.sha256`."""
        write_durably(Path(path), self.definition)

    def beginning_with(self, token: str | None) -> "Tokenizer":
        """The same tokenizer, but for `bos_id`: that of the token of this name; None: there is none.

        The definition says so, as a template, because it is all that goes with a checkpoint.
        """
        wanted = None if token is None else self.id_of(token)
        if wanted == self.bos_id:
            return self
        assert token is None or wanted is not None, token
        tree = json.loads(self.definition)
        if token is None:  # changes no ids
            tree["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
            tree["post_processor"]["use_regex"] = True
        else:
            sequence = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
            tree["post_processor"] = {
                "type": "TemplateProcessing",
                "single": sequence,
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {token: {"id": token, "ids": [wanted], "tokens": [token]}},
            }
        return Tokenizer(_dumped(tree), source=f"the tokenizer that begins with {token}")

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None: there is none."""
        return self._inner.token_to_id(token)

    def token_of(self, token_id: int) -> str:
        """The name of the token with this id."""
        return self._inner.id_to_token(token_id)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`.  Raises UserError where the vocabulary lacks it and has no token for that either."""
        with self._refusing_in_a_sentence():
            return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed on all cores."""
        with self._refusing_in_a_sentence():
            found = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    @contextmanager
    def _refusing_in_a_sentence(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(
                f"{self._source} cannot encode every text ({' '.join(str(error).split())}); give it a token for what "
                "it does not know, or take a byte-level tokenizer"
            ) from None

    def encode_bytes(self, data: bytes) -> tuple[list[int], list[int]]:
        """The ids of a file's content, and for each the place of the byte that its text begins with.

        Bytes that are no UTF-8 get the ids of single bytes.  Raises UserError for them where the tokenizer has none,
        and as `encode` does.
        """
        ids: list[int] = []
        starts: list[int] = []
        text, at = data.decode(errors="surrogateescape"), 0
        for part in re.split("([\udc80-\udcff]+)", text):
            if "\udc80" <= part[:1] <= "\udcff":
                if not self._gives_all_back:
                    raise UserError(
                        f"byte {at:,} is no UTF-8, and {self._source} has no tokens for single bytes; convert the "
                        "text, for instance by `iconv -f latin1 -t utf-8`"
                    )
                found = part.encode(errors="surrogateescape")
                ids += [self._inner.token_to_id(byte_alphabet()[byte]) for byte in found]
                starts += range(at, at + len(found))
                at += len(found)
                continue
            with self._refusing_in_a_sentence():
                encoding = self._encoder.encode(part, add_special_tokens=False)
            ids += encoding.ids
            ends = [at, *itertools.accumulate((len(character.encode()) for character in part), initial=at)][1:]
            starts += [ends[start] for start, _ in encoding.offsets]
            at = ends[-1]
        return ids, starts

    def encode_prompt(self, text: str, *, begin: bool = True) -> list[int]:
        """The ids of what a user typed; with `begin`, as the beginning of a document.

        Raises UserError for text that is no UTF-8 or that the vocabulary lacks.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"prompt {text!r} is not valid UTF-8; give it in UTF-8") from None
        ids = self.encode(text)
        lost = self.lost(text, ids)
        for character in text if lost else "":
            if not character.isspace() and character in lost and not self._has_token_for(character):
                raise UserError(
                    f"the tokenizer has no token for {character!r} (U+{ord(character):04X}) of the prompt; "
                    "leave it out, or train with a byte-level tokenizer"
                )
        return [self.bos_id, *ids] if begin and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def text_of(self, token: int) -> str:
        """What it adds behind another, where no space is lost; U+FFFD where it is a part of a character."""
        return self.decode([token, token])[len(self.decode([token])) :]

    def bytes_of(self, token: int) -> bytes:
        """Of its text; of a token that is a part of a character, that part of the character's bytes."""
        text, name = self.text_of(token), self._inner.id_to_token(token) or ""
        if "\ufffd" not in text:
            return text.encode()
        if self.is_fallback_byte(token):
            return bytes([int(name[3:5], 16)])
        if all(character in _BYTES for character in name):
            return bytes(_BYTES[character] for character in name)
        return text.encode()

    def lost(self, text: str, ids: Iterable[int]) -> Counter[str]:
        """The characters of `text`, in Unicode's normal form C, that its `ids` do not give back.

        A token for what the vocabulary lacks gives nothing back; nor does one that stands for another character, as
        where the definition writes all in lower case.
        """
        if self._gives_all_back:
            return Counter()
        back = self.decode([int(i) for i in ids if i != self._unknown_id])
        if back == text:
            return Counter()
        normal, normal_back = (unicodedata.normalize("NFC", of) for of in (text, back))
        return Counter() if normal == normal_back else Counter(normal) - Counter(normal_back)

    def _has_token_for(self, character: str) -> bool:
        ids = self.encode(character)
        return self._unknown_id not in ids and self.decode(ids).strip(" \ufffd") != ""

    def is_fallback_byte(self, token: int) -> bool:
        """Whether this id is a byte that the decoder joins with its neighbours, as a whole run of them."""
        return token in self._fallback_ids

    def stream_decoder(self, prompt: Sequence[int] = ()) -> "StreamDecoder":
        """A decoder for ids that follow those of `prompt` and arrive one at a time."""
        return StreamDecoder(self, prompt)


def _byte_names() -> dict[str, int]:
    """What byte-level vocabularies write bytes as: printable ones as themselves, others by letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_names()


class StreamDecoder:
    """Decodes ids as they come and holds text back while its last character may be incomplete.

    The pieces that `push` and `flush` return, joined, are the text of `prompt` and all ids, without that of `prompt`:
    what a space or a byte means depends on what stands before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt)
        """The last ids, from one on before which no id matters."""
        self._given = len(tokenizer.decode(prompt))
        """Of the window's text, the characters that were given out or are the prompt's."""
        self._new = 0
        """How many ids the last piece and what is held back since have."""
        self._forget()

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._window.append(token)
        self._new += 1
        # Whether a run of bytes is text is known at its end, and a character split over tokens is U+FFFD until its last
        # byte is there.
        if self._tokenizer.is_fallback_byte(token):
            return ""
        text = self._tokenizer.decode(self._window)
        return "" if text.endswith("\ufffd") else self._give(text)

    def flush(self) -> str:
        """What is still held, at the end of the text."""
        return self._give(self._tokenizer.decode(self._window))

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._given = len(text)
        self._forget()
        return piece

    def _forget(self) -> None:
        """Shorten the window to the ids of the last piece and those before that it needs."""
        # A run of bytes must be whole, and as decoders take space from the beginning of a text, there must be more.
        start = len(self._window) - max(1, self._new)
        while start > 0:
            if not self._tokenizer.is_fallback_byte(self._window[start]):
                shown = self._tokenizer.decode(self._window[start:])
                if shown.strip(" \ufffd"):
                    self._window, self._given = self._window[start:], len(shown)
                    break
            start = max(0, 2 * start - len(self._window))
        self._new = 0


def train_bpe(texts: Iterable[str], vocab_size: int, *, allow_smaller: bool = False) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` entries (256 bytes and `<|endoftext|>` among them) trained on `texts`.

    Where the texts hold fewer merges, raises UserError, or with `allow_smaller` has as many entries as they hold.
    """
    smallest = 257
    if vocab_size < smallest:
        raise UserError(f"a byte-level BPE of {vocab_size} entries is impossible; {smallest} or more are needed")
    inner = _byte_level(models.BPE(), pattern="gpt2")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator((part for text in texts for part in _with_short_words(text)), trainer)
    if inner.get_vocab_size() != vocab_size and not allow_smaller:
        raise UserError(
            f"the text holds merges for a BPE of only {inner.get_vocab_size()} entries, not {vocab_size}; "
            "give it more text or ask for a smaller vocabulary"
        )
    return Tokenizer(inner.to_str().encode(), source="the trained tokenizer")


def _with_short_words(text: str) -> Iterator[str]:
    """`text`, cut within runs of letters, of digits, of space or of signs that are longer than any word.

    The trainer's work grows with the square of a word's length: on a million spaces in a row it does not end.
    """
    start = 0
    for run in _RUNS.finditer(text):
        if run.end() - run.start() > _LONGEST_WORD:
            for end in range(run.start() + _LONGEST_WORD, run.end(), _LONGEST_WORD):
                yield text[start:end]
                start = end
    yield text[start:]


def read_tokenizer(path: Path | str, pattern: TiktokenPattern | None = None) -> Tokenizer:
    """The tokenizer of a tokenizer.json or a tiktoken rank file, which are told apart by their content."""
    content = _read(path)
    if content.lstrip()[:1] == b"{":
        return Tokenizer(content, source=str(path))
    if content[:1] == b"\n" and b"\x00" in content:  # a protocol buffer, which begins with a field of a message
        raise UserError(
            f"tokenizer.file={path} is a SentencePiece model; set tokenizer.file to the tokenizer.json that is "
            "published beside it, or that transformers' AutoTokenizer writes with save_pretrained"
        )
    return from_tiktoken(path, pattern)


def from_tiktoken(path: Path | str, pattern: TiktokenPattern | None = None) -> Tokenizer:
    """Convert a tiktoken rank file (lines of `base64-of-token rank`) to a tokenizer with its special tokens.

    Published files are known by their content and get their pattern, how text is cut into words, and their special
    tokens.  Another gets `pattern`, or GPT-2's with a warning, and `<|endoftext|>` at the first id after its own.
    Ids equal tiktoken's.  Raises UserError if the file is missing or is no rank file.
    """
    ranks = _read_ranks(path)
    published = PUBLISHED.get(_fingerprint(ranks))
    if published is None:
        end = max(ranks.values()) + 1
        published = Published("unknown", pattern or "gpt2", {END_OF_DOCUMENT: end})
        if pattern is None:
            print(
                f"warning: {path} is none of the published rank files, so that how it cuts text into words is a guess: "
                f"GPT-2's way; {END_OF_DOCUMENT} gets the id {end}. Set tokenizer.tiktoken_pattern to the one of "
                f"gpt2, {', '.join(_SPLIT_PATTERNS)} that its model uses, or take its tokenizer.json",
                file=sys.stderr,
                flush=True,
            )
    alphabet = byte_alphabet()
    vocab = {"".join(alphabet[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        pieces = pieces_before(token, rank, ranks)
        if len(pieces) == 2:
            merges.append(["".join(alphabet[byte] for byte in piece) for piece in pieces])
    # tiktoken looks a whole word up before it merges; ignore_merges does the same.
    tree = json.loads(_byte_level(models.BPE(ignore_merges=True), pattern or published.pattern).to_str())
    ids = sorted({**vocab, **published.special}.items(), key=lambda item: item[1])
    tree["model"] |= {"vocab": dict(ids), "merges": merges}
    # In the order of ids, which is that in which they are given out.
    tree["added_tokens"] = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for name, i in published.special.items()
    ]
    if published.nfc:
        tree["normalizer"] = {"type": "NFC"}
    return Tokenizer(_dumped(tree), source=str(path))


def _byte_level(model: models.BPE, pattern: TiktokenPattern) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    if pattern == "gpt2":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT_PATTERNS[pattern]), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_DOCUMENT])
    return inner


def pieces_before(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """The pieces `token` is in just before the merge that makes it: merge from single bytes by ranks below its own."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        joined = [ranks.get(pieces[i] + pieces[i + 1], rank) for i in range(len(pieces) - 1)]
        lowest = min(joined)
        if lowest >= rank:
            break
        i = joined.index(lowest)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def _read_ranks(path: Path | str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            # Whisper's file gives an id to no bytes at all, which its library reads as such.
            ranks[b"" if token == b"=" else base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path} is not a tiktoken rank file: line {number} is not `base64-of-token rank`"
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{path} is not a whole tiktoken rank file: byte {missing[0]} has no rank")
    return ranks


def _fingerprint(ranks: dict[bytes, int]) -> str:
    found = hashlib.sha256()
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        found.update((base64.b64encode(token) or b"=") + b" %d\n" % rank)
    return found.hexdigest()


def _read(path: Path | str) -> bytes:
    if not exists(Path(path)):
        raise UserError(f"tokenizer file {path} does not exist; give the path of a tokenizer.json")
    return read_file(Path(path))


def _loaded(definition: bytes, source: str) -> tokenizers.Tokenizer:
    try:
        inner = tokenizers.Tokenizer.from_buffer(definition)
    except Exception as error:  # the Rust side raises bare Exception for whatever it cannot read
        what = (
            "Mistral's tekken.json; set tokenizer.file to the tokenizer.json that is published beside it"
            if b'"token_bytes"' in definition[:10_000_000] and b'"default_vocab_size"' in definition
            else " ".join(str(error).split())
        )
        raise UserError(f"{source} is not a tokenizer.json: {what}") from None
    inner.encode_special_tokens = True  # their names in a text are ordinary text
    inner.no_padding()
    inner.no_truncation()
    return inner


def _dumped(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()


def _without_control(tree: dict[str, Any], names: frozenset[str]) -> dict[str, Any] | None:
    """The definition changed so that no text gets the id of a token of these names; None: none does as it is.

    A name in the vocabulary gets another, which nobody can write because it is drawn here.
    """
    model = tree["model"]
    vocab, merges = model["vocab"], model.get("merges") or []
    pieces = {piece for piece, _ in vocab} if isinstance(vocab, list) else vocab.keys()
    in_vocab = {name for name in names if name in pieces and name != model.get("unk_token")}
    prefix = model.get("continuing_subword_prefix") or ""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    kept = [[left, right] for left, right in pairs if not in_vocab & {left, right, left + right.removeprefix(prefix)}]
    # Merging never makes what no merge makes.
    reached = in_vocab if model["type"] != "BPE" or model.get("ignore_merges") or len(kept) < len(merges) else set()
    matched = any(t["content"] in names and not t["special"] for t in tree.get("added_tokens") or [])
    if not reached and not matched:
        return None
    drawn = secrets.token_hex(16)
    hidden = {name: f"{name} {drawn}" for name in reached}
    if isinstance(vocab, list):
        vocab = [[hidden.get(piece, piece), score] for piece, score in vocab]
    else:
        vocab = {hidden.get(piece, piece): i for piece, i in vocab.items()}
    added = [
        token | {"content": hidden.get(token["content"], token["content"]), "special": True}
        if token["content"] in names
        else token
        for token in tree.get("added_tokens") or []
    ]
    changed = {"vocab": vocab, "merges": kept} if model["type"] == "BPE" else {"vocab": vocab}
    return tree | {"model": model | changed, "added_tokens": added, "post_processor": None}


def _parts(tree: dict[str, Any] | None, key: str, kinds: set[str]) -> list[dict[str, Any]]:
    """The parts of these kinds of a pre-tokenizer or decoder, which may be a sequence of them under `key`."""
    if tree is None:
        return []
    of = tree[key] if tree["type"] == "Sequence" else [tree]
    return [part for part in of if part["type"] in kinds]


def _gives_all_back(tree: dict[str, Any]) -> bool:
    """Whether the definition shows that any text comes back from its ids: it works on bytes and changes none."""
    model, alphabet = tree["model"], set(byte_alphabet())
    plain = model["type"] == "BPE" and alphabet <= model["vocab"].keys()
    plain = plain and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    normalizer = tree.get("normalizer")
    plain = plain and (normalizer is None or normalizer == {"type": "Sequence", "normalizers": []})
    plain = plain and (tree.get("decoder") or {}).get("type") == "ByteLevel"
    pre = tree.get("pre_tokenizer")
    cut = _parts(pre, "pretokenizers", {"Split", "Digits", "ByteLevel"})
    plain = plain and pre is not None and len(cut) == len(pre.get("pretokenizers", [pre]))
    plain = plain and all(part.get("behavior") != "Removed" and not part.get("add_prefix_space") for part in cut)
    plain = plain and any(part["type"] == "ByteLevel" for part in cut)
    added = [token for token in tree.get("added_tokens") or [] if not token["special"]]
    return plain and not any(token["lstrip"] or token["rstrip"] for token in added)


def _unknown_id(tree: dict[str, Any]) -> int | None:
    """The id that stands for what the vocabulary lacks."""
    model = tree["model"]
    if model["type"] == "Unigram":
        return model.get("unk_id")
    return model["vocab"].get(model.get("unk_token"))


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte: itself where it prints, else the next one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
