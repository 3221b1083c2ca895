"""`lfm serve` as a user starts it: how it starts, what it refuses, how it ends."""

import json
import pickle
import re
import shutil
import signal
import socket
import subprocess
import threading
import time

import httpx
import openai
import pytest

from lfm.training.loop import train
from tests.launch.test_launch import assert_refused, main  # noqa: F401  (main is a fixture)
from tests.training.test_families import run_of
from tests.training.tiny_run import PYTHON, ROOT, rewrite_manifest

SERVE = [PYTHON, "-m", "lfm", "serve", "--port", "0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_data):
    """Two run folders of one step."""
    base = tmp_path_factory.mktemp("served")
    made = [run_of(kind, base, text_data, "training.steps=1") for kind in ("liquidnet", "transformer")]
    for run in made:
        train(run)
    return [run.folder for run in made]


@pytest.fixture
def start(request):
    """Start the command, and return it with the lines that it says until it answers."""

    def begin(*flags):
        process = subprocess.Popen(
            [*SERVE, *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        request.addfinalizer(process.kill)
        lines = []
        assert process.stdout is not None
        while not lines or not lines[-1].startswith("curl"):
            line = process.stdout.readline()
            assert line, process.stderr.read() if process.stderr else ""
            lines.append(line.rstrip())
        return process, lines

    return begin


def test_it_starts_soon_and_says_what_works_and_term_lets_answers_finish(runs, start):
    begun = time.monotonic()
    process, lines = start("--checkpoint", runs[0], "--checkpoint", runs[1], "--max-new-tokens", 5000)
    # The 10 seconds that are promised are of a machine to itself; this one may run other tests.
    assert time.monotonic() - begun < 30
    address = re.fullmatch(r"serving at (http://127\.0\.0\.1:\d+)", lines[0])[1]
    assert lines[1] == "model liquidnet_debug: liquidnet, step 1, 12,656 parameters, any length"
    assert lines[2].startswith("model transformer_debug: transformer, step 1, ") and "context of 64 tokens" in lines[2]
    told = subprocess.run(lines[3], shell=True, capture_output=True, check=True)
    answer = json.loads(told.stdout)
    length, reason = answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]
    assert (length, reason) == (20, "length") or (0 < length < 20 and reason == "stop")  # tokens are drawn, its end too

    client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
    found, started = {}, threading.Barrier(4)

    def ask(number):
        count, stream = 1500 + number, number % 2 == 0
        if stream:
            pieces = client.completions.create(
                model="liquidnet_debug",
                prompt="a",
                max_tokens=count,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            iterator = iter(pieces)
            next(iterator)
            started.wait()
            found[number] = list(iterator)[-1].usage.completion_tokens
        else:
            started.wait()
            made = client.completions.create(model="liquidnet_debug", prompt="a", max_tokens=count, temperature=0)
            found[number] = made.usage.completion_tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    started.wait()
    while 'lfm_running{model="liquidnet_debug"} 3.0' not in httpx.get(address + "/metrics").text:
        assert not found
    process.send_signal(signal.SIGTERM)
    with pytest.raises(httpx.TransportError):
        while True:  # until nothing new is taken
            httpx.get(address + "/health")
    for thread in threads:
        thread.join()
    out, error = process.communicate(timeout=30)
    assert found == {i: 1500 + i for i in range(3)}
    assert process.returncode == 0 and error == "" and out == "served; all answers that were begun have ended\n"


def test_a_second_signal_does_not_wait(runs, start):
    process, lines = start("--checkpoint", runs[0], "--max-new-tokens", 1_000_000, "--drain-seconds", 600)
    address, found = lines[0].split()[-1], []
    body = {"prompt": "a", "max_tokens": 1_000_000, "temperature": 0}
    thread = threading.Thread(
        target=lambda: found.append(httpx.post(address + "/v1/completions", json=body, timeout=60))
    )
    thread.start()
    while 'lfm_running{model="liquidnet_debug"} 1.0' not in httpx.get(address + "/metrics").text:
        assert not found
    process.send_signal(signal.SIGTERM)
    with pytest.raises(httpx.TransportError):
        while True:
            httpx.get(address + "/health")
    process.send_signal(signal.SIGINT)
    thread.join()
    out, error = process.communicate(timeout=30)
    assert found[0].status_code == 503 and found[0].json()["error"]["code"] == "shutting_down"
    assert process.returncode == 0 and error == ""
    assert out == "served; answers that had not ended were cut off at a second signal\n"


@pytest.fixture
def refused(main):  # noqa: F811
    """Run the command; gives its sentence.  Nothing listened: no line says so."""

    def call(*flags) -> str:
        found = main("serve", "--port", 0, *flags)
        assert_refused(found, "")
        assert found.stdout == ""
        return found.stderr

    return call


def test_a_port_in_use_is_named(runs, refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be had (Address already in use)" in refused(
            "--checkpoint", runs[0], "--port", port
        )


def test_other_machines_need_a_token(runs, tmp_path, refused):
    assert "there is no token; give --token-file" in refused("--checkpoint", runs[0], "--host", "0.0.0.0")
    (tmp_path / "token").write_text("short\n", encoding="utf-8")
    assert "is not 16 or more" in refused("--checkpoint", runs[0], "--token-file", tmp_path / "token")
    assert "cannot be read" in refused("--checkpoint", runs[0], "--token-file", tmp_path / "none")


@pytest.mark.parametrize("damage", ["missing", "a flipped byte", "a pickle"])
def test_a_checkpoint_that_is_none_is_named_and_nothing_in_it_is_run(damage, runs, tmp_path, refused):
    folder = tmp_path / "run"
    marker = tmp_path / "was run"
    if damage != "missing":
        shutil.copytree(runs[0], folder)
        checkpoint = next((folder / "checkpoints").glob("step_*"))
        data = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "a pickle":

            class Runs:
                def __reduce__(self):
                    return open, (str(marker), "w")

            content = pickle.dumps(Runs())
        data.write_bytes(content)
        if damage == "a pickle":
            rewrite_manifest(checkpoint)
    line = refused("--checkpoint", folder)
    assert str(folder) in line and not marker.exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--slots", "0"), "slots = 0"),
        (("--port", "70000"), "port = 70000"),
        (("--max-seconds", "soon"), "max_seconds"),
        (("--host", "no.such.host.invalid", "--token-file", "TOKEN"), "is no address of this machine"),
    ],
)
def test_bad_values_are_named(flags, words, runs, tmp_path, refused):
    (tmp_path / "token").write_text("t" * 20, encoding="utf-8")
    flags = [tmp_path / "token" if flag == "TOKEN" else flag for flag in flags]
    assert words in refused("--checkpoint", runs[0], *flags)
