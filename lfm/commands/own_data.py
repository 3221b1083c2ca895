"""`lfm train --data DIR --family KIND --minutes M`: a preset that fits data, device and time, as a RunConfig."""

import difflib
import hashlib
import json
import math
import os
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lfm.data.bins import BIN_NAMES
from lfm.data.format import INDEX_NAME, TOKENIZER_NAME
from lfm.data.reader import RowReader, ShardReader
from lfm.data.stream import DataConfig, open_split
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.files import exists, expanded, read_file, refusing, shown, write_durably
from lfm.layout.layout import check_layout
from lfm.training.pace import PLACES, seconds_per_step
from lfm.training.plan import memory_estimate
from lfm.training.run import RunConfig

PRESETS = {
    "liquidnet": ("liquidnet_debug", "liquidnet_tiny", "liquidnet_small", "liquidnet_base"),
    "lfm": ("lfm_debug", "lfm_tiny", "lfm_small", "lfm_350m", "lfm_3b"),
    "transformer": ("transformer_debug", "transformer_small"),
    "laerc": ("laerc_debug",),
    "liquidlm": ("liquidlm_debug", "liquidlm"),
    "liquidnn": ("liquidnn_debug", "liquidnn_base", "liquidnn_large"),
    "lstm": ("lstm_debug",),
}
"""Family -> its presets, small ones first."""
DEFAULT_FAMILY, DEFAULT_MINUTES = "liquidnet", 5.0
CHOSEN = "chosen.yaml"
"""In the run folder: what was chosen, so that the same command goes on with it."""

_TOKENS_A_PARAMETER = 10
"""Fewer teach a model less than they would a smaller one."""
_MOST_READINGS, _FEWEST_STEPS = 5, 200
"""Of the training text: after more, it is known by heart and other text worse than before; but so many steps."""
_SHARE_OF_TIME = 0.9
"""What is planned for; a machine is not always as fast as when it was measured."""
_MEASURING_SHARE, _MEASURING_SECONDS = 0.04, 15.0
_SHARE_OF_MEMORY = 0.7
_ROWS_OF_BINS = 256
"""Length of rows that are cut out of .bin files."""
_VALIDATIONS = 8
_SCORING_COST = 0.4
"""Of a row, over that of training on it."""
_LARGE_BYTES = 4 << 30
"""A state of more is saved at the end alone."""


@dataclass(frozen=True)
class Wish:
    """What the command line says."""

    data: str
    family: str
    minutes: float
    overrides: tuple[str, ...]

    @property
    def words(self) -> str:
        return f"--data {shlex.quote(self.data)} --family {self.family} --minutes {self.minutes:g}"


@dataclass(frozen=True)
class _Data:
    seq_length: int
    vocab_size: int
    train: RowReader
    validation: RowReader

    @property
    def tokens(self) -> int:
        return self.train.index.num_tokens


def own_run(wish: Wish, *, started: float, measure: bool = True) -> tuple[RunConfig, list[str]]:
    """The run that `wish` means, and what is to be said of it, a line each.

    One whose folder holds what was chosen before goes on with that.  `started`: when the minutes began, by
    `time.monotonic`.  Without `measure`, the smallest preset, for its folder.  Raises UserError.
    """
    check_family(wish.family)
    if not 0 < wish.minutes < math.inf:
        raise UserError(f"--minutes {wish.minutes:g} is no time to train for; give a number above 0, such as 5")
    smallest = _preset(wish, PRESETS[wish.family][0], _open(wish), steps=1)
    folder = smallest.folder
    if exists(folder / CHOSEN):
        return _chosen_before(wish, folder)
    if exists(folder / "checkpoints"):
        raise UserError(f"{shown(folder)} is a run of another command; give another name=NAME or output=DIR")
    return _chosen(wish, started=started) if measure else (smallest, [])


def keep_choice(run: RunConfig, wish: Wish) -> None:
    """Write what was chosen into the run folder.  Raises UserError when it cannot be written."""
    text = f"{_headline(wish)}\n{run.to_yaml()}"
    with refusing("set output=DIR"):
        run.folder.mkdir(parents=True, exist_ok=True)
        if not exists(run.folder / CHOSEN):
            write_durably(run.folder / CHOSEN, text.encode())


def _headline(wish: Wish) -> str:
    return f"# lfm train {wish.words}"


def check_family(family: str) -> None:
    """Raises UserError for one that there is not."""
    if family not in PRESETS:
        near = difflib.get_close_matches(family, PRESETS, n=1)
        way_out = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRESETS)}"
        raise UserError(f"--family {shown(family)} is none; {way_out}")


def _open(wish: Wish) -> _Data:
    config, root = DataConfig(path=wish.data), expanded(wish.data)
    if any(exists(root / name) for name in BIN_NAMES.values()):
        seq_length, vocab_size = _ROWS_OF_BINS, Tokenizer.from_file(root / TOKENIZER_NAME).vocab_size
    elif exists(root / "train" / INDEX_NAME):
        index = ShardReader(root / "train").index
        seq_length, vocab_size = index.seq_length, index.vocab_size
    else:
        seq_length, vocab_size = 1, 1  # opening says what is missing
    sizes = {"seq_length": seq_length, "vocab_size": vocab_size}
    return _Data(
        **sizes, train=open_split(config, "train", **sizes), validation=open_split(config, "validation", **sizes)
    )


def _preset(wish: Wish, preset: str, data: _Data, *, steps: int) -> RunConfig:
    """A shipped run for this data and so many steps.

    Sizes and rows of a step, in tokens, are the preset's; the recipe is that of the family's smallest, which is for
    short runs, with a rate in proportion to 1 / width where the optimizer does not do that itself.
    """
    of_sizes, recipe = RunConfig.load(preset), RunConfig.load(PRESETS[wish.family][0])
    m, t, o, s = of_sizes.model, of_sizes.training, recipe.optimizer, recipe.schedule
    micro_rows = max(1, t.micro_batch_size * m.seq_length // data.seq_length)
    num_micro = t.global_batch_size // t.micro_batch_size
    rows = max(1, len(data.train) // 4)  # of which a step takes no more
    micro_rows, num_micro = min(micro_rows, rows), max(1, min(num_micro, rows // micro_rows))
    warmup = s.warmup_fraction or min(0.1, max(0.02, s.warmup_steps / recipe.training.steps))
    lr = o.lr if o.lr_at_width is not None else o.lr * recipe.model.hidden_size / m.hidden_size
    each = max(1, steps // _VALIDATIONS)
    state_bytes = m.count_parameters().total * 16
    chosen = {
        "name": f"{_name(wish.data)}_{wish.family}",
        "model.vocab_size": data.vocab_size,
        "model.seq_length": data.seq_length,
        "data": {"path": wish.data},
        "training.steps": steps,
        "training.global_batch_size": micro_rows * num_micro,
        "training.micro_batch_size": micro_rows,
        "optimizer": o.model_dump(mode="json") | {"lr": float(f"{lr:.3g}")},
        "schedule": s.model_dump(mode="json") | {"warmup_fraction": warmup},
        "validation": {"every_steps": each, "max_rows": _validation_rows(data, steps, micro_rows * num_micro)},
        "checkpoint": {
            "every_steps": 0 if state_bytes > _LARGE_BYTES else 2 * each,
            "keep_best": state_bytes <= _LARGE_BYTES,
        },
        "logging.every_steps": max(1, steps // 50),
        "samples": {"prompts": []},
    }
    positions = getattr(m, "max_positions", None)
    if positions is not None:
        chosen["model.max_positions"] = max(positions, data.seq_length)
    overrides = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
    return RunConfig.load(preset, [*overrides, *wish.overrides])


def _validation_rows(data: _Data, steps: int, global_rows: int) -> int:
    """All of them, or what all validations together may take: a tenth of the training."""
    affordable = int(0.1 * steps * global_rows / _SCORING_COST / _VALIDATIONS)
    return max(1, min(len(data.validation), affordable))


def _chosen(wish: Wish, *, started: float) -> tuple[RunConfig, list[str]]:
    data, best = _open(wish), None
    limit = min(_MEASURING_SECONDS, _MEASURING_SHARE * wish.minutes * 60)
    for preset in PRESETS[wish.family]:
        run = _preset(wish, preset, data, steps=PLACES)
        if best is not None and not _may_fit(run, wish, data, best, started=started):
            break
        try:
            seconds = seconds_per_step(run, limit_seconds=limit)
        except torch.OutOfMemoryError:
            if best is None:
                raise
            break
        found = _Candidate(preset, run, seconds)
        if best is not None and found.tokens_in(_left(wish, started)) < _TOKENS_A_PARAMETER * found.parameters:
            break
        best = found
    assert best is not None
    left = _left(wish, started)
    all_rows = len(data.validation) * _SCORING_COST / best.run.training.global_batch_size * best.seconds  # at the end
    by_time = int(max(0.0, left - all_rows) / best.seconds / 1.1)
    by_text = max(_FEWEST_STEPS, _steps_of_readings(data, best.tokens_a_step))
    steps = min(by_time, by_text)
    if steps < 10:
        raise UserError(
            f"--minutes {wish.minutes:g} is too short: {time.monotonic() - started:.0f} s have passed and a step of "
            f"{best.preset} takes {best.seconds:.2g} s; give {math.ceil(wish.minutes + 20 * best.seconds / 60)} or more"
        )
    run = _preset(wish, best.preset, data, steps=steps)
    return run, list(_said(wish, run, best, data, by_time=by_time))


def _steps_of_readings(data: _Data, tokens_a_step: int) -> int:
    """After which the text has been read as often as it should be."""
    return math.ceil(_MOST_READINGS * data.tokens / tokens_a_step)


@dataclass(frozen=True)
class _Candidate:
    preset: str
    run: RunConfig
    seconds: float
    """Of a step."""

    @property
    def parameters(self) -> int:
        return self.run.model.count_parameters().trainable

    @property
    def tokens_a_step(self) -> int:
        return self.run.training.global_batch_size * self.run.model.seq_length

    def tokens_in(self, seconds: float) -> float:
        return seconds / self.seconds * self.tokens_a_step


def _left(wish: Wish, started: float) -> float:
    return _SHARE_OF_TIME * wish.minutes * 60 - (time.monotonic() - started)


def _may_fit(run: RunConfig, wish: Wish, data: _Data, smaller: _Candidate, *, started: float) -> bool:
    """Whether a larger preset is worth measuring: text, memory and, by its FLOPs, time may be enough for it."""
    m = run.model
    wanted = _TOKENS_A_PARAMETER * m.count_parameters().trainable
    if _MOST_READINGS * data.tokens < wanted or _memory_bytes(run) > _SHARE_OF_MEMORY * _free_bytes(run.device):
        return False
    if run.device.type == "cuda":  # a small model does not show what a GPU can do
        return True
    tokens = smaller.tokens_in(_left(wish, started)) * smaller.run.model.flops_per_token() / m.flops_per_token()
    return tokens >= wanted


def _memory_bytes(run: RunConfig) -> float:
    """An estimate of all that a run needs on its device."""
    t, m = run.training, run.model
    layout = check_layout(
        m, run.parallel, 1, global_batch_size=t.global_batch_size, micro_batch_size=t.micro_batch_size
    )
    state = sum(memory_estimate(run, layout).values())
    # What the layers keep for the backward pass: some thirty vectors a token each.
    kept = 0.0 if m.kind == "lfm" else t.micro_batch_size * m.seq_length * m.hidden_size * m.num_layers * 30.0
    return (state + 2 * kept) * (1 if run.dtype.itemsize == 2 else 2)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _said(wish: Wish, run: RunConfig, best: _Candidate, data: _Data, *, by_time: int) -> Iterator[str]:
    steps, tokens = run.training.steps, best.tokens_a_step
    device = (
        torch.cuda.get_device_name(run.device)
        if run.device.type == "cuda"
        else f"the CPU, threads: {torch.get_num_threads()}"
    )
    yield f"preset: {best.preset}, {best.parameters:,} parameters, for {device}; {_why_no_larger(wish, best, data)}"
    sizes = f"a vocabulary of {run.model.vocab_size:,}, rows of {run.model.seq_length}"
    yield f"data: {wish.data}, {data.tokens:,} ids to train on; {sizes}"
    yield f"speed: {best.seconds:.3g} s a step of {tokens:,} ids, measured"
    readings = steps * tokens / max(1, data.tokens)
    by_readings = _steps_of_readings(data, tokens)
    if steps != min(by_time, max(_FEWEST_STEPS, by_readings)):
        why = "as training.steps says"
    elif steps == by_time:
        why = f"what fits into {_SHARE_OF_TIME:.0%} of {wish.minutes:g} minutes, set-up and validation counted"
    elif steps == _FEWEST_STEPS > by_readings:
        why = (
            f"{_MOST_READINGS} readings would be {by_readings} steps, in which a model learns little; {_FEWEST_STEPS} "
            "are the fewest, though by their end a text so short is known by heart"
        )
    else:
        why = f"{by_time:,} would fit into the time, but after more readings a text is known by heart"
    yield f"steps: {steps:,}, {readings:.1f} readings of the text: {why}"


def _why_no_larger(wish: Wish, best: _Candidate, data: _Data) -> str:
    if best.preset == PRESETS[wish.family][-1]:
        return f"the largest of family {wish.family}" if len(PRESETS[wish.family]) > 1 else "the one of its family"
    return "a larger one would not learn enough from this text, time and memory"


def _chosen_before(wish: Wish, folder: Path) -> tuple[RunConfig, list[str]]:
    path = folder / CHOSEN
    headline = read_file(path).decode(errors="replace").partition("\n")[0]
    if _meant(headline) != _meant(_headline(wish)):
        before = shown(headline.removeprefix("# "))
        raise UserError(
            f"{shown(folder)} was begun by `{before}`; repeat that to go on, or give another name=NAME or output=DIR"
        )
    return RunConfig.load(path, wish.overrides), [f"going on with what was chosen before, {shown(path)}"]


def _meant(headline: str) -> list[str]:
    """The words of a command, the data's folder however it is written."""
    try:
        words = shlex.split(headline)
        place = words.index("--data") + 1
        words[place] = os.path.realpath(expanded(words[place]))
    except (ValueError, IndexError, UserError):  # a damaged line is another command
        return [headline]
    return words


def _name(data: str) -> str:
    """A run's name of a data folder's; one that loses letters by it is told from others by a hash of its path."""
    path = os.path.abspath(expanded(data))
    folder = os.path.basename(path)
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", folder).lstrip("._-")
    if not any(letter.isalnum() and not letter.isascii() for letter in folder) and plain:
        return plain
    digest = hashlib.blake2b(os.path.realpath(path).encode(errors="surrogateescape"), digest_size=3).hexdigest()
    return f"{plain.rstrip('._-') or 'run'}_{digest}"


def last_words(run: RunConfig) -> Iterator[str]:
    """What a finished run has learnt, and what to do with it."""
    from lfm.checkpoint.folder import BEST, find, whole_checkpoints
    from lfm.commands.evaluate import EvaluateConfig, held_out

    checkpoints = run.folder / "checkpoints"
    best = checkpoints / BEST
    if not whole_checkpoints(checkpoints):
        return
    # A run that was read too often ends worse than it was.
    newest_is_best = not exists(best) or os.path.realpath(best) == os.path.realpath(find(run.folder))
    path = run.folder if newest_is_best else Path(os.path.relpath(os.path.realpath(best), Path.cwd()))
    device = "cuda" if run.device.type == "cuda" else "cpu"
    yield from held_out(path, data=None, device=device, config=EvaluateConfig())
    yield f"run folder: {shown(run.folder)}"
    yield f"next: lfm chat --checkpoint {shlex.quote(str(path))}"
