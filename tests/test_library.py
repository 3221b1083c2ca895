"""What `from lfm import ...` gives: published names and calls, initialised by construction, over the models."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lfm
from lfm import (
    LAERC,
    LSTM,
    LAERCConfig,
    LFM3BConfig,
    LFM3BForCausalLM,
    LiquidLM,
    LiquidNet,
    LiquidNetConfig,
    MiniLiquidGPT,
    Transformer,
    UserError,
    load,
)
from lfm.inference.load import open_model
from lfm.inference.sampling import SamplingConfig, generate
from lfm.layers.documents import Documents, Rows
from lfm.models.lfm import LFMConfig
from lfm.models.losses import weighted
from lfm.objectives.next_token import NEXT_TOKEN
from lfm.training.loop import train
from lfm.training.run import RunConfig
from tests.training.tiny_run import ROOT, tiny_run

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4}
SMALL |= {"intermediate_size": 16, "liquid_num_reservoirs": 1, "liquid_reservoir_size": 16}
SMALL |= {"liquid_update_interval": 2, "max_position_embeddings": 64}
FAMILIES = {
    LiquidNet: {"vocab_size": 300, "d_model": 32, "d_ff": 48, "n_layers": 2, "max_seq_len": 64},
    LAERC: {"vocab": 300, "seq": 64, "emb": 32, "layers": 2, "resv_mult": 1, "res_radius": 0.8},
    LiquidLM: {"vocab_size": 300, "hidden_size": 16, "reservoir_size": 32, "num_layers": 1},
    MiniLiquidGPT: {"vocab_size": 300, "embed_dim": 16, "num_fast": 1, "num_deep": 1, "max_seq": 32},
    Transformer: {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2},
    LSTM: {"vocab_size": 300, "hidden_size": 16, "num_layers": 1},
}


def test_importing_the_package_is_light_and_says_what_there_is():
    code = """
import sys, time
start = time.perf_counter()
import lfm
seconds = time.perf_counter() - start
assert not {"torch", "numpy", "pydantic", "yaml"} & set(sys.modules) and seconds < 0.1, seconds
assert {*lfm.__all__, "__version__"} <= set(dir(lfm))
for name in ("LiquidNett", "nonsense"):
    try:
        getattr(lfm, name)
    except AttributeError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    near, none = done.stdout.splitlines()
    assert near == "module 'lfm' has no attribute 'LiquidNett'; did you mean LiquidNet?"
    assert all(name in none for name in lfm.__all__)
    assert all(getattr(lfm, name).__name__ == name for name in lfm.__all__)


def test_lfm_3b_is_the_default_and_its_published_names_are_understood():
    with torch.device("meta"):
        assert LFM3BForCausalLM(LFM3BConfig()).num_parameters() == 3_041_788_416
    flagship = RunConfig.load("lfm_3b").model
    assert LFM3BConfig().model_dump() == flagship.model_dump()
    tiny = LFM3BConfig(  # the published `tiny`
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=2,
        intermediate_size=512,
        liquid_reservoir_size=64,
        liquid_num_reservoirs=1,
        vocab_size=10_000,
        max_position_embeddings=1024,
        head_dim=64,
        use_cache=True,
    )
    assert tiny.model_dump() == RunConfig.load("lfm_tiny").model.model_dump()
    assert (tiny.num_key_value_heads, tiny.liquid_leak_rate, tiny.tie_word_embeddings, tiny.head_dim) == (
        4,
        0.3,
        False,
        64,
    )
    assert (tiny.use_liquid_layers, tiny.medical_mode, LFM3BConfig().num_key_value_heads) == (True, False, 8)
    assert LFM3BConfig(use_liquid_layers=False, liquid_leak_rate=0.2).liquid is None
    assert not LAERCConfig(no_reservoir=True).use_reservoir


def test_a_model_is_initialised_by_construction_from_the_seed_of_torch():
    config = LFM3BConfig(**SMALL)
    first = LFM3BForCausalLM(config).state_dict()
    second = LFM3BForCausalLM(config).state_dict()
    torch.manual_seed(0)  # as the fixture did before the first
    again = LFM3BForCausalLM(**SMALL).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embedding.weight"], second["model.embedding.weight"])
    assert all(tensor.isfinite().all() for tensor in first.values())


def test_the_loss_is_that_of_training_and_has_its_gradients():
    model, ids = LFM3BForCausalLM(**SMALL), torch.randint(0, 300, (2, 20))
    labels = ids.clone()
    labels[0, :7] = -100
    out = model(ids, attention_mask=torch.ones_like(ids), labels=labels)
    documents = Documents.from_lengths([[20], [20]], "cpu", label_mask=labels != -100)
    losses = model.model.losses(Rows(ids, documents), NEXT_TOKEN)
    wanted = weighted((*NEXT_TOKEN.terms, *model.config.terms), losses.sums, documents.counts)
    assert torch.allclose(out.loss, wanted, rtol=1e-6) and out.loss > 5
    found = torch.autograd.grad(out.loss, list(model.parameters()))
    expected = torch.autograd.grad(wanted, list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_states_carry_a_sequence_from_call_to_call():
    ids = torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        model = LFM3BForCausalLM(**SMALL).eval()
        whole, start = model(ids).logits, model(ids[:, :7])
        assert start.loss is None
        rest = model(ids[:, 7:], states=start.states)
        assert torch.allclose(torch.cat([start.logits, rest.logits], 1), whole, atol=1e-5)
        for family, arguments in FAMILIES.items():
            model = family(**arguments).eval()
            assert model.num_parameters() == model.config.count_parameters().total
            (whole, _), (start, states) = model(ids), model(ids[:, :7])
            rest, _ = model(ids[:, 7:].tolist(), states=states)
            assert torch.allclose(torch.cat([start, rest], 1), whole, atol=1e-5), family


def test_generate_gives_prompt_and_continuation():
    model = LFM3BForCausalLM(**SMALL)
    prompt = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
    greedy = model.generate(prompt, max_length=20, do_sample=False, eos_token_id=-1)
    steps = generate(model.model, prompt.tolist(), SamplingConfig(max_new_tokens=15, greedy=True), end_of_document=None)
    assert model.training and torch.equal(greedy, torch.cat([prompt, torch.tensor(list(steps)).T], 1))
    made, other = greedy[:, 5:].tolist()
    end = next(token for token in made if token not in other)
    length = 5 + made.index(end) + 1
    ended = model.generate(prompt, max_new_tokens=15, do_sample=False, eos_token_id=end, pad_token_id=299)
    assert torch.equal(ended[1], greedy[1])
    assert torch.equal(ended[0, :length], greedy[0, :length]) and (ended[0, length:] == 299).all()
    torch.manual_seed(1)
    drawn = [model.generate(prompt, max_length=20, temperature=0.8, do_sample=True, eos_token_id=-1) for _ in range(2)]
    torch.manual_seed(1)
    assert torch.equal(model.generate(prompt, 20, temperature=0.8, eos_token_id=-1), drawn[0])
    assert not torch.equal(*drawn) and drawn[0].shape == (2, 20)
    assert model.generate(prompt, max_length=500, eos_token_id=-1).shape == (2, 64)  # the context is full


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_data) -> Path:
    run = tiny_run(tmp_path_factory.mktemp("library"), text_data, "training.steps=1", "validation.max_rows=1")
    train(run)
    return run.folder


def test_a_run_is_opened_by_the_text_of_its_path_and_continues_texts_and_ids(folder):
    opened = load(str(folder), device="cpu")
    assert isinstance(opened.model, LFM3BForCausalLM) and not opened.model.training
    assert opened.model.eos_token_id == opened.tokenizer.eod_id
    inner, _, checkpoint = open_model(folder, device="cpu")
    assert load(checkpoint).checkpoint == opened.checkpoint == checkpoint
    assert torch.equal(inner.embedding.weight, opened.model.model.embedding.weight)
    one = opened.generate("def f(", max_new_tokens=5, seed=3)
    assert len(one.tokens) == 5 and one.finish_reason == "length"
    ids = opened.tokenizer.encode("def f(")
    assert opened.generate(ids, max_new_tokens=5, seed=3) == opened.generate(
        torch.tensor(ids), max_new_tokens=5, seed=3
    )
    several = opened.generate(["import", "def f("], max_new_tokens=5, seed=2)
    assert several[1] == one == opened.generate(ids, max_new_tokens=5, seed=3)
    assert opened.generate("def f(", max_new_tokens=5, seed=3, stop=[one.text[1:]]).text == one.text[:1]


def small(**more) -> LFM3BForCausalLM:
    return LFM3BForCausalLM(**SMALL, **more)


IDS = [[1, 2, 3]]
BAD = {
    "argument": (
        lambda _: LFM3BConfig(num_hiden_layers=3),
        "has no argument num_hiden_layers .* mean num_hidden_layers",
    ),
    "own_argument": (lambda _: LiquidNetConfig(hiden_size=3), "did you mean hidden_size"),
    "nothing_near": (lambda _: LiquidNetConfig(zzz=3), "has no argument zzz .* it has d_model, d_ff"),
    "value": (lambda _: LiquidNetConfig(n_layers=0), r"num_layers = 0 in LiquidNetConfig\(n_layers=0\) is not legal"),
    "missing": (lambda _: LSTM(hidden_size=3), "num_layers is missing"),
    "not_provided": (lambda _: LFM3BConfig(use_cache=False), "use_cache=False is not provided, .* leave it out"),
    "medical": (lambda _: small(medical_mode=True).generate(IDS), "without a calibrated probability is not given"),
    "threshold": (lambda _: LFM3BConfig(medical_safety_threshold=1.0), r"safety_threshold = 1 .* not legal"),
    "ask": (lambda folder: load(folder).ask("x"), "load the checkpoint with medical_mode=True"),
    "no_head": (lambda folder: load(folder, medical_mode=True).ask("x"), "needs a calibrated head, and there is no"),
    "closed": (lambda folder: load(folder, medical_mode=True).generate("x"), "is not given; train the model"),
    "head_dim": (lambda _: LFM3BConfig(head_dim=64), "head_dim=64 is hidden_size / num_attention_heads = 128"),
    "no_choice": (lambda _: LFM3BConfig(use_liquid_layers=2), "use_liquid_layers=2 is neither True nor False"),
    "too_large": (lambda _: LFM3BForCausalLM(intermediate_size=900_000), r"take [\d,.]+ GiB and this cpu has"),
    "config": (lambda _: LiquidNet(LFM3BConfig(**SMALL)), "takes a LiquidNetConfig, and this is a LFM3BConfig"),
    "both": (lambda _: LiquidNet(LiquidNetConfig(), d_model=3), "a configuration or its arguments, not both"),
    "vocabulary": (lambda _: small()([[1, 300]]), "input_ids hold 300, and the vocabulary has 300 ids, 0 to 299"),
    "negative": (lambda _: small().generate([[-1]]), "input_ids hold -1"),
    "ragged": (lambda _: small()([[1], [1, 2]]), "no rows of ids"),
    "text": (lambda _: small().generate("text"), "no rows of ids"),
    "float": (lambda _: small()([[1.5]]), r"are torch.float32 of shape \[1, 1\]; give integers"),
    "one_row": (lambda _: small()([1, 2]), r"are torch.int64 of shape \[2\]; give integers"),
    "empty": (lambda _: small().generate([[]]), "the prompt is empty"),
    "max_length": (lambda _: small().generate(IDS, max_length=3), "counts the prompt, which has 3 ids; give 4 or more"),
    "lengths": (lambda _: small().generate(IDS, max_length=9, max_new_tokens=3), "exclude each other"),
    "context": (lambda _: small().generate([[1] * 64]), "64 tokens and the context is 64"),
    "min_p": (lambda _: small().generate(IDS, min_p=-0.1), r"min_p = -0.1 in generate\(\)"),
    "penalty": (lambda _: small().generate(IDS, repetition_penalty=0), r"repetition_penalty = 0 in generate\(\)"),
    "mask": (lambda _: small()(IDS, attention_mask=[[0, 1, 1]]), "attention_mask hides some ids"),
    "no_labels": (lambda _: small()(IDS, labels=[[1, -100, -100]]), "hold none to predict"),
    "labels": (lambda _: small()(IDS, labels=[[1, 2, 999]]), "labels hold 999"),
    "states": (lambda _: small()(IDS, states=3), "states=3 are none"),
    "no_checkpoint": (lambda folder: load(folder.parent), "neither a checkpoint nor a run folder"),
    "no_path": (lambda _: load(""), "'' is no path"),
    "device": (lambda folder: load(folder, device="tpu"), "device='tpu' is none of auto, cpu, cuda"),
    "empty_text": (lambda folder: load(folder).generate(""), "a prompt is empty"),
    "no_ids": (lambda folder: load(folder).generate([]), "a prompt is empty"),
    "ids": (lambda folder: load(folder).generate([1, 999]), "hold 999, and the vocabulary has 512"),
    "key": (lambda folder: load(folder).generate("x", max_tokens=3), "unknown key max_tokens .* mean max_new_tokens"),
    "stop": (lambda folder: load(folder).generate("x", stop=[""]), "a stop text is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_sentence(case, folder):
    mistake, words = BAD[case]
    with pytest.raises(UserError, match=words) as found:
        mistake(folder)
    assert "\n" not in str(found.value)


def test_states_of_another_batch_are_refused():
    model = LiquidNet(**FAMILIES[LiquidNet])
    _, states = model([[1], [2]])
    with pytest.raises(lfm.UserError, match=r"of another model or batch: hidden.0 is \[2, 32\]"):
        model([[1]], states=states)
    assert isinstance(LFM3BConfig(**SMALL), LFMConfig)


@pytest.mark.parametrize("make", [lambda x: x.float() + 0.9, lambda x: x > 1, lambda x: "abc", lambda x: [[1], [1, 2]]])
def test_labels_that_are_no_ids_are_refused(make):
    model = LFM3BForCausalLM(LFM3BConfig(**SMALL))
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(lfm.UserError, match="labels are"):
        model(ids, labels=make(ids))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"max_length": "5"}, "max_length='5' is no whole number"),
        ({"max_length": 5.5}, "max_length=5.5 is no whole number"),
        ({"pad_token_id": 2**70}, "pad_token_id=11805916207174113034"),
        ({"pad_token_id": 1.5}, "pad_token_id=1.5 is no whole number"),
        ({"eos_token_id": "a"}, "eos_token_id='a' is no whole number"),
        ({"do_sample": "no"}, "do_sample='no' is neither True nor False"),
    ],
)
def test_arguments_of_generate_of_other_kinds_are_refused(arguments, words):
    with pytest.raises(lfm.UserError, match=re.escape(words)):
        LFM3BForCausalLM(LFM3BConfig(**SMALL)).generate([[1, 2]], **arguments)


def test_a_path_that_is_none_is_refused():
    with pytest.raises(lfm.UserError, match="3 is no path; give a run or checkpoint folder"):
        lfm.load(3)  # pyright: ignore[reportArgumentType]
