"""How the next token is chosen from logits: options, constraints, log-probabilities."""

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from elutq import _core
from elutq.errors import InvalidArgumentError, TensorValueError


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen.

    Each works on what the one before it left, in this order: repetition_penalty, frequency_penalty and
    presence_penalty, logit_bias, a :class:`TokenConstraint`, temperature, top_k, top_p, min_p. Those that
    transformers' `generate` has are in its order.

    Attributes:
        temperature: 0, the default, always takes the most likely token.
        top_k: keep so many most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach this; 1 keeps all.
        min_p: drop tokens less likely than this share of the most likely one.
        repetition_penalty: above 1 makes tokens that are in the text already, prompt included, less likely.
        frequency_penalty: taken from a token's logit for each time it was generated.
        presence_penalty: taken from a token's logit once it was generated.
        logit_bias: added to the logits of these tokens; -inf forbids one.
        seed: makes sampling repeatable; None takes a fresh one.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None


class TokenConstraint(Protocol):
    """Decides which tokens may come next: a grammar, say. One object serves one generation."""

    def mask(self) -> NDArray[np.int32] | None:
        """Tokens allowed next, int32 [ceil(vocab_size / 32)]; None allows all.

        Bit `t % 32` of word `t // 32` is token t. Tokens beyond a shorter mask are not allowed. Where the
        text may end, end-of-sequence tokens are allowed too.
        """

    def accept(self, token: int) -> None:
        """The token that was chosen, unless it ends the sequence."""

    @property
    def is_done(self) -> bool:
        """Whether the text is complete: no token may follow."""


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token.

    Attributes:
        id: the token.
        logprob: natural logarithm of its probability by the unmodified logits; None if not asked for.
        alternatives: the most likely tokens at its place with theirs, most likely first.
    """

    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


def new_sampler(options: SamplingOptions, vocab_size: int) -> _core.Sampler:
    """The core's sampler for these options.

    Raises:
        InvalidArgumentError: an option is out of range or unknown.
    """
    if unknown := sorted(options.keys() - SamplingOptions.__annotations__.keys()):
        raise InvalidArgumentError(
            f"sampling option {unknown[0]!r:.80} is not known; the options are "
            + ", ".join(SamplingOptions.__annotations__)
        )
    seed = options.get("seed")
    bias = options.get("logit_bias") or {}
    for token in bias:
        if not 0 <= token < vocab_size:
            raise InvalidArgumentError(f"logit_bias names token {token}; the vocabulary has {vocab_size}")
    with engine_errors():
        return _core.Sampler(
            temperature=options.get("temperature", 0.0),
            top_k=min(options.get("top_k", 0), 1 << 31),
            top_p=options.get("top_p", 1.0),
            min_p=options.get("min_p", 0.0),
            repetition_penalty=options.get("repetition_penalty", 1.0),
            frequency_penalty=options.get("frequency_penalty", 0.0),
            presence_penalty=options.get("presence_penalty", 0.0),
            logit_bias=sorted(bias.items()),
            seed=secrets.randbits(64) if seed is None else seed % (1 << 64),
        )


def token_with_logprobs(logits: NDArray[np.float32], token: int, alternatives: int) -> Token:
    """A token with its log-probability and those of the most likely ones.

    Args:
        logits: unmodified, float32 [vocab_size].
        token: the one that was chosen.
        alternatives: how many of the most likely tokens to name.
    """
    (_, logprob), *most_likely = _core.log_probabilities(logits, token, alternatives)
    return Token(token, logprob, tuple(most_likely))


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """Turn the core's exceptions into ours."""
    try:
        yield
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from None
    except RuntimeError as error:
        raise TensorValueError(
            f"{error}; the weights are damaged: fetch or quantize the model again"
        ) from None
