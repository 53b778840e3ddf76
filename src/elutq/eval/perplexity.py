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
    everyone = [*models, *([reference] if reference is not None else [])]
    _check(everyone, context)
    windows = split_windows(token_ids, context, max_tokens)
    per_step = max(1, _LOGITS_BYTES // (4 * models[0].config.vocab_size))
    batch = max(1, per_step // context)
    tallies = [_Tally() for _ in models]
    for first in range(0, len(windows), batch):
        group = windows[first : first + batch]
        length = group.shape[1] - 1  # the last token of a window predicts nothing
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
            for tally, own_logits in zip(tallies, logits, strict=True):
                for i, window_targets in enumerate(targets):
                    tally.add(own_logits[i], window_targets, None if expected is None else expected[i])
        if progress is not None:
            progress((first + len(group)) * length, len(windows) * length)
    return [tally.evaluation(context) for tally in tallies]


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


class _Tally:
    """Running sums over positions, in float64."""

    def __init__(self) -> None:
        self.tokens = 0
        self.nll = 0.0
        self.reference_nll = 0.0
        self.kl = 0.0
        self.agreed = 0
        self.compared = False

    def add(
        self, logits: NDArray[np.float32], targets: NDArray[np.int64], reference: NDArray[np.float32] | None
    ) -> None:
        """Count n positions: logits and reference [n, vocab], targets [n]."""
        block = max(1, _BLOCK_VALUES // logits.shape[1])
        for i in range(0, len(targets), block):
            rows = slice(i, i + block)
            log_p = _log_softmax(logits[rows])
            self.nll += _nll(log_p, targets[rows])
            if reference is not None:
                log_q = _log_softmax(reference[rows])
                self.reference_nll += _nll(log_q, targets[rows])
                self.agreed += int((log_p.argmax(axis=1) == log_q.argmax(axis=1)).sum())
                np.subtract(log_q, log_p, out=log_p)
                np.exp(log_q, out=log_q)
                self.kl += float(np.einsum("nv,nv->n", log_q, log_p).sum(dtype=np.float64))
        self.tokens += len(targets)
        self.compared |= reference is not None

    def evaluation(self, context: int) -> Evaluation:
        nll = self.nll / self.tokens
        if not math.isfinite(nll):
            raise TensorValueError(
                "the model's logits are not finite: its weights are damaged; fetch or quantize it again"
            )
        return Evaluation(
            nll=nll,
            perplexity=_perplexity(nll),
            tokens=self.tokens,
            context=context,
            nll_increase=nll - self.reference_nll / self.tokens if self.compared else None,
            kl=self.kl / self.tokens if self.compared else None,
            top1_agreement=self.agreed / self.tokens if self.compared else None,
        )


def _mean(values: Sequence[float | None]) -> float | None:
    """None where there was no reference."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _perplexity(nll: float) -> float:
    return math.exp(min(nll, 700.0))  # beyond, a float overflows


def _nll(log_p: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """Sum over n positions: log_p [n, vocab], targets [n]."""
    return -float(np.take_along_axis(log_p, targets[:, None], axis=1).sum(dtype=np.float64))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each row; a new array [n, vocab]."""
    shifted: NDArray[np.float32] = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
