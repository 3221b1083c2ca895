"""Tasks between the steps of a run."""

import json
import shutil

import pytest

from lfm.errors import UserError
from lfm.evaluation.tasks import open_tasks
from lfm.inference.load import open_model
from lfm.training.loop import train
from lfm.training.metrics_file import read_metrics
from lfm.training.plots import Curves, figures
from tests.training.tiny_run import assert_same_checkpoint, losses, tiny_run

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'lfm-training[lm-eval]'")


@pytest.fixture
def task(tmp_path):
    documents = [
        {"question": f"def f{n}(x): return", "choices": [" x", " json", " 1"], "gold": n % 3} for n in range(9)
    ]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    tree = {"task": "own", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    tree |= {
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.jsonl")}},
        "doc_to_text": "{{question}}",
    }
    tree |= {"doc_to_choice": "choices", "doc_to_target": "gold", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "own.yaml").write_text(json.dumps(tree))
    return tmp_path / "own.yaml"


def test_tasks_are_scored_when_due_and_change_no_bit_of_the_run(text_data, tmp_path, task):
    keys = [f"evaluation.tasks=[{task}]", "evaluation.every_steps=2", "evaluation.limit=8"]
    plain = tiny_run(tmp_path, text_data, "name=plain", "training.steps=5")
    scored = tiny_run(tmp_path, text_data, "name=scored", "training.steps=5", *keys)
    train(plain)
    train(scored)
    newest = "checkpoints/step_00000005"
    shutil.rmtree(scored.folder / newest)
    train(scored)  # from step 4 on
    assert losses(plain.folder) == losses(scored.folder)
    assert_same_checkpoint(plain.folder / newest, scored.folder / newest)

    records = [record for record in read_metrics(scored.folder / "metrics.jsonl") if "tasks" in record]
    assert [record["step"] for record in records] == [2, 4, 5]
    model, tokenizer, _ = open_model(scored.folder, device="cpu")
    again = open_tasks([str(task)]).evaluate(model, tokenizer, batch_size=1, limit=8)["own"]
    assert records[-1]["tasks"] == {"own": {"acc": again.metrics["acc"]}} and again.num_documents == 8
    titles = [title for title, _ in figures([Curves("scored", read_metrics(scored.folder / "metrics.jsonl"))])]
    assert "tasks" in titles


def test_a_run_whose_tasks_cannot_be_opened_does_not_begin(text_data, tmp_path):
    run = tiny_run(tmp_path, text_data, "evaluation.tasks=[none.yaml]")
    with pytest.raises(UserError, match=r"none\.yaml is no file"):
        train(run)
    assert not (run.folder / "checkpoints").exists()


def test_a_document_that_cannot_be_scored_ends_the_run_saved(text_data, tmp_path, task):
    documents = (tmp_path / "documents.jsonl").read_text().replace('"gold": 2', '"gold": null')
    (tmp_path / "documents.jsonl").write_text(documents)
    run = tiny_run(tmp_path, text_data, f"evaluation.tasks=[{task}]", "evaluation.every_steps=2")
    with pytest.raises(UserError, match=r"^task own cannot be scored"):
        train(run)
    assert (run.folder / "checkpoints/step_00000002").is_dir()


def test_several_processes_are_told_to_score_checkpoints_instead(text_data, tmp_path):
    with pytest.raises(UserError, match=r"one process.*score checkpoints by `lfm eval --tasks`"):
        tiny_run(tmp_path, text_data, "evaluation.tasks=[own]", "parallel.zero_stage=1")
