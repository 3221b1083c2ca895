"""Sets of questions in their published formats, and parts that share no group."""

import json
import re
import shutil

import pytest

from lfm.errors import UserError
from lfm.medical.grading import is_right
from lfm.medical.questions import PARTS, open_questions
from tests.medical import sets


def groups(found, part):
    return {(question.source, question.group) for question in found.parts[part]}


def test_labelled_texts_ask_for_one_of_their_labels(tmp_path):
    found = open_questions([sets.labelled(tmp_path / "a"), sets.labelled(tmp_path / "b", kind="gcide")])
    first = found.parts["training"][0]
    assert first.text.endswith("\nChapter:") and first.options == tuple(f" {label}" for label in sets.LABELS)
    assert {question.kind for question in found.parts["test"]} == {
        *("icd10, residual", "icd10, specific", "gcide, residual", "gcide, specific")
    }
    assert {question.specialty for question in found.parts["test"]} == set(sets.LABELS)
    assert found.parts["test"][-1].text.endswith("\nField:")
    assert all(found.parts[part] for part in PARTS) and found.straddling == 0
    for one in PARTS:
        for other in PARTS:
            assert one == other or not groups(found, one) & groups(found, other)


def test_medmcqa(tmp_path):
    found = open_questions([sets.medmcqa(tmp_path / "medmcqa")])
    (test,) = found.parts["test"]
    assert (test.text, test.completion, test.kind) == ("Which nerve?\nAnswer:", " B two", "multi")
    assert found.straddling == 1, "the copy of a training question is left out of the test"
    assert sum(len(found.parts[part]) for part in ("training", "fit", "calibration")) == 40
    bone = next(question for part in PARTS for question in found.parts[part] if "number 6?" in question.text)
    assert (bone.completion, bone.specialty) == (" C three", "Anatomy")


def test_medqa(tmp_path):
    found = open_questions([sets.medqa(tmp_path / "medqa")])
    assert [question.completion for question in found.parts["test"]] == [" Ice", " Heat", " Ice", " Heat", " Ice"]
    assert len(found.parts["test"][0].options) == 5 and found.parts["test"][0].specialty == "step1"
    assert not any("old" in question.text for question in found.parts["fit"])


def test_equal_questions_of_several_groups_are_told(tmp_path):
    folder = sets.labelled(tmp_path / "a")
    for name in ("train", "validation", "test"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        rows = [{**json.loads(line), "text": f"{name} {number}"} for number, line in enumerate(lines)]
        sets.lines(folder / f"{name}.jsonl", rows)
    assert open_questions([folder]).words() == []
    with (folder / "test.jsonl").open("a") as file:
        file.write(json.dumps({**rows[0], "text": "Train 0.", "group": "another"}) + "\n")
        file.write(json.dumps({**rows[0], "text": "Train 0", "group": "a third"}) + "\n")
    with (folder / "validation.jsonl").open("a") as file:
        for number in range(3):
            file.write(json.dumps({**rows[0], "text": "A case", "group": f"case {number}"}) + "\n")
    (told,) = open_questions([folder]).words()
    assert told.startswith("note: questions with the words of an earlier one of another group: ")
    assert ", 2 of the test part; if" in told and sum(map(int, re.findall(r"(\d+) of the (?:fit|cal)", told))) == 2


def test_pubmedqa(tmp_path):
    found = open_questions([sets.pubmedqa(tmp_path / "pubmedqa")])
    questions = [question for part in PARTS for question in found.parts[part]]
    assert len(questions) == 40 and all(found.parts[part] for part in PARTS)
    one = next(question for question in questions if question.group == "1001")
    assert one.text == "Some were treated. Others were not.\nDoes treatment 1 help?\nAnswer:"
    assert one.options == (" yes", " no", " maybe") and one.completion == " no"


def test_a_digest_is_of_the_part(tmp_path):
    folder = sets.labelled(tmp_path / "a")
    before = open_questions([folder])
    assert before.digest("fit") == open_questions([folder]).digest("fit") != before.digest("calibration")
    assert len(before.limited("test", 7).parts["test"]) == 7


def change(folder, file, old, new):
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1), encoding="utf-8")


BAD = {
    "no_set": (sets.medqa, lambda f: [file.unlink() for file in f.iterdir()], "is no set of questions: it has neither"),
    "unknown_label": (
        sets.labelled,
        lambda f: change(f, "test.jsonl", '"label": "', '"label": "x'),
        r"line 1 of .*test.jsonl has the label 'x.*', which labels.json does not have",
    ),
    "label_that_does_not_occur": (
        sets.labelled,
        lambda f: (f / "labels.json").write_text(json.dumps([*sets.LABELS, "skin"]), encoding="utf-8"),
        "no text has the label 'skin' of labels.json",
    ),
    "empty_text": (
        sets.labelled,
        lambda f: sets.lines(f / "test.jsonl", [{"text": " ", "label": "bone", "group": "g"}]),
        "line 1 of .*test.jsonl has no text under text",
    ),
    "no_json": (sets.labelled, lambda f: change(f, "test.jsonl", "{", ""), "line 1 of .*test.jsonl is no JSON object"),
    "no_labels": (sets.labelled, lambda f: (f / "labels.json").write_text("[]"), "has no labels.json with labels"),
    "cop": (sets.medmcqa, lambda f: change(f, "dev.json", '"cop": 2', '"cop": -1'), "line 1 of .* has cop=-1"),
    "answer_idx": (
        sets.medqa,
        lambda f: change(f, "phrases_no_exclude_test.jsonl", '"answer_idx": "B"', '"answer_idx": "Z"'),
        "answer_idx='Z', which is none of its options A, B, C, D, E",
    ),
    "options": (
        sets.medqa,
        lambda f: sets.lines(f / "phrases_no_exclude_test.jsonl", [{"question": "q", "options": [1]}]),
        "has no texts under options",
    ),
    "decision": (
        sets.pubmedqa,
        lambda f: change(f, "ori_pqal.json", '"final_decision": "yes"', '"final_decision": "so"'),
        "entry 1000 of .* has final_decision='so'; it is yes, no or maybe",
    ),
    "list_as_answer": (
        sets.medqa,
        lambda f: change(f, "phrases_no_exclude_test.jsonl", '"answer_idx": "B"', '"answer_idx": ["B"]'),
        r"answer_idx=\['B'\], which is none of its options",
    ),
    "another_answer": (
        sets.medqa,
        lambda f: sets.lines(
            f / "phrases_no_exclude_test.jsonl",
            [{"question": "q", "options": {"A": "x", "B": "y"}, "answer_idx": "A", "answer": "y"}],
        ),
        "line 1 of .* has answer='y', and option A of its answer_idx is 'x'; leave the question out",
    ),
    "equal_options": (
        sets.medqa,
        lambda f: sets.lines(
            f / "phrases_no_exclude_test.jsonl",
            [{"question": "q", "options": {"A": "x", "B": " x"}, "answer_idx": "A"}],
        ),
        "line 1 of .* has options that are empty, equal or one alone",
    ),
    "labels_as_object": (
        sets.labelled,
        lambda f: (f / "labels.json").write_text("{}"),
        "has no labels.json with labels",
    ),
    "equal_labels": (
        sets.labelled,
        lambda f: (f / "labels.json").write_text('["blood", "bone", "brain", "heart", "bone"]'),
        "has no labels.json with labels, two or more",
    ),
    "half_a_character": (
        sets.labelled,
        lambda f: sets.lines(f / "test.jsonl", [{"text": "x", "label": "bone", "group": "\ud800"}]),
        "line 1 of .*test.jsonl has half a character under group",
    ),
    "half_a_character_in_a_subject": (
        sets.medmcqa,
        lambda f: change(f, "dev.json", '"subject_name": "Anatomy"', '"subject_name": "\\ud800"'),
        "line 1 of .*dev.json has half a character under subject_name",
    ),
    "half_a_character_in_an_option": (
        sets.medqa,
        lambda f: sets.lines(
            f / "phrases_no_exclude_test.jsonl",
            [{"question": "q", "options": {"A": "\ud800", "B": "x"}, "answer_idx": "B"}],
        ),
        "line 1 of .* has half a character under options",
    ),
    "half_a_character_in_a_context": (
        sets.pubmedqa,
        lambda f: change(f, "ori_pqal.json", '"CONTEXTS": ["', '"CONTEXTS": ["\\ud800'),
        "has half a character under CONTEXTS",
    ),
    "two_files_of_a_part": (
        sets.medqa,
        lambda f: (f / "another_train.jsonl").write_text("{}\n"),
        r"has 2 files \*train.jsonl \(another_train.jsonl, phrases_no_exclude_train.jsonl\); leave one",
    ),
    "contexts_of_others": (
        sets.pubmedqa,
        lambda f: change(f, "ori_pqal.json", '"CONTEXTS": [', '"CONTEXTS": [null, '),
        "something else than texts under CONTEXTS",
    ),
    "contexts": (sets.pubmedqa, lambda f: change(f, "ori_pqal.json", "CONTEXTS", "TEXT"), "no list under CONTEXTS"),
    "no_object": (sets.pubmedqa, lambda f: (f / "ori_pqal.json").write_text("[]"), "is no JSON object of abstracts"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_set_is_one_sentence(case, tmp_path):
    make, damage, words = BAD[case]
    folder = make(tmp_path / "set")
    damage(folder)
    with pytest.raises(UserError, match=words) as found:
        open_questions([folder])
    assert "\n" not in str(found.value)


def test_blanks_around_options_are_none(tmp_path):
    """As where a user asks: another text would have other probabilities."""
    folder = sets.medqa(tmp_path / "set")
    row = {"question": "q", "options": {"A": "x ", "B": "\ty\r"}, "answer_idx": "B"}
    sets.lines(folder / "phrases_no_exclude_test.jsonl", [row])
    (question,) = open_questions([folder]).parts["test"]
    assert question.options == (" x", " y") and question.completion == " y"


def test_a_copy_of_a_folder_is_refused(tmp_path):
    one = sets.medmcqa(tmp_path / "one")
    shutil.copytree(one, tmp_path / "two")
    with pytest.raises(UserError, match=r"two has the questions of .*one, and each would count twice; name one$"):
        open_questions([one, tmp_path / "two"])


def test_empty_lines_at_the_end_of_a_set_are_none(tmp_path):
    folder = sets.medmcqa(tmp_path / "set")
    before = open_questions([folder]).digest("test")
    with open(folder / "dev.json", "a", encoding="utf-8") as file:
        file.write("\n \n")
    assert open_questions([folder]).digest("test") == before


def test_a_folder_that_is_given_twice_is_refused(tmp_path):
    folder = sets.medqa(tmp_path / "set")
    with pytest.raises(UserError, match="set is given twice, and each question would count twice; name it once"):
        open_questions([folder, tmp_path / "other/../set"])


def test_a_part_without_a_question_is_refused(tmp_path):
    found = open_questions([sets.labelled(tmp_path / "a", per_part={"train": 40, "validation": 40, "test": 0})])
    with pytest.raises(UserError, match="no question for the test part"):
        found.limited("test", 0)


def test_the_grader_takes_case_punctuation_and_articles_for_nothing():
    assert is_right("The heart.", "heart") and is_right("  Blood-clot ", "blood clot")
    assert not is_right("hearts", "heart") and not is_right("the", "a")
