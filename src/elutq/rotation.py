"""Rotation of a model: its outliers are spread over all columns, and what it computes stays the same.

A residual-stream vector h may be written in any orthonormal basis: h' = Q h. RMSNorm without its weight
commutes with that, since it divides by a length, so every matrix absorbs the change offline and inference
costs nothing (SliceGPT, arXiv 2401.15024, section 3; QuaRot, arXiv 2404.00456, section 4). With g the weight
of the norm in front, Q [hidden, hidden] and P [head_dim, head_dim] orthogonal:

    embedding                        e' = Q e               for each row e
    reads the stream after a norm    W' = W diag(g) Q^T     and the norm's weight becomes ones
    writes to the stream             W' = Q W,  b' = Q b
    v_proj                           W' = P W,  b' = P b    for the rows of each key-value head, besides
    o_proj                           W' = W P^T             for the columns of each query head, besides

Attention averages values over positions, which commutes with P. The final norm's weight goes into the head
alone, so a tied head becomes a matrix of its own.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elutq import __version__
from elutq.architectures import EMBEDDING, FINAL_NORM, HEAD, engine_config, kind_of
from elutq.checkpoint import (
    DEFAULT_SHARD_BYTES,
    Checkpoint,
    CheckpointWriter,
    TensorInfo,
    model_parts,
    side_files,
)
from elutq.checkpoint.contents import linears
from elutq.checkpoint.safetensors import NUMPY_DTYPES
from elutq.errors import InvalidArgumentError, MissingTensorError, TensorValueError

Floats = NDArray[np.float64]

_RADIX = 64  # of the Hadamard transform: small enough to be fast, large enough for matrix products
_LARGEST_LEAD = 256
_TILE = 1 << 18  # weights rotated at once: in float64 they fit into a core's cache
_PIECE = 1 << 24  # weights written at once
_ALL = slice(None)

# What a matrix's rows or columns may run along.
_STREAM, _HEADS = "stream", "heads"


@dataclass(frozen=True)
class _Role:
    """Where a matrix stands: what its columns and rows run along, and the norm whose output it reads."""

    columns: str | None = None
    rows: str | None = None
    norm: str | None = None


_AFTER_ATTENTION_NORM = _Role(columns=_STREAM, norm="input_layernorm.weight")
_AFTER_MLP_NORM = _Role(columns=_STREAM, norm="post_attention_layernorm.weight")

#: Kind of a module (`architectures.kind_of`) -> its role.
_ROLES = {
    "embedding": _Role(columns=_STREAM),
    "q_proj": _AFTER_ATTENTION_NORM,
    "k_proj": _AFTER_ATTENTION_NORM,
    "v_proj": replace(_AFTER_ATTENTION_NORM, rows=_HEADS),
    "o_proj": _Role(columns=_HEADS, rows=_STREAM),
    "gate_proj": _AFTER_MLP_NORM,
    "up_proj": _AFTER_MLP_NORM,
    "down_proj": _Role(rows=_STREAM),
    "router": _AFTER_MLP_NORM,
    "head": _Role(columns=_STREAM, norm=FINAL_NORM),
}


class Rotation:
    """A random orthogonal matrix that is applied fast.

        Q = (O x H_p / sqrt(p)) diag(s)

    for a size of m p, p the largest power of two in it: H_p the Hadamard matrix of +-1, O [m, m] a random
    orthogonal matrix ([1] for a power of two), s random signs, x the Kronecker product. H_p is itself the
    product of smaller Hadamard matrices, and each of them costs one pass of small matrix products.

    Attributes:
        size: rows and columns of Q.

    Args:
        size: at least 1.
        rng: where O and s come from.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size = size
        power = size & -size
        odd, radices = size // power, [power]
        while odd * radices[0] > _LARGEST_LEAD and radices[0] % _RADIX == 0:
            radices[:1] = [radices[0] // _RADIX, _RADIX]
        lead: NDArray[Any] = np.kron(_random_orthogonal(odd, rng), _hadamard(radices[0]))
        self._factors: list[Floats] = [lead, *map(_hadamard, radices[1:])]
        self._signs = rng.choice([-1.0, 1.0], size)
        self._scale = 1 / math.sqrt(power)

    def apply(self, values: Floats, rows: slice = _ALL) -> Floats:
        """Rows of Q V for matrices V, float64 [..., size, n] -> [..., rows, n]; rows left out cost little."""
        *batch, _, n = values.shape
        start, stop, _ = rows.indices(self.size)
        lead, *others = self._factors
        block = self.size // len(lead)  # rows of the result that share one of lead
        first, last = start // block, -(-stop // block)
        result = (values * self._signs[:, None]).reshape(-1, len(lead), block * n)
        result = _multiply(lead[first:last], result)
        length = block
        for factor in others:
            length //= len(factor)
            result = _multiply(factor, result.reshape(-1, len(factor), length * n))
        skipped = start - first * block
        result = result.reshape(*batch, -1, n)[..., skipped : skipped + stop - start, :]
        return result * self._scale


def _multiply(factor: Floats, values: Floats) -> Floats:
    """[k, f] times each of [b, f, n]; b single columns are one product."""
    product: Floats = factor @ values if values.shape[-1] > 1 else (values[..., 0] @ factor.T)[..., None]
    return product


def _hadamard(size: int) -> Floats:
    """Sylvester's matrix of +-1, for a power of two."""
    matrix: Floats = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _random_orthogonal(size: int, rng: np.random.Generator) -> Floats:
    """Uniformly distributed; [1] for size 1."""
    if size == 1:
        return np.ones((1, 1))
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return q * np.sign(np.diag(r))


@dataclass(frozen=True)
class _Plan:
    """How a tensor of the rotated model follows from one of the original, `source`, of `shape`."""

    source: str
    shape: tuple[int, ...]
    columns: Rotation | None = None
    rows: Rotation | None = None
    norm: str | None = None
    ones: bool = False

    @property
    def changed(self) -> bool:
        return self.ones or self.columns is not None or self.rows is not None


class RotatedCheckpoint:
    """A rotated view of an open checkpoint, computed tensor by tensor, in float64, as it is read.

    It offers what `Checkpoint` does for reading a full-precision model. Tensors that the rotation changes are
    F32 where the original is, and otherwise F16: rotated weights are of even size and have no more zeros at
    the end of their mantissa, so BF16's range would be unused and its 8 bits would round eight times as
    coarsely, for the same number of bytes. All others keep their dtype. The view stays open as long as the
    checkpoint does.

    Attributes:
        path: the original's folder.
        config: the original's, but with a head that is not tied, and the dtype of the rotated embedding.
        engine: the numbers the engine needs, from that config.
        linears: module name -> its name and shape: embedding, block linears, head.
        scheme: None, as of every model that is not quantized.
        seed: as given.

    Args:
        checkpoint: an open full-precision model.
        seed: of the random signs and odd factors, 0 or more.

    Raises:
        InvalidArgumentError: the checkpoint is quantized, or the seed negative.
    """

    scheme: None = None

    def __init__(self, checkpoint: Checkpoint, seed: int = 0) -> None:
        if checkpoint.scheme is not None:
            raise InvalidArgumentError(f"{checkpoint.path} is quantized already; rotate the original model")
        if seed < 0:
            raise InvalidArgumentError(f"the seed of a rotation must be 0 or more, not {seed}")
        self.path = checkpoint.path
        self.seed = seed
        self._checkpoint = checkpoint
        self.config = {**checkpoint.config, "tie_word_embeddings": False}
        self.engine = engine_config(self.config)
        self.linears = {linear.name: linear for linear in linears(self.engine)}
        self._plans = self._plan(
            {
                _STREAM: Rotation(self.engine.hidden_size, np.random.default_rng((seed, 0))),
                _HEADS: Rotation(self.engine.head_dim, np.random.default_rng((seed, 1))),
            }
        )
        dtype = "float32" if self.info(f"{EMBEDDING}.weight").dtype == "F32" else "float16"
        self.config |= {key: dtype for key in ("dtype", "torch_dtype") if key in self.config}

    def _plan(self, rotations: Mapping[str | None, Rotation]) -> dict[str, _Plan]:
        """Every tensor of the rotated model, in model order."""
        tied = self._checkpoint.engine.tie_word_embeddings
        modules, norms = {}, set()
        for name, linear in self.linears.items():
            role = _ROLES[kind_of(name)]
            norm = role.norm
            if norm is not None:
                layer = name.split(".")[:3] if norm != FINAL_NORM else []  # model.layers.N
                norm = ".".join([*layer, norm])
                norms.add(norm)
            source = EMBEDDING if name == HEAD and tied else name
            columns, rows = rotations.get(role.columns), rotations.get(role.rows)
            modules[f"{name}.weight"] = _Plan(f"{source}.weight", linear[1:], columns, rows, norm)
            modules[f"{name}.bias"] = _Plan(f"{name}.bias", (linear.out_features,), rows=rows)
        plans = {}
        for part in model_parts(self.engine, None):
            other = _Plan(part.source, part.shape, ones=part.source in norms)
            plans[part.source] = modules.get(part.source, other)
        return plans

    def names(self) -> Iterator[str]:
        """Every tensor of the rotated model, in model order."""
        return iter(self._plans)

    def files(self) -> list[tuple[str, int, int]]:
        """`Checkpoint.files` of the original."""
        return self._checkpoint.files()

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a rotated tensor, and the place of the one it is made from.

        Raises:
            MissingTensorError: there is no such tensor.
        """
        plan = self._find(name)
        info = self._checkpoint.info(plan.source)
        return replace(info, dtype="F16") if plan.changed and info.dtype != "F32" else info

    def read(self, name: str, rows: slice = _ALL) -> NDArray[Any]:
        """Consecutive rows of a tensor in the dtype that `info` tells, rounded once.

        Raises:
            MissingTensorError: there is no such tensor.
            TensorValueError: the original holds NaN or infinity, or its rotation values beyond the dtype.
        """
        if not self._find(name).changed:
            return self._checkpoint.read(name, rows)
        values = self.read_float32(name, rows)
        dtype = NUMPY_DTYPES[self.info(name).dtype]
        if values.size and np.abs(values).max() > np.finfo(dtype).max:
            raise TensorValueError(
                f"{name}, rotated, holds values beyond {dtype.name}'s range; check the source model"
            )
        return values.astype(dtype, copy=False)

    def read_float32(self, name: str, rows: slice = _ALL) -> NDArray[np.float32]:
        """Consecutive rows of a tensor in float32, rounded once. Takes memory for them and little else.

        Raises:
            MissingTensorError: there is no such tensor.
            TensorValueError: the original holds NaN or infinity.
        """
        plan = self._find(name)
        if not plan.changed:
            return self._checkpoint.read_float32(name, rows)
        if plan.ones:
            return np.ones(plan.shape, np.float32)[rows]
        if len(plan.shape) == 1:
            return self._bias(plan)[rows]
        start, stop, _ = rows.indices(plan.shape[0])
        return self._matrix(plan, start, max(start, stop))

    def _bias(self, plan: _Plan) -> NDArray[np.float32]:
        assert plan.rows is not None
        values = self._read_float64(plan.source).reshape(-1, plan.rows.size, 1)
        return plan.rows.apply(values).astype(np.float32).reshape(-1)

    def _matrix(self, plan: _Plan, start: int, stop: int) -> NDArray[np.float32]:
        """Tile by tile: as many whole runs of rows and columns that are rotated together as fit into one."""
        columns = plan.shape[1]
        result = np.empty((stop - start, columns), np.float32)
        if start == stop:
            return result
        gain = self._read_float64(plan.norm) if plan.norm else None
        run = plan.columns.size if plan.columns else 1
        height = plan.rows.size if plan.rows else min(max(1, _TILE // columns), stop - start)
        width = max(1, _TILE // (height * run)) * run
        for top in range(start - start % height if plan.rows else start, stop, height):
            wanted = slice(max(start - top, 0), min(stop - top, height))
            for left in range(0, columns, width):
                across = slice(left, min(left + width, columns))
                tile = self._read_float64(plan.source, slice(top, top + height), across)
                if gain is not None:
                    tile *= gain[across]
                if plan.columns:
                    tile = plan.columns.apply(tile.reshape(-1, run, 1)).reshape(tile.shape)
                tile = plan.rows.apply(tile, wanted) if plan.rows else tile[wanted]
                result[top + wanted.start - start : top + wanted.stop - start, across] = tile
        return result

    def _read_float64(self, name: str, rows: slice = _ALL, columns: slice = _ALL) -> Floats:
        values = self._checkpoint.read_float32(name, rows, columns).astype(np.float64)
        if not np.isfinite(values).all():
            raise TensorValueError(f"{name} holds NaN or infinity; check the source model")
        return values

    def prefetch(self, name: str) -> None:
        """`Checkpoint.prefetch` of the tensor that it is made from."""
        self._checkpoint.prefetch(self._find(name).source)

    def release(self, name: str) -> None:
        """`Checkpoint.release` of the tensor that it is made from."""
        self._checkpoint.release(self._find(name).source)

    def _find(self, name: str) -> _Plan:
        try:
            return self._plans[name]
        except KeyError:
            raise MissingTensorError(f"{self.path}, rotated, has no tensor {name!r:.200}") from None


def rotate_model(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a rotated full-precision folder, of the dtypes that `RotatedCheckpoint` tells.

    Interrupted or killed, it leaves `OUT.partial`, and the same call goes on from there; `out` appears only
    when it is complete. Memory is that of a piece of 2^24 weights.

    Args:
        source: a local Hugging Face folder or a hub id.
        out: the folder to make.
        seed: of the rotation, 0 or more.
        shard_bytes: most tensor bytes in one weight file.

    Raises:
        InvalidArgumentError: the source is quantized, or the seed negative.
        TensorValueError: a tensor holds NaN, infinity, or, rotated, values beyond fp16's range.
        OutputExistsError: `out` exists.
        ResumeMismatchError: `OUT.partial` is of another source, or made with other settings.
        DiskSpaceError: the disk is too small, or full.
        ElutqError: the source cannot be read (see `Checkpoint.open`).
    """
    with Checkpoint.open(source) as checkpoint:
        rotated = RotatedCheckpoint(checkpoint, seed)
        parts = model_parts(rotated.engine, None)
        found = {name: rotated.info(name) for name in rotated.names()}
        fingerprint = {"elutq": __version__, "seed": seed, "config": rotated.config, "files": rotated.files()}
        with CheckpointWriter(
            out,
            [spec for part in parts for spec in part.specs(found)],
            json.dumps({"rotation": fingerprint}, sort_keys=True),
            shard_bytes=shard_bytes,
        ) as writer:
            for part in parts:
                if part.name in writer.done:
                    continue
                columns = math.prod(part.shape[1:])
                step = max(1, _PIECE // columns)
                for first in range(0, part.shape[0], step):
                    values = rotated.read(part.source, slice(first, first + step))
                    writer.write(part.source, values, at=first * columns)
                    rotated.release(part.source)
                writer.commit(part.name, part.tensors, {})
            writer.finish(rotated.config, side_files(rotated.path))
