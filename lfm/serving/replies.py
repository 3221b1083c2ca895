"""Answers in the shapes that OpenAI's clients read."""

import functools
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

from lfm.data.tokenizer import Tokenizer
from lfm.inference.batcher import Token
from lfm.serving.engine import Answer, Piece
from lfm.serving.served import Served

Kind = Literal["completion", "chat"]

_REASONS = {
    **{"stop": "stop", "end_of_document": "stop", "length": "length", "context": "length"},
    "withheld": "content_filter",
}


_LEAST = -9999.0
"""Of logprobs."""


class Reply:
    """What one request is answered with."""

    def __init__(self, kind: Kind, served: Served, answers: Sequence[Answer]) -> None:
        self.kind, self.served, self.answers = kind, served, answers
        self.id = ("cmpl-" if kind == "completion" else "chatcmpl-") + secrets.token_hex(12)
        self.created = int(time.time())

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """Of all pieces of each answer."""
        choices = []
        for index, of in enumerate(pieces):
            text = "".join(piece.text for piece in of)
            choice: dict[str, Any] = {"index": index, **self._logprobs(index, of)}
            if self.kind == "completion":
                choice["text"] = text
            else:
                refusal = text if of[-1].reason == "withheld" else None
                choice["message"] = {"role": "assistant", "content": text, "refusal": refusal}
            choices.append(choice | self._end(of[-1]))
        kind = "text_completion" if self.kind == "completion" else "chat.completion"
        return self._frame(kind) | {"choices": choices, "usage": self.usage()}

    def chunk(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        """Of the next pieces of an answer, in a stream; None: they have nothing to say."""
        text, last = "".join(piece.text for piece in pieces), pieces[-1]
        shows_logprobs = self.answers[index].ask.logprobs is not None and any(piece.token for piece in pieces)
        if not (text or last.reason is not None or last.picture is not None or shows_logprobs):
            return None
        choice: dict[str, Any] = {"index": index, "finish_reason": None, **self._logprobs(index, pieces)}
        if self.kind == "completion":
            choice["text"] = text
        else:
            choice["delta"] = {"content": text} if text or last.reason is None else {}
            if last.reason == "withheld":
                choice["delta"]["refusal"] = text
        if last.picture is not None:
            choice["lfm"] = {"picture": last.picture}
        if last.reason is not None:
            choice |= self._end(last)
        return self._frame(self._stream_kind) | {"choices": [choice]}

    def first_chunks(self) -> list[dict[str, Any]]:
        """Before all pieces: in a chat, who speaks."""
        if self.kind == "completion":
            return []
        role = {"role": "assistant", "content": ""}
        return [
            self._frame(self._stream_kind) | {"choices": [{"index": index, "delta": role, "finish_reason": None}]}
            for index in range(len(self.answers))
        ]

    def last_chunk(self) -> dict[str, Any]:
        return self._frame(self._stream_kind) | {"choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """A prompt that is answered several times counts once."""
        prompts = {id(answer.ask.prompt): answer for answer in self.answers}.values()
        read = sum(len(answer.ask.prompt) for answer in prompts)
        made = sum(len(answer.request.made) for answer in self.answers)
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": sum(answer.request.reused for answer in prompts)},
        }

    @property
    def _stream_kind(self) -> str:
        return "text_completion" if self.kind == "completion" else "chat.completion.chunk"

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.served.name}

    def _end(self, piece: Piece) -> dict[str, Any]:
        assert piece.reason is not None
        extras: dict[str, Any] = {"finish_reason": piece.reason}
        if piece.medical is not None:
            extras["medical"] = piece.medical
        return {"finish_reason": _REASONS[piece.reason], "lfm": extras}

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        asked = self.answers[index].ask.logprobs
        if asked is None:
            return {"logprobs": None}
        tokens = [piece.token for piece in pieces if piece.token is not None]
        tokenizer = self.served.tokenizer
        if self.kind == "chat":
            return {"logprobs": {"content": [_chat_logprob(token, tokenizer) for token in tokens], "refusal": None}}
        before = len(self.answers[index].ask.text)
        likeliest = [{_text(id, tokenizer): _number(x) for id, x in token.likeliest} for token in tokens]
        return {
            "logprobs": {
                "tokens": [_text(token.id, tokenizer) for token in tokens],
                "token_logprobs": [_number(token.logprob) for token in tokens],
                "top_logprobs": likeliest if asked else None,
                "text_offset": [before + piece.start for piece in pieces if piece.token is not None],
            }
        }


@functools.lru_cache(maxsize=1 << 16)
def _shown(id: int, tokenizer: Tokenizer) -> tuple[str, bytes]:
    return tokenizer.text_of(id), tokenizer.bytes_of(id)


def _text(id: int, tokenizer: Tokenizer) -> str:
    """Of a token; of one that is a part of a character its bytes, as OpenAI's completions have them."""
    text, held = _shown(id, tokenizer)
    return text if text.encode() == held else "bytes:" + "".join(f"\\x{byte:02x}" for byte in held)


def _number(logprob: float | None) -> float | None:
    """JSON has no infinite ones."""
    return None if logprob is None else max(logprob, _LEAST)


def _chat_logprob(token: Token, tokenizer: Tokenizer) -> dict[str, Any]:
    def shown(id: int, logprob: float | None) -> dict[str, Any]:
        text, held = _shown(id, tokenizer)
        return {"token": text, "logprob": _number(logprob), "bytes": list(held)}

    return shown(token.id, token.logprob) | {"top_logprobs": [shown(*each) for each in token.likeliest]}


def event(content: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
