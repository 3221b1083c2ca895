"""A server in a thread of this process, for models that need no checkpoint."""

import contextlib
import threading
import time
from collections.abc import Iterator

import httpx

from lfm.data.tokenizer import Tokenizer, train_bpe
from lfm.serving.app import API, make_app
from lfm.serving.config import ServeConfig
from lfm.serving.served import Served
from lfm.serving.server import Server, bind, settings

WORDS = "the time of a state that flows, and a word after it. Of liquid, of light; in every way they go on as one. "


def small_tokenizer(vocab_size: int) -> Tokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return train_bpe([WORDS * 5 + " ".join(f"{a}{b}" for a in letters for b in letters)], vocab_size)


@contextlib.contextmanager
def running(served: dict[str, Served], *, token: str | None = None, **keys) -> Iterator[tuple[str, API]]:
    """Its address, and what its routes share."""
    config = ServeConfig(port=0, **keys)
    app = make_app(served, config, token=token)
    with bind(config.host, 0) as listening:
        server = Server(settings(app, config, num_models=len(served)), lambda: None, app.state.api)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.api
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def until(condition, seconds: float = 20.0) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.01)


def post(address: str, body, path: str = "/v1/completions", **keywords) -> httpx.Response:
    return httpx.post(address + path, json=body, timeout=60, trust_env=False, **keywords)
