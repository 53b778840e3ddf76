"""Bits and group size of every block linear, for a model of a given size.

Joins what quantizing each matrix would cost (`elutq.sensitivity`) to the choice under a budget
(`elutq.budget`). Embedding and head keep the schemes they have.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elutq import hlq
from elutq.architectures import EngineConfig
from elutq.blocks import BlockReader
from elutq.budget import Option, Target, allocate
from elutq.calibrated import Estimate, check_memory, place, speed
from elutq.checkpoint import Checkpoint, TensorInfo, model_parts, weight_bytes, write_atomically
from elutq.errors import InvalidArgumentError
from elutq.importance import input_importance
from elutq.packing import HlqMatrix
from elutq.report import in_blocks, summarize
from elutq.rotation import RotatedCheckpoint
from elutq.scheme import ModelScheme, QuantScheme
from elutq.sensitivity import (
    LENGTH,
    MEASURED,
    SCHEMES,
    TOKENS,
    Importance,
    Sensitivity,
    Unit,
    measure,
    some_windows,
    units,
)
from elutq.world import choose_device


class Allocation:
    """The choice of schemes for one model.

    Args:
        checkpoint: the full model, perhaps rotated.
        outer: how embedding and head are stored; of its default, only the width of parameters counts.
        found: the model's tensors.
        target: the size that is wanted. One above the largest possible is not used up.
        shard_bytes: most tensor bytes in one weight file.

    Attributes:
        windows: windows of calibration text that it looks at, at most.
        length: tokens in each.
        record: once chosen, for the report, ready for JSON: `tokens`, `measured_at`, `schemes`,
            `expected_kl` (the sum over units), and of each of the `units` its scheme, its `kl` at
            `measured_at` and its `errors` at each of `schemes`.

    Raises:
        InvalidArgumentError: even the smallest model is larger; says which sizes are possible.
    """

    windows, length = TOKENS // LENGTH, LENGTH

    def __init__(
        self,
        checkpoint: Checkpoint | RotatedCheckpoint,
        outer: ModelScheme,
        found: Mapping[str, TensorInfo],
        target: Target,
        shard_bytes: int,
    ) -> None:
        self._checkpoint, self._engine, self._outer = checkpoint, checkpoint.engine, outer
        self._units = units(checkpoint.engine)
        self._schemes = [replace(scheme, param_bits=outer.default.param_bits) for scheme in SCHEMES]
        self._budget = self._bits_for_units(found, target, shard_bytes)
        self._memory: Path | None = None
        self.record: dict[str, Any] = {}

    def _bits_for_units(self, found: Mapping[str, TensorInfo], target: Target, shard_bytes: int) -> int:
        smallest, largest = self._schemes[0], self._schemes[-1]
        least, most = (sum(unit.stored_bits(s) for unit in self._units) for s in (smallest, largest))
        parts = model_parts(self._engine, replace(self._outer, default=largest))
        if target.bits_per_weight is not None:
            matrices = in_blocks(summarize(parts, found).tensors)
            params = sum(matrix.params for matrix in matrices)
            others = 8 * sum(matrix.nbytes for matrix in matrices) - most
            budget = math.floor(target.bits_per_weight * params) - others
            low, high = (math.ceil((bits + others) / params * 1e3) / 1e3 for bits in (least, most))
            possible = f"{low:g} to {high:g} bits per weight"
        else:
            assert target.file_bytes is not None
            specs = [spec for part in parts for spec in part.specs(found)]
            others = 8 * weight_bytes(specs, shard_bytes) - most  # no choice has longer headers
            budget = 8 * target.file_bytes - others
            possible = f"{(least + others) // 8} to {(most + others) // 8} bytes"
        if budget < least:
            raise InvalidArgumentError(
                f"the target is too small: with {smallest.bits} to {largest.bits} bit planes, this model "
                f"can have from {possible}"
            )
        return budget

    def choose(
        self,
        token_ids: NDArray[np.int64],
        method: str,
        importance: bool,
        *,
        threads: int | None,
        device: str | None,
        offload: bool,
        out: Path,
        fingerprint: str,
        announce: Callable[[str], None],
    ) -> ModelScheme:
        """The scheme of least expected KL within the target, most weights having its default.

        Sensitivities are measured once: an interrupted run finds them beside `out`, until `forget`.

        Args:
            token_ids: calibration text, int64 [windows, length]; a part of it is used.
            method: of `hlq.fit`.
            importance: weigh columns by `importance.input_importance`.
            threads: of the solver.
            device: where torch works.
            offload: keep activations in a file.
            out: the folder that is made.
            fingerprint: names everything that sensitivities depend on.
            announce: called before work that takes long.

        Raises:
            InsufficientMemoryError: it would not fit into memory.
        """
        windows = some_windows(self._engine, token_ids)
        self._memory = out.with_name(f".{out.name}.sensitivity.json")
        digest = hashlib.sha256(fingerprint.encode()).hexdigest()
        measured = _recall(self._memory, digest)
        if measured is None:
            chosen, folder = choose_device(device), out.parent if offload else None
            out.parent.mkdir(parents=True, exist_ok=True)
            needed = _estimate(self._engine, self._units, windows.size, chosen)
            check_memory(needed, folder, chosen)
            announce(
                f"measuring the sensitivity of {len(self._units)} matrices on {windows.size} tokens, "
                f"{chosen.type}: about {max(1, round(needed.seconds / 60))} min"
            )
            columns = _Importance(self._checkpoint) if importance else _unknown
            measured = measure(
                BlockReader(self._checkpoint, chosen),
                self._engine,
                windows,
                partial(_fit, columns, method, threads),
                columns,
                device=chosen,
                place=place(needed, folder, chosen),
            )
            _remember(self._memory, digest, measured)
        losses = [measured[unit.name].losses() for unit in self._units]
        options = [
            [Option(unit.stored_bits(s), loss) for s, loss in zip(self._schemes, row, strict=True)]
            for unit, row in zip(self._units, losses, strict=True)
        ]
        choice = allocate(options, self._budget)
        schemes = {unit.name: self._schemes[i] for unit, i in zip(self._units, choice, strict=True)}
        self.record = {
            "tokens": windows.size,
            "measured_at": MEASURED.to_config(),
            "schemes": [scheme.to_config() for scheme in self._schemes],
            "expected_kl": sum(row[i] for row, i in zip(losses, choice, strict=True)),
            "units": {name: scheme.to_config() | asdict(measured[name]) for name, scheme in schemes.items()},
        }
        return self._model_scheme(schemes)

    def _model_scheme(self, schemes: Mapping[str, QuantScheme]) -> ModelScheme:
        weights: Counter[QuantScheme] = Counter()
        for unit in self._units:
            weights[schemes[unit.name]] += unit.weights
        default = max(self._schemes, key=lambda scheme: weights[scheme])
        overrides = {
            spec.name: schemes[unit.name]
            for unit in self._units
            for spec in unit.linears
            if schemes[unit.name] != default
        }
        return ModelScheme(default, {**self._outer.overrides, **overrides})

    def forget(self) -> None:
        """The model is made: what was kept beside it for an interrupted run is deleted."""
        if self._memory is not None:
            self._memory.unlink(missing_ok=True)


class _Importance:
    """Importance of a module's columns; the last one asked for is kept."""

    def __init__(self, checkpoint: Checkpoint | RotatedCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._last: tuple[str, NDArray[np.float32] | None] = ("", None)

    def __call__(self, module: str) -> NDArray[np.float32] | None:
        if module != self._last[0]:
            found = input_importance(module, self._checkpoint.engine, self._checkpoint.read_float32)
            self._last = module, found
        return self._last[1]


def _unknown(module: str) -> None:
    """Columns are not weighed."""


def _fit(
    importance: Importance,
    method: str,
    threads: int | None,
    module: str,
    weight: NDArray[np.float32],
    scheme: QuantScheme,
) -> HlqMatrix:
    return hlq.fit(
        weight,
        scheme.bits,
        scheme.group_size,
        weights=importance(module),
        method=method,
        threads=threads,
        name=f"{module}.weight",
    )


def _estimate(engine: EngineConfig, found: Sequence[Unit], tokens: int, device: torch.device) -> Estimate:
    """Count operations and bytes, as the module docstring of `elutq.sensitivity` does."""
    block = sum(unit.weights for unit in found) // engine.num_hidden_layers
    active = block * engine.num_experts_per_tok // engine.num_experts if engine.num_experts else block
    head = engine.vocab_size * engine.hidden_size
    passes = (len(found) / 2 + 1) * engine.num_hidden_layers
    streams = 4 * tokens * engine.hidden_size * (len(found) + 1)
    in_walk = block + 2 * max(unit.weights for unit in found)  # a unit as it was, and quantized
    at_end = 2 * head + 4 * LENGTH * engine.vocab_size
    return Estimate(
        seconds=2.0 * tokens * (passes * active + (len(found) + 1) * head) / speed(device),
        memory_bytes=4 * max(in_walk, at_end),
        activation_bytes=streams,
    )


def _recall(path: Path, digest: str) -> dict[str, Sensitivity] | None:
    """What `_remember` wrote with the same digest."""
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    if record["of"] != digest:
        return None
    return {name: Sensitivity(s["kl"], tuple(s["errors"])) for name, s in record["units"].items()}


def _remember(path: Path, digest: str, measured: Mapping[str, Sensitivity]) -> None:
    text = json.dumps({"of": digest, "units": {name: asdict(found) for name, found in measured.items()}})
    write_atomically(path, text.encode())
