"""Who may ask: checks before any request is looked into, and headers on every response."""

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lfm.serving.metrics import Metrics
from lfm.serving.refusal import Refusal

OPEN_PATHS = frozenset({"/", "/health"})
"""That need no token: nothing of a model is there."""
_MOST_HEADERS = 100
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


class Guard:
    """An ASGI middleware.

    `token`: what requests show as `Authorization: Bearer TOKEN`; None: nothing.  `local`: the server listens on this
    machine alone; it is then asked for under its names alone, so that no page of another site, whose name is made to
    lead here, is taken for its own.  `policy`: what the page may load.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, local: bool, policy: str, metrics: Metrics) -> None:
        self._app, self._token, self._local, self._policy = app, token, local, policy
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Content-Security-Policy"] = self._policy
                headers.setdefault("Cache-Control", "no-store")
                path = scope["path"] if scope["path"] in _COUNTED else "other"
                self._metrics.responses.labels(path, str(message["status"])).inc()
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            refusal.headers["Connection"] = "close"  # its body is not waited for
        await (self._app if refusal is None else refusal.response())(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Refusal | None:
        if len(scope["headers"]) > _MOST_HEADERS:
            return Refusal(431, f"the request has more than {_MOST_HEADERS} headers")
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._local and _name(host) not in _LOCAL:
            return Refusal(403, "this server is asked for as localhost, 127.0.0.1 or [::1] alone", "host")
        origin = headers.get("origin")
        if origin is not None and _site(origin) != host:
            return Refusal(403, "requests of other sites' pages are refused", "cross_origin")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            is_link = scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
            if not is_link:
                return Refusal(403, "requests of other sites' pages are refused", "cross_origin")
        if self._token is None or scope["path"] in OPEN_PATHS:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token.encode()):
            return None
        return Refusal(
            401,
            "the token is missing or wrong; send it as `Authorization: Bearer TOKEN`",
            "invalid_api_key",
            {"WWW-Authenticate": "Bearer"},
        )


_COUNTED = frozenset({"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"})


def _site(origin: str) -> str | None:
    """Name and port; None of what is no address."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _name(host: str) -> str:
    """Of a Host header, without the port; "" of what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
