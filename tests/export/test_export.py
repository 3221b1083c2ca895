"""`lfm export` and `lfm import`: what transformers makes of the folder, and that weights come back bit for bit."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer

from lfm.checkpoint.folder import find
from lfm.commands import export, import_weights
from lfm.data.tokenizer import Tokenizer, train_bpe
from lfm.errors import UserError
from lfm.export import card, formats, huggingface
from lfm.export.incoming import write_run
from lfm.export.source import Source
from lfm.files import listed
from lfm.inference.load import load_model
from lfm.inference.sampling import SamplingConfig, generate
from lfm.training.loop import train
from tests.export.checkpoints import ATTENTION, TREES, VARIANTS, checkpoint_of
from tests.training.tiny_run import checkpoint_tensors, losses, tiny_run

TEXTS = ["to be, or not to be: that is the question. " * 3, "def f(x):\n    return x + 1\n", "<|endoftext|> is a name"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS * 5, 512, allow_smaller=True)


@pytest.fixture(scope="module")
def runs(tokenizer, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: checkpoint_of(tree, tokenizer, folder / name) for name, tree in (TREES | VARIANTS).items()}


@pytest.fixture
def lfm(monkeypatch, capsys):
    """`lfm export ...` or `lfm import ...` here: exit code, and what it printed or complained of."""

    def run(word: str, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"lfm {word}", *map(str, arguments)])
        try:
            {"export": export, "import": import_weights}[word].main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.err if code else said.out

    return run


def exported(run: Path, out: Path, dtype: torch.dtype = torch.float32, **settings) -> Path:
    out.mkdir()
    huggingface.write(Source(run), out, formats.Settings(dtype, **settings))
    return out


def loaded(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def same_weights(run: Path, back: Path) -> None:
    ours, theirs = (checkpoint_tensors(find(folder))[0] for folder in (run, back))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", TREES | VARIANTS)
def test_a_folder_is_loaded_by_transformers_and_comes_back_bit_for_bit(name, runs, lfm, tmp_path):
    code, said = lfm("export", "--checkpoint", runs[name], "--out", tmp_path / "hf")
    assert code == 0 and "logits differ from the checkpoint's by at most" in said, said
    ours = load_model(runs[name], device=torch.device("cpu"), dtype=torch.float32)[0]
    theirs = loaded(tmp_path / "hf")
    assert theirs.dtype == torch.float32 and "transformers_modules" in type(theirs).__module__
    ids = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)[0]).abs().max() < 1e-5
    steps = generate(ours, [[1, 2, 3]], SamplingConfig(greedy=True, max_new_tokens=32), end_of_document=None)
    want = [token for (token,) in steps]
    found = theirs.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=32, do_sample=False, eos_token_id=None)
    assert found[0, 3:].tolist() == want

    code, said = lfm("import", tmp_path / "hf", "--out", tmp_path / "back")
    assert code == 0 and "/back/checkpoints/step_00000007 has the" in said, said
    same_weights(runs[name], tmp_path / "back")
    manifest = json.loads((find(tmp_path / "back") / "manifest.json").read_text())
    assert (manifest["step"], manifest["progress"]["tokens"], manifest["config"]["name"]) == (7, 7000, "back")
    assert load_model(tmp_path / "back", device=torch.device("cpu"), dtype=torch.float32)[0].config == ours.config

    # As transformers itself writes it, after fine-tuning say.
    theirs.save_pretrained(tmp_path / "again")
    shutil.copy(tmp_path / "hf/tokenizer.json", tmp_path / "again")
    write_run(formats.read(tmp_path / "again"), tmp_path / "from_again", name="again")
    same_weights(runs[name], tmp_path / "from_again")


@pytest.mark.parametrize("name", ["lfm", "lfm_trained_reservoir", "liquidnet", "liquidlm"])
def test_half_precision_keeps_what_must_be_exact(name, runs, tmp_path):
    theirs = loaded(exported(runs[name], tmp_path / "hf", torch.bfloat16), dtype="auto")
    ours = Source(runs[name])
    wide = {name: tensor.dtype for name, tensor in ours.read(dict(theirs.state_dict()), torch.bfloat16).items()}
    assert theirs.dtype == torch.bfloat16
    assert {name: tensor.dtype for name, tensor in theirs.state_dict().items()} == wide
    assert torch.float32 in wide.values() and torch.bfloat16 in wide.values()
    ids = torch.randint(0, 512, (2, 30))
    with torch.no_grad():
        want, found = ours.model(torch.float32)(ids)[0], theirs(ids).logits
    assert (found.float() - want).norm() < 0.05 * want.norm()
    made = theirs.generate(ids[:, :5], max_new_tokens=4, do_sample=False)
    assert made.shape == (2, 9)


def test_large_models_are_cut_into_shards_that_are_read_again(runs, tmp_path):
    folder = exported(runs["lfm"], tmp_path / "hf")
    want = loaded(folder).state_dict()
    (folder / "model.safetensors").unlink()
    huggingface.write_weights(Source(runs["lfm"]), folder, torch.float32, shard_size="100KB")
    assert len(list(folder.glob("model-0*-of-0*.safetensors"))) > 2
    assert all(torch.equal(tensor, want[name]) for name, tensor in loaded(folder).state_dict().items())
    write_run(formats.read(folder), tmp_path / "back", name="back")
    same_weights(runs["lfm"], tmp_path / "back")


def test_one_file_holds_all_that_an_import_needs(runs, lfm, tmp_path):
    file = tmp_path / "model.safetensors"
    code, said = lfm("export", "--checkpoint", runs["lfm"], "--format", "safetensors", "--out", file)
    assert code == 0 and "tensors have the checkpoint's values" in said, said
    assert lfm("import", file, "--out", tmp_path / "back")[0] == 0
    same_weights(runs["lfm"], tmp_path / "back")
    for name in ("manifest.json", "tokenizer.json"):
        assert (find(tmp_path / "back") / name).exists()
    own = find(runs["lfm"]) / "tokenizer.json"
    assert (find(tmp_path / "back") / "tokenizer.json").read_bytes() == own.read_bytes()


def test_the_tokenizer_gives_the_ids_of_training_and_pads_on_the_left(runs, tokenizer, tmp_path):
    theirs = AutoTokenizer.from_pretrained(exported(runs["lfm"], tmp_path / "hf"), trust_remote_code=True)
    for text in [*TEXTS, "", "  caf\u00e9 \U0001f600"]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eod_id, tokenizer.eod_id)
    batch = theirs(["to be", "to be, or not to be"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][:, -1].all()
    assert theirs.model_max_length == 320


def test_the_card_says_what_the_records_say(runs, tmp_path):
    text = (exported(runs["lfm"], tmp_path / "hf") / "README.md").read_text()
    for words in ("data: `stories`", "7 steps, 7,000 tokens", "5.2500", "5.5000", "320 tokens", "None is stated."):
        assert words in text
    assert "/somewhere" not in text and "license:" not in text
    licensed = exported(runs["lstm"], tmp_path / "licensed", licence="apache-2.0") / "README.md"
    assert 'license: "apache-2.0"' in licensed.read_text()
    sampling = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert sampling["temperature"] == 0.8 and sampling["top_k"] == 40 and sampling["do_sample"]


ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lfm", "data_pipeline", "launch", "jaxtyping", "pydantic_core"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(["to be", "def f(x):", "to be, or not"], padding=True, return_tensors="pt")
    made = model.generate(**batch, max_new_tokens=5, do_sample=False, eos_token_id=None)
    for text, row in zip(["to be", "def f(x):", "to be, or not"], made):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False,
                               eos_token_id=None)
        assert alone[0, -5:].tolist() == row[-5:].tolist()
print("done")
"""


def test_torch_and_transformers_alone_load_and_generate(runs, tmp_path):
    folders = [str(exported(runs["lfm"], tmp_path / "hf"))]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, *folders]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr


def test_whatever_fails_nothing_is_left_and_nothing_is_written_over(runs, lfm, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    run = runs["lstm"]
    before = listed(tmp_path)
    for words, sentence in {
        (
            "export",
            "--checkpoint",
            run,
            "--out",
            tmp_path / "full",
        ): "full holds something else and is not written over",
        (
            *("export", "--checkpoint", run, "--format", "safetensors"),
            *("--out", tmp_path / "file"),
        ): "file exists and is not written over",
        ("export", "--checkpoint", tmp_path / "none", "--out", tmp_path / "a"): "is neither a checkpoint nor a run",
        (
            *("export", "--checkpoint", run, "--format", "safetensors", "--out", tmp_path / "a"),
            *("--push-to-hub", "a/b"),
        ): "--push-to-hub is for --format hf",
        ("export", "--checkpoint", run, "--out", tmp_path / "a", "--push-to-hub", "a b"): "write USER/NAME",
        ("import", tmp_path / "none", "--out", tmp_path / "a"): "does not exist; give a folder or file",
        ("import", tmp_path / "full", "--out", tmp_path / "a"): "config.json does not exist",
        ("import", tmp_path / "file", "--out", tmp_path / "a"): "is no safetensors file",
        ("import", tmp_path / "file", "--out", tmp_path / "full"): "holds something else",
        ("import", tmp_path / "file", "--out", tmp_path / "a b"): "a run's name is of letters",
        ("import", "hf://one", "--out", tmp_path / "a"): "write hf://USER/NAME",
        ("import", run, "--out", tmp_path / "a"): "is a run or checkpoint already; give it to --checkpoint",
        ("import", find(run), "--out", tmp_path / "a"): "is a run or checkpoint already; give it to --checkpoint",
        ("export", "--checkpoint", run, "--out", tmp_path / "a", "--private"): "--private is of --push-to-hub, which",
        ("export", "--checkpoint", run, "--out", find(run) / "hf"): "is in the checkpoint itself, and would go with it",
        ("export", "--checkpoint", run, "--out", tmp_path / "a", "--licence", "a\n---"): "give one line, such as",
        (
            *("export", "--checkpoint", run, "--format", "onnx", "--dtype", "bf16"),
            *("--out", tmp_path / "new/folders/a"),
        ): "is float32 alone, not bfloat16",
    }.items():
        code, said = lfm(*words)
        assert code == 2 and sentence in said and said.count("\n") == 1, said
    monkeypatch.setattr(huggingface, "compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    code, said = lfm("export", "--checkpoint", run, "--out", tmp_path / "a")
    assert code == 130
    assert listed(tmp_path) == before and (tmp_path / "full/letter.txt").read_text() == "mine"


@pytest.mark.parametrize("format", ["hf", "safetensors"])
def test_a_full_disk_is_one_sentence(format, runs, lfm, tmp_path):
    # As a disk does that is full after 20 kB; Python ignores the signal that comes first.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        code, said = lfm("export", "--checkpoint", runs["lstm"], "--format", format, "--out", tmp_path / "a/out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and said.count("\n") == 1, said
    assert str(tmp_path / "a") in said and "make room there, or give another --out" in said
    assert listed(tmp_path) == []


@pytest.mark.parametrize(
    "path, shown",
    [
        ("/home/me/stories", "stories"),
        ("s3://key:secret@bucket/a/stories?token=secret#secret", "stories"),
        ("s3://key:secret@bucket", ""),
        ("a/b\n---\nc", "b\\x0a---\\x0ac"),
    ],
)
def test_a_card_names_data_by_the_last_part_of_their_path_alone(path, shown):
    assert card.named(path) == shown


def changed(folder: Path, file: str, change) -> None:
    tree = json.loads((folder / file).read_text())
    change(tree)
    (folder / file).write_text(json.dumps(tree))


def test_weights_that_do_not_fit_are_one_sentence(runs, lfm, tmp_path):
    whole = exported(runs["lstm"], tmp_path / "whole")

    def refused(sentence: str, name: str, *flags: object) -> None:
        code, said = lfm("import", tmp_path / name, "--out", tmp_path / "back", *flags)
        assert code in (2, 3) and sentence in said and said.count("\n") == 1, said
        assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".back*"))

    def copy(name: str) -> Path:
        return shutil.copytree(whole, tmp_path / name)

    changed(copy("deeper"), "config.json", lambda tree: tree.update(num_layers=3))
    refused("lacks the tensor lstm.bias_hh_l2 (and 3 more)", "deeper")
    changed(copy("shallower"), "config.json", lambda tree: tree.update(num_layers=1))
    refused("has a tensor lstm.bias_hh_l1 (and 3 more)", "shallower")
    changed(copy("wider"), "config.json", lambda tree: tree.update(hidden_size=48))
    refused("has shape", "wider")
    changed(copy("foreign"), "config.json", lambda tree: tree.update(model_type="llama"))
    refused("model_type 'llama'; lfm imports what", "foreign")
    changed(copy("unknown"), "config.json", lambda tree: tree.update(model_type="lfm_training_gru"))
    refused("is of kind 'gru', which is no family", "unknown")
    changed(copy("nonsense"), "config.json", lambda tree: tree.update(num_layers=-1))
    refused("num_layers", "nonsense")
    (copy("broken") / "config.json").write_text("{")
    refused("is no JSON object", "broken")
    (copy("no_weights") / "model.safetensors").unlink()
    refused("has no model.safetensors", "no_weights")
    (copy("outside") / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../whole/model.safetensors"}}')
    refused("is no index of files in its folder", "outside")
    for number, shards in enumerate([{"a": {"b": 1}}, {"a": [1]}, {"a": None}, ["a"]]):
        (copy(f"index_{number}") / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        refused("is no index of files in its folder", f"index_{number}")
    shutil.copyfile(whole / "model.safetensors", copy("twice") / "other.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}
    (tmp_path / "twice/model.safetensors.index.json").write_text(json.dumps(index))
    refused("twice, in model.safetensors and other.safetensors", "twice")
    os.mkfifo(copy("unreadable") / "tokenizer")
    os.replace(tmp_path / "unreadable/tokenizer", tmp_path / "unreadable/config.json")
    refused("config.json is not a regular file", "unreadable")
    # Such a model would take minutes and all memory to be laid out.
    many = {"num_layers": 1000, "vocab_size_multiple": 256, "attention": ATTENTION}
    many |= {
        "ffn": {"kind": "moe", "num_moe_experts": 1 << 20, "moe_ffn_hidden_size": 32},
        "model_type": "lfm_training_lfm",
    }
    changed(copy("many"), "config.json", lambda tree: tree.update(many))
    refused("has 10 tensors, too few for the 1,000 layers of 1,048,576 experts", "many")
    changed(copy("vast"), "config.json", lambda tree: tree.update(hidden_size=1 << 20))
    refused("GiB and this machine has", "vast")
    (copy("graphs") / "prefill.onnx").touch()
    refused("is of --format onnx, whose graphs have no weights by name", "graphs")
    (copy("no_tokenizer") / "tokenizer.json").unlink()
    refused("has no tokenizer.json; give one with --tokenizer FILE", "no_tokenizer")
    large = tmp_path / "large.json"
    train_bpe([*TEXTS, Path(__file__).read_text(encoding="utf-8")], 700, allow_smaller=True).save(large)
    refused("and the model 512; give the model's own", "no_tokenizer", "--tokenizer", large)
    own = find(runs["lstm"]) / "tokenizer.json"
    assert lfm("import", tmp_path / "no_tokenizer", "--out", tmp_path / "given", "--tokenizer", own)[0] == 0

    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(whole / "model.safetensors", "pt") as opened:
        weights = {name: opened.get_tensor(name) for name in opened.keys()}
    for number, kind in enumerate([[], {}, None, 1]):
        metadata = {"lfm.model": json.dumps({"kind": kind}), "lfm.tokenizer": own.read_text()}
        save_file(weights, tmp_path / f"kind_{number}", metadata=metadata)
        refused(f"is of kind {kind!r}, which is no family", f"kind_{number}")
    tensors = load_file(whole / "model.safetensors")
    tensors["final_norm.weight"][3] = torch.nan
    save_file(tensors, copy("nan") / "model.safetensors", metadata={"format": "pt"})
    refused("final_norm.weight is not finite", "nan")
    tensors["final_norm.weight"] = torch.ones(32, dtype=torch.int32)
    save_file(tensors, copy("whole_numbers") / "model.safetensors", metadata={"format": "pt"})
    refused("final_norm.weight of", "whole_numbers")


def test_training_starts_from_imported_weights_and_does_not_take_them_for_a_state(text_data, lfm, tmp_path):
    train(tiny_run(tmp_path, text_data, "training.steps=2", "name=first"))
    assert lfm("export", "--checkpoint", tmp_path / "first", "--out", tmp_path / "hf", "--no-compare")[0] == 0
    assert lfm("import", tmp_path / "hf", "--out", tmp_path / "back")[0] == 0
    short = ("training.steps=1", "validation.max_rows=2")
    train(tiny_run(tmp_path, text_data, *short, "name=second", f"checkpoint.init_from={tmp_path / 'back'}"))
    train(tiny_run(tmp_path, text_data, *short, "name=third", f"checkpoint.init_from={tmp_path / 'first'}"))
    assert losses(tmp_path / "second") == losses(tmp_path / "third")
    with pytest.raises(UserError, match=r"was imported and has weights alone.*checkpoint\.init_from="):
        train(tiny_run(tmp_path, text_data, "training.steps=3", f"checkpoint.resume={tmp_path / 'back'}"))
