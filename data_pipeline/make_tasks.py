"""Data of the tasks that come with the project: `python -m data_pipeline.make_tasks [key=value ...]`.

    <output>/stdlib_lines.jsonl        the next line of code, among four of the same file
    <output>/stdlib_last_word.jsonl    the last word of a paragraph of a docstring, which stands in it before too
    <output>/gcide_words.jsonl         the definition of a word, among four of the same subject

Made of text that is on the machine, and of one Debian package; the same for the same text and seed.  `lfm eval --tasks`
reads them by configs/tasks/.  Models that were trained on that text have seen what is asked.
"""

import ast
import bisect
import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from pydantic import Field

from data_pipeline.files import matching_paths
from data_pipeline.labelled import GcideConfig, gcide_rows
from lfm.config import Config, Count, PathText, parse_command_line
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import expanded, read_file, ready_folder, refusing, shown, write_durably

TaskName = Literal["stdlib_lines", "stdlib_last_word", "gcide_words"]

_CHOICES = 4
_CONTEXT_LINES = 8
_WORD = re.compile(r"[A-Za-z]{4,}")


class MakeTasksConfig(Config):
    output: PathText = "data/tasks"
    """Folder of the files; the shipped tasks read data/tasks."""
    tasks: tuple[TaskName, ...] = ("stdlib_lines", "stdlib_last_word", "gcide_words")
    """Which to make; gcide_words fetches a Debian package of 15 MB once."""
    num_documents: Count = 500
    """The most of each task."""
    paths: tuple[PathText, ...] = ("{stdlib}",)
    """Folders or files of Python code; {stdlib} and {site-packages} are filled in."""
    exclude: tuple[str, ...] = ("site-packages/*", "dist-packages/*", "test/*", "*/test/*", "*/tests/*", "idlelib/*")
    """Of folders: globs of what is left out."""
    gcide: GcideConfig = GcideConfig()
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the choice of documents and of wrong answers."""


Document = dict[str, Any]


def make_tasks(config: MakeTasksConfig) -> dict[str, int]:
    """Write the files; how many documents each has.  Raises UserError for a source that cannot be had."""
    output = expanded(config.output)
    ready_folder(output)
    made: dict[str, list[Document]] = {}
    needs_code = any(name.startswith("stdlib") for name in config.tasks)
    files = _code(config) if needs_code else []
    for name in config.tasks:
        draws = np.random.Generator(np.random.Philox(key=config.seed))
        if name == "stdlib_lines":
            found = [document for text in files for document in _next_lines(text, draws)]
        elif name == "stdlib_last_word":
            found = [document for text in files for document in _last_words(text)]
        else:
            found = _definitions(config, draws)
        if not found:
            raise UserError(f"the sources give no document of {name}; add text, or leave it out of tasks")
        made[name] = _chosen(found, config)
    with refusing("choose another output"):
        for name, documents in made.items():
            lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
            write_durably(output / f"{name}.jsonl", lines.encode())
    return {name: len(documents) for name, documents in made.items()}


def _chosen(documents: Sequence[Document], config: MakeTasksConfig) -> list[Document]:
    """The first by a hash of (seed, document), one of each."""
    lines = {json.dumps(document, sort_keys=True): document for document in documents}
    order = sorted(lines, key=lambda line: xxhash.xxh64_intdigest(line, seed=config.seed))
    return [lines[line] for line in order[: config.num_documents]]


def _code(config: MakeTasksConfig) -> list[str]:
    paths: list[Path] = matching_paths(config.paths, (".py",), config.exclude)
    return [read_file(path).decode(errors="replace") for path in paths]


def _next_lines(text: str, draws: np.random.Generator) -> Iterator[Document]:
    """Of one file: a few places where a line is asked for among lines of the same indentation and about its length."""
    lines = [line.rstrip() for line in text.expandtabs().split("\n")]
    by_indentation: dict[int, list[str]] = {}
    for line in lines:
        if 12 <= len(line.strip()) <= 80 and not line.lstrip().startswith("#"):
            by_indentation.setdefault(_indentation(line), []).append(line)
    places = [
        number
        for number in range(_CONTEXT_LINES, len(lines))
        if lines[number] in by_indentation.get(_indentation(lines[number]), ()) and all(lines[number - 2 : number])
    ]
    for number in sorted(draws.choice(places, min(3, len(places)), replace=False).tolist()) if places else ():
        line, context = lines[number], lines[number - _CONTEXT_LINES : number]
        near = {other for other in by_indentation[_indentation(line)] if other != line and other not in context}
        others = _others(line, near, draws)
        if len(others) == _CHOICES - 1:
            choices, gold = _shuffled([line, *others], draws)
            yield {"context": "\n".join(context) + "\n", "choices": choices, "gold": gold}


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def _others(right: str, wrong: set[str], draws: np.random.Generator) -> list[str]:
    """Wrong answers about as long as the right one, whose place among them by length is drawn: length tells nothing."""
    by_length = sorted(wrong, key=lambda text: (len(text), text))
    middle = bisect.bisect_left(by_length, (len(right), right), key=lambda text: (len(text), text))
    shorter = int(draws.integers(_CHOICES))
    first = middle - shorter
    return by_length[first : first + _CHOICES - 1] if first >= 0 else []


def _shuffled(choices: Sequence[str], draws: np.random.Generator) -> tuple[list[str], int]:
    """The choices in a drawn order, and where the first of them is now."""
    order: list[int] = draws.permutation(len(choices)).tolist()
    return [choices[i] for i in order], order.index(0)


def _last_words(text: str) -> Iterator[Document]:
    """Paragraphs of docstrings whose last word stands in them before; LAMBADA's kind (Paperno et al. 2016)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the code that is read
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
            words = paragraph.rstrip(" .:;!?\n").split()
            if len(words) < 20 or len(words) > 150 or not _WORD.fullmatch(words[-1]):
                continue
            if words[-1] in {word.strip(".,:;()'\"`") for word in words[:-1]}:
                yield {"context": " ".join(words[:-1]), "word": words[-1]}


def _definitions(config: MakeTasksConfig, draws: np.random.Generator) -> list[Document]:
    """Of each headword with a marked subject, its definition among those of other words of the subject."""
    rows = [
        row for row in gcide_rows(config.gcide) if row.group.lower() not in row.text.lower() and len(row.text) < 300
    ]
    by_label: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_label.setdefault(row.label, []).append(number)
    found = []
    for place in draws.permutation(len(rows)).tolist()[: 4 * config.num_documents]:
        row = rows[place]
        drawn = draws.choice(by_label[row.label], min(24, len(by_label[row.label])), replace=False).tolist()
        others = {rows[i].text for i in drawn if rows[i].group != row.group and rows[i].text != row.text}
        near = _others(row.text, others, draws)
        if len(near) == _CHOICES - 1:
            choices, gold = _shuffled([row.text, *near], draws)
            found.append({"word": row.group, "subject": row.label, "choices": choices, "gold": gold})
    return found


@command
def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    config, _ = parse_command_line(
        MakeTasksConfig,
        "Make the data of the shipped tasks from text on this machine.",
        words,
        without_config=lambda flags: MakeTasksConfig.with_overrides({}, flags.overrides, source="the defaults"),
    )
    for name, count in make_tasks(config).items():
        print(f"{shown(Path(config.output) / name)}.jsonl: {count:,} documents")


if __name__ == "__main__":
    main()
