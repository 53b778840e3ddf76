"""What a model folder must hold, given its config: the tensors, their dtypes and shapes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from elutq.architectures import (
    HEAD,
    EngineConfig,
    LinearSpec,
    block_linears,
    outer_linears,
    routers,
    vectors,
)
from elutq.checkpoint.safetensors import TensorInfo, TensorSpec
from elutq.errors import (
    ConfigError,
    MissingTensorError,
    TensorDtypeError,
    TensorShapeError,
    UnexpectedTensorError,
)
from elutq.scheme import ModelScheme, QuantScheme

FLOAT_DTYPES = ("BF16", "F16", "F32")

# Buffers that old exports carry along and that nothing needs: they are recomputed from the config.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a folder must hold."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A matrix or vector of a model, stored in one tensor or, quantized, in three or four.

    Attributes:
        name: module name of a matrix, full tensor name of a norm or bias.
        shape: (out_features, in_features), or (size,).
        scheme: how it is quantized, or None.
        tensors: what is stored, by name.
    """

    name: str
    shape: tuple[int, ...]
    scheme: QuantScheme | None
    tensors: Mapping[str, ExpectedTensor]

    @property
    def source(self) -> str:
        """Name of its tensor in a model that is not quantized."""
        return f"{self.name}.weight" if len(self.shape) == 2 else self.name

    def specs(self, found: Mapping[str, TensorInfo]) -> list[TensorSpec]:
        """What is stored, exactly; `found` tells the dtype of a tensor that may have one of several."""
        return [
            TensorSpec(name, tensor.dtypes[0] if self.scheme else found[name].dtype, tensor.shape)
            for name, tensor in self.tensors.items()
        ]


def linears(engine: EngineConfig) -> list[LinearSpec]:
    """Every matrix of the model: embedding, block linears, routers, and the head unless it is tied."""
    embedding, *head = outer_linears(engine)
    return [embedding, *block_linears(engine), *routers(engine), *head]


def module_schemes(engine: EngineConfig, scheme: ModelScheme | None) -> dict[str, QuantScheme]:
    """The quantized modules of a model, in model order, each with its scheme.

    Raises:
        ConfigError: `scheme` names a module that the model does not have, or quantizes a router.
    """
    if scheme is None:
        return {}
    blocks = {linear.name for linear in block_linears(engine)}
    known = [linear.name for linear in linears(engine)]
    # A tied head may be listed as kept, as other tools do, but it has no scheme of its own.
    for name in {*scheme.overrides, *scheme.modules_to_not_convert} - {*known}:
        if name != HEAD or name in scheme.overrides:
            raise ConfigError(
                f"quantization_config names {name!r:.200}, which is no linear module of this model"
            )
    # A router is tiny, and an expert chosen in error costs more than its bits could save.
    for router in routers(engine):
        if router.name in scheme.overrides:
            raise ConfigError(
                f"quantization_config.modules names {router.name}, but a router is never quantized"
            )
    schemes = {
        name: scheme.for_block_linear(name) if name in blocks else scheme.overrides.get(name)
        for name in known
    }
    return {name: found for name, found in schemes.items() if found is not None}


def hlq_tensors(linear: LinearSpec, scheme: QuantScheme) -> dict[str, ExpectedTensor]:
    """The tensors of a quantized module, by name."""
    name, rows, columns = linear
    groups = scheme.groups(columns)
    in_bytes = scheme.param_bits == 8
    tensors = {
        f"{name}.planes": ExpectedTensor(("U8",), (scheme.bits, rows, -(-columns // 8))),
        f"{name}.scales": ExpectedTensor(("U8" if in_bytes else "F16",), (rows, groups, scheme.bits)),
        f"{name}.zeros": ExpectedTensor(("I8" if in_bytes else "F16",), (rows, groups)),
    }
    if in_bytes:
        tensors[f"{name}.row_scales"] = ExpectedTensor(("F16",), (rows,))
    return tensors


def model_parts(engine: EngineConfig, scheme: ModelScheme | None) -> list[Part]:
    """Everything a model's folder must hold: matrices in model order, then norms and biases.

    Raises:
        ConfigError: `scheme` names a module that the model does not have.
    """
    schemes = module_schemes(engine, scheme)
    parts = []
    for linear in linears(engine):
        shape = (linear.out_features, linear.in_features)
        if linear.name in schemes:
            found = schemes[linear.name]
            parts.append(Part(linear.name, shape, found, hlq_tensors(linear, found)))
        else:
            tensor = ExpectedTensor(FLOAT_DTYPES, shape)
            parts.append(Part(linear.name, shape, None, {f"{linear.name}.weight": tensor}))
    for vector in vectors(engine):
        tensor = ExpectedTensor(FLOAT_DTYPES, (vector.size,))
        parts.append(Part(vector.name, (vector.size,), None, {vector.name: tensor}))
    return parts


def check_contents(
    engine: EngineConfig, scheme: ModelScheme | None, found: Mapping[str, TensorInfo], where: str
) -> None:
    """Compare the folder's tensors with what its config calls for.

    Raises:
        MissingTensorError: a tensor is not there.
        UnexpectedTensorError: a tensor is there that the config does not call for.
        TensorDtypeError: a dtype is not the one required.
        TensorShapeError: a shape is not the one required.
        ConfigError: `scheme` names a module that the model does not have.
    """
    expected = {name: tensor for part in model_parts(engine, scheme) for name, tensor in part.tensors.items()}
    missing = [name for name in expected if name not in found]
    if missing:
        raise MissingTensorError(
            f"{where} lacks {_some(missing)}, which config.json calls for; get the complete folder"
        )
    extra = [name for name in found if name not in expected and not _is_ignored(name, engine, scheme)]
    if extra:
        raise UnexpectedTensorError(
            f"{where} holds {_some(extra)}, which config.json does not call for; "
            "the config belongs to another model, or the model is of a kind that is not supported"
        )
    for name, required in expected.items():
        info = found[name]
        if info.dtype not in required.dtypes:
            raise TensorDtypeError(
                f"{name} in {where} is {info.dtype}, but must be {' or '.join(required.dtypes)}"
            )
        if info.shape != required.shape:
            raise TensorShapeError(
                f"{name} in {where} has shape {list(info.shape)}, "
                f"but config.json calls for {list(required.shape)}"
            )


def _is_ignored(name: str, engine: EngineConfig, scheme: ModelScheme | None) -> bool:
    """Tensors that folders not written by us may carry: they repeat what is stored elsewhere."""
    if scheme is not None:
        return False
    return name.endswith(_IGNORED_SUFFIXES) or (engine.tie_word_embeddings and name == f"{HEAD}.weight")


def _some(names: Iterable[str]) -> str:
    names = [name if name.isprintable() else repr(name) for name in names]
    shown = ", ".join(name[:200] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"
