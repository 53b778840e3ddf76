"""One group of columns in the metric of a Hessian: min (x - q)^T M (x - q) over codes and parameters.

The steps are those of `elutq.gptq`, which says where they come from. Arrays are [columns, rows]; rows are
independent of each other. On CPUs the C++ core takes the steps, some rows at a time while they are in the
cache; elsewhere `GroupProblem` does, in torch and Triton, and it is what the core is tested against.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from elutq import _core, hlq

#: Columns that update each other one by one; all others learn of them by one matrix product.
_BLOCK = 32
_BLOCK_ON_GPU = 128
#: Weight of the present parameters in a refit, relative to the mean of the diagonal: it decides what the
#: codes leave open, such as the scale of a plane that no weight uses.
_PROXIMITY = 1e-6


@dataclass(frozen=True)
class GroupSolution:
    """A quantized group: codes uint8 and values float32 [columns, rows], parameters [bits + 1, rows]."""

    codes: Tensor
    values: Tensor
    parameters: Tensor


def solve_group(
    target: Tensor,
    metric: Tensor,
    parameters: Tensor,
    *,
    rounds: int,
    descents: int,
    factor: Tensor | None = None,
    codes: Tensor | None = None,
    row_scales: Tensor | None = None,
    threads: int | None = None,
) -> GroupSolution:
    """The best of each row after some rounds of descents on the codes and refits of the parameters.

    Args:
        target: x, float32 [columns, rows].
        metric: M, float32 [columns, columns], positive definite.
        parameters: to begin with, float32 [bits + 1, rows], scales and, last, zero.
        rounds: how many.
        descents: in each of them.
        factor: V, upper triangular [columns, columns], M = V V^T: the first codes are chosen column by
            column, later ones making up for the errors of earlier ones. None: each is the nearest to its
            target.
        codes: those of a known solution, which the result will not be worse than; without `factor`.
        row_scales: float32 [rows], fp16 values: parameters are bytes in these units; None: they are fp16.
        threads: of a CPU; all by default. The result does not depend on it.
    """
    if target.device.type == "cpu":
        target = target.contiguous()
        found = GroupSolution(
            torch.empty_like(target, dtype=torch.uint8) if codes is None else codes.clone(),
            torch.empty_like(target),
            parameters.clone(memory_format=torch.contiguous_format),
        )
        _core.solve_group(
            target.numpy(),
            metric.contiguous().numpy(),
            None if factor is None else factor.T.contiguous().numpy(),
            None if row_scales is None else row_scales.numpy(),
            codes is not None,
            rounds,
            descents,
            found.parameters.numpy(),
            found.codes.numpy(),
            found.values.numpy(),
            threads or len(os.sched_getaffinity(0)),
        )
        return found
    problem = GroupProblem(target, metric, len(parameters) - 1, row_scales)
    if codes is None:
        problem.start(parameters, factor)
    else:
        problem.resume(codes, parameters)
    problem.improve(rounds, descents)
    return GroupSolution(problem.best_codes, problem.best_values, problem.best_parameters)


class GroupProblem:
    """The problem, the iterate, and the best of each row so far.

    Args:
        target: x, float32 [columns, rows].
        metric: M, float32 [columns, columns], positive definite.
        bits: bit planes.
        row_scales: float32 [rows], fp16 values: parameters are bytes in these units; None: they are fp16.

    Attributes:
        codes: uint8 [columns, rows], of the iterate.
        values: q, float32 [columns, rows], what the codes stand for.
        parameters: float32 [bits + 1, rows], scales and, last, zero, as they can be stored; scales >= 0 and
            ascending.
        best_codes: the codes of the best iterate of each row.
        best_values: likewise.
        best_parameters: likewise.
        best_loss: float32 [rows].
    """

    def __init__(self, target: Tensor, metric: Tensor, bits: int, row_scales: Tensor | None = None) -> None:
        self.target, self.metric = target.contiguous(), metric
        self.bits, self._row_scales = bits, row_scales
        patterns = torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1
        self._patterns = patterns.to(target)
        self.best_loss: Tensor | None = None

    def start(self, parameters: Tensor, factor: Tensor | None) -> None:
        """Begin with these parameters.

        Args:
            parameters: [bits + 1, rows], scales and, last, zero.
            factor: V, upper triangular [columns, columns], M = V V^T: codes are chosen column by column,
                later ones making up for the errors of earlier ones. None: each is the nearest to its target.
        """
        self._set_parameters(parameters)
        self.values, self.codes = self._nearest(self.target)
        if factor is not None:
            self._feed_back(factor)
        self._settle()

    def resume(self, codes: Tensor, parameters: Tensor) -> None:
        """Begin with a known solution, which the result will not be worse than."""
        self._set_parameters(parameters)
        self.codes = codes.clone()
        self.values = self._values()
        self._settle()

    def _feed_back(self, factor: Tensor) -> None:
        """Choose codes one column after the other, V^T r of those done added to the targets."""
        self._visit(self.target, torch.zeros_like(self.target), factor, triangular=True)

    def improve(self, rounds: int, descents: int) -> None:
        """Alternate descents on the codes with refits of the parameters."""
        for _ in range(rounds):
            for _ in range(descents):
                self._descend()
            if descents:
                self._settle()
            self._refit()
            self._settle()

    def _descend(self) -> None:
        """Choose each column's code anew with all others fixed."""
        self._visit(self.values, self._gradient, self.metric)

    def _visit(self, base: Tensor, pull: Tensor, matrix: Tensor, triangular: bool = False) -> None:
        """For each column j in turn: q_j = the level nearest to b_j + p_j / D_jj, then p += D_j (b_j - q_j).

        Args:
            base: b, [columns, rows].
            pull: p, likewise; changed.
            matrix: D, [columns, columns].
            triangular: D is upper triangular, so that a column changes nothing for earlier ones.
        """
        on_gpu = base.device.type == "cuda"
        choose, at_once = (self._choose_on_gpu, _BLOCK_ON_GPU) if on_gpu else (self._choose, _BLOCK)
        for first in range(0, len(base), at_once):
            block = slice(first, min(first + at_once, len(base)))
            errors = choose(block, base[block], pull[block], matrix[block, block].contiguous())
            before, after = slice(0, block.start), slice(block.stop, len(base))
            for others in (after,) if triangular else (before, after):
                pull[others].addmm_(matrix[block, others].T, errors)

    def _choose(self, block: slice, base: Tensor, pull: Tensor, matrix: Tensor) -> Tensor:
        """`_visit` of a block of columns alone; b - q of them."""
        errors, diagonal = torch.empty_like(base), matrix.diagonal().tolist()
        for i, j in enumerate(range(block.start, block.stop)):
            wanted = torch.add(base[i], pull[i], alpha=1 / diagonal[i])
            value, self.codes[j] = self._nearest(wanted)
            torch.sub(base[i], value, out=errors[i])
            self.values[j] = value
            pull.addr_(matrix[i], errors[i])
        return errors

    def _choose_on_gpu(self, block: slice, base: Tensor, pull: Tensor, matrix: Tensor) -> Tensor:
        """`_choose` in Triton, which keeps the pull of some rows in registers."""
        from elutq import triton_kernels

        errors = torch.empty_like(base)
        triton_kernels.choose_columns(
            self._ascending, self._order, matrix, base, pull, self.values[block], self.codes[block], errors
        )
        return errors

    def _refit(self) -> None:
        """Least squares for scales and zero in the metric M, codes fixed, rounded to fp16."""
        bits = [(self.codes >> p & 1).to(self.target) for p in range(self.bits)]
        size = self.bits + 1
        normal = self.target.new_empty((size, size, self.target.shape[1]), dtype=torch.float64)
        right = normal.new_empty((size, self.target.shape[1]))
        ones = self.metric.sum(1)
        for p in range(self.bits):
            moved = self.metric @ bits[p]
            for other in range(p + 1):
                normal[p, other] = normal[other, p] = (bits[other] * moved).sum(0)
            normal[p, -1] = normal[-1, p] = ones @ bits[p]
            right[p] = (bits[p] * self._gradient).sum(0)
        normal[-1, -1] = ones.sum()
        right[-1] = self._gradient.sum(0)
        diagonal = normal.diagonal(dim1=0, dim2=1)
        diagonal += _PROXIMITY * diagonal.mean(1, keepdim=True)
        step = torch.linalg.solve(normal.permute(2, 0, 1), right.T).T
        self._set_canonical(self.parameters + step.float())
        self.values = self._values()

    def _set_canonical(self, parameters: Tensor) -> None:
        """Take parameters over with scales >= 0 and ascending; codes follow."""
        scales, zero = parameters[:-1], parameters[-1]
        negative = scales < 0
        zero = zero + torch.where(negative, scales, 0).sum(0)
        scales, order = scales.abs().sort(0)
        planes = [(self.codes >> p & 1).bool() ^ negative[p] for p in range(self.bits)]
        if bool((order != torch.arange(self.bits, device=order.device)[:, None]).any()):
            stacked = torch.stack(planes)
            planes = list(stacked.gather(0, order[:, None].expand(stacked.shape)))
        self.codes = torch.zeros_like(self.codes)
        for p in range(self.bits):
            self.codes |= planes[p].to(torch.uint8) << p
        self._set_parameters(torch.cat([scales, zero[None]]))

    def _set_parameters(self, parameters: Tensor) -> None:
        self.parameters = self._storable(parameters)
        levels = self._patterns @ self.parameters[:-1] + self.parameters[-1]
        self._levels = levels
        self._ascending, order = levels.sort(0)
        self._order = order.to(torch.uint8)
        self._borders = (self._ascending[1:] + self._ascending[:-1]) / 2

    def _storable(self, parameters: Tensor) -> Tensor:
        if self._row_scales is None:
            return parameters.clamp(-hlq.HALF_MAX, hlq.HALF_MAX).half().float()
        units = torch.where(self._row_scales > 0, parameters / self._row_scales, 0).round()
        return self._row_scales * torch.cat([units[:-1].clamp(0, 255), units[-1:].clamp(-128, 127)])

    def _nearest(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Value and code of the level nearest to each number; [rows] or [columns, rows] -> the same shape."""
        if wanted.ndim == 2:
            rank = (wanted > self._borders[:, None]).sum(0)
            return self._ascending.gather(0, rank), self._order.gather(0, rank)
        rank = (wanted > self._borders).sum(0)[None]
        return self._ascending.gather(0, rank)[0], self._order.gather(0, rank)[0]

    def _values(self) -> Tensor:
        return self._levels.gather(0, self.codes.long())

    def _settle(self) -> None:
        """Compute the gradient M (x - q) anew and remember the rows that are better than ever."""
        errors = self.target - self.values
        self._gradient = self.metric @ errors
        loss = (errors * self._gradient).sum(0)
        if self.best_loss is None:
            self.best_codes, self.best_values = self.codes.clone(), self.values.clone()
            self.best_parameters, self.best_loss = self.parameters.clone(), loss
            return
        better = loss < self.best_loss
        self.best_codes = torch.where(better, self.codes, self.best_codes)
        self.best_values = torch.where(better, self.values, self.best_values)
        self.best_parameters = torch.where(better, self.parameters, self.best_parameters)
        self.best_loss = torch.minimum(loss, self.best_loss)
