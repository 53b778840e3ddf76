"""The levels of a few groups beside those of a uniform grid: why HLQ fits better, on real weights."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elutq import hlq
from elutq.architectures import EMBEDDING, HEAD
from elutq.checkpoint import Checkpoint
from elutq.errors import InvalidArgumentError
from elutq.packing import HlqMatrix, patterns
from elutq.report import SquaredError
from elutq.rotation import RotatedCheckpoint


@dataclass(frozen=True, eq=False)
class LevelHistogram:
    """One group of weights of one row, and the values that two grids of as many bits have for them.

    Attributes:
        module: name of the linear module.
        row: of the matrix.
        group: of the row.
        weights: the original ones, float32 [columns].
        hlq_levels: of the quantized model, ascending, float32 [2**bits].
        uniform_levels: of the best-clipped uniform grid, ascending, float32 [2**bits].
        hlq_error: squared error over squared norm of the group, each weight at the nearest of its levels;
            None of a calibrated model, whose levels are not chosen for that.
        uniform_error: the same of the uniform grid; None likewise.
        weighed: whether both errors, and the choice of the uniform grid, weigh columns by importance.
    """

    module: str
    row: int
    group: int
    weights: NDArray[np.float32]
    hlq_levels: NDArray[np.float32]
    uniform_levels: NDArray[np.float32]
    hlq_error: float | None
    uniform_error: float | None
    weighed: bool


def level_histograms(
    source: Checkpoint | RotatedCheckpoint,
    quantized: Checkpoint,
    count: int = 4,
    *,
    calibrated: bool = False,
    importance: Callable[[str], NDArray[np.float32] | None] | None = None,
) -> list[LevelHistogram]:
    """Groups from the first block to the last, from `q_proj` to `down_proj`.

    Of each matrix it is the group in the middle of the row in the middle, so none is chosen for its error.
    Only those rows of the original are read.

    Args:
        source: the original model.
        quantized: the HLQ model made from it.
        count: how many groups at most, each of another matrix; models with few matrices give fewer.
        calibrated: whether the model was quantized for the outputs of its layers, not for its weights.
        importance: module name -> how much each of its input columns matters, float32 (in_features,), as it
            was given to `hlq.fit`; None where columns are equal.

    Raises:
        InvalidArgumentError: `quantized` is not quantized, or `count` is not positive.
        CheckpointError: a tensor is missing in `source` or cannot be read.
    """
    if quantized.scheme is None:
        raise InvalidArgumentError(f"{quantized.path} is not quantized; give the folder of the HLQ model")
    if count < 1:
        raise InvalidArgumentError(f"count must be at least 1, not {count}")
    return [
        _histogram(source, quantized, module, calibrated, None if importance is None else importance(module))
        for module in _spread(quantized, count)
    ]


def _spread(quantized: Checkpoint, count: int) -> list[str]:
    """Modules spread over the blocks, and over the linears of a block."""
    blocks: dict[str, list[str]] = {}
    for module in quantized.schemes:
        if module not in (EMBEDDING, HEAD):
            blocks.setdefault(module.rsplit(".", 2)[0], []).append(module)
    if not blocks:
        return []
    chosen: dict[str, None] = {}
    for place in np.linspace(0, 1, count) if count > 1 else [0.5]:
        modules = list(blocks.values())[round(place * (len(blocks) - 1))]
        chosen[modules[round(place * (len(modules) - 1))]] = None
    return list(chosen)


def _histogram(
    source: Checkpoint | RotatedCheckpoint,
    quantized: Checkpoint,
    module: str,
    calibrated: bool,
    importance: NDArray[np.float32] | None,
) -> LevelHistogram:
    scheme, linear = quantized.schemes[module], quantized.linears[module]
    row, group = linear.out_features // 2, scheme.groups(linear.in_features) // 2
    one_row = slice(row, row + 1)
    hlq_levels = _levels(quantized.read_hlq(module), row, group)
    width = scheme.columns_per_group(linear.in_features)
    columns = slice(group * width, (group + 1) * width)
    weights = source.read_float32(f"{module}.weight", one_row)[:, columns]
    weighing = None if importance is None else importance[columns]
    uniform = hlq.fit(weights, scheme.bits, -1, weights=weighing, method="uniform", name=module)
    return LevelHistogram(
        module=module,
        row=row,
        group=group,
        weights=weights[0].copy(),
        hlq_levels=hlq_levels,
        uniform_levels=_levels(uniform, 0, 0),
        hlq_error=None if calibrated else _relative_error(weights, _nearest(weights, hlq_levels), weighing),
        uniform_error=None if calibrated else _relative_error(weights, hlq.dequantize(uniform), weighing),
        weighed=weighing is not None,
    )


def _levels(matrix: HlqMatrix, row: int, group: int) -> NDArray[np.float32]:
    """What the codes of a group stand for, ascending, float32 [2**bits]."""
    scales = matrix.scales[row, group].astype(np.float32)
    levels = matrix.zeros[row, group].astype(np.float32) + patterns(matrix.bits).astype(np.float32) @ scales
    unit = np.float32(1 if matrix.row_scales is None else matrix.row_scales[row])
    return np.sort(unit * levels)


def _nearest(weights: NDArray[np.float32], levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The level nearest to each weight."""
    nearest: NDArray[np.float32] = levels[np.abs(weights[..., None] - levels).argmin(-1)]
    return nearest


def _relative_error(
    exact: NDArray[np.float32], stored: NDArray[np.float32], weighing: NDArray[np.float32] | None
) -> float:
    wide = exact.astype(np.float64)
    weighing = np.ones(1, np.float32) if weighing is None or not weighing.any() else weighing
    error, norm = (weighing * np.square(wide - stored)).sum(), (weighing * np.square(wide)).sum()
    return SquaredError(float(error), float(norm)).relative
