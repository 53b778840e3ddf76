"""How much a model's output changes when one of its matrices alone is quantized.

    kl(u) = mean over tokens KL(full model || full model with unit u at `MEASURED`)        in nats

A unit is a matrix of a block or, of a mixture of experts, the gate (up, down) projections of all its experts
together. One walk through the blocks carries the full model's residual stream and, for every unit met so
far, that of the model in which it alone is quantized; the head turns them into distributions.

For small errors KL is quadratic in them. A least-squares fit of relative squared error e consists of the
matrix times 1 - e and of noise at right angles to it whose square is e (1 - e): the noise adds to KL in
proportion to e, the shrinkage in proportion to e^2. With e(u, s) from data-free fits of some rows, the KL to
expect at another scheme s is

    kl(u, s) = kl(u) * (r + r^2) / 2        r = e(u, s) / e(u, MEASURED)

taking both to be equal at `MEASURED`, as they are on average; `docs/accuracy.md` has the measurements.

    tokens    `TOKENS`, or as many as keep all streams within `_STREAM_BYTES`
    memory    the streams, tokens * units * hidden_size floats, perhaps in a file; one block
    time      a unit's stream passes the blocks from its own on: units / 2 + 1 passes of the whole model,
              113 passes of 1024 tokens for a model of 32 blocks, a third of its perplexity on WikiText-2
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elutq import hlq
from elutq.architectures import EngineConfig, LinearSpec, block_linears
from elutq.blocks import BlockReader, DecoderBlock
from elutq.layerwise import MEMORY, Activations, Place
from elutq.packing import HlqMatrix
from elutq.scheme import QuantScheme

#: What a unit may become.
SCHEMES = tuple(QuantScheme(bits, group_size) for bits in (2, 3, 4) for group_size in (128, 64))
#: The scheme whose effect is measured.
MEASURED = SCHEMES[0]
#: Tokens of a window, and of all windows together.
LENGTH = 256
TOKENS = 1024

_STREAM_BYTES = 4 << 30
#: Rows of a unit that its error at each scheme is estimated from, and of each of its matrices at least.
_ROWS = 256
_LEAST_ROWS = 8

#: (module, its weights or some rows of them, scheme) -> those rows quantized.
Fit = Callable[[str, NDArray[np.float32], QuantScheme], HlqMatrix]
#: module -> importance of its columns; None: all count the same.
Importance = Callable[[str], NDArray[np.float32] | None]


@dataclass(frozen=True)
class Unit:
    """Matrices that get one scheme.

    Attributes:
        name: of the module; with `*` for the number of the expert if there are several.
        linears: the modules.
    """

    name: str
    linears: tuple[LinearSpec, ...]

    def stored_bits(self, scheme: QuantScheme) -> int:
        """Their size on disk, together."""
        return sum(scheme.stored_bits(spec.out_features, spec.in_features) for spec in self.linears)

    @property
    def weights(self) -> int:
        """How many weights they have."""
        return sum(spec.out_features * spec.in_features for spec in self.linears)


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing a unit does.

    Attributes:
        kl: mean KL(full || quantized) per token in nats, at `MEASURED`.
        errors: relative squared error of the weights, columns weighed, at each of `SCHEMES`.
    """

    kl: float
    errors: tuple[float, ...]

    def losses(self) -> tuple[float, ...]:
        """The KL to expect at each of `SCHEMES`."""
        measured = self.errors[SCHEMES.index(MEASURED)]
        if measured == 0:
            return (0.0,) * len(SCHEMES)
        ratios = (error / measured for error in self.errors)
        return tuple(self.kl * (ratio + ratio**2) / 2 for ratio in ratios)


def units(engine: EngineConfig) -> list[Unit]:
    """The units of a model, in model order."""
    members: dict[str, list[LinearSpec]] = {}
    for spec in block_linears(engine):
        members.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.*.", spec.name), []).append(spec)
    return [Unit(name, tuple(linears)) for name, linears in members.items()]


def some_windows(engine: EngineConfig, token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of windows of tokens, int64 [windows, length], as many and as much as `measure` is meant for."""
    per_token = 4 * engine.hidden_size * (len(units(engine)) + 1)
    tokens = min(TOKENS, max(1, _STREAM_BYTES // per_token))
    length = min(LENGTH, tokens, token_ids.shape[1])
    return token_ids[: tokens // length, :length]


def measure(
    reader: BlockReader,
    engine: EngineConfig,
    windows: NDArray[np.int64],
    fit: Fit,
    importance: Importance,
    *,
    device: torch.device,
    place: Place = MEMORY,
    progress: Callable[[str], None] = lambda unit: None,
) -> dict[str, Sensitivity]:
    """Measure every unit of a model.

    Args:
        reader: of the full model.
        engine: its numbers.
        windows: int64 [count, length], token ids; all are used.
        fit: quantizes.
        importance: of the columns, in errors.
        device: where the work is done.
        place: where the streams are kept.
        progress: called with the unit that is next.

    Returns:
        Name of each unit -> its sensitivity, in model order.
    """
    with torch.inference_mode():
        found = units(engine)
        streams = Activations(place)  # the full model's, and that of each unit's model from 1 on
        streams[0] = reader.embed(torch.from_numpy(windows))
        errors: list[tuple[float, ...]] = []
        for index in range(engine.num_hidden_layers):
            block = reader.block(index)
            position = reader.positions(windows.shape[1]), reader.mask(index, windows.shape[1])
            earlier = len(errors)
            for unit in found[earlier:]:
                if unit.linears[0].name not in block.linears:
                    break
                progress(unit.name)
                errors.append(_errors(block, unit, fit, importance))
                with _quantized(block, unit, fit):
                    streams[len(errors)] = block(streams[0].to(device), *position)
            for stream in range(earlier + 1):
                streams[stream] = block(streams[stream].to(device), *position)
        divergences = _divergences(reader, streams, len(found), device)
    return {
        unit.name: Sensitivity(kl, error) for unit, kl, error in zip(found, divergences, errors, strict=True)
    }


def _errors(block: DecoderBlock, unit: Unit, fit: Fit, importance: Importance) -> tuple[float, ...]:
    """Relative squared error of some rows of the unit at each of `SCHEMES`."""
    rows = max(_LEAST_ROWS, _ROWS // len(unit.linears))
    errors, norm = np.zeros(len(SCHEMES)), 0.0
    for spec in unit.linears:
        weight = _weight(block, spec.name)
        some = np.ascontiguousarray(weight[:: max(1, len(weight) // rows)])
        columns = importance(spec.name)
        weigh = np.ones(spec.in_features, np.float32) if columns is None else columns
        norm += float((np.square(some) @ weigh).sum())
        for i, scheme in enumerate(SCHEMES):
            residual = some - hlq.dequantize(fit(spec.name, some, scheme))
            errors[i] += float((np.square(residual) @ weigh).sum())
    return tuple(map(float, errors / norm)) if norm > 0 else (0.0,) * len(SCHEMES)


@contextmanager
def _quantized(block: DecoderBlock, unit: Unit, fit: Fit) -> Iterator[None]:
    """The unit of the block is quantized for a while."""
    linears = [(spec.name, block.linears[spec.name]) for spec in unit.linears]
    kept = [linear.weight.data for _, linear in linears]
    try:
        for name, linear in linears:
            matrix = fit(name, _weight(block, name), MEASURED)
            linear.weight.data = torch.from_numpy(hlq.dequantize(matrix)).to(linear.weight)
        yield
    finally:
        for (_, linear), weight in zip(linears, kept, strict=True):
            linear.weight.data = weight


def _weight(block: DecoderBlock, module: str) -> NDArray[np.float32]:
    weight: NDArray[np.float32] = block.linears[module].weight.float().cpu().numpy()
    return weight


def _divergences(reader: BlockReader, streams: Activations, count: int, device: torch.device) -> list[float]:
    """KL of streams 1 to `count` from stream 0, the mean over tokens; one window at a time.

    As sum_i p_i (x_i + exp(-x_i) - 1), x_i = log(p_i / q_i): the same as long as p and q sum to one, but no
    term is negative, and rounding counts only beside x.
    """
    head = reader.head()
    totals, tokens = np.zeros(count), 0

    def log_probabilities(hidden: Tensor) -> Tensor:
        return torch.log_softmax((reader.head_input(hidden.to(device)) @ head.T).float(), dim=-1)

    for window in range(len(streams[0])):
        full = log_probabilities(streams[0][window])
        p = full.exp()
        tokens += len(full)
        for stream in range(1, count + 1):
            x = full - log_probabilities(streams[stream][window])
            totals[stream - 1] += float((p * (x + torch.expm1(-x))).sum(dtype=torch.float64))
    return [float(total) / tokens for total in totals]
