"""Texts and a model to calibrate with; a real Chromium, and a server of scripted answers for its page."""

import json
import mimetypes
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Reply:
    """One answer: its pieces, the last held back until `gate` is set; or an error of `status`."""

    pieces: list[str] = field(default_factory=list)
    gate: threading.Event | None = None
    status: int = 200
    error: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False  # The connection breaks after the pieces.


class Handler(BaseHTTPRequestHandler):
    """The page's files, and the part of the OpenAI protocol that the page uses."""

    server: "ScriptedServer"
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def reply(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        fixed = {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in {**fixed, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            capabilities = {"context_length": 4096, "chat": self.server.chat}
            models = {"data": [{"id": "tiny-model", "object": "model", "elutq": capabilities}]}
            self.reply(200, "application/json", json.dumps(models).encode())
        elif file := self.server.files.page_paths().get(self.path):
            kind = mimetypes.guess_type(file)[0]
            self.reply(200, f"{kind}; charset=utf-8", file.read_bytes(), self.server.files.HEADERS)
        else:
            self.reply(404, "text/plain", b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        reply = self.server.replies.pop(0)
        if reply.status != 200:
            error = json.dumps({"error": reply.error}).encode()
            self.reply(reply.status, "application/json", error, reply.headers)
            return
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for index, piece in enumerate(reply.pieces):
                if reply.gate and index == len(reply.pieces) - 1:
                    reply.gate.wait(20)
                self.event({"choices": [{"index": 0, "delta": {"content": piece}, "text": piece}]})
            if reply.cut:
                return
            self.event({"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}]})
            usage = {"prompt_tokens": 1000, "completion_tokens": len(reply.pieces), "total_tokens": 1234}
            self.event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.server.left.set()

    def event(self, data: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())


class ScriptedServer(ThreadingHTTPServer):
    """Serves the page as `elutq serve` does, gives the replies in turn and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = pytest.importorskip("elutq.server.page_files", reason="needs pip install '.[serve]'")
        self.replies: list[Reply] = []
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.chat = True
        self.left = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def say(self, *pieces: str, **options: Any) -> None:
        self.replies.append(Reply(list(pieces), **options))

    def fail(self, status: int, message: str, code: str = "", **headers: str) -> None:
        error = {"message": message, "code": code}
        self.replies.append(Reply(status=status, error=error, headers=headers))


@pytest.fixture(scope="package")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A file of text by the bundled model to calibrate on, and other tokens of it to judge by."""
    from elutq.calibration import sample_text
    from elutq.models import bundled_model
    from elutq.runtime import load

    with load(bundled_model()) as model:
        ids = sample_text(model, 24, 160, seed=3)
        file = tmp_path_factory.mktemp("texts") / "calibration.txt"
        file.write_text(
            "\n<|endoftext|>\n".join(model.tokenizer.decode(row[1:].tolist()) for row in ids[:16])
        )
        return file, ids[16:].ravel().tolist()


@pytest.fixture(scope="package")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two blocks of the bundled model."""
    import torch
    import transformers

    from elutq.models import bundled_model

    folder = tmp_path_factory.mktemp("models") / "two-blocks"
    model = transformers.AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.config.layer_types = None
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(bundled_model()).save_pretrained(folder)
    return folder


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[test]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs a Chromium: apt-get install chromium")
    with driver.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser: Any) -> Iterator[Callable[[str], Any]]:
    """`new_page(url)` is a page for a server. No script may fail, nothing pop up or leave for elsewhere."""
    contexts = []
    faults: list[str] = []

    def make(url: str) -> Any:
        def check_request(request: Any) -> None:
            if not request.url.startswith((url, "blob:")):
                faults.append(f"request to {request.url}")

        def check_console(message: Any) -> None:
            if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
                faults.append(f"console: {message.text}")

        context = browser.new_context(base_url=url)
        contexts.append(context)
        context.set_default_timeout(10_000)
        context.on("request", check_request)
        page = context.new_page()
        page.on("console", check_console)
        page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
        page.on("dialog", lambda dialog: faults.append(f"dialog: {dialog.message}"))
        page.on("popup", lambda popup: faults.append(f"popup: {popup.url}"))
        return page

    yield make
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def page(new_page: Callable[[str], Any], server: ScriptedServer) -> Any:
    """A page for the scripted server."""
    return new_page(server.url)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are not drawn, which takes longer than everything else."""
    monkeypatch.setattr("elutq.report_page.report_page", lambda report, histograms: "")
    monkeypatch.setattr("elutq.report_page.report_figure", lambda report, histograms: b"")
