"""The description of how a model is quantized. What readers reject is in test_checkpoint_format.py."""

import json
from typing import Any

import pytest

from elutq.errors import InvalidArgumentError
from elutq.scheme import GROUP_SIZES, ModelScheme, QuantScheme


@pytest.mark.parametrize(
    ("group_size", "in_features", "groups", "columns"),
    [(128, 256, 2, 128), (128, 257, 3, 128), (128, 100, 1, 128), (32, 33, 2, 32), (-1, 100, 1, 100)],
)
def test_groups_cover_a_row(group_size: int, in_features: int, groups: int, columns: int) -> None:
    scheme = QuantScheme(2, group_size)
    assert scheme.groups(in_features) == groups
    assert scheme.columns_per_group(in_features) == columns


@pytest.mark.parametrize(
    ("bits", "group_size", "effective"), [(2, 128, 2.375), (2, 64, 2.75), (3, 128, 3.5), (4, 128, 4.625)]
)
def test_stored_bits_are_the_published_ones(bits: int, group_size: int, effective: float) -> None:
    assert QuantScheme(bits, group_size).stored_bits(10, 1024) == effective * 10 * 1024


@pytest.mark.parametrize(
    ("bits", "group_size", "effective"), [(2, 128, 2.1875), (3, 64, 3.5), (4, 128, 4.3125)]
)
def test_8_bit_parameters_cost_half_and_16_bits_per_row(bits: int, group_size: int, effective: float) -> None:
    assert QuantScheme(bits, group_size, 8).stored_bits(10, 1024) == effective * 10 * 1024 + 16 * 10


def test_stored_bits_count_tails() -> None:
    # 5 bytes in each of 3 planes, and 2 groups of 4 parameters, in each of 7 rows.
    assert QuantScheme(3, 32).stored_bits(7, 33) == 7 * (3 * 40 + 2 * 4 * 16)


@pytest.mark.parametrize("bits", [0, 5, -1, 2.0, "2", True, None])
def test_bits_are_1_to_4(bits: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="bits must be 1 to 4"):
        QuantScheme(bits)


@pytest.mark.parametrize("group_size", [0, 1, 16, 100, 512, -2, 128.0, None])
def test_group_sizes_are_listed(group_size: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="group_size must be one of"):
        QuantScheme(2, group_size)


@pytest.mark.parametrize("param_bits", [0, 4, 32, 8.0, "8", True, None])
def test_param_bits_are_16_or_8(param_bits: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="param_bits must be 16 or 8"):
        QuantScheme(2, 128, param_bits)


@pytest.mark.parametrize(("default", "override", "version"), [(16, 16, 1), (8, 8, 2), (8, 16, 2), (16, 8, 2)])
def test_a_config_is_of_the_lowest_version_that_has_it(default: int, override: int, version: int) -> None:
    scheme = ModelScheme(QuantScheme(2, 128, default), {"a": QuantScheme(4, 64, override)})
    config = scheme.to_config()
    assert config["version"] == scheme.version == version
    assert config.get("param_bits", 16) == default
    assert config["modules"]["a"].get("param_bits", 16) == override
    assert ("param_bits" in json.dumps(config)) == (version == 2)
    assert ModelScheme.from_config(json.loads(json.dumps(config))) == scheme


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_config_comes_back(group_size: int) -> None:
    scheme = ModelScheme(
        QuantScheme(2, group_size), {"b": QuantScheme(4, 128), "a": QuantScheme(1, -1)}, ("d", "c")
    )
    restored = ModelScheme.from_config(json.loads(json.dumps(scheme.to_config())))
    assert restored == ModelScheme(scheme.default, scheme.overrides, ("c", "d"))


def test_block_linears_fall_back_to_the_default() -> None:
    scheme = ModelScheme(QuantScheme(2), {"a": QuantScheme(4)}, ("b",))
    assert scheme.for_block_linear("a") == QuantScheme(4)
    assert scheme.for_block_linear("b") is None
    assert scheme.for_block_linear("c") == QuantScheme(2)
