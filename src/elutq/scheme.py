"""How tensors are quantized: one frozen description, shared by quantizer, file format and engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from elutq.errors import ConfigError, InvalidArgumentError, UnsupportedVersionError

FORMAT_VERSION = 1
QUANT_METHOD = "hlq"
MAX_BITS = 4
#: Columns that share one set of scales. -1 stands for a whole row, as in other quantizers' configs.
GROUP_SIZES = (32, 64, 128, 256, -1)


@dataclass(frozen=True)
class QuantScheme:
    """Bits and group size of one tensor.

    Args:
        bits: bit planes per weight, 1 to 4.
        group_size: consecutive input columns that share scales and zero: 32, 64, 128, 256, or -1 for a
            whole row.

    Raises:
        InvalidArgumentError: a value is outside those.
    """

    bits: int
    group_size: int = 128

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= MAX_BITS:
            raise InvalidArgumentError(f"bits must be 1 to {MAX_BITS}, not {self.bits!r}")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            allowed = ", ".join(map(str, GROUP_SIZES))
            raise InvalidArgumentError(
                f"group_size must be one of {allowed} (-1: a whole row), not {self.group_size!r}"
            )

    def columns_per_group(self, in_features: int) -> int:
        """Columns in a full group of a row of `in_features` columns."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """Groups in a row; the last one may be short."""
        return -(-in_features // self.columns_per_group(in_features))

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Size on disk of an (out_features, in_features) matrix in bits: planes, scales and zeros."""
        planes = self.bits * -(-in_features // 8) * 8
        return out_features * (planes + 16 * (self.bits + 1) * self.groups(in_features))


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

    def to_config(self) -> dict[str, Any]:
        """The `quantization_config` entry of `config.json`."""
        return {
            "quant_method": QUANT_METHOD,
            "version": FORMAT_VERSION,
            "bits": self.default.bits,
            "group_size": self.default.group_size,
            "modules": {
                name: {"bits": s.bits, "group_size": s.group_size}
                for name, s in sorted(self.overrides.items())
            },
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
        if version != FORMAT_VERSION:
            raise UnsupportedVersionError(
                f"the folder is in HLQ format version {version}, "
                f"this release reads version {FORMAT_VERSION}; "
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
        return cls(
            _scheme(config, "quantization_config"),
            {
                name: _scheme(entry, f"quantization_config.modules[{name!r}]")
                for name, entry in modules.items()
            },
            tuple(skipped),
        )


def _scheme(entry: Any, where: str) -> QuantScheme:
    if not isinstance(entry, Mapping) or "bits" not in entry or "group_size" not in entry:
        raise ConfigError(f"{where} must have integer `bits` and `group_size`")
    try:
        return QuantScheme(entry["bits"], entry["group_size"])
    except InvalidArgumentError as error:
        raise ConfigError(f"{where}: {error}") from None
