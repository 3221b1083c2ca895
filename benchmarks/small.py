"""Steps of the smaller families, kernel by kernel and replayed: `python benchmarks/small.py --minutes 9 --out FILE`.

Each preset runs in a process of its own, on random ids. Both ways first make the same steps: losses and norms must be
equal to the bit, or differ no more than two runs of the kernel-by-kernel way differ from each other; otherwise no speed
is told. Then windows of steps are timed, and a few replays are taken apart by kernels. Beside them a Llama of 30 M by
transformers, eager and compiled, with the rows of `transformer_small`.

With `--device cpu` the debug configs are run, where speeds mean nothing.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import torch

from benchmarks.floors import kernels
from lfm.config import path_flag
from lfm.data.batch import Batch
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import ready_folder, write_durably
from lfm.layers.lstm import StackedLSTM
from lfm.training.local_engine import LocalEngine
from lfm.training.run import RunConfig, environment
from lfm.training.start import local_engine

LIBRARY = (
    *("model.hidden_size=512", "model.num_layers=16", "model.seq_length=1024"),
    *("training.global_batch_size=8", "training.micro_batch_size=8"),
)
CHUNKS = ("model.backend=chunked", "model.warmup=32")
NARROW = ("training.dtype=bfloat16", "model.exchange=working", "model.chunk_length=32")
PRESETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "liquidnet_small": ("liquidnet_small", ()),
    "transformer_small": ("transformer_small", ()),
    "laerc_owt": ("laerc_owt", ()),
    "laerc_owt_bf16": ("laerc_owt", ("training.dtype=bfloat16",)),
    "laerc_shakespeare": ("laerc_shakespeare", ()),
    "laerc_shakespeare_bf16": ("laerc_shakespeare", ("training.dtype=bfloat16",)),
    "laerc_library_chunked": ("laerc_owt", (*LIBRARY, *CHUNKS)),
    "laerc_library_chunked_bf16": ("laerc_owt", (*LIBRARY, *CHUNKS, *NARROW)),
    "liquidlm": ("liquidlm", ("training.global_batch_size=32",)),
    "liquidlm_packed": ("liquidlm", ("training.global_batch_size=32",)),
    "liquidnet_tiny": ("liquidnet_tiny", ()),
    "liquidnet_small_packed": ("liquidnet_small", ()),
    "transformer_small_packed": ("transformer_small", ()),
}
"""Name -> (config, overrides). Rows are one document each, but for those that say so."""
PEERS = ("llama_30m", "llama_30m_compiled")
TARGETS = {
    "liquidnet_small": 1_700_000,
    "transformer_small": 1_498_000,
    **dict.fromkeys(("laerc_owt", "laerc_owt_bf16", "laerc_shakespeare", "laerc_shakespeare_bf16"), 1_596_000),
    **dict.fromkeys(("laerc_library_chunked", "laerc_library_chunked_bf16"), 170_000),
    "liquidlm": 345_000,
}
"""Tokens/s on one H200."""

PARITY_STEPS, WINDOWS, WINDOW_SECONDS = 200, 8, 0.4
KINDS_OF_BATCHES = 16
"""Different ones, taken in turn."""


def run_of(name: str, device: str) -> RunConfig:
    config, overrides = PRESETS[name]
    if device == "cpu":
        family = config.split("_")[0]
        keys = ["model.seq_length=32", "model.vocab_size=211", "training.global_batch_size=4"]
        if family == "transformer":
            keys.append("model.attention.backend=reference")  # a CPU's others take packed rows by their lengths
        return RunConfig.load(f"configs/{family}_debug.yaml", [*keys, "training.micro_batch_size=4"])
    return RunConfig.load(f"configs/{config}.yaml", list(overrides))


def batches(run: RunConfig, *, packed: bool) -> list[Batch]:
    """Rows of ids that are as unequally frequent as words are."""
    T, rows, V = run.model.seq_length, run.training.global_batch_size, run.model.vocab_size
    found = []
    for i in range(KINDS_OF_BATCHES):
        draws = torch.Generator().manual_seed(run.seed + i)
        ids = (V ** torch.rand(rows, T, generator=draws, dtype=torch.float64)).long().sub(1).clamp(0, V - 1)
        lengths = [[T]] * rows
        if packed:
            ends = [sorted({T, *torch.randint(1, T, (3,), generator=draws).tolist()}) for _ in range(rows)]
            lengths = [[b - a for a, b in zip([0, *row], row, strict=False)] for row in ends]
        found.append(Batch(ids, lengths))
    return found


def engine_of(run: RunConfig, device: torch.device, mode: str) -> LocalEngine:
    """`mode` of training.cuda_graph; required on a CPU too, where a recording is a call."""
    engine = local_engine(run, device)
    assert isinstance(engine, LocalEngine)
    if mode == engine.cuda_graph:
        return engine
    training = run.training.model_copy(update={"cuda_graph": mode})
    engine = local_engine(run.model_copy(update={"training": training}), device)
    assert isinstance(engine, LocalEngine)
    return engine


class Steps:
    """Updates of one engine, on rows taken in turn."""

    def __init__(self, engine: LocalEngine, rows: list[Batch], lr: float) -> None:
        self.engine, self.rows, self.lr, self.count = engine, itertools.cycle(rows), lr, 0

    def one(self) -> tuple[float, float]:
        """Loss and norm."""
        self.engine.start_step(self.count, 1 << 30)
        # Warmed up, as a run is: a fresh model's first steps are the largest.
        result, norm = self.engine.update(next(self.rows), self.lr * min(1.0, (self.count + 1) / 20))
        self.count += 1
        return result.loss, norm


def spread(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    """Largest relative difference of losses and norms."""
    pairs = [(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)]
    return max((abs(x - y) / max(abs(y), 1e-30) for x, y in pairs), default=0.0)


def windows_of(one: Callable[[], Any], synchronize: Callable[[], float], seconds: float, count: int) -> list[float]:
    """Seconds of a step, by window."""
    start = synchronize()
    one()
    steps = max(1, round(seconds / max(synchronize() - start, 1e-6)))
    found = []
    for _ in range(count):
        start = synchronize()
        for _ in range(steps):
            one()
        found.append((synchronize() - start) / steps)
    return found


def rate(tokens: int, windows: list[float]) -> dict[str, Any]:
    return {
        "tokens_per_second": tokens / statistics.median(windows),
        "range": [tokens / max(windows), tokens / min(windows)],
        "windows": len(windows),
        "step_milliseconds": 1e3 * statistics.median(windows),
    }


def _lstms(engine: LocalEngine) -> list[StackedLSTM]:
    return [module for module in engine.model.modules() if isinstance(module, StackedLSTM)]


def _set_lstms(engine: LocalEngine, backend: Literal["library", "steps"], device: torch.device) -> None:
    """Both ways are compared by the same kernels; the one without recordings is timed by what it takes by itself."""
    for module in _lstms(engine) if device.type == "cuda" else ():
        module.backend = backend


def kernels_of(one: Callable[[], Any], steps: int = 3) -> dict[str, Any]:
    """What the device does in a step: microseconds by kernel, the longest first."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            one()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in seen.events() or ():
        if event.device_type == DeviceType.CUDA:
            times.setdefault(event.name, []).append(event.device_time)
    order = sorted(times, key=lambda name: -sum(times[name]))
    return {
        "busy_milliseconds": sum(map(sum, times.values())) / steps / 1e3,
        "launches": sum(map(len, times.values())) / steps,
        "longest": [
            {"name": name[:140], "count": len(times[name]) / steps, "microseconds": sum(times[name]) / steps}
            for name in order[:45]
        ],
    }


def measure(name: str, device: torch.device, parity_steps: int) -> dict[str, Any]:
    run = run_of(name, device.type)
    tokens = run.training.global_batch_size * run.model.seq_length
    rows = batches(run, packed=name.endswith("_packed"))
    seconds, count = (WINDOW_SECONDS, WINDOWS) if device.type == "cuda" else (0.05, 2)

    def steps(mode: str) -> Steps:
        return Steps(engine_of(run, device, mode), rows, run.optimizer.peak_lr(run.model.hidden_size))

    plain, began = steps("off"), time.monotonic()
    _set_lstms(plain.engine, "steps", device)
    want = [plain.one() for _ in range(parity_steps)]
    took = time.monotonic() - began
    say(f"{name}: {parity_steps} steps kernel by kernel in {took:.1f} s, last loss {want[-1][0]:.4f}")
    _set_lstms(plain.engine, "library", device)
    found: dict[str, Any] = {
        "name": name,
        "config": run.model_dump(mode="json"),
        "dtype": str(run.dtype).removeprefix("torch."),
        "tokens_per_step": tokens,
        "parameters": run.model.count_parameters().total,
        "plain": rate(tokens, windows_of(plain.one, plain.engine.synchronize, seconds, count)),
        "target": TARGETS.get(name),
    }
    say(f"{name}: {found['plain']['tokens_per_second']:,.0f} tokens/s kernel by kernel")
    if _lstms(plain.engine) and device.type == "cuda":
        library = steps("off")
        _set_lstms(library.engine, "library", device)
        theirs = [library.one() for _ in range(parity_steps)]
        found["library_lstm"] = {
            "largest_difference": spread(want, theirs),
            "last_losses": [want[-1][0], theirs[-1][0]],
        }
        del library
    replayed, began = steps("required"), time.monotonic()
    got = [replayed.one() for _ in range(parity_steps)]
    parity: dict[str, Any] = {
        "steps": parity_steps,
        "to_the_bit": got == want,
        "largest_difference": spread(got, want),
        "last_losses": [got[-1][0], want[-1][0]],
    }
    if got != want:
        again = steps("off")
        _set_lstms(again.engine, "steps", device)
        own = [again.one() for _ in range(parity_steps)]
        parity["plain_to_plain"] = spread(own, want)
        del again
    holds = parity["to_the_bit"] or parity["largest_difference"] <= 3 * parity["plain_to_plain"]
    found["parity"] = parity | {"holds": holds and all(math.isfinite(x) for step in got for x in step)}
    say(f"{name}: replayed in {time.monotonic() - began:.1f} s, parity {json.dumps(found['parity'])}")
    if not found["parity"]["holds"]:
        return found
    found["replayed"] = rate(tokens, windows_of(replayed.one, replayed.engine.synchronize, seconds, count))
    if device.type == "cuda":
        found["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        found["reserved_gib"] = torch.cuda.memory_reserved(device) / 2**30
        for way, each in (("replayed", replayed), ("plain", plain)):
            try:
                found[way] |= kernels_of(each.one)
            except Exception as error:  # of a profiler, which the speeds do not need
                found[way]["profile"] = f"{type(error).__name__}: {error}"
    try:
        floor = sum(kernel.seconds for kernel in kernels(run, run.dtype))
        found["floor_tokens_per_second"] = tokens / floor
    except UserError:
        pass
    say(f"{name}: {found['replayed']['tokens_per_second']:,.0f} tokens/s replayed, target {found['target'] or 'none'}")
    return found


def measure_peer(name: str, device: torch.device) -> dict[str, Any]:
    """A Llama with the matrices of `transformer_small`, in bf16 without fp32 masters: as `peers/hugging_face.py`."""
    import transformers

    run = run_of("transformer_small", device.type)
    model: Any = run.model
    tokens = run.training.global_batch_size * model.seq_length
    config = transformers.LlamaConfig(
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.attention.num_attention_heads,
        num_key_value_heads=model.attention.num_query_groups,
        intermediate_size=model.ffn.ffn_hidden_size,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.seq_length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(run.seed)
    with device:
        peer: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    peer.train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=run.optimizer.lr, fused=True)
    forward = torch.compile(peer) if name.endswith("_compiled") else peer
    rows, losses = itertools.cycle([batch.ids for batch in batches(run, packed=False)]), []

    def one() -> None:
        ids = next(rows).to(device)
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), run.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    def synchronize() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(10 if device.type == "cuda" else 1):
        one()
    seconds, count = (WINDOW_SECONDS, WINDOWS) if device.type == "cuda" else (0.05, 2)
    found = {
        "name": name,
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in peer.parameters()),
        "tokens_per_step": tokens,
        **rate(tokens, windows_of(one, synchronize, seconds, count)),
        "losses": [losses[0], losses[-1]],
    }
    if device.type == "cuda":
        try:
            found |= kernels_of(one)
        except Exception as error:
            found["profile"] = f"{type(error).__name__}: {error}"
    say(f"{name}: {found['tokens_per_second']:,.0f} tokens/s")
    return found


def say(text: str) -> None:
    print(text, flush=True)


def alone(name: str, flags: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Of a process of its own; whatever goes wrong there is told as `failure`."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        words = ["--alone", name, "--out", str(result), "--device", flags.device, "--steps", str(flags.steps)]
        try:
            done = subprocess.run([sys.executable, __file__, *words], timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"name": name, "failure": f"not done within {seconds:.0f} s"}
        if result.exists():
            return json.loads(result.read_text(encoding="utf-8"))
    return {"name": name, "failure": f"ended with code {done.returncode}"}


def write(path: Path, content: dict[str, Any]) -> None:
    write_durably(path, json.dumps(content, indent=1).encode() + b"\n")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="Time steps of the smaller families, kernel by kernel and replayed.")
    parser.add_argument("--out", type=path_flag, required=True, metavar="FILE", help="JSON; what it has is kept")
    parser.add_argument("--only", default=",".join((*PRESETS, *PEERS)), metavar="NAMES")
    parser.add_argument("--minutes", type=float, default=9.0, help="no process is begun after so many")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds that one may take")
    parser.add_argument("--steps", type=int, default=PARITY_STEPS, metavar="N", help="that both ways are compared over")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--alone", metavar="NAME", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    ready_folder(flags.out.parent)
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU to time on; --device cpu is a dry run")
    if flags.alone is not None:
        device = torch.device(flags.device)
        try:
            found = (
                measure_peer(flags.alone, device) if flags.alone in PEERS else measure(flags.alone, device, flags.steps)
            )
        except Exception as error:
            traceback.print_exc()
            found = {"name": flags.alone, "failure": f"{type(error).__name__}: {error}"}
        write(flags.out, found)
        return
    unknown = [name for name in flags.only.split(",") if name not in (*PRESETS, *PEERS)]
    if unknown:
        raise UserError(f"--only {unknown[0]}: there are {', '.join((*PRESETS, *PEERS))}")
    end = time.monotonic() + 60 * flags.minutes
    content: dict[str, Any] = json.loads(flags.out.read_text(encoding="utf-8")) if flags.out.exists() else {"rows": []}
    for name in flags.only.split(","):
        left = end - time.monotonic()
        if left <= 0:
            say(f"{name}: no time is left for it")
            continue
        row = alone(name, flags, min(left, flags.timeout)) | {"commit": environment()["commit"]}
        if "failure" in row:
            say(f"{name}: {row['failure']}")
        content["rows"] = [each for each in content["rows"] if each["name"] != name] + [row]
        content |= {"date": date.today().isoformat(), "environment": environment(), "runs": 1}
        write(flags.out, content)
    summary(content["rows"])


def summary(rows: list[dict[str, Any]]) -> None:
    say("| what | kernel by kernel | replayed | busy ms of a step | launches | target | parity |")
    say("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        if "failure" in row:
            say(f"| {row['name']} | {row['failure'][:80]} |")
            continue
        if "parity" not in row:
            busy = f"{row.get('busy_milliseconds', math.nan):.2f} of {row['step_milliseconds']:.2f}"
            say(f"| {row['name']} | {row['tokens_per_second']:,.0f} | | {busy} | {row.get('launches', 0):.0f} | | |")
            continue
        new, parity = row.get("replayed", {}), row["parity"]
        speed = f"{new['tokens_per_second']:,.0f}" if new else "not told"
        busy = f"{new.get('busy_milliseconds', math.nan):.2f} of {new.get('step_milliseconds', math.nan):.2f}"
        bits = "to the bit" if parity["to_the_bit"] else f"{parity['largest_difference']:.1e}"
        own = f" (own spread {parity['plain_to_plain']:.1e})" if "plain_to_plain" in parity else ""
        say(
            f"| {row['name']} | {row['plain']['tokens_per_second']:,.0f} | {speed} | {busy} | "
            f"{new.get('launches', 0):.0f} | {row['target'] or ''} | {bits}{own} |"
        )


if __name__ == "__main__":
    main()
