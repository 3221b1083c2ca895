"""Text to a data set: `lfm prepare --config configs/data/NAME.yaml [key=value ...]`, or `lfm prepare book.txt`.

    find files -> batches -> read, clean, hash, encode -> drop duplicates -> stop at the limits -+-> pack -> shards
                             (in several processes)       (in the order of the files)            +-> .bin files

Documents are encoded before it is known whether another process has met the same text: that costs less than asking.
Neither ids nor counts depend on the number of processes.

Everything is written to a hidden folder beside the output, which takes the output's name when all of it is on the disk:
a killed run leaves nothing that looks like a data set, and running again starts over.
"""

import argparse
import errno
import hashlib
import itertools
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.batches import InputFile
from data_pipeline.collect import Collector, check_sums, prepared
from data_pipeline.make_tokenizer import fast_encoder, make_tokenizer
from data_pipeline.own_text import OwnText, own_text
from data_pipeline.prepare_config import PrepareConfig, lasting
from data_pipeline.report import (
    DROPPED_NAME,
    REPORT_NAME,
    check_report,
    file_sha256,
    found_report,
    in_words,
    left_out,
    loss_in_words,
    write_report,
)
from data_pipeline.sources import StdinConfig, find_files, read_batches, title
from data_pipeline.verify import Verification
from data_pipeline.worker import Encoding
from data_pipeline.write_bins import write_bins
from data_pipeline.write_shards import write_shards
from lfm.config import parse_command_line
from lfm.data.bins import BinFile
from lfm.data.format import FORMAT_VERSION, TOKENIZER_NAME, SplitIndex
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import (
    behind_links,
    exists,
    expanded,
    held_alone,
    is_free,
    partial_folder,
    reason,
    replace_folder,
    shown,
    write_durably,
)
from lfm.talk import talking

DESCRIPTION = """Prepare a data set: text to tokenized shards.  What: --config FILE, or sources that are no key=value:
files, folders, globs, URLs, or - for the standard input, as in `lfm prepare book.txt`; what is left open is then chosen
for the size of the text."""

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@talking()
def prepare(config: PrepareConfig, *, standard_input: Path | None = None) -> dict[str, Any]:
    """Make the data set unless it is there already; returns the content of its report.json.

    `standard_input` is the file of the sources that holds what was piped in: it counts by its content, wherever it is.

    Raises UserError if `output` holds something else, a source or the tokenizer cannot be used, a split stays empty, or
    the disk is full.
    """
    started = time.monotonic()
    output = behind_links(expanded(config.output))
    counts: Counter[str] = Counter()
    found = find_files(config.sources, counts)
    fingerprint = _fingerprint(config, found, standard_input)
    report = found_report(output)
    if report is not None and not config.overwrite:
        check_report(output, report)
    # What the standard input holds now is not known.
    can_differ = config.overwrite or any(isinstance(source, StdinConfig) for source in config.sources)
    if report is not None and report["fingerprint"] == fingerprint and not can_differ:
        problems = Verification(str(output), full=False).run().problems
        if problems:
            raise UserError(f"{problems[0]}; restore it, or set overwrite=true to prepare output={config.output} anew")
        print(f"{shown(config.output)} is already prepared: same config, same inputs")
        return report

    partial = partial_folder(output)
    with held_alone(
        output.with_name(f".{output.name}.lock"),
        unwritable=f"output={config.output} cannot be made; choose another output",
        taken=f"another process is preparing output={config.output}; wait for it or choose another",
    ):
        _check_replaceable(output, config)
        shutil.rmtree(partial, ignore_errors=True)  # a killed run's
        try:
            partial.mkdir()
            report = {"fingerprint": fingerprint, **_build(config, found, counts, partial)}
            report = _renamed(report, standard_input, "-")
            report = write_report(partial, report)
            replace_folder(output, by=partial)
        except OSError as error:
            way_out = "make room, or choose another output" if error.errno in _FULL_DISK else "choose another output"
            raise UserError(f"output={config.output} cannot be written ({reason(error)}); {way_out}") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    seconds = time.monotonic() - started
    tokens = report["stages"]["encode"]["tokens"]
    print(in_words(report))
    print(f"{shown(config.output)} is ready, after {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s")
    return report


def _build(
    config: PrepareConfig, found: Sequence[Sequence[InputFile]], counts: Counter[str], folder: Path
) -> dict[str, Any]:
    """Write all files but the report into `folder`; returns the report."""
    tokenizer, tokenizer_text_bytes = make_tokenizer(config, found, counts)
    tokenizer.save(folder / TOKENIZER_NAME)
    collector = Collector(config, counts)
    batches = read_batches(config.sources, found, config.labels, tail=config.tail_of_files)
    first = next(batches, None)
    fast = fast_encoder(config, tokenizer, first)
    if first is not None:
        batches = itertools.chain([first], batches)
    encoding = Encoding(
        definition=tokenizer.definition,
        fast=fast,
        bos_id=tokenizer.bos_id,
        eod_id=tokenizer.eod_id if config.separator == "eod" else None,
        longest=config.seq_length if config.packing == "one_document" else None,
        marks_labels=config.labels == "completion",
    )
    write = write_bins if config.format == "bins" else write_shards
    taken = collector.taken(prepared(config, found, batches, encoding))
    splits = write(config, tokenizer, taken, collector.stages, folder)
    if collector.lost:
        print(loss_in_words(collector.stages["encode"], collector.lost))
    for split, index in splits.items():
        if index.num_documents == 0:
            num_documents = collector.stages["limit"]["documents"]
            if num_documents == 0:
                raise UserError(f"the sources hold no text; add some{left_out(collector.stages)}")
            raise UserError(
                f"validation_fraction={config.validation_fraction} of {num_documents} documents leaves the {split} "
                f"split empty; change it or add text{left_out(collector.stages)}"
            )
        if isinstance(index, SplitIndex) and config.validation == "tail" and index.num_tokens < index.seq_length:
            raise UserError(
                f"the text is too short: its {split} split has {index.num_tokens} ids, less than one row of "
                f"seq_length={index.seq_length}; add text, or set a smaller seq_length{left_out(collector.stages)}"
            )
        if isinstance(index, SplitIndex) and index.num_labels == 0:
            raise UserError(
                f"no id of the {split} split is a label: packing={config.packing} cuts every completion off at "
                f"seq_length={config.seq_length}, or all are empty; raise seq_length, or take longer completions"
            )
    collector.count_files_not_reached()
    check_sums(collector.stages, splits)
    write_durably(folder / DROPPED_NAME, collector.dropped_lines())
    return {
        "config": lasting(config),
        "tokenizer": {
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
            "trained_on_bytes": tokenizer_text_bytes,
        },
        "stages": {name: dict(sorted(of_stage.items())) for name, of_stage in collector.stages.items()},
        "sources": [
            {"name": title(source), **dict(sorted(of_source.items()))}
            for source, of_source in zip(config.sources, collector.by_source, strict=True)
        ],
        "document_lengths": {str(1 << i): int(n) for i, n in enumerate(collector.lengths) if n > 0},
        "splits": {split: _facts(index) for split, index in splits.items()},
    }


def _facts(index: SplitIndex | BinFile) -> dict[str, Any]:
    is_masked = isinstance(index, SplitIndex) and index.num_labels is not None
    return index.model_dump(exclude={"xxh64"} if is_masked else {"xxh64", "num_labels"})


def _fingerprint(config: PrepareConfig, found: Sequence[Sequence[InputFile]], standard_input: Path | None) -> str:
    """Equal for equal configs over unchanged inputs.

    The inputs count by path, size and time, without reading them, but for what was piped in.
    """
    inputs = [(str(file.path), file.num_bytes, file.mtime_ns) for of_source in found for file in of_source]
    if config.tokenizer.file is not None:
        path = expanded(config.tokenizer.file)
        path = path / TOKENIZER_NAME if path.is_dir() else path
        if path.exists():  # if not, reading it says so
            inputs.append((str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns))
    tree = [FORMAT_VERSION, lasting(config), inputs]
    if standard_input is not None:
        tree = _renamed(tree, standard_input, file_sha256(standard_input))
    content = json.dumps(tree, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _renamed(tree: Any, path: Path | None, name: str) -> Any:
    """A tree of JSON with `name` wherever it has `path`."""
    return tree if path is None else json.loads(json.dumps(tree).replace(json.dumps(str(path))[1:-1], name))


def _check_replaceable(output: Path, config: PrepareConfig) -> None:
    is_data_set = found_report(output) is not None
    if is_data_set and not config.overwrite:
        raise UserError(
            f"output={config.output} holds a data set of another config or of inputs that have changed since; "
            "choose another output, or set overwrite=true to replace it"
        )
    if not is_data_set and not is_free(output):
        damaged = f" (its {REPORT_NAME} is damaged)" if exists(output / REPORT_NAME) else ""
        raise UserError(
            f"output={config.output} exists and is no data set of this program{damaged}; choose another output"
        )


@command
def main(argv: Sequence[str] | None = None) -> None:
    with tempfile.TemporaryDirectory(prefix="lfm-prepare-") as spool:
        own: list[OwnText] = []

        def without_config(namespace: argparse.Namespace) -> PrepareConfig:
            own.append(own_text(namespace.overrides, spool=Path(spool)))
            return own[0].config

        config, _ = parse_command_line(PrepareConfig, DESCRIPTION, argv, without_config=without_config)
        for line in own[0].reasons if own else ():
            print(line)
        prepare(config, standard_input=own[0].standard_input if own else None)
        if own:
            print(f"next: {own[0].next_command}")


if __name__ == "__main__":
    main()
