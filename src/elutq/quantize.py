"""The pipeline of `elutq quantize`: plan, run, report.

Weights go through one piece of a tensor at a time, so peak memory does not grow with the model. Matrices are
independent of each other, and so are their rows; the result depends on neither the pieces nor the threads.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elutq import __version__, hlq
from elutq.architectures import EMBEDDING, HEAD, EngineConfig
from elutq.checkpoint import (
    DEFAULT_SHARD_BYTES,
    Checkpoint,
    CheckpointWriter,
    Part,
    model_parts,
    side_files,
)
from elutq.errors import InvalidArgumentError, TensorValueError, TokenizerError
from elutq.importance import input_importance
from elutq.model_card import CARD_FILE, model_card
from elutq.report import ModelSummary, SquaredError, summarize
from elutq.scheme import MAX_BITS, OUTER_SCHEME, ModelScheme, QuantScheme
from elutq.tokenizer import Tokenizer

REPORT_FILE = "quantization_report.json"

#: `embedding_bits` and `lm_head_bits` that leave the matrix as it is.
KEEP_BITS = 16
#: Embedding and head are quantized by default from this many weights on.
LARGE_MATRIX = 1 << 24

_PIECE = 1 << 24  # weights in work at once

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class QuantizationReport:
    """What was made, how, and how close it is to the original.

    Attributes:
        source: the model as it was given.
        out: the folder that was made.
        model_type: Hugging Face's name of the family.
        settings: the options in effect, `None` resolved.
        versions: of this package, the format, Python and NumPy.
        file_bytes: size of the weight files.
        seconds: of this run; less than the whole work if it continued an earlier one.
        weights_per_second: quantized in this run, over its seconds.
        summary: sizes and errors per tensor and per kind.
    """

    source: str
    out: str
    model_type: str
    settings: dict[str, Any]
    versions: dict[str, Any]
    file_bytes: int
    seconds: float
    weights_per_second: float
    summary: ModelSummary

    def to_json(self) -> str:
        """The content of `quantization_report.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: int,
    group_size: int = 128,
    param_bits: int = 16,
    method: str = "hlq",
    lm_head_bits: int | None = None,
    embedding_bits: int | None = None,
    importance: bool | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantize a model folder without data.

    Interrupted or killed, it leaves `OUT.partial`, and the same call goes on from there; `out` appears only
    when it is complete. The weight files are the same, byte for byte, however often the work was interrupted.

    Args:
        source: a local Hugging Face folder or a hub id.
        out: the folder to make.
        bits: of the linear modules inside the decoder blocks, 1 to 4.
        group_size: of the same; 32, 64, 128, 256, or -1 for a whole row.
        param_bits: of a scale or zero, in all matrices that are quantized: 16, or 8 under one fp16 factor per
            row. With 8, `hlq.to_8bit` follows the method, and a uniform grid does not stay quite uniform.
        method: one of `hlq.METHODS`.
        lm_head_bits: 1 to 4 (in groups of 128), or 16 to leave the head as it is. By default 4 if it has at
            least 2^24 weights, else 16. A tied head is the embedding.
        embedding_bits: the same for the embedding.
        importance: weigh columns by `importance.input_importance`; by default for method "hlq" alone, so that
            the others stay what they are known as.
        threads: all CPUs by default.
        overwrite: replace an existing quantized model at `out`, or partial output of another run.
        shard_bytes: most tensor bytes in one weight file.
        progress: called with weights done, weights in all, and the name of the tensor in work.

    Raises:
        InvalidArgumentError: an option is outside what is supported, or two contradict each other.
        TensorValueError: a tensor holds NaN or infinity, or values beyond fp16's range.
        OutputExistsError: `out` exists.
        ResumeMismatchError: `OUT.partial` is of another source, or made with other settings.
        DiskSpaceError: the disk is too small, or full.
        ElutqError: the source cannot be read (see `Checkpoint.open`).
    """
    started = time.monotonic()
    if method not in hlq.METHODS:
        raise InvalidArgumentError(f"method must be one of {', '.join(hlq.METHODS)}, not {method!r}")
    if importance is None:
        importance = method == "hlq"
    if threads is not None and threads < 1:
        raise InvalidArgumentError(f"threads must be at least 1, not {threads}")
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise InvalidArgumentError(f"shard_bytes must be a positive integer, not {shard_bytes!r}")
    with Checkpoint.open(source) as checkpoint:
        if checkpoint.scheme is not None:
            raise InvalidArgumentError(f"{source} is quantized already; give the original model")
        blocks = QuantScheme(bits, group_size, param_bits)
        scheme = plan(checkpoint.engine, blocks, lm_head_bits, embedding_bits)
        parts = model_parts(checkpoint.engine, scheme)
        found = {name: checkpoint.info(name) for name in checkpoint.names()}
        writer = CheckpointWriter(
            out,
            [spec for part in parts for spec in part.specs(found)],
            _fingerprint(checkpoint, scheme, method, importance),
            shard_bytes=shard_bytes,
            overwrite=overwrite,
        )
        with writer:
            job = _Job(
                checkpoint, writer, method, importance, threads, progress or (lambda done, total, name: None)
            )
            weights = job.run(parts)
            errors = {part.name: SquaredError(**writer.done[part.name]) for part in parts if part.scheme}
            seconds = time.monotonic() - started
            config = {**checkpoint.config, "quantization_config": scheme.to_config()}
            report = QuantizationReport(
                source=os.fspath(source),
                out=str(writer.out),
                model_type=checkpoint.engine.model_type,
                settings={**scheme.to_config(), "method": method, "importance": importance},
                versions={
                    "elutq": __version__,
                    "format": scheme.version,
                    "python": platform.python_version(),
                    "numpy": np.__version__,
                },
                file_bytes=writer.file_bytes,
                seconds=seconds,
                weights_per_second=weights / seconds,
                summary=summarize(parts, found, errors),
            )
            card = model_card(
                os.fspath(source),
                checkpoint.path,
                report.settings,
                report.summary,
                chat=_has_chat_template(checkpoint.path),
            )
            texts = {REPORT_FILE: report.to_json(), CARD_FILE: card}
            writer.finish(config, side_files(checkpoint.path), texts)
    return report


def plan(
    engine: EngineConfig, blocks: QuantScheme, lm_head_bits: int | None, embedding_bits: int | None
) -> ModelScheme:
    """Which matrices are quantized, and how; the options are those of `quantize`.

    Raises:
        InvalidArgumentError: a number of bits is not supported, or a tied head is to differ.
    """
    for option, value in (("lm_head_bits", lm_head_bits), ("embedding_bits", embedding_bits)):
        if value not in (None, KEEP_BITS, *range(1, MAX_BITS + 1)):
            raise InvalidArgumentError(f"{option} must be 1 to {MAX_BITS} or {KEEP_BITS}, not {value!r}")
    chosen = {EMBEDDING: embedding_bits}
    if not engine.tie_word_embeddings:
        chosen[HEAD] = lm_head_bits
    elif embedding_bits is None:
        chosen[EMBEDDING] = lm_head_bits
    elif lm_head_bits not in (None, embedding_bits):
        raise InvalidArgumentError(
            f"lm_head_bits {lm_head_bits} contradicts embedding_bits {embedding_bits}: this model's head "
            "is its embedding (tie_word_embeddings); give one of them"
        )
    default = OUTER_SCHEME.bits if engine.vocab_size * engine.hidden_size >= LARGE_MATRIX else KEEP_BITS
    overrides = {}
    for name, bits in chosen.items():
        bits = default if bits is None else bits
        if bits != KEEP_BITS:
            overrides[name] = replace(OUTER_SCHEME, bits=bits, param_bits=blocks.param_bits)
    return ModelScheme(blocks, overrides)


class _Job:
    """Carries the parts of a model from a checkpoint to a writer."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        writer: CheckpointWriter,
        method: str,
        importance: bool,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._writer = writer
        self._method = method
        self._importance = importance
        self._threads = threads
        self._progress = progress

    def run(self, parts: list[Part]) -> int:
        """Write every part that an earlier run did not finish; returns the number of weights quantized."""
        total = sum(map(_weights, parts))
        waiting = [part for part in parts if part.name not in self._writer.done]
        done = total - sum(map(_weights, waiting))
        for part, following in zip(waiting, [*waiting[1:], None], strict=True):
            if following:
                self._checkpoint.prefetch(following.source)
            for count in self._quantize(part) if part.scheme else self._copy(part):
                done += count
                self._progress(done, total, part.name)
        return sum(_weights(part) for part in waiting if part.scheme)

    def _quantize(self, part: Part) -> Iterator[int]:
        """Quantize a matrix; yields the weights done after each piece."""
        assert part.scheme is not None
        rows, columns = part.shape
        source = self._checkpoint.read(part.source)
        importance = self._input_importance(part) if self._importance else None
        measured = SquaredError(0.0, 0.0)
        for piece in _row_pieces(rows, columns):
            weight = source[piece]
            matrix = hlq.fit(
                weight,
                part.scheme.bits,
                part.scheme.group_size,
                weights=importance,
                method=self._method,
                threads=self._threads,
                name=part.source,
            )
            if part.scheme.param_bits == 8:
                matrix = hlq.to_8bit(weight, matrix, importance, threads=self._threads)
            measured += SquaredError(*hlq.squared_error(weight, matrix, threads=self._threads))
            for name, array in matrix.arrays.items():
                of_rows = array if name == "planes" else array[None]  # [planes or 1, rows, ...]
                for plane, values in enumerate(of_rows):
                    first = (plane * rows + piece.start) * values[0].size
                    self._writer.write(f"{part.name}.{name}", values, at=first)
            self._checkpoint.release(part.source)
            yield weight.size
        self._writer.commit(part.name, part.tensors, asdict(measured))

    def _input_importance(self, part: Part) -> NDArray[np.float32] | None:
        def read(name: str, rows: slice) -> NDArray[np.float32]:
            values = self._checkpoint.read_float32(name, rows)
            self._checkpoint.release(name)
            return values

        return input_importance(part.name, self._checkpoint.engine, read)

    def _copy(self, part: Part) -> Iterator[int]:
        """Copy a matrix or vector as it is; yields the weights done after each piece."""
        tensor = self._checkpoint.read(part.source)
        rows, columns = part.shape if tensor.ndim == 2 else (1, tensor.size)
        for piece in _row_pieces(rows, columns):
            values = tensor.reshape(rows, columns)[piece]
            if not np.isfinite(values).all():
                raise TensorValueError(f"{part.source} holds NaN or infinity; check the source model")
            self._writer.write(part.source, values, at=piece.start * columns)
            self._checkpoint.release(part.source)
            yield values.size
        self._writer.commit(part.name, part.tensors, {})


def _weights(part: Part) -> int:
    return math.prod(part.shape)


def _row_pieces(rows: int, columns: int) -> Iterator[slice]:
    """Slices of whole rows, of at most `_PIECE` weights where a row is not longer."""
    step = max(1, _PIECE // columns)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def _fingerprint(checkpoint: Checkpoint, scheme: ModelScheme, method: str, importance: bool) -> str:
    """Names the source's content and every setting that the result depends on."""
    files = sorted({checkpoint.info(name).file for name in checkpoint.names()})
    return json.dumps(
        {
            "elutq": __version__,
            "method": method,
            "importance": importance,
            "scheme": scheme.to_config(),
            "config": checkpoint.config,
            "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        },
        sort_keys=True,
    )


def _has_chat_template(folder: Path) -> bool:
    try:
        return Tokenizer.from_folder(folder).has_chat_template
    except TokenizerError:  # models without a tokenizer may be quantized, too
        return False
