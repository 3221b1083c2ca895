"""What a client is told when it does not get what it asked for."""

from dataclasses import dataclass, field

from starlette.responses import JSONResponse, Response


@dataclass
class Refusal(Exception):
    """Ends a request.  `message` is one sentence for the client; nothing of this machine is in it."""

    status: int
    message: str
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def content(self) -> dict[str, object]:
        """As OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}

    def response(self) -> Response:
        return JSONResponse(self.content, self.status, self.headers)


def shutting_down() -> Refusal:
    return Refusal(503, "the server is shutting down", "shutting_down", {"Connection": "close"})
