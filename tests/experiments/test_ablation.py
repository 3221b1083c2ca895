"""A set: what is refused before anything runs, and the whole of it on a CPU, killed in the middle and not."""

import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

import pytest

from data_pipeline.prepare_config import PrepareConfig
from lfm.config import shipped_configs, shipped_data_config
from lfm.errors import UserError
from lfm.experiments.ablation import AblationConfig, check_shared, first_runs, planned_run
from lfm.experiments.figures import picture
from lfm.experiments.harness import prepared, run_set, visible_gpus
from lfm.experiments.matching import check_matched, plan_text, sizes_of
from lfm.experiments.results import _windows, check_same_rows, markdown, read_report, read_result
from lfm.training.run import RunConfig
from tests.training.tiny_run import ROOT

SETS = sorted(path.stem for path in (shipped_configs() / "ablation").glob("*.yaml"))
SMALL = [
    "common.model.seq_length=64",
    "common.model.vocab_size=512",
    "tokens=10240",
    "common.checkpoint.every_steps=8",
]
TWO = [
    "arms.lstm=null",
    "arms.transformer.set.model={hidden_size: 32, num_layers: 1, ffn: {ffn_hidden_size: 64}}",
    "arms.liquidnet.set.model={hidden_size: 32, num_layers: 1, ffn: {ffn_hidden_size: 64}}",
]
"""Arms, smaller ones."""


def debug_set(text_data, output, *more: str) -> list[str]:
    return [*SMALL, f"common.data.path={text_data}", f"output={output}", *more]


def loaded(text_data, output, *more: str) -> AblationConfig:
    return AblationConfig.load("ablation/debug", debug_set(text_data, output, *more))


@pytest.mark.parametrize("name", SETS)
def test_a_shipped_set_is_matched_and_its_data_can_be_made(name):
    ablation = AblationConfig.load(f"ablation/{name}")
    assert ablation.name == name
    harness = prepared(ablation)
    runs = first_runs(ablation)
    assert list(runs) == list(ablation.arms)
    run = next(iter(runs.values())).run
    assert run.data.path is not None
    shipped = shipped_data_config(run.data.path)
    assert shipped is not None, f"no config in configs/data has output: {run.data.path}"
    data = PrepareConfig.load(shipped)
    assert (data.seq_length, data.tokenizer.train_vocab_size) == (run.model.seq_length, run.model.vocab_size)
    text = plan_text(ablation, runs, harness.sizes)
    for arm, planned in runs.items():
        counts = planned.run.model.count_parameters()
        [line] = [line for line in text.splitlines() if line.startswith(f"{arm} ")]
        assert f" {counts.active_non_embedding:,} " in line and f" {counts.total:,} " in line


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("arms.lstm.config=lstm_debag", r"arm lstm: config file lstm_debag does not exist; did you mean lstm_debug"),
        (
            "arms.lstm.set.model.hidden_size=100",
            r"arm lstm has 161,700 active parameters outside of the embedding and arm transformer 99,136, which is "
            r"\+63\.1% where match\.tolerance=0\.02 allows 2\.0%; change its size under arms\.lstm\.set\.model, or set "
            r"match\.tolerance=0\.63",
        ),
        ("rates=[]", r"arm transformer has no learning rates; give `rates` of the set or of the arm"),
        ("arms.lstm.rates=[1e-3]", r"arm lstm has 1 learning rates and arm \w+ 2; give each arm as many"),
        ("rates=[1e-3, 1e-3]", r"rates of arm transformer name one twice: 0\.001, 0\.001"),
        ("seeds=[1, 1]", r"seeds=\[1, 1\] names one twice"),
        ("common.training.steps=5", r"common\.training\.steps is not for a set: tokens"),
        ("common={training.steps: 5}", r"common\.training\.steps is not for a set: tokens"),
        (
            "arms.lstm.set.optimizer.lr=1e-3",
            r"arms\.lstm\.set\.optimizer\.lr is not for a set: rates are learning rates",
        ),
        ("common.seed=3", r"common\.seed is not for a set: seeds are those of all arms; leave it out"),
        ("arms.lstm.set.training.device=cuda", r'arm lstm has training\.device="cuda" and arm transformer'),
        ("match.by=seconds", r"by=seconds and seconds=None do not go together"),
        ("arms.lstm.untraned=true", r"unknown key arms\.lstm\.untraned .*did you mean arms\.untrained"),
        ("arms={a/b: {config: lstm_debug}}", r"'a/b' becomes the name of a folder"),
        ("plasticity_words=3", r"plasticity_words=3: there are 8 meanings"),
        ("probes={tasks: [s5, s5]}", r"tasks=\['s5', 's5'\] names one twice"),
        ("probes={tasks: []}", r"probes\.tasks"),
        ("common.validation.patience=2", r"validation\.patience=2 would end runs early; set it to 0"),
        ("common.parallel.zero_stage=1", r"parallel\.zero_stage=1, and a run of a set has one process"),
        (
            "arms.lstm.set.model.seq_length=32",
            r"arm lstm has model\.seq_length=32 and arm transformer 64, but arms share what they read",
        ),
        ("arms.lstm.set.data.path=elsewhere", r'arm lstm has data\.path="elsewhere" and arm transformer'),
        ("arms.lstm.set.schedule.kind=linear", r'arm lstm has schedule\.kind="linear" and arm transformer "cosine"'),
    ],
)
def test_a_set_that_compares_unlike_things_is_one_sentence(text_data, tmp_path, override, sentence):
    with pytest.raises(UserError) as error:
        prepared(loaded(text_data, tmp_path, override))
    assert re.search(sentence, str(error.value)) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("common.model.vocab_size=256", "has 512 ids, more than the model's vocab_size=256"),
        ("common.model.vocab_size=1024", "512"),
        ("common.model.seq_length=32", "seq_length"),
        ("common.data.path=nowhere", "nowhere"),
        ("common.training=5", "training"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_a_run_begins(text_data, tmp_path, override, sentence):
    with pytest.raises(UserError, match=sentence):
        run_set(prepared(loaded(text_data, tmp_path, override)), [None])
    assert not list(tmp_path.rglob("text")), "no run was begun"
    assert not list(tmp_path.rglob("ablation.yaml")), "and the folder is still free for the set without the mistake"


def test_arms_tasks_and_gpus_that_are_not_there(text_data, tmp_path, monkeypatch):
    ablation = loaded(text_data, tmp_path)
    with pytest.raises(UserError, match="--only names 'gru', which the set debug has not; there are transformer, liqu"):
        prepared(ablation, only=["gru"])
    with pytest.raises(UserError, match="--tasks names 's5', which the set debug has not; there are text"):
        prepared(ablation, tasks=["s5"])
    cpu, cuda = (
        planned_run(loaded(text_data, tmp_path, f"common.training.device={d}"), "text", "lstm", 1e-3, 1)
        for d in ("cpu", "cuda")
    )
    assert visible_gpus(None, cpu.run.device) == [None]
    with pytest.raises(UserError, match="--gpus 0 is for GPUs, and runs of this set train on the cpu"):
        visible_gpus("0", cpu.run.device)
    with pytest.raises(UserError, match="--gpus 0,first is no list of numbers"):
        visible_gpus("0,first", cuda.run.device)
    # More than any machine has.
    with pytest.raises(UserError, match=r"--gpus 0,99 asks for GPU (0|99), and \d+ are visible, from 0 on; name fewer"):
        visible_gpus("0,99", cuda.run.device)


def test_windows_leave_out_what_compiles():
    records = [
        {"step": s, "tokens": 100 * s, "tokens_per_second": rate}
        for s, rate in ((1, 10), (2, 100), (3, 50), (4, 5), (5, 25))
    ]
    assert _windows(records, {0, 3}) == [(100, 1.0), (200, 2.0), (300, 4.0), (400, 8.0), (500, 12.0)]


@pytest.fixture(scope="module")
def whole(text_data, tmp_path_factory):
    """The set of two arms, in one go."""
    ablation = loaded(text_data, tmp_path_factory.mktemp("whole"), *TWO)
    assert run_set(prepared(ablation), [None])
    return ablation


def without_speed(result):
    """What must be the same however often it was interrupted."""
    if isinstance(result, dict):
        return {key: without_speed(value) for key, value in result.items() if key not in ("speed", "environment")}
    return [without_speed(value) for value in result] if isinstance(result, list) else result


def test_a_set_that_was_killed_gives_the_same_table(whole, text_data, tmp_path, capfd):
    keys = debug_set(text_data, tmp_path, *TWO)
    command = [sys.executable, str(ROOT / "launch/ablate.py"), "--config", "ablation/debug", *keys]
    first = tmp_path / "debug/text/transformer/lr_0.004_seed_1"
    log = first.with_name(first.name + ".log")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while not (log.exists() and "step 5/" in log.read_text()):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (first / "finished.json").exists(), "it was in the middle of its first run"
    ablation = loaded(text_data, tmp_path, *TWO)
    assert run_set(prepared(ablation), [None], minutes=1e-9)
    assert "6 runs are left, by the end of its time; the same command goes on" in capfd.readouterr().out
    one_arm = ["transformer"]
    assert run_set(prepared(ablation, only=one_arm), [None, None]), "two at once, as on two GPUs"
    assert "resuming from" in log.read_text()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("finished.json")}
    assert len(finished) == 3
    assert run_set(prepared(ablation, only=one_arm), [None])
    assert finished == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("finished.json")}
    one, other = (read_report(each.folder / "RESULT.json") for each in (whole, ablation))
    assert without_speed(one["arms"][0]) == without_speed(other["arms"][0]) and not other["complete"]
    assert [each["arms"][0]["speed"]["shares_gpu"] for each in (one, other)] == [False, True]
    assert " (shared) |" in markdown(other) and "(shared)" not in markdown(one)
    runs = [run for run in one["runs"] if run["arm"] == "transformer"]
    assert len(runs) == 3 and without_speed(runs) == without_speed(other["runs"])
    assert not list(tmp_path.rglob("checkpoints")), "those of finished runs are gone"


def test_the_result_says_what_the_runs_found(whole):
    result = read_report(whole.folder / "RESULT.json")
    assert result["complete"] and len(result["runs"]) == 6 and result["environment"]["versions"]["torch"]
    for arm in result["arms"]:
        own = [run for run in result["runs"] if run["arm"] == arm["name"]]
        by_rate = {run["rate"]: run["held_out_loss"] for run in own if run["seed"] == 1}
        assert by_rate.keys() == {4e-3, 1.6e-2} and arm["best_rate"] == min(by_rate, key=by_rate.__getitem__)
        at_best = [run["held_out_loss"] for run in own if run["rate"] == arm["best_rate"]]
        assert len(at_best) == 2 and arm["held_out_loss"]["mean"] == pytest.approx(sum(at_best) / 2)
        assert (arm["held_out_loss"]["low"], arm["held_out_loss"]["high"]) == (min(at_best), max(at_best))
        assert arm["best_is_at_an_edge"] and arm["tokens"] == 10240
        assert 0 < arm["held_out_loss"]["mean"] < math.log(512) + 1 and 0 < arm["bits_per_byte"]["mean"] < 8
        assert f"{arm['active_non_embedding']:,}" in markdown(result) and arm["name"] in markdown(result)
    # Seeds are different data orders; rates and arms of one seed read the same.
    assert {run["rows"] for run in result["runs"] if run["seed"] == 1} != {
        run["rows"] for run in result["runs"] if run["seed"] == 2
    }
    assert len({(run["seed"], run["rows"]) for run in result["runs"]}) == 2
    assert (whole.folder / "RESULT.png").read_bytes().startswith(b"\x89PNG")
    assert (whole.folder / "RESULT.md").read_text() == markdown(result) + "\n"
    assert picture({**result, "arms": []}) is None


def test_a_set_may_be_validated_at_the_end_alone(text_data, tmp_path):
    keys = ["arms.liquidnet=null", "rates=[4e-3]", "seeds=[1]", "common.validation.every_steps=0", "tokens=2048"]
    ablation = loaded(text_data, tmp_path, *TWO, *keys)
    assert run_set(prepared(ablation), [None])
    [run] = read_report(ablation.folder / "RESULT.json")["runs"]
    assert [tokens for tokens, *_ in run["validation"]] == [2048]


def test_files_that_were_changed_beside_a_commit_stay_told(whole):
    result = read_report(whole.folder / "RESULT.json")
    for commit, said in ((40 * "a", "commit aaaaaaaaaaaa."), (40 * "a" + "-dirty", "commit aaaaaaaaaaaa-dirty.")):
        assert said in markdown({**result, "environment": {**result["environment"], "commit": commit}})
    short = markdown({**result, "complete": False, "missing": ["one"]})
    assert "of the runs known to be wanted, 1 is missing" in short


def test_a_run_is_an_ordinary_one(whole):
    [config, *_] = sorted((whole.folder / "text/liquidnet").glob("*.yaml"))
    run = RunConfig.load(config)
    assert run.folder == config.with_suffix("") and run == RunConfig.load(run.folder / "config.yaml")


def test_folders_of_others_are_refused(whole, text_data, tmp_path):
    output = whole.folder.parent
    with pytest.raises(
        UserError, match=r"holds another set: there tokens=10240, here 8192; give this one another name"
    ):
        run_set(prepared(loaded(text_data, output, *TWO, "tokens=8192")), [None])
    for key, there, here in (("keep_checkpoints", "false", "true"), ("plasticity_words", "0", "8")):
        with pytest.raises(UserError, match=f"holds another set: there {key}={there}, here {here}; give this one"):
            run_set(prepared(loaded(text_data, output, *TWO, f"{key}={here}")), [None])
    changed = loaded(text_data, output, *TWO, "arms.liquidnet.set.optimizer.clip_grad=0.25")
    with pytest.raises(
        UserError, match=r"liquidnet/lr_0\.004_seed_1 was begun with optimizer\.clip_grad=0\.5, and the set has 0\.25"
    ):
        run_set(prepared(changed), [None])
    (tmp_path / "debug").mkdir()
    (tmp_path / "debug/thesis.txt").write_text("")
    with pytest.raises(UserError, match=r"is not empty and holds no set; give another name=NAME or output=DIR"):
        run_set(prepared(loaded(text_data, tmp_path)), [None])


def test_runs_that_read_different_rows_are_found(whole):
    runs = [planned_run(whole, "text", arm, 4e-3, 1) for arm in whole.arms]
    one, other = (result for run in runs if (result := read_result(run)) is not None)
    check_same_rows([one, other])
    other.rows[4:] = ["0" * 32] * (len(other.rows) - 4)
    with pytest.raises(
        UserError, match=r"liquidnet/lr_0.004_seed_1 and .*transformer.* read different rows from step 5 on"
    ):
        check_same_rows([one, other])


def test_a_run_that_fails_or_diverges_stops_no_other(text_data, tmp_path, capfd):
    """One arm names a group that its model has not; of the other's rates one is absurd.  There is a probe."""
    more = [
        "seeds=[1]",
        "tokens=1024",
        "rates=[4e-3, 1e30]",
        "match.tolerance=1e-9",
        "probes={tasks: [parity], steps: 2, global_batch_size: 4}",
        *("arms.transformer=null", "arms.lstm=null", *TWO[2:]),
        "arms.bad={config: liquidnet_debug, set: {model: {hidden_size: 32, num_layers: 1, ffn: {ffn_hidden_size: 64}}, "
        "optimizer: {groups: [{match: nothing}]}}}",
    ]
    ablation = loaded(text_data, tmp_path, *more)
    assert not run_set(prepared(ablation, tasks=["text"]), [None])
    assert run_set(prepared(ablation, only=["liquidnet"], tasks=["parity"]), [None])
    said = capfd.readouterr().out
    assert (
        re.search(r"liquidnet, lr 0\.004, seed 1: held out \d", said)
        and "liquidnet, lr 1e+30, seed 1: diverged" in said
    )
    assert re.search(
        r"failed: bad, lr 0\.004, seed 1(?:; \d left, about \S+ min)?: exit code 2; .*\.log ends:\n(    .*\n)*"
        r"    error: optimizer\.groups",
        said,
    )
    assert re.search(r"liquidnet, lr 0\.004, seed 1, parity: held out [\d.]+, right \d+\.\d%, longer \d+\.\d%", said)
    result = read_report(ablation.folder / "RESULT.json")
    good, bad = result["arms"]
    assert good["best_rate"] == 4e-3 and good["sweep"][1] == [1e30, None] and not result["complete"]
    assert bad["held_out_loss"] is None and bad["best_rate"] is None
    assert 0 <= good["probes"]["parity"]["accuracy"] <= 1 and "parity 50.0%" in markdown(result)
    json.loads((ablation.folder / "RESULT.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_a_run_whose_files_are_damaged_when_it_ends_stops_no_other(text_data, tmp_path, capfd):
    more = ["seeds=[1]", "tokens=5120", "keep_checkpoints=true", "arms.transformer=null", "arms.lstm=null", TWO[2]]
    ablation = loaded(text_data, tmp_path, *more)
    assert run_set(prepared(ablation), [None])
    first, second = (ablation.folder / f"text/liquidnet/lr_{rate}_seed_1" for rate in ("0.004", "0.016"))
    for run in (first, second):
        (run / "finished.json").unlink()
    metrics = (first / "metrics.jsonl").read_text()
    (first / "metrics.jsonl").write_text(metrics[metrics.index("\n") + 1 :])
    assert not run_set(prepared(ablation), [None])
    said = capfd.readouterr().out
    assert re.search(r"failed: liquidnet, lr 0\.004, seed 1: .* lacks the record of training at step 5; put it", said)
    assert (second / "finished.json").exists() and "1 run is left; the same command goes on" in said
    (first / "metrics.jsonl").write_text(metrics)
    assert run_set(prepared(ablation), [None])


def test_what_a_model_is_certain_of_has_a_loss_that_may_round_below_zero(whole, tmp_path):
    run = planned_run(whole, "text", "transformer", 4e-3, 1)
    shutil.copytree(run.folder, tmp_path / run.folder.name)
    copy = dataclasses.replace(run, run=run.run.model_copy(update={"output": str(tmp_path)}))
    file = copy.folder / "metrics.jsonl"
    file.write_text(re.sub(r'"(validation_loss|cross_entropy)": [0-9.e-]+', r'"\1": -2.0e-07', file.read_text()))
    result = read_result(copy)
    assert result is not None and result.loss == -2e-7


@pytest.fixture(scope="module", autouse=True)
def own_fork_server():
    """The server that processes are forked from is one for all of this process, and other tests' has other imports."""
    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()


def test_the_command_prints_the_plan_and_touches_nothing(text_data, tmp_path, lfm):
    keys = debug_set(text_data, tmp_path / "out", "common.data.path=nowhere")
    done = lfm("ablate", "--config", "ablation/debug", "--plan", *keys, cwd=tmp_path)
    assert done.returncode == 0 and "9 runs on text" in done.stdout and not list(tmp_path.iterdir())


def test_matching_by_flops_and_by_seconds(whole, text_data, tmp_path):
    by_flops = loaded(text_data, tmp_path, "match={by: flops, tolerance: 0.02}")
    runs = first_runs(by_flops)
    check_shared(runs)
    with pytest.raises(UserError, match=r"789,504 FLOPs a token and arm transformer 839,424, which is -5\.9%"):
        check_matched(by_flops, sizes_of(runs))
    by_seconds = loaded(text_data, tmp_path, "match={by: seconds, seconds: 3}", *TWO)
    harness = prepared(by_seconds)
    with pytest.raises(UserError, match=r"match\.by=seconds gives each run a GPU of its own; name every one once"):
        run_set(harness, ["0", "0"])
    pilots = harness.planned()
    assert [(each.task, each.run.training.steps) for each in pilots] == [("pilot", 50)] * 2
    # As if a finished run were the pilot: it has all that one has.
    result = read_result(planned_run(whole, "text", "transformer", 4e-3, 1))
    assert result is not None and result.tokens_per_second is not None
    harness.results[pilots[0].folder] = dataclasses.replace(result, planned=pilots[0])
    steps = max(10, round(3 * result.tokens_per_second / (8 * 64)))
    sweep = [each for each in harness.planned() if each.task == "text"]
    assert [(each.arm, each.rate) for each in sweep] == [("transformer", 4e-3), ("transformer", 1.6e-2)]
    assert {each.run.training.steps for each in sweep} == {steps}


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda text: text[: text.rindex('{"step"')], "lacks the record of a validation at step 20; put it back"),
        (lambda text: text.replace('"step": 10', '"stop": 10'), "lacks the record of training at step 10; put it back"),
        (lambda text: "", "lacks the record of training at step 5; put it back"),
        (lambda text: text.replace('"cross_entropy": ', '"cross_entropy": "x", "old": '), "is damaged; put it back"),
        (lambda text: text.replace('"tokens": ', '"tokens": "x", "old": '), "is damaged; put it back"),
        (lambda text: text.replace('"validation_loss": ', '"validation_loss": NaN, "old": '), "is damaged; put"),
        (
            lambda text: text.replace('"validation_loss": ', '"validation_loss": true, "old": '),
            "is damaged; put it back",
        ),
        (lambda text: text.replace('"tokens_per_second": ', '"tokens_per_second": -'), "is damaged; put it back"),
        (lambda text: text.replace('"tokens": ', '"tokens": 1e400, "old": '), "is damaged; put it back"),
    ],
    ids=["cut", "a hole", "empty", "letters", "tokens of letters", "no number", "true", "negative", "infinite"],
)
def test_a_damaged_history_of_a_finished_run_is_told(damage, sentence, whole, tmp_path):
    run = planned_run(whole, "text", "transformer", 4e-3, 1)
    shutil.copytree(run.folder, tmp_path / run.folder.name)
    copy = dataclasses.replace(run, run=run.run.model_copy(update={"output": str(tmp_path)}))
    assert read_result(copy) is not None
    file = copy.folder / "metrics.jsonl"
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError, match=re.escape(f"{file}") + ".*" + re.escape(sentence)):
        read_result(copy)


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("consumed.txt", b"", "does not hold the steps from 1 to 20; put it back"),
        ("consumed.txt", b"garbage\n", "does not hold the steps from 1 to 20; put it back"),
        ("consumed.txt", None, "does not hold the steps from 1 to 20; put it back"),
        ("finished.json", b"{}", "is damaged; remove it, and the run is finished again"),
        ("finished.json", b"[" * 100_000, "is damaged; remove it"),
        ("finished.json", b'{"diverged": false, "wall_seconds": 1.0}', "is damaged; remove it"),
        ("finished.json", b'{"diverged": null, "wall_seconds": 1.0, "accuracy": 0.5}', "is damaged; remove it"),
    ],
)
def test_a_damaged_file_of_a_finished_run_is_named(name, content, sentence, whole, tmp_path):
    run = planned_run(whole, "text", "transformer", 4e-3, 1)
    shutil.copytree(run.folder, tmp_path / run.folder.name)
    copy = dataclasses.replace(run, run=run.run.model_copy(update={"output": str(tmp_path)}))
    if content is None:
        (copy.folder / name).unlink()
    else:
        (copy.folder / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as refused:
        read_result(copy)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, r"config\.yaml is missing; put it back, or remove the run's folder"),
        ("", r"config\.yaml is damaged, or of another version; put it back, or remove the run's folder"),
        ("seed: [", r"config\.yaml is damaged, or of another version; put it back, or remove the run's folder"),
        ("sead: 1", r"config\.yaml is damaged, or of another version; put it back, or remove the run's folder"),
    ],
)
def test_a_finished_run_without_its_configuration_is_named(content, sentence, whole):
    file = planned_run(whole, "text", "transformer", 4e-3, 1).folder / "config.yaml"
    kept = file.read_bytes()
    try:
        file.unlink()
        if content is not None:
            file.write_text(content)
        with pytest.raises(UserError, match=sentence) as refused:
            prepared(whole).look()
        assert "\n" not in str(refused.value)
    finally:
        file.write_bytes(kept)


def test_a_damaged_set_is_named(whole):
    file = whole.folder / "ablation.yaml"
    kept = file.read_bytes()
    try:
        for content in (b"", b"name: [", b"arms: 5", b"\0"):
            file.write_bytes(content)
            with pytest.raises(UserError, match=r"put it back, or give this set another name=NAME") as refused:
                run_set(prepared(whole), [None])
            assert "\n" not in str(refused.value)
    finally:
        file.write_bytes(kept)


def test_a_damaged_environment_is_named(whole, tmp_path):
    file = planned_run(whole, "text", "transformer", 4e-3, 1).folder / "environment.json"
    kept = file.read_bytes()
    harness = prepared(whole)
    try:
        for content in (b"", b"[]", b"\0", b"{"):
            file.write_bytes(content)
            with pytest.raises(UserError, match=r"environment\.json is damaged; put it back"):
                harness.write(harness.look())
    finally:
        file.write_bytes(kept)


def test_a_pilot_that_diverges_at_its_lowest_rate_is_told(whole, text_data, tmp_path):
    by_seconds = loaded(text_data, tmp_path, "match={by: seconds, seconds: 3}", *TWO)
    harness = prepared(by_seconds)
    pilot, _ = harness.planned()
    assert pilot.rate == min(by_seconds.rates)
    result = read_result(planned_run(whole, "text", "transformer", 4e-3, 1))
    assert result is not None
    harness.results[pilot.folder] = dataclasses.replace(result, planned=pilot, tokens_per_second=None)
    with pytest.raises(UserError, match=r"the pilot of arm transformer diverged at its lowest learning rate, 0\.004"):
        harness.planned()


@pytest.mark.gpu
def test_a_set_runs_on_every_gpu(text_data, tmp_path):
    ablation = loaded(text_data, tmp_path, *TWO, "seeds=[1]")
    assert run_set(prepared(ablation), visible_gpus(None, first_runs(ablation)["liquidnet"].run.device))
    result = read_report(ablation.folder / "RESULT.json")
    assert result["complete"] and result["environment"]["gpus"] == 1, "a run sees its own GPU alone"
