"""The commands as a user starts them."""

import importlib
import json
import os
import re
import resource
import subprocess
import sys

import pytest

from data_pipeline.prepare import prepare
from lfm.checkpoint.folder import find
from lfm.inference.load import open_model
from lfm.inference.sampling import SamplingConfig, generate
from lfm.training.loop import train
from tests import shared_memory
from tests.data.corpus import config, write_texts
from tests.data.tokenizer_kinds import KINDS, TEXTS
from tests.training.tiny_run import PYTHON, ROOT, pretrain_command, tiny_run


@pytest.fixture
def main(monkeypatch, capsys):
    """Run a command's `main` in this process, with its real command line; gives exit code and stderr."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(part) for part in (script, *arguments)])
        code = 0
        try:
            importlib.import_module(f"launch.{script}").main()
        except SystemExit as end:
            code = end.code
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    return call


def run(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_data):
    config = tiny_run(tmp_path_factory.mktemp("trained"), text_data, "training.steps=2")
    train(config)
    return config.folder


def assert_refused(process, words):
    """One sentence on stderr, exit code 2, no traceback."""
    assert process.returncode == 2, process.stderr
    lines = [line for line in process.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    assert re.search(words, lines[0]), lines[0]


def test_dry_run_of_the_flagship_prints_exact_figures_in_little_memory():
    limit = 4 * 10**9

    def cap():
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [PYTHON, "launch/pretrain.py", "--config", "configs/lfm_3b.yaml", "--dry-run"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, preexec_fn=cap, timeout=60)
    assert found.returncode == 0, found.stderr
    for figure in ("total 3,041,788,416", "trainable 3,037,856,256", "active 1,763,836,416", "11.25 GFLOP per token"):
        assert figure in found.stdout
    assert "world 1, local engine" in found.stdout


def test_dry_run_plans_for_more_processes_than_it_has(main):
    layout = ["parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.pipeline=2", "parallel.zero_stage=1"]
    # Stages by FLOPs, whatever GPU is here.
    layout += ["training.device=cpu"]
    command = ["pretrain", "--config", ROOT / "configs/lfm_3b.yaml", "--dry-run", "--world-size", 8, *layout]
    found = main(*command)
    assert found.returncode == 0, found.stderr
    assert "layout TP2+SP x PP2 x DP2 Z1: world 8 = tensor 2 x pipeline 2 x data 2" in found.stdout
    assert "stages 13 | 7 + head, balance 0.97 by FLOPs" in found.stdout
    assert "memory of one process of the fullest stage" in found.stdout
    assert_refused(
        main(*command, "parallel.tensor=3"), r"tensor=3 does not divide .* nearest legal layout is parallel\."
    )
    assert_refused(main(*[part for part in command if part != "--dry-run"]), r"--world-size 8 .* --dry-run")
    assert_refused(main(*command, "--world-size", 0), r"--world-size 0 .* 1 or more")


BAD_RUNS = {
    "unknown_key": (["model.hiden_size=3"], r"unknown key model\.hiden_size .* did you mean model\.hidden_size\?"),
    "wrong_type": (["training.steps=many"], r"training\.steps = 'many'"),
    "out_of_range": (["optimizer.lr=-1"], r"optimizer\.lr = -1 .* greater than 0"),
    "micro_batch": (["training.micro_batch_size=3"], "micro_batch_size=3 does not divide global_batch_size=4"),
    "tensor_parallel": (
        ["parallel.tensor=3"],
        r"parallel\.tensor=3 does not divide .* nearest legal layout is parallel\.tensor=1",
    ),
    "expert_parallel": (["parallel.expert=3"], r"parallel\.expert=3 does not divide ffn.num_moe_experts=4"),
    "stage_layers": (["parallel.pipeline=2", "parallel.stage_layers=[1,2]"], r"stage_layers=\[1, 2\] must be 2"),
    "world": (["parallel.pipeline=2"], r"does not fit on 1 process"),
    "offload": (["parallel.offload_optimizer=true"], r"offload_optimizer=true does not go with parallel\.zero_stage=0"),
    "missing_data": (["data.path=/no/such/folder"], r"data\.path=/no/such/folder does not exist; make it with"),
    "vocabulary": (["model.vocab_size=256"], r"512.*256|256.*512"),
    "larger_vocabulary": (["model.vocab_size=1024"], r"512.*1024|1024.*512"),
    "row_length": (["model.seq_length=32"], "seq_length=64"),
    "cuda": (["training.device=cuda"], "no GPU is visible"),
    "bad_name": (["name=a/b"], "name = 'a/b'"),
    "output_is_a_file": (["output=README.md"], "run folder README.md/lfm_debug cannot be written"),
    "betas": (["optimizer.betas=[0.9,1.5]"], "optimizer.betas.1 = 1.5"),
    "empty_sample": (['samples.prompts=[""]'], "samples.prompts: a prompt is empty"),
    "long_sample": ([f"samples.prompts=['{'x ' * 200}']"], "the context is 64"),
    "resume": (["checkpoint.resume=no"], "checkpoint.resume=no: .* nor a run folder .*; or set it to auto or never"),
    "init_from": (["checkpoint.init_from=/no/run"], "neither a checkpoint nor a run folder"),
    "heartbeat": (
        ["parallel.heartbeat_timeout_seconds=0.5"],
        r"heartbeat_timeout_seconds=0\.5 is below 5: a healthy rank gives a sign of life once a second",
    ),
    "hang": (["parallel.hang_timeout_seconds=0.1"], r"hang_timeout_seconds=0\.1 is below 10: .* phases take seconds"),
    "rendezvous": (["parallel.rendezvous_timeout_seconds=1"], r"rendezvous_timeout_seconds=1 is below 10: the ranks"),
    "endless": (["parallel.hang_timeout_seconds=1e30"], r"hang_timeout_seconds = '?1e\+?30'? .* less than or equal to"),
    "post_scaling": (
        ["model.liquid.norm=post", "model.liquid.input_scaling=2"],
        "input_scaling=2.0 needs norm: pre",
    ),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_bad_run_is_refused_in_one_sentence(case, tmp_path, text_data, main):
    overrides, words = BAD_RUNS[case]
    if case == "cuda" and __import__("torch").cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert_refused(main("pretrain", *pretrain_command(tmp_path, text_data, *overrides)[2:]), words)
    assert not list(tmp_path.rglob("step_*"))


@pytest.mark.parametrize("steps", [0, -1, 10**9])
def test_a_certificate_without_a_step_is_refused(steps, main):
    command = ["certify", "--config", ROOT / "configs/lfm_debug.yaml", "--layouts", "tp2", "--steps", steps]
    assert_refused(main(*command), rf"--steps {steps} is not from 1 to 1000")


def test_a_run_says_where_its_folder_is_after_a_check_of_its_layout(main):
    command = ["pretrain", "--config", ROOT / "configs/lfm_3b_8gpu.yaml", "--folder", "name=mine", "output=/somewhere"]
    found = main(*command, "--world-size", 8)
    assert (found.returncode, found.stdout) == (0, "/somewhere/mine\n"), found.stderr
    assert_refused(main(*command, "--world-size", 12), "12")


def test_shards_of_another_tokenizer_are_refused(tmp_path, text_data, main):
    import shutil

    copy = shutil.copytree(text_data, tmp_path / "data")
    tokenizer = copy / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert_refused(main("pretrain", *pretrain_command(tmp_path, copy)[2:]), "tokenizer")


def test_a_corrupt_checkpoint_is_refused_in_one_sentence(tmp_path, text_data, trained, main):
    import shutil

    shutil.copytree(trained, tmp_path / "lfm_debug")
    os.truncate(tmp_path / "lfm_debug/checkpoints/step_00000002/.metadata", 10)
    assert_refused(main("pretrain", *pretrain_command(tmp_path, text_data)[2:]), r"\.metadata has 10 bytes instead of")
    generate = ["generate", "--checkpoint", tmp_path / "lfm_debug", "--prompt", "x"]
    assert_refused(main(*generate), r"\.metadata has 10 bytes instead of")


def test_a_checkpoint_of_another_architecture_is_refused_in_one_sentence(text_data, trained, main):
    command = pretrain_command(trained.parent, text_data, "model.num_layers=3")[2:]
    assert_refused(main("pretrain", *command), r"another architecture: model\.num_layers is 2 there and 3")


@pytest.mark.alone
@pytest.mark.parametrize(
    "launcher",
    [
        [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "1"],
        [PYTHON, f"{sys.prefix}/bin/deepspeed", "--num_gpus", "1"],
    ],
    ids=["torchrun", "deepspeed"],
)
def test_one_process_trains_under_each_launcher(launcher, tmp_path, text_data):
    if "deepspeed" in launcher[1]:
        pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'lfm-training[parallel]'")
    shared = shared_memory.names()
    found = run(*launcher, *pretrain_command(tmp_path, text_data, "training.steps=1")[1:])
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "lfm_debug/checkpoints/step_00000001").exists()
    assert not shared_memory.abandoned(shared), "shared memory was left behind"


def test_generate_streams_one_prompt_and_separates_several(trained, lfm):
    one = run(PYTHON, "launch/generate.py", "--checkpoint", trained, "--prompt", "import ", "--max-new-tokens", 5)
    assert one.returncode == 0 and one.stdout.startswith("import "), one.stderr
    step = trained / "checkpoints/step_00000002"
    command = ["generate", "--checkpoint", step, "--prompt", "def ", "--prompt", "class ", "--greedy"]
    several = lfm(*command, "--max-new-tokens", 5).stdout
    first, second = several.split("\n--------\n")
    assert first.startswith("def ") and second.startswith("class ")
    assert lfm(*command, "--max-new-tokens", 5).stdout == several


BAD_PROMPTS = {
    "too_long": (["--prompt", "x " * 200], r"tokens and the context is 64; shorten it to 63"),
    "empty": (["--prompt", ""], "empty"),
    "no_checkpoint": (["--checkpoint", "/no/run", "--prompt", "x"], "neither a checkpoint nor a run folder"),
    "temperature": (["--prompt", "x", "--temperature", "0"], r"temperature=0.0 is below 0.001; .* use greedy"),
    "top_p": (["--prompt", "x", "--top-p", "2"], "top_p = 2 "),
    "seed": (["--prompt", "x", "--seed", "-1"], "seed = -1 "),
    "min_p": (["--prompt", "x", "--min-p", "1.5"], "min_p = 1.5 .* less than or equal to 1"),
    "penalty": (["--prompt", "x", "--repetition-penalty", "0"], r"repetition_penalty = 0 .* equal to 0\.01"),
    "stop": (["--prompt", "x", "--stop", "y", "--stop", ""], "a stop text is empty .* leave it out"),
    "no_file": (["--prompts", "/no/file"], "--prompts /no/file is no file; name one with a prompt a line, or - for"),
    "not_utf8": (["--prompt", "\udcff"], "is not valid UTF-8"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_a_bad_generation_is_refused_in_one_sentence(case, trained, main):
    arguments, words = BAD_PROMPTS[case]
    assert_refused(main("generate", "--checkpoint", trained, *arguments), words)


BAD_FILES = {
    "empty": ("", "has no prompts; write one a line"),
    "empty_line": ("a\n\nb\n", "line 2 of .*: a prompt is empty"),
    "not_utf8": ("a\n\udcff\n", "line 2 of .* is not valid UTF-8"),
    "too_long": ("a\n" + "x " * 200, "line 2 of .*: a prompt has .* tokens and the context is 64"),
    "no_json": ('{"prompt": "a"}\n{"prompt": "b"\n', "line 2 of .* is no JSON object with a text `prompt`"),
    "no_prompt": ('{"text": "a"}\n', "line 1 of .* is no JSON object with a text `prompt`"),
    "no_text": ('{"prompt": 3}\n', "line 1 of .* is no JSON object with a text `prompt`"),
    "no_object": ('{"prompt": "a"}\n[1]\n', "line 2 of .* is no JSON object with a text `prompt`"),
    "key": (
        '{"prompt": "a", "max_tokens": 3}',
        "unknown key max_tokens .* in line 1 of .*; did you mean max_new_tokens",
    ),
    "value": ('{"prompt": "a"}\n{"prompt": "a", "top_p": 2}', "top_p = 2 in line 2 of"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_line_of_prompts_is_named_and_nothing_is_made(case, trained, tmp_path, main):
    content, words = BAD_FILES[case]
    (tmp_path / "prompts").write_bytes(content.encode("utf-8", "surrogateescape"))
    found = main("generate", "--checkpoint", trained, "--prompts", tmp_path / "prompts")
    assert_refused(found, words)
    assert found.stdout == ""


def test_prompts_of_a_file_are_continued_by_their_own_settings_and_repeat_alone(trained, tmp_path, main):
    rows = [{"prompt": f"def f{i}(", "max_new_tokens": 1 + i % 5} for i in range(18)]  # more than a batch
    rows[3] |= {"seed": 77, "stop": ["e", "\n"], "repetition_penalty": 1.2, "min_p": 0.01, "max_new_tokens": 30}
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\r\n".join(map(json.dumps, rows)) + "\r\n")
    command = ("generate", "--checkpoint", trained, "--seed", 5)
    found = main(*command, "--prompts", tmp_path / "rows.jsonl", "--json")
    made = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["prompt"] for row in made] == [row["prompt"] for row in rows]
    assert [row["seed"] for row in made] == [77 if i == 3 else 5 + i for i in range(18)]
    assert all(list(row) == ["prompt", "text", "tokens", "finish_reason", "seed"] for row in made)
    assert not {"e", "\n"} & set(made[3]["text"]) and made[3]["finish_reason"] in ("stop", "length")
    for i, flags in ((17, []), (3, ["--stop", "e", "--stop", "\n", "--repetition-penalty", 1.2, "--min-p", 0.01])):
        again = (
            "--prompt",
            rows[i]["prompt"],
            "--seed",
            made[i]["seed"],
            "--max-new-tokens",
            rows[i]["max_new_tokens"],
        )
        assert json.loads(main(*command, *again, *flags, "--json").stdout) == made[i]
    lines = run_with_input("".join(f"{row['prompt']}\n" for row in rows[:2]), *command[1:], "--max-new-tokens", 2)
    plain = main(*command, "--prompt", rows[0]["prompt"], "--prompt", rows[1]["prompt"], "--max-new-tokens", 2).stdout
    assert lines == plain and plain.count("\n--------\n") == 1


def run_with_input(text, *flags):
    command = [PYTHON, "launch/generate.py", *map(str, flags), "--prompts", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, check=True).stdout


def test_streamed_text_keeps_the_space_behind_the_prompt(main, capsys, tmp_path):
    # Metaspace: the space belongs to the word behind it, and the first of a text has none.
    (tmp_path / "tokenizer.json").write_bytes(KINDS["metaspace"]().to_str().encode())
    source = write_texts(tmp_path / "text", TEXTS[:60])
    prepare(config(source, tmp_path / "data", seq_length=64, tokenizer={"file": str(tmp_path / "tokenizer.json")}))
    small = ("data.allow_smaller_tokenizer=true", "samples.prompts=[in]")
    tiny = tiny_run(tmp_path, tmp_path / "data", "training.steps=1", *small)
    train(tiny)
    model, tokenizer, _ = open_model(tiny.folder, device="cpu")
    prompt = tokenizer.encode_prompt("rain in")

    def whole_text(seed):
        sampling = SamplingConfig(max_new_tokens=5, seed=seed)
        made = [token for (token,) in generate(model, [prompt], sampling, end_of_document=tokenizer.eod_id)]
        return tokenizer.decode([*prompt, *(token for token in made if token not in (None, tokenizer.eod_id))])

    seed = next(seed for seed in range(100) if whole_text(seed).startswith("rain in "))
    capsys.readouterr()
    flags = ("--prompt", "rain in", "--max-new-tokens", 5, "--seed", seed)
    found = main("generate", "--checkpoint", tiny.folder, *flags)
    assert (found.returncode, found.stdout) == (0, whole_text(seed) + "\n")


def test_help_of_the_demo_lists_the_keys(main):
    found = main("demo", "--help")
    assert found.returncode == 0 and "model.liquid.leak_rate" in found.stdout
    assert_refused(main("demo", "optimizer.lr=on"), "optimizer.lr = 'on' in .* is not legal")


def test_a_model_is_opened_by_the_text_of_its_path(trained):
    model, _, checkpoint = open_model(str(trained), device="cpu")
    assert not model.training and checkpoint == find(trained)


def test_greedy_generation_asks_for_no_temperature(trained, main):
    found = main("generate", "--checkpoint", trained, "--prompt", "x", "--greedy", "--temperature", 0)
    assert found.returncode == 0 and found.stdout.startswith("x"), found.stderr
