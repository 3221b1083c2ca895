"""Whether a data set is whole: `python -m data_pipeline.verify FOLDER [--full]`.

Fast: the index, its tables of columns, the size of every file and whose tokenizer it is.  With --full every byte is
read and hashed.  FOLDER is a data set of shards or .bin files, or the URL of one of shards: file://, or s3://, gs://,
..., from where --full fetches one file at a time.  Every bad file is named; exit code 2 if there is one, else 0.  Where
rows have a mask, the share of labels is said.
"""

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from data_pipeline.report import REPORT_NAME, check_file, check_report, found_report, labels_in_words
from lfm.data.bins import BIN_NAMES, BINS_NAME, BinsRecord, hash_blocks, read_record
from lfm.data.cache import fetch
from lfm.data.format import INDEX_NAME, SPLITS, TOKENIZER_NAME, read_index, read_layout
from lfm.data.mds import HASH
from lfm.data.reader import hash_file
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import exists, expanded, file_size, read_file, reason, shown

FETCH_TIMEOUT_SECONDS = 600.0
T = TypeVar("T")


class Verification:
    """Goes over one data set; afterwards `problems` names every bad file in one sentence each."""

    def __init__(self, source: str, *, full: bool) -> None:
        self.full = full
        self.problems: list[str] = []
        self.notes: list[str] = []
        """What is to be known of splits whose rows have a mask of labels."""
        self.num_files = self.num_bytes = 0
        self._remote = source.rstrip("/") if "://" in source and not source.startswith("file://") else None
        self._root = expanded(source.removeprefix("file://"))
        self._report_splits: dict[str, Any] = {}
        self._progress = tqdm(unit="B", unit_scale=True, disable=None if full else True)

    def run(self) -> "Verification":
        with tempfile.TemporaryDirectory() as scratch, self._progress:
            if self._remote is not None:
                self._root = Path(scratch)
            elif not self._root.is_dir():
                raise UserError(f"{shown(self._root)} is no folder; give that of a data set")
            self._attempt(self._check_report)
            tokenizer = self._attempt(self._tokenizer_sha256)
            if any(exists(self._root / name) for name in (BINS_NAME, *BIN_NAMES.values())):
                self._check_bins(tokenizer)
            else:
                for split in SPLITS:
                    self._check_split(split, tokenizer)
        return self

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; a problem that it raises is noted."""
        try:
            return work()
        except UserError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{shown(error.filename or self._root)} cannot be read ({reason(error)})")
        return None

    def _tokenizer_sha256(self) -> str:
        path = self._root / TOKENIZER_NAME
        if self._remote is not None:
            fetch(f"{self._remote}/{TOKENIZER_NAME}", path, FETCH_TIMEOUT_SECONDS)
        if not exists(path):
            raise UserError(f"{path} is missing")
        return hashlib.sha256(read_file(path)).hexdigest()

    def _check_report(self) -> None:
        """What belongs to the report, if there is one, and that the splits are its own."""
        report = found_report(self._root)
        if report is None:
            if exists(self._root / REPORT_NAME):
                raise UserError(f"{self._root / REPORT_NAME} is damaged: it is no report of data_pipeline.prepare")
            return
        check_report(self._root, report)
        self._report_splits = report["splits"]
        for name in report.get("files", {}):
            self._attempt(lambda name=name: self._count(check_file(self._root, report, name, full=self.full)))

    def _count(self, num_bytes: int) -> None:
        self.num_files += 1
        self.num_bytes += num_bytes

    def _check_tokenizer(self, found: str | None, wanted: str, what: str) -> None:
        if found is not None and found != wanted:
            self.problems.append(f"{self._remote or self._root}/{TOKENIZER_NAME} is not the tokenizer that made {what}")

    def _check_split(self, split: str, tokenizer: str | None) -> None:
        folder = self._root / split
        if self._remote is not None:
            where = f"{self._remote}/{split}/{INDEX_NAME}"
            self._attempt(lambda: fetch(where, folder / INDEX_NAME, FETCH_TIMEOUT_SECONDS))
            if not exists(folder / INDEX_NAME):
                return
        read = self._attempt(lambda: read_index(folder))
        if read is None:
            return
        index, shards = read
        self._check_tokenizer(tokenizer, index.tokenizer_sha256, str(folder))
        if self._report_splits.get(split, {}).get("checksum", index.checksum) != index.checksum:
            self.problems.append(f"{folder} is of another data set than {self._root / REPORT_NAME}")
        self._attempt(lambda: read_layout(folder, index, shards))
        if index.num_labels is not None:
            self.notes.append(f"{split}: {labels_in_words(index.num_labels, index.num_tokens)}")
        for shard in shards:
            self._attempt(lambda shard=shard: self._check_shard(split, shard))

    def _check_shard(self, split: str, shard: dict[str, Any]) -> None:
        folder = self._root / split
        if self._remote is not None:
            if self.full:  # only then is there anything to look at
                file = shard["zip_data"] or shard["raw_data"]
                local = folder / file["basename"]
                fetch(f"{self._remote}/{split}/{local.name}", local, FETCH_TIMEOUT_SECONDS)
                try:
                    self._check_file(local, file, f"{self._remote}/{split}/{local.name}")
                finally:
                    local.unlink()
            return
        files = [file for file in (shard["zip_data"], shard["raw_data"]) if file]
        present = [file for file in files if exists(folder / file["basename"])]
        if not present:
            raise UserError(f"shard {folder / files[0]['basename']} is missing")
        for file in present:
            self._check_file(folder / file["basename"], file, f"{folder / file['basename']}")

    def _check_file(self, path: Path, file: dict[str, Any], name: str) -> None:
        size = file_size(path)
        self._count(size)
        if size != file["bytes"]:
            raise UserError(f"shard {name} has {size} bytes instead of {file['bytes']}")
        if self.full:
            self._progress.update(size)
            if hash_file(path) != file["hashes"][HASH]:
                raise UserError(f"shard {name} is damaged: its {HASH} is not the one in {INDEX_NAME}")

    def _check_bins(self, tokenizer: str | None) -> None:
        record = self._attempt(lambda: read_record(self._root))
        if record is None:
            if not self.problems:
                self.problems.append(f"{self._root} has no bins.json, so that nothing is known of what its files held")
            return
        self._check_tokenizer(tokenizer, record.tokenizer_sha256, str(self._root))
        for split, file in record.files.items():
            if self._report_splits.get(split, file.model_dump(exclude={"xxh64"})) != file.model_dump(exclude={"xxh64"}):
                self.problems.append(f"{self._root / BINS_NAME} is of another data set than {REPORT_NAME} beside it")
        for problem in self._problems_of_bins(record):
            self.problems.append(problem)

    def _problems_of_bins(self, record: BinsRecord) -> Iterator[str]:
        width = {"uint16": 2, "uint32": 4}[record.dtype]
        for split, file in record.files.items():
            path = self._root / BIN_NAMES[split]
            if not exists(path):
                yield f"{path} is missing"
                continue
            size = self._attempt(lambda path=path: file_size(path))
            if size is None:
                continue
            self._count(size)
            if size != file.num_tokens * width:
                yield f"{path} has {size} bytes instead of {file.num_tokens * width}"
            elif self.full:
                blocks = self._attempt(lambda path=path: hash_blocks(path, record.block_bytes))
                if blocks is None:
                    continue
                self._progress.update(size)
                bad = [i for i, (a, b) in enumerate(zip(blocks, file.xxh64, strict=True)) if a != b]
                if bad:
                    yield f"{path} is damaged: its xxh64 from byte {bad[0] * record.block_bytes} on is another"


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", help="a data set folder, or the URL of one")
    parser.add_argument("--full", action="store_true", help="read and hash every byte")
    flags = parser.parse_args()
    found = Verification(flags.folder, full=flags.full).run()
    for problem in found.problems:
        print(f"error: {problem}", file=sys.stderr)
    if found.problems:
        sys.exit(2)
    for note in found.notes:
        print(note)
    how = "every byte is as it was written" if flags.full else "indexes and sizes are right; --full hashes every byte"
    print(f"{shown(flags.folder)}: {found.num_files} files, {found.num_bytes:,} bytes: {how}")


if __name__ == "__main__":
    main()
