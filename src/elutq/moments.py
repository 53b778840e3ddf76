"""Second moments of a module's inputs, which calibration needs, counted by one process or several."""

import torch
from torch import Tensor

from elutq.world import World

#: A symmetric product is made in blocks of columns, each down to the diagonal: 9/16 of the work with 8.
_BLOCKS = 8
_LEAST_BLOCK = 256


class Moments:
    """E[x^ x^^T] and E[x x^^T], up to a factor: x is what the full model's module reads, x^ the other's.

    Each window's products are made in float32, on their own, and added up in float64; what comes out is
    rounded to float32. So it does not matter how windows are dealt out to processes: another order of sums
    ends in the same bits, but for one entry in 2^29 or so. It would matter much if it did. The solver takes
    thousands of decisions after each other, and from a difference in the last bit it soon gets to another
    solution: as good, but a fifth of the matrix's squared norm away, or more.

    Args:
        size: in_features.
        cross: whether the second is wanted.

    Attributes:
        hessian: the first, [size, size], float64 and its upper triangle until `sum_over`, then float32.
        cross: the second, likewise.
        tokens: how many were counted.
    """

    def __init__(self, size: int, cross: bool, device: torch.device) -> None:
        self.hessian = torch.zeros((size, size), dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.hessian) if cross else None
        self.tokens = 0
        self._product = torch.empty((size, size), device=device)
        width = max(_LEAST_BLOCK, -(-size // _BLOCKS))
        self._blocks = [slice(first, min(first + width, size)) for first in range(0, size, width)]

    def add(self, full: Tensor, quantized: Tensor) -> None:
        """Count the tokens of some windows: inputs [windows, length, size] of both models."""
        for x_full, x in zip(full.float(), quantized.float(), strict=True):
            self._add(x_full, x, x)

    def add_weighted(self, full: Tensor, quantized: Tensor, weight: Tensor) -> None:
        """Count tokens that weigh unequally: inputs [tokens, size] of both models, weights [tokens]."""
        x = quantized.float()
        self._add(full.float(), x, x * weight[:, None])

    def _add(self, full: Tensor, x: Tensor, weighted: Tensor) -> None:
        for block in self._blocks:  # the upper triangle, in blocks
            rows = slice(0, block.stop)
            product = torch.mm(weighted[:, rows].T, x[:, block], out=self._product[rows, block])
            self.hessian[rows, block] += product
        if self.cross is not None:
            self.cross += torch.mm(full.T, weighted, out=self._product)
        self.tokens += len(x)

    def sum_over(self, world: World) -> None:
        """Count what all processes counted, and be done."""
        for block in self._blocks:
            self.hessian[block.stop :, block] = self.hessian[block, block.stop :].T
        world.sum_(self.hessian)
        self.hessian = self.hessian.float()
        if self.cross is not None:
            world.sum_(self.cross)
            self.cross = self.cross.float()
        (tokens,) = world.totals(self.tokens)
        self.tokens = int(tokens)
        del self._product
