"""What is not in every install, or on every platform, is not needed: a run on a CPU without it, end to end."""

import os
import subprocess
import sys

import pytest

WITHOUT = """
import sys

ABSENT = ("triton", "streaming", "megatron", "deepspeed", "matplotlib", "tensorboard", "s3fs", "wandb")
ABSENT += ("transformers", "safetensors")


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
from lfm.cli import main

try:
    main()
finally:
    assert not set(ABSENT) & sys.modules.keys()
"""
SMALL = [
    "model.vocab_size=512",
    "model.seq_length=64",
    "model.hidden_size=32",
    "model.attention.num_attention_heads=2",
    "model.attention.num_query_groups=1",
    "samples.prompts=[]",
    "training.steps=2",
    "training.global_batch_size=2",
    "training.micro_batch_size=2",
    "validation.max_rows=4",
]


@pytest.mark.slow
def test_a_run_and_its_text_need_none_of_the_packages_that_some_platforms_lack(text_data, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def lfm(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", WITHOUT, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done

    trained = lfm("train", "--config", "lfm_debug", f"data.path={text_data}", *SMALL)
    for said in ("logging to tensorboard is off from now on", "plots/loss.png is not drawn"):
        assert trained.stderr.count(said) == 1, trained.stderr
    run = tmp_path / "runs/lfm_debug"
    assert (run / "checkpoints/step_00000002/manifest.json").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 1
    assert lfm("generate", "--checkpoint", str(run), "--prompt", "def ", "--max-new-tokens", "3").stdout[:4] == "def "
