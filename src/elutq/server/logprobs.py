"""Log-probabilities of tokens, in the two shapes of OpenAI's API."""

import codecs
from collections.abc import Sequence
from typing import Any

from elutq.sampling import Token
from elutq.server.vocabulary import Vocabulary


def chat_logprobs(vocabulary: Vocabulary, tokens: Sequence[Token]) -> dict[str, Any]:
    """The `logprobs` of a chat choice, or of a piece of one."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = vocabulary.token_bytes(token_id)
        return {"token": _token_text(raw), "logprob": logprob, "bytes": list(raw)}

    return {
        "content": [
            entry(t.id, t.logprob) | {"top_logprobs": [entry(i, p) for i, p in t.alternatives]}
            for t in tokens
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """The `logprobs` of a text choice; knows where in the text the next token begins."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """For one choice."""
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def add(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The object for the next tokens."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._vocabulary.token_bytes(token.id)))
        return {
            "tokens": [self._text(t.id) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            # Tokens of the same text share an entry; the most likely one comes first and stays.
            "top_logprobs": [{self._text(i): p for i, p in reversed(t.alternatives)} for t in tokens],
            "text_offset": offsets,
        }

    def _text(self, token_id: int) -> str:
        return _token_text(self._vocabulary.token_bytes(token_id))


def _token_text(raw: bytes) -> str:
    r"""Text of a token; `bytes:\xe2\x80` where it is only part of a character."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
