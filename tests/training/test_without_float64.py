"""Devices without float64 (Apple's GPUs): no step of any family makes such a tensor there."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lfm.data.batch import Batch
from lfm.errors import UserError
from lfm.kernels import backend
from lfm.training.local_engine import LocalEngine
from lfm.training.loop import train
from lfm.training.run import RunConfig
from tests.training.tiny_run import tiny_run

FAMILIES = ("lfm", "laerc", "liquidlm", "liquidnet", "liquidnn", "lstm", "transformer")


class NoFloat64(TorchDispatchMode):
    """Fails where an op gives float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                raise AssertionError(f"{func} made a float64 tensor")
        return result


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_makes_no_float64_tensor(family, monkeypatch):
    run = RunConfig.load(f"configs/{family}_debug.yaml", ["model.vocab_size=64", "model.seq_length=32"])
    monkeypatch.setattr(backend, "WITHOUT_FLOAT64", {"cpu"})
    engine = LocalEngine(
        run.model,
        run.optimizer,
        seed=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
        micro_batch_size=2,
    )
    ids = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, [[32], [20, 12]])
    # What is read back becomes float64 on the host, which is the device here.
    monkeypatch.setattr(torch.Tensor, "double", lambda self: self.float())
    engine.start_step(0, 10)
    with NoFloat64():
        engine.forward_backward(batch)
        assert engine.step(1e-3) > 0


def test_an_apple_gpu_that_is_not_there_is_a_sentence(tmp_path, text_data):
    if torch.backends.mps.is_available():
        pytest.skip("there is one here")
    with pytest.raises(UserError, match=r"training\.device=mps needs an Apple GPU, and none is visible"):
        train(tiny_run(tmp_path, text_data, "training.device=mps"))
