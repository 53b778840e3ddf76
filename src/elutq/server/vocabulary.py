"""Bytes of tokens, and which tokens may come next under a grammar: llguidance over the model's tokenizer."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from elutq.errors import InvalidArgumentError
from elutq.server.tools import ToolFormat
from elutq.tokenizer import Tokenizer

# Models write JSON as Python does. Free white space would let a small model fill its answer with it.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Vocabulary:
    """The tokens of a model, as grammars see them."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Those of `tokenizer`, for logits of `vocab_size`. The first use takes about a second."""
        self._source = tokenizer
        self._vocab_size = vocab_size

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; often less than a character."""
        return bytes(self._tokenizer.decode_bytes([token_id]))

    def json_constraint(self, schema: Mapping[str, Any]) -> "GrammarConstraint":
        """Text that is JSON and satisfies a schema.

        Raises:
            InvalidArgumentError: it is not a schema, or uses keywords that cannot be enforced.
        """
        return self._constraint(LLMatcher.grammar_from_json_schema(_styled(schema)))

    def call_constraint(
        self, format_: ToolFormat, functions: Sequence[tuple[str, Mapping[str, Any] | None]], several: bool
    ) -> "GrammarConstraint":
        """Text that calls one of these functions, or several of them; each with the schema of its arguments.

        Raises:
            InvalidArgumentError: as for `json_constraint`.
        """
        bodies = [
            f"call{i}: %json {json.dumps(_styled(format_.call_schema(name, parameters)))}"
            for i, (name, parameters) in enumerate(functions)
        ]
        call = "(" + " | ".join(f"call{i}" for i in range(len(bodies))) + ")"
        if format_.prefix:
            call = f"({json.dumps(format_.prefix)} {call} {json.dumps(format_.suffix)})"
            call += f' ("\\n" {call})*' if several else ""
        return self._constraint(LLMatcher.grammar_from_lark("\n".join([f"start: {call}", *bodies])))

    def _constraint(self, grammar: str) -> "GrammarConstraint":
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().split("\n<state>")[0]
            raise InvalidArgumentError(f"the JSON schema cannot be enforced: {reason}")
        return GrammarConstraint(matcher, (self._vocab_size + 31) // 32)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        size = max(self._vocab_size, self._source.vocab_size)
        eos = sorted(self._source.eos_token_ids)
        try:
            return LLTokenizer(self._source.to_json(), n_vocab=size, eos_token=eos or None)
        except ValueError as error:
            raise InvalidArgumentError(
                f"this model's tokenizer has no bytes, which grammars and logprobs need: {error}"
            ) from None


class GrammarConstraint:
    """A text as a grammar allows it; an `elutq.sampling.TokenConstraint`."""

    def __init__(self, matcher: LLMatcher, mask_words: int) -> None:
        """Start where `matcher` stands; masks have so many words of 32 tokens."""
        self._matcher = matcher
        self._mask_words = mask_words

    def __copy__(self) -> "GrammarConstraint":
        return GrammarConstraint(self._matcher.deep_copy(), self._mask_words)

    def mask(self) -> NDArray[np.int32]:
        """Tokens allowed next, int32 [ceil(vocab_size / 32)]."""
        return np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: self._mask_words]

    def accept(self, token: int) -> None:
        """Go on by one token.

        Raises:
            InvalidArgumentError: the grammar outgrew its limits.
        """
        if not self._matcher.consume_token(token):
            raise InvalidArgumentError(f"the grammar cannot go on: {self._matcher.stop_reason()}")

    @property
    def is_done(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())


def _styled(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": _JSON_STYLE}
