"""Latent weights with straight-through codes: the alternative to learned rounding, to compare it with.

Codes are hard from the first step on, that of the level nearest to each latent weight, whose gradient is that
of the weight itself (arXiv 1308.3432).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from elutq.finetune import quantized_block
from elutq.finetune.quantized_linear import QuantizedLinear


class StraightThroughLinear(QuantizedLinear):
    """A linear module whose latent weights have the weight's gradient."""

    def weight(self) -> Tensor:
        """W~, from hard codes."""
        softness, self.temperature = self.temperature, 0.0
        hard = super().weight()
        self.temperature = softness
        if self.latent is None or not softness:
            return hard
        latent = self.latent.flatten(1)[:, : self.in_features]
        return hard + (latent - latent.detach())

    def settle(self, distance: float) -> None:
        """Codes are hard: there is nothing to settle."""


@contextmanager
def straight_through() -> Iterator[None]:
    """Finetuning has straight-through codes in place of soft ones."""
    original = quantized_block.QuantizedLinear
    quantized_block.QuantizedLinear = StraightThroughLinear  # type: ignore[misc]
    try:
        yield
    finally:
        quantized_block.QuantizedLinear = original  # type: ignore[misc]
