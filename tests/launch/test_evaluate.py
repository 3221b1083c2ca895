"""`lfm eval` of texts and tasks, of one checkpoint and of several."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from lfm.commands import evaluate
from lfm.training.loop import train
from tests.training.tiny_run import tiny_run

TEXT = "import json\n\n\ndef load(path):\n    return json.loads(path.read_text())\n" * 60


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_data):
    folder = tmp_path_factory.mktemp("runs")
    keys = ["training.steps=2", "validation.every_steps=0", "validation.max_rows=1"]
    configs = [tiny_run(folder, text_data, f"name={name}", f"seed={seed}", *keys) for seed, name in enumerate("ab")]
    for config in configs:
        train(config)
    return [config.folder for config in configs]


@pytest.fixture
def lfm_eval(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lfm eval", *map(str, arguments), "--device", "cpu"])
        code = 0
        try:
            evaluate.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "one.py").write_text(TEXT)
    (tmp_path / "two.txt").write_text("Another text: \u6f22\u5b57.\n")
    return [tmp_path / "one.py", tmp_path / "two.txt"]


def test_texts_of_two_checkpoints_are_one_table_and_one_json(runs, texts, lfm_eval, tmp_path):
    found = {}
    for size in (1, 8):
        out = tmp_path / f"{size}.json"
        both = [word for run in runs for word in ("--checkpoint", run)]
        code, table, errors = lfm_eval(*both, "--text", *texts, "--batch-size", size, "--stride", 16, "--out", out)
        assert code == 0 and errors == "", errors
        found[size] = json.loads(out.read_text())
    first, second = found[1]["checkpoints"]
    assert (first["name"], second["name"], first["kind"], first["step"]) == ("a", "b", "lfm", 2)
    total = first["texts_together"]
    assert total["nats"] == pytest.approx(sum(text["nats"] for text in first["texts"]))
    assert total["bytes"] == sum(text.stat().st_size for text in texts)
    assert f"{total['perplexity']:.3f}" in table and f"{total['bits_per_byte']:.4f}" in table
    for one, other in zip(first["texts"], found[8]["checkpoints"][0]["texts"], strict=True):
        assert other["nats"] == pytest.approx(one["nats"], rel=1e-6) and other["tokens"] == one["tokens"]
    differences = {each["of"]: each for each in found[1]["differences"]}
    assert differences.keys() == {str(texts[0]), "together"}, "a text of one stretch has no interval"
    difference = differences["together"]
    assert (difference["checkpoint"], difference["from"]) == ("b", "a")
    estimate = second["texts_together"]["bits_per_byte"] - total["bits_per_byte"]
    assert difference["estimate"] == pytest.approx(estimate)
    assert difference["low"] <= difference["estimate"] <= difference["high"] and f"{estimate:+.4f}" in table


def test_held_out_rows_go_into_the_json_too(runs, lfm_eval, tmp_path):
    code, lines, _ = lfm_eval("--checkpoint", runs[0], "--out", tmp_path / "out.json")
    (found,) = json.loads((tmp_path / "out.json").read_text())["checkpoints"]
    assert code == 0 and f"loss {found['held_out']['loss']:.4f} nats" in lines and found["texts"] == []


def test_a_task_file_is_scored_at_every_batch_size_alike(runs, lfm_eval, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'lfm-training[lm-eval]'")
    documents = [
        {"question": f"def f{n}(x): return", "choices": [" x", " json", " 1"], "gold": n % 3} for n in range(9)
    ]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {"task": "own", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    task |= {
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.jsonl")}},
        "doc_to_text": "{{question}}",
    }
    task |= {"doc_to_choice": "choices", "doc_to_target": "gold", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "own.yaml").write_text(json.dumps(task))
    found = []
    for size in (1, 4):
        arguments = ["--tasks", tmp_path / "own.yaml", "--batch-size", size, "--out", tmp_path / "out.json"]
        both = [word for run in runs for word in ("--checkpoint", run)]
        code, table, _ = lfm_eval(*both, *arguments)
        assert code == 0 and "own" in table and "acc" in table
        found.append(json.loads((tmp_path / "out.json").read_text()))
        assert found[-1]["differences"][0]["metric"] == "acc"
    assert found[0]["checkpoints"] == found[1]["checkpoints"]
    assert found[0]["checkpoints"][0]["tasks"]["own"]["documents"] == 9


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--text", "none.txt"], "none.txt cannot be read"),
        (["--text", "FOLDER"], "is not a regular file"),
        (["--text", "TEXT", "--context", "65"], "context=65 is more than the model's 64"),
        (["--text", "TEXT", "--stride", "64"], "leaves windows of 64 nothing in common"),
        (["--text", "TEXT", "--data", "data"], "does not go with --text or --tasks"),
        (["--stride", "8"], "--stride is of --text, which is not given"),
        (["--text", "TEXT", "--num-fewshot", "0"], "--num-fewshot is of --tasks, which is not given"),
        (["--include-path", "tasks"], "name those to be scored with --tasks"),
        (["--tasks", "none.yaml"], "none.yaml is no file; name a task"),
        (["--tasks", "stdlib_lines", "--include-path", "none"], "is no folder of tasks"),
        (["--checkpoint", "RUN", "--text", "TEXT"], "named twice"),
        (["--text", "TEXT", "--out", "FOLDER"], "is a folder; name a file in it"),
        (["--text", "TEXT", "--out", "TEXT"], "is one of --text, which would be lost; name another file"),
        (["--text", "TEXT", "--out", "FIFO"], "is no regular file; name one, whose content is replaced"),
        (["--tasks", ","], "--tasks names no task; name some"),
        (["--batch-size", "0"], "batch_size"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    arguments, words, runs, texts, lfm_eval, tmp_path, monkeypatch
):
    if "--tasks" in arguments:
        pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'lfm-training[lm-eval]'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    named = {"RUN": runs[0], "TEXT": texts[0], "FOLDER": tmp_path / "folder", "FIFO": tmp_path / "fifo"}
    before = sorted(tmp_path.rglob("*"))
    out = [] if "--out" in arguments else ["--out", "out.json"]
    code, stdout, errors = lfm_eval("--checkpoint", runs[0], *(named.get(word, word) for word in arguments), *out)
    assert code == 2 and stdout == "" and errors.startswith("error: ") and words in errors and errors.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "fifo").is_fifo() and texts[0].read_text() == TEXT


def test_what_is_written_does_not_take_the_place_of_the_tables(runs, texts, tmp_path):
    words = ["eval", "--checkpoint", runs[0], "--text", texts[0], "--out", tmp_path / "out"]
    with (tmp_path / "out").open("w") as out:
        command = [sys.executable, "-m", "lfm", *map(str, words)]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.endswith("is where the tables go; name another file\n"), done.stderr


def test_a_text_of_one_token_has_no_perplexity(runs, texts, lfm_eval, tmp_path):
    texts[1].write_text("x")
    code, table, _ = lfm_eval("--checkpoint", runs[0], "--text", texts[1], "--out", tmp_path / "out.json")
    assert code == 0 and table.splitlines()[1].split()[2] == "-"
    assert json.loads((tmp_path / "out.json").read_text())["checkpoints"][0]["texts"][0]["perplexity"] is None


def test_a_checkpoint_without_a_tokenizer_is_one_sentence(runs, texts, lfm_eval, tmp_path):
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    (copy / "checkpoints/step_00000002/tokenizer.json").unlink()
    code, _, errors = lfm_eval("--checkpoint", copy, "--text", texts[0], "--out", tmp_path / "out.json")
    assert code == 2 and "tokenizer.json" in errors and errors.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_without_the_harness_tasks_are_refused_in_a_sentence(runs, lfm_eval, monkeypatch):
    monkeypatch.setitem(sys.modules, "lfm.evaluation.harness", None)
    monkeypatch.delattr("lfm.evaluation.harness", raising=False)
    code, _, errors = lfm_eval("--checkpoint", runs[0], "--tasks", "hellaswag")
    assert code == 2 and "pip install 'lfm-training[lm-eval]'" in errors
