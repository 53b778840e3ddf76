"""Text <-> token ids, incremental decoding and chat templates, from the files of a Hugging Face folder."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken

from elutq.errors import InvalidArgumentError, TokenizerError

if TYPE_CHECKING:
    from jinja2 import Template

_NAMED_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """The tokenizer of a model folder: what `transformers.AutoTokenizer` gives, without transformers.

    Attributes:
        special_tokens: the named special tokens of the model, e.g. `{"bos_token": "<s>"}`.
        eos_token_ids: ids that end a generation.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
        name: str = "tokenizer",
    ) -> None:
        """Wrap `backend`; `chat_templates` maps names ("default" first of all) to Jinja sources."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._name = name
        self._chat_templates = dict(chat_templates or {})
        self._compiled: dict[str, Template] = {}
        self.special_tokens = dict(special_tokens or {})
        self.eos_token_ids = frozenset(eos_token_ids)

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Read `tokenizer.json` and the files beside it.

        The ids that end a generation come from `generation_config.json`, else `config.json`, else the
        tokenizer's own `eos_token`: the first that names any, as transformers does.

        Raises:
            TokenizerError: a file is missing or cannot be read.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(
                f"{folder} has no tokenizer.json; make one where transformers is installed: "
                f'python -c "from transformers import AutoTokenizer as T; '
                f"T.from_pretrained('{folder}').save_pretrained('{folder}')\""
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{file} cannot be read: {error}; fetch it again") from None
        config = _read_json(folder / "tokenizer_config.json")
        # Old folders list their special tokens in a file of their own.
        legacy = {} if "added_tokens_decoder" in config else _read_json(folder / "special_tokens_map.json")
        special = {name: _content(legacy.get(name) or config.get(name)) for name in _NAMED_SPECIAL_TOKENS}
        special_tokens = {name: token for name, token in special.items() if token is not None}
        _add_missing_tokens(backend, config, special_tokens)

        eos_ids: frozenset[int] = frozenset()
        for source in ("generation_config.json", "config.json"):
            eos_ids = eos_ids or _eos_ids(_read_json(folder / source), folder / source)
        if not eos_ids and "eos_token" in special_tokens:
            token_id = backend.token_to_id(special_tokens["eos_token"])
            eos_ids = frozenset() if token_id is None else frozenset([token_id])
        return cls(
            backend,
            special_tokens=special_tokens,
            eos_token_ids=eos_ids,
            chat_templates=_chat_templates(folder, config),
            name=str(folder),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size())

    def to_json(self) -> str:
        """What `tokenizer.json` would hold, with all added tokens."""
        return str(self._backend.to_str())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. `add_special_tokens` adds what the model's post-processor adds, e.g. a BOS token."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def stream(self, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> "StreamDecoder":
        """A decoder that takes one id at a time, of a text that continues the text of `after`."""
        return StreamDecoder(self, skip_special_tokens, after)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can be used."""
        return bool(self._chat_templates)

    def chat_template(self, with_tools: bool = False) -> str | None:
        """Source of the template that renders conversations, with or without tools; None if there is none."""
        name = "tool_use" if with_tools and "tool_use" in self._chat_templates else "default"
        return self._chat_templates.get(name)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Render a conversation into the prompt the model was trained on.

        The text already holds its special tokens: encode it with `add_special_tokens=False`.

        Args:
            messages: `{"role": ..., "content": ...}` and whatever else the template reads, oldest first.
            add_generation_prompt: end with the header of the assistant's next message.
            variables: further variables of the template, e.g. `tools`.

        Raises:
            TokenizerError: the model has no chat template, or it does not compile.
            InvalidArgumentError: the template refuses these messages.
        """
        import jinja2

        if not messages:
            raise InvalidArgumentError("messages is empty; give at least one message")
        template = self._template(with_tools=variables.get("tools") is not None)
        try:
            return template.render(
                messages=[{k: v for k, v in message.items() if v is not None} for message in messages],
                add_generation_prompt=add_generation_prompt,
                **{"tools": None, "documents": None, **self.special_tokens, **variables},
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise InvalidArgumentError(
                f"the chat template of {self._name} refuses these messages: {error}"
            ) from None

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Ids of a conversation; arguments and errors are those of :meth:`apply_chat_template`."""
        text = self.apply_chat_template(messages, add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)

    @cached_property
    def byte_token_ids(self) -> frozenset[int]:
        """Ids of the `<0xNN>` tokens, which the decoder joins into characters; none if byte-level."""
        decoder = self._backend.decoder
        if decoder is None or b'"ByteFallback"' not in decoder.__getstate__():
            return frozenset()
        ids = (self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(i for i in ids if i is not None)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out of the text."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def special_token_id(self, name: str) -> int | None:
        """Id of a named special token, e.g. "bos_token"; None if the model has none of that name."""
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def is_known(self, token_id: int) -> bool:
        """Whether the id names a token. Models pad their vocabulary beyond the tokenizer's."""
        return self._backend.id_to_token(token_id) is not None

    def _template(self, with_tools: bool) -> "Template":
        source = self.chat_template(with_tools)
        if source is None:
            raise TokenizerError(
                f"{self._name} has no chat template; it is not a chat model: use a plain prompt, "
                "or put a chat_template.jinja into the folder"
            )
        if source not in self._compiled:
            self._compiled[source] = _compile(source, self._name)
        return self._compiled[source]


class StreamDecoder:
    """Decodes ids one by one; what `push` and `flush` return, joined, is `decode` of all the ids.

    After a prompt, it is what these ids add to the prompt's text. That is not their own text: SentencePiece
    tokenizers drop the space at the start of a text. A character whose bytes are spread over several tokens
    is held back until it is whole, and so is a run of byte-fallback tokens, which is decoded as one.
    """

    _WINDOW = 16  # tokens decoded again with each push, at most; a character spans four tokens at most
    _OVERLAP = 8

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, after: Sequence[int] = ()
    ) -> None:
        """Start a text, or continue the one of the ids in `after`."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that were returned
        for token_id in after[-self._OVERLAP :]:
            self.push(token_id)
        self._emitted = self._stable_length(self._decode(self._window))

    def push(self, token_id: int) -> str:
        """Take the next id, return the text that is now certain: often a word, sometimes nothing."""
        if token_id in self._skipped or not self._tokenizer.is_known(token_id):
            return ""
        self._window.append(token_id)
        if token_id in self._tokenizer.byte_token_ids:
            return ""
        text = self._decode(self._window)
        stable = self._stable_length(text)
        new = text[self._emitted : stable]
        self._emitted = max(self._emitted, stable)
        if len(self._window) >= self._WINDOW:
            del self._window[: -self._OVERLAP]
            self._emitted = self._stable_length(self._decode(self._window))
        return new

    def flush(self) -> str:
        """End the text: return what was held back, U+FFFD in place of bytes that never became a character."""
        rest = self._decode(self._window)[self._emitted :]
        self._window.clear()
        self._emitted = 0
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    @staticmethod
    def _stable_length(text: str) -> int:
        # Only an unfinished character at the very end can still change; it decodes to one U+FFFD.
        return len(text) - text.endswith(_REPLACEMENT)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{file} cannot be read: {error}; fetch it again") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} must hold a JSON object; fetch it again")
    return content


def _content(token: Any) -> str | None:
    """Text of a token given as a string or as a serialized AddedToken."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _eos_ids(config: Mapping[str, Any], file: Path) -> frozenset[int]:
    ids = config.get("eos_token_id")
    if ids is None:
        return frozenset()
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int for i in ids):
        raise TokenizerError(f"{file}: eos_token_id must be an integer or a list of integers, not {ids!r}")
    return frozenset(ids)


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Add tokens that only the files beside `tokenizer.json` know, in the order transformers adds them."""
    listed = config.get("added_tokens_decoder", {})
    if not isinstance(listed, Mapping) or not all(isinstance(t, Mapping) for t in listed.values()):
        raise TokenizerError(
            "tokenizer_config.json: added_tokens_decoder must map ids to tokens; fetch it again"
        )
    try:
        tokens = [AddedToken(**listed[i]) for i in sorted(listed, key=int)]
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"tokenizer_config.json: added_tokens_decoder is malformed: {error}") from None
    tokens += [AddedToken(t, special=True, normalized=False) for t in special_tokens.values()]
    for token in tokens:
        if backend.token_to_id(token.content) is None:
            backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Files take precedence over the entry in `tokenizer_config.json`."""
    try:
        files = {p.stem: p for p in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
        if (folder / "chat_template.jinja").is_file():
            files["default"] = folder / "chat_template.jinja"
        if files:
            return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{folder}: a chat template cannot be read: {error}") from None
    entry = config.get("chat_template")
    if isinstance(entry, str):
        return {"default": entry}
    if isinstance(entry, list):
        try:
            return {str(template["name"]): str(template["template"]) for template in entry}
        except (KeyError, TypeError):
            pass
    elif entry is None:
        return {}
    raise TokenizerError(
        f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of templates"
    )


def _compile(source: str, name: str) -> "Template":
    """Compile a template in the environment transformers gives it, sandboxed: templates are untrusted."""
    from datetime import datetime

    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}` marks the assistant's words for training; it prints what it encloses."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format_: datetime.now().strftime(format_)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise TokenizerError(f"the chat template of {name} does not compile: {error}") from None
