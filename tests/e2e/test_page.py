"""The chat page in a real Chromium: against a scripted server, and against `elutq serve` on the bundled model."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[test]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium: apt-get install chromium")

PAGE = Path(str(files("elutq") / "server" / "page"))
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


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
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        name = self.path.removeprefix("/") or "index.html"
        if name == "v1/models":
            capabilities = {"context_length": 4096, "chat": self.server.chat}
            models = {"data": [{"id": "tiny-model", "object": "model", "elutq": capabilities}]}
            self.reply(200, "application/json", json.dumps(models).encode())
        elif "/" not in name and (PAGE / name).is_file():
            headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
            kind = TYPES[Path(name).suffix] + "; charset=utf-8"
            self.reply(200, kind, (PAGE / name).read_bytes(), headers)
        else:
            self.reply(404, "text/plain", b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        reply = self.server.replies.pop(0)
        if reply.status != 200:
            self.reply(reply.status, "application/json", json.dumps({"error": reply.error}).encode(), reply.headers)
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
    """Gives the replies in turn and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
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


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: ScriptedServer) -> Iterator[Any]:
    """A page on the scripted server. Afterwards nothing may have left for elsewhere, failed in a script or popped up."""
    context = browser.new_context(base_url=server.url)
    context.set_default_timeout(10_000)
    page = context.new_page()
    faults: list[str] = []

    def check_request(request: Any) -> None:
        if not request.url.startswith((server.url, "blob:")):
            faults.append(f"request to {request.url}")

    def check_console(message: Any) -> None:
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            faults.append(f"console: {message.text}")

    context.on("request", check_request)
    page.on("console", check_console)
    page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
    page.on("dialog", lambda dialog: faults.append(f"dialog: {dialog.message}"))
    page.on("popup", lambda popup: faults.append(f"popup: {popup.url}"))
    yield page
    context.close()
    assert faults == []


def send(page: Any, text: str) -> None:
    page.locator("#input").fill(text)
    page.keyboard.press("Enter")


def answer(page: Any) -> Any:
    return page.locator(".message.assistant").last


def expect_text(locator: Any, text: str) -> None:
    playwright.expect(locator).to_have_text(text)


def expect_done(page: Any) -> None:
    playwright.expect(page.locator("#send")).to_be_visible()


def test_an_answer_streams(page: Any, server: ScriptedServer) -> None:
    gate = threading.Event()
    server.say("Hel", "lo", " there", gate=gate)
    page.goto("/")
    expect_text(page.locator("#model"), "tiny-model")
    send(page, "Hi")
    expect_text(page.locator(".bubble"), "Hi")
    expect_text(answer(page).locator(".prose"), "Hello")
    playwright.expect(page.locator("#stop")).to_be_visible()
    gate.set()
    expect_text(answer(page).locator(".prose"), "Hello there")
    expect_done(page)
    playwright.expect(answer(page).locator("footer")).to_contain_text("tokens/s")
    expect_text(page.locator("#context span"), "1,234 of 4,096 tokens")
    path, body, _ = server.asked[0]
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "tiny-model",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_stop_keeps_what_was_written(page: Any, server: ScriptedServer) -> None:
    gate = threading.Event()
    server.say("One ", "two ", "three", gate=gate)
    page.goto("/")
    send(page, "Count")
    expect_text(answer(page).locator(".prose"), "One two")
    page.keyboard.press("Escape")
    expect_text(answer(page).locator(".note"), "Stopped.")
    expect_done(page)
    expect_text(answer(page).locator(".prose"), "One two")
    gate.set()

    # The next question carries the piece along.
    server.say("Three")
    send(page, "Go on")
    expect_text(answer(page).locator(".prose"), "Three")
    assert [message["content"] for message in server.asked[1][1]["messages"]] == ["Count", "One two ", "Go on"]


def test_a_reload_finds_the_conversation_again(page: Any, server: ScriptedServer) -> None:
    server.say("**Blue**")
    page.goto("/")
    send(page, "What color?")
    expect_text(answer(page).locator(".prose strong"), "Blue")
    expect_done(page)
    page.reload()
    expect_text(page.locator(".bubble"), "What color?")
    expect_text(answer(page).locator(".prose strong"), "Blue")
    expect_text(page.locator("#conversations .title"), "What color?")

    # In the middle of an answer, too.
    gate = threading.Event()
    server.say("Half of ", "it", gate=gate)
    send(page, "More")
    expect_text(answer(page).locator(".prose"), "Half of")
    page.reload()
    gate.set()
    expect_text(answer(page).locator(".prose"), "Half of")
    expect_text(answer(page).locator(".note"), "Interrupted.")


def test_edit_and_regenerate(page: Any, server: ScriptedServer) -> None:
    server.say("First")
    page.goto("/")
    send(page, "Qestion")
    expect_text(answer(page).locator(".prose"), "First")
    expect_done(page)

    server.say("Second")
    page.get_by_label("Regenerate").click()
    expect_text(answer(page).locator(".prose"), "Second")
    expect_done(page)
    assert server.asked[1][1]["messages"] == [{"role": "user", "content": "Qestion"}]

    server.say("Third")
    page.locator(".message.user").hover()
    page.locator(".message.user").get_by_label("Edit").click()
    page.locator(".editor textarea").fill("Question")
    page.keyboard.press("Enter")
    expect_text(answer(page).locator(".prose"), "Third")
    playwright.expect(page.locator(".message")).to_have_count(2)
    assert server.asked[2][1]["messages"] == [{"role": "user", "content": "Question"}]


def test_conversations_are_renamed_deleted_exported_and_imported(
    page: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    page.goto("/")
    for number in ("one", "two"):
        server.say(number.upper())
        page.get_by_label("New conversation").click()
        send(page, number)
        expect_text(answer(page).locator(".prose"), number.upper())
        expect_done(page)
    titles = page.locator("#conversations .title")
    playwright.expect(titles).to_have_text(["two", "one"])

    page.get_by_label("Rename two").click()
    page.get_by_label("Title").fill("zwei")
    page.keyboard.press("Enter")
    playwright.expect(titles).to_have_text(["zwei", "one"])
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "export.json")

    page.get_by_label("Delete zwei").click()
    playwright.expect(titles).to_have_text(["one"])
    page.locator("#import-file").set_input_files(tmp_path / "export.json")
    playwright.expect(titles).to_have_text(["zwei", "one"])
    expect_text(answer(page).locator(".prose"), "TWO")

    (tmp_path / "bad.json").write_text('{"conversations": [{"id": "../x"}]}')
    page.locator("#import-file").set_input_files(tmp_path / "bad.json")
    playwright.expect(page.locator("#notice")).to_contain_text("not an export")


def test_settings_go_into_the_request(page: Any, server: ScriptedServer) -> None:
    server.say("Ahoy")
    page.goto("/")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be a pirate.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Longest answer").fill("64")
    page.get_by_label("Top P").fill("7")  # Out of range: not kept.
    page.get_by_role("button", name="Done").click()
    page.reload()
    send(page, "Hi")
    expect_text(answer(page).locator(".prose"), "Ahoy")
    body = server.asked[0][1]
    assert body["messages"][0] == {"role": "system", "content": "Be a pirate."}
    assert (body["temperature"], body["max_tokens"]) == (0.5, 64)
    assert "top_p" not in body


def test_a_model_without_a_chat_template_continues_text(page: Any, server: ScriptedServer) -> None:
    server.chat = False
    server.say(" a cat", " sat.")
    page.goto("/")
    send(page, "Once")
    expect_text(page.locator(".text"), "Once a cat sat.")
    expect_done(page)
    server.say(" It purred.")
    send(page, "")
    expect_text(page.locator(".text"), "Once a cat sat. It purred.")
    expect_done(page)
    server.say(" slept.")
    send(page, "Then it")
    expect_text(page.locator(".text"), "Once a cat sat. It purred. Then it slept.")
    expect_done(page)
    assert [path for path, _, _ in server.asked] == ["/v1/completions"] * 3
    assert [body["prompt"] for _, body, _ in server.asked][2] == "Once a cat sat. It purred. Then it"

    server.say(" dog.")
    page.get_by_label("Edit", exact=True).click()
    page.locator(".editor textarea").fill("A")
    page.get_by_role("button", name="Continue").click()
    expect_text(page.locator(".text"), "A dog.")


def test_errors_say_what_to_do(page: Any, server: ScriptedServer) -> None:
    page.goto("/")
    notice = page.locator("#notice")

    server.fail(401, "Missing key.")
    send(page, "Hi")
    page.get_by_label("API key").fill("secret")
    server.fail(429, "Too many requests are waiting.", **{"Retry-After": "1"})
    server.say("At last")
    page.get_by_role("button", name="Continue").click()
    playwright.expect(notice).to_contain_text("Too many requests are waiting.")
    playwright.expect(notice).to_contain_text("Trying again in")
    expect_text(answer(page).locator(".prose"), "At last")
    expect_text(notice, "")
    assert [key for _, _, key in server.asked] == [None, "Bearer secret", "Bearer secret"]

    server.fail(400, "The prompt has 5000 tokens; the context holds 4096.", "context_length_exceeded")
    send(page, "Long")
    playwright.expect(notice).to_contain_text("the context holds 4096")
    notice.get_by_role("button", name="New conversation").click()
    playwright.expect(page.locator(".greeting")).to_be_visible()

    server.say("Half", cut=True)
    send(page, "Again")
    playwright.expect(notice).to_contain_text("connection broke")
    expect_text(answer(page).locator(".prose"), "Half")
    server.say("Whole")
    notice.get_by_role("button", name="Try again").click()
    expect_text(answer(page).locator(".prose"), "Whole")


def test_a_server_that_is_gone(page: Any, server: ScriptedServer) -> None:
    page.goto("/")
    expect_text(page.locator("#model"), "tiny-model")
    page.context.set_offline(True)
    send(page, "Hi")
    playwright.expect(page.locator("#notice")).to_contain_text("The server does not answer")
    page.context.set_offline(False)
    server.say("Back")
    page.get_by_role("button", name="Try again").click()
    expect_text(answer(page).locator(".prose"), "Back")


HOSTILE = """<img src=x onerror="window.pwned = 1; alert(1)"><script>window.pwned = 1</script>
<iframe src="https://evil.example/"></iframe> <svg onload=alert(1)> <style>body { display: none }</style>

# <img src=https://evil.example/heading onerror=alert(1)>

[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](&#106;avascript:alert(1)) [d](\tjavascript:alert(1))
[e](data:text/html,<script>alert(1)</script>) [f](vbscript:x) [g](//evil.example/x) [h](<javascript:alert(1)>)
![image](https://evil.example/pixel.png) <javascript:alert(1)> [i](https://ok.example/"onmouseover="alert(1))
[j](https://ok.example/ "title\" onmouseover=alert(1)") `<b>` **<script>alert(1)</script>**

| <script>alert(1)</script> | b |
|---|---|
| <img src=x onerror=alert(1)> | [x](javascript:alert(1)) |

```"><img src=x onerror=alert(1)>
</code></pre><script>window.pwned = 1</script>
```

- <details open ontoggle=alert(1)>
> <math><mtext></mtext></math> <a href="javascript:alert(1)">x</a>
"""

# What the page made of an answer: elements, attributes and link targets.
SURVEY = """() => {
  const elements = [...document.querySelectorAll("main article *")].filter((node) => !node.closest("svg, footer"));
  return {
    tags: [...new Set(elements.map((node) => node.localName))],
    attributes: [...new Set(elements.flatMap((node) => node.getAttributeNames()))],
    schemes: [...new Set([...document.querySelectorAll("main a")].map((link) => link.protocol))],
    pwned: "pwned" in window,
  };
}"""


def test_hostile_output_stays_text(page: Any, server: ScriptedServer) -> None:
    server.say(*HOSTILE)  # Character by character: no piece may be taken for more than text either.
    page.goto("/")
    send(page, HOSTILE)
    expect_done(page)
    for _ in range(2):  # As it streams, and as it is found again.
        survey = page.evaluate(SURVEY)
        assert not survey["pwned"]
        assert set(survey["tags"]) <= {
            *("div", "p", "h2", "br", "a", "code", "strong", "ul", "li", "blockquote", "figure", "figcaption", "span"),
            *("button", "pre", "table", "thead", "tbody", "tr", "th", "td"),
        }
        assert set(survey["attributes"]) <= {
            *("class", "href", "title", "target", "rel", "type", "data-copy", "tabindex", "role", "aria-label"),
        }
        assert set(survey["schemes"]) == {"https:"}
        text = answer(page).locator(".prose").text_content()
        for piece in ("<script>window.pwned = 1</script>", "[a](javascript:alert(1))", "<svg onload=alert(1)>"):
            assert piece in text
        page.reload()

    server.fail(500, "<img src=x onerror=alert(1)>")
    send(page, "Hi")
    expect_text(page.locator("#notice p"), "<img src=x onerror=alert(1)>")


def test_no_source_turns_text_into_html_or_names_another_site() -> None:
    sources = {path.name: path.read_text() for path in PAGE.iterdir()}
    assert {"index.html", "main.js", "style.css"} <= set(sources)
    for name, source in sources.items():
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "style="):
            assert forbidden not in source, f"{forbidden} in {name}"
        assert "://" not in source.replace("http://www.w3.org/2000/svg", ""), f"an address in {name}"
