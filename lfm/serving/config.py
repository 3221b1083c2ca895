"""What `lfm serve` takes beside its checkpoints."""

from pydantic import Field

from lfm.inference.batcher import BatcherConfig

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
"""Hosts that only this machine reaches."""


class ServeConfig(BatcherConfig):
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own (127.0.0.1, ::1, localhost) needs a token."""
    port: int = Field(default=7860, ge=0, le=65_535)
    """0: a free one."""
    queue: int = Field(default=64, ge=0, le=65_536)
    """Answers that may wait for a slot; one more is refused with status 429."""
    max_prompt_tokens: int = Field(default=8192, ge=1, le=1 << 24)
    """Longer prompts are refused with status 400, as are those that leave no room in the model's context."""
    max_new_tokens: int = Field(default=2048, ge=1, le=1 << 24)
    """The most that a request may ask for; more is refused with status 400."""
    max_body_kib: int = Field(default=1024, ge=1, le=1 << 20)
    """Of a request's body; a larger one is refused with status 413."""
    max_wait_seconds: float = Field(default=60.0, gt=0)
    """How long an answer may wait for a slot; then status 503."""
    max_seconds: float = Field(default=300.0, gt=0)
    """How long an answer may take, waiting included; then status 504, or an error event where it is streamed."""
    drain_seconds: float = Field(default=60.0, ge=0)
    """After TERM or Ctrl-C: how long answers that were taken on may take to finish, before they end with status 503; no
    others are taken."""
