"""Weights between two levels each, for learned rounding, in C++ on CPUs and in torch elsewhere."""

from typing import Any

import torch
from torch import Tensor

from elutq import _core

#: Levels closer than this are one level.
_LEAST_GAP = 1e-9


def soft_weights(latent: Tensor, levels: Tensor, temperature: float) -> Tensor:
    """Weights w that move from one level to the next as latent weights z do, the steeper the colder.

    z is between two levels a < b of its group, or nearest to them. With gap the mean distance between levels,

        w = a + (b - a) sigmoid(2 (z - (a + b) / 2) (b - a) / (T gap^2)),

    the mean of both weighed by exp(-(z - level)^2 / (T gap^2)). Gradients reach z through the sigmoid and
    levels through a and b outside it.

    Args:
        latent: z, float32 [out_features, groups, columns].
        levels: float32 [out_features, groups, 2^bits], ascending.
        temperature: T, more than 0.

    Returns:
        Float32, the shape of `latent`.
    """
    weights: Tensor = _SoftWeights.apply(latent, levels, temperature)  # type: ignore[no-untyped-call]
    return weights


class _SoftWeights(torch.autograd.Function):
    """Keeps nothing but its inputs for the way back."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, levels: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(latent, levels)
        ctx.temperature = temperature
        if latent.device.type == "cpu":
            return _values_on_cpu(latent, levels, temperature)
        return _values(latent, levels, temperature)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (latent, levels) = gradients, ctx.saved_tensors
        find = _gradients_on_cpu if latent.device.type == "cpu" else _gradients
        return *find(latent, levels, ctx.temperature, gradient), None


def _values(latent: Tensor, levels: Tensor, temperature: float) -> Tensor:
    """The weights, by torch."""
    _, below, step, x, _ = _between(latent, levels, temperature)
    return x.sigmoid_().mul_(step).add_(below)


def _gradients(latent: Tensor, levels: Tensor, temperature: float, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """For latent weights and levels, from the weights' own, by torch."""
    rank, _, step, x, slope = _between(latent, levels, temperature)
    to_above, rest = gradient * torch.sigmoid(x), torch.sigmoid(-x)
    to_below = gradient * rest
    for_levels = torch.zeros_like(levels)
    for i in range(levels.shape[-1] - 1):
        here = rank == i
        for_levels[..., i] += (to_below * here).sum(-1)
        for_levels[..., i + 1] += (to_above * here).sum(-1)
    return to_above.mul_(rest).mul_(step).mul_(slope), for_levels


def _values_on_cpu(latent: Tensor, levels: Tensor, temperature: float) -> Tensor:
    """The same in C++, one pass over memory."""
    found = torch.empty_like(latent)
    _core.soft_values(_rows(latent), _rows(levels), temperature, _rows(found), torch.get_num_threads())
    return found


def _gradients_on_cpu(
    latent: Tensor, levels: Tensor, temperature: float, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in C++."""
    for_latent, for_levels = torch.empty_like(latent), torch.empty_like(levels)
    _core.soft_gradients(
        _rows(latent),
        _rows(levels),
        temperature,
        _rows(gradient.contiguous()),
        _rows(for_latent),
        _rows(for_levels),
        torch.get_num_threads(),
    )
    return for_latent, for_levels


def _rows(tensor: Tensor) -> Any:
    """A view as an array, a row for each group."""
    return tensor.detach().flatten(0, 1).numpy()


def _between(
    latent: Tensor, levels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rank of a, a, b - a, the sigmoid's argument and its slope."""
    rank = count_below(levels[..., 1:-1], latent)
    below, step = levels.gather(-1, rank), levels.diff(dim=-1).gather(-1, rank)
    gap = (levels[..., -1:] - levels[..., :1]) / (levels.shape[-1] - 1)
    slope = step * (2 / (temperature * gap.clamp_min(_LEAST_GAP).square()))
    return rank, below, step, (latent - below - step / 2) * slope, slope


def count_below(borders: Tensor, latent: Tensor) -> Tensor:
    """How many of its group's borders each latent weight exceeds, int64, the shape of `latent`."""
    rank = torch.zeros_like(latent, dtype=torch.uint8)
    for border in borders.unbind(-1):
        rank += latent > border[..., None]
    return rank.long()
