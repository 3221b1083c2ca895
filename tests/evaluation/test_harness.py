"""Tasks of lm-evaluation-harness on our models."""

import json
import random

import numpy as np
import pytest
import torch

from lfm.data.tokenizer import train_bpe
from lfm.errors import UserError
from lfm.evaluation.tasks import open_tasks
from lfm.inference.sampling import SamplingConfig
from lfm.inference.text import continuations
from lfm.models.liquidnet import LiquidNet, LiquidNetConfig
from lfm.models.transformer import Transformer, TransformerConfig

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'lfm-training[lm-eval]'")

from lm_eval.api.instance import Instance

from lfm.evaluation.harness import HarnessModel

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
TEXT = " ".join(WORDS * 12) + ". "
TOLERANCE = 1e-4
"""Of a log-likelihood in fp32, tens of nats."""


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], 290, allow_smaller=True)


@pytest.fixture(params=["recurrent", "attention"])
def model(request):
    torch.manual_seed(0)
    if request.param == "recurrent":
        return LiquidNet(LiquidNetConfig(hidden_size=16, num_layers=2, vocab_size=290, seq_length=16)).eval()
    tree = {"hidden_size": 16, "num_layers": 2, "vocab_size": 290, "seq_length": 128}
    tree |= {"attention": {"num_attention_heads": 2, "num_query_groups": 1}, "ffn": {"ffn_hidden_size": 32}}
    return Transformer(TransformerConfig.from_tree(tree, source="a test")).eval()


def requests(kind, *arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def likelihood(model, ids, first):
    """ln of the probability of `ids[first:]`, and whether they are what greedy decoding gives."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0][0].float().log_softmax(-1)
    wanted = torch.tensor(ids[first:])
    of = logits[first - 1 : -1]
    return float(of.gather(-1, wanted[:, None]).sum()), bool((of.argmax(-1) == wanted).all())


PAIRS = [
    ("alpha beta", " gamma"),
    ("alpha beta", " delta epsilon zeta"),
    ("", "theta"),
    ("alpha beta gamma delta epsilon zeta eta", " theta"),
    ("eta ", "zeta"),
    ("alpha beta", " eta"),
]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_likelihoods_are_those_of_each_pair_alone(model, tokenizer, batch_size):
    found = HarnessModel(model, tokenizer, batch_size=batch_size).loglikelihood(requests("loglikelihood", *PAIRS))
    for (context, continuation), (likely, is_greedy) in zip(PAIRS, found, strict=True):
        whole = tokenizer.encode(context + continuation)
        first = len(tokenizer.encode(context.rstrip()))
        ids = whole if context else [tokenizer.eod_id, *whole]
        wanted = likelihood(model, ids, first if context else 1)
        assert likely == pytest.approx(wanted[0], abs=TOLERANCE) and is_greedy == wanted[1]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_rolling_likelihood_is_of_every_token(model, tokenizer, batch_size):
    texts = [TEXT[:300], "alpha", TEXT[300:800], ""]
    found = HarnessModel(model, tokenizer, batch_size=batch_size).loglikelihood_rolling(
        requests("loglikelihood_rolling", *((text,) for text in texts))
    )
    limit = model.config.context_limit
    for text, likely in zip(texts, found, strict=True):
        ids = [tokenizer.eod_id, *tokenizer.encode(text)]
        if limit is None or len(ids) <= limit + 1:
            wanted = likelihood(model, ids, 1)[0] if len(ids) > 1 else 0.0
            assert likely == pytest.approx(wanted, abs=TOLERANCE)
        else:
            # The last window goes back as far as the context does.
            head, tail = likelihood(model, ids[: limit + 1], 1)[0], likelihood(model, ids[-limit - 1 :], 1)[0]
            assert head + tail < likely < head


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_generated_is_what_a_prompt_alone_is_continued_with(model, tokenizer, batch_size):
    kwargs = {"until": [" al", "\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = ["alpha beta", "eta", TEXT[:90], "zeta eta theta"]
    found = HarnessModel(model, tokenizer, batch_size=batch_size).generate_until(
        requests("generate_until", *((prompt, kwargs) for prompt in prompts))
    )
    sampling = SamplingConfig(max_new_tokens=12, greedy=True, stop=(" al", "\n"))
    for prompt, text in zip(prompts, found, strict=True):
        *_, (alone,) = continuations(model, tokenizer, [tokenizer.encode(prompt)], sampling)
        assert text == alone.text


def test_what_is_longer_than_the_context_loses_its_beginning(model, tokenizer):
    context = TEXT * 2
    ids = tokenizer.encode(context + "alpha")
    number = len(tokenizer.encode(context.rstrip()))
    ((likely, _),) = HarnessModel(model, tokenizer, batch_size=1).loglikelihood(
        requests("loglikelihood", (context, "alpha"))
    )
    limit = model.config.context_limit
    assert limit is None or len(ids) > limit + 1
    cut = ids if limit is None else ids[-limit - 1 :]
    assert likely == pytest.approx(likelihood(model, cut, number - len(ids))[0], abs=TOLERANCE)


@pytest.mark.parametrize(
    "task, document, words",
    [
        ("own_choices", {"choices": []}, "not enough values"),
        ("own_choices", {"gold": None}, "TypeError"),
        ("own_choices", {"choices": [1, 2]}, "cannot be scored"),
        ("own_made", {"generation_kwargs": {"until": 7}}, "have until = 7, no text or list of texts"),
        ("own_made", {"generation_kwargs": {"max_gen_toks": -1}}, "input should be greater than 0"),
        ("own_choices", {"metric_list": [{"metric": "acc", "aggregation": "none_such"}]}, "cannot be scored"),
    ],
)
def test_a_document_or_setting_that_breaks_the_harness_is_one_sentence(
    task, document, words, tokenizer, tasks_folder, tmp_path
):
    """Found while scoring, when models are loaded, and in a run, steps made."""
    tree = json.loads((tasks_folder / f"{task}.yaml").read_text())
    documents = [json.loads(line) for line in (tasks_folder / "documents.jsonl").read_text().splitlines()[:3]]
    tree |= {key: value for key, value in document.items() if key not in documents[0]}
    documents[1] |= {key: value for key, value in document.items() if key in documents[0]}
    tree["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "documents.jsonl")
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "task.yaml").write_text(json.dumps(tree))
    model = LiquidNet(LiquidNetConfig(hidden_size=16, num_layers=1, vocab_size=290)).eval()
    tasks = open_tasks([str(tmp_path / "task.yaml")])
    with pytest.raises(UserError, match=f"^task {task}.*{words}") as refused:
        tasks.evaluate(model, tokenizer, batch_size=8)
    assert "\n" not in str(refused.value)


def test_an_error_of_the_model_is_not_taken_for_the_tasks(tokenizer, tasks_folder):
    model = LiquidNet(LiquidNetConfig(hidden_size=16, num_layers=1, vocab_size=8)).eval()  # ids lie beyond
    with pytest.raises(IndexError):
        open_tasks([str(tasks_folder / "own_choices.yaml")]).evaluate(model, tokenizer, batch_size=8)


def test_a_generation_key_that_is_unknown_or_too_long_is_refused(model, tokenizer):
    adapter = HarnessModel(model, tokenizer, batch_size=1)
    with pytest.raises(UserError, match="hold num_beams, unknown here"):
        adapter.generate_until(requests("generate_until", ("alpha", {"num_beams": 3})))
    if model.config.context_limit is not None:
        with pytest.raises(UserError, match="generates 128 tokens and the model's context is 128"):
            adapter.generate_until(requests("generate_until", ("alpha", {"max_gen_toks": 128})))


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory):
    """Two tasks in YAML, one of choices and one of text to be generated, and their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    draws = random.Random(0)
    documents = [
        {"context": " ".join(draws.choices(WORDS, k=draws.randint(1, 9))), "choices": WORDS[:4], "gold": n % 4}
        for n in range(30)
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{context}}",
    }
    choices = {"task": "own_choices", "output_type": "multiple_choice", "doc_to_choice": "choices"}
    choices |= {"doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    made = {"task": "own_made", "output_type": "generate_until", "doc_to_target": "{{choices[gold]}}"}
    made |= {"generation_kwargs": {"until": [" "], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}]}
    group = {"group": "own_group", "task": ["own_choices"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "own_group.yaml").write_text(json.dumps(group))
    for task in (choices, made):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task))
    return folder


def test_tasks_of_a_folder_give_the_same_at_every_batch_size(model, tokenizer, tasks_folder):
    tasks = open_tasks([str(tasks_folder)])
    found = {size: tasks.evaluate(model, tokenizer, batch_size=size) for size in (1, 8)}
    assert found[1].keys() == {"own_choices", "own_made"}
    for name, one in found[1].items():
        other = found[8][name]
        assert one.metrics == other.metrics and one.num_documents == other.num_documents == 30
        for metric, values in one.by_document.items():
            assert np.array_equal(values, other.by_document[metric]) and values.mean() == one.metrics[metric]
    assert found[1]["own_choices"].standard_error("acc") > 0
    again = tasks.evaluate(model, tokenizer, batch_size=8, limit=5)
    assert again["own_choices"].num_documents == 5
    assert np.array_equal(again["own_choices"].by_document["acc"], found[8]["own_choices"].by_document["acc"][:5])


def test_a_group_is_its_tasks_and_their_mean(tokenizer, tasks_folder):
    model = LiquidNet(LiquidNetConfig(hidden_size=16, num_layers=1, vocab_size=290)).eval()
    found = open_tasks(["own_group"], [tasks_folder]).evaluate(model, tokenizer, batch_size=8)
    assert found.keys() == {"own_group", "own_choices"}
    assert found["own_group"].metrics["acc"] == found["own_choices"].metrics["acc"]
    assert found["own_group"].standard_error("acc") is None


def test_worked_examples_stand_before_each_question(tokenizer, tasks_folder, monkeypatch):
    model = LiquidNet(LiquidNetConfig(hidden_size=16, num_layers=1, vocab_size=290)).eval()
    tasks, contexts = open_tasks(["own_choices"], [tasks_folder]), []
    scored = HarnessModel.loglikelihood

    def seen(self, requests, disable_tqdm=True):
        contexts.append([request.args[0] for request in requests])
        return scored(self, requests, disable_tqdm)

    monkeypatch.setattr(HarnessModel, "loglikelihood", seen)
    for shots in (None, 2, 2):
        tasks.evaluate(model, tokenizer, batch_size=8, limit=3, num_fewshot=shots)
    plain, first, again = contexts
    assert first == again and all(few.endswith(alone) and few != alone for few, alone in zip(first, plain, strict=True))
    assert first[0].count("\n\n") == 2


def test_no_random_numbers_of_the_process_are_drawn(tokenizer, tasks_folder):
    model = LiquidNet(LiquidNetConfig(hidden_size=16, num_layers=1, vocab_size=290)).eval()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    tasks = open_tasks(["own_choices"], [tasks_folder])
    tasks.evaluate(model, tokenizer, batch_size=8, limit=3)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize(
    "wanted, words",
    [
        # Half a minute, for the harness's own fifteen thousand names.
        pytest.param("own_choises", "own_choises is no task .*did you mean own_choices", marks=pytest.mark.slow),
        ("none.yaml", "none.yaml is no file"),
        ("EMPTY", "holds no YAML file of a task"),
        ("BROKEN", "cannot be loaded .*correct the YAML or its data"),
        ("NONE", r"cannot be loaded \(it has no documents\); correct the YAML or its data"),
        ("UNSAFE", "task own_choices runs code or shows pictures"),
        ("stdlib_lines", "its data are made by `python -m data_pipeline.make_tasks`"),
    ],
)
def test_a_task_that_is_none_is_one_sentence(wanted, words, tasks_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if wanted == "EMPTY":
        wanted = str(tmp_path)
    if wanted == "BROKEN":
        wanted = str(tmp_path / "broken.yaml")
        (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\noutput_type: none_such\n")
    if wanted == "NONE":
        wanted = str(tmp_path / "none.yaml")
        (tmp_path / "none.jsonl").touch()
        tree = json.loads((tasks_folder / "own_choices.yaml").read_text())
        (tmp_path / "none.yaml").write_text(
            json.dumps({**tree, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "none.jsonl")}}})
        )
    if wanted == "UNSAFE":
        wanted = str(tmp_path / "unsafe.yaml")
        tree = json.loads((tasks_folder / "own_choices.yaml").read_text())
        (tmp_path / "unsafe.yaml").write_text(json.dumps({**tree, "unsafe_code": True}))
    with pytest.raises(UserError, match=words) as refused:
        open_tasks([wanted], [tasks_folder])
    assert "\n" not in str(refused.value)
