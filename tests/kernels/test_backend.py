import importlib

import pytest
import torch

from lfm.kernels.backend import compute_capability, disagreement, runs_triton
from lfm.kernels.recording import is_recording, recording

# The CPU interprets the kernels; its interpreter has no bf16.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPARISONS = {
    "reservoir": ("_comparison", (24, 16)),
    "swiglu": ("_comparison", (24,)),
    "rotary": ("_comparison", (8, 8, 2)),
    "cross_entropy": ("_comparison", (1000,)),
    "rms_norm": ("_comparison", (24,)),
    "layer_norm": ("_comparison", (24,)),
    "lstm": ("_comparison", (16,)),
    "accumulation": ("_comparison", ()),
    "embedding": ("_comparison", ()),
    "permutation": ("_move_comparison", (2, 24)),
    "router": ("_logits_comparison", (24, 8)),
    "router ": ("_choice_comparison", (8, 2)),
}


@pytest.mark.parametrize("op", COMPARISONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_kernels_that_are_right_pass_their_self_test(op, dtype):
    name, sizes = COMPARISONS[op]
    module = "chunked" if op == "reservoir" else "op"
    comparison = getattr(importlib.import_module(f"lfm.kernels.{op.strip()}.{module}"), name)
    assert disagreement(comparison, DEVICE, dtype, *sizes) is None


def test_a_self_test_inside_a_recording_is_not_recorded():
    """A recording uses results unjudged: a kernel that repairs them would be found wrong."""

    def comparison(device, dtype):
        assert not is_recording()
        yield "a result", torch.ones(2), torch.ones(2)

    with recording() as verdicts:
        assert disagreement(comparison, DEVICE, torch.float32) is None
        assert is_recording() and not verdicts


def test_the_sort_passes_its_self_test():
    from lfm.kernels.permutation.op import _sort_comparison

    assert disagreement(_sort_comparison, DEVICE, torch.int64, 9) is None


def _results(*pairs):
    def comparison(device, dtype):
        for i, (got, want) in enumerate(pairs):
            yield f"result {i}", torch.tensor(got, dtype=dtype), torch.tensor(want, dtype=dtype)

    return comparison


@pytest.mark.parametrize(
    "pairs, dtype, said",
    [
        ([([1.0], [1.0]), ([1.0, 2.0], [1.0, 2.1])], torch.float32, "are off by 4.3e-02 in result 1"),
        ([([float("nan")], [1.0])], torch.float32, "are off by nan in result 0"),
        ([([1.0], [1.001])], torch.float32, "are off by 1.0e-03 in result 0"),
        ([([1.0], [1.001])], torch.bfloat16, None),
        ([([1, 2], [1, 3])], torch.int64, "are wrong in result 0"),
    ],
)
def test_wrong_results_are_named(pairs, dtype, said):
    assert disagreement(_results(*pairs), torch.device("cpu"), dtype) == said


def test_a_kernel_that_does_not_compile_is_told_in_one_line():
    def comparison(device, dtype):
        raise OSError("no compiler\nat all")
        yield

    assert disagreement(comparison, DEVICE, torch.float32) == "fail with OSError: no compiler"


def test_a_cpu_takes_the_plain_path():
    assert not runs_triton(torch.zeros(2), "auto", _results())
    assert compute_capability(torch.device("cpu")) is None


def test_activation_checkpointing_does_not_see_the_tensors_of_a_self_test():
    from lfm.kernels.swiglu.op import _comparison

    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
        assert disagreement(_comparison, DEVICE, torch.float32, 24) is None
        assert not seen
        torch.ones(2, requires_grad=True).exp()
    assert seen


@pytest.mark.gpu
def test_a_first_call_inside_activation_checkpointing_is_right():
    from torch.utils.checkpoint import checkpoint

    from lfm.kernels.swiglu import swiglu

    x = torch.randn(8, 2 * 77, device="cuda").bfloat16().requires_grad_()  # a width that nothing else has
    checkpoint(swiglu, x, use_reentrant=False).sum().backward()
    want = torch.autograd.grad(swiglu(x, backend="reference").sum(), x)[0]
    assert torch.allclose(x.grad.float(), want.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_on_a_gpu_wrong_kernels_are_given_up_with_one_warning():
    x, wrong = torch.zeros(2, device="cuda"), _results(([1.0], [2.0]))
    with pytest.warns(RuntimeWarning, match="are off by 5.0e-01 in result 0 on NVIDIA"):
        assert not runs_triton(x, "auto", wrong)
    assert not runs_triton(x, "auto", wrong)
    assert runs_triton(x, "triton", wrong)
