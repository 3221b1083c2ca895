"""docs/examples/liquidnet_jax.py, in a process without torch, against ours."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

if importlib.util.find_spec("jax") is None:
    pytest.skip("needs the extra `dev`, or: pip install jax", allow_module_level=True)

from lfm.data.tokenizer import Tokenizer, train_bpe
from lfm.export import formats
from lfm.export.source import Source
from lfm.inference.load import load_model
from lfm.inference.sampling import SamplingConfig
from lfm.inference.text import continuations
from tests.export.checkpoints import TREES, checkpoint_of

EXAMPLE = Path(__file__).parents[2] / "docs/examples/liquidnet_jax.py"
TEXT = "to be, or not to be: that is the question. "
PROBE = """
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, sys.argv[1])
from liquidnet_jax import empty_state, forward, load

config, weights, _ = load(Path(sys.argv[2]))
ids = jnp.asarray(np.load(sys.argv[3]))
whole, after = forward(config, weights, ids, empty_state(config, len(ids)))
first, state = forward(config, weights, ids[:, :7], empty_state(config, len(ids)))
second, state = forward(config, weights, ids[:, 7:], state)
np.savez(sys.argv[4], whole=whole, parts=jnp.concatenate([first, second], axis=1), after=after, state=state)
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT * 20], 512, allow_smaller=True)


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory) -> Path:
    return checkpoint_of(TREES["liquidnet"], tokenizer, tmp_path_factory.mktemp("runs") / "liquidnet")


def export(run: Path, kind: str, out: Path) -> Path:
    if formats.FORMATS[kind].is_folder:
        out.mkdir()
    formats.FORMATS[kind].write(Source(run), out, formats.Settings())
    return out


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)


@pytest.mark.parametrize("kind", ["hf", "safetensors"])
def test_logits_and_state_equal_ours_whole_and_in_parts(kind, run, tmp_path):
    ids = torch.randint(0, 512, (3, 50), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "ids.npy", ids.numpy())
    done = python(
        *("-c", PROBE, EXAMPLE.parent, export(run, kind, tmp_path / "model")),
        *(tmp_path / "ids.npy", tmp_path / "found.npz"),
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    with torch.no_grad():
        want, state = Source(run).model(torch.float32)(ids)
    assert want.abs().max() > 1  # so that an absolute bound says something
    for name, wanted in {"whole": want, "parts": want, "after": state.hidden, "state": state.hidden}.items():
        np.testing.assert_allclose(found[name], np.array([x.numpy() for x in wanted]), atol=1e-4, rtol=0, err_msg=name)


@pytest.mark.parametrize("begin", [None, "<|endoftext|>"])
def test_a_text_goes_on_as_with_lfm_generate(begin, tokenizer, tmp_path):
    tokenizer = tokenizer.beginning_with(begin)
    run = checkpoint_of(TREES["liquidnet"], tokenizer, tmp_path / "liquidnet")
    done = python(EXAMPLE, export(run, "safetensors", tmp_path / "model"), TEXT, 20)
    assert done.returncode == 0, done.stderr
    model = load_model(run, device=torch.device("cpu"), dtype=torch.float32)[0]
    greedy = SamplingConfig(greedy=True, max_new_tokens=20)
    *_, (made,) = continuations(model, tokenizer, [tokenizer.encode_prompt(TEXT)], [greedy])
    assert made.finish_reason == "length" and done.stdout == (begin or "") + TEXT + made.text + "\n"


def test_another_family_and_a_file_of_another_origin_are_refused_in_a_sentence(tokenizer, tmp_path):
    run = checkpoint_of(TREES["lstm"], tokenizer, tmp_path / "lstm")
    save_file({"x": np.zeros(2)}, tmp_path / "other")
    for file, sentence in {
        export(run, "safetensors", tmp_path / "model"): "model is of kind lstm, and this example reads liquidnet",
        tmp_path / "other": "other has no model's configuration; give a file of",
    }.items():
        done = python(EXAMPLE, file, TEXT)
        assert done.returncode and sentence in done.stderr and "Traceback" not in done.stderr
