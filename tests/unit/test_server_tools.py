import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elutq.server.tools import (
    HERMES,
    LLAMA,
    HermesParser,
    LlamaParser,
    ToolCall,
    ToolParser,
    tool_format,
)

NAMES = ["now", "add"]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>'


def parse(parser: ToolParser, *pieces: str) -> tuple[str, list[tuple[str, object]]]:
    """Text, and names and arguments of calls."""
    parts = [part for piece in pieces for part in parser.push(piece)] + list(parser.flush())
    assert "" not in parts
    calls = [part for part in parts if isinstance(part, ToolCall)]
    assert len({call.id for call in calls}) == len(calls)
    text = "".join(part for part in parts if isinstance(part, str))
    return text, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        ("Hello.", "Hello.", []),
        ("", "", []),
        (CALL, "", [("add", {"a": 1, "b": "é"})]),
        (f"Let me see.\n{CALL}", "Let me see.\n", [("add", {"a": 1, "b": "é"})]),
        (f"{CALL}\n{CALL}\n", "", [("add", {"a": 1, "b": "é"})] * 2),
        ('<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
        # No calls: text as it was.
        ("a < b <tool", "a < b <tool", []),
        ('<tool_call>{"name": "add", "argu', '<tool_call>{"name": "add", "argu', []),
        ("<tool_call>add</tool_call>!", "<tool_call>add</tool_call>!", []),
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>',) * 2 + ([],),
        ('<tool_call>{"name": "add", "arguments": "1"}</tool_call>',) * 2 + ([],),
        ('<tool_call>{"name": ["add"]}</tool_call>',) * 2 + ([],),
        ("<tool_call>" + "[" * 5000 + "</tool_call>",) * 2 + ([],),
    ],
)
def test_hermes(answer: str, text: str, calls: list[tuple[str, object]]) -> None:
    assert parse(HermesParser(NAMES), answer) == (text, calls)
    assert parse(HermesParser(NAMES), *answer) == (text, calls)


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        ("Hello.", "Hello.", []),
        ("", "", []),
        ('{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
        ('\n {"name": "now", "parameters": {}} ', "", [("now", {})]),
        (
            '{"name": "add", "parameters": {"a": ";"}}; {"name": "now", "parameters": {}}',
            "",
            [("add", {"a": ";"}), ("now", {})],
        ),
        ('{"name": "rm", "parameters": {}}',) * 2 + ([],),
        ('{"name": "add", "parameters": {"a"',) * 2 + ([],),
        ('{"name": "add", "parameters": {}} is how.',) * 2 + ([],),
        ('It is {"name": "add", "parameters": {}}',) * 2 + ([],),
    ],
)
def test_llama(answer: str, text: str, calls: list[tuple[str, object]]) -> None:
    assert parse(LlamaParser(NAMES), answer) == (text, calls)
    assert parse(LlamaParser(NAMES), *answer) == (text, calls)


@given(
    parts=st.lists(
        st.sampled_from(
            [CALL, "<tool_call>", "</tool_call>", "<tool", "words ", "\n", '{"name": "now"}', "<"]
        ),
        max_size=8,
    ),
    cuts=st.lists(st.integers(0, 200), max_size=12),
)
def test_pieces_do_not_matter(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    for parser in (HermesParser, LlamaParser):
        assert parse(parser(NAMES), *pieces) == parse(parser(NAMES), text)


def test_words_before_a_call_are_not_held_back() -> None:
    assert HermesParser(NAMES).push("I will ask <") == ["I will ask "]
    assert LlamaParser(NAMES).push("I will") == ["I will"]


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{% if tools %}{\"parameters\": 1}{% endif %} role == 'ipython'", LLAMA),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}", None),
        ("{{ messages }} <tool_call>", None),
    ],
)
def test_the_format_is_told_from_the_template(template: str, found: object) -> None:
    assert tool_format(template) is found


def test_references_of_a_schema_still_point_to_their_definitions() -> None:
    parameters = {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object"}}}
    assert LLAMA.call_schema("f", parameters)["$defs"] == {"A": {"type": "object"}}
