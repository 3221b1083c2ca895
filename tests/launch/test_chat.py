"""chat.py and plasticity.py as a user starts them, on runs of one step."""

import json
import re
import subprocess

import pytest

from lfm.training.loop import train
from tests.launch.test_launch import assert_refused, main, run  # noqa: F401  (main is a fixture)
from tests.training.test_families import run_of
from tests.training.tiny_run import PYTHON, ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_data):
    """Run folders by family."""

    def of(kind):
        made = run_of(kind, base, text_data, "training.steps=1", "validation.max_rows=1")
        if not made.folder.exists():
            train(made)
        return made.folder

    base = tmp_path_factory.mktemp("chat")
    return of


def chat(checkpoint, lines: bytes, *flags):
    command = [PYTHON, "launch/chat.py", "--checkpoint", checkpoint, "--max-new-tokens", 3, *flags]
    return subprocess.run([str(part) for part in command], input=lines, capture_output=True, cwd=ROOT)


def test_a_chat_keeps_its_state_across_turns_and_sessions(folder, tmp_path):
    state = tmp_path / "state"
    lines = b"import os\n/state\ndef f\xff(\nclass A\n/hebb\n/help\n"
    first = chat(folder("laerc"), lines, "--state", state)
    assert first.returncode == 0, first.stderr
    text = first.stdout.decode()
    read = [int(count) for count in re.findall(r"(\d+) tokens read", text)]
    assert "state 0.2 KiB, constant, 0 tokens read" in text  # 2 layers x 32 units x 4 bytes
    assert "reservoirs.1 [1, 32], RMS" in text and "laerc has no plastic cells" in text and "/quit ends" in text
    errors = first.stderr.decode().splitlines()
    assert len(errors) == 1 and "is not valid UTF-8" in errors[0]
    # Greeting, turn, /state, the refused line, turn: nothing of the refused line was read.
    assert read[0] == 0 and read[1] == read[2] == read[3] < read[4]
    second = chat(folder("laerc"), b"/reset\n/quit\nnever read\n", "--state", state)
    again = [int(count) for count in re.findall(r"(\d+) tokens read", second.stdout.decode())]
    assert again == [read[4], 0]


def test_a_chat_of_plastic_cells_shows_their_traces(folder):
    talks = {
        flags: chat(folder("liquidnn"), b"import os\n/hebb\n", *flags).stdout.decode()
        for flags in ((), ("--no-plasticity",))
    }
    norms = {flags: re.findall(r"deep cell 0: \|M_ih\| (\S+), \|M_hh\| (\S+)", text) for flags, text in talks.items()}
    assert all(float(norm) > 0 for norm in norms[()][0])
    assert all(float(norm) == 0 for norm in norms["--no-plasticity",][0])


BAD_TALK = {
    "foreign_state": (["--state", "FILE"], "is not a saved state"),
    "no_plasticity": (["--no-plasticity"], "--no-plasticity is for kind liquidnn, and this is a model of kind laerc"),
    "temperature": (["--temperature", "0"], r"temperature=0.0 is below 0.001"),
    "no_checkpoint": (["--checkpoint", "/no/run"], "neither a checkpoint nor a run folder"),
}


@pytest.mark.parametrize("case", BAD_TALK)
def test_a_bad_chat_is_refused_in_one_sentence(case, folder, tmp_path, main):  # noqa: F811
    flags, words = BAD_TALK[case]
    (tmp_path / "file").write_text("text")
    flags = [str(tmp_path / "file") if flag == "FILE" else flag for flag in flags]
    assert_refused(main("chat", "--checkpoint", folder("laerc"), *flags), words)


def test_a_growing_state_is_not_kept(folder, tmp_path, main):  # noqa: F811
    refused = main("chat", "--checkpoint", folder("transformer"), "--state", tmp_path / "state")
    assert_refused(refused, "the state of transformer grows with its text")


def test_the_state_of_another_run_is_refused(folder, tmp_path, text_data, main):  # noqa: F811
    state = tmp_path / "state"
    assert chat(folder("lstm"), b"x\n", "--state", state).returncode == 0
    assert_refused(main("chat", "--checkpoint", folder("laerc"), "--state", state), "is of another model")


def test_the_plasticity_probe_writes_its_words_intervals_and_plot(folder, tmp_path):
    command = ["launch/plasticity.py", "--checkpoint", folder("liquidnn"), "--words", 6, "--out", tmp_path]
    found = run(PYTHON, *command)
    assert found.returncode == 0, found.stderr
    assert "text, plasticity on against text, plasticity off" in found.stdout and "95%" in found.stdout
    content = json.loads((tmp_path / "plasticity.json").read_text())
    words = [word["word"] for word in content["words"]]
    assert len(set(words)) == 6 and (tmp_path / "plasticity.png").stat().st_size > 10_000
    for word in content["words"]:
        nothing, off, on, traces = word["probability"]
        assert len({nothing, off, on, traces}) == 4 and all(0 < p < 1 for p in word["probability"])
    for comparison in content["comparisons"]:
        low, high = comparison["interval"]
        assert low <= comparison["difference"] <= high
    again = run(PYTHON, *command)
    assert again.stdout == found.stdout


def test_a_probe_of_a_family_without_plasticity_is_refused(folder, main):  # noqa: F811
    assert_refused(main("plasticity", "--checkpoint", folder("laerc")), "model.kind=laerc has no plasticity")
    assert_refused(main("plasticity", "--checkpoint", folder("liquidnn"), "--words", 1), "--words 1 gives no interval")


COUNTS = {
    "laerc_shakespeare": "total 3,814,856  trainable 3,485,128  frozen 329,728",
    "liquidlm": "total 153,363,545  trainable 149,165,145  frozen 4,198,400",
    "liquidnn_base": "total 14,707,472  trainable 14,707,472  frozen 0",
    "liquidnet_tiny": "total 11,602,368",
    "liquidnet_base": "total 104,811,264",
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_dry_run_prints_the_published_counts(name, main):  # noqa: F811
    found = main("pretrain", "--config", ROOT / f"configs/{name}.yaml", "--dry-run")
    assert found.returncode == 0 and COUNTS[name] in found.stdout, found.stderr
