"""The whole path on a CPU: fit, calibrate, certify, answer or abstain, evidence, report; and what is refused."""

import dataclasses
import io
import json
import shutil
import sys

import httpx
import numpy as np
import pytest
import torch

from lfm import load
from lfm.commands import chat, evaluate, generate, medical, serve
from lfm.errors import UserError
from lfm.evaluation.medical_predictions import faithfulness, from_lines
from lfm.inference.load import open_model
from lfm.medical.answering import answer, prompt_ids
from lfm.medical.asking import MedicalMode
from lfm.medical.config import MedicalConfig
from lfm.medical.evidence import Evidence, evidence
from lfm.medical.features import read_answers
from lfm.medical.fitting import check_apart, data_of
from lfm.medical.questions import open_questions
from lfm.medical.selective import NO_DEVICE, REFERRAL, Decision
from lfm.medical.selective import said as shown_answer
from lfm.medical.stored import Form, open_calibrated, stored_at
from lfm.serving.served import open_served
from tests.medical import sets
from tests.serving.local_server import post, running

CPU = ("--device", "cpu")
RISK = ("--risk", 0.25, "--delta", 0.1)


def run_of(trained, folder):
    shutil.copytree(trained.run, folder / "answers", symlinks=True)
    return folder / "answers"


@pytest.fixture(scope="module")
def calibrated(trained, tmp_path_factory):
    """The run with heads for both kinds of answers, by the commands."""
    run = run_of(trained, tmp_path_factory.mktemp("calibrated"))
    for task in ("choice", "text"):
        of = ("--checkpoint", run, "--data", trained.data, "--task", task, *CPU)
        fewer = ("--max-questions", 300) if task == "text" else ()
        for word, more in {"fit": fewer, "calibrate": (*RISK, *fewer)}.items():
            before, sys.argv = sys.argv, ["lfm", word, *map(str, (*of, *more))]
            try:
                medical.main()
            finally:
                sys.argv = before
    return run


def json_lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


CLEAR = "clot plasma\nChapter:"
UNCLEAR = "clot artery\nChapter:"
OPTIONS = [word for label in sets.LABELS for word in ("--option", label)]


def test_the_model_learnt_something(trained):
    model, tokenizer, _ = open_model(trained.run, device="cpu")
    found = answer(model, tokenizer, open_questions([trained.data]).parts["test"], "choice")
    assert 0.6 < found.right.mean() < 0.97, "a head needs right and wrong answers"


def test_heads_and_calibration_are_beside_the_checkpoint_and_say_what_they_are_of(calibrated, trained):
    checkpoint = calibrated / "checkpoints/step_00000100"
    path = stored_at(checkpoint)
    assert path == calibrated / "medical/step_00000100.json" and path.with_suffix(".safetensors").exists()
    tree = json.loads(path.read_bytes())
    assert set(tree["tasks"]) == {"choice", "text"} and tree["dtype"] == "float32"
    found, of = open_questions([trained.data]), tree["tasks"]["choice"]
    assert of["fit"]["sha256"] == found.digest("fit") and of["calibration"]["data"]["sha256"] == found.digest(
        "calibration"
    )
    assert set(of["heads"]) == {"correct", "known", "correct_without_liquid"}
    assert of["heads"]["correct_without_liquid"]["num_liquid"] == 0 < of["heads"]["correct"]["num_liquid"]
    assert of["calibration"]["certificate"]["threshold"] is not None
    assert not list(checkpoint.glob("*medical*")), "a checkpoint is what its manifest says"


def test_an_answer_comes_with_its_probability_or_not_at_all(calibrated, said):
    code, out, err = said(
        generate,
        "--checkpoint",
        calibrated,
        "--medical",
        "--safety-threshold",
        0.75,
        "--json",
        *CPU,
        "--prompt",
        CLEAR,
        "--prompt",
        UNCLEAR,
        *OPTIONS,
    )
    assert code == 0 and err == ""
    clear, unclear = json_lines(out)
    assert clear["answered"] and clear["answer"] == "blood" and clear["probability"] >= 0.75
    assert not unclear["answered"] and unclear["answer"] is None and unclear["referral"] == REFERRAL
    assert (
        f"below the {'safety' if unclear['certified_threshold'] < 0.75 else 'certified'} threshold" in unclear["reason"]
    )
    assert unclear["threshold"] == max(0.75, unclear["certified_threshold"])


def test_questions_are_asked_as_the_calibration_asked(calibrated):
    """What was calibrated is a choice from all labels: among others it is easy to be the likeliest."""
    model, tokenizer, checkpoint = open_model(calibrated, device="cpu")
    mode = MedicalMode(model, tokenizer, checkpoint, MedicalConfig(mode=True, safety_threshold=0.001), {"choice"})
    whole, without_end, few, others = mode.ask(
        [CLEAR, CLEAR.removesuffix("\nChapter:"), CLEAR, CLEAR],
        [sets.LABELS, sets.LABELS[::-1], sets.LABELS[:2], (*sets.LABELS[:3], "xq zzy")],
    )
    assert whole.answer is not None and whole.record()["note"] == NO_DEVICE
    assert without_end.answer == whole.answer
    assert without_end.decision.probability == pytest.approx(whole.decision.probability, abs=1e-5)
    for reply in (few, others):
        assert reply.answer is None and "its options are none that were calibrated" in reply.text
    two_ends = dataclasses.replace(mode.calibrated["choice"], form=Form(endings=["Chapter:", "Field:"]))
    mode.calibrated = {"choice": two_ends}
    replies = mode.ask([CLEAR, "clot plasma"], [sets.LABELS] * 2)
    assert replies[0].answer == whole.answer and replies[1].answer is None
    assert "does not end as questions of the calibration do, in a line 'Chapter:' or 'Field:'" in replies[1].text
    with pytest.raises(UserError, match="two are equal; give each once"):
        mode.ask([CLEAR], [["blood", " blood", "bone"]])


def test_an_answer_without_words_is_none(calibrated):
    """No grader calls it right, however sure a head is."""
    model, tokenizer, checkpoint = open_model(calibrated, device="cpu")
    mode = MedicalMode(model, tokenizer, checkpoint, MedicalConfig(mode=True, safety_threshold=0.001), {"text"})
    mode.calibrated = {"text": dataclasses.replace(mode.calibrated["text"], form=Form())}
    prompts = ["clot plasma", "y", "x" * 40, "clot", "plasma\n"]  # questions without "Chapter:"
    replies = mode.ask(prompts, [()] * len(prompts))
    empty = [reply for reply in replies if reply.made is not None and not reply.made.text.strip()]
    assert empty, "none of these questions was left without words"
    for reply in empty:
        assert reply.answer is None and reply.decision.reason == "the model made no answer" and REFERRAL in reply.text


def test_what_is_withheld_is_printed_nowhere_and_the_stricter_threshold_applies(calibrated, said):
    arguments = ("--checkpoint", calibrated, "--medical", *CPU, "--prompt", CLEAR, *OPTIONS)
    code, out, _ = said(generate, *arguments, "--safety-threshold", 0.999999)
    assert code == 0 and REFERRAL in out and "blood" not in out
    assert "not a medical device" in out and "certified threshold" in out and "calibrated on icd10" in out


def test_batches_of_lines_hold_questions_with_options_and_without(calibrated, said, tmp_path):
    rows = [{"prompt": CLEAR, "options": list(sets.LABELS)}, {"prompt": CLEAR}, {"prompt": UNCLEAR}]
    sets.lines(tmp_path / "prompts", rows)
    arguments = ("--checkpoint", calibrated, "--medical", "--safety-threshold", 0.6, "--json", *CPU)
    code, out, err = said(generate, *arguments, "--prompts", tmp_path / "prompts")
    assert code == 0, err
    chosen, free, unclear = json_lines(out)
    assert chosen["options"] == list(sets.LABELS) and "options" not in free
    assert chosen["answer"] == free["answer"] == "blood"
    assert 0 < unclear["probability"] < free["probability"] < 1


def test_chat_answers_each_line_by_itself_or_refers(calibrated, said, monkeypatch):
    replies = {}
    for threshold in (0.01, 0.9999):
        typed = io.BytesIO(b"clot plasma Chapter:\n\n/reset\nclot plasma Chapter:\n/quit\n")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="utf-8"))
        code, out, err = said(chat, "--checkpoint", calibrated, "--medical", "--safety-threshold", threshold, *CPU)
        assert code == 0 and "a prompt is empty" in err and "/reset is not of medical mode" in err
        replies[threshold] = [line for line in out.splitlines() if "probability of being right" in line]
    low, high = replies.values()
    assert len(low) == len(high) == 2 and low[0] == low[1], "what was said before is not read"
    assert all(line.startswith(REFERRAL) for line in high)


def test_a_server_gives_judged_answers_or_refers(calibrated):
    def opened(threshold):
        config = MedicalConfig(mode=True, safety_threshold=threshold)
        found = open_served([calibrated], device="cpu", medical_of=lambda checkpoint: config)
        mode = found["answers"].medical
        assert isinstance(mode, MedicalMode)
        return found, mode, [reply for prompt in (CLEAR, UNCLEAR) for reply in mode.ask([prompt], [()])]

    *_, sure = opened(0.01)
    threshold = sum(reply.decision.probability for reply in sure) / 2
    served, mode, (clear, unclear) = opened(threshold)
    assert clear.answer == "blood" and unclear.answer is None
    with running(served) as (address, _):
        [found] = httpx.get(f"{address}/v1/models", trust_env=False).json()["data"]
        assert found["lfm"]["medical"] == mode.words()
        both = post(address, {"prompt": [CLEAR, UNCLEAR], "temperature": 0, "max_tokens": 100}).json()
        given, withheld = both["choices"]
        assert given["text"] == "blood" and given["finish_reason"] == "stop"
        assert given["lfm"]["medical"] == clear.decision.record() and given["lfm"]["medical"]["probability"] > threshold
        assert withheld["text"] == REFERRAL and withheld["finish_reason"] == "content_filter"
        assert withheld["lfm"] == {"finish_reason": "withheld", "medical": unclear.decision.record()}
        assert clear.made is not None and both["usage"]["completion_tokens"] == len(clear.made.tokens) > 0
        assert given["lfm"]["finish_reason"] == clear.made.finish_reason
        chat = [{"role": "user", "content": UNCLEAR}]
        message = post(address, {"messages": chat}, "/v1/chat/completions").json()["choices"][0]["message"]
        assert message["content"] == message["refusal"] == REFERRAL
        events = post(address, {"prompt": UNCLEAR, "stream": True}).text.split("\n\n")
        chunks = [json.loads(each[6:])["choices"][0] for each in events if each.startswith("data: {")]
        assert [chunk["text"] for chunk in chunks] == [REFERRAL], "nothing is given before it is judged"
        for key, value in {
            **{"temperature": 0.7, "max_tokens": 5, "logprobs": 1, "n": 2, "stop": "b", "top_k": 3},
            **{"lfm": {"picture_every": 1}, "prompt": [1, 2]},
        }.items():
            refused = post(address, {"prompt": CLEAR, key: value})
            assert refused.status_code == 400 and "in medical mode" in refused.text.replace(
                "with medical", "in medical"
            )
        turns = [*chat, {"role": "assistant", "content": "blood"}, *chat]
        refused = post(address, {"messages": turns}, "/v1/chat/completions")
        assert refused.status_code == 400 and "each question is asked by itself" in refused.text
        refused = post(address, {"prompt": "  "})
        assert refused.status_code == 400 and "question 1 is empty; ask something" in refused.text
        assert post(address, {"prompt": CLEAR, "max_tokens": 10**6}).status_code == 400, "the server's own limit"
        stream = post(address, {"messages": chat, "stream": True}, "/v1/chat/completions").text
        assert json.dumps(REFERRAL)[1:-1] in stream and '"refusal": ' in stream


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--medical",), "lfm medical fit"),
        (("--medical", "--int8"), "--int8 changes the model's"),
        (("--medical", "--max-new-tokens", 5), "max_new_tokens=5 is less than the 48 that answers in medical mode"),
        (("--safety-threshold", 0.9), "--safety-threshold 0.9 is of medical mode, which is off; add --medical"),
    ],
)
def test_a_server_in_medical_mode_needs_calibrated_heads(trained, calibrated, said, flags, sentence):
    run = calibrated if len(flags) > 1 else trained.run
    code, _, err = said(serve, "--checkpoint", run, "--port", 0, *flags, *CPU)
    assert code == 2 and sentence in err and "serving at" not in err


def test_the_run_s_configuration_switches_it_on_and_flags_override(calibrated, said, tmp_path):
    """Without calibrated heads such a run gives no text."""
    from tests.training.tiny_run import rewrite_manifest

    run = run_of(type("T", (), {"run": calibrated}), tmp_path)
    shutil.rmtree(run / "medical")
    checkpoint = run / "checkpoints/step_00000100"
    config = json.loads((checkpoint / "manifest.json").read_bytes())["config"]
    rewrite_manifest(checkpoint, config=config | {"medical": {"mode": True, "safety_threshold": 0.9}})
    code, out, err = said(generate, "--checkpoint", run, "--prompt", "clot", *CPU)
    assert (code, out) == (2, "") and "needs a calibrated head" in err
    with pytest.raises(UserError, match="without a calibrated probability is not given"):
        load(run, device="cpu").generate("clot")
    code, out, err = said(
        generate, "--checkpoint", run, "--prompt", "clot", "--no-medical", "--max-new-tokens", 2, *CPU
    )
    assert code == 0 and out.startswith("clot")


def test_the_library_asks(calibrated):
    model = load(calibrated, device="cpu", medical_mode=True, medical_safety_threshold=0.6)
    clear = model.ask(CLEAR, options=sets.LABELS)
    assert clear.answer == "blood" and clear.decision.probability > 0.6
    (one, other) = model.ask([CLEAR, UNCLEAR])
    assert one.answer == "blood" and other.decision.probability < one.decision.probability


def test_evidence_ranks_words_and_brings_its_faithfulness(calibrated, said, tmp_path):
    prompt = "clot unspecified plasma\nChapter:"
    page = tmp_path / "evidence.html"
    options = [word for label in sets.LABELS for word in ("--option", label)]
    code, out, err = said(
        medical, "evidence", "--checkpoint", calibrated, "--prompt", prompt, *options, "--out", page, *CPU
    )
    assert code == 0, err
    for method in ("drive", "embedding", "attention", "random"):
        assert f"{method} " in out and "comprehensiveness" in out and "sufficiency" in out
    assert "by gradient times drive: no reason and no source" in page.read_text(encoding="utf-8")
    asked = ("evidence", "--checkpoint", calibrated, "--prompt", prompt, *options, "--out", page, *CPU)
    code, by_attention, err = said(medical, *asked, "--by", "attention")
    assert code == 0 and "by attention weights: no reason" in page.read_text(encoding="utf-8"), err
    model, tokenizer, _ = open_model(calibrated, device="cpu")
    (found,) = evidence(model, tokenizer, [(prompt, " blood")])
    for by, text in (("drive", out), ("attention", by_attention)):
        best = max(found.ranked(by), key=lambda item: item[0])
        assert best == found.ranked(by)[0] and f"{best[0]:+9.4f}  {best[1].text.strip()}" == text.splitlines()[1]
    without = Evidence(found.text, found.answer, found.spans, {"drive": found.scores["drive"]}, {})
    with pytest.raises(UserError, match="--by attention: this model has no attention; choose by drive or embedding"):
        without.ranked("attention")


def test_the_report_is_one_page_with_all_baselines(calibrated, trained, said, tmp_path):
    counts = {"train": 8, "validation": 8, "test": 120}
    other = sets.labelled(tmp_path / "shifted", kind="gcide", unsure=0.9, per_part=counts)
    out = tmp_path / "report.json"
    arguments = (
        "--checkpoint",
        calibrated,
        "--medical",
        "--data",
        trained.data,
        "--shifted",
        other,
        "--out",
        out,
        *CPU,
    )
    fewer = ("--splits", 20, "--resamples", 5, "--evidence-questions", 6, "--safety-threshold", 0.6)
    code, text, err = said(evaluate, *arguments, *fewer, "--out", out, *CPU)
    assert code == 0, err
    found = json.loads(out.read_bytes())
    assert found["safety_threshold"] == 0.6 and "threshold: asked for 0.6, certified" in text
    assert set(found["measures"]) == {
        *("head", "head without liquid states", "head at the question", "base rate", "option probability"),
        *(
            "sequence log-probability",
            "mean token log-probability",
            "P(True)",
            "agreement of samples",
            "semantic entropy",
        ),
    }
    assert found["measures"]["head"]["auroc"][0] > 0.65 and found["measures"]["head"]["ece"][0] < 0.15
    assert found["evidence"]["questions"] == 6 and found["shifted"]["sources"] == ["gcide"]
    rows = from_lines(tmp_path / "report.predictions.jsonl")
    assert len(rows) == sum(found["questions"].values())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3 and "the guarantee is void" in page and "not a medical device" in page
    assert "AUROC" in text and "not a medical device" in text
    copies = "note: questions with the words of an earlier one of another group: "
    assert copies in text and copies in page, "the set has few words, and says one thing often"
    assert all(at["wrong"] <= at["answered"] for row in found["by_specialty"] for at in [row["at_certified_threshold"]])
    assert (
        sum(row["at_certified_threshold"]["answered"] for row in found["by_source"])
        == (found["at_certified_threshold"]["answered"])
    )
    code, _, err = said(evaluate, *arguments[:5], "--shifted", trained.data, "--out", out, *CPU)
    assert code == 2 and "--shifted has the test questions of --data: nothing is shifted" in err


def test_heads_that_are_dropped_are_told(calibrated, trained, said, tmp_path):
    run = run_of(type("T", (), {"run": calibrated}), tmp_path)
    path = stored_at(run / "checkpoints/step_00000100")
    fit = ("fit", "--checkpoint", run, "--data", trained.data, "--max-questions", 60, *CPU)
    for damage, words in ((in_half, "they read bfloat16, and this model has float32"), (edited, "was changed or is")):
        damage(path)
        code, out, err = said(medical, *fit)
        assert code == 0 and "all heads stored here before are dropped: " in out and words in out, err
        assert set(json.loads(path.read_bytes())["tasks"]) == {"choice"}
        shutil.copy(stored_at(calibrated / "checkpoints/step_00000100"), path)


def test_training_lines_are_of_the_training_part_alone(trained, said, tmp_path):
    code, _, err = said(medical, "lines", "--data", trained.data, "--out", tmp_path / "lines.jsonl")
    assert code == 0, err
    assert len((tmp_path / "lines.jsonl").read_text(encoding="utf-8").splitlines()) == 1200


def tampered(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def edited(path):
    tree = json.loads(path.read_bytes())
    tree["tasks"]["choice"]["calibration"]["certificate"]["threshold"] = 0.01
    path.write_text(json.dumps(tree), encoding="utf-8")


def of_another(path):
    from lfm.files import json_checksum

    tree = json.loads(path.read_bytes()) | {"manifest_sha256": "0" * 64}
    path.write_text(json.dumps(tree | {"checksum": json_checksum(tree)}), encoding="utf-8")


def in_half(path):
    from lfm.files import json_checksum

    tree = json.loads(path.read_bytes()) | {"dtype": "bfloat16"}
    path.write_text(json.dumps(tree | {"checksum": json_checksum(tree)}), encoding="utf-8")


def uncalibrated(path):
    from lfm.files import json_checksum

    tree = json.loads(path.read_bytes())
    tree["tasks"]["choice"]["calibration"] = None
    path.write_text(json.dumps(tree | {"checksum": json_checksum(tree)}), encoding="utf-8")


def of_an_earlier_version(path):
    from lfm.files import json_checksum

    tree = json.loads(path.read_bytes()) | {"format": 1}
    path.write_text(json.dumps(tree | {"checksum": json_checksum(tree)}), encoding="utf-8")


DAMAGE = {
    "missing": (lambda path: path.unlink(), "needs a calibrated head, and there is no"),
    "tampered_tensors": (
        lambda path: tampered(path.with_suffix(".safetensors")),
        "was changed or is damaged: its hash",
    ),
    "missing_tensors": (lambda path: path.with_suffix(".safetensors").unlink(), "cannot be read"),
    "edited_record": (edited, "its checksum does not match its contents"),
    "no_json": (lambda path: path.write_text("x"), "is no record of a head"),
    "another_checkpoint": (of_another, "is of another checkpoint than"),
    "uncalibrated": (uncalibrated, "for answers of kind choice is fitted and not calibrated; lfm medical calibrate"),
    "earlier_version": (of_an_earlier_version, "is of an earlier version, whose heads read other numbers; fit and"),
    "another_dtype": (in_half, "calibrated with a backbone in bfloat16, and here it computes in float32"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_nothing_is_answered_with_a_head_that_does_not_fit(case, calibrated, said, tmp_path):
    damage, words = DAMAGE[case]
    run = run_of(type("T", (), {"run": calibrated}), tmp_path)
    damage(stored_at(run / "checkpoints/step_00000100"))
    code, out, err = said(generate, "--checkpoint", run, "--medical", "--prompt", CLEAR, *OPTIONS, *CPU)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1, err


REFUSED = {
    "threshold_1": (("--prompt", CLEAR, *OPTIONS, "--safety-threshold", 1.0), "safety_threshold = 1"),
    "threshold_0": (("--prompt", CLEAR, *OPTIONS, "--safety-threshold", 0), "safety_threshold = 0"),
    "empty_prompt": (("--prompt", " ", *OPTIONS), "a prompt is empty"),
    "one_option": (("--prompt", CLEAR, "--option", "blood"), "leave nothing to choose"),
    "empty_option": (("--prompt", CLEAR, "--option", "blood", "--option", ""), "an option is empty"),
    "int8": (("--prompt", CLEAR, *OPTIONS, "--int8"), "--int8 changes the model's probabilities"),
    "plasticity": (
        ("--prompt", CLEAR, *OPTIONS, "--no-plasticity"),
        "--no-plasticity changes the model's probabilities",
    ),
    "sampling": (("--prompt", CLEAR, *OPTIONS, "--temperature", 0.3), "temperature=0.3 does not go with medical mode"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_question_that_cannot_be_judged_is_refused(case, calibrated, said):
    arguments, words = REFUSED[case]
    code, out, err = said(generate, "--checkpoint", calibrated, "--medical", "--json", *CPU, *arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1, err


def test_options_without_the_mode_and_a_state_with_it_are_refused(calibrated, said, tmp_path):
    code, _, err = said(generate, "--checkpoint", calibrated, "--prompt", CLEAR, *OPTIONS, *CPU)
    assert code == 2 and "options are for medical mode" in err
    code, _, err = said(chat, "--checkpoint", calibrated, "--medical", "--state", tmp_path / "state", *CPU)
    assert code == 2 and "--state" in err


def test_too_few_questions_for_the_guarantee_says_how_many_are_needed(calibrated, trained, said):
    arguments = ("--checkpoint", calibrated, "--data", trained.data, *CPU)
    code, _, err = said(medical, "calibrate", *arguments, "--risk", 0.01, "--delta", 0.01)
    assert code == 2 and "takes 459 answered ones at least, all right; give 918 groups" in err


def test_calibrating_without_a_head_is_refused(trained, said):
    code, _, err = said(medical, "calibrate", "--checkpoint", trained.run, "--data", trained.data, *RISK, *CPU)
    assert code == 2 and "there is no" in err and "lfm medical fit" in err


def test_a_report_on_other_questions_than_the_calibration_s_is_refused(calibrated, said, tmp_path):
    other = sets.labelled(tmp_path / "other", kind="gcide")
    code, _, err = said(evaluate, "--checkpoint", calibrated, "--medical", "--data", other, *CPU)
    assert code == 2 and "another calibration part than the heads were calibrated on" in err
    code, _, err = said(evaluate, "--checkpoint", calibrated, "--shifted", other, *CPU)
    assert code == 2 and "are of --medical, which is not given" in err


def test_a_head_reads_how_likely_the_whole_answer_is(trained):
    model, tokenizer, _ = open_model(trained.run, device="cpu")
    questions = open_questions([trained.data]).parts["fit"][:20]
    answered = answer(model, tokenizer, questions, "choice")
    assert answered.answer.scalars[:, 0].numpy() == pytest.approx(answered.log_probability, rel=1e-5)
    assert (answered.answer.scalars[:, 1].numpy() >= answered.log_probability - 1e-6).all()


def test_a_report_on_groups_that_the_head_learnt_from_is_refused(calibrated, trained, said, tmp_path):
    """Of a set that was divided anew: its calibration part is the same, its test part has groups of the fit part."""
    other = tmp_path / "divided_anew"
    shutil.copytree(trained.data, other)
    of_fit = {question.group for question in open_questions([trained.data]).parts["fit"]}
    files = {name: other / f"{name}.jsonl" for name in ("validation", "test")}
    rows = {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files.items()}
    moved = [row for row in rows["validation"] if row["group"] in of_fit]
    sets.lines(files["validation"], [row for row in rows["validation"] if row["group"] not in of_fit])
    sets.lines(files["test"], rows["test"] + moved)
    code, _, err = said(evaluate, "--checkpoint", calibrated, "--medical", "--data", other, *CPU)
    assert code == 2 and err.count("\n") == 1
    assert f"{len(of_fit)} of" in err and "groups of the test part were in the fit part of" in err


def test_a_calibration_on_groups_that_the_head_learnt_from_is_refused(trained):
    questions = open_questions([trained.data])
    fit, rest = questions.parts["fit"], questions.parts["calibration"]
    of_fit = data_of("fit", questions, np.ones(len(fit), bool))
    check_apart(rest, "calibration", ("fit", of_fit))
    with pytest.raises(UserError, match=r"^1 of \d+ groups of the calibration part were in the fit part of"):
        check_apart([*rest, fit[0]], "calibration", ("fit", of_fit))


def test_one_answer_is_judged_as_among_others(calibrated, trained):
    model, tokenizer, _ = open_model(calibrated, device="cpu")
    questions = open_questions([trained.data]).parts["test"][:40]
    together = answer(model, tokenizer, questions, "choice", batch_size=16)
    alone = answer(model, tokenizer, questions[7:8], "choice")
    for name in ("hidden", "liquid", "scalars"):
        assert torch.allclose(getattr(together.answer, name)[7:8], getattr(alone.answer, name), atol=1e-4)
    # The answer's own score, read with its prompt, is that of the option, which was filled up beside longer ones.
    best = [float(options.max()) for options in together.options]
    assert best == pytest.approx(together.log_probability.tolist(), abs=1e-4)
    assert together.options[7] == pytest.approx(alone.options[0], abs=1e-4)


def test_a_question_without_room_for_its_options_is_refused(calibrated, said):
    long = "clot " * 200
    code, _, err = said(generate, "--checkpoint", calibrated, "--medical", "--prompt", long, *OPTIONS, *CPU)
    assert code == 2 and "the context is 64" in err


@pytest.mark.parametrize("blank", ["{} ", "  {}", "{}\r", "{}\n", "\t{}", "{}\u3000", "{}\x85"], ids=ascii)
def test_blanks_around_options_change_nothing(blank, calibrated):
    """Other texts than those that were calibrated would be other options."""
    mode = MedicalMode(*open_model(calibrated, device="cpu"), MedicalConfig(mode=True), {"choice"})
    options = [label.strip() for label in sets.LABELS]
    plain, blanks = mode.ask([CLEAR] * 2, [options, [blank.format(option) for option in options]])
    assert plain.answer == blanks.answer is not None
    # Two rows of one batch may differ in their last digits, by where a kernel's vectors begin.
    one, other = plain.decision.record(), blanks.decision.record()
    assert one == pytest.approx(other, abs=1e-6)


def test_the_least_likely_answer_is_given_by_no_head(calibrated, trained):
    """A wrong answer of which the model is sure that it is wrong."""
    model, tokenizer, checkpoint = open_model(calibrated, device="cpu")
    questions = open_questions([trained.data]).parts["test"][:60]
    answered = answer(model, tokenizer, questions, "choice")
    worst = [q.options[int(o.argmin())] for q, o in zip(questions, answered.options, strict=True)]
    prompts = prompt_ids(model, tokenizer, [q.text for q in questions])
    _, of_worst = read_answers(model, prompts, [tokenizer.encode(text) for text in worst], batch_size=32)
    calibrated_heads = open_calibrated(checkpoint, "choice", model.embedding.weight.dtype)
    decisions = calibrated_heads.decide(answered.question, of_worst, MedicalConfig(mode=True, safety_threshold=0.5))
    assert not any(decision.answered for decision in decisions)
    assert sum("less likely than all" in decision.reason for decision in decisions) > 50


def test_what_is_no_text_is_no_question(calibrated):
    asked = load(calibrated, device="cpu", medical_mode=True)
    for prompts, options in (([5], ["a", "b"]), ("q", "abc"), ("q", [1, 2])):
        with pytest.raises(UserError, match=r"give a text, and a list of texts$"):
            asked.ask(prompts, options)


def test_a_bad_line_among_prompts_is_named_before_anything_is_answered(calibrated, said, tmp_path):
    lines = [{"prompt": CLEAR, "options": sets.LABELS}] * 3 + [{"prompt": CLEAR, "options": ["x", "x"]}]
    sets.lines(tmp_path / "p.jsonl", lines)
    code, out, err = said(generate, "--checkpoint", calibrated, "--medical", "--prompts", tmp_path / "p.jsonl", *CPU)
    assert code == 2 and "probability of being right" not in out
    assert "line 4 of " in err and "leave nothing to choose" in err and err.count("\n") == 1


def test_as_many_options_as_were_calibrated(calibrated):
    mode = MedicalMode(*open_model(calibrated, device="cpu"), MedicalConfig(mode=True), {"choice"})
    form = Form(has_others=True, fewest_options=3, most_options=4)
    judge = dataclasses.replace(mode.calibrated["choice"], form=form)
    assert judge.other_form("q", ["a", "b"]) == "it has 2 options, and questions of the calibration have 3 to 4"
    assert judge.other_form("q", ["a", "b", "c"]) is None


@pytest.mark.parametrize(
    ("risk", "delta", "words"), [(0.2549, 0.0049, "25.49% with confidence 99.51%"), (0.004, 1e-3, "0.4% with")]
)
def test_no_number_is_rounded_to_a_safer_one(risk, delta, words, calibrated):
    mode = MedicalMode(*open_model(calibrated, device="cpu"), MedicalConfig(mode=True), {"choice"})
    judge = mode.calibrated["choice"]
    of = dataclasses.replace(judge, certificate=dataclasses.replace(judge.certificate, risk=risk, delta=delta))
    assert f"risk at most {words}" in of.words(mode.medical)[0]
    sure = Decision(True, 0.99999, None, 0.85, 0.85, None, "")
    assert shown_answer("x", sure) == "x [probability of being right 0.99]"


def test_one_word_has_no_evidence_and_is_no_error(calibrated, said, tmp_path):
    code, out, _ = said(medical, "evidence", "--checkpoint", calibrated, "--prompt", "clot", *OPTIONS, *CPU)
    assert code == 0 and "1 prompts are one word" in out
    model, tokenizer, _ = open_model(calibrated, device="cpu")
    assert evidence(model, tokenizer, [("clot", " blood")]) == []
    assert faithfulness([]) == {"questions": 0}


@pytest.mark.parametrize(
    "place, numbers",
    [
        (("certificate",), {"answered": 3, "wrong": 4}),
        (("certificate",), {"answered": 0, "wrong": 0}),
        (("scalings", "correct"), {"answer_weight": -1.0}),
        (("scalings", "correct"), {"head_weight": None}),
        (("scalings", "known"), {"answer_weight": 5.0}),
    ],
    ids=str,
)
def test_numbers_that_certify_nothing_are_no_calibration(place, numbers, calibrated, said, tmp_path):
    from lfm.files import json_checksum

    run = run_of(type("T", (), {"run": calibrated}), tmp_path)
    path = stored_at(run / "checkpoints/step_00000100")
    tree = json.loads(path.read_bytes())
    edited = tree["tasks"]["choice"]["calibration"]
    for key in place:
        edited = edited[key]
    edited |= numbers
    tree["checksum"] = json_checksum(tree)
    path.write_text(json.dumps(tree), encoding="utf-8")
    code, out, err = said(generate, "--checkpoint", run, "--medical", "--prompt", CLEAR, *OPTIONS, *CPU)
    assert (code, out) == (2, "") and "is no record of a head" in err and err.count("\n") == 1


def test_nothing_that_is_read_is_written_over(calibrated, trained, said):
    place = trained.data / "train.jsonl"
    before = place.read_bytes()
    code, _, err = said(medical, "lines", "--data", trained.data, "--out", place)
    assert code == 2 and "is among the files of" in err and place.read_bytes() == before
    of = ("--checkpoint", calibrated, "--medical", "--data", trained.data, *CPU)
    heads = stored_at(calibrated / "checkpoints/step_00000100")
    for out, words in ((trained.data / "labels.json", "is among the files of"), (heads, "is where the heads are")):
        before = out.read_bytes()
        code, _, err = said(evaluate, *of, "--out", out)
        assert code == 2 and words in err and out.read_bytes() == before
