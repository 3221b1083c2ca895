"""What to prepare: the keys of `configs/data/NAME.yaml`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from data_pipeline.sources import JsonlConfig, Labels, SourceConfig, StdinConfig
from lfm.config import Bytes, Config, Count, DepthOrZero, PathText, Tokens, Vocabulary
from lfm.data.format import Packing
from lfm.data.published import TiktokenPattern

_LASTING_NOT = {"output", "overwrite", "num_workers", "tokenizer_backend"}


class TokenizerConfig(Config):
    train_vocab_size: Vocabulary | None = None
    """Train a byte-level BPE of this many entries on the training split; null: read `file`."""
    allow_smaller: bool = False
    """Train one of fewer entries where the text holds merges for no more."""
    train_bytes: Bytes = 16_000_000
    """About how many bytes of text to train it on, taken evenly from all sources."""
    file: PathText | None = None
    """A tokenizer.json, a folder with one, a tiktoken rank file, or a model's name on the Hugging Face hub, such as
    gpt2; null: train one."""
    revision: str | None = None
    """Commit or branch of a model on the hub; null: its newest."""
    tiktoken_pattern: TiktokenPattern | None = None
    """How text is cut into words with a rank file; null: published files are known, others get gpt2 and a warning."""

    @model_validator(mode="after")
    def _trained_or_read(self) -> "TokenizerConfig":
        if (self.train_vocab_size is None) == (self.file is None):
            raise ValueError(
                f"train_vocab_size={self.train_vocab_size} and file={self.file}: "
                "set exactly one of the two and make the other null"
            )
        return self


class PrepareConfig(Config):
    output: PathText
    """Folder of the data set: tokenizer.json, both splits, validation.txt and report.json."""
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """Where text comes from; read in this order."""
    tokenizer: Annotated[TokenizerConfig, BeforeValidator(lambda of: {"file": of} if isinstance(of, str) else of)]
    format: Literal["mds", "bins"] = "mds"
    """mds: rows in shards, documents apart; bins: all ids end to end in train.bin and val.bin."""
    seq_length: Annotated[Tokens, Field(ge=2)] | None = None
    """Ids in a row of shards; the run that trains on it uses the same.  null for bins: the run cuts the rows."""
    packing: Packing = "greedy"
    """greedy: shards' rows are full, documents go on in the next row; one_document: each row is one, cut or padded;
    best_fit: rows of whole documents, padded, and only documents longer than a row are split."""
    bos: bool = False
    """Begin each document with the tokenizer's beginning-of-text id, which counts as a token.  The data set's
    tokenizer.json says which, so that prompts begin with it too."""
    labels: Labels = "all"
    """What is trained on: all of each document, or, of lines of JSON with `prompt` and `completion` or with `messages`,
    the completions and the messages of the role assistant, each with the end-of-document id behind it."""
    separator: Literal["eod", "none"] = "eod"
    """What follows each document: its end-of-document id, or, in bins only, nothing."""
    validation: Literal["hash", "tail"] = "hash"
    """Which text is held out: documents chosen by a hash of their text; or the tail: of bins the last ids of all, of
    shards the end of each file of text, which is cut into pieces (lines and rows are chosen by a hash then too)."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the documents (hash), of the ids (tail of bins) or of each file (tail of shards) that is held out."""
    shard_bytes: Bytes = 1 << 26
    """Largest size of an uncompressed shard file."""
    compression: Literal["zstd"] | None = None
    """null is best on a shared file system; zstd suits shards that are fetched from a remote."""
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = None
    """Drop documents at least this similar to an earlier one (Jaccard, of runs of five words; 0.8 is usual); null:
    equal ones only.  Needs the extra `dedup`."""
    max_bytes: Bytes | None = None
    """Stop after this many bytes of text, duplicates not counted; null: take all."""
    max_documents: Count | None = None
    """Stop after this many documents, duplicates not counted; null: take all."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the choice of validation documents and of the tokenizer's training text."""
    num_workers: DepthOrZero | None = None
    """Processes; 0: this one alone; null: one a core, none for little text.  The result is the same."""
    tokenizer_backend: Literal["auto", "tokenizers"] = "auto"
    """auto: tiktoken, three times as fast, where it is installed and gives the same ids."""
    overwrite: bool = False
    """Prepare anew and replace the data set that `output` holds."""

    @model_validator(mode="after")
    def _keys_of_the_format(self) -> "PrepareConfig":
        if self.format == "mds":
            if self.seq_length is None:
                raise ValueError("seq_length=null: rows of shards need a length; set seq_length, or format=bins")
            if self.separator != "eod":
                raise ValueError(
                    f"separator={self.separator}: shards keep documents apart; set separator=eod, or format=bins"
                )
            for i, source in enumerate(self.sources):
                markup = getattr(source, "markup", "none")
                if self.validation == "tail" and markup != "none":
                    raise ValueError(
                        f"validation=tail and sources[{i}].markup={markup}: a file with markup is not cut into pieces; "
                        "set validation=hash"
                    )
        elif (self.seq_length, self.packing, self.compression) != (None, "greedy", None):
            raise ValueError(
                f"seq_length={self.seq_length}, packing={self.packing} and compression={self.compression}: .bin files "
                "have no rows and no shards; remove these keys, or set format=mds"
            )
        elif self.validation == "tail" and self.tokenizer.file is None:
            raise ValueError(
                "tokenizer.file=null: with validation=tail the held-out text is known only after encoding, so that a "
                "tokenizer trained here would see it; set tokenizer.file, or validation=hash"
            )
        return self

    @property
    def tail_of_files(self) -> float | None:
        """Share of each file of text that is held out; None: documents are whole."""
        return self.validation_fraction if (self.format, self.validation) == ("mds", "tail") else None

    @model_validator(mode="after")
    def _labels_of_lines(self) -> "PrepareConfig":
        if self.labels == "all":
            return self
        if self.format == "bins":
            raise ValueError(f"labels={self.labels}: .bin files hold ids alone; set format=mds, or labels=all")
        for i, source in enumerate(self.sources):
            if not isinstance(source, JsonlConfig | StdinConfig):
                raise ValueError(
                    f"labels={self.labels} and sources[{i}].kind={source.kind}: prompts and completions are read from "
                    "lines of JSON; set kind=jsonl or kind=stdin, or labels=all"
                )
            if isinstance(source, StdinConfig) and source.separator is not None:
                raise ValueError(
                    f"labels={self.labels} and sources[{i}].separator={source.separator!r}: prompts and completions "
                    "are read from lines of JSON; set separator=null, or labels=all"
                )
            if source.clean.rewrites:
                raise ValueError(
                    f"labels={self.labels} and sources[{i}].clean: nfc, min_line_words, min_line_letters and "
                    "drop_boilerplate would change a text whose parts are known by their places; remove them and keep "
                    "rules that drop whole documents, or set labels=all"
                )
        return self

    @model_validator(mode="after")
    def _standard_input_once(self) -> "PrepareConfig":
        if any(isinstance(source, StdinConfig) for source in self.sources) and self.tokenizer.file is None:
            raise ValueError(
                "tokenizer.file=null: the standard input can be read only once, and training a tokenizer reads it "
                "first; set tokenizer.file"
            )
        return self


def lasting(config: PrepareConfig) -> dict[str, Any]:
    """The part of the config that decides the content; of `labels` and some keys of the tokenizer, what is not as it
    always was."""
    tree = config.model_dump(mode="json", exclude=_LASTING_NOT | ({"labels"} if config.labels == "all" else set()))
    for key in ("allow_smaller", "revision"):
        if not tree["tokenizer"][key]:
            del tree["tokenizer"][key]
    return tree
