"""Calls of tools, told from text as it streams, in the formats that chat templates teach models."""

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from elutq.stopping import overlap

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for.

    Attributes:
        name: of the function.
        arguments: a JSON object, as text.
        id: by which the answer refers to the call.
    """

    name: str
    arguments: str
    id: str = field(default_factory=lambda: "call_" + secrets.token_hex(12))


class ToolParser(Protocol):
    """Tells calls from text. What is not a well-formed call of a known function stays text."""

    def push(self, text: str) -> Sequence[str | ToolCall]:
        """Take a piece of the answer; what is now certain."""

    def flush(self) -> Sequence[str | ToolCall]:
        """End the answer: what was held back."""


class HermesParser:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, between words or alone: Qwen, Hermes."""

    def __init__(self, names: Collection[str]) -> None:
        """Recognize calls of these functions."""
        self._names = names
        self._text = ""  # held back
        self._inside = False  # whether it follows an opening tag
        self._after_call = False

    def push(self, text: str) -> list[str | ToolCall]:
        """See :class:`ToolParser`."""
        self._text += text
        parts: list[str | ToolCall] = []
        while (place := self._text.find(_CLOSE if self._inside else _OPEN)) >= 0:
            part, self._text = (
                self._text[:place],
                self._text[place + len(_CLOSE if self._inside else _OPEN) :],
            )
            parts += self._call(part) if self._inside else self._words(part)
            self._inside = not self._inside
        if not self._inside:
            certain = len(self._text) - overlap(self._text, _OPEN)
            parts += self._words(self._text[:certain])
            self._text = self._text[certain:]
        return parts

    def flush(self) -> list[str | ToolCall]:
        """See :class:`ToolParser`."""
        rest, self._text = self._text, ""
        return [_OPEN + rest] if self._inside else self._words(rest)

    def _words(self, text: str) -> list[str | ToolCall]:
        if self._after_call:
            text = text.lstrip()  # lines between calls are part of the format
        self._after_call &= not text
        return [text] if text else []

    def _call(self, text: str) -> list[str | ToolCall]:
        call = _parse_call(text, self._names, "arguments")
        self._after_call = call is not None
        return [call or _OPEN + text + _CLOSE]


class LlamaParser:
    """An answer that is `{"name": ..., "parameters": {...}}`, or several with `;` between: Llama 3."""

    def __init__(self, names: Collection[str]) -> None:
        """Recognize calls of these functions."""
        self._names = names
        self._text = ""
        self._is_text = False

    def push(self, text: str) -> list[str | ToolCall]:
        """See :class:`ToolParser`."""
        self._text += text
        start = self._text.lstrip()
        self._is_text |= bool(start) and not start.startswith("{")
        if not self._is_text:
            return []
        text, self._text = self._text, ""
        return [text] if text else []

    def flush(self) -> list[str | ToolCall]:
        """See :class:`ToolParser`."""
        text, self._text = self._text, ""
        calls = [_parse_call(body, self._names, "parameters") for body in _objects(text)]
        if calls and None not in calls:
            return [call for call in calls if call is not None]
        return [text] if text else []


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls.

    Attributes:
        parser: tells them from text.
        arguments_key: under which they name the arguments.
        prefix: what stands before a call.
        suffix: what stands behind it.
    """

    parser: type[HermesParser] | type[LlamaParser]
    arguments_key: str
    prefix: str = ""
    suffix: str = ""

    def call_schema(self, name: str, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
        """JSON schema of a call of one function."""
        parameters = parameters or {"type": "object"}
        # References of the form #/$defs/... count from the root.
        definitions = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
        return {
            **definitions,
            "type": "object",
            "properties": {"name": {"const": name}, self.arguments_key: parameters},
            "required": ["name", self.arguments_key],
            "additionalProperties": False,
        }


HERMES = ToolFormat(HermesParser, "arguments", f"{_OPEN}\n", f"\n{_CLOSE}")
LLAMA = ToolFormat(LlamaParser, "parameters")


def tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template teaches, if it is a known one."""
    if "tools" not in template:
        return None
    if _OPEN in template:
        return HERMES
    if '"parameters"' in template and "ipython" in template:
        return LLAMA
    return None


def _parse_call(text: str, names: Collection[str], arguments_key: str) -> ToolCall | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or call.get("name") not in names:
        return None
    arguments = call.get(arguments_key, {})
    if not isinstance(arguments, dict):
        return None
    return ToolCall(call["name"], json.dumps(arguments, ensure_ascii=False))


def _objects(text: str) -> list[str]:
    """The JSON texts of which `text` consists, with `;` or space between; none if it is anything else."""
    decoder, found, place = json.JSONDecoder(), [], 0
    while place < len(text):
        if text[place] in "; \n\r\t":
            place += 1
            continue
        try:
            _, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return []
        found.append(text[place:end])
        place = end
    return found
