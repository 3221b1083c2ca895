"""Text to ids and back: a thin layer over Hugging Face `tokenizers`, and two ways to get a tokenizer without a hub."""

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lfm.errors import UserError
from lfm.files import exists, read_file, write_durably

END_OF_DOCUMENT = "<|endoftext|>"
END_OF_DOCUMENT_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>")

TiktokenPattern = Literal["gpt2", "cl100k", "o200k"]

# How text is cut into words before merging; the GPT-2 pattern is built into the ByteLevel pre-tokenizer.
_SPLIT_PATTERNS = {
    "cl100k": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

# Number of ranks of the published files -> their pattern and the id that tiktoken gives <|endoftext|>.
_PUBLISHED_RANKS: dict[int, tuple[TiktokenPattern, int]] = {
    50256: ("gpt2", 50256),
    100256: ("cl100k", 100257),
    199998: ("o200k", 199999),
}


class Tokenizer:
    """Text to ids and back.  No id is added but to a prompt: the beginning-of-text id, where documents begin with it.

    Names of special tokens inside text are ordinary text, so a document that mentions `<|endoftext|>` stays one
    document and comes back unchanged.
    """

    def __init__(self, definition: bytes, *, source: str) -> None:
        """`definition` is the content of a tokenizer.json; `source` names it in errors.

        Raises UserError if it is no tokenizer or has no end-of-document token.
        """
        try:
            self._inner = tokenizers.Tokenizer.from_buffer(definition)
        except Exception as error:  # the Rust side raises bare Exception for whatever it cannot read
            raise UserError(f"{source} is not a tokenizer.json: {' '.join(str(error).split())}") from None
        self._inner.encode_special_tokens = True
        self._inner.no_padding()
        self._inner.no_truncation()
        self.definition = definition
        self.sha256: str = hashlib.sha256(definition).hexdigest()
        self.vocab_size: int = 1 + max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)
        """One more than the largest id."""
        known = [self._inner.token_to_id(name) for name in END_OF_DOCUMENT_NAMES]
        if not any(i is not None for i in known):
            raise UserError(
                f"{source} has no end-of-document token; one of {', '.join(END_OF_DOCUMENT_NAMES)} is needed"
            )
        self.eod_id: int = next(i for i in known if i is not None)
        first = self._inner.encode("").ids[:1]
        self.bos_id: int | None = first[0] if first and first[0] != self.eod_id else None
        """What a document begins with, by the definition's post-processor; None: nothing."""

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
        inner = tokenizers.Tokenizer.from_buffer(self.definition)
        inner.post_processor = (
            processors.ByteLevel(trim_offsets=False)  # changes no ids
            if token is None
            else processors.TemplateProcessing(single=[token, "$A"], special_tokens=[(token, wanted)])
        )
        return Tokenizer(inner.to_str().encode(), source=f"the tokenizer that begins with {token}")

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None: there is none."""
        return self._inner.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str, *, begin: bool = True) -> list[int]:
        """The ids of what a user typed; with `begin`, as the beginning of a document.

        Raises UserError for text that is no UTF-8 or that the vocabulary lacks.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"prompt {text!r} is not valid UTF-8; give it in UTF-8") from None
        ids = self.encode(text)
        if self.decode(ids) != text:  # a byte-level vocabulary holds everything; others drop or replace
            for character in text:
                if not character.isspace() and character not in self.decode(self.encode(character)):
                    raise UserError(
                        f"the tokenizer has no token for {character!r} (U+{ord(character):04X}) of the prompt; "
                        "leave it out, or train with a byte-level tokenizer"
                    )
        return [self.bos_id, *ids] if begin and self.bos_id is not None else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed on all cores."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder for ids that arrive one at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes ids as they come and holds text back while its last character may be incomplete.

    The pieces that `push` and `flush` return, joined, are the decoded text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the ids emitted last: some decoders treat the first id of a text differently
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._held.append(token)
        # A character split over tokens decodes to U+FFFD until its last byte is there.
        return "" if self._decode_held().endswith("\ufffd") else self._emit()

    def flush(self) -> str:
        """What is still held, at the end of the text."""
        return self._emit() if self._held else ""

    def _decode_held(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._held)[len(before) :]

    def _emit(self) -> str:
        text = self._decode_held()
        self._context, self._held = self._held, []
        return text


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` entries (256 bytes and `<|endoftext|>` among them) trained on `texts`.

    Raises UserError if the texts do not hold that many merges.
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
    inner.train_from_iterator(texts, trainer)
    if inner.get_vocab_size() != vocab_size:
        raise UserError(
            f"the text holds merges for a BPE of only {inner.get_vocab_size()} entries, not {vocab_size}; "
            "give it more text or ask for a smaller vocabulary"
        )
    return Tokenizer(inner.to_str().encode(), source="the trained tokenizer")


def from_tiktoken(path: Path | str, pattern: TiktokenPattern | None = None) -> Tokenizer:
    """Convert a tiktoken rank file (lines of `base64-of-token rank`) to a tokenizer with `<|endoftext|>`.

    `pattern` is how text is cut into words; None recognises the published files by their number of ranks and takes
    GPT-2's for others.  `<|endoftext|>` gets its published id, or the first free one.  Ids equal tiktoken's.
    Raises UserError if the file is missing or is no rank file.
    """
    ranks = _read_ranks(path)
    published_pattern, eod_id = _PUBLISHED_RANKS.get(len(ranks), ("gpt2", max(ranks.values()) + 1))
    alphabet = byte_alphabet()
    vocab = {"".join(alphabet[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        pieces = pieces_before(token, rank, ranks)
        if len(pieces) == 2:
            merges.append(tuple("".join(alphabet[byte] for byte in piece) for piece in pieces))
    vocab[END_OF_DOCUMENT] = eod_id
    # tiktoken looks a whole word up before it merges; ignore_merges does the same.
    inner = _byte_level(models.BPE(vocab, merges, ignore_merges=True), pattern or published_pattern)
    return Tokenizer(inner.to_str().encode(), source=str(path))


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
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path} is not a tiktoken rank file: line {number} is not `base64-of-token rank`"
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{path} is not a whole tiktoken rank file: byte {missing[0]} has no rank")
    return ranks


def _read(path: Path | str) -> bytes:
    if not exists(Path(path)):
        raise UserError(f"tokenizer file {path} does not exist; give the path of a tokenizer.json")
    return read_file(Path(path))


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte: itself where it prints, else the next one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
