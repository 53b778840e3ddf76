"""One text in the making: logits in, text out. Knows limits, stop strings and constraints, not the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from elutq.errors import ContextOverflowError, InvalidArgumentError
from elutq.sampling import (
    SamplingOptions,
    Token,
    TokenConstraint,
    engine_errors,
    new_sampler,
    token_with_logprobs,
)
from elutq.stopping import StopFilter
from elutq.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate.

    Attributes:
        token_ids: the prompt, at least one token.
        max_new_tokens: most tokens to generate; the context's end may come first.
        sampling: how tokens are chosen.
        stop: strings to stop before; they are not part of the text.
        logprobs: None, or give the log-probability of each token and of this many most likely ones.
        constraint: which tokens may come next.
        ignore_eos: go on after end-of-sequence tokens.
    """

    token_ids: Sequence[int]
    max_new_tokens: int = 128
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: Sequence[str] = ()
    logprobs: int | None = None
    constraint: TokenConstraint | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added.

    Attributes:
        text: whole characters, often a word; "" while a character or a possible stop string is incomplete.
        token: the token; None when it ended the sequence.
        finish_reason: None while there is more to come; "stop" at an end-of-sequence token, a stop string or
            the end of a constraint; "length" at `max_new_tokens` or the end of the context.
    """

    text: str
    token: Token | None
    finish_reason: Literal["stop", "length"] | None


class Generation:
    """A text in the making. Whoever runs the model feeds it logits until a piece has a finish reason.

    Attributes:
        prompt_tokens: number of tokens of the prompt.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        context: int,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Check a request and get ready for its first logits.

        Args:
            request: what to generate.
            context: most tokens of a sequence.
            vocab_size: size of the logits.
            tokenizer: decodes the text; without one, pieces have no text.
            eos_token_ids: tokens that end the text.

        Raises:
            InvalidArgumentError: an option is out of range.
            ContextOverflowError: the prompt exceeds the context.
        """
        if request.max_new_tokens < 1:
            raise InvalidArgumentError(f"max_new_tokens must be at least 1, not {request.max_new_tokens}")
        if isinstance(request.stop, str) or "" in request.stop:
            raise InvalidArgumentError("stop must be a list of strings, none of them empty")
        if request.stop and tokenizer is None:
            raise InvalidArgumentError("stop strings need a tokenizer; this model has none")
        if request.logprobs is not None and request.logprobs < 0:
            raise InvalidArgumentError(f"logprobs must be None, 0 or more, not {request.logprobs}")
        prompt = token_array(request.token_ids)
        if not len(prompt):
            raise InvalidArgumentError("the prompt has 0 tokens; it must have at least 1")
        if len(prompt) > context:
            raise ContextOverflowError(
                f"the prompt has {len(prompt)} tokens, but the context is limited to {context}; shorten it"
            )
        if (outside := prompt[(prompt < 0) | (prompt >= vocab_size)]).size:
            raise InvalidArgumentError(f"token {outside[0]} is not in the vocabulary of {vocab_size}")
        new_tokens = min(request.max_new_tokens, context - len(prompt) + 1)
        self.prompt_tokens = len(prompt)
        self._text = np.concatenate([prompt, np.zeros(new_tokens, np.int32)])
        self._length = len(prompt)
        self._eos = frozenset() if request.ignore_eos else eos_token_ids
        self._sampler = new_sampler(request.sampling, vocab_size)
        self._logprobs = request.logprobs
        self._constraint = request.constraint
        self._decoder = None if tokenizer is None else tokenizer.stream(after=request.token_ids)
        self._stop = StopFilter(request.stop)

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Prompt and generated tokens so far: what the logits of the next one depend on."""
        return self._text[: self._length]

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far. One that ended the sequence does not count."""
        return self._length - self.prompt_tokens

    def advance(self, logits: NDArray[np.float32]) -> Piece:
        """Choose the next token.

        Args:
            logits: after the last of `tokens`, float32 [vocab_size].

        Raises:
            InvalidArgumentError: the constraint and `logit_bias` together allow no token.
            TensorValueError: the logits hold NaN.
        """
        mask = None if self._constraint is None else self._constraint.mask()
        with engine_errors():
            token_id = self._sampler.sample(logits, self.tokens, self.prompt_tokens, mask)
        if token_id in self._eos:
            return Piece(self._flush(), None, "stop")
        token = Token(token_id)
        if self._logprobs is not None:
            token = token_with_logprobs(logits, token_id, self._logprobs)
        self._text[self._length] = token_id
        self._length += 1
        if self._constraint is not None:
            self._constraint.accept(token_id)
        text = "" if self._decoder is None else self._stop.push(self._decoder.push(token_id))
        if self._stop.stopped:
            return Piece(text, token, "stop")
        done = self._constraint is not None and self._constraint.is_done
        if not done and self._length < len(self._text):
            return Piece(text, token, None)
        text += self._flush()
        return Piece(text, token, "stop" if done or self._stop.stopped else "length")

    def _flush(self) -> str:
        rest = "" if self._decoder is None else self._stop.push(self._decoder.flush())
        return rest + self._stop.flush()


def token_array(ids: Sequence[int] | NDArray[np.int32]) -> NDArray[np.int32]:
    """Token ids as int32.

    Raises:
        InvalidArgumentError: they are not integers, or too large.
    """
    try:
        array = np.asarray(ids) if len(ids) else np.zeros(0, np.int32)
        if array.ndim == 1 and array.dtype.kind in "iu":
            limits, wide = np.iinfo(np.int32), array.astype(np.int64)
            if not (wide > limits.max).any():
                return np.maximum(wide, limits.min).astype(np.int32)
    except (TypeError, ValueError):
        pass
    raise InvalidArgumentError("token ids must be a list of integers within the vocabulary")


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Number of tokens that both begin with."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
