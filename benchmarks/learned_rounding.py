"""Learned rounding: the alternative to latent weights that `finetuning.py` compares them with.

Codes are soft while they are trained. A weight is the mean of all levels l_k, weighed by how near its latent
weight z is,

    w = sum_k p_k l_k,    p = softmax(-(z - l_k)^2 / (T gap^2)),

with `gap` the mean distance between levels. The temperature T falls from step to step until p is as good as
hard (soft-to-hard annealing, arXiv 1704.00648; AdaRound, arXiv 2004.10568, has two levels and a penalty
instead). Where a model is judged its codes are hard: the level nearest to z, as with latent weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from elutq.finetune import quantized_block
from elutq.finetune.options import TuneOptions
from elutq.finetune.quantized_linear import QuantizedLinear

#: Temperatures of the first step and of the last, in squares of the gap.
_FIRST, _LAST = 0.2, 0.005


class SoftLinear(QuantizedLinear):
    """A linear module with soft codes in training.

    Attributes:
        steps: in which the temperature falls; set before any is made.
    """

    steps = 1
    _step = 0

    def weight(self) -> Tensor:
        """W~; with soft codes where a gradient is wanted."""
        if self.latent is None or not torch.is_grad_enabled():
            return super().weight()
        temperature = _FIRST * (_LAST / _FIRST) ** min(1.0, self._step / self.steps)
        self._step += 1
        scales, zeros = self._storable()
        bits = torch.arange(scales.shape[-1])
        patterns = (torch.arange(2 ** len(bits))[:, None] >> bits & 1).to(scales)
        levels = scales @ patterns.T + zeros[..., None]  # [out_features, groups, levels]
        gap = (scales.detach().sum(-1) / (len(patterns) - 1)).clamp_min(1e-9)[..., None, None]
        distance = (self.latent[..., None] - levels.detach()[..., None, :]) / gap
        shares = torch.softmax(-distance.square() / temperature, -1)
        return (shares * levels[..., None, :]).sum(-1).flatten(1)[:, : self.in_features]


@contextmanager
def learned_rounding(options: TuneOptions, windows: int) -> Iterator[None]:
    """Finetuning on so many windows learns rounding in place of latent weights."""
    SoftLinear.steps = windows // options.batch * options.epochs
    original = quantized_block.QuantizedLinear
    quantized_block.QuantizedLinear = SoftLinear  # type: ignore[misc]
    try:
        yield
    finally:
        quantized_block.QuantizedLinear = original  # type: ignore[misc]
