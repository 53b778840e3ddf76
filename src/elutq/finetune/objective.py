"""What a model says of the next token, compared with the full model: for training, and to report."""

from typing import Any

import torch
from torch import Tensor

from elutq.layerwise import HeldOut
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
        loss: Tensor = _Divergence.apply(tuned, full, self._tuned, self._full)  # type: ignore[no-untyped-call]
        return loss

    def nll(self, tuned: Tensor, next_tokens: Tensor) -> Tensor:
        """Negative log-likelihood of tokens, summed, in nats; differentiable in `tuned`.

        Args:
            tuned: what the tuned model's head reads, [tokens, hidden_size].
            next_tokens: int64 [tokens].
        """
        return _nll(tuned, next_tokens, self._tuned)

    @torch.no_grad()
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


class _Divergence(torch.autograd.Function):
    """Finds the gradient, (q - p) head, along with the value, a few tokens at a time: logits are not kept."""

    @staticmethod
    def forward(ctx: Any, tuned: Tensor, full: Tensor, head_tuned: Tensor, head_full: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=tuned.device)
        gradients = []
        step = max(1, _LOGITS // len(head_full))
        for first in range(0, len(tuned), step):
            some_tuned, some_full = tuned[first : first + step], full[first : first + step]
            log_p = torch.log_softmax((some_full.to(head_full) @ head_full.T).float(), -1)
            log_q = torch.log_softmax((some_tuned.to(head_tuned) @ head_tuned.T).float(), -1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum(dtype=torch.float64)
            gradients.append(((log_q.exp() - p).to(head_tuned) @ head_tuned).to(tuned))
        ctx.save_for_backward(torch.cat(gradients))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * outer[0], None, None, None


def _nll(hidden: Tensor, next_tokens: Tensor, head: Tensor) -> Tensor:
    loss: Tensor = _Likelihood.apply(hidden, next_tokens, head)  # type: ignore[no-untyped-call]
    return loss


class _Likelihood(torch.autograd.Function):
    """The same for the likelihood of single tokens."""

    @staticmethod
    def forward(ctx: Any, tuned: Tensor, next_tokens: Tensor, head: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=tuned.device)
        gradients = []
        step = max(1, _LOGITS // len(head))
        for first in range(0, len(tuned), step):
            some, tokens = tuned[first : first + step], next_tokens[first : first + step]
            log_q = torch.log_softmax((some.to(head) @ head.T).float(), -1)
            total -= log_q.gather(1, tokens[:, None]).sum(dtype=torch.float64)
            q = log_q.exp()
            q[torch.arange(len(tokens), device=q.device), tokens] -= 1
            gradients.append((q.to(head) @ head).to(tuned))
        ctx.save_for_backward(torch.cat(gradients))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * outer[0], None, None
