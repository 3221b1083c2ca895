"""Small tokenizers of every kind that a tokenizer.json can hold, trained on the made-up corpus."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.data.corpus import texts

END = "</s>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def plain(text: str) -> str:
    """The corpus without what a tokenizer is to lack."""
    return "".join(character for character in text if character.isascii())


TEXTS = [plain(text).replace(END, "") for text in texts(120)]


def metaspace() -> Tokenizer:
    """BPE of words behind a mark for the space, which drops what it does not know."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    found.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=[END], show_progress=False))
    return found


def llama() -> Tokenizer:
    """As Llama 2's: BPE of the whole text, bytes for what it does not know, and a decoder in four steps."""
    special = ["<unk>", "<s>", END, *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    found = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.train_from_iterator(TEXTS, trainer)
    found.pre_tokenizer = None
    found.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = decoders.Strip(" ", 1, 0)
    found.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    tree = json.loads(found.to_str())
    tree["added_tokens"] = tree["added_tokens"][:3]  # bytes are pieces of the vocabulary
    return Tokenizer.from_str(json.dumps(tree))


def unigram() -> Tokenizer:
    """As T5's: pieces with scores, the end of a document among them."""
    found = Tokenizer(models.Unigram())
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", END], unk_token="<unk>", show_progress=False
    )
    found.train_from_iterator(TEXTS, trainer)
    return found


def word_pieces() -> Tokenizer:
    """As BERT's: pieces that go on in a word have a prefix, and the decoder puts spaces between the others."""
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.pre_tokenizer, found.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", END], show_progress=False)
    found.train_from_iterator(TEXTS, trainer)
    return found


def word_ends() -> Tokenizer:
    """BPE with a mark at the end of words, which the decoder makes a space where another follows."""
    found = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    found.pre_tokenizer, found.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", END], end_of_word_suffix="</w>", show_progress=False
    )
    found.train_from_iterator(TEXTS, trainer)
    return found


def words(unknown: str | None = "[UNK]") -> Tokenizer:
    """A list of words; no decoder."""
    found = Tokenizer(models.WordLevel(unk_token=unknown) if unknown else models.WordLevel())
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [END] if unknown is None else [unknown, END]
    found.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    return found


KINDS = {kind.__name__: kind for kind in (metaspace, llama, unigram, word_pieces, word_ends, words)}
