"""Clients that send anything, read nothing, or leave: others are served, and errors are clear."""

import contextlib
import http.client
import json
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import strategies as st
from servers import chat_model, eventually, serving
from test_fuzz import run

from slam_jax.generation import Request, Sampling
from slam_jax.serving.server import app
from slam_jax.serving.server.calls import read_completion
from slam_jax.serving.server.limits import Limits

pytestmark = pytest.mark.release

LIMITS = Limits(
    text_body=50_000,
    bodies=120_000,
    read_time=1.5,
    idle_time=2.0,
    stall_time=1.0,
    connections=100,
)
LONGEST_S = 20.0
ASKED: dict[str, Any] = {"prompt": "the cat", "max_tokens": 2}


@pytest.fixture(scope="module")
def server():
    with serving(chat_model(), limits=LIMITS, slots=2, context=256, max_waiting=8) as found:
        yield found


@pytest.fixture(scope="module")
def address(server):
    parts = urlsplit(server[0])
    return parts.hostname, parts.port


@pytest.fixture
def link(address):
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=LONGEST_S)) as link:
        yield link


def post(link, body: Any, path: str = "/v1/completions", headers: Any = None):
    """(status, body, headers)"""
    try:
        link.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
    except (BrokenPipeError, ConnectionResetError):
        link.close()
        raise
    reply = link.getresponse()
    return reply.status, reply.read(), dict(reply.getheaders())


def is_served(address) -> bool:
    """Whether a new client gets its answer soon."""
    start = time.monotonic()
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=LONGEST_S)) as link:
        status, body, _ = post(link, json.dumps(ASKED).encode())
    assert status == 200 and json.loads(body)["choices"][0]["finish_reason"], body
    return time.monotonic() - start < 5


# Any request.

LETTERS = st.text('ab {}<|"\\\x00\ud800\u202eß日\n', max_size=8)  # of all letters it takes seconds
TREES = st.recursive(
    st.none() | st.integers() | LETTERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=3),
)
HOSTILE = st.one_of(
    *(st.none(), st.booleans(), LETTERS, TREES, st.floats(allow_nan=True, allow_infinity=True)),
    st.sampled_from([-1, 0, 1, 2, 16, 10**9, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e-320]),
    st.sampled_from(["<|end|>", "a" * 2000, "{{ 1/0 }}", "file:///", "data:image/png;base64,x"]),
    st.lists(st.sampled_from(["user", "the cat", 3, None]), max_size=40),
    st.sampled_from([{"type": "json_object"}, {"type": "json_schema"}, {"include_usage": True}]),
)
FIELDS = (
    *("model", "messages", "prompt", "n", "seed", "stop", "stream", "stream_options", "max_tokens"),
    *("max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("logprobs", "top_logprobs", "tools", "tool_choice", "logit_bias", "presence_penalty", "user"),
    *(
        "response_format",
        "structured_outputs",
        "aux",
        "images",
        "text",
        "echo",
        "best_of",
        "suffix",
    ),
    *("metadata", "modalities", "functions", "what", "", "Messages"),
)
PATHS = ("/v1/chat/completions", "/v1/completions")
RAW = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"[" * 40_000, b'{"a":' * 9_000, b"1" * 40_000, b'{"n": NaN}', b"{}", b""]),
    st.sampled_from([b'{"prompt": "\xff"}', b"\xef\xbb\xbf{}", b'{"n": 1e999}', b'"' + b"a" * 9]),
)


def changed(data: st.DataObject, path: str) -> bytes:
    """The body of a request of which some fields, or parts of a message, are anything."""
    if not data.draw(st.integers(0, 7)):
        return data.draw(RAW)
    body: dict[str, Any] = {"max_tokens": 2}
    message: dict[str, Any] = {"role": "user", "content": "the cat"}
    if path == PATHS[0]:
        if not data.draw(st.integers(0, 2)):
            part: Any = {"type": "text", "text": "the cat"}
            part[data.draw(st.sampled_from(["type", "text", "image_url", "x"]))] = data.draw(
                HOSTILE
            )
            message["content"] = [part]
        if not data.draw(st.integers(0, 2)):
            message[data.draw(st.sampled_from(["role", "content", "name", "tool_calls"]))] = (
                data.draw(HOSTILE)
            )
        body["messages"] = [message] * data.draw(st.sampled_from([1, 1, 2]))
    else:
        body["prompt"] = "the cat"
    for _ in range(data.draw(st.integers(0, 3))):
        body[data.draw(st.sampled_from(FIELDS))] = data.draw(HOSTILE)
    return json.dumps(body).encode()


def check_any_request(address, examples: int, start: int) -> None:
    seen = set()
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=LONGEST_S)) as link:

        def trial(data: st.DataObject) -> None:
            path = data.draw(st.sampled_from((*PATHS, PATHS[1])))
            body = changed(data, path)
            status, reply, headers = post(link, body, path)
            seen.add(status)
            if status == 200:
                check_answer(json.loads(body), reply, headers)
                return
            assert 400 <= status < 500, (status, reply, body)
            error = json.loads(reply)["error"]
            text = error["message"]
            assert text.strip() and "\n" not in text and len(text) < 500, text
            assert error["type"].endswith("_error") and set(error) >= {"param", "code"}

        run(trial, start, examples)
    assert {200, 400} <= seen, seen


def check_answer(asked: dict[str, Any], reply: bytes, headers: dict[str, str]) -> None:
    """As many answers as were asked for, each with its end."""
    prompts = asked.get("prompt", "") if isinstance(asked.get("prompt"), list) else [""]
    count = (asked.get("n") or 1) * len(prompts)
    if asked.get("stream"):
        *pieces, last = reply.decode().strip().split("\n\n")
        assert last == "data: [DONE]" and headers["content-type"] == "text/event-stream"
        pieces = [json.loads(piece.removeprefix("data: ")) for piece in pieces]
        choices = [choice for piece in pieces for choice in piece["choices"]]
        choices = [choice for choice in choices if choice["finish_reason"]]
    else:
        choices = json.loads(reply)["choices"]
    assert sorted(choice["index"] for choice in choices) == list(range(count))
    assert {choice["finish_reason"] for choice in choices} <= {"stop", "length"}


def test_any_request_gets_an_answer_or_one_clear_error(address):
    check_any_request(address, 100, 0)


@pytest.mark.slow
def test_a_thousand_requests_get_answers_or_clear_errors(address):
    check_any_request(address, 1_000, 1)


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"x" * 60_000, {}, 413, "the body is too large; at most 50,000 bytes are read"),
        ([b"x" * 20_000] * 3, {}, 413, "the body is too large"),  # in chunks, without its length
        (b"{}", {"Content-Type": "text/plain"}, 415, "Content-Type: application/json"),
        (b"{}", {"Content-Encoding": "gzip"}, 415, "compressed bodies are not read"),
    ],
)
def test_what_is_not_read_is_said_to_the_client(link, body, headers, status, message):
    found, reply, said = post(link, body, headers=headers)
    assert found == status and message in json.loads(reply)["error"]["message"]
    assert said["connection"] == "close"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[" * 40_000, "too many lists or objects inside of each other"),
        (b'{"prompt": NaN}', "NaN is no number of JSON"),
        (b'{"prompt": 1e999}', "1e999 is too large a number"),
        (b'{"prompt": "\xff"}', "the body is no JSON"),
        (b"[]", "the body is a list; expected an object"),
        (b'{"prompt": "a", "\\ud800": 1}', "does not know this field"),
        (b'{"prompt": "a", "n": 1' + b"0" * 4_000 + b"}", "n is a number of more than 20 digits"),
        (b'{"prompt": "a", "n": true}', "n is true; expected a whole number from 1 to 16"),
        (b'{"prompt": "a", "temprature": 1}', "did you mean 'temperature'?"),
    ],
)
def test_odd_json_is_refused_in_one_line(link, body, message):
    status, reply, _ = post(link, body)
    text = json.loads(reply)["error"]["message"]
    assert status == 400 and message in text and "\n" not in text and len(text) < 200


# Clients that are slow, or leave.


@contextlib.contextmanager
def opened(address, sent: bytes = b"", buffer: int | None = None):
    with socket.socket() as link:
        if buffer is not None:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        link.settimeout(LONGEST_S)
        link.connect(address)
        link.sendall(sent)
        yield link


def head(length: int, path: str = "/v1/completions") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def request(**more: Any) -> bytes:
    body = json.dumps({**ASKED, **more}).encode()
    return head(len(body)) + body


def read_all(link: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := link.recv(1 << 16):
            found += piece
    return found


def test_clients_that_leave_in_the_middle_of_a_body_hold_nothing(address):
    """More of them than the bodies of all requests may take memory."""
    for _ in range(5):
        with opened(address, head(45_000) + b"x" * 40_000):
            time.sleep(0.05)
    assert is_served(address)


def test_a_body_that_does_not_arrive_is_refused(address):
    with opened(address, head(1_000) + b"{") as link:
        assert is_served(address)
        assert (
            b"408 " in (reply := read_all(link)) and b"did not arrive within 1.5 seconds" in reply
        )


def test_a_client_that_leaves_frees_its_slots_and_its_place(address, server):
    """Its 16 answers would take all slots for a while."""
    engine = server[1]
    before = engine.stats().requests.get("cancelled", 0)
    for stream in (True, False):
        with opened(address, request(n=16, max_tokens=200, stream=stream)):
            eventually(lambda: engine.stats().active > 0, True)
        eventually(lambda: (engine.stats().active, engine.stats().waiting), (0, 0), 5)
    assert engine.stats().requests.get("cancelled", 0) == before + 2
    assert is_served(address)


def test_requests_that_take_long_to_read_cost_the_next_no_more_than_the_limit(monkeypatch):
    """Both readers are busy. Who waits for them is told so after `answer_time`, and what the two
    that left had asked is not answered."""
    reading, go_on = threading.Semaphore(0), threading.Event()

    def read(given: Any, served: Any) -> Any:
        if given["prompt"] == ["slow", "slow"]:
            reading.release()
            go_on.wait(LONGEST_S)
        return read_completion(given, served)

    monkeypatch.setattr(app, "read_completion", read)
    limits = Limits(answer_time=1.0)
    with serving(chat_model(), limits=limits, slots=2, context=64) as (server, engine):
        address = (urlsplit(server).hostname, urlsplit(server).port)
        engine.submit(Request("the cat"), Sampling(max_new_tokens=2)).result()  # compiles it
        for _ in range(2):
            with opened(address, request(prompt=["slow", "slow"])):
                assert reading.acquire(timeout=LONGEST_S)
        with opened(address, request()) as link:
            time.sleep(1.2)
            go_on.set()
            reply = read_all(link)
        assert b"429 " in reply and b"did not begin within 1 seconds" in reply
        assert is_served(address)
        assert engine.stats().requests.get("cancelled", 0) == 0


def test_a_client_that_does_not_read_is_dropped_and_delays_nobody(address):
    asked = request(n=2, max_tokens=200, stream=True, logprobs=5)
    with opened(address, asked, buffer=4096) as link:
        for _ in range(3):
            assert is_served(address)
        time.sleep(1.5 * LIMITS.stall_time)
        assert b"[DONE]" not in read_all(link)


def test_idle_connections_are_closed_and_others_are_served(address):
    """More than may be open; those that are idle longest make room. Later all are closed."""
    with contextlib.ExitStack() as stack:
        start = time.monotonic()
        links = [stack.enter_context(opened(address)) for _ in range(LIMITS.connections + 40)]
        assert is_served(address)
        assert read_all(links[0]) == b"" and time.monotonic() - start < LIMITS.idle_time
        trickling = stack.enter_context(opened(address, b"POST /v1/comp"))
        trickling.sendall(b"letions HTTP/1.1\r\n")
        assert read_all(trickling) == b""


@pytest.mark.slow
def test_thousands_of_idle_connections_cost_the_others_nothing():
    with (
        serving(chat_model(), slots=1, context=64) as (address, _),
        contextlib.ExitStack() as stack,
    ):
        parts = urlsplit(address)
        place = parts.hostname, parts.port
        is_served(place)  # compiles
        for i in range(6_000):
            stack.enter_context(opened(place))
            if i % 1_000 == 999:
                assert is_served(place)


def test_where_too_many_wait_the_next_is_told_when_to_come_again(address, server):
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(opened(address, request(n=16, max_tokens=200)))
        link = stack.enter_context(
            contextlib.closing(http.client.HTTPConnection(*address, timeout=LONGEST_S))
        )
        status, body, headers = post(link, json.dumps(ASKED).encode())
        assert status == 429 and headers["retry-after"] == "2", body
    eventually(lambda: server[1].stats().waiting, 0)
    assert is_served(address)


def test_a_client_that_does_not_read_cannot_keep_the_server_from_stopping(caplog):
    limits = Limits(stop_time=0.2, stall_time=600)
    asked = request(n=2, max_tokens=200, stream=True, logprobs=5)
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as client:
        settings: Any = dict(slots=2, context=256)
        address, _ = stack.enter_context(serving(chat_model(), limits=limits, **settings))
        parts = urlsplit(address)
        link = client.enter_context(opened((parts.hostname, parts.port), asked, buffer=4096))
        link.recv(9)
        start = time.monotonic()
        stack.close()
        assert time.monotonic() - start < 30 and not caplog.records


def test_what_is_no_http_is_refused(address):
    for sent in (
        b"\x16\x03\x01\x02\x00\x01" * 9 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    ):
        with opened(address, sent) as link:
            assert b" 400 " in read_all(link)
    assert is_served(address)
