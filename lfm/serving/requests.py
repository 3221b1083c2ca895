"""Bodies of requests: what OpenAI's API calls things, and what this one adds."""

import json
import secrets
from typing import Any, ClassVar

from pydantic import Field

from lfm.config import Config
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.inference.sampling import SamplingConfig, check_prompts
from lfm.medical.answering import FREE_TEXT
from lfm.serving.config import ServeConfig
from lfm.serving.engine import Ask
from lfm.serving.refusal import Refusal
from lfm.serving.served import Served

MOST_LOGPROBS = 20
_GREEDY_BELOW = 1e-3
"""Temperatures."""
_UNUSED = frozenset(
    {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""Keys that say nothing about the answer."""
_ONE_VALUE: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Keys that are taken with these values alone, which change nothing."""
_OTHER_ROLES = ("system", "developer", "user")


class _Json(Config):
    is_of_command_lines: ClassVar[bool] = False


class StreamOptions(_Json):
    include_usage: bool = False
    include_obfuscation: bool = False


class Extras(_Json):
    """What this server alone has, under the key `lfm`."""

    picture_every: int = Field(default=0, ge=0, le=1 << 20)
    """Tokens from one picture of state and experts to the next, in a stream; 0: none.  The last token has none."""


class Body(_Json):
    """What completions and chats have in common."""

    model: str | None = None
    """May be left out where one is served."""
    n: int = Field(default=1, ge=1, le=1024)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 24)
    temperature: float = Field(default=1.0, ge=0, le=100)
    """Below 0.001: greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, lt=1 << 31)
    """0 or -1: all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: str | tuple[str, ...] = ()
    lfm: Extras = Extras()

    default_tokens: ClassVar[int] = 100

    def sampling(self, number: int, limit: int) -> SamplingConfig:
        """Of answer `number` of the request.  Raises Refusal for more tokens than the `limit`, and UserError."""
        asked = self.tokens_asked or min(self.default_tokens, limit)
        if asked > limit:
            raise Refusal(400, f"max_tokens={asked} is more than this server makes; the most are {limit}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if len(stop) > 16 or any(len(text) > 1000 for text in stop):
            raise Refusal(400, "stop has more than 16 texts, or one of more than 1000 characters; give less")
        seed = secrets.randbelow(1 << 40) if self.seed is None else self.seed
        tree = {
            "max_new_tokens": asked,
            "greedy": self.temperature < _GREEDY_BELOW,
            "temperature": max(self.temperature, _GREEDY_BELOW),
            "top_k": max(self.top_k, 0),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop": stop,
            "seed": (seed + number) % (1 << 40),
        }
        return SamplingConfig.from_tree(tree, source="the request")

    @property
    def tokens_asked(self) -> int | None:
        return self.max_tokens

    @property
    def logprobs_asked(self) -> int | None:
        raise NotImplementedError

    def prompts(self, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
        """Text and ids of each."""
        raise NotImplementedError

    def questions(self) -> list[str]:
        """Of medical mode.  Raises Refusal for what is more than questions."""
        raise NotImplementedError


class CompletionBody(Body):
    prompt: str | tuple[str, ...] | tuple[int, ...] | tuple[tuple[int, ...], ...]
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)

    @property
    def logprobs_asked(self) -> int | None:
        return self.logprobs

    def prompts(self, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
        given: list[Any] = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        if given and isinstance(given[0], int):
            given = [given]
        return [(of, tokenizer.encode_prompt(of)) if isinstance(of, str) else ("", list(of)) for of in given]

    def questions(self) -> list[str]:
        given: list[Any] = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        if not all(isinstance(of, str) for of in given):
            raise Refusal(400, "prompt holds ids; in medical mode it is a question, or several, as text")
        return given


class Message(_Json):
    role: str
    content: str
    name: str | None = None

    @property
    def text(self) -> str:
        """As conversations are trained on and `lfm chat` reads them: all but replies end with a newline."""
        if self.role == "assistant":
            return self.content
        if self.role not in _OTHER_ROLES:
            raise Refusal(400, f"a message has the role {self.role!r}; there are assistant, {', '.join(_OTHER_ROLES)}")
        return self.content + "\n"


class ChatBody(Body):
    messages: tuple[Message, ...] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1 << 24)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MOST_LOGPROBS)

    @property
    def tokens_asked(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprobs_asked(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def prompts(self, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
        text = "".join(message.text for message in self.messages)
        return [(text, tokenizer.encode_prompt(text))]

    def questions(self) -> list[str]:
        if [message.role for message in self.messages] != ["user"]:
            raise Refusal(400, "in medical mode each question is asked by itself; send one message, of the role user")
        return ["".join(message.text for message in self.messages).removesuffix("\n")]


def parse(kind: type[Body], tree: Any) -> Any:
    """The body of a request.  Raises Refusal, status 400, naming what is wrong with it."""
    if not isinstance(tree, dict):
        raise Refusal(400, "the body is no JSON object")
    kept = {}
    for key, value in tree.items():
        if not key.isprintable():  # half of a surrogate pair, say
            raise Refusal(400, f"{key!r} is no key of a request; leave it out")
        if value is None or key in _UNUSED:
            continue
        if key in _ONE_VALUE and key not in kind.model_fields:
            # JSON tells true from 1.
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in _ONE_VALUE[key]):
                raise Refusal(400, f"{key} is not supported; leave it out", "unsupported")
            continue
        kept[key] = value
    if isinstance(messages := kept.get("messages"), list):
        kept["messages"] = [_read_message(*each) for each in enumerate(messages)]
    for key, field in kind.model_fields.items():
        if field.is_required() and key not in kept:
            raise Refusal(400, f"{key} is missing; give it")
    try:
        return kind.from_tree(kept, source="the request")
    except UserError as error:
        raise Refusal(400, str(error)) from None


def _read_message(number: int, message: Any) -> dict[str, Any]:
    """With its content as one text, and without empty keys, which clients send back with replies."""
    if not isinstance(message, dict):
        raise Refusal(400, f"messages[{number}] is no JSON object; give one with role and content")
    kept = {key: value for key, value in message.items() if key == "content" or (value is not None and value != [])}
    content = kept.get("content")
    if isinstance(content, list):
        places = (f"messages[{number}].content[{i}]" for i in range(len(content)))
        kept["content"] = "".join(map(_read_part, places, content))
    elif not isinstance(content, str):
        raise Refusal(400, f"messages[{number}].content is no text, nor a list of texts; this server reads text alone")
    return kept


def _read_part(place: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise Refusal(400, f'{place} is no {{"type": "text", "text": TEXT}}; this server reads text alone')


def asks(body: Body, served: Served, config: ServeConfig) -> list[Ask]:
    """The answers that a body asks for, `n` of each prompt.  Raises Refusal, status 400."""
    try:
        if served.medical is not None:
            _check_as_calibrated(body)
            questions = body.questions()
            for number, text in enumerate(questions, start=1):
                if not text.strip():
                    raise Refusal(400, f"question {number} is empty; ask something")
            prompts = [(text, served.tokenizer.encode_prompt(text)) for text in questions]
            body.sampling(0, config.max_new_tokens)  # whose limit holds here too
        else:
            prompts = body.prompts(served.tokenizer)
        if not 1 <= len(prompts) * body.n <= config.slots:
            raise Refusal(
                400, f"the request is for {len(prompts) * body.n} answers; from 1 to {config.slots} are made together"
            )
        for _, ids in prompts:
            if not all(0 <= id < served.model.config.vocab_size for id in ids):
                raise Refusal(400, f"prompt has ids outside of the vocabulary of {served.model.config.vocab_size}")
            if len(ids) > config.max_prompt_tokens:
                raise Refusal(
                    400,
                    f"the prompt has {len(ids)} tokens; the most that this server reads are {config.max_prompt_tokens}",
                    "context_length_exceeded",
                )
            try:
                check_prompts([ids], served.context_limit)
            except UserError as error:
                raise Refusal(400, str(error), "context_length_exceeded" if ids else None) from None
        found = []
        for text, ids in prompts:
            text = text or served.tokenizer.decode(ids)
            for _ in range(body.n):
                sampling = FREE_TEXT if served.medical else body.sampling(len(found), config.max_new_tokens)
                found.append(Ask(ids, text, sampling, body.logprobs_asked, body.lfm.picture_every))
        return found
    except UserError as error:
        raise Refusal(400, str(error)) from None


_OF_THE_REQUEST = {"model", "prompt", "messages", "stream", "stream_options", "seed", "lfm"}


def _check_as_calibrated(body: Body) -> None:
    """In medical mode answers are made as those that its heads were calibrated on.  Raises Refusal."""
    most, default = FREE_TEXT.max_new_tokens, type(body).model_fields
    for key in sorted(body.model_fields_set - _OF_THE_REQUEST):
        value = getattr(body, key)
        if key == "temperature":
            fits = value < _GREEDY_BELOW
        elif key in ("max_tokens", "max_completion_tokens"):
            fits = value >= most
        else:
            fits = value == default[key].default or (key, value) == ("top_k", -1)
        if not fits:
            raise Refusal(
                400,
                f"{key}={json.dumps(value)} does not go with medical mode, whose answers are made as they were "
                f"calibrated: greedily, at most {most} tokens, one line; leave it out",
            )
    if body.lfm.picture_every:
        raise Refusal(400, "lfm.picture_every does not go with medical mode, which shows whole answers; leave it out")
