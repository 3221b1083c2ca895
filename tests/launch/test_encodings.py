"""Commands under locales that are not UTF-8."""

import os
import subprocess
import sys

import pytest

from lfm.exits import command
from tests.data.corpus import write_texts
from tests.launch.test_launch import trained  # noqa: F401  (a fixture)
from tests.training.tiny_run import PYTHON, ROOT

ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.fixture(scope="module")
def latin1(tmp_path_factory):
    """The environment of a Latin-1 locale, made here because few machines have one."""
    folder = tmp_path_factory.mktemp("locale")
    made = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", folder / "en_US.ISO-8859-1"]
    try:
        subprocess.run(made, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs localedef and its charmaps (Debian's package locales)")
    return {"LOCPATH": str(folder), "LC_ALL": "en_US.ISO-8859-1", "PYTHONIOENCODING": "utf-8"}


def run(environment, *words):
    return subprocess.run(
        [os.fsencode(word) if isinstance(word, os.PathLike) else word for word in words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        cwd=ROOT,
    )


@pytest.mark.slow
def test_a_prompt_is_read_and_shown_as_utf8_whatever_the_locale(trained, latin1):  # noqa: F811
    command = [PYTHON, "launch/generate.py", "--checkpoint", trained, "--max-new-tokens", "1", "--greedy", "--prompt"]
    found = [run(environment, *command, "caf\u00e9".encode()) for environment in (latin1, ASCII)]
    assert [process.returncode for process in found] == [0, 0], found
    assert found[0].stdout == found[1].stdout and found[0].stdout.startswith("caf\u00e9".encode())


def test_a_data_set_is_prepared_and_inspected_under_any_locale(latin1, tmp_path):
    folder = tmp_path / "donn\u00e9es"
    write_texts(folder / "text", [f"{i}: na\u00efve \u6f22\u5b57 caf\u00e9 {'x' * i}" for i in range(60)])
    (folder / "run.yaml").write_text(
        f"output: {folder}/data\nsources: [{{kind: text, paths: ['{folder}/text']}}]\n"
        "tokenizer: {train_vocab_size: 280}\nseq_length: 32\nvalidation_fraction: 0.2\n",
        encoding="utf-8",
    )
    found = run(latin1, PYTHON, "-m", "data_pipeline.prepare", "--config", folder / "run.yaml")
    assert found.returncode == 0 and f"{folder}/data is ready".encode() in found.stdout, found.stderr
    to_ascii = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    found = run(to_ascii, PYTHON, "-m", "data_pipeline.inspect", folder / "data", "--html", folder / "page.html")
    assert found.returncode == 0 and f"{folder}/page.html is written".encode() in found.stdout, found.stderr
    assert "na\u00efve \u6f22\u5b57 caf\u00e9" in (folder / "page.html").read_text(encoding="utf-8")


def test_what_is_no_utf8_is_written_escaped(capfd):
    command(lambda: print("a \udcff b"))()
    sys.stdout.flush()
    assert capfd.readouterr().out == "a \\udcff b\n"
