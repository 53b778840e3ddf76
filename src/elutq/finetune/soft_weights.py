"""Weights between two levels each, for learned rounding: in C++ on CPUs, Triton on GPUs, torch elsewhere."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from elutq import _core

#: Levels closer than this are one level.
_LEAST_GAP = 1e-9
#: Types of devices that do all of it in one pass over memory, by C++ or Triton.
FUSED = ("cpu", "cuda")
#: Weights that torch works on at a time, with about 48 bytes for each.
PART = 1 << 24


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


@torch.no_grad()
def settle(latent: Tensor, levels: Tensor, distance: float) -> None:
    """Move each latent weight to the level nearest to it, by at most `distance`.

    Args:
        latent: float32 [out_features, groups, columns]; written to.
        levels: float32 [out_features, groups, 2^bits], ascending.
        distance: at least 0.
    """
    if latent.device.type == "cpu":
        _core.settle(_rows(latent), _rows(levels), distance, torch.get_num_threads())
    elif latent.device.type == "cuda":
        from elutq.triton_kernels import settle as settle_on_gpu

        settle_on_gpu(latent, levels, distance)
    else:
        _settle(latent, levels, distance)


class _SoftWeights(torch.autograd.Function):
    """Keeps nothing but its inputs for the way back."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, levels: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(latent, levels)
        ctx.temperature = temperature
        values = torch.empty_like(latent)
        if latent.device.type == "cuda":
            from elutq.triton_kernels import soft_values as find
        else:
            find = _values_on_cpu if latent.device.type == "cpu" else _values
        find(latent, levels, temperature, values)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (latent, levels) = gradients, ctx.saved_tensors
        found = torch.empty_like(latent), levels.new_empty(levels.shape)
        if latent.device.type == "cuda":
            from elutq.triton_kernels import soft_gradients as find
        else:
            find = _gradients_on_cpu if latent.device.type == "cpu" else _gradients
        find(latent, levels, ctx.temperature, gradient, *found)
        return *found, None


def _values(latent: Tensor, levels: Tensor, temperature: float, values: Tensor) -> None:
    """Write the weights, by torch."""
    for part in _parts(latent):
        _, below, step, x, _ = _between(latent[part], levels[part], temperature)
        values[part] = x.sigmoid_().mul_(step).add_(below)


def _gradients(
    latent: Tensor,
    levels: Tensor,
    temperature: float,
    gradient: Tensor,
    for_latent: Tensor,
    for_levels: Tensor,
) -> None:
    """Write gradients for latent weights and levels from the weights' own, by torch."""
    for part in _parts(latent):
        rank, _, step, x, slope = _between(latent[part], levels[part], temperature)
        to_above, rest = gradient[part] * torch.sigmoid(x), torch.sigmoid(-x)
        to_below = gradient[part] * rest
        for_latent[part] = step.mul_(slope).mul_(rest).mul_(to_above)
        found = for_levels[part].zero_()
        for i in range(levels.shape[-1] - 1):
            here = rank == i
            found[..., i] += (to_below * here).sum(-1)
            found[..., i + 1] += (to_above * here).sum(-1)


def _values_on_cpu(latent: Tensor, levels: Tensor, temperature: float, values: Tensor) -> None:
    """The same in C++, one pass over memory."""
    # A copy, as in the gradients: FSDP cannot free storage that NumPy has seen.
    _core.soft_values(
        _rows(latent.clone()), _rows(levels), temperature, _rows(values), torch.get_num_threads()
    )


def _gradients_on_cpu(
    latent: Tensor,
    levels: Tensor,
    temperature: float,
    gradient: Tensor,
    for_latent: Tensor,
    for_levels: Tensor,
) -> None:
    """The same in C++."""
    given = _rows(latent.clone()), _rows(levels), temperature, _rows(gradient.contiguous())
    _core.soft_gradients(*given, _rows(for_latent), _rows(for_levels), torch.get_num_threads())


def _settle(latent: Tensor, levels: Tensor, distance: float) -> None:
    """Move latent weights to levels, by torch."""
    borders = (levels[..., 1:] + levels[..., :-1]) / 2
    for part in _parts(latent):
        nearest = levels[part].gather(-1, count_below(borders[part], latent[part]))
        latent[part] += (nearest - latent[part]).clamp_(-distance, distance)


def _parts(latent: Tensor) -> Iterator[slice]:
    """Rows of a matrix that torch works on at a time."""
    step = max(1, PART // latent[0].numel())
    return (slice(first, first + step) for first in range(0, len(latent), step))


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
