"""`--format onnx`: the model as two ONNX graphs, in float32, whose state goes in and comes out by name.

prefill.onnx      ids `[batch, length]`, state -> logits `[batch, length, V]`, state
step.onnx         ids `[batch, 1]`, state -> logits `[batch, 1, V]`, state
weights.bin       of both
tokenizer.json config.json

A state begins as zeros, of no columns where it grows.  `NAME` goes in, and comes out as `NAME.after`.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from lfm.checkpoint.manifest import TOKENIZER_NAME
from lfm.errors import UserError
from lfm.export.huggingface import CLASSES, remote_model
from lfm.export.packages import require
from lfm.export.source import Source
from lfm.files import read_file, shown, sync, write_durably

GRAPHS = ("prefill", "step")
WEIGHTS = "weights.bin"
OPSET = 20
INLINE_BYTES = 1024
"""Constants below it stay in the graph; others are in the file of weights, once for both graphs."""
GROWS = {"key": 2, "value": 2, "tokens": 1}
"""Parts of a state with a column for every token read, and which dimension that is."""
PROMPT, STEPS = 16, 200
TOLERANCE = 1e-4


class Graph(nn.Module):
    """A model's call with its state as a flat list of tensors.  Padding is no part of it."""

    def __init__(self, model: Any, state: Any) -> None:
        super().__init__()
        self.model, self.names = model, list(state.tensors)
        self.state_class = type(state)

    def forward(self, ids: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        before = self.state_class(0, dict(zip(self.names, state, strict=True)))
        hidden, after = self.model.advance(self.model.embedding(ids), before, None)
        return self.model.logits(hidden), *(after[name] for name in self.names)


def write(source: Source, out: Path, settings: Any) -> None:
    """Raises UserError for a family, a variant of one, or a dtype that there is no graph of."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, purpose="--format onnx", extra="onnx")
    if source.kind not in CLASSES:
        raise UserError(
            f"{shown(source.path)} is of kind {source.kind}, which has no ONNX graphs (kinds: {', '.join(CLASSES)}); "
            "take --format safetensors"
        )
    if settings.dtype != torch.float32:
        raise UserError(
            f"--format onnx is float32 alone, not {settings.dtype}; leave --dtype out".replace("torch.", "")
        )
    model = remote_model(source)
    with (out / WEIGHTS).open("wb") as weights:
        places: dict[bytes, tuple[int, int]] = {}
        for name in GRAPHS:
            program = exported(source, model, name)
            for node in program.model.graph.all_nodes():
                node.metadata_props.clear()  # where each was traced: paths of this machine
            move_weights(program.model, weights, places)
            require("onnx_ir", purpose="--format onnx", extra="onnx").save(program.model, out / f"{name}.onnx")
    for name in (WEIGHTS, *(f"{name}.onnx" for name in GRAPHS)):
        sync(out / name)
    write_durably(out / TOKENIZER_NAME, read_file(source.path / TOKENIZER_NAME))
    record = {"model": source.tree, "lfm": source.record()}
    write_durably(out / "config.json", json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n")


@torch.no_grad()
def exported(source: Source, model: Any, name: str) -> Any:
    """torch's ONNXProgram of one of GRAPHS, for any batch, any length of prefill and anything read before."""
    # Sizes of an example must differ from each other and from 1 to be taken for any.
    state = model(torch.zeros(3, 7, dtype=torch.long)).state
    graph = Graph(model, state).eval()
    ids = torch.zeros(3, 5 if name == "prefill" else 1, dtype=torch.long)
    batch, past, length = (torch.export.Dim(dim) for dim in ("batch", "past", "length"))
    parts = [name.partition(".")[0] for name in graph.names]
    dims = [{0: batch, GROWS[part]: past} if part in GROWS else {0: batch} for part in parts]
    columns = {0: batch, 1: length} if name == "prefill" else {0: batch}
    with quiet():
        try:
            program: Any = torch.onnx.export(
                graph,
                (ids, *(tensor.contiguous() for tensor in state.tensors.values())),
                dynamo=True,
                dynamic_shapes={"ids": columns, "state": tuple(dims)},
                input_names=["ids", *graph.names],
                output_names=["logits", *(f"{name}.after" for name in graph.names)],
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            cause = str(error.__cause__ or error).strip().partition("\n")[0]
            raise UserError(
                f"{shown(source.path)} is a {source.kind} that torch.onnx makes no {name} graph of ({cause}); "
                "take --format hf"
            ) from None
    assert all(str(value.shape[0]) == "batch" for value in program.model.graph.inputs), "the batch was taken for fixed"
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporter logs of packages that are not there, and warns of its own code."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def move_weights(model: Any, file: BinaryIO, places: dict[bytes, tuple[int, int]]) -> None:
    """Append what is not yet in `file`, as `places` knows by hash, and let the graph refer to it."""
    ir = require("onnx_ir", purpose="--format onnx", extra="onnx")
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < INLINE_BYTES:
            continue
        data = tensor.tobytes()
        digest = blake2b(data, digest_size=16).digest()
        if digest not in places:
            file.seek(-file.tell() % 64, 1)  # so that it can be mapped
            places[digest] = (file.tell(), file.write(data))
        offset, size = places[digest]
        base = str(Path(file.name).parent)
        value.const_value = ir.ExternalTensor(
            WEIGHTS, offset, size, tensor.dtype, shape=tensor.shape, name=name, base_dir=base
        )


class Runner:
    """A graph of an exported folder, in onnxruntime on the CPU."""

    def __init__(self, file: Path, *, threads: int = 0) -> None:
        runtime = require("onnxruntime", purpose="comparing the graphs", extra="onnx")
        options = runtime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, threads
        self.session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def empty_state(self, batch: int) -> dict[str, Any]:
        sizes = {"batch": batch, "past": 0}
        dtypes = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64, "tensor(bool)": torch.bool}
        state = {}
        for of in self.session.get_inputs()[1:]:  # the first are ids
            shape = [sizes[size] if isinstance(size, str) else size for size in of.shape]
            state[of.name] = torch.zeros(shape, dtype=dtypes[of.type]).numpy()
        return state

    def __call__(self, ids: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        logits, *after = self.session.run(None, {"ids": ids.numpy(), **state})
        return torch.from_numpy(logits), dict(zip(state, after, strict=True))


def compare(source: Source, out: Path, settings: Any) -> Iterator[str]:
    """Greedy continuations of two prompts, whole and in parts, against ours.  RuntimeError beyond `TOLERANCE`."""
    worst, largest, alike, steps = compared(source, *(Runner(out / f"{name}.onnx") for name in GRAPHS))
    yield (
        f"logits in onnxruntime differ from the checkpoint's by at most {worst:.1e} (the largest is {largest:.1f}); "
        f"{alike} of {2 * steps} greedy tokens are alike"
    )
    if not worst <= TOLERANCE * max(1.0, largest):
        raise RuntimeError(f"the ONNX graphs of {source.path} compute something else: {worst:.1e} off")


@torch.no_grad()
def compared(source: Source, prefill: Runner, step: Runner) -> tuple[float, float, int, int]:
    """Largest difference of logits, the largest logit, tokens alike of two rows, and steps made of each."""
    ours, limit = source.model(torch.float32), source.config.context_limit
    prompt = PROMPT if limit is None else min(PROMPT, limit - 1)
    steps = STEPS if limit is None else min(STEPS, limit - prompt)
    ids = torch.randint(0, source.config.vocab_size, (2, prompt), generator=torch.Generator().manual_seed(0))
    hidden, ours_state = ours.advance(ids, None)
    want = ours.logits(hidden)
    whole, state = prefill(ids, prefill.empty_state(2))
    differences, largest, alike = [distance(whole, want)], float(want.abs().max()), 0
    if prompt > 1:
        first, rest = ids.split([prompt // 2, prompt - prompt // 2], dim=1)
        begun, between = prefill(first, prefill.empty_state(2))
        differences += [distance(torch.cat((begun, prefill(rest, between)[0]), 1), want)]
    found = whole
    for _ in range(steps):
        token = want[:, -1:].argmax(-1)
        alike += int((found[:, -1:].argmax(-1) == token).sum())
        hidden, ours_state = ours.advance(token, ours_state)
        want = ours.logits(hidden)
        found, state = step(token, state)
        differences.append(distance(found, want))
        largest = max(largest, float(want.abs().max()))
    return max(differences), largest, alike, steps


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
