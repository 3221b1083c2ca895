"""Records of prompts and completions, or of conversations, to text of which a part are labels."""

from typing import Any, NamedTuple

from lfm.errors import UserError
from lfm.files import shown

_ASSISTANT = "assistant"


class Span(NamedTuple):
    """A part of a document."""

    text: str
    is_label: bool
    """A model is trained to give it, and to end behind it; what is no label it is only given."""


def spans_of(record: Any, origin: str) -> tuple[Span, ...]:
    """The parts of one record.

    Either `prompt` and `completion`, which is the label, as they are; or `messages`, each with a `role` and a
    `content`: those of the role assistant are labels, and any other ends with a newline, as what is typed in a chat.
    Raises UserError naming `origin` for any other record.
    """
    if not isinstance(record, dict):
        raise _unfit(origin, f"holds {_kind(record)}")
    if "messages" in record:
        if "prompt" in record or "completion" in record:
            raise _unfit(origin, "has messages and a prompt or completion, of which one is to be chosen")
        return _of_messages(record["messages"], origin)
    for key in ("prompt", "completion"):
        if key not in record:
            keys = shown(", ".join(record)) or "none"
            raise _unfit(origin, f"has neither messages nor {key} (its keys: {keys})")
        if not isinstance(record[key], str):
            raise _unfit(origin, f"has {_kind(record[key])} under {key}, which takes text")
    return Span(record["prompt"], False), Span(record["completion"], True)


def _of_messages(messages: Any, origin: str) -> tuple[Span, ...]:
    if not isinstance(messages, list):
        raise _unfit(origin, f"has {_kind(messages)} under messages, which takes a list")
    spans = []
    for number, message in enumerate(messages, start=1):
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise _unfit(origin, f"has no text under role or content of message {number}")
        spans.append(Span(content, True) if role == _ASSISTANT else Span(content + "\n", False))
    if not any(span.is_label for span in spans):
        raise _unfit(origin, f"has no message of the role {_ASSISTANT}, so that nothing is a label")
    return tuple(spans)


def _kind(value: Any) -> str:
    """In words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    return {str: "text", list: "a list", dict: "a mapping"}.get(type(value), "a number")


def _unfit(origin: str, what: str) -> UserError:
    return UserError(
        f"{origin} {what}; with labels=completion each line has a prompt and a completion, or messages with role and "
        "content"
    )
