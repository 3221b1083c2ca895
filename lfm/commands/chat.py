"""Chat: `python launch/chat.py --checkpoint runs/NAME [--state FILE]`; the model reads, replies, and keeps its state.

These are plain language models: a reply is a continuation of everything typed and replied so far.
"""

import argparse
import contextlib
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm.commands.line_editing import is_terminal, remembering, typed
from lfm.commands.medical_flags import add_medical_flags, check_as_calibrated, medical_of
from lfm.config import add_flags, from_flags, path_flag
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import exists, read_file, ready_folder, reason, shown
from lfm.inference.conversation import Conversation
from lfm.inference.sampling import SamplingConfig
from lfm.models.liquidnn import MiniLiquidGPT, trace_norms, turn_plasticity_off

if TYPE_CHECKING:
    from lfm.medical.asking import MedicalMode

HELP = "/reset forgets everything read; /state lists the state; /hebb the plastic traces; /quit ends, as does Ctrl-D"


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Talk with a trained model in the terminal; text appears as it is made."
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=path_flag,
        metavar="RUN_OR_STEP",
        help="run or step_* folder, or hf://USER/NAME",
    )
    parser.add_argument(
        "--state", type=path_flag, metavar="FILE", help="go on from this state if it exists; keep it there"
    )
    parser.add_argument("--no-plasticity", action="store_true", help="kind liquidnn: traces neither act nor change")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_medical_flags(parser)
    add_flags(parser, SamplingConfig)
    flags = parser.parse_args()
    sampling = from_flags(SamplingConfig, flags)
    from lfm.checkpoint.manifest import read_manifest
    from lfm.inference.load import open_model
    from lfm.medical.asking import MedicalMode, check_sampling

    model, tokenizer, checkpoint = open_model(flags.checkpoint, device=flags.device)
    manifest = read_manifest(checkpoint, warn=False)  # open_model has warned
    medical = medical_of(flags, checkpoint)
    if flags.no_plasticity:
        turn_plasticity_off(model)
    digest = hashlib.blake2b(read_file(checkpoint / "manifest.json"), digest_size=4).hexdigest()
    weights = f"{manifest['config']['name']} step {manifest['step']} ({digest})"
    if medical.mode:
        if flags.state is not None:
            raise UserError("--state does not go with medical mode, which asks each line by itself; leave it out")
        check_sampling(sampling)
        check_as_calibrated(no_plasticity=flags.no_plasticity)
        mode = MedicalMode(model, tokenizer, checkpoint, medical, {"text"})
        with remembering() as lines, _stop_signals() as stop:
            question_by_question(mode, weights, stop, lines)
        return
    talk = Conversation(model, sampling, end_of_document=tokenizer.eod_id)
    if flags.state is not None:
        if model.config.context_limit is not None:
            raise UserError(f"--state: the state of {model.config.kind} grows with its text and is not kept in files")
        ready_folder(flags.state.parent)
        if exists(flags.state):
            talk.load(flags.state, checkpoint=weights)
    with remembering() as lines, _stop_signals() as stop:
        try:
            converse(talk, tokenizer, weights, stop, lines)
        finally:  # also after an error, or when nobody reads what is printed
            stop.at_once = False
            if flags.state is not None:
                keep(talk, flags.state, weights)


def converse(talk: Conversation, tokenizer: Tokenizer, weights: str, stop: "_Stop", lines: list[str]) -> None:
    """Read and reply until the input ends, /quit or a stop signal, which ends a reply after the token in hand.

    Ctrl-C at a terminal ends a reply, or the line that is being typed; a second one at an empty prompt leaves.  What
    is read is added to `lines`.
    """
    print(f"{weights}, {talk.model.config.kind}; {describe(talk)}. {HELP}", flush=True)
    # Bytes that are no UTF-8 reach the tokenizer's check, which names them.
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    was_empty = False
    while not stop.asked:
        try:
            with stop.while_waiting():
                line = input("> " if sys.stdin.isatty() else "")
        except _Interrupted as interrupted:
            is_empty = str(interrupted) == ""
            print("\n(Ctrl-C again leaves)" if is_empty and not was_empty else "", flush=True)
            if is_empty and was_empty:
                return
            was_empty = is_empty
            continue
        except (EOFError, _Stopped):
            if is_terminal():
                print()
            return
        was_empty = stop.enough = False
        lines.append(line)
        if line == "/quit":
            return
        if line.startswith("/"):
            print(obey(talk, line), flush=True)
            continue
        try:
            turn = tokenizer.encode_prompt(line + "\n", begin=talk.num_tokens == 0)
            _check_room(talk, len(turn))
            talk.read(turn)
            with contextlib.closing(talk.reply_text(tokenizer, turn)) as reply:
                for text in reply:
                    print(text, end="", flush=True)
                    if stop.asked or stop.enough:
                        break
            print()
        except UserError as error:  # the conversation goes on without what could not be read
            print(f"error: {error}", file=sys.stderr)
        print(f"[{describe(talk)}]", flush=True)


def question_by_question(mode: "MedicalMode", weights: str, stop: "_Stop", lines: list[str]) -> None:
    """Answer each line by itself, as it was calibrated, or refer; until the input ends, /quit or a stop signal."""
    print("\n".join([f"{weights}, {mode.model.config.kind}", *mode.words()]), flush=True)
    print("each line is a question by itself; what was said before is not read. /quit ends, as does Ctrl-D", flush=True)
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    while not stop.asked:
        try:
            with stop.while_waiting():
                line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, _Stopped, _Interrupted):
            return
        lines.append(line)
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                raise UserError(
                    f"{line.split()[0]} is not of medical mode, where /quit is the only command; ask a question"
                )
            print(mode.ask([line], [()])[0].text, flush=True)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def _check_room(talk: Conversation, num_tokens: int) -> None:
    limit = talk.model.config.context_limit
    if limit is not None and talk.num_tokens + num_tokens >= limit:
        way_out = "type less" if talk.num_tokens == 0 else "/reset forgets what was read and makes room"
        raise UserError(f"{talk.num_tokens} + {num_tokens} tokens leave no room in the context of {limit}; {way_out}")


def keep(talk: Conversation, path: Path, weights: str) -> None:
    """Write the state.  Raises UserError naming the file when that fails."""
    try:
        talk.save(path, checkpoint=weights)
    except OSError as error:
        raise UserError(f"the state {shown(path)} cannot be written ({reason(error)})") from error


class _Stopped(Exception):
    """A stop signal came while the program waited for its user."""


class _Interrupted(Exception):
    """Ctrl-C while a line was typed at a terminal; as text, the line as far as it was."""


@dataclass
class _Stop:
    asked: bool = False
    """To end the conversation."""
    enough: bool = False
    """To end the reply."""
    at_once: bool = False
    """Whether nothing is in hand that a signal would tear."""

    @contextlib.contextmanager
    def while_waiting(self) -> Iterator[None]:
        self.at_once = True
        try:
            if self.asked:
                raise _Stopped
            yield
        finally:
            self.at_once = False


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """TERM, HUP and, where lines are not typed, Ctrl-C end the conversation, so that it is kept; those that were
    ignored stay ignored.  At a terminal Ctrl-C ends what is in hand.
    """
    stop = _Stop()

    def handle(number: int, frame: Any) -> None:
        waiting, stop.at_once = stop.at_once, False
        if number == signal.SIGINT and is_terminal():
            stop.enough = True
            if waiting:
                raise _Interrupted(typed())
            return
        stop.asked = True
        if waiting:
            raise _Stopped

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        with _nudged():
            yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _nudged() -> Iterator[None]:
    """Signals are handled soon though the program waits for a line.

    One that comes between Python's last look for signals and the read that waits would be handled with the next line.
    So each is followed by others, which mean nothing and interrupt that read, until one of them is handled: it may come
    in that moment too.
    """
    nudge, waiting_thread = signal.SIGURG, threading.get_ident()
    handled = False  # no Event: its lock could be taken when a handler wants it
    coming, written = os.pipe()
    os.set_blocking(written, False)

    def follow() -> None:
        while number := os.read(coming, 1):
            if number[0] != nudge:
                nonlocal handled
                handled = False
                while not handled:
                    time.sleep(0.05)
                    signal.pthread_kill(waiting_thread, nudge)

    thread = threading.Thread(target=follow, name="signals are followed", daemon=True)

    def note(number: int, frame: Any) -> None:
        nonlocal handled
        handled = True

    before = signal.signal(nudge, note)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(written)
        thread.join()
        os.close(coming)
        signal.signal(nudge, before)


def describe(talk: Conversation) -> str:
    """Size of the state, and what it has seen."""
    state = talk.state or talk.model.empty_state(1)
    size = f"{state.num_bytes / 1024:,.1f} KiB" if state is not None else "empty"
    growth = "constant" if talk.model.config.context_limit is None else "growing"
    return f"state {size}, {growth}, {talk.num_tokens:,} tokens read"


def obey(talk: Conversation, line: str) -> str:
    """Carry out a command; what to print."""
    if line == "/reset":
        talk.reset()
        return describe(talk)
    if line == "/state":
        tensors = talk.state.tensors() if talk.state is not None else {}
        listed = (f"{name} {list(t.shape)}, RMS {t.float().square().mean().sqrt():.3g}" for name, t in tensors.items())
        return "\n".join([describe(talk), *listed])
    if line == "/hebb":
        if not isinstance(talk.model, MiniLiquidGPT):
            return f"{talk.model.config.kind} has no plastic cells"
        norms = trace_norms(talk.state or talk.model.empty_state(1))
        cells = (f"deep cell {i}: |M_ih| {float(ih):.4f}, |M_hh| {float(hh):.4f}" for i, (ih, hh) in enumerate(norms))
        return "\n".join(cells)
    return HELP
