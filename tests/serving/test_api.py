"""What clients get: OpenAI's own client, many at once, those that leave, limits."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import httpx
import openai
import pytest
import torch

from lfm.inference.sampling import SamplingConfig
from lfm.inference.text import continuations
from lfm.serving.app import _together
from lfm.serving.engine import Piece
from lfm.serving.refusal import Refusal
from lfm.serving.served import Served
from tests.inference.small_models import V, make
from tests.serving.local_server import WORDS, post, running, small_tokenizer, until


@pytest.fixture(scope="module")
def served():
    tokenizer = small_tokenizer(V)
    return {kind: Served(kind, 7, make(kind), tokenizer) for kind in ("liquidnet", "lfm")}


@pytest.fixture(scope="module")
def server(served):
    with running(served, slots=16, queue=64, max_prompt_tokens=400, max_new_tokens=20_000) as found:
        yield found


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server[0] + "/v1", api_key="none", max_retries=0)


def alone(served: Served, prompt: str, **sampling):
    """Text, ids and reason of an answer by the library."""
    ids = served.tokenizer.encode_prompt(prompt)
    *_, (made,) = continuations(served.model, served.tokenizer, [ids], SamplingConfig(**sampling))
    return made


def test_openais_client_completes_streams_and_chats(client, served):
    model = served["liquidnet"]
    want = alone(model, "the time", greedy=True, max_new_tokens=30)
    whole = client.completions.create(model="liquidnet", prompt="the time", max_tokens=30, temperature=0, logprobs=2)
    choice = whole.choices[0]
    assert choice.text == want.text and choice.finish_reason == "length" and whole.usage.completion_tokens == 30
    assert len(choice.logprobs.token_logprobs) == 30 and max(choice.logprobs.token_logprobs) < 0
    assert all(len(each) <= 2 for each in choice.logprobs.top_logprobs)
    pieces = list(
        client.completions.create(model="liquidnet", prompt="the time", max_tokens=30, temperature=0, stream=True)
    )
    assert "".join(piece.choices[0].text for piece in pieces) == want.text
    # The first token comes at once; how many events the others share depends on how fast the reader is.
    assert [piece.choices[0].finish_reason for piece in pieces][-2:] == [None, "length"]

    messages = [
        {"role": "system", "content": "of light"},
        {"role": "user", "content": [{"type": "text", "text": "they go"}]},
        {"role": "assistant", "content": "on"},
        {"role": "user", "content": "and?"},
    ]
    chat = client.chat.completions.create(
        model="liquidnet", messages=messages, max_completion_tokens=20, temperature=0, logprobs=True, top_logprobs=3
    )
    want = alone(model, "of light\nthey go\nonand?\n", greedy=True, max_new_tokens=20)
    assert chat.choices[0].message.content == want.text and chat.choices[0].message.role == "assistant"
    logprobs = chat.choices[0].logprobs.content
    assert len(logprobs) == 20 and all(len(each.top_logprobs) == 3 for each in logprobs)
    stream = client.chat.completions.create(
        model="liquidnet",
        messages=messages,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"lfm": {"picture_every": 5}},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == want.text
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.completion_tokens == 20
    pictures = [
        c.choices[0].lfm["picture"] for c in chunks if c.choices and getattr(c.choices[0], "lfm", {}).get("picture")
    ]
    assert len(pictures) == 3  # of tokens 5, 10 and 15: with the last token the state is gone
    assert {row["name"]: row["size"] for row in pictures[0]["state"]} == {"hidden.0": 16, "hidden.1": 16}


def test_models_are_listed_with_their_family_and_step(client, server):
    assert [model.id for model in client.models.list()] == ["liquidnet", "lfm"]
    model = client.models.retrieve("lfm")
    assert model.lfm["kind"] == "lfm" and model.lfm["step"] == 7 and model.lfm["context_limit"] == 128
    assert httpx.get(server[0] + "/health").json() == {"status": "ok"}


def test_stop_texts_seeds_and_several_answers(client, served):
    whole = alone(served["liquidnet"], "a way", greedy=True, max_new_tokens=40).text
    stop = whole[8:11]
    found = client.completions.create(model="liquidnet", prompt="a way", max_tokens=40, temperature=0, stop=[stop])
    assert found.choices[0].text == whole[: whole.index(stop)] and found.choices[0].finish_reason == "stop"

    def drawn(**keys):
        made = client.completions.create(model="liquidnet", prompt=["a word", "it"], max_tokens=12, n=2, **keys)
        assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
        return [choice.text for choice in made.choices]

    first = drawn(seed=3, extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2})
    assert first == drawn(seed=3, extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2})
    assert len(set(first)) == 4 and drawn(seed=4) != drawn() != drawn()
    ids = served["liquidnet"].tokenizer.encode_prompt("a way")
    again = client.completions.create(model="liquidnet", prompt=ids, max_tokens=40, temperature=0)
    assert again.choices[0].text == whole


@pytest.mark.parametrize("kind", ["liquidnet", pytest.param("lfm", marks=pytest.mark.slow)])
def test_64_clients_at_once_get_what_each_gets_alone(kind, server, served):
    texts = [WORDS[i : i + 3 + (7 * i) % 60] for i in range(64)]
    bodies = [
        {"model": kind, "prompt": text, "max_tokens": 3 + i % 5, "temperature": 0, "stream": i % 2 == 0}
        for i, text in enumerate(texts)
    ]

    async def ask(client, body):
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        if not body["stream"]:
            return response.json()["choices"][0]["text"]
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert events.pop() == "[DONE]"
        return "".join(json.loads(each)["choices"][0]["text"] for each in events)

    async def ask_all():
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server[0], timeout=60, limits=limits, trust_env=False) as client:
            return await asyncio.gather(*(ask(client, body) for body in bodies))

    found = asyncio.run(ask_all())
    for body, text in zip(bodies, found, strict=True):
        assert text == alone(served[kind], body["prompt"], greedy=True, max_new_tokens=body["max_tokens"]).text


LONG = {"model": "liquidnet", "prompt": "time", "max_tokens": 20_000, "temperature": 0}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(stream, server):
    address, api = server
    engine = api.engines["liquidnet"]
    with httpx.Client(timeout=60, trust_env=False) as client:
        if stream:
            with client.stream("POST", address + "/v1/completions", json=LONG | {"stream": True}) as response:
                next(response.iter_raw())
                assert engine.outstanding == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(address + "/v1/completions", json=LONG, timeout=0.2)
    until(lambda: engine.outstanding == 0)
    until(lambda: engine.batcher.rows.count == 0)


def test_a_full_queue_and_answers_that_take_too_long(served):
    only = {"liquidnet": served["liquidnet"]}
    with running(only, slots=1, queue=1, max_wait_seconds=0.3, max_seconds=1.0, max_new_tokens=20_000) as (
        address,
        api,
    ):
        found = {}

        def ask(name, **more):
            found[name] = post(address, LONG | more)

        threads = [threading.Thread(target=ask, args=("first",)), threading.Thread(target=ask, args=("second",))]
        for thread, count in zip(threads, (1, 2), strict=True):
            thread.start()
            until(lambda count=count: api.engines["liquidnet"].outstanding >= count)
        refused = post(address, LONG)
        for thread in threads:
            thread.join()
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert found["first"].status_code == 504 and "longer than 1 seconds" in found["first"].text
        assert found["second"].status_code == 503 and "no slot was free" in found["second"].text
        late = post(address, LONG | {"stream": True})
        assert late.status_code == 200 and json.loads(late.text.split("\n\n")[-2][6:])["error"]["code"] == "too_slow"
        numbers = httpx.get(address + "/metrics").text
        assert 'lfm_answers_total{model="liquidnet",reason="too_slow"} 2.0' in numbers
        assert 'lfm_http_responses_total{path="/v1/completions",status="429"} 1.0' in numbers


def test_answers_that_have_no_time_to_end_are_refused_in_words(served):
    found = {}
    only = {"liquidnet": served["liquidnet"]}
    with running(only, slots=2, queue=1, drain_seconds=0.2, max_new_tokens=1_000_000) as (address, api):

        def ask(stream):
            found[stream] = post(address, LONG | {"max_tokens": 1_000_000, "stream": stream})

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        until(lambda: len(api.engines["liquidnet"].batcher.running) == 2)
    for thread in threads:
        thread.join()
    whole, streamed = found[False], found[True]
    assert whole.status_code == 503 and "shutting down" in whole.json()["error"]["message"]
    assert json.loads(streamed.text.split("\n\n")[-2][6:])["error"]["code"] == "shutting_down"


def test_a_body_that_is_still_read_at_the_end_is_answered(served):
    with running({"liquidnet": served["liquidnet"]}, drain_seconds=0.1) as (address, _):
        client = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f'{head}Content-Length: 100\r\n\r\n{{"prompt":'.encode())
        time.sleep(0.3)
    with client:
        found = b"".join(iter(lambda: client.recv(65536), b""))
    assert found.startswith(b"HTTP/1.1 503") and b'"code":"shutting_down"' in found


def test_an_answer_that_fails_ends_alone_and_others_go_on(served):
    broken = make("lstm")
    tokenizer = served["lfm"].tokenizer
    (token,) = tokenizer.encode_prompt("q")
    with torch.no_grad():
        broken.embedding.weight[token] = torch.nan
    asked = {"broken": Served("broken", 1, broken, tokenizer), "liquidnet": served["liquidnet"]}
    with running(asked) as (address, _):
        found = post(address, {"model": "broken", "prompt": "q"})
        assert found.status_code == 500 and "not finite" in found.json()["error"]["message"]
        assert post(address, {"model": "liquidnet", "prompt": "q", "max_tokens": 2}).status_code == 200


def test_the_next_turn_of_a_chat_reads_only_what_is_new(server):
    system = {"role": "system", "content": WORDS * 6}
    bodies = [
        {"model": "liquidnet", "messages": [system, {"role": "user", "content": turn}], "max_tokens": 2}
        for turn in ("one", "two")
    ]
    used = [post(server[0], body, "/v1/chat/completions").json()["usage"] for body in bodies]
    cached = [each["prompt_tokens_details"]["cached_tokens"] for each in used]
    assert cached[0] == 0 and used[1]["prompt_tokens"] > 256 and cached[1] == 256


def test_a_bug_in_a_step_ends_the_answers_in_hand_and_no_more(served, monkeypatch, capsys):
    with running({"liquidnet": served["liquidnet"]}) as (address, api):
        engine = api.engines["liquidnet"]
        rows = engine.batcher.rows
        monkeypatch.setattr(rows, "lengths", None)  # as only a bug leaves it
        found = post(address, {"prompt": "a", "max_tokens": 5})
        assert found.status_code == 500 and found.json()["error"]["code"] == "failed"
        assert "Traceback" not in found.text and "Traceback" in capsys.readouterr().err
        assert post(address, {"prompt": "a", "max_tokens": 5}).status_code == 200


def test_numbers_are_of_now_after_an_error_too(served, monkeypatch):
    with running({"liquidnet": served["liquidnet"]}) as (address, api):
        engine = api.engines["liquidnet"]
        step = engine.batcher.rows.step

        def fails_later(ids):
            if len(engine.batcher.running[0].made) > 3:
                raise RuntimeError("as only a bug does")
            return step(ids)

        monkeypatch.setattr(engine.batcher.rows, "step", fails_later)
        assert post(address, {"prompt": "a", "max_tokens": 50, "n": 2}).status_code == 500
        until(lambda: 'lfm_running{model="liquidnet"} 0.0' in httpx.get(address + "/metrics").text)


def test_a_client_that_does_not_read_is_not_answered_on(served, monkeypatch):
    monkeypatch.setattr("lfm.serving.engine._MOST_UNREAD", 1 << 20)
    monkeypatch.setattr("lfm.serving.engine._SECONDS_TO_TAKE", 0.5)
    with running({"liquidnet": served["liquidnet"]}, max_new_tokens=1_000_000) as (address, api):
        engine, body = api.engines["liquidnet"], json.dumps(LONG | {"stream": True, "logprobs": 20, "n": 4}).encode()
        with socket.socket() as client:
            ask_and_do_not_read(client, address, body)
            reason = 'lfm_answers_total{model="liquidnet",reason="unread"} 4.0'
            until(lambda: reason in httpx.get(address + "/metrics").text)
            assert engine.outstanding == 0 and not engine.batcher.running
            found = b""
            while b'"unread"' not in found:
                part = client.recv(1 << 16)
                assert part
                found += part
        assert b"the answer was not read" in found
        assert post(address, {"prompt": "a", "max_tokens": 5}).status_code == 200


def test_a_stream_is_not_kept_for_a_client_that_does_not_read_it(served, monkeypatch, capsys):
    monkeypatch.setattr("lfm.serving.app._SECONDS_TO_READ", 0.2)
    with running({"liquidnet": served["liquidnet"]}, max_seconds=2, max_new_tokens=1_000_000) as (address, _):
        more = {"stream": True, "logprobs": 20, "n": 16, "lfm": {"picture_every": 1}}  # more than sockets hold
        body = json.dumps(LONG | more).encode()
        said = ""
        with socket.socket() as client:
            ask_and_do_not_read(client, address, body)
            end = time.monotonic() + 20
            while "a stream that was not read to its end in 2.2 seconds is cut off" not in said:
                assert time.monotonic() < end
                said += capsys.readouterr().err
                time.sleep(0.02)
    assert "Traceback" not in said


def ask_and_do_not_read(client: socket.socket, address: str, body: bytes) -> None:
    host, port = address.removeprefix("http://").split(":")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)


def test_a_model_waits_for_an_event_loop_that_is_slower(served, monkeypatch):
    """Whoever reads is not cut off, however much comes at once."""
    monkeypatch.setattr("lfm.serving.engine._MOST_UNREAD", 2000)
    with running({"liquidnet": served["liquidnet"]}, max_new_tokens=1_000) as (address, _):
        body = LONG | {"max_tokens": 300, "logprobs": 5, "n": 4}
        whole = post(address, body).json()
        streamed = post(address, body | {"stream": True})
        assert streamed.text.endswith("data: [DONE]\n\n")
        chunks = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line.startswith("data: {")]
        first = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"][0]["index"] == 0]
        assert "".join(first) == whole["choices"][0]["text"]


def test_places_of_tokens_are_those_of_their_text_whatever_is_held_back(server):
    body = LONG | {"max_tokens": 60, "logprobs": 0, "seed": 5}
    plain = post(server[0], body).json()["choices"][0]
    text, held = body["prompt"] + plain["text"], plain["logprobs"]
    for token, offset in zip(held["tokens"], held["text_offset"], strict=True):
        assert text[offset : offset + len(token)] == token or token.startswith("bytes:")
    start = held["text_offset"][3] - len(body["prompt"])
    stop = plain["text"][start : start + 12] + "\x00 never"
    assert post(server[0], body | {"stop": stop}).json()["choices"][0] == plain


def test_what_is_wrong_with_a_body_is_told_in_words_of_json(server):
    def told(path="/v1/completions", **keys):
        return post(server[0], {"model": "liquidnet", **keys}, path).json()["error"]["message"]

    asked = {
        told(prompt="x", foo=1): "unknown key foo (value 1) in the request; leave it out",
        told(prompt="x", **{"a.b": True}): "unknown key a.b (value true) in the request; leave it out",
        told(
            prompt="x", lfm={"picture_evry": 2}
        ): "unknown key lfm.picture_evry (value 2) in the request; did you mean picture_every?",
        told("/v1/chat/completions", messages=[{"role": "user", "content": "x", "y": 1}]): (
            "unknown key messages[0].y (value 1) in the request; leave it out"
        ),
        told(prompt="x", stop=3): "stop = 3 in the request is not legal",
        told(prompt="x", model=3): "model = 3 in the request is not legal",
        told("/v1/chat/completions", messages=[{"content": "x"}]): "key messages[0].role is missing in the request",
    }
    for message, wanted in asked.items():
        assert message.startswith(wanted), message
        assert "--help" not in message and "command line" not in message


def test_what_came_together_is_one_event_of_each_answer():
    def piece(text, picture=None):
        return Piece(text, picture=picture)

    refusal, shown = Refusal(500, "it failed", "failed"), {"rows": []}
    arrived = [(0, piece("a")), (1, piece("x")), (0, piece("b", shown)), (0, piece("c")), (1, refusal), (0, piece("d"))]
    [(one, ab), (two, x), (three, c), (four, last)] = _together(arrived)
    assert (one, two, three, four) == (0, 1, 0, 1) and last is refusal
    assert [[each.text for each in pieces] for pieces in (ab, x, c)] == [["a", "b"], ["x"], ["c"]]
    assert ab[-1].picture is shown


def test_events_of_several_tokens_say_what_whole_answers_say(server):
    body = LONG | {"max_tokens": 200, "logprobs": 2, "n": 2, "seed": 1}
    whole = post(server[0], body).json()
    lines = post(server[0], body | {"stream": True}).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    for answer in whole["choices"]:
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == answer["index"]]
        assert "".join(choice["text"] for choice in own) == answer["text"]
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + [answer["finish_reason"]]
        for key, values in answer["logprobs"].items():
            assert [value for choice in own for value in choice["logprobs"][key]] == values
        assert len(own) < len(answer["logprobs"]["tokens"]), "some events have several tokens"


def test_a_stream_comes_as_it_is_made(server):
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(timeout=60, trust_env=False))
        body = LONG | {"stream": True, "max_tokens": 500}
        response = stack.enter_context(client.stream("POST", server[0] + "/v1/completions", json=body))
        assert response.headers["content-type"].startswith("text/event-stream")
        arrived = []
        for _ in response.iter_lines():
            arrived.append(time.monotonic())
    assert arrived[len(arrived) // 2] - arrived[0] > 0.2 * (arrived[-1] - arrived[0])
