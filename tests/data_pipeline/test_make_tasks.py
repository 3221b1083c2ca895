"""Data of the shipped tasks."""

import gzip
import json
from pathlib import Path

import pytest

from data_pipeline.make_tasks import MakeTasksConfig, main, make_tasks
from lfm.config import parse_yaml
from lfm.errors import UserError

CODE = '"""Words.\n\n{paragraph}\n"""\nimport json\nimport pathlib\n\n\n' + "".join(
    f"def function_{n}(argument):\n    value_{n} = argument + {n}\n    return json.dumps(value_{n})\n\n\n"
    for n in range(20)
)
PARAGRAPH = (
    "This module reads a document from the disk and writes it again, so that whoever comes later can be sure that what "
    "was read is the same document."
)


def entry(word: str, text: str) -> str:
    return f"{word} \\{word}\\, n.\n   (Bot.) {text}\n"


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "code.py").write_text(CODE.replace("{paragraph}", PARAGRAPH))
    words = [entry(f"Word{n:c}", f"A plant that has {n} petals and grows in dry places.") for n in range(97, 117)]
    (tmp_path / "gcide.dict.dz").write_bytes(gzip.compress(("00-header\n" + "".join(words)).encode()))
    return [f"paths=[{tmp_path}/code.py]", f"gcide.path={tmp_path}/gcide.dict.dz", f"output={tmp_path}/out"]


def read(tmp_path, name):
    return [json.loads(line) for line in (tmp_path / f"out/{name}.jsonl").read_text().splitlines()]


def test_the_files_are_what_the_tasks_read(sources, tmp_path, capsys):
    main(sources)
    said = capsys.readouterr().out
    assert "stdlib_lines.jsonl: 3 documents" in said and "gcide_words.jsonl: 18 documents" in said
    (cloze,) = read(tmp_path, "stdlib_last_word")
    assert cloze == {"context": PARAGRAPH.rsplit(" ", 1)[0], "word": "document"}
    code = (tmp_path / "code.py").read_text()
    for document in read(tmp_path, "stdlib_lines"):
        right = document["choices"][document["gold"]]
        assert document["context"] + right + "\n" in code and len(set(document["choices"])) == 4
        wrong = [choice for choice in document["choices"] if choice != right]
        assert all(document["context"] + choice + "\n" not in code for choice in wrong)
    for document in read(tmp_path, "gcide_words"):
        right = document["choices"][document["gold"]]
        assert f"{ord(document['word'][-1])} petals" in right and len(set(document["choices"])) == 4
    by_length = [sorted(d["choices"], key=lambda text: (len(text), text)) for d in read(tmp_path, "gcide_words")]
    ranks = [
        row.index(d["choices"][d["gold"]]) for row, d in zip(by_length, read(tmp_path, "gcide_words"), strict=True)
    ]
    assert set(ranks) == {0, 1, 2, 3}, "length tells nothing"


def test_the_same_text_and_seed_give_the_same_files(sources, tmp_path):
    def made(*more):
        make_tasks(MakeTasksConfig.with_overrides({}, [*sources, *more], source="a test"))
        return [(tmp_path / f"out/{name}.jsonl").read_bytes() for name in MakeTasksConfig().tasks]

    assert made() == made() != made("seed=1")
    few = made("num_documents=2")
    assert [len(content.splitlines()) for content in few] == [2, 1, 2]


def test_text_that_gives_no_document_is_refused_and_nothing_written(sources, tmp_path):
    (tmp_path / "code.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="no document of stdlib_lines"):
        make_tasks(MakeTasksConfig.with_overrides({}, sources, source="a test"))
    assert not list((tmp_path / "out").iterdir())


def test_each_shipped_task_names_a_file_that_is_made_here():
    tasks = {path.stem: parse_yaml(path.read_text()) for path in Path("configs/tasks").glob("*.yaml")}
    assert tasks.keys() == set(MakeTasksConfig().tasks)
    for name, tree in tasks.items():
        assert tree["task"] == name
        assert tree["dataset_kwargs"]["data_files"]["test"] == f"{MakeTasksConfig().output}/{name}.jsonl"
