"""chat.py and plasticity.py as a user starts them, on runs of one step."""

import contextlib
import fcntl
import io
import json
import os
import re
import select
import signal
import stat
import subprocess
import termios
import time

import pytest
import torch

from lfm.training.loop import train
from tests.launch.test_launch import assert_refused, main  # noqa: F401  (main is a fixture)
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


@pytest.fixture
def chat(lfm):
    def call(checkpoint, lines: bytes, *flags):
        return lfm("chat", "--checkpoint", checkpoint, "--max-new-tokens", 3, *flags, lines=lines)

    return call


def test_a_chat_keeps_its_state_across_turns_and_sessions(folder, tmp_path, chat):
    state = tmp_path / "state"
    lines = b"import os\n/state\ndef f\xff(\nclass A\n/hebb\n/help\n"
    first = chat(folder("laerc"), lines, "--state", state)
    assert first.returncode == 0, first.stderr
    text = first.stdout
    read = [int(count) for count in re.findall(r"(\d+) tokens read", text)]
    assert "state 0.2 KiB, constant, 0 tokens read" in text  # 2 layers x 32 units x 4 bytes
    assert "reservoirs.1 [1, 32], RMS" in text and "laerc has no plastic cells" in text and "/quit ends" in text
    errors = first.stderr.splitlines()
    assert len(errors) == 1 and "is not valid UTF-8" in errors[0]
    # Greeting, turn, /state, the refused line, turn: nothing of the refused line was read.
    assert read[0] == 0 and read[1] == read[2] == read[3] < read[4]
    second = chat(folder("laerc"), b"/reset\n/quit\nnever read\n", "--state", state)
    again = [int(count) for count in re.findall(r"(\d+) tokens read", second.stdout)]
    assert again == [read[4], 0]


def test_a_full_context_names_the_way_to_make_room(folder, chat):
    found = chat(folder("transformer"), b"x y " * 100 + b"\n" + b"x y z\n" * 20 + b"/reset\nx\n")
    first, *others = found.stderr.splitlines()
    assert re.fullmatch(r"error: 0 \+ \d+ tokens leave no room in the context of \d+; type less", first), first
    assert others and all(line.endswith("; /reset forgets what was read and makes room") for line in others)
    assert found.returncode == 0 and not found.stdout.endswith(", 0 tokens read]\n")


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
            env=os.environ | {"PYTHONFAULTHANDLER": "1"},
            # Whatever the tests were started by: `nohup make test` ignores it.
            preexec_fn=lambda way=way: signal.signal(
                signal.SIGHUP, signal.SIG_IGN if "ignored" in way else signal.SIG_DFL
            ),
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
        try:
            assert talk.wait(60) == 0 or WAYS_OUT[way] is None, talk.stderr.read()
        except subprocess.TimeoutExpired:
            talk.send_signal(signal.SIGABRT)
            pytest.fail(f"{way}: still there, at {talk.stderr.read().decode()}")
        saved = (tmp_path / f"state{i}").read_bytes().split(b"\n", 2)[2]  # behind the header and the checksum
        kept = torch.load(io.BytesIO(saved), weights_only=True)
        assert kept["num_tokens"] > 0, way
        for pipe in (talk.stdin, talk.stdout, talk.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


AS_A_LINE_IS_WAITED_FOR = """
import os, random, signal, threading, time
from lfm.commands.chat import _Stopped, _stop_signals

def stop_soon(waiting, stopped):
    waiting.wait()
    end = time.perf_counter() + random.random() * 60e-6
    while time.perf_counter() < end:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    if not stopped.wait(20):
        os._exit(1)

for _ in range(40):
    waiting, stopped = threading.Event(), threading.Event()
    thread = threading.Thread(target=stop_soon, args=(waiting, stopped))
    thread.start()
    with _stop_signals() as stop:
        try:
            with stop.while_waiting():
                waiting.set()
                input()
        except _Stopped:
            stopped.set()
    thread.join()
"""


def test_a_signal_is_not_lost_as_the_program_begins_to_wait():
    # One in six was, before each was followed by another.
    command = [PYTHON, "-c", AS_A_LINE_IS_WAITED_FOR]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as process:
        assert process.wait(60) == 0


class Terminal:
    """A chat at a terminal of its own."""

    def __init__(self, home, checkpoint, *flags):
        self.end, user = os.openpty()
        command = [PYTHON, "launch/chat.py", "--checkpoint", checkpoint, *flags]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=user,
            stdout=user,
            stderr=user,
            cwd=ROOT,
            env=os.environ | {"XDG_STATE_HOME": str(home), "TERM": "dumb"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(user, termios.TIOCSCTTY, 0),
        )
        os.close(user)
        self.seen = ""

    def type(self, text):
        # A signal that comes before the terminal is waited for is seen with the next key, which no person is fast
        # enough for.
        keys, interrupt, rest = text.partition("\x03")
        assert not rest
        os.write(self.end, keys.encode())
        if interrupt:
            time.sleep(0.3)
            os.write(self.end, interrupt.encode())

    def wait_for(self, pattern):
        """Until the pattern is printed; what stands before it and what it is, which are not seen again."""
        until = time.monotonic() + 30
        while not (found := re.search(pattern, self.seen, re.S)):
            assert select.select([self.end], [], [], until - time.monotonic())[0], self.seen
            self.seen += os.read(self.end, 4096).decode(errors="replace")
        self.seen = self.seen[found.end() :]
        return found

    def leave(self):
        code = self.process.wait(60)
        os.close(self.end)
        return code


def test_at_a_terminal_ctrl_c_ends_the_reply_and_lines_are_edited_and_remembered(folder, tmp_path):
    history = tmp_path / "home/lfm/chat_history"
    talk = Terminal(tmp_path / "home", folder("lstm"), "--max-new-tokens", 10**9, "--state", tmp_path / "state")
    talk.wait_for("0 tokens read.*> ")
    talk.type("impart os\x1b[D\x1b[D\x1b[D\x1b[D\x1b[D\x7fo\r")  # the cursor goes left, to mend the word
    talk.wait_for("impart os")
    talk.wait_for("[^\n]*\n[^\n]+")  # a reply that would not end
    talk.type("\x03")
    first = int(talk.wait_for(r"\[state [^\n]* (\S+) tokens read\]")[1].replace(",", ""))
    talk.wait_for("> ")
    talk.type("dropped\x03")
    talk.wait_for("> ")
    talk.type("/state\r")
    assert int(talk.wait_for(r" (\S+) tokens read")[1].replace(",", "")) == first > 0
    talk.wait_for("> ")
    talk.type("\x03")
    talk.wait_for(r"\(Ctrl-C again leaves\)[^>]*> ")
    talk.type("/hebb\r")
    talk.wait_for("no plastic cells[^>]*> ")
    talk.type("\x03")
    talk.wait_for(r"again leaves\)[^>]*> ")
    talk.type("\x03")
    assert talk.leave() == 0
    saved = torch.load(io.BytesIO((tmp_path / "state").read_bytes().split(b"\n", 2)[2]), weights_only=True)
    assert saved["num_tokens"] == first
    assert history.read_text() == "import os\n/state\n/hebb\n"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600

    history.write_text("old\n" * 2000)
    again = Terminal(tmp_path / "home", folder("lstm"), "--max-new-tokens", 2)
    again.wait_for("> ")
    again.type("\x1b[A\r")  # the line before
    again.wait_for("tokens read\\][^>]*> ")
    again.type("\x04")
    assert again.leave() == 0
    assert history.read_text() == "old\n" * 1000

    (tmp_path / "file").write_text("")
    silent = Terminal(tmp_path / "file", folder("lstm"), "--max-new-tokens", 2)  # nothing can be kept there
    silent.wait_for("> ")
    silent.type("/state\r\x04")
    silent.wait_for("KiB")
    assert silent.leave() == 0 and "rror" not in silent.seen


def test_a_stop_text_ends_a_reply_and_is_not_shown(folder, tmp_path, monkeypatch, chat):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    flags = ("--max-new-tokens", 40, "--stop", "e", "--stop", "\n", "--stop", " ")
    found = chat(folder("lstm"), b"import os\nclass A\n", *flags)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 5  # the greeting, and each time a reply and the state
    assert not list(tmp_path.iterdir()), "what is not typed is no history"


@pytest.mark.slow
def test_a_chat_of_plastic_cells_shows_their_traces(folder, chat):
    talks = {
        flags: chat(folder("liquidnn"), b"import os\n/hebb\n", *flags).stdout for flags in ((), ("--no-plasticity",))
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


def test_the_state_of_another_run_is_refused(folder, tmp_path, chat, lfm):
    state = tmp_path / "state"
    assert chat(folder("lstm"), b"x\n", "--state", state).returncode == 0
    assert_refused(lfm("chat", "--checkpoint", folder("laerc"), "--state", state), "is of another model")


def test_the_plasticity_probe_writes_its_words_intervals_and_plot(folder, tmp_path, lfm):
    command = ["plasticity", "--checkpoint", folder("liquidnn"), "--words", 8, "--out", tmp_path / "new/folder"]
    found = lfm(*command)
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
    again = lfm(*command)
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
