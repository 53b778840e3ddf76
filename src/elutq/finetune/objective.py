"""What a model says of the next token, compared with the full model: for training, and to report."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elutq.layerwise import HeldOut
from elutq.precision import products_in_float32
from elutq.world import World

#: Logits in work at once, in float32.
_LOGITS = 1 << 24


class Heads:
    """The heads of the full and of the tuned model, which read normalized residual streams.

    Args:
        full: [vocab_size, hidden_size], on the device.
        tuned: the same of the tuned model; `full` itself if it is that.
    """

    def __init__(self, full: Tensor, tuned: Tensor) -> None:
        self._full, self._tuned = full, tuned

    def kl(self, full: Tensor, tuned: Tensor) -> Tensor:
        """KL(full || tuned) summed over tokens, in nats; differentiable in `tuned`.

        Args:
            full: what the full model's head reads, [tokens, hidden_size].
            tuned: what the tuned model's head reads, the same shape.
        """

        def compare(log_q: Tensor, some: slice) -> tuple[Tensor, Tensor]:
            log_p = torch.log_softmax((full[some].to(self._full) @ self._full.T).float(), -1)
            p = log_p.exp()
            return (p * (log_p - log_q)).sum(dtype=torch.float64), log_q.exp() - p

        return _loss(tuned, self._tuned, compare)

    def nll(self, tuned: Tensor, next_tokens: Tensor) -> Tensor:
        """Negative log-likelihood of tokens, summed, in nats; differentiable in `tuned`.

        Args:
            tuned: what the tuned model's head reads, [tokens, hidden_size].
            next_tokens: int64 [tokens].
        """
        return _nll(tuned, next_tokens, self._tuned)

    @torch.no_grad()
    @products_in_float32()
    def compare(self, full: Tensor, tuned: Tensor, token_ids: Tensor) -> HeldOut:
        """Both models on one window; sums over its tokens, not means.

        Args:
            full: what the full model's head reads, [length, hidden_size].
            tuned: what the tuned model's head reads, the same shape.
            token_ids: int64 [length].
        """
        full, tuned, following = full[:-1], tuned[:-1], token_ids[1:].to(full.device)
        nll_full = float(_nll(full, following, self._full))
        nll_tuned = float(_nll(tuned, following, self._tuned))
        return HeldOut(nll_full, nll_tuned, float(self.kl(full, tuned)), len(full))


def add(a: HeldOut, b: HeldOut) -> HeldOut:
    """Sums of sums."""
    return HeldOut(a.full + b.full, a.quantized + b.quantized, a.kl + b.kl, a.tokens + b.tokens)


def mean(sums: HeldOut, world: World) -> HeldOut | None:
    """Over the tokens of all processes; None when there are none."""
    full, tuned, kl, tokens = world.totals(sums.full, sums.quantized, sums.kl, sums.tokens)
    return HeldOut(full / tokens, tuned / tokens, kl / tokens, int(tokens)) if tokens else None


def _nll(hidden: Tensor, next_tokens: Tensor, head: Tensor) -> Tensor:
    def compare(log_q: Tensor, some: slice) -> tuple[Tensor, Tensor]:
        gradient, tokens = log_q.exp(), next_tokens[some, None]
        gradient.scatter_add_(1, tokens, -torch.ones_like(tokens, dtype=gradient.dtype))
        return -log_q.gather(1, tokens).sum(dtype=torch.float64), gradient

    return _loss(hidden, head, compare)


#: (log q [tokens, vocab_size], which tokens) -> (their loss, its gradient with respect to their logits)
_Compare = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def _loss(hidden: Tensor, head: Tensor, compare: _Compare) -> Tensor:
    loss: Tensor = _Loss.apply(hidden, head, compare)  # type: ignore[no-untyped-call]
    return loss


class _Loss(torch.autograd.Function):
    """Finds the gradient along with the value, a few tokens at a time: logits are not kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, compare: _Compare) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradients = []
        step = max(1, _LOGITS // len(head))
        for first in range(0, len(hidden), step):
            some = slice(first, first + step)
            log_q = torch.log_softmax((hidden[some].to(head) @ head.T).float(), -1)
            loss, gradient = compare(log_q, some)
            total += loss
            gradients.append((gradient.to(head) @ head).to(hidden))
        ctx.save_for_backward(torch.cat(gradients))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * outer[0], None, None
