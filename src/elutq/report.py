"""What a model weighs: size, effective bits per weight and error, per tensor and per kind of tensor."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from elutq.architectures import kind_of
from elutq.checkpoint import Checkpoint, Part, TensorInfo, model_parts

_OUTER_KINDS = ("embedding", "head")


@dataclass(frozen=True)
class SquaredError:
    """How far a quantized matrix is from the original: `error` is ||W - W~||^2, `norm` is ||W||^2."""

    error: float
    norm: float

    def __add__(self, other: "SquaredError") -> "SquaredError":
        return SquaredError(self.error + other.error, self.norm + other.norm)

    @property
    def relative(self) -> float:
        """||W - W~||^2 / ||W||^2; of a matrix of zeros, the error itself."""
        return self.error / self.norm if self.norm > 0 else self.error


@dataclass(frozen=True)
class TensorSummary:
    """A matrix or vector of a model.

    Attributes:
        name: module name of a matrix, full tensor name of a norm or bias.
        kind: of a matrix as `architectures.kind_of` has it, "q_proj" for example; else "norm" or "bias".
        shape: of the original.
        params: number of weights.
        bits: bit planes; 16 or 32 if it is not quantized.
        group_size: columns per group; None if it is not quantized.
        nbytes: size in the file, scales and zeros included.
        bits_per_weight: 8 * nbytes / params.
        relative_error: squared error over squared norm; None if it is not quantized or not known.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    params: int
    bits: int
    group_size: int | None
    nbytes: int
    bits_per_weight: float
    relative_error: float | None


@dataclass(frozen=True)
class KindSummary:
    """All tensors of a kind together; `bits` are the different ones among them."""

    kind: str
    tensors: int
    params: int
    bits: tuple[int, ...]
    nbytes: int
    bits_per_weight: float
    relative_error: float | None


@dataclass(frozen=True)
class ModelSummary:
    """A whole model.

    Attributes:
        params: number of weights; a tied head counts once.
        nbytes: size of all tensors.
        bits_per_weight: of the whole model.
        linear_bits_per_weight: of the linear modules inside the decoder blocks.
        kinds: per kind of tensor.
        tensors: per tensor.
    """

    params: int
    nbytes: int
    bits_per_weight: float
    linear_bits_per_weight: float
    kinds: tuple[KindSummary, ...]
    tensors: tuple[TensorSummary, ...]


def summarize(
    parts: Iterable[Part], found: Mapping[str, TensorInfo], errors: Mapping[str, SquaredError] | None = None
) -> ModelSummary:
    """Add a model's parts up.

    Args:
        parts: what the model stores.
        found: dtype of each tensor that is not quantized, by name.
        errors: quantized module -> its error, where known.
    """
    errors = errors or {}
    tensors = [_summarize_part(part, found, errors.get(part.name)) for part in parts]
    by_kind: dict[str, list[TensorSummary]] = {}
    for tensor in tensors:
        by_kind.setdefault(tensor.kind, []).append(tensor)
    return ModelSummary(
        params=sum(tensor.params for tensor in tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        bits_per_weight=_bits_per_weight(tensors),
        linear_bits_per_weight=_bits_per_weight(in_blocks(tensors)),
        kinds=tuple(_summarize_kind(kind, members, errors) for kind, members in by_kind.items()),
        tensors=tuple(tensors),
    )


def in_blocks(tensors: Iterable[TensorSummary]) -> list[TensorSummary]:
    """The matrices inside the decoder blocks, routers included."""
    return [tensor for tensor in tensors if len(tensor.shape) == 2 and tensor.kind not in _OUTER_KINDS]


def describe(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in a model folder, quantized or not, ready for JSON.

    Keys: `path`, `format` ("hlq", "safetensors" or "pytorch"), `model_type`, `scheme` (`quantization_config`,
    or None), the main dimensions, and those of ModelSummary.

    Raises:
        ElutqError: the folder cannot be read (see `Checkpoint.open`).
    """
    with Checkpoint.open(source) as checkpoint:
        found = {name: checkpoint.info(name) for name in checkpoint.names()}
        engine = checkpoint.engine
        plain = "pytorch" if any(info.file.suffix == ".bin" for info in found.values()) else "safetensors"
        summary = summarize(model_parts(engine, checkpoint.scheme), found)
        return {
            "path": str(checkpoint.path),
            "format": plain if checkpoint.scheme is None else "hlq",
            "model_type": engine.model_type,
            "scheme": None if checkpoint.scheme is None else checkpoint.scheme.to_config(),
            "vocab_size": engine.vocab_size,
            "hidden_size": engine.hidden_size,
            "intermediate_size": engine.intermediate_size,
            "num_hidden_layers": engine.num_hidden_layers,
            "num_attention_heads": engine.num_attention_heads,
            "num_key_value_heads": engine.num_key_value_heads,
            "head_dim": engine.head_dim,
            "max_position_embeddings": engine.max_position_embeddings,
            "tie_word_embeddings": engine.tie_word_embeddings,
            "num_experts": engine.num_experts,
            "num_experts_per_tok": engine.num_experts_per_tok,
            "moe_intermediate_size": engine.moe_intermediate_size,
            **asdict(summary),
        }


def _summarize_part(part: Part, found: Mapping[str, TensorInfo], error: SquaredError | None) -> TensorSummary:
    specs = part.specs(found)
    params = math.prod(part.shape)
    nbytes = sum(spec.nbytes for spec in specs)
    return TensorSummary(
        name=part.name,
        kind=_kind(part),
        shape=part.shape,
        params=params,
        bits=part.scheme.bits if part.scheme else 8 * nbytes // params,
        group_size=part.scheme.group_size if part.scheme else None,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / params,
        relative_error=error.relative if error else None,
    )


def _summarize_kind(
    kind: str, tensors: list[TensorSummary], errors: Mapping[str, SquaredError]
) -> KindSummary:
    known = [errors[tensor.name] for tensor in tensors if tensor.name in errors]
    return KindSummary(
        kind=kind,
        tensors=len(tensors),
        params=sum(tensor.params for tensor in tensors),
        bits=tuple(sorted({tensor.bits for tensor in tensors})),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        bits_per_weight=_bits_per_weight(tensors),
        relative_error=sum(known, SquaredError(0.0, 0.0)).relative if known else None,
    )


def _bits_per_weight(tensors: list[TensorSummary]) -> float:
    return 8 * sum(tensor.nbytes for tensor in tensors) / sum(tensor.params for tensor in tensors)


def _kind(part: Part) -> str:
    if len(part.shape) == 1:
        return "bias" if part.name.endswith(".bias") else "norm"
    return kind_of(part.name)
