"""Requests that mean harm, or are broken: the right status, the server goes on, and no trace of the file system."""

import json
import re
import socket
import threading

import httpx
import pytest

from lfm.serving.served import Served
from tests.inference.small_models import V, make
from tests.serving.local_server import post, running, small_tokenizer

TOKEN = "a-token-of-some-length"
ASK = {"prompt": "the", "max_tokens": 2}


@pytest.fixture(scope="module")
def served():
    return {"small": Served("small", 7, make("transformer"), small_tokenizer(V))}


@pytest.fixture(scope="module")
def server(served):
    with running(served, slots=4, max_body_kib=64, max_prompt_tokens=90) as found:
        yield found


@pytest.fixture(autouse=True)
def answers_afterwards(request):
    yield
    if "server" in request.fixturenames:
        address, api = request.getfixturevalue("server")
        assert post(address, ASK).status_code == 200
        assert api.engines["small"].outstanding == 0


def refused(response, status: int, words: str = "") -> None:
    assert response.status_code == status, response.text
    assert words in response.text
    leaks = re.search(r"Traceback|File \"|site-packages|/work|/home|/tmp|/usr|\.py\b", response.text)
    assert leaks is None, response.text
    assert isinstance(response.json()["error"]["message"], str)


NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\x",
    "small/../small",
    "\0",
    "%2e%2e%2f",
    "x" * 5000,
    "hf://user/name",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_model_is_a_name_and_never_a_path(name, server):
    refused(post(server[0], ASK | {"model": name}), 404, "there are: small")
    with socket.create_connection(("127.0.0.1", int(server[0].rpartition(":")[2]))) as raw:
        path = "/v1/models/" + "".join(c if c.isprintable() and c not in " \\" else "%00" for c in name)
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        found = b"".join(iter(lambda: raw.recv(65536), b""))
    assert found.startswith(b"HTTP/1.1 404") and b"root:" not in found


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/page.html", "/static/x", "/%2e%2e/%2e%2e/etc/passwd", "/docs"])
def test_nothing_else_is_served(path, server):
    refused(httpx.get(server[0] + path), 404)


BODIES = {
    "no JSON": (b"{", 400, "not valid JSON"),
    "no object": (b"[1]", 400, "no JSON object"),
    "deep": (b"[" * 60_000, 400, "not valid JSON"),
    "no UTF-8": (b'{"prompt": "\xff"}', 400, "not valid JSON"),
    "half a surrogate": (b'{"prompt": "\\ud800"}', 400, "not valid UTF-8"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', 400, "not valid JSON"),
    "infinity": (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
    "a number of 5000 digits": (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "not valid JSON"),
    "no prompt": (b"{}", 400, "prompt"),
    "an empty prompt": (b'{"prompt": ""}', 400, "empty"),
    "no prompts": (b'{"prompt": []}', 400, "from 1 to 4"),
    "an id too large": (b'{"prompt": [1, 300]}', 400, "vocabulary of 300"),
    "an id below 0": (b'{"prompt": [-1]}', 400, "vocabulary of 300"),
    "mixed ids": (b'{"prompt": [1, "a"]}', 400, "prompt"),
    "a key that is none": (b'{"prompt": "a", "tempreature": 1}', 400, "tempreature"),
    "a key of half a surrogate": (b'{"prompt": "a", "\\ud800": 1}', 400, "is no key of a request"),
    "a tool": (b'{"prompt": "a", "tools": [{"type": "function"}]}', 400, "tools is not supported"),
    "echo": (b'{"prompt": "a", "echo": true}', 400, "echo is not supported"),
    "n of 5": (b'{"prompt": "a", "n": 5}', 400, "from 1 to 4"),
    "too many tokens": (b'{"prompt": "a", "max_tokens": 99999}', 400, "the most are 2048"),
    "top_p of 0": (b'{"prompt": "a", "top_p": 0}', 400, "top_p"),
    "a long stop text": (json.dumps({"prompt": "a", "stop": "x" * 1001}).encode(), 400, "1000 characters"),
    "an empty stop text": (b'{"prompt": "a", "stop": [""]}', 400, "stop text is empty"),
    "a long prompt": (json.dumps({"prompt": "the " * 5000}).encode(), 400, "the most that this server reads are 90"),
    "a body of 65 KiB": (json.dumps({"prompt": "x" * 66_000}).encode(), 413, "larger than 65536 bytes"),
    "a prompt of 1 MB": (json.dumps({"prompt": "x" * 1_000_000}).encode(), 413, "larger than 65536 bytes"),
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_wrong_are_named(case, server):
    body, status, words = BODIES[case]
    found = httpx.post(
        server[0] + "/v1/completions", content=body, headers={"Content-Type": "application/json"}, timeout=60
    )
    refused(found, status, words)


CHATS = {
    "no messages": ({"messages": []}, "messages"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "text alone"),
    "text and a picture": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]},
        "messages[0].content[1] is no",
    ),
    "a part that is none": ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0] is no"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is no text"),
    "a tool's message": ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
    "text is no message": ({"messages": ["x"]}, "messages[0] is no JSON object"),
    "nothing": ({}, "messages is missing"),
}


@pytest.mark.parametrize("case", CHATS)
def test_chats_that_are_wrong_are_named(case, server):
    body, words = CHATS[case]
    refused(post(server[0], body, "/v1/chat/completions"), 400, words)


def test_a_body_without_a_length_is_cut_off_at_the_limit(server):
    sent = 0

    def parts():
        nonlocal sent
        for _ in range(10_000):
            sent += 1
            yield b" " * 16_384

    try:
        found = httpx.post(
            server[0] + "/v1/completions", content=parts(), headers={"Content-Type": "application/json"}, timeout=60
        )
        refused(found, 413)
    except httpx.TransportError:
        pass  # the server closed while this was sending
    assert sent < 1000


def test_other_kinds_of_bodies_and_methods(server):
    refused(httpx.post(server[0] + "/v1/completions", data={"prompt": "a"}), 415, "Content-Type")
    refused(httpx.post(server[0] + "/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}), 415)
    refused(httpx.get(server[0] + "/v1/completions"), 405)
    refused(httpx.put(server[0] + "/", content=b"x"), 405)


def test_pages_of_other_sites_may_not_ask(server):
    own = server[0]
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": own.replace("127.0.0.1", "localhost")},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
    ):
        refused(post(own, ASK, headers=headers), 403)
    for headers in ({"Origin": own}, {"Sec-Fetch-Site": "same-origin"}):
        assert post(own, ASK, headers=headers).status_code == 200
    found = httpx.request("OPTIONS", own + "/v1/completions", headers={"Origin": "http://evil.example"})
    assert found.status_code == 403 and not any(name.startswith("access-control") for name in found.headers)


def test_a_token_is_asked_for_everywhere_but_on_the_page(served):
    with running(served, token=TOKEN) as (address, _):
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": TOKEN},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": b"Bearer \xff\xfe"},
        ):
            for path in ("/v1/models", "/metrics", "/v1/models/small"):
                refused(httpx.get(address + path, headers=headers), 401)
            found = post(address, ASK, headers=headers)
            refused(found, 401, "missing or wrong")
            assert found.headers["www-authenticate"] == "Bearer" and TOKEN not in found.text
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert post(address, ASK, headers=right).status_code == 200
        assert httpx.get(address + "/").status_code == httpx.get(address + "/health").status_code == 200
        assert TOKEN not in httpx.get(address + "/").text


def test_floods_of_headers_stay_within_bounds(server):
    host, port = "127.0.0.1", int(server[0].rpartition(":")[2])

    def send(head: bytes) -> bytes:
        with socket.create_connection((host, port)) as raw:
            raw.settimeout(20)
            found = b""
            try:
                raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + head + b"\r\n")
                while part := raw.recv(65536):
                    found += part
            except OSError:  # closed while this was sending
                pass
            return found

    assert send(b"").startswith(b"HTTP/1.1 200")
    assert send(b"".join(b"a%d: b\r\n" % i for i in range(200))).startswith(b"HTTP/1.1 431")
    for flood in (b"a: " + b"b" * 1_000_000 + b"\r\n", b"".join(b"a%d: b\r\n" % i for i in range(100_000))):
        found = send(flood)
        assert found == b"" or found.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    connections = [threading.Thread(target=send, args=(b"x: y\r\n" * 50,)) for _ in range(20)]
    for thread in connections:
        thread.start()
    for thread in connections:
        thread.join()


def test_the_page_loads_nothing_from_elsewhere_and_says_so(server):
    found = httpx.get(server[0] + "/")
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert not re.findall(r"(?:src|href|action)=[\"'](?!data:)", found.text) and "http://" not in found.text
    assert "https://" not in found.text and found.headers["x-content-type-options"] == "nosniff"
