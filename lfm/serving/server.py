"""The sockets of a server, and how it ends."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Mapping
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from lfm.errors import UserError
from lfm.files import reason, shown
from lfm.serving.app import API, make_app
from lfm.serving.config import LOOPBACK, ServeConfig
from lfm.serving.served import Served

_CONNECTIONS_BESIDE = 64
"""That may be open beside those of answers: pages, health, numbers."""
_SECONDS_TO_REFUSE = 5
"""For telling clients whose answers had no time to end."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet.  Raises UserError naming what is in the way."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"host={shown(host)} is no address of this machine ({reason(error)}); try 127.0.0.1") from None
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(
            f"port {port} of {shown(host)} cannot be had ({reason(error)}); give another --port, 0 is any free one"
        ) from None
    return bound


def settings(app: Starlette, config: ServeConfig, *, num_models: int) -> uvicorn.Config:
    """How the app is served."""
    answers = num_models * (config.slots + config.queue)
    return uvicorn.Config(
        app,
        http="h11",  # which bounds the size of a request's head
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=2 * answers + _CONNECTIONS_BESIDE,
        timeout_keep_alive=30,
    )


class Server(uvicorn.Server):
    """Says when it listens, and ends answers for which `drain_seconds` are too few by a refusal.

    At a second signal they end at once, and at a third one connections too.
    """

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None], api: API) -> None:
        super().__init__(config)
        self._announce, self._api, self._hurried = announce, api, False
        self.cut_off: str | None = None
        """Why answers that were begun had no time to end, or to be read to their end; None: they had."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        cutting = asyncio.ensure_future(self._cut_off())
        await super().shutdown(sockets)
        cutting.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own would raise the signal once more behind a good end.
        if self._hurried:
            self._end_connections("at a third signal")
        self._hurried, self.should_exit = self.should_exit, True

    def _end_connections(self, why: str) -> None:
        if self.server_state.connections:
            self.cut_off = self.cut_off or why
        self.force_exit = True

    async def _cut_off(self) -> None:
        end = time.monotonic() + self._api.config.drain_seconds
        while not self._hurried and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(0.1, left))
        engines = self._api.engines.values()
        if any(engine.outstanding for engine in engines):
            seconds = self._api.config.drain_seconds
            self.cut_off = "at a second signal" if self._hurried else f"after drain_seconds={seconds:g}"
        self._api.closing.set()
        for engine in engines:
            await asyncio.to_thread(engine.close)
        await asyncio.sleep(_SECONDS_TO_REFUSE)
        self._end_connections("as their readers did not read them")


def _is_an_error(record: logging.LogRecord) -> bool:
    """Connections that are cut at the end are none, nor streams whose cut is told in other words."""
    if record.exc_info:
        return not isinstance(record.exc_info[1], asyncio.CancelledError)
    said = record.getMessage().rstrip()
    # The first is of the lifespan, as text.
    return not said.endswith(("asyncio.exceptions.CancelledError", "returned without completing response."))


def serve(
    served: Mapping[str, Served],
    config: ServeConfig,
    listening: socket.socket,
    *,
    token: str | None,
    announce: Callable[[], None],
) -> str | None:
    """Answer until TERM or Ctrl-C, then finish what was taken on, `drain_seconds` at most: why some of it was cut off;
    None: nothing was.

    `announce` is called when requests are answered.
    """
    app = make_app(served, config, token=token, local=config.host in LOOPBACK)
    logging.getLogger("uvicorn.error").addFilter(_is_an_error)
    server = Server(settings(app, config, num_models=len(served)), announce, app.state.api)
    asyncio.run(server.serve(sockets=[listening]))
    return server.cut_off
