"""The chat page in a real Chromium, with a scripted server and with `elutq serve`."""

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from elutq.models import bundled_model

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[test]'").expect


def send(page: Any, text: str) -> None:
    expect(page.locator("#send")).to_be_enabled()
    page.locator("#input").fill(text)
    page.keyboard.press("Enter")


def answer(page: Any) -> Any:
    return page.locator(".message.assistant").last


def expect_text(locator: Any, text: str) -> None:
    expect(locator).to_have_text(text)


def expect_done(page: Any) -> None:
    expect(page.locator("#send")).to_be_visible()


def test_an_answer_streams(page: Any, server: Any) -> None:
    gate = threading.Event()
    server.say("Hel", "lo", " there", gate=gate)
    page.goto("/")
    expect_text(page.locator("#model"), "tiny-model")
    send(page, "Hi")
    expect_text(page.locator(".bubble"), "Hi")
    expect_text(answer(page).locator(".prose"), "Hello")
    expect(page.locator("#stop")).to_be_visible()
    gate.set()
    expect_text(answer(page).locator(".prose"), "Hello there")
    expect_done(page)
    expect(answer(page).locator("footer")).to_contain_text("tokens/s")
    expect_text(page.locator("#context span"), "1,234 of 4,096 tokens")
    path, body, _ = server.asked[0]
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "tiny-model",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_stop_keeps_what_was_written(page: Any, server: Any) -> None:
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
    contents = [message["content"] for message in server.asked[1][1]["messages"]]
    assert contents == ["Count", "One two ", "Go on"]


def test_a_reload_finds_the_conversation_again(page: Any, server: Any) -> None:
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


def test_edit_and_regenerate(page: Any, server: Any) -> None:
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
    expect(page.locator(".message")).to_have_count(2)
    assert server.asked[2][1]["messages"] == [{"role": "user", "content": "Question"}]


def test_conversations_are_renamed_deleted_exported_and_imported(
    page: Any, server: Any, tmp_path: Path
) -> None:
    page.goto("/")
    for number in ("one", "two"):
        server.say(number.upper())
        page.get_by_label("New conversation").click()
        send(page, number)
        expect_text(answer(page).locator(".prose"), number.upper())
        expect_done(page)
    titles = page.locator("#conversations .title")
    expect(titles).to_have_text(["two", "one"])

    page.get_by_label("Rename two").click()
    page.get_by_label("Title").fill("zwei")
    page.keyboard.press("Enter")
    expect(titles).to_have_text(["zwei", "one"])
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "export.json")

    page.get_by_label("Delete zwei").click()
    expect(titles).to_have_text(["one"])
    page.locator("#import-file").set_input_files(tmp_path / "export.json")
    expect(titles).to_have_text(["zwei", "one"])
    expect_text(answer(page).locator(".prose"), "TWO")

    (tmp_path / "bad.json").write_text('{"conversations": [{"id": "../x"}]}')
    page.locator("#import-file").set_input_files(tmp_path / "bad.json")
    expect(page.locator("#notice")).to_contain_text("not an export")


def test_settings_go_into_the_request(page: Any, server: Any) -> None:
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


def test_a_model_without_a_chat_template_continues_text(page: Any, server: Any) -> None:
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


def test_reasoning_is_folded_and_not_sent_again(page: Any, server: Any) -> None:
    gate = threading.Event()
    server.say("<thi", "nk>\nHm, <b>hm</b>.\n", "</think>\n\n**Yes.**", gate=gate)
    page.goto("/")
    send(page, "Is it?")
    expect_text(page.locator(".thought summary"), "Reasoning")
    gate.set()
    expect_text(answer(page).locator(".prose"), "Yes.")
    page.locator(".thought summary").click()
    expect_text(page.locator(".thought div"), "Hm, <b>hm</b>.")
    expect_done(page)
    server.say("Sure.")
    send(page, "Sure?")
    expect_text(answer(page).locator(".prose"), "Sure.")
    assert [message["content"].strip() for message in server.asked[1][1]["messages"]][1] == "**Yes.**"


def test_a_chat_does_not_go_on_with_a_model_that_cannot_chat(page: Any, server: Any) -> None:
    server.say("Hello")
    page.goto("/")
    send(page, "Hi")
    expect_text(answer(page).locator(".prose"), "Hello")
    expect_done(page)
    server.chat = False
    page.reload()
    send(page, "And now?")
    expect(page.locator("#notice")).to_contain_text("can only continue a text")
    page.get_by_role("button", name="New conversation").last.click()
    server.say(" more")
    send(page, "Once")
    expect_text(page.locator(".text"), "Once more")


def test_errors_say_what_to_do(page: Any, server: Any) -> None:
    page.goto("/")
    notice = page.locator("#notice")

    server.fail(401, "Missing key.")
    send(page, "Hi")
    page.get_by_label("API key").fill("secret")
    server.fail(429, "Too many requests are waiting.", **{"Retry-After": "1"})
    server.say("At last")
    page.get_by_role("button", name="Continue").click()
    expect(notice).to_contain_text("Too many requests are waiting.")
    expect(notice).to_contain_text("Trying again in")
    expect_text(answer(page).locator(".prose"), "At last")
    expect_text(notice, "")
    assert [key for _, _, key in server.asked] == [None, "Bearer secret", "Bearer secret"]

    server.fail(400, "The prompt has 5000 tokens; the context holds 4096.", "context_length_exceeded")
    send(page, "Long")
    expect(notice).to_contain_text("the context holds 4096")
    notice.get_by_role("button", name="New conversation").click()
    expect(page.locator(".greeting")).to_be_visible()

    server.say("Half", cut=True)
    send(page, "Again")
    expect(notice).to_contain_text("connection broke")
    expect_text(answer(page).locator(".prose"), "Half")
    server.say("Whole")
    notice.get_by_role("button", name="Try again").click()
    expect_text(answer(page).locator(".prose"), "Whole")


def test_a_server_that_is_gone(page: Any, server: Any) -> None:
    page.goto("/")
    expect_text(page.locator("#model"), "tiny-model")
    page.context.set_offline(True)
    send(page, "Hi")
    expect(page.locator("#notice")).to_contain_text("The server does not answer")
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
  const elements = [...document.querySelectorAll("main article *:not(svg *, svg, footer, footer *)")];
  return {
    tags: [...new Set(elements.map((node) => node.localName))],
    attributes: [...new Set(elements.flatMap((node) => node.getAttributeNames()))],
    schemes: [...new Set([...document.querySelectorAll("main a")].map((link) => link.protocol))],
    pwned: "pwned" in window,
  };
}"""


def test_hostile_output_stays_text(page: Any, server: Any) -> None:
    server.say(*HOSTILE)  # Character by character: no piece may be taken for more than text either.
    page.goto("/")
    send(page, HOSTILE)
    expect_done(page)
    for _ in range(2):  # As it streams, and as it is found again.
        survey = page.evaluate(SURVEY)
        assert not survey["pwned"]
        assert set(survey["tags"]) <= {
            *(
                "div",
                "p",
                "h2",
                "br",
                "a",
                "code",
                "strong",
                "ul",
                "li",
                "blockquote",
                "figure",
                "figcaption",
            ),
            *("span", "button", "pre", "table", "thead", "tbody", "tr", "th", "td"),
        }
        assert set(survey["attributes"]) <= {
            *("class", "href", "title", "target", "rel", "type", "data-copy", "tabindex", "role"),
            "aria-label",
        }
        assert set(survey["schemes"]) == {"https:"}
        text = answer(page).locator(".prose").text_content()
        assert "<script>window.pwned = 1</script>" in text
        assert "[a](javascript:alert(1))" in text
        page.reload()

    server.fail(500, "<img src=x onerror=alert(1)>")
    send(page, "Hi")
    expect_text(page.locator("#notice p"), "<img src=x onerror=alert(1)>")


def test_no_source_turns_text_into_html_or_names_another_site() -> None:
    page = Path(str(files("elutq") / "server" / "page"))
    sources = {path.name: path.read_text() for path in page.iterdir()}
    assert {"index.html", "main.js", "style.css"} <= set(sources)
    dangerous = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "style=")
    for name, source in sources.items():
        assert [word for word in dangerous if word in source] == [], name
        assert "://" not in source.replace("http://www.w3.org/2000/svg", ""), f"an address in {name}"


@pytest.fixture
def served() -> Iterator[str]:
    """The address of `elutq serve`, with the bundled model, which cannot chat."""
    options = ("--port", "0", "--api-key", "secret", "--threads", "1")
    command = [sys.executable, "-m", "elutq", "serve", str(bundled_model()), *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    line = next((line for line in server.stderr if "is served on" in line), "nothing")
    yield re.sub(r".* is served on (\S+)\n", r"\1/", line)
    server.terminate()
    server.communicate(timeout=60)
    assert server.returncode == 0


def test_the_real_server(new_page: Callable[[str], Any], served: str) -> None:
    page = new_page(served)
    assert "script-src 'self'" in page.goto("/").headers["content-security-policy"]
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Continue").click()
    expect_text(page.locator("#model"), "llama-7m")

    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Longest answer").fill("500")
    page.get_by_role("button", name="Done").click()

    # At 4,000 bytes a second the story takes some seconds: enough to see it grow and to stop it.
    line = page.context.new_cdp_session(page)
    speed = {"offline": False, "latency": 0, "downloadThroughput": 4000, "uploadThroughput": -1}
    line.send("Network.emulateNetworkConditions", speed)
    page.get_by_role("button", name="Once upon a time").click()
    written = page.locator(".text .assistant")
    expect(written).to_contain_text(re.compile(r"\w+ \w+"))
    grown = len(written.text_content())
    expect(written).to_contain_text(re.compile(f".{{{grown + 20},}}", re.DOTALL))
    page.keyboard.press("Escape")
    expect_text(page.locator(".note"), "Stopped.")
    line.detach()
    story = page.locator(".text").text_content()
    page.reload()
    expect_text(page.locator(".text"), story)

    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill("8")
    page.get_by_role("button", name="Done").click()
    send(page, "")
    expect(page.locator("article footer")).to_contain_text("8 tokens")
    expect(page.locator("#context")).to_contain_text("of 512 tokens")
    assert page.locator(".text").text_content().startswith(story)
