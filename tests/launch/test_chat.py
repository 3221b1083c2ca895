"""chat.py and plasticity.py as a user starts them, on runs of one step."""

import contextlib
import io
import json
import re
import signal
import subprocess
import time

import pytest
import torch

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


WAYS_OUT = {
    "Ctrl-C at the prompt": signal.SIGINT,
    "TERM at the prompt": signal.SIGTERM,
    "HUP at the prompt": signal.SIGHUP,
    "Ctrl-C in a reply": signal.SIGINT,
    "nobody reads the reply": None,
    "an ignored HUP, then the end of the input": signal.SIGHUP,
}


def test_a_conversation_is_kept_on_every_way_out(folder, tmp_path):
    talks = {}
    for i, way in enumerate(WAYS_OUT):
        endless = way in ("Ctrl-C in a reply", "nobody reads the reply")
        command = [PYTHON, "launch/chat.py", "--checkpoint", folder("lstm"), "--state", tmp_path / f"state{i}"]
        command += ["--max-new-tokens", 10**9 if endless else 3]
        talks[way] = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            preexec_fn=lambda way=way: signal.signal(signal.SIGHUP, signal.SIG_IGN) if "ignored" in way else None,
        )
        talks[way].stdin.write(b"import os\n")
        talks[way].stdin.flush()
    for i, (way, talk) in enumerate(talks.items()):
        assert b"tokens read" in talk.stdout.readline(), talk.stderr.read()
        if "reply" in way:
            assert talk.stdout.read(20)
        else:
            assert any(line.startswith(b"[state") for line in talk.stdout), talk.stderr.read()
        if WAYS_OUT[way] is None:
            talk.stdout.close()
        else:
            talk.send_signal(WAYS_OUT[way])
        if "ignored" in way:
            time.sleep(0.5)
            assert talk.poll() is None
            talk.stdin.close()
        assert talk.wait(60) == 0 or WAYS_OUT[way] is None, talk.stderr.read()
        saved = (tmp_path / f"state{i}").read_bytes().split(b"\n", 2)[2]  # behind the header and the checksum
        kept = torch.load(io.BytesIO(saved), weights_only=True)
        assert kept["num_tokens"] > 0, way
        for pipe in (talk.stdin, talk.stdout, talk.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


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
    command = [
        "launch/plasticity.py",
        "--checkpoint",
        folder("liquidnn"),
        "--words",
        8,
        "--out",
        tmp_path / "new/folder",
    ]
    found = run(PYTHON, *command)
    assert found.returncode == 0, found.stderr
    assert "text, plasticity on against text, plasticity off" in found.stdout and "99%" in found.stdout
    content = json.loads((tmp_path / "new/folder/plasticity.json").read_text())
    words = [word["word"] for word in content["words"]]
    assert len(set(words)) == 8 and (tmp_path / "new/folder/plasticity.png").stat().st_size > 10_000
    for word in content["words"]:
        assert len({tuple(row) for row in word["probability"]}) == 4
        assert all(len(row) == 8 and all(0 < p < 1 for p in row) for row in word["probability"])
    for comparison in content["comparisons"]:
        low, high = comparison["interval"]
        assert low <= comparison["change"] <= high
    again = run(PYTHON, *command)
    assert again.stdout == found.stdout


def test_a_probe_of_a_family_without_plasticity_is_refused(folder, main):  # noqa: F811
    assert_refused(main("plasticity", "--checkpoint", folder("laerc")), "model.kind=laerc has no plasticity")
    probe = ("plasticity", "--checkpoint", folder("liquidnn"))
    for words in (7, "1_000", 10**9, "yes"):
        assert_refused(main(*probe, "--words", words), r"words = \S+ in the command line is not legal")


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(folder, tmp_path, main):  # noqa: F811
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below", "/proc/none"):
        refused = main("plasticity", "--checkpoint", folder("liquidnn"), "--words", 100_000, "--out", out)
        assert_refused(refused, "folder .* cannot be written")
    refused = main("chat", "--checkpoint", folder("laerc"), "--state", tmp_path / "file/state")
    assert_refused(refused, "folder .* cannot be written")


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
