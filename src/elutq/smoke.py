"""The smoke test of a quantized model: does it still speak, or has it collapsed?

A perplexity can look tolerable while generation runs into a loop. So the model continues a few prompts, and
what it writes is held against limits that sane models keep far from. They come from measurements of the
bundled model, 16 continuations of 96 tokens at a time (`docs/accuracy.md` has each model):

    what                                    sane            broken                             limit
    entropy of the next token, nats         3.3 to 4.7      5.2 and more (word salad, noise)   5.15
    the same of peaked models               0.12            0.007 (one answer to all)          0.02
    continuations in a loop                 none            all                                half
    fewest different tokens, of the text    0.40            0.01                               0.15 in half

Knowing no more than how frequent words are leaves 5.8 nats on this vocabulary of 4096 tokens, and more on
larger ones. A vocabulary of fewer than 4096 tokens has the limit 0.62 ln(vocab_size).

The limits ask for half of all continuations, or for a mean over all tokens, because single ones stray: a sane
model may end a text at once. Tokens are sampled because greedy texts of sane small models loop, too (the
bundled one's at 4 bits, for 73 of 96 tokens).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elutq.errors import InvalidArgumentError, TensorValueError, TokenizerError
from elutq.generation import Generation, GenerationRequest
from elutq.runtime import LanguageModel, SequenceState
from elutq.sampling import SamplingOptions
from elutq.tokenizer import Tokenizer

#: Mean entropy of the next token's distribution, in nats, above and below which a model is broken.
HIGHEST_ENTROPY = 5.15
LOWEST_ENTROPY = 0.02
#: The same as the highest, as a share of ln(vocab_size), for small vocabularies.
HIGHEST_ENTROPY_SHARE = 0.62
#: A loop: at most so many tokens, over and over, at least so often and for so long.
LOOP_PERIOD = 32
LOOP_REPEATS = 4
LOOP_TOKENS = 32
#: Fewest different tokens of a text, as a share; asked of texts of LOOP_TOKENS and more.
LOWEST_DISTINCT = 0.15
#: Share of the continuations that must have a fault for the model to have it.
MAJORITY = 0.5


@dataclass(frozen=True)
class GenerationCheck:
    """What `check_generation` saw.

    Attributes:
        prompt: the start of `text`; token ids, separated by spaces, where there is no tokenizer.
        text: how the model went on: the first continuation with the fault, or the first of all.
        collapsed: whether the model is broken.
        reason: what is wrong with it; None for a sane model.
    """

    prompt: str
    text: str
    collapsed: bool
    reason: str | None


def check_generation(
    model: LanguageModel,
    prompts: Sequence[str | Sequence[int]],
    *,
    samples: int = 4,
    max_new_tokens: int = 96,
    temperature: float = 0.8,
    seed: int = 0,
) -> GenerationCheck:
    """Let a model continue prompts and see whether it has collapsed.

    All continuations grow together, a token per step. The same call gives the same answer.

    Args:
        model: the model to check.
        prompts: texts, or token ids, of the kind that the model was made for; three or more are best.
        samples: continuations of each.
        max_new_tokens: of each continuation, `LOOP_TOKENS` or more; an end-of-sequence token comes first.
        temperature: of sampling, above 0. The entropy is that of the unmodified logits.
        seed: of sampling.

    Raises:
        InvalidArgumentError: there is no prompt, one is empty or exceeds the context, or an option is out of
            range.
        TokenizerError: a prompt is a text and the model has no tokenizer.
    """
    if not prompts or samples < 1:
        raise InvalidArgumentError("at least one prompt and one sample of it are needed")
    if max_new_tokens < LOOP_TOKENS:
        raise InvalidArgumentError(f"max_new_tokens must be at least {LOOP_TOKENS}, not {max_new_tokens}")
    if not temperature > 0:
        raise InvalidArgumentError(
            f"temperature must be above 0, not {temperature}: greedy texts loop anyway"
        )
    try:
        tokenizer = model.tokenizer
    except TokenizerError:
        if any(isinstance(prompt, str) for prompt in prompts):
            raise
        tokenizer = None
    options: SamplingOptions = {"temperature": temperature}
    texts = [
        _Continuation(model, tokenizer, prompt, max_new_tokens, {**options, "seed": seed + i})
        for i in range(samples)
        for prompt in prompts
    ]
    try:
        while growing := [text for text in texts if not text.finished]:
            logits = model.step([text.pending() for text in growing])
            for text, own_logits in zip(growing, logits, strict=True):
                text.advance(own_logits)
    except TensorValueError as error:
        return GenerationCheck(texts[0].prompt, texts[0].text, True, str(error))
    entropy = float(np.concatenate([text.entropies for text in texts]).mean())
    reason, example = diagnose([text.tokens for text in texts], entropy, model.config.vocab_size)
    return GenerationCheck(texts[example].prompt, texts[example].text, reason is not None, reason)


def diagnose(texts: Sequence[NDArray[np.int32]], entropy: float, vocab_size: int) -> tuple[str | None, int]:
    """What is wrong with a model that wrote these texts, None if nothing; and which text shows it first.

    Args:
        texts: continuations of prompts, int32 [tokens] each, possibly empty.
        entropy: of the next token's distribution, in nats, the mean over all of them.
        vocab_size: of the model.
    """
    faults = {
        "end at once": [len(text) == 0 for text in texts],
        "run into a loop": [is_loop(text) for text in texts],
        "have almost no different words": [
            len(text) >= LOOP_TOKENS and len(set(text.tolist())) < LOWEST_DISTINCT * len(text)
            for text in texts
        ],
    }
    for fault, found in faults.items():
        if sum(found) >= MAJORITY * len(texts):
            return f"{sum(found)} of {len(texts)} texts {fault}", found.index(True)
    highest = min(HIGHEST_ENTROPY, HIGHEST_ENTROPY_SHARE * math.log(vocab_size))
    if entropy > highest:
        return f"the next token is nearly random: {entropy:.2f} nats of entropy, above {highest:.2f}", 0
    if entropy < LOWEST_ENTROPY:
        return f"the next token is never in doubt: {entropy:.4f} nats of entropy", 0
    return None, 0


def is_loop(tokens: NDArray[np.int32]) -> bool:
    """Whether some stretch of the tokens, int32 [tokens], repeats one token or a short phrase for long.

    It repeats at most `LOOP_PERIOD` tokens, `LOOP_REPEATS` times or more, over `LOOP_TOKENS` or more.
    """
    for period in range(1, min(LOOP_PERIOD, len(tokens) - 1) + 1):
        needed = max(LOOP_REPEATS * period, LOOP_TOKENS) - period
        different = np.flatnonzero(tokens[period:] != tokens[:-period])
        ends = np.concatenate([[-1], different, [len(tokens) - period]])
        if np.diff(ends).max() - 1 >= needed:
            return True
    return False


class _Continuation:
    """One continuation of one prompt, and how open the next token was at each place."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None,
        prompt: str | Sequence[int],
        max_new_tokens: int,
        sampling: SamplingOptions,
    ) -> None:
        ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        self._generation = Generation(
            GenerationRequest(ids, max_new_tokens, sampling),
            context=model.context,
            vocab_size=model.config.vocab_size,
            tokenizer=tokenizer,
            eos_token_ids=frozenset() if tokenizer is None else tokenizer.eos_token_ids,
        )
        self._sequence = model.new_sequence()
        self._tokenizer = tokenizer
        self._pieces: list[str] = []
        self.prompt = prompt if isinstance(prompt, str) else self._show(ids)
        self.entropies: list[float] = []
        self.finished = False

    @property
    def tokens(self) -> NDArray[np.int32]:
        """What the model wrote, int32 [tokens]."""
        return self._generation.tokens[self._generation.prompt_tokens :]

    @property
    def text(self) -> str:
        return self._show(self.tokens.tolist()) if self._tokenizer is None else "".join(self._pieces)

    def pending(self) -> tuple[SequenceState, NDArray[np.int32]]:
        """The sequence and the tokens that it has not seen."""
        return self._sequence, self._generation.tokens[len(self._sequence) :]

    def advance(self, logits: NDArray[np.float32]) -> None:
        """Choose the next token from float32 [vocab_size].

        Raises:
            TensorValueError: the logits are not finite.
        """
        if not np.isfinite(logits).all():
            raise TensorValueError("the model's logits are not finite; the weights are damaged")
        self.entropies.append(_entropy(logits))
        piece = self._generation.advance(logits)
        self._pieces.append(piece.text)
        self.finished = piece.finish_reason is not None

    def _show(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids)) if self._tokenizer is None else self._tokenizer.decode(ids)


def _entropy(logits: NDArray[np.float32]) -> float:
    """Of the softmax of the logits, in nats."""
    shifted = logits.astype(np.float64) - logits.max()
    weights = np.exp(shifted)
    total = weights.sum()
    return float(np.log(total) - weights @ shifted / total)
