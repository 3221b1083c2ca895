"""`--push-to-hub` and `hf://user/name` against a server of this machine that speaks the hub's protocol."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from lfm.data.tokenizer import train_bpe
from tests.export.checkpoints import TREES, checkpoint_of
from tests.export.hub_server import running_hub

ROOT = Path(__file__).parents[2]
PROMPT = ("--prompt", "to be", "--greedy", "--max-new-tokens", "5", "--json")
RUN_ALL = """
import contextlib, io, json, sys
from lfm.cli import main

for words in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["lfm", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


def lfm(home: Path, address: str, *commands: tuple[object, ...]) -> list[tuple[int, str, str]]:
    """Exit code, output and complaints of commands, in a process that finds the hub at `address`."""
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home / "hf"), "HF_TOKEN": "hf_a", "HOME": str(home)}
    more = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps([[str(word) for word in words] for words in commands]),
        cwd=home,
        env=environment | settings | more,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_a_model_goes_to_the_hub_and_is_a_checkpoint_by_its_address(tmp_path):
    tokenizer = train_bpe(["to be, or not to be " * 20], 300, allow_smaller=True)
    run = checkpoint_of(TREES["lstm"], tokenizer, tmp_path / "own")
    failing = {
        "hf://me/foreign": "config.json is of model_type 'llama'; lfm imports what `lfm export` wrote",
        "hf://me/texts": "hf://me/texts has no config.json; name a model that `lfm export` made",
        "hf://me/none": "hf://me/none cannot be read: the hub has none of that name, or not for you",
        "hf://me/small@v2": "the hub has none of that name, or not for you; correct it, or set HF_TOKEN",
        "hf://me": "is no address of the hub; write hf://USER/NAME",
    }
    with running_hub() as hub:
        hub.begun = {".gitattributes": b"", "old/notes.json": b"{}"}
        hub.models["me/foreign"] = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"large"}
        hub.models["me/texts"] = {"README.md": b"no model"}
        pushing = ("export", "--checkpoint", run, "--out", tmp_path / "out", "--no-compare")
        refusing = ("export", "--checkpoint", run, "--out", tmp_path / "whole", "--no-compare")
        hub.locked.add("you/locked")
        pushed, want, found, imported, refused, *failed = lfm(
            tmp_path,
            hub.address,
            (*pushing, "--push-to-hub", "me/small", "--private"),
            ("generate", "--checkpoint", run, *PROMPT),
            ("generate", "--checkpoint", "hf://me/small", *PROMPT),
            ("import", "hf://me/small@main", "--out", tmp_path / "back"),
            (*refusing, "--push-to-hub", "you/locked"),
            *(("generate", "--checkpoint", address, *PROMPT) for address in failing),
        )
        assert pushed[0] == 0 and hub.private == {"me/small"} and f"{hub.address}/me/small" in pushed[1], pushed
        for path in (tmp_path / "out").iterdir():
            assert hub.models["me/small"][path.name] == path.read_bytes(), path.name
        assert want[0] == found[0] == 0 and found[1] == want[1] and '"tokens"' in found[1], found
        fetched = [request for request in hub.asked if request.startswith("GET") and "/resolve/" in request]
        assert len(fetched) == len(set(fetched)) > 3, "what was fetched is kept"
        assert not any(request.endswith(".py") for request in fetched), "no code is"
        assert not any("/old/" in request for request in fetched), "nor are folders"
        assert not any("me/foreign" in request and "safetensors" in request for request in hub.asked)
        cached = tmp_path / ".cache/lfm/hub/me--small" / hub.commit("me/small")
        assert [path.name for path in cached.parent.iterdir()] == [cached.name]
        assert imported[0] == 0, imported
        assert refused[0] == 2 and refused[2].count("\n") == 1, refused
        assert f"the folder is whole, and `hf upload you/locked {tmp_path / 'whole'}` uploads it" in refused[2], refused
        assert (tmp_path / "whole/model.safetensors").exists()
        for (code, _, said), sentence in zip(failed, failing.values(), strict=True):
            assert code == 2 and sentence in said and said.count("\n") == 1, said
    ((code, _, said),) = lfm(tmp_path, hub.address, ("generate", "--checkpoint", "hf://you/other", *PROMPT))
    assert code == 2 and "hf://you/other cannot be read" in said and "HF_ENDPOINT" in said, said
