"""A linear module whose weights are an HLQ matrix that can be trained."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elutq import hlq
from elutq.finetune.shards import local
from elutq.finetune.soft_weights import count_below, settle, soft_weights
from elutq.packing import HlqMatrix, pack_codes, unpack_codes
from elutq.scheme import QuantScheme


class QuantizedLinear(nn.Module):
    """y = W~ x + bias with W~ = zero + sum_p scale_p bit_p, and gradients for what W~ is made of.

    Scales and zeros count as they will be stored, and gradients pass the rounding straight through (arXiv
    1308.3432). With latent weights, each code is that of the level nearest to its own, which begins at what
    the matrix is. While they are trained, weights are soft, between two levels, and as the temperature falls
    they become what their codes say: learned rounding, by soft-to-hard annealing (arXiv 1704.00648) with two
    levels each as in AdaRound (arXiv 2004.10568), but those next to the latent weight at present.

    Args:
        matrix: where it begins.
        bias: float32 [out_features], or None.
        device: where to put it.
        train_codes: have latent weights; otherwise codes stay as they are.
        uniform: the matrix is a uniform grid, scales[p] = 2^p scales[0], and stays one.

    Attributes:
        scales: float32 [out_features, groups, bits]; of a uniform grid, the first alone.
        zeros: float32 [out_features, groups].
        latent: float32 [out_features, groups, columns per group], or None when codes are not trained.
        fixed_codes: uint8, the same shape, or None when they are. A parameter without gradient, not a buffer,
            so that FSDP shards it.
        bits: of a code.
        unit: mean distance between levels at the beginning, which rates are relative to.
        temperature: of soft weights; 0: they are hard, and latent weights have no gradient.
    """

    def __init__(
        self,
        matrix: HlqMatrix,
        bias: Tensor | None,
        device: torch.device,
        *,
        train_codes: bool,
        uniform: bool = False,
    ) -> None:
        super().__init__()
        self._group_size, self._row_scales = matrix.group_size, matrix.row_scales
        self.in_features, self.out_features, self.bits = matrix.in_features, matrix.out_features, matrix.bits
        columns = QuantScheme(matrix.bits, matrix.group_size).columns_per_group(matrix.in_features)
        groups = matrix.zeros.shape[1]
        unit = np.float32(1) if matrix.row_scales is None else matrix.row_scales.astype(np.float32)[:, None]
        zeros = torch.from_numpy(matrix.zeros.astype(np.float32) * unit)
        scales = torch.from_numpy(matrix.scales.astype(np.float32) * np.expand_dims(unit, -1))
        codes = torch.from_numpy(unpack_codes(matrix.planes, matrix.in_features))
        padding = groups * columns - matrix.in_features
        codes = nn.functional.pad(codes, (0, padding)).view(matrix.out_features, groups, columns)

        self.row_scales: Tensor | None
        row_scales = None if matrix.row_scales is None else torch.from_numpy(unit).to(device)
        self.register_buffer("row_scales", row_scales)
        self.bias = bias
        self.unit = float(scales.sum(-1).mean()) / (2**matrix.bits - 1)
        self.temperature = 0.0
        self._powers = 2.0 ** torch.arange(matrix.bits, device=device) if uniform else None
        if uniform:
            scales = scales[..., :1]
        self.scales, self.zeros = nn.Parameter(scales.to(device)), nn.Parameter(zeros.to(device))
        self.latent: nn.Parameter | None = None
        self.fixed_codes: nn.Parameter | None = None
        codes = codes.to(device)
        if train_codes:
            with torch.no_grad():
                self.latent = nn.Parameter(_values(codes, *self._storable()))
        else:
            self.fixed_codes = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        weight = self.weight()
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)

    def weight(self) -> Tensor:
        """W~, float32 [out_features, in_features]."""
        scales, zeros = self._storable()
        if self.latent is not None and self.temperature > 0:
            values = soft_weights(self.latent, _levels(scales, zeros)[0], self.temperature)
        else:
            values = _values(self._codes(scales, zeros), scales, zeros)
        return values.flatten(1)[:, : self.in_features]

    @torch.no_grad()
    def settle(self, distance: float) -> None:
        """Move latent weights to the levels nearest to them, by at most `distance` times `unit`.

        Levels count as they are, not as they will be stored: of those, a shard does not know its rows.
        """
        if self.latent is None:
            return
        scales, zeros = local(self.scales), local(self.zeros)
        if self._powers is not None:
            scales = scales * self._powers
        settle(local(self.latent), _levels(scales, zeros)[0], distance * self.unit)

    @torch.no_grad()
    def matrix(self) -> HlqMatrix:
        """What it has become, scales ascending."""
        scales, zeros = self._storable()
        found = self._codes(scales, zeros)
        scales, order = scales.sort(-1)
        codes = torch.zeros_like(found)
        for p in range(scales.shape[-1]):
            codes |= (found >> order[..., p, None].to(torch.uint8) & 1) << p
        if self.row_scales is None:
            scales, zeros = scales.half(), zeros.half()
        else:
            divisor = self.row_scales.where(self.row_scales > 0, 1)
            scales = (scales / divisor[..., None]).round().to(torch.uint8)
            zeros = (zeros / divisor).round().to(torch.int8)
        flat = codes.flatten(1)[:, : self.in_features].cpu().numpy()
        return HlqMatrix(
            pack_codes(flat, scales.shape[-1]),
            scales.cpu().numpy(),
            zeros.cpu().numpy(),
            self.in_features,
            self._group_size,
            self._row_scales,
        )

    @property
    @torch.no_grad()
    def codes(self) -> Tensor:
        """Its codes at present, uint8 [out_features, groups, columns per group]."""
        return self._codes(*self._storable())

    @torch.no_grad()
    def _codes(self, scales: Tensor, zeros: Tensor) -> Tensor:
        if self.latent is not None:
            return _nearest(self.latent, scales, zeros)
        assert self.fixed_codes is not None
        return self.fixed_codes

    def _storable(self) -> tuple[Tensor, Tensor]:
        """Scales and zeros as they can be stored; their gradients are those of the parameters."""
        with torch.no_grad():
            if self.row_scales is None:
                scales = self.scales.clamp(0, hlq.HALF_MAX).half().float()
                zeros = self.zeros.clamp(-hlq.HALF_MAX, hlq.HALF_MAX).half().float()
            else:
                divisor = self.row_scales.where(self.row_scales > 0, 1)
                unit = self.row_scales
                scales = (self.scales / divisor[..., None]).round().clamp(0, 255) * unit[..., None]
                zeros = (self.zeros / divisor).round().clamp(-128, 127) * unit
            shift_scales, shift_zeros = scales - self.scales, zeros - self.zeros
        stored = self.scales + shift_scales
        if self._powers is not None:
            stored = stored * self._powers
        return stored, self.zeros + shift_zeros


def _values(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    values: Tensor = _Values.apply(codes, scales, zeros)  # type: ignore[no-untyped-call]
    return values


class _Values(torch.autograd.Function):
    """zero + sum_p scale_p bit_p, [out_features, groups, columns]; keeps only codes for the way back."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.bits = scales.shape[-1]
        values = zeros[..., None].expand(codes.shape).contiguous()
        for p in range(ctx.bits):
            values += (codes >> p & 1) * scales[..., p, None]
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (codes,) = gradients, ctx.saved_tensors
        for_scales = [(gradient * (codes >> p & 1)).sum(-1) for p in range(ctx.bits)]
        return None, torch.stack(for_scales, -1), gradient.sum(-1)


def _nearest(latent: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Code of the level nearest to each latent weight, uint8, the shape of `latent`."""
    levels, order = _levels(scales, zeros)
    return order.gather(-1, count_below((levels[..., 1:] + levels[..., :-1]) / 2, latent))


def _levels(scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Levels of each group, ascending, and their codes, uint8: [out_features, groups, 2^bits]."""
    bits = torch.arange(scales.shape[-1], device=scales.device)
    patterns = torch.arange(2 ** len(bits), device=scales.device)[:, None] >> bits & 1
    levels, order = (scales @ patterns.T.to(scales) + zeros[..., None]).sort(-1)
    return levels, order.to(torch.uint8)
