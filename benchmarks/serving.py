"""Generation and serving by numbers: `python benchmarks/serving.py --device cuda`, or `--dry-run` on a CPU.

Random weights: no figure depends on them.

- speed: tokens a second of 1, 8 and 64 sequences, by steps that are recorded as CUDA graphs and by plain ones, beside
  transformers' own `generate` with the model code that `lfm export` writes and the same weights.  The logits of both
  are compared first; a model that differs has no speed.
- first_token: 64 clients ask at once, with prompts of 16 to 1024 tokens: seconds to the first token, the 50th and 95th
  percentile, and tokens a second of all; of the batcher alone, and over HTTP where the packages of the extra `serve`
  are installed (clients are then a process of their own).
- memory: bytes of the states of 64 conversations of 8,000 tokens, by family, after 64 more tokens of each.
"""

import argparse
import asyncio
import contextlib
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import torch

from lfm.export.huggingface import CLASSES
from lfm.inference.batcher import Batcher, BatcherConfig, Request
from lfm.inference.sampling import SamplingConfig, prefill
from lfm.models.global_names import global_views
from lfm.models.initialization import initialize, materialize
from lfm.models.registry import build
from lfm.training.run import RunConfig, environment

SECTIONS = ("speed", "first_token", "memory")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    speed: tuple[str, ...] = ("lfm_3b", "liquidnet_small")
    memory: tuple[str, ...] = (
        *("lfm_3b", "transformer_small", "laerc_owt", "liquidlm", "liquidnn_base", "liquidnet_small", "lstm_debug"),
    )
    batches: tuple[int, ...] = (1, 8, 64)
    prompt: int = 128
    tokens: int = 128
    clients: int = 64
    shortest: int = 16
    longest: int = 1024
    conversation: int = 8000

    @property
    def context(self) -> int:
        """Room for all of them."""
        return max(self.conversation + 128, self.longest + self.tokens + 8, self.prompt + 4 * self.tokens + 8)


DRY = Sizes(
    speed=("lfm_debug", "liquidnet_debug"),
    memory=("lfm_debug", "transformer_debug", "liquidnet_debug", "lstm_debug"),
    **{"batches": (1, 4), "prompt": 16, "tokens": 8, "clients": 8, "shortest": 4, "longest": 40, "conversation": 100},
)


@functools.lru_cache(maxsize=1)
def make(config: str, device: torch.device, context: int) -> Any:
    """The model of a shipped config with random weights, in bf16 on a GPU; its context has at least so many tokens."""
    model_config = RunConfig.load(f"configs/{config}.yaml").model
    if model_config.context_limit is not None and model_config.context_limit < context:
        model_config = model_config.model_copy(update={"seq_length": context})
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = materialize(lambda: build(model_config), device=device, dtype=dtype)
    initialize(model, seed=0)
    return model.eval()


def draw(model: Any, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def timed(device: torch.device) -> Iterator[list[float]]:
    """A list that then holds the seconds."""
    synchronize(device)
    found: list[float] = []
    start = time.perf_counter()
    yield found
    synchronize(device)
    found.append(time.perf_counter() - start)


def measure_speed(config: str, device: torch.device, sizes: Sizes) -> Iterator[dict[str, Any]]:
    model = make(config, device, sizes.context)
    theirs, reason = transformers_model(model, device)
    if theirs is not None:
        reason = difference(model, theirs, draw(model, sizes.prompt, 0), device)
    for batch in sizes.batches:
        row: dict[str, Any] = {"section": "speed", "config": config, "batch": batch}
        row["parameters"] = model.config.count_parameters().total
        for name in ("auto", "off") if device.type == "cuda" else ("off",):
            row[f"tokens_per_second_graph_{name}"] = ours_per_second(model, batch, sizes, device, name)
        if reason is None:
            row["tokens_per_second_transformers"] = theirs_per_second(theirs, model, batch, sizes, device)
        else:
            row["transformers"] = reason
        yield row


def ours_per_second(model: Any, batch: int, sizes: Sizes, device: torch.device, cuda_graph: Any) -> float:
    """Of steps of all sequences at once, their prompts read; median of three spans."""
    settings = BatcherConfig(slots=batch, prefill_tokens=4096, reuse_mib=0, cuda_graph=cuda_graph)
    batcher = Batcher(model, settings)
    spans, warm = 3, 4
    greedy = SamplingConfig(greedy=True, max_new_tokens=batch + warm + spans * sizes.tokens + 8)
    for i in range(batch):
        batcher.add(Request(draw(model, sizes.prompt, i), greedy))
    while len(batcher.running) < batch:
        batcher.step()
    for _ in range(warm):
        batcher.step()
    seconds = []
    for _ in range(spans):
        with timed(device) as found:
            for _ in range(sizes.tokens):
                batcher.step()
        seconds += found
    assert len(batcher.running) == batch
    if cuda_graph == "auto":
        assert batcher.rows.records, "no step could be recorded"
    return batch * sizes.tokens / statistics.median(seconds)


def transformers_model(model: Any, device: torch.device) -> tuple[Any, str | None]:
    """The same weights in the code that is exported, or why there is none."""
    if importlib.util.find_spec("transformers") is None:
        return None, "transformers is not installed"
    kind = model.config.kind
    module, name = import_module(f"lfm.export.hf.modeling_{kind}"), CLASSES[kind]
    tree = model.config.model_dump(mode="json")
    with torch.device(device):
        theirs = getattr(module, f"{name}ForCausalLM")(getattr(module, f"{name}Config")(**tree))
    weights = global_views(model, lambda _, tensor: tensor)
    theirs = theirs.to(device=device, dtype=model.embedding.weight.dtype)
    # A dtype of its own, of reservoirs say, stays.
    state = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    for key, tensor in state.items():
        if key in weights:
            tensor.data = weights[key].detach().clone().contiguous()
    return theirs.eval(), None


@torch.no_grad()
def difference(model: Any, theirs: Any, prompt: list[int], device: torch.device) -> str | None:
    """What is wrong with the logits of one model next to the other's."""
    ids = torch.tensor([prompt], device=device)
    want, found = model(ids)[0].float(), theirs(ids).logits.float()
    error = float((found - want).norm() / want.norm())
    bound = 5e-2 if model.embedding.weight.dtype == torch.bfloat16 else 1e-4
    return None if error < bound else f"logits differ by {error:.1e} of their norm"


@torch.no_grad()
def theirs_per_second(theirs: Any, model: Any, batch: int, sizes: Sizes, device: torch.device) -> float:
    """Of `generate`: what `tokens` more take than one more does; median of three."""
    ids = torch.tensor([draw(model, sizes.prompt, i) for i in range(batch)], device=device)
    keys: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def seconds(count: int) -> float:
        with timed(device) as found:
            made = theirs.generate(ids, max_new_tokens=count, attention_mask=torch.ones_like(ids), **keys)
        assert made.shape[1] == sizes.prompt + count
        return found[0]

    seconds(3)
    spans = [seconds(1 + sizes.tokens) - seconds(1) for _ in range(3)]
    return batch * sizes.tokens / statistics.median(spans)


def prompts_of(model: Any, sizes: Sizes) -> list[list[int]]:
    span = sizes.longest - sizes.shortest
    return [draw(model, sizes.shortest + span * i // max(1, sizes.clients - 1), i) for i in range(sizes.clients)]


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        f"first_token_p{share}_seconds": ordered[min(len(ordered) - 1, len(ordered) * share // 100)]
        for share in (50, 95)
    }


def measure_first_token(config: str, device: torch.device, sizes: Sizes) -> Iterator[dict[str, Any]]:
    model = make(config, device, sizes.context)
    row: dict[str, Any] = {"section": "first_token", "config": config, "clients": sizes.clients}
    row |= {"prompts": [sizes.shortest, sizes.longest], "tokens": sizes.tokens}
    row["prefill_tokens"] = Batcher(model, BatcherConfig()).prefill_tokens
    yield row | {"over": "the batcher"} | of_batcher(model, device, sizes)
    if importlib.util.find_spec("starlette") and importlib.util.find_spec("uvicorn"):
        yield row | {"over": "HTTP"} | over_http(model, sizes)


def of_batcher(model: Any, device: torch.device, sizes: Sizes) -> dict[str, float]:
    batcher = Batcher(model, BatcherConfig(slots=sizes.clients, reuse_mib=0))
    greedy = SamplingConfig(greedy=True, max_new_tokens=sizes.tokens)

    def ask_all() -> tuple[list[float], float]:
        requests = [Request(prompt, greedy) for prompt in prompts_of(model, sizes)]
        first: dict[Request, float] = {}
        start = time.perf_counter()
        for request in requests:
            batcher.add(request)
        while not batcher.is_idle:
            for request, _ in batcher.step():  # whose ids have come from the device
                first.setdefault(request, time.perf_counter() - start)
        return [first[request] for request in requests], time.perf_counter() - start

    for _ in range(2):  # kernels are compiled and steps recorded
        ask_all()
    seconds, whole = ask_all()
    return percentiles(seconds) | {"tokens_per_second": sizes.clients * sizes.tokens / whole}


def over_http(model: Any, sizes: Sizes) -> dict[str, float]:
    import uvicorn

    from lfm.data.tokenizer import train_bpe
    from lfm.serving.app import make_app
    from lfm.serving.config import ServeConfig
    from lfm.serving.served import Served
    from lfm.serving.server import bind, settings

    # Prompts are ids, and answers are read as text of a few words whatever they are.
    tokenizer = train_bpe(["a text of a few words"], 300, allow_smaller=True)
    served = {"model": Served("model", 0, model, _OfAnyId(tokenizer))}  # type: ignore[arg-type]
    config = ServeConfig(slots=sizes.clients, queue=sizes.clients, reuse_mib=0, max_prompt_tokens=sizes.longest)
    with bind("127.0.0.1", 0) as listening:
        app = make_app(served, config)
        server = uvicorn.Server(settings(app, config, num_models=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            job = json.dumps({"address": address, "prompts": prompts_of(model, sizes), "tokens": sizes.tokens})
            command = [sys.executable, __file__, "--clients-of", "-"]
            for _ in range(2):
                done = subprocess.run(command, input=job, capture_output=True, text=True, check=True)
            return json.loads(done.stdout)
        finally:
            server.should_exit = True
            thread.join()


class _OfAnyId:
    """A tokenizer that reads every id of a model as one of a few."""

    eod_id = -1  # so that no answer ends before its tokens

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._count = tokenizer, 100

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([32 + id % self._count for id in ids])

    def text_of(self, token: int) -> str:
        return self._tokenizer.text_of(32 + token % self._count)

    def bytes_of(self, token: int) -> bytes:
        return self._tokenizer.bytes_of(32 + token % self._count)

    def is_fallback_byte(self, token: int) -> bool:
        return False

    def stream_decoder(self, prompt: Sequence[int] = ()) -> Any:
        from lfm.data.tokenizer import StreamDecoder

        return StreamDecoder(self, prompt)  # type: ignore[arg-type]


def ask_over_http(job: dict[str, Any]) -> dict[str, float]:
    """What clients see, all at once; run in a process of its own, with as little to do as there can be."""
    host, _, port = job["address"].removeprefix("http://").rpartition(":")

    async def ask(prompt: list[int], start: float) -> float:
        asked = {"prompt": prompt, "max_tokens": job["tokens"], "temperature": 0, "stream": True, "logprobs": 0}
        body = json.dumps(asked).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode() + body)
        status = await reader.readline()
        assert b" 200 " in status, status + await reader.read()
        first, tail = None, b""
        while part := await reader.read(1 << 16):
            tail = tail[-64:] + part
            if first is None and b"data: {" in tail:
                first = time.perf_counter() - start
        writer.close()
        assert first is not None and b"data: [DONE]" in tail
        return first

    async def ask_all() -> tuple[list[float], float]:
        start = time.perf_counter()
        seconds = await asyncio.gather(*(ask(prompt, start) for prompt in job["prompts"]))
        return list(seconds), time.perf_counter() - start

    seconds, whole = asyncio.run(ask_all())
    return percentiles(seconds) | {"tokens_per_second": len(job["prompts"]) * job["tokens"] / whole}


@torch.no_grad()
def measure_memory(config: str, device: torch.device, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Conversations of one text each have the size of any others; of recurrent families, at any length."""
    more = 4 if device.type == "cpu" else 64
    model = make(config, device, sizes.context)
    grows = model.config.context_limit is not None
    # A state that does not grow is the same after a short text, so that slow families need not read a long one.
    length = sizes.conversation if grows else 64
    _, state = prefill(model, draw(model, length, 0))
    if not grows:
        assert prefill(model, draw(model, 2 * length, 0))[1].num_bytes == state.num_bytes
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    batcher = Batcher(model, BatcherConfig(slots=sizes.clients, reuse_mib=0, cuda_graph="off"))
    for _ in range(sizes.clients):
        batcher.rows.join(state, sizes.conversation)
    bytes_at_first = batcher.rows.num_bytes
    for _ in range(more):
        batcher.rows.step([1] * sizes.clients)
    row = {"section": "memory", "config": config, "kind": model.config.kind, "conversations": sizes.clients}
    row |= {"tokens": sizes.conversation, "bytes_of_one_state": state.num_bytes, "bytes_of_slots": bytes_at_first}
    row["bytes_of_slots_later"] = batcher.rows.num_bytes
    if device.type == "cuda":
        row["allocated_bytes"] = torch.cuda.memory_allocated() - before
    row["grows"] = grows
    yield row


MEASURES: dict[str, Callable[[str, torch.device, Sizes], Iterator[dict[str, Any]]]] = {
    "speed": measure_speed,
    "first_token": measure_first_token,
    "memory": measure_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dry-run", action="store_true", help="small models and few tokens, in under a minute")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="of " + ", ".join(SECTIONS))
    parser.add_argument("--configs", help="of shipped ones, instead of those of each section")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.json"))
    parser.add_argument("--clients-of", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.clients_of is not None:
        print(json.dumps(ask_over_http(json.load(sys.stdin))))
        return
    sizes, device, rows = DRY if flags.dry_run else Sizes(), torch.device(flags.device), []
    result = {"date": date.today().isoformat(), "environment": environment(), "runs": 1, "rows": rows}
    sections = flags.sections.split(",")
    named = flags.configs.split(",") if flags.configs else [*dict.fromkeys((*sizes.speed, *sizes.memory))]
    for config in named:  # one after the other, so that each model is made once
        for section in sections:
            if not flags.configs and config not in (sizes.memory if section == "memory" else sizes.speed):
                continue
            for row in MEASURES[section](config, device, sizes):
                print(json.dumps(row), flush=True)
                rows.append(row)
                flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")  # as far as it is
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
