"""A thread that makes the answers of one model, and hands them to the event loop piece by piece."""

import asyncio
import contextlib
import itertools
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lfm.errors import NonFiniteError, UserError
from lfm.inference.batcher import Batcher, Request, Token
from lfm.inference.sampling import SamplingConfig
from lfm.inference.text import Writer
from lfm.medical.asking import MedicalMode
from lfm.medical.selective import REFERRAL
from lfm.serving.config import ServeConfig
from lfm.serving.metrics import Metrics
from lfm.serving.picture import picture_of
from lfm.serving.refusal import Refusal, shutting_down
from lfm.serving.served import Served
from lfm.talk import warn

_MOST_UNREAD = 16 << 20
"""Bytes that wait for one reader: with more the model waits, or, where the reader takes nothing, the answer ends."""
_SECONDS_TO_LET_READ = 0.005
"""What a model waits between two steps then."""
_SECONDS_TO_TAKE = 2.0
"""Without which a reader with so much before it is one that does not read."""


@dataclass(frozen=True)
class Ask:
    """One answer that is asked for."""

    prompt: Sequence[int]
    text: str
    """Of the prompt."""
    sampling: SamplingConfig
    logprobs: int | None = None
    picture_every: int = 0
    """Tokens from one picture of the state to the next; 0: none."""


@dataclass
class Piece:
    """What one more token brings."""

    text: str
    """May be empty: of an incomplete character, or of what may become a stop text."""
    token: Token | None = None
    """None with the last piece, if its token belongs to no text: the end of the document."""
    picture: dict[str, Any] | None = None
    reason: str | None = None
    """Of the last piece: why the answer ended."""
    medical: dict[str, Any] | None = None
    """Of the last piece in medical mode: how sure it is, and by which thresholds it answers or not."""
    start: int = 0
    """Where in the continuation the token's own text begins, whether it is given out or not, in characters."""

    def count_bytes(self) -> int:
        """About: what it takes to keep it."""
        cells = sum(len(row["cells"]) for row in self.picture["state"]) if self.picture else 0
        return 600 + 32 * cells + (130 * len(self.token.likeliest) if self.token else 0)


class Mailbox:
    """What has arrived of answers that were asked for together.  All of it is of one event loop's thread."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._arrived: list[tuple[int, Piece | Refusal]] = []
        self._something = asyncio.Event()
        self._num_bytes, self._taken = 0, time.monotonic()

    @property
    def is_full(self) -> bool:
        """From any thread."""
        return self._num_bytes > _MOST_UNREAD

    @property
    def is_read(self) -> bool:
        """Whether something was taken of late."""
        return time.monotonic() - self._taken < _SECONDS_TO_TAKE

    def put(self, index: int, event: "Piece | Refusal") -> None:
        self._arrived.append((index, event))
        self._something.set()
        self._num_bytes += 0 if isinstance(event, Refusal) else event.count_bytes()

    async def take(self) -> "list[tuple[int, Piece | Refusal]]":
        """All that has come since, at least one: which answer's, and its next piece or the Refusal that ends it."""
        await self._something.wait()
        self._something.clear()
        self._taken = time.monotonic()
        arrived, self._arrived, self._num_bytes = self._arrived, [], 0
        return arrived


@dataclass(eq=False)
class Answer:
    """An answer that is being made."""

    ask: Ask
    request: Request
    writer: Writer
    mailbox: Mailbox
    index: int
    """In the mailbox."""
    started: float
    given: int = 0
    """Characters."""
    ended: bool = False


class Engine:
    """`start` and `close` it; between, `submit` and `cancel` from the thread of an event loop."""

    def __init__(self, served: Served, config: ServeConfig, metrics: Metrics) -> None:
        self.served, self.config, self.metrics = served, config, metrics
        self.batcher = Batcher(served.model, config)
        self._changed = threading.Condition()
        self._new: list[Answer] = []
        self._cancelled: list[Answer] = []
        self._closing = False
        self._by_request: dict[Request, Answer] = {}
        """Of those that the batcher has, or that wait for medical mode."""
        self._outstanding = 0
        self._given: list[tuple[Answer, Piece | Refusal]] = []
        """That are not in their mailboxes yet; of this engine's thread."""
        self._thread = threading.Thread(target=self._work, name=f"lfm serve {served.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Refuse what is in hand, and all that comes."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def outstanding(self) -> int:
        """Answers that were taken on and have not ended."""
        return self._outstanding

    def submit(self, asks: Sequence[Ask]) -> list[Answer]:
        """Take on all of them, with one mailbox.  Raises Refusal where the queue has no room for all."""
        mailbox, now = Mailbox(), time.monotonic()
        answers = []
        for index, ask in enumerate(asks):
            request = Request(ask.prompt, ask.sampling, ask.logprobs)
            writer = Writer(self.served.tokenizer, ask.prompt, ask.sampling)
            answers.append(Answer(ask, request, writer, mailbox, index, now))
        with self._changed:
            if self._closing:
                raise shutting_down()
            room = self.config.slots + self.config.queue - self._outstanding
            if len(asks) > room:
                raise Refusal(
                    429,
                    f"{self._outstanding} answers are being made or wait already; try again in a while",
                    "queue_full",
                    {"Retry-After": "1"},
                )
            self._outstanding += len(answers)
            self._new += answers
            self._changed.notify()
        return answers

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Free the slots of those that have not ended."""
        with self._changed:
            self._cancelled += [answer for answer in answers if not answer.ended]
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._new or self._cancelled or self._closing or self._by_request)
                if self._closing:
                    break
                new, self._new = self._new, []
                cancelled, self._cancelled = self._cancelled, []
            try:
                self._go_on(new, cancelled)
            except Exception:  # a bug, or a device that is out of memory: these answers end, later ones may fare better
                warn(f"error: the answers of {self.served.name} in hand failed\n{traceback.format_exc()}")
                self._fail(new)
                self._measure()
            self._deliver()
        self._refuse_all(shutting_down())
        self._deliver()

    def _deliver(self) -> None:
        """Put what a step has given into mailboxes: the event loop is woken once, not for every piece."""
        given, self._given = self._given, []

        def put(these: list[tuple[Answer, Piece | Refusal]]) -> None:
            for answer, event in these:
                answer.mailbox.put(answer.index, event)

        for loop in {answer.mailbox.loop for answer, _ in given}:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
                loop.call_soon_threadsafe(put, [each for each in given if each[0].mailbox.loop is loop])

    def _go_on(self, new: list[Answer], cancelled: list[Answer]) -> None:
        for answer in new:
            self._by_request[answer.request] = answer
            if self.served.medical is None:
                self.batcher.add(answer.request)
            self.metrics.prompt_tokens.labels(self.served.name).inc(len(answer.ask.prompt))
        for answer in cancelled:
            self._end(answer, "cancelled")
        self._end_unread()
        self._end_late()
        if self.served.medical is not None:
            if self._by_request:
                self._ask(self.served.medical, next(iter(self._by_request.values())))
            self._measure()
            return
        before = time.monotonic()
        chosen = self.batcher.step()
        now = time.monotonic()
        name = self.served.name
        if chosen:
            self.metrics.step_seconds.labels(name).observe(now - before)
            self.metrics.new_tokens.labels(name).inc(len(chosen))
        for request, token in chosen:
            answer = self._by_request[request]
            if len(request.made) == 1:
                self.metrics.first_token.labels(name).observe(now - answer.started)
                self.metrics.reused_tokens.labels(name).inc(request.reused)
            self._take(answer, token)
        for request in [request for request in self._by_request if request.error is not None]:
            self._refuse(self._by_request[request], _broken(request.error), "broken")
        self._measure()

    def _take(self, answer: Answer, token: Token) -> None:
        writer, request = answer.writer, answer.request
        ends = writer.take(token.id)
        if request.ended and not ends:  # the batcher ends a request before the text does where the context is full
            writer.end("context")
        text, answer.given = writer.made.text[answer.given :], len(writer.made.text)
        reason, picture = writer.made.finish_reason, None
        every = answer.ask.picture_every
        if every and reason is None and len(request.made) % every == 0:
            picture = picture_of(self.batcher, request)
        shown = None if reason == "end_of_document" else token
        piece = Piece(text, shown, picture, reason, start=writer.start)
        if reason is not None:
            self._end(answer, reason)
        self._given.append((answer, piece))

    def _ask(self, medical: MedicalMode, answer: Answer) -> None:
        """One question by itself, as `lfm generate --medical` does: nothing is given before it is judged."""
        name = self.served.name
        try:
            [reply] = medical.ask([answer.ask.text], [()])
        except UserError as error:
            self._refuse(answer, Refusal(400, str(error)), "refused")
            return
        except NonFiniteError as error:
            self._refuse(answer, _broken(error), "broken")
            return
        self.metrics.first_token.labels(name).observe(time.monotonic() - answer.started)
        reason = "withheld"
        if reply.answer is not None and reply.made is not None:
            answer.request.made += reply.made.tokens
            self.metrics.new_tokens.labels(name).inc(len(answer.request.made))
            reason = reply.made.finish_reason or "stop"
        text = REFERRAL if reply.answer is None else reply.answer
        self._end(answer, reason)
        self._given.append((answer, Piece(text, reason=reason, medical=reply.decision.record())))

    def _end_unread(self) -> None:
        """End answers that nobody reads; where there are readers, wait while more lies before one than it can take."""
        full = [answer for answer in self._by_request.values() if answer.mailbox.is_full]
        for answer in full:
            if not answer.mailbox.is_read:
                self._refuse(answer, Refusal(503, "the answer was not read", "unread"), "unread")
        if any(not answer.ended for answer in full):
            time.sleep(_SECONDS_TO_LET_READ)

    def _end_late(self) -> None:
        """End answers whose time is up."""
        now, config = time.monotonic(), self.config
        for answer in list(self._by_request.values()):
            waited = now - answer.started
            if waited > config.max_seconds:
                refusal = Refusal(504, f"the answer took longer than {config.max_seconds:g} seconds", "too_slow")
                self._refuse(answer, refusal, "too_slow")
            elif waited > config.max_wait_seconds and self._waits(answer):
                refusal = Refusal(
                    503, f"no slot was free for {config.max_wait_seconds:g} seconds; try again in a while", "no_slot"
                )
                refusal.headers["Retry-After"] = "5"
                self._refuse(answer, refusal, "no_slot")

    def _waits(self, answer: Answer) -> bool:
        """Whether nothing of it was begun; in medical mode one is begun and ended at once."""
        return self.served.medical is not None or answer.request in self.batcher.waiting

    def _refuse(self, answer: Answer, refusal: Refusal, reason: str) -> None:
        if not answer.ended:
            self._end(answer, reason)
            self._given.append((answer, refusal))

    def _end(self, answer: Answer, reason: str) -> None:
        """Once; nothing is given any more."""
        if answer.ended:
            return
        answer.ended = True
        if self.served.medical is None:
            self.batcher.cancel(answer.request)
        self._by_request.pop(answer.request, None)
        self.metrics.answers.labels(self.served.name, reason).inc()
        with self._changed:
            self._outstanding -= 1

    def _fail(self, new: list[Answer]) -> None:
        """End all that are in hand, and begin with an empty batch."""
        answers = list(dict.fromkeys(itertools.chain(self._by_request.values(), new)))
        self.batcher = Batcher(self.served.model, self.config)
        for answer in answers:
            answer.request.ended = True  # the old batch is gone
            self._refuse(answer, Refusal(500, "the answer failed; the server's log says why", "failed"), "failed")

    def _refuse_all(self, refusal: Refusal) -> None:
        with self._changed:
            new, self._new = self._new, []
        for answer in (*self._by_request.values(), *new):
            answer.request.ended = True
            answer.ended = True
            self._given.append((answer, refusal))

    def _measure(self) -> None:
        batcher, name = self.batcher, self.served.name
        self.metrics.running.labels(name).set(len(batcher.running))
        waiting = len(batcher.waiting) + len(batcher.reading)
        self.metrics.waiting.labels(name).set(waiting if self.served.medical is None else len(self._by_request))
        self.metrics.state_bytes.labels(name).set(batcher.rows.num_bytes)
        self.metrics.kept_bytes.labels(name).set(batcher.prefixes.num_bytes)


def _broken(error: NonFiniteError | None) -> Refusal:
    return Refusal(500, f"{error}; it is of no use", "not_finite")
