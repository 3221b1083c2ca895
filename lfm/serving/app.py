"""The routes of a server: OpenAI's API, its health and numbers, and the page."""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import traceback
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lfm.serving.config import ServeConfig
from lfm.serving.engine import Answer, Engine, Piece
from lfm.serving.guard import Guard
from lfm.serving.metrics import Metrics
from lfm.serving.refusal import Refusal, shutting_down
from lfm.serving.replies import Kind, Reply, event
from lfm.serving.requests import Body, ChatBody, CompletionBody, asks, parse
from lfm.serving.served import Served
from lfm.talk import warn

_BODY_SECONDS = 30.0
"""How long a request's body may take to arrive."""
_SECONDS_TO_READ = 30.0
"""That a stream may take beyond `max_seconds`."""
_EVENT_SECONDS = 0.02
"""From one event of a stream to the next, so that what a model costs the event loop does not grow with its speed."""


class API:
    """What the routes share."""

    def __init__(self, served: Mapping[str, Served], config: ServeConfig) -> None:
        self.config, self.metrics = config, Metrics()
        self.closing = asyncio.Event()
        """Set when nothing more is answered."""
        self.engines = {name: Engine(each, config, self.metrics) for name, each in served.items()}
        self.page = resources.files("lfm.serving").joinpath("page.html").read_text(encoding="utf-8")

    async def show_page(self, request: Request) -> Response:
        return HTMLResponse(self.page)

    async def health(self, request: Request) -> Response:
        is_well = all(engine.is_alive for engine in self.engines.values())
        return JSONResponse({"status": "ok" if is_well else "failed"}, 200 if is_well else 503)

    async def numbers(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_described(each.served) for each in self.engines.values()]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(_described(self._engine(request.path_params["name"]).served))

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionBody, "completion")

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatBody, "chat")

    async def _answer(self, request: Request, body_type: type[Body], kind: Kind) -> Response:
        body = parse(body_type, await self._json(request))
        engine = self._engine(body.model)
        # A long prompt takes a while, in which other answers go on.
        wanted = await asyncio.to_thread(asks, body, engine.served, self.config)
        answers = engine.submit(wanted)
        reply = Reply(kind, engine.served, answers)
        if body.stream:
            return _EventStream(engine, reply, with_usage=body.stream_options.include_usage)
        leaving = asyncio.ensure_future(_disconnected(request))
        making = asyncio.ensure_future(_pieces(answers))
        try:
            await asyncio.wait((leaving, making), return_when=asyncio.FIRST_COMPLETED)
            if not making.done():
                return Response(status_code=499)  # nobody reads it
            return JSONResponse(reply.whole(making.result()))
        finally:
            engine.cancel(answers)
            for task in (leaving, making):
                task.cancel()
            await asyncio.gather(leaving, making, return_exceptions=True)  # or their ends are told as never looked at

    def _engine(self, name: str | None) -> Engine:
        if name is None and len(self.engines) == 1:
            return next(iter(self.engines.values()))
        if name not in self.engines:
            raise Refusal(404, f"there is no such model; there are: {', '.join(self.engines)}", "model_not_found")
        return self.engines[name]

    async def _json(self, request: Request) -> Any:
        """The body.  Raises Refusal for what is too large, too slow, of another type or no JSON, and at the end."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the body is not announced as JSON; send `Content-Type: application/json`")
        limit = self.config.max_body_kib << 10
        # What else is sent is not waited for.
        too_large = Refusal(413, f"the body is larger than {limit} bytes", None, {"Connection": "close"})
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > limit:
            raise too_large

        async def read() -> bytes:
            data = bytearray()
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    raise too_large
            return bytes(data)

        reading, closing = asyncio.ensure_future(read()), asyncio.ensure_future(self.closing.wait())
        try:
            await asyncio.wait((reading, closing), timeout=_BODY_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return json.loads(reading.result(), parse_constant=_refuse_constant)
            if closing.done():
                raise shutting_down()
            message = f"the body took longer than {_BODY_SECONDS:g} seconds"
            raise Refusal(408, message, None, {"Connection": "close"})
        except (ValueError, RecursionError):
            raise Refusal(400, "the body is not valid JSON") from None
        finally:
            for task in (reading, closing):
                task.cancel()


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _described(served: Served) -> dict[str, Any]:
    more = {
        "kind": served.kind,
        "step": served.step,
        "parameters": served.num_parameters,
        "context_limit": served.context_limit,
        **({} if served.medical is None else {"medical": served.medical.words()}),
    }
    return {"id": served.name, "object": "model", "created": 0, "owned_by": "lfm", "lfm": more}


async def _pieces(answers: Sequence[Answer]) -> list[list[Piece]]:
    """All of answers that were asked for together.  Raises the Refusal that ends one."""
    found: list[list[Piece]] = [[] for _ in answers]
    while not all(pieces and pieces[-1].reason is not None for pieces in found):
        for index, piece in await answers[0].mailbox.take():
            if isinstance(piece, Refusal):
                raise piece
            found[index].append(piece)
    return found


class _EventStream(StreamingResponse):
    """Server-sent events of all answers, as they come; however it ends, slots are free then."""

    def __init__(self, engine: Engine, reply: Reply, *, with_usage: bool) -> None:
        super().__init__(_events(reply, with_usage=with_usage), media_type="text/event-stream")
        self._engine, self._answers = engine, reply.answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        longest = self._engine.config.max_seconds + _SECONDS_TO_READ
        try:
            # An answer has ended by then, and a client that has not read it does not read.
            await asyncio.wait_for(super().__call__(scope, receive, send), longest)
        except asyncio.TimeoutError:
            warn(f"a stream that was not read to its end in {longest:g} seconds is cut off")
        finally:  # a client may be gone before the first event
            self._engine.cancel(self._answers)


async def _events(reply: Reply, *, with_usage: bool) -> AsyncIterator[bytes]:
    """What has come since the client was last sent something, in one event of each answer."""
    yield b"".join(map(event, reply.first_chunks()))
    running = len(reply.answers)
    while running:
        events: list[bytes] = []
        arrived = await reply.answers[0].mailbox.take()
        for index, pieces in _together(arrived):
            if isinstance(pieces, Refusal):
                yield b"".join([*events, event(pieces.content)])
                return
            running -= pieces[-1].reason is not None
            if (chunk := reply.chunk(index, pieces)) is not None:
                events.append(event(chunk))
        yield b"".join(events)
        if running:
            await asyncio.sleep(_EVENT_SECONDS)
    yield b"".join([*([event(reply.last_chunk())] if with_usage else []), event("[DONE]")])


def _together(arrived: Iterable[tuple[int, Piece | Refusal]]) -> list[tuple[int, list[Piece] | Refusal]]:
    """Pieces by answer, each with one picture at most; behind a Refusal nothing counts."""
    found: list[tuple[int, list[Piece] | Refusal]] = []
    open_lists: dict[int, list[Piece]] = {}
    for index, piece in arrived:
        if isinstance(piece, Refusal):
            return [*found, (index, piece)]
        if index not in open_lists:
            open_lists[index] = []
            found.append((index, open_lists[index]))
        open_lists[index].append(piece)
        if piece.picture is not None:
            del open_lists[index]
    return found


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing at this path", 405: "this path is asked for in another way"}
    return Refusal(
        error.status_code, words.get(error.status_code, "refused"), None, dict(error.headers or {})
    ).response()


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failed(request: Request, error: Exception) -> Response:
    warn("error: a request failed\n" + "".join(traceback.format_exception(error)))
    return Refusal(500, "the request failed; the server's log says why", "failed").response()


def page_policy(page: str) -> str:
    """What the page may load: its own style and script, known by their content, and this server's answers."""

    def allowed(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()}'" for x in found)

    return (
        f"default-src 'none'; style-src {allowed('style')}; script-src {allowed('script')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def make_app(
    served: Mapping[str, Served], config: ServeConfig, *, token: str | None = None, local: bool = True
) -> Starlette:
    """The server of these models, without the sockets; its lifespan starts and ends the threads that answer."""
    api = API(served, config)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for engine in api.engines.values():
            engine.start()
        try:
            yield
        finally:
            for engine in api.engines.values():
                await asyncio.to_thread(engine.close)

    policy = page_policy(api.page)
    app = Starlette(
        routes=[
            Route("/", api.show_page, methods=["GET"]),
            Route("/health", api.health, methods=["GET"]),
            Route("/metrics", api.numbers, methods=["GET"]),
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/models/{name}", api.model, methods=["GET"]),
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, token=token, local=local, policy=policy, metrics=api.metrics)],
        exception_handlers={
            Refusal: _refused,
            HTTPException: _http_error,
            ClientDisconnect: _left,
            Exception: _failed,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.api = api
    return app
