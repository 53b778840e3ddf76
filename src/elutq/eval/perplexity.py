"""Perplexity of a model on a text, and its distance from a reference model.

The protocol is the literature's: the tokens of the whole text, no BOS, are cut into windows of `context`
tokens that do not overlap; each window is seen on its own; every token of a window but its first is predicted
from those before it. A shorter rest at the end is left out, unless it is all there is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from elutq.errors import InvalidArgumentError, TensorValueError

if TYPE_CHECKING:
    from elutq.runtime import LanguageModel

#: Most logits of one model held at once: bounds memory for any vocabulary and context.
_LOGITS_BYTES = 64 << 20
#: Logits scored at once: bounds the scratch memory, and keeps it in cache.
_BLOCK_VALUES = 1 << 18


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured; means are per predicted token, in nats.

    Attributes:
        nll: mean negative log-likelihood.
        perplexity: exp(nll).
        tokens: tokens predicted.
        context: tokens in a window.
        nll_increase: nll less the reference's, or None without a reference.
        kl: mean KL(reference || model), or None without a reference.
        top1_agreement: share of positions where both models rank the same token first, or None.
    """

    nll: float
    perplexity: float
    tokens: int
    context: int
    nll_increase: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Scores:
    """What was measured of each predicted token, in nats; arrays are float64 [windows, context - 1].

    Entry t of a window is about its token t + 1, predicted from those up to t.

    Attributes:
        context: tokens in a window.
        nll: negative log-likelihood.
        reference_nll: the reference's, or None without a reference.
        kl: KL(reference || model), or None.
        agreed: 1 where both models rank the same token first, else 0, or None.
    """

    context: int
    nll: NDArray[np.float64]
    reference_nll: NDArray[np.float64] | None = None
    kl: NDArray[np.float64] | None = None
    agreed: NDArray[np.float64] | None = None

    def evaluation(self, first: int = 1) -> Evaluation:
        """Means over the tokens from `first` on of each window.

        Args:
            first: 1 for all that have a token before them; `context // 2 + 1` for those that llama.cpp's
                `llama-perplexity` scores.

        Raises:
            TensorValueError: the model's logits were not finite.
        """

        def mean(values: NDArray[np.float64]) -> float:
            return float(values[:, first - 1 :].mean())

        nll = mean(self.nll)
        if not math.isfinite(nll):
            raise TensorValueError(
                "the model's logits are not finite: its weights are damaged; fetch or quantize it again"
            )
        return Evaluation(
            nll=nll,
            perplexity=_perplexity(nll),
            tokens=self.nll[:, first - 1 :].size,
            context=self.context,
            nll_increase=None if self.reference_nll is None else nll - mean(self.reference_nll),
            kl=None if self.kl is None else mean(self.kl),
            top1_agreement=None if self.agreed is None else mean(self.agreed),
        )


def evaluate(
    model: "LanguageModel",
    token_ids: Sequence[int],
    context: int,
    *,
    reference: "LanguageModel | None" = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score `model` on a text.

    Args:
        model: the model to score.
        token_ids: the text, encoded without special tokens.
        context: tokens in a window, 2 or more, within the model's limit.
        reference: a model with the same tokenizer to compare with, as a rule the unquantized original.
        max_tokens: use only so many tokens of the text, from its start.
        progress: called with (tokens scored, tokens in all) now and then.

    Raises:
        InvalidArgumentError: the text has fewer than 2 tokens, the context does not fit, or the vocabularies
            of the two models differ.
        TensorValueError: a model's logits are not finite.
    """
    return evaluate_all(
        [model], token_ids, context, reference=reference, max_tokens=max_tokens, progress=progress
    )[0]


def evaluate_all(
    models: Sequence["LanguageModel"],
    token_ids: Sequence[int],
    context: int,
    *,
    reference: "LanguageModel | None" = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Evaluation]:
    """`evaluate` for several models with one tokenizer; the reference runs only once.

    All models are in memory together and step side by side: a text's logits of one model alone would be too
    many to keep for the next (8192 tokens and a vocabulary of 128k make 4 GB).
    """
    scores = score_all(
        models, token_ids, context, reference=reference, max_tokens=max_tokens, progress=progress
    )
    return [found.evaluation() for found in scores]


def score_all(
    models: Sequence["LanguageModel"],
    token_ids: Sequence[int],
    context: int,
    *,
    reference: "LanguageModel | None" = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Scores]:
    """What `evaluate_all` takes the means of, token by token. Arguments and errors are the same."""
    everyone = [*models, *([reference] if reference is not None else [])]
    _check(everyone, context)
    windows = split_windows(token_ids, context, max_tokens)
    per_step = max(1, _LOGITS_BYTES // (4 * models[0].config.vocab_size))
    batch = max(1, per_step // context)
    length = windows.shape[1] - 1  # the last token of a window predicts nothing
    figures = np.empty((len(models), 1 if reference is None else 4, len(windows), length))
    for first in range(0, len(windows), batch):
        group = windows[first : first + batch]
        sequences = [[model.new_sequence() for _ in group] for model in everyone]
        for start in range(0, length, per_step):
            stop = min(start + per_step, length)
            targets = group[:, start + 1 : stop + 1]
            logits = [
                model.step(
                    [(s, ids[start:stop].tolist()) for s, ids in zip(own, group, strict=True)],
                    all_logits=True,
                )
                for model, own in zip(everyone, sequences, strict=True)
            ]
            expected = logits.pop() if reference is not None else None
            for own_figures, own_logits in zip(figures, logits, strict=True):
                for i, window_targets in enumerate(targets):
                    own_figures[:, first + i, start:stop] = _score(
                        own_logits[i], window_targets, None if expected is None else expected[i]
                    )
        if progress is not None:
            progress((first + len(group)) * length, len(windows) * length)
    return [Scores(context, *own_figures) for own_figures in figures]


def mean_evaluation(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The mean over texts of equal weight, however long they are.

    Args:
        evaluations: of one model, with one context and one reference or none; at least one.

    Returns:
        Means of every figure; perplexity is that of the mean nll, and tokens are added up.
    """
    nll = fmean(found.nll for found in evaluations)
    return Evaluation(
        nll=nll,
        perplexity=_perplexity(nll),
        tokens=sum(found.tokens for found in evaluations),
        context=evaluations[0].context,
        nll_increase=_mean([found.nll_increase for found in evaluations]),
        kl=_mean([found.kl for found in evaluations]),
        top1_agreement=_mean([found.top1_agreement for found in evaluations]),
    )


def split_windows(token_ids: Sequence[int], context: int, max_tokens: int | None = None) -> NDArray[np.int64]:
    """Windows of the protocol, int64 [windows, context]; one shorter window when that is all there is.

    Raises:
        InvalidArgumentError: fewer than 2 tokens.
    """
    ids = np.asarray(token_ids[:max_tokens], dtype=np.int64)
    if len(ids) < 2:
        raise InvalidArgumentError(f"the text has {len(ids)} token(s); at least 2 are needed to predict one")
    count = len(ids) // context
    return ids[: count * context].reshape(count, context) if count else ids[None]


def _check(models: Sequence["LanguageModel"], context: int) -> None:
    if context < 2:
        raise InvalidArgumentError(f"context must be at least 2 tokens, not {context}")
    for model in models:
        limit = model.config.max_position_embeddings
        if context > limit:
            raise InvalidArgumentError(f"context is {context} tokens, but the model's limit is {limit}")
        if model.config.vocab_size != models[0].config.vocab_size:
            raise InvalidArgumentError(
                f"the models' vocabularies differ: {models[0].config.vocab_size} and "
                f"{model.config.vocab_size} tokens; compare models that share a tokenizer"
            )


def _score(
    logits: NDArray[np.float32], targets: NDArray[np.int64], reference: NDArray[np.float32] | None
) -> NDArray[np.float64]:
    """The arrays of `Scores` for n positions: logits and reference [n, vocab], targets [n]."""
    figures = np.empty((1 if reference is None else 4, len(targets)))
    block = max(1, _BLOCK_VALUES // logits.shape[1])
    for i in range(0, len(targets), block):
        rows = slice(i, i + block)
        log_p = _log_softmax(logits[rows])
        figures[0, rows] = -_picked(log_p, targets[rows])
        if reference is not None:
            log_q = _log_softmax(reference[rows])
            figures[1, rows] = -_picked(log_q, targets[rows])
            figures[3, rows] = log_p.argmax(axis=1) == log_q.argmax(axis=1)
            np.subtract(log_q, log_p, out=log_p)
            np.exp(log_q, out=log_q)
            figures[2, rows] = np.einsum("nv,nv->n", log_q, log_p)
    return figures


def _mean(values: Sequence[float | None]) -> float | None:
    """None where there was no reference."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _perplexity(nll: float) -> float:
    return math.exp(min(nll, 700.0))  # beyond, a float overflows


def _picked(log_p: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float32]:
    """Entry `targets[n]` of each row: log_p [n, vocab]."""
    return np.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each row; a new array [n, vocab]."""
    shifted: NDArray[np.float32] = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
