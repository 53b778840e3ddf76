"""How tensors are quantized: one frozen description, shared by quantizer, file format and engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from elutq.errors import ConfigError, InvalidArgumentError, UnsupportedVersionError

#: Versions of the file format that can be read.
FORMAT_VERSIONS = (1, 2)
QUANT_METHOD = "hlq"
MAX_BITS = 4
#: Columns that share one set of scales. -1 stands for a whole row, as in other quantizers' configs.
GROUP_SIZES = (32, 64, 128, 256, -1)
#: Bits of a scale or zero: fp16, or a byte under one fp16 factor per row.
PARAM_BITS = (16, 8)


@dataclass(frozen=True)
class QuantScheme:
    """Bits and group size of one tensor, and how its scales and zeros are stored.

    Args:
        bits: bit planes per weight, 1 to 4.
        group_size: consecutive input columns that share scales and zero: 32, 64, 128, 256, or -1 for a
            whole row.
        param_bits: 16 for scales and zeros in fp16; 8 for bytes under one fp16 factor per row.

    Raises:
        InvalidArgumentError: a value is outside those.
    """

    bits: int
    group_size: int = 128
    param_bits: int = 16

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= MAX_BITS:
            raise InvalidArgumentError(f"bits must be 1 to {MAX_BITS}, not {self.bits!r}")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            allowed = ", ".join(map(str, GROUP_SIZES))
            raise InvalidArgumentError(
                f"group_size must be one of {allowed} (-1: a whole row), not {self.group_size!r}"
            )
        if type(self.param_bits) is not int or self.param_bits not in PARAM_BITS:
            raise InvalidArgumentError(f"param_bits must be 16 or 8, not {self.param_bits!r}")

    def columns_per_group(self, in_features: int) -> int:
        """Columns in a full group of a row of `in_features` columns."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """Groups in a row; the last one may be short."""
        return -(-in_features // self.columns_per_group(in_features))

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Size on disk of an (out_features, in_features) matrix in bits: planes and parameters."""
        planes = self.bits * -(-in_features // 8) * 8
        parameters = self.param_bits * (self.bits + 1) * self.groups(in_features)
        row_scale = 16 if self.param_bits == 8 else 0
        return out_features * (planes + parameters + row_scale)

    def to_config(self) -> dict[str, int]:
        """Its entries in `quantization_config`; `param_bits` only where it is not 16."""
        config = {"bits": self.bits, "group_size": self.group_size}
        return config if self.param_bits == 16 else {**config, "param_bits": self.param_bits}


#: Of embedding and head when they are quantized by default; their groups are of this size at any bit width.
OUTER_SCHEME = QuantScheme(bits=4, group_size=128)


@dataclass(frozen=True)
class ModelScheme:
    """Which modules of a model are quantized, and how: the content of `quantization_config`.

    Args:
        default: scheme of every linear module inside the decoder blocks that is not named below.
        overrides: module name (without `.weight`) -> its own scheme; also how `lm_head` and
            `model.embed_tokens` are listed when they are quantized.
        modules_to_not_convert: linear modules kept in 16 or 32 bits (Hugging Face's name for it).
    """

    default: QuantScheme
    overrides: Mapping[str, QuantScheme] = field(default_factory=dict)
    modules_to_not_convert: tuple[str, ...] = ()

    def for_block_linear(self, name: str) -> QuantScheme | None:
        """Scheme of the decoder-block linear `name`, or None when it is kept in 16 bits."""
        if name in self.modules_to_not_convert:
            return None
        return self.overrides.get(name, self.default)

    @property
    def version(self) -> int:
        """The lowest version of the file format that has all of this."""
        schemes = (self.default, *self.overrides.values())
        return 2 if any(scheme.param_bits == 8 for scheme in schemes) else 1

    def to_config(self) -> dict[str, Any]:
        """The `quantization_config` entry of `config.json`."""
        return {
            "quant_method": QUANT_METHOD,
            "version": self.version,
            **self.default.to_config(),
            "modules": {name: scheme.to_config() for name, scheme in sorted(self.overrides.items())},
            "modules_to_not_convert": sorted(self.modules_to_not_convert),
        }

    @classmethod
    def from_config(cls, config: Any) -> "ModelScheme":
        """Parse a `quantization_config` entry.

        Raises:
            UnsupportedVersionError: another quantization method or format version.
            ConfigError: an entry is missing or malformed.
        """
        if not isinstance(config, Mapping):
            raise ConfigError("quantization_config must be a JSON object")
        if config.get("quant_method") != QUANT_METHOD:
            raise UnsupportedVersionError(
                f"quant_method is {config.get('quant_method')!r:.80}, "
                f"but only {QUANT_METHOD!r} folders can be read; "
                "quantize the original model with `elutq quantize`"
            )
        version = config.get("version")
        if type(version) is not int:
            raise ConfigError("quantization_config.version must be an integer")
        if version not in FORMAT_VERSIONS:
            raise UnsupportedVersionError(
                f"the folder is in HLQ format version {version}, "
                f"this release reads versions {' and '.join(map(str, FORMAT_VERSIONS))}; "
                "upgrade elutq or quantize again"
            )
        modules = config.get("modules", {})
        skipped = config.get("modules_to_not_convert", [])
        if not isinstance(modules, Mapping):
            raise ConfigError("quantization_config.modules must be a JSON object")
        if not isinstance(skipped, list) or not all(isinstance(s, str) for s in skipped):
            raise ConfigError("quantization_config.modules_to_not_convert must be a list of module names")
        both = sorted(modules.keys() & set(skipped))
        if both:
            raise ConfigError(
                f"quantization_config lists {both[0]!r:.200} in both modules and modules_to_not_convert"
            )
        scheme = cls(
            _scheme(config, "quantization_config"),
            {
                name: _scheme(entry, f"quantization_config.modules[{name!r}]")
                for name, entry in modules.items()
            },
            tuple(skipped),
        )
        if scheme.version > version:
            raise ConfigError(
                f"quantization_config has param_bits 8, which version {version} of the format does not; "
                f"its version must be {scheme.version}"
            )
        return scheme


def _scheme(entry: Any, where: str) -> QuantScheme:
    if not isinstance(entry, Mapping) or "bits" not in entry or "group_size" not in entry:
        raise ConfigError(f"{where} must have integer `bits` and `group_size`")
    try:
        return QuantScheme(entry["bits"], entry["group_size"], entry.get("param_bits", 16))
    except InvalidArgumentError as error:
        raise ConfigError(f"{where}: {error}") from None
