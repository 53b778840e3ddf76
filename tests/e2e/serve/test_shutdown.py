"""`elutq serve` as a process: how it starts, and how it ends under load."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from elutq.cli import app

pytest.importorskip("fastapi")

LONG = {"prompt": "A", "max_tokens": 400, "ignore_eos": True, "stream": True}


class Process:
    """`elutq serve` on a free port."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "elutq", "serve", str(folder), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.log: list[str] = []
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"is served on (http://\S+)", line):
                self.url = found.group(1)
            if "Started server" in line:
                break
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()))
        self._reader.start()

    def end(self) -> int:
        """Wait for its end; the exit status."""
        status = self.process.wait(30)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


@pytest.fixture
def run(chat_folder: Path) -> Iterator[Callable[..., Process]]:
    """`run(*options)` starts the command."""
    started: list[Process] = []

    def begin(*options: str) -> Process:
        started.append(Process(chat_folder, *options))
        return started[-1]

    yield begin
    for process in started:
        if process.process.poll() is None:
            process.process.kill()
            process.end()


def stream(url: str, begun: threading.Semaphore) -> list[Any]:
    """The events of a stream; the last is None if it was ended by [DONE]."""
    events: list[Any] = []
    with httpx.stream("POST", url + "/v1/completions", json=LONG, timeout=30) as answer:
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                events.append(None)
            elif line:
                events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 1:
                    begun.release()
    return events


@pytest.mark.parametrize(("drain", "finished"), [(30, True), (0, False)])
def test_sigterm_under_load(run: Callable[..., Process], drain: int, finished: bool) -> None:
    process = run("--drain", str(drain), "--parallel", "4")
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream, process.url, begun) for _ in range(4)]
        for _ in streams:
            begun.acquire()
        process.process.send_signal(signal.SIGTERM)
        results = [future.result() for future in streams]
    assert process.end() == 0
    for *events, last, done in results:
        assert done is None
        assert all("error" not in event for event in events)
        if finished:
            assert last["choices"][0]["finish_reason"] == "length"
        else:
            assert last["error"]["code"] == "shutting_down" or last["choices"][0]["finish_reason"] == "length"
    assert finished or any("error" in events[-2] for events in results)
    assert "Traceback" not in "".join(process.log)


def test_new_requests_are_refused_while_others_finish(start: Callable[..., Any], hold: Any) -> None:
    live = start(drain=20)
    with ThreadPoolExecutor(1) as pool:
        url = live.url + "/v1/completions"
        running = pool.submit(httpx.post, url, json={"prompt": "A", "max_tokens": 5}, timeout=30)
        assert hold.reached.wait(20)
        live.server.should_exit = True
        assert live.service.draining.wait(20)
        health = httpx.get(live.url + "/health")
        refused = httpx.post(url, json={"prompt": "A"})
        hold.go.set()
        assert running.result().status_code == 200
    for answer in (health, refused):
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "shutting_down"
        assert int(answer.headers["retry-after"]) > 0
    live.thread.join(20)
    assert not live.thread.is_alive()


def test_a_second_signal_ends_at_once(run: Callable[..., Process]) -> None:
    process = run("--drain", "600")
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, process.url, begun) for _ in range(8)]
        begun.acquire()
        process.process.send_signal(signal.SIGINT)
        process.process.send_signal(signal.SIGINT)
        assert process.end() == 0
        for future in streams:
            assert future.exception() is None or isinstance(future.exception(), httpx.HTTPError)


def test_a_server_without_a_key_knows_its_names(run: Callable[..., Process]) -> None:
    url = run("--allowed-host", "llm.example").url
    for host, status in (("localhost", 200), ("llm.example:80", 200), ("other.example", 403)):
        assert httpx.get(url + "/v1/models", headers={"Host": host}).status_code == status


def test_a_key_from_a_file(run: Callable[..., Process], tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    process = run("--api-key-file", str(file), "--name", "mine")
    headers = {"Authorization": "Bearer secret"}
    assert httpx.get(process.url + "/v1/models").status_code == 401
    assert httpx.get(process.url + "/v1/models", headers=headers).json()["data"][0]["id"] == "mine"
    foreign = {**headers, "Host": "other.example"}
    assert httpx.get(process.url + "/v1/models", headers=foreign).status_code == 200  # the key is enough
    process.process.send_signal(signal.SIGTERM)
    assert process.end() == 0
    assert "secret" not in "".join(process.log)


def test_options_that_cannot_be(chat_folder: Path, tmp_path: Path) -> None:
    def complaint(*options: str) -> str:
        done = CliRunner().invoke(app, ["serve", str(chat_folder), *options])
        assert done.exit_code == 1
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "not both" in complaint("--api-key", "a", "--api-key-file", str(tmp_path / "b"))
    assert "cannot be read" in complaint("--api-key-file", str(tmp_path / "b"))
    assert "one line of printable ASCII" in complaint("--api-key", "")
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "Address already in use; choose another" in complaint("--port", str(other.getsockname()[1]))
    assert "cannot listen on 192.0.2.1" in complaint("--host", "192.0.2.1")
