"""Calibrated quantization of one matrix: HLQ and uniform grids with second-order error compensation.

A linear module y = W x is quantized to W~ so that its outputs on calibration inputs change least,

    E ||W~ x^ - W x||^2  =  tr((W~ - T) H (W~ - T)^T) + const        H = E[x^ x^^T],  T = W E[x x^^T] H^-1

where x^ are the inputs that the quantized model itself produces and x those of the full model (asymmetric
calibration, GPTAQ, arXiv 2504.02692; without x, T = W). Rows of W are independent of each other. In this file
arrays are [in_features, rows], so that a column of W lies contiguous in memory.

**First pass.** Groups of columns are quantized one after the other, and the groups still to come make up for
the errors of those done (GPTQ, arXiv 2210.17323). With H = V V^T, V upper triangular, and r = t - q the
errors of the columns d before group g,

    x_g = t_g + V_gg^-T V_dg^T r_d        the group's target
    M   = V_gg V_gg^T                     its metric: what remains of an error after all later columns adapt

so one triangular factor gives both, and no inverse Hessian is needed.

**A group** is a problem of its own, min (x - q)^T M (x - q) over codes and parameters. It starts from a
data-free fit that weighs column j by V_jj^2 and repeats

    feedback      for each column in turn, the level nearest to x_j + sum_{i<j} V_ij r_i / V_jj
    descent       for each column in turn, the best level with all others fixed: that nearest to
                  q_j + (M r)_j / M_jj
    refit         scales and zero by least squares in the metric M, codes fixed

and keeps the best iterate of each row (BPDQ, arXiv 2602.04163, has the first and the last; LNQ in
GuidedQuant, arXiv 2505.07004, the second). Parameters count as they will be stored, in fp16.

**Sweeps** visit every group again with all others as they are: target q_g + H_gg^-1 (H r)_g, metric H_gg,
start what is there.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elutq import hlq
from elutq.errors import SingularHessianError, TensorShapeError
from elutq.group_problem import GroupSolution, solve_group
from elutq.packing import HlqMatrix, pack_codes
from elutq.precision import products_in_float32
from elutq.scheme import QuantScheme

#: Most rows of a matrix in work at once on a CPU: they fit a cache.
_ROWS = 4096
#: Room that row scales leave for what error compensation adds to the weights.
_BYTE_MARGIN = 1.1
#: Columns of a block, of which only the product with itself and those before is needed, as H is symmetric.
_SQUARE_BLOCK = 512
_DAMP_STEP = 10.0
_DAMP_LIMIT = 10.0


@dataclass(frozen=True)
class SolverOptions:
    """What the solver does. `docs/accuracy.md` has the ablations behind the defaults.

    Attributes:
        uniform: keep to uniform grids, as chosen at the start; with `GPTQ`, plain GPTQ.
        feedback: errors inside a group change the codes of its later columns.
        rounds: alternations of codes and parameters in the first pass; 0 keeps the start's parameters.
        descents: coordinate descents on the codes in each round.
        sweeps: visits to every group after the first pass.
        sweep_rounds: alternations in each of them.
        damp: added to the Hessian's diagonal, relative to its mean.
        target_share: how far targets follow the full model's inputs: 0 is T = W, 1 is T as above.
    """

    uniform: bool = False
    feedback: bool = True
    rounds: int = 4
    descents: int = 2
    sweeps: int = 1
    sweep_rounds: int = 2
    damp: float = 0.03
    target_share: float = 1.0


#: Plain GPTQ on the best-clipped uniform grid.
GPTQ = SolverOptions(uniform=True, rounds=0, descents=0, sweeps=0, target_share=0.0)
#: HLQ-GPTQ as published: a group's codes are fixed before its errors are passed on.
PUBLISHED = SolverOptions(feedback=False, rounds=0, descents=0, sweeps=0, target_share=0.0)


@dataclass(frozen=True)
class Solution:
    """A quantized matrix and what it costs.

    Attributes:
        matrix: the matrix.
        error: tr((W~ - T) H (W~ - T)^T), H without damping: squared error of the outputs on the calibration
            data, up to a factor.
        norm: tr(W H W^T), of the outputs themselves, up to the same factor.
    """

    matrix: HlqMatrix
    error: float
    norm: float

    @property
    def output_error(self) -> float:
        """Relative squared error of the outputs on the calibration data."""
        return self.error / self.norm if self.norm > 0 else self.error


class Metric:
    """The statistics of a linear module's inputs, factored; shared by all modules that read the same inputs.

    Args:
        hessian: E[x^ x^^T] up to a factor, float32 or float64 [in_features, in_features], symmetric, x^
        being the
            inputs in the quantized model.
        cross: E[x x^^T] up to the same factor, x being the inputs in the full model; None: targets are the
        weights. options: what the solver does.

    Attributes:
        damp: relative damping in effect, that of the options or, where the factorization needed it, more.

    Raises:
        TensorShapeError: the shapes do not fit each other.
        SingularHessianError: an entry is not finite, all are zero, or no damping makes the matrix positive
        definite.
    """

    @products_in_float32()
    def __init__(self, hessian: Tensor, cross: Tensor | None, options: SolverOptions) -> None:
        size = hessian.shape[0]
        if hessian.shape != (size, size) or (cross is not None and cross.shape != (size, size)):
            shapes = [tuple(moments.shape) for moments in (hessian, cross) if moments is not None]
            raise TensorShapeError(f"moments must be square matrices of one size, not {shapes}")
        self.options = options
        self.hessian = hessian.float()
        self._cross = None if cross is None or options.target_share == 0 else cross.float()
        scale = float(hessian.diagonal().mean())
        if not (np.isfinite(scale) and scale > 0 and bool(torch.isfinite(hessian).all())):
            raise SingularHessianError("the inputs' Hessian is zero or not finite")
        self.damp = options.damp
        while True:
            # A Cholesky factor of the matrix with both axes reversed is, reversed again, upper triangular.
            reverse = hessian.flip(0, 1).double()
            reverse.diagonal().add_(self.damp * scale)
            lower, failed = torch.linalg.cholesky_ex(reverse)
            if not failed and bool(torch.isfinite(lower.diagonal()).all()):
                break
            self.damp = max(self.damp, 1e-6) * _DAMP_STEP
            if self.damp > _DAMP_LIMIT:
                raise SingularHessianError("the inputs' Hessian is not positive definite")
        del reverse  # the largest of what is held here
        self.factor = lower.float().flip(0, 1)
        self.damped = self.hessian.clone()
        self.damped.diagonal().add_(self.damp * scale)

    @property
    def in_features(self) -> int:
        """Columns of the matrices this is for."""
        return self.hessian.shape[0]

    def targets(self, weight: Tensor) -> Tensor:
        """T of the module docstring, float32 [in_features, rows], for weights of that shape."""
        if self._cross is None:
            return weight.clone()
        # T - W = W (C - H) (H + damp)^-1, which damping draws towards T = W.
        moved = (self._cross - self.hessian).T @ weight
        half = torch.linalg.solve_triangular(self.factor, moved, upper=True)
        shift = torch.linalg.solve_triangular(self.factor.T, half, upper=False)
        targets: Tensor = weight + self.options.target_share * shift
        return targets

    def square(self, x: Tensor) -> float:
        """tr(x^T H x) of x, [in_features, rows]."""
        total = 0.0
        for first in range(0, len(x), _SQUARE_BLOCK):
            block, before = slice(first, first + _SQUARE_BLOCK), slice(0, first)
            total += self.share_of_square(x, block, self.hessian[block, before] @ x[before])
        return total

    def share_of_square(self, x: Tensor, block: slice, pull: Tensor) -> float:
        """x_b^T (2 H_ba x_a + H_bb x_b), what a block b adds to tr(x^T H x) of the columns a before it.

        Args:
            x: [in_features, rows].
            block: the columns b.
            pull: H_ba x_a, [columns of b, rows].
        """
        own = x[block]
        return float((own * (2 * pull + self.hessian[block, block] @ own)).sum(dtype=torch.float64))


@products_in_float32()
def solve(
    weight: Tensor,
    metric: Metric,
    scheme: QuantScheme,
    *,
    threads: int | None = None,
    name: str = "weight",
) -> Solution:
    """Quantize one matrix.

    Args:
        weight: float32 (out_features, in_features), on the metric's device.
        metric: of its inputs.
        scheme: bits and group size.
        threads: of the data-free solver, which makes the start; all CPUs by default.
        name: what error messages call it.

    Raises:
        TensorShapeError: the matrix does not have the metric's number of columns.
        TensorValueError: it holds NaN, infinity, or values beyond fp16's range.
    """
    rows, columns = weight.shape
    if columns != metric.in_features:
        raise TensorShapeError(f"{name} has {columns} columns, its inputs' Hessian {metric.in_features}")
    hlq.check_range(float(weight.abs().max()), name)
    groups = scheme.groups(columns)
    in_bytes = scheme.param_bits == 8
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, groups, scheme.bits), np.uint8 if in_bytes else np.float16)
    zeros = np.empty((rows, groups), np.int8 if in_bytes else np.float16)
    row_scales = np.empty(rows, np.float16) if in_bytes else None
    error = norm = 0.0
    step = max(1, weights_at_once(weight.device) // columns)
    if weight.device.type == "cpu":
        step = min(step, _ROWS)
    for first in range(0, rows, step):
        some = slice(first, first + step)
        solver = _Solver(weight[some].T.contiguous(), metric, scheme, threads)
        solver.run()
        codes[some] = solver.codes.T.cpu().numpy()
        parameters = solver.parameters.permute(2, 0, 1)
        if row_scales is not None and solver.row_scales is not None:
            row_scales[some] = solver.row_scales.cpu().numpy()
            units = parameters / solver.row_scales[:, None, None]
            parameters = torch.where(solver.row_scales[:, None, None] > 0, units, 0).round()
        scales[some] = parameters[:, :, :-1].cpu().numpy()
        zeros[some] = parameters[:, :, -1].cpu().numpy()
        error += solver.error
        norm += metric.square(weight[some].T)
    planes = pack_codes(codes, scheme.bits)
    matrix = HlqMatrix(planes, scales, zeros, columns, scheme.group_size, row_scales)
    return Solution(matrix, error, norm)


def weights_at_once(device: torch.device) -> int:
    """How many weights `solve` works on at a time, which bounds memory; a GPU needs many to be busy."""
    return 1 << (24 if device.type == "cpu" else 26)


class _Solver:
    """The work on some rows of a matrix.

    Attributes:
        target: T, [columns, rows].
        values: what the quantized matrix is at present, the same shape.
        residual: target - values.
        codes: uint8, the same shape.
        parameters: scales and, last, the zero of every group, [groups, bits + 1, rows].
        row_scales: what they are multiples of, [rows], when they are stored in bytes.
        error: tr(r^T H r) of the residual, after `run`.
    """

    def __init__(self, weight: Tensor, metric: Metric, scheme: QuantScheme, threads: int | None) -> None:
        columns, rows = weight.shape
        self.metric, self.options, self.bits = metric, metric.options, scheme.bits
        self._threads = threads
        self.target = metric.targets(weight)
        self.values = torch.zeros_like(weight)
        self.residual = self.target.clone()  # target - values
        self.codes = torch.zeros((columns, rows), dtype=torch.uint8, device=weight.device)
        self.parameters = weight.new_zeros((scheme.groups(columns), scheme.bits + 1, rows))
        size = scheme.columns_per_group(columns)
        self._groups = [slice(first, min(first + size, columns)) for first in range(0, columns, size)]
        self.row_scales = self._choose_row_scales() if scheme.param_bits == 8 else None

    def run(self) -> None:
        """The first pass and the sweeps."""
        options = self.options
        for index, group in enumerate(self._groups):
            self._first_visit(index, group)
        for _ in range(options.sweeps):
            self.error = sum(self._visit_again(index, group) for index, group in enumerate(self._groups))
        if not options.sweeps:
            self.error = self.metric.square(self.residual)

    def _first_visit(self, index: int, group: slice) -> None:
        factor = self.metric.factor
        own = factor[group, group]
        before = slice(0, group.start)
        spill = factor[before, group].T @ self.residual[before]
        target = self.target[group] + torch.linalg.solve_triangular(own.T, spill, upper=False)
        found = solve_group(
            target,
            own @ own.T,
            self._data_free(target, own.diagonal().square()),
            rounds=self.options.rounds,
            descents=self.options.descents,
            factor=own if self.options.feedback else None,
            row_scales=self.row_scales,
            threads=self._threads,
        )
        self._store(index, group, found)

    def _visit_again(self, index: int, group: slice) -> float:
        """Returns what the group adds to the error of those before it."""
        damped, before, rest = self.metric.damped, slice(0, group.start), slice(group.start, None)
        pull_before = damped[group, before] @ self.residual[before]
        pull = pull_before + damped[group, rest] @ self.residual[rest]
        own = damped[group, group]
        target = self.values[group] + torch.linalg.solve(own, pull)
        found = solve_group(
            target,
            own,
            self.parameters[index],
            rounds=self.options.sweep_rounds,
            descents=self.options.descents,
            codes=self.codes[group],
            row_scales=self.row_scales,
            threads=self._threads,
        )
        self._store(index, group, found)
        return self.metric.share_of_square(self.residual, group, pull_before)

    def _store(self, index: int, group: slice, found: GroupSolution) -> None:
        self.codes[group], self.values[group] = found.codes, found.values
        self.parameters[index] = found.parameters
        self.residual[group] = self.target[group] - found.values

    def _choose_row_scales(self) -> Tensor:
        """Units in which what the data-free solver makes of a row's groups fits bytes."""
        needed = torch.zeros_like(self.target[0])
        for group in self._groups:
            own = self.metric.factor[group, group]
            parameters = self._data_free(self.target[group], own.diagonal().square())
            needed = torch.maximum(needed, parameters[:-1].amax(0) / 255)
            needed = torch.maximum(needed, torch.maximum(-parameters[-1] / 128, parameters[-1] / 127))
        return (needed * _BYTE_MARGIN).half().float()

    def _data_free(self, target: Tensor, importance: Tensor) -> Tensor:
        """Parameters of the data-free solver, [bits + 1, rows]; a GPU leaves uniform grids to the CPU."""
        method = "uniform" if self.options.uniform else "hlq" if self.options.feedback else "ao"
        limited = target.clamp(-hlq.HALF_MAX, hlq.HALF_MAX)
        if target.device.type == "cuda" and method != "uniform":
            from elutq import triton_fit

            return triton_fit.fit_groups(limited, importance, self.bits, method)
        matrix = hlq.fit(
            limited.T.contiguous().cpu().numpy(),
            self.bits,
            -1,
            weights=importance.cpu().numpy(),
            method=method,
            threads=self._threads,
        )
        parameters = np.concatenate([matrix.scales[:, 0].T, matrix.zeros.T])
        return torch.from_numpy(parameters.astype(np.float32)).to(target.device)
