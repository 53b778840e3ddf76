"""HTTP as it comes from strangers: malformed, oversized, slow, leaving, too many, without a key."""

import http.client
import json
import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

BODY = {"prompt": "A", "max_tokens": 2}
LONG = {"prompt": "A", "max_tokens": 500, "ignore_eos": True}
JSON = "Content-Type: application/json\r\n"


def connect(url: str) -> socket.socket:
    address = httpx.URL(url)
    return socket.create_connection((address.host, address.port), timeout=20)


def exchange(url: str, request: str | bytes, then: bytes = b"") -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of the answer to raw bytes."""
    with connect(url) as connection:
        connection.sendall(request.encode() if isinstance(request, str) else request)
        if then:
            time.sleep(0.05)
            connection.sendall(then)
        response = http.client.HTTPResponse(connection)
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        text = response.read()
        return response.status, headers, json.loads(text) if "json" in headers["content-type"] else text


def post(body: bytes, path: str = "/v1/completions", headers: str = JSON) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def assert_error(answer: tuple[int, dict[str, str], Any], status: int, code: str | None) -> None:
    assert answer[0] == status
    error = answer[2]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]
    assert "Traceback" not in error["message"]


# ---- Bodies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b"[" * 100_000,
        b'{"prompt": ' + b"9" * 5000 + b"}x",
    ],
)
def test_bodies_that_are_not_json(live: Any, body: bytes) -> None:
    assert_error(exchange(live.url, post(body)), 400, "invalid_json")


@pytest.mark.parametrize(
    "body", [b"null", b"3", b'"x"', b"[]", b"{}", b'{"prompt": {"a": [1]}}', b'{"prompt": 1e400}']
)
def test_json_that_is_no_request(live: Any, body: bytes) -> None:
    status, _, answer = exchange(live.url, post(body))
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "headers", ["", "Content-Type: text/plain\r\n", "Content-Type: multipart/form-data\r\n"]
)
def test_other_media_types(live: Any, headers: str) -> None:
    answer = exchange(live.url, post(json.dumps(BODY).encode(), headers=headers))
    assert_error(answer, 415, "unsupported_media_type")


def test_a_charset_is_no_other_media_type(live: Any) -> None:
    headers = "Content-Type: Application/JSON; charset=utf-8\r\n"
    assert exchange(live.url, post(json.dumps(BODY).encode(), headers=headers))[0] == 200


def test_a_request_that_says_it_is_too_large(start: Callable[..., Any]) -> None:
    url = start(body_bytes=1000).url
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{JSON}Content-Length: 1001\r\n\r\n"
    answer = exchange(url, head)
    assert_error(answer, 413, "body_too_large")
    assert answer[1]["connection"] == "close"
    assert httpx.post(url + "/v1/completions", json=BODY).status_code == 200


def test_a_request_that_turns_out_too_large(start: Callable[..., Any]) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{JSON}Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
    assert_error(exchange(start(body_bytes=1000).url, head, chunk * 2), 413, "body_too_large")


def test_a_slow_request(start: Callable[..., Any]) -> None:
    url = start(body_seconds=0.2).url
    assert_error(exchange(url, post(b" " * 100)[:-50]), 408, "request_timeout")


def test_requests_that_break_off(live: Any) -> None:
    for cut in (10, 60, -5):
        with connect(live.url) as connection:
            connection.sendall(post(json.dumps(BODY).encode())[:cut])
    assert exchange(live.url, post(json.dumps(BODY).encode()))[0] == 200


@pytest.mark.parametrize(
    "request_",
    [b"\r\n\r\n\r\n", b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nA B: c\r\n\r\n", b"GET /" + b"a" * 100_000],
)
def test_what_is_no_http(live: Any, request_: bytes) -> None:
    with connect(live.url) as connection:
        connection.sendall(request_ + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(10_000)
    assert not answer or answer.startswith(b"HTTP/1.1 400")
    assert httpx.get(live.url + "/health").status_code == 200


def test_two_requests_on_one_connection(live: Any) -> None:
    with httpx.Client(base_url=live.url) as client:
        texts = [client.post("/v1/completions", json={**BODY, "temperature": 0}).json() for _ in range(2)]
    assert texts[0]["choices"] == texts[1]["choices"]


# ---- Paths and methods -----------------------------------------------------------------------------------


def test_unknown_paths_and_methods(live: Any) -> None:
    for method, path, status in [
        ("GET", "/v2", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/page/../app.py", 404),
        ("GET", "/..%2fapp.py", 404),
    ]:
        answer = httpx.request(method, live.url + path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def test_the_page_may_only_use_its_own_files(live: Any) -> None:
    page = httpx.get(live.url + "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy
    assert httpx.get(live.url + "/main.js").headers["content-type"].startswith("text/javascript")


def test_health_and_metrics(live: Any) -> None:
    assert httpx.get(live.url + "/health").json() == {"status": "ok"}
    before = live.metric("elutq_completion_tokens_total")
    responses = 'elutq_http_responses_total{path="/v1/completions",status="200"}'
    count = live.metric(responses)
    httpx.post(live.url + "/v1/completions", json={**BODY, "ignore_eos": True})
    assert live.metric("elutq_completion_tokens_total") == before + 2
    assert live.metric(responses) == count + 1
    assert live.metric("elutq_time_to_first_token_seconds_count") > 0
    httpx.get(live.url + "/some/other/path")
    assert "/some/other/path" not in httpx.get(live.url + "/metrics").text


# ---- Who may ask -----------------------------------------------------------------------------------------


def test_a_key_is_asked_for(start: Callable[..., Any]) -> None:
    url = start(api_key="secret").url
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            answer = httpx.get(url + path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    weird = "GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s\xe9cret\r\n\r\n".encode("latin-1")
    assert exchange(url, weird)[0] == 401
    assert httpx.post(url + "/v1/completions", content=b"{").status_code == 401
    assert httpx.get(url + "/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert httpx.get(url + "/health").status_code == 200
    assert httpx.get(url + "/").status_code == 200


def test_other_origins_may_call_only_if_they_are_named(live: Any, start: Callable[..., Any]) -> None:
    preflight = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    plain = httpx.options(live.url + "/v1/completions", headers=preflight)
    assert plain.status_code == 405
    assert not [name for name in plain.headers if name.startswith("access-control")]
    url = start(api_key="secret", cors_origins=("https://a.example",)).url
    allowed = httpx.options(url + "/v1/completions", headers=preflight)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    refused = httpx.post(url + "/v1/completions", headers={"Origin": "https://a.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example"
    other = httpx.options(url + "/v1/completions", headers={**preflight, "Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_page_of_another_name_is_no_page_of_ours(start: Callable[..., Any]) -> None:
    url = start(hosts=("localhost", "127.0.0.1", "[::1]")).url
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
        assert httpx.get(url + "/v1/models", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example:8000", "[::2]:1", ""):
        for path in ("/", "/health", "/v1/models"):
            answer = httpx.get(url + path, headers={"Host": host})
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "unknown_host"


# ---- Too many, too long ----------------------------------------------------------------------------------


def test_a_full_queue(start: Callable[..., Any], hold: Any) -> None:
    live = start(parallel=1, queue=1)
    with ThreadPoolExecutor(2) as pool:
        taken = [
            pool.submit(httpx.post, live.url + "/v1/completions", json=BODY, timeout=30) for _ in range(2)
        ]
        live.wait_for("elutq_requests_queued", 1)
        answer = httpx.post(live.url + "/v1/completions", json=BODY)
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert live.metric("elutq_requests_rejected_total") == 1
        hold.go.set()
        assert [future.result().status_code for future in taken] == [200, 200]


def test_a_request_too_large_for_the_queue_takes_no_place_in_it(start: Callable[..., Any], hold: Any) -> None:
    live = start(parallel=1, queue=2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, live.url + "/v1/completions", json=BODY, timeout=30)
        live.wait_for("elutq_requests_running", 1)
        assert httpx.post(live.url + "/v1/completions", json={**BODY, "n": 3}).status_code == 429
        hold.go.set()
        assert first.result().status_code == 200
    live.wait_for("elutq_requests_queued", 0)
    assert httpx.post(live.url + "/v1/completions", json={**BODY, "n": 3}).status_code == 200
    assert httpx.post(live.url + "/v1/completions", json={**BODY, "n": 4}).status_code == 400


def test_a_silent_stream_is_kept_alive(live: Any, hold: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from elutq.server import streams

    monkeypatch.setattr(streams, "_SILENCE_SECONDS", 0.05)
    with httpx.stream(
        "POST", live.url + "/v1/completions", json={**BODY, "stream": True}, timeout=30
    ) as answer:
        lines = answer.iter_lines()
        assert next(lines) == ": working"
        hold.go.set()
        *_, last = (line for line in lines if line)
    assert last == "data: [DONE]"


def test_the_time_limit(start: Callable[..., Any], hold: Any) -> None:
    live = start(request_seconds=0.3)
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(httpx.post, live.url + "/v1/completions", json=LONG, timeout=30)
        body = {**LONG, "stream": True}
        stream = pool.submit(httpx.post, live.url + "/v1/completions", json=body, timeout=30)
        live.wait_for("elutq_requests_queued", 1)
        time.sleep(0.4)
        hold.go.set()
        assert whole.result().status_code == 504
        assert whole.result().json()["error"]["code"] == "timeout"
        *_, error, done, end = stream.result().text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
    assert (done, end) == ("data: [DONE]", "")


# ---- Faults ----------------------------------------------------------------------------------------------


def test_a_fault_shows_nothing_of_the_program(
    live: Any, chat_model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret internals")

    with monkeypatch.context() as patch:
        patch.setattr(chat_model, "step", fail)
        whole = httpx.post(live.url + "/v1/completions", json=BODY)
        stream = httpx.post(live.url + "/v1/completions", json={**BODY, "stream": True})
        patch.setattr(type(chat_model.tokenizer), "encode", fail)
        before = httpx.post(live.url + "/v1/completions", json=BODY)
    for answer in (whole, before):
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
    assert '"code":"internal_error"' in stream.text
    assert "secret" not in whole.text + stream.text + before.text
    assert "secret internals" in caplog.text
    assert httpx.post(live.url + "/v1/completions", json=BODY).status_code == 200


def test_logs_hold_no_prompt(live: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "elutq"), caplog.at_level(logging.DEBUG, "uvicorn"):
        httpx.post(live.url + "/v1/completions", json={"prompt": "xyzzy", "max_tokens": 3})
        httpx.post(live.url + "/v1/completions", json={"prompt": "xyzzy", "max_tokens": "xyzzy"})
        httpx.post(
            live.url + "/v1/chat/completions", json={"messages": [{"role": "user", "content": "xyzzy"}]}
        )
    assert "3 generated" in caplog.text
    assert "xyzzy" not in caplog.text
