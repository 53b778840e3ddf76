"""The chat page's Markdown: every construct, text that grows, and text made to stall the page."""

import random
from collections.abc import Callable
from typing import Any

import pytest

RENDER = """async (text) => {
  const { renderMarkdown } = await import("/markdown.js");
  const box = document.createElement("div");
  box.append(renderMarkdown(text));
  return box.innerHTML;
}"""


@pytest.fixture
def render(page: Any) -> Callable[[str], str]:
    page.goto("/")
    return lambda text: page.evaluate(RENDER, text)


def link(href: str, text: str) -> str:
    return f'<a href="{href}" title="{href}" target="_blank" rel="noopener noreferrer">{text}</a>'


BLOCKS = {
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "# One\n## Two ##\ntext": "<h2>One</h2><h3>Two</h3><p>text</p>",
    "#not a heading": "<p>#not a heading</p>",
    "a\n***\nb": "<p>a</p><hr><p>b</p>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "- a\n- b": '<ul class="tight"><li><p>a</p></li><li><p>b</p></li></ul>',
    "- a\n\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "3. a\n4) b": '<ol start="3" class="tight"><li><p>a</p></li><li><p>b</p></li></ol>',
    "1. a\n  - b\n2. c": (
        '<ol class="tight"><li><p>a</p><ul class="tight"><li><p>b</p></li></ul></li><li><p>c</p></li></ol>'
    ),
    "- a\n    - b": '<ul class="tight"><li><p>a</p><ul class="tight"><li><p>b</p></li></ul></li></ul>',
    "- a\nlazy\n\nend": '<ul class="tight"><li><p>a<br>lazy</p></li></ul><p>end</p>',
    "- a\n\n  b\n- c": "<ul><li><p>a</p><p>b</p></li><li><p>c</p></li></ul>",
    "- [x] a\n- [ ] b": (
        '<ul class="tight"><li class="task"><p>☑ a</p></li><li class="task"><p>☐ b</p></li></ul>'
    ),
    "text\n| a | b |\n|:-:|--:|\n| 1 |\n| \\| | 2 | 3 |\n\nend": (
        '<p>text</p><div class="table" tabindex="0" role="region" aria-label="Table"><table>'
        '<thead><tr><th class="center">a</th><th class="right">b</th></tr></thead><tbody>'
        '<tr><td class="center">1</td><td class="right"></td></tr>'
        '<tr><td class="center">|</td><td class="right">2</td></tr></tbody></table>'
        "</div><p>end</p>"
    ),
    "In the year\n2024. A number": "<p>In the year<br>2024. A number</p>",
}

INLINE = {
    "*a* **b** ***c*** _d_ __e__ ~~f~~": (
        "<em>a</em> <strong>b</strong> <strong><em>c</em></strong> <em>d</em> <strong>e</strong> <del>f</del>"
    ),
    "2 * 3 * 4, snake_case_name, a ** b": "2 * 3 * 4, snake_case_name, a ** b",
    "**bold *both* bold**": "<strong>bold <em>both</em> bold</strong>",
    "**open *closed* open": "**open <em>closed</em> open",
    "*a **b* c**": "<em>a **b</em> c**",
    "`a*b*` ``c`d`` ` open": "<code>a*b*</code> <code>c`d</code> ` open",
    r"\*a\* \[b](c) \\": "*a* [b](c) \\",
    '[a *b*](https://x.org/y_(z) "t")': link("https://x.org/y_(z)", "a <em>b</em>"),
    "[1] and [x]": "[1] and [x]",
    "[a [b](https://x.org/)](https://y.org/)": "[a "
    + link("https://x.org/", "b")
    + "]("
    + link("https://y.org/", "https://y.org/")
    + ")",
    "see https://x.org/a_b.": "see " + link("https://x.org/a_b", "https://x.org/a_b") + ".",
    "(https://x.org/a)": "(" + link("https://x.org/a", "https://x.org/a") + ")",
    "<mailto:a@x.org>": link("mailto:a@x.org", "mailto:a@x.org"),
    "![alt](https://x.org/i.png)": link("https://x.org/i.png", "alt"),
    "[x](javascript:alert(1))": "[x](javascript:alert(1))",
    "[x](/v1/models)": "[x](/v1/models)",
    "<b>&amp;</b>": "&lt;b&gt;&amp;amp;&lt;/b&gt;",
}


def test_blocks(render: Callable[[str], str]) -> None:
    assert {text: render(text) for text in BLOCKS} == BLOCKS


def test_inline(render: Callable[[str], str]) -> None:
    assert {text: render(text) for text in INLINE} == {
        text: f"<p>{html}</p>" for text, html in INLINE.items()
    }


def test_code_keeps_every_character(page: Any) -> None:
    page.goto("/")
    code = "if a < b:\n\n\tprint('`x`')  \n   ```\n# not a heading"
    shown = """async (text) => {
      const { renderMarkdown } = await import("/markdown.js");
      const figure = renderMarkdown(text).querySelector("figure");
      return [figure.querySelector("span").textContent, figure.querySelector("code").textContent];
    }"""
    assert page.evaluate(shown, f"````py title\n{code}\n````\nend") == ["py", code]
    assert page.evaluate(shown, f"````\n{code}") == ["text", code]  # Not closed yet.
    assert page.evaluate(shown, "1. a\n   ```sh\n   ls\n\n     x\n   ```") == ["sh", "ls\n\n  x"]


def test_a_growing_text_ends_as_the_whole(page: Any) -> None:
    page.goto("/")
    rng = random.Random(0)
    pieces = [
        *(
            "# Head",
            "- item",
            "1. one",
            "2. two",
            "  - inner",
            "   more",
            "> quote",
            "```",
            "~~~ py",
            "---",
            "*",
            "**",
        ),
        *(
            "| a | b |",
            "|---|---|",
            "| 1 | 2 |",
            "word",
            "`code`",
            "_",
            "[x](https://x.org/)",
            "   ",
            "\t",
            "- [ ] t",
        ),
        *("\n", "\n", "\n", "\n", "\n\n", "\n\n"),
    ]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(2, 40))) for _ in range(300)]
    different = page.evaluate(
        """async (texts) => {
          const { MarkdownStream, renderMarkdown } = await import("/markdown.js");
          const html = (...nodes) => {
            const box = document.createElement("div");
            box.append(...nodes);
            return box.innerHTML;
          };
          return texts.filter((text) => {
            const box = document.createElement("div");
            const stream = new MarkdownStream(box);
            for (let end = 1; end <= text.length; end++) stream.update(text.slice(0, end));
            return html(...box.childNodes) !== html(renderMarkdown(text));
          });
        }""",
        texts,
    )
    assert different == []


PIECES = (
    *(
        "*",
        "**a ",
        "_a_",
        "*_",
        "~~",
        "[",
        "[a](",
        "![",
        "](",
        '[a](b "',
        "`",
        "`` ` ",
        "\\",
        "<",
        "https://x.org/(",
    ),
    *(
        "(",
        "#",
        "# ",
        "> ",
        "> a\n",
        "- ",
        "1. ",
        "  - a\n",
        "- a\n\n",
        "```\n",
        "|",
        "|-",
        "a|b\n-|-\n",
        "\n\n",
        " ",
        "\t",
    ),
)


def test_growth_keeps_the_nodes_that_do_not_change(page: Any) -> None:
    """So that a selection and a scrolled code block outlive the next token."""
    page.goto("/")
    kept = page.evaluate(
        """async () => {
          const { MarkdownStream } = await import("/markdown.js");
          const box = document.createElement("div");
          const stream = new MarkdownStream(box);
          stream.update("- one\\n- two\\n\\n  ```\\n  code");
          const before = [...box.querySelectorAll("li, p, pre, code")];
          stream.update("- one\\n- two\\n\\n  ```\\n  code\\n  more\\n  ```\\n- three\\n\\nend");
          return before.map((node) => box.contains(node));
        }"""
    )
    assert kept == [True] * 6


def test_no_text_stalls_the_page(page: Any) -> None:
    """Work that grows with the square of the length would take minutes here."""
    page.goto("/")
    seconds = page.evaluate(
        """async (pieces) => {
          const { renderMarkdown } = await import("/markdown.js");
          return pieces.map((piece) => {
            const begin = performance.now();
            renderMarkdown(piece.repeat(50_000 / piece.length));
            return (performance.now() - begin) / 1000;
          });
        }""",
        PIECES,
    )
    assert {piece: time for piece, time in zip(PIECES, seconds, strict=True) if time > 5} == {}
