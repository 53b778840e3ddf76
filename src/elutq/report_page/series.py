"""What the charts show, taken out of a report."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, TypeGuard

#: kind of linear -> block -> value
ByKind = dict[str, dict[int, float]]

_BLOCK = re.compile(r"\.layers\.(\d+)\.")


def weight_errors(report: Mapping[str, Any]) -> ByKind:
    """Relative squared error of the weights of each block linear, where it is known and above 0."""
    return _by_kind(report, lambda tensor: tensor["relative_error"])


def output_errors(report: Mapping[str, Any]) -> ByKind:
    """Relative squared error of the outputs of each block linear, where it is known and above 0."""
    outputs = report.get("outputs") or {}
    return _by_kind(report, lambda tensor: outputs.get(tensor["name"], {}).get("output_error"))


def block_errors(report: Mapping[str, Any]) -> dict[int, float]:
    """Relative squared error of each block's output, where it is known and above 0."""
    return {
        block["index"]: block["output_error"]
        for block in report.get("blocks") or []
        if _is_positive(block["output_error"])
    }


def reconstruction(report: Mapping[str, Any]) -> ByKind:
    """The same before and after block reconstruction, on windows held out; empty without."""
    blocks = [block for stage in report["stages"] for block in stage.get("blocks", ())]
    return {
        when: {block["index"]: block[when] for block in blocks if _is_positive(block[when])}
        for when in ("before", "after")
        if any(_is_positive(block[when]) for block in blocks)
    }


def stages(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """What each stage came to, ready to read; empty unless there are several."""
    return [_stage(stage) for stage in report["stages"] if len(report["stages"]) > 1]


def _stage(stage: Mapping[str, Any]) -> dict[str, str]:
    blocks = stage.get("blocks", ())
    steps = sum(block["steps"] for block in blocks) if blocks else stage.get("steps")
    nll = stage["nll"]
    return {
        "stage": stage["name"],
        "nll": f"{nll['quantized']:.4f}" if nll else "",
        "increase": f"{nll['quantized'] - nll['full']:+.4f}" if nll else "",
        "KL divergence": f"{nll['kl']:.4f}" if nll else "",
        "steps": f"{steps:,}" if steps else "",
        "seconds": f"{stage['seconds']:,.0f}",
    }


def mixed_bits(report: Mapping[str, Any]) -> ByKind:
    """Bits of each block linear; empty when all have the same."""
    bits = _by_kind(report, lambda tensor: tensor["bits"])
    different = {value for blocks in bits.values() for value in blocks.values()}
    return bits if len(different) > 1 else {}


def title(report: Mapping[str, Any]) -> str:
    """The model's name and its bits."""
    settings = report["settings"]
    bits = settings["bits"]
    if settings.get("target"):
        bits = f"{report['summary']['linear_bits_per_weight']:.3g}"
    return f"{PurePath(report['source']).name or report['source']}, {bits}-bit HLQ"


def facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few figures that say most: what it is, and its value."""
    summary = report["summary"]
    found = [
        ("bits per weight", f"{summary['bits_per_weight']:.3f}"),
        ("in the blocks", f"{summary['linear_bits_per_weight']:.3f}"),
        ("size", f"{summary['nbytes'] / 1e6:,.1f} MB"),
    ]
    if nll := report.get("nll"):
        found += [
            ("nll, full", f"{nll['full']:.4f}"),
            ("nll, quantized", f"{nll['quantized']:.4f}"),
            ("increase", f"{nll['quantized'] - nll['full']:+.4f}"),
            ("KL divergence", f"{nll['kl']:.4f}"),
        ]
    return found


def _by_kind(report: Mapping[str, Any], value: Callable[[Mapping[str, Any]], float | None]) -> ByKind:
    found: ByKind = {}
    for block, tensor in _block_linears(report):
        number = value(tensor)
        if _is_positive(number):
            found.setdefault(tensor["kind"], {})[block] = number
    return found


def _block_linears(report: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for tensor in report["summary"]["tensors"]:
        block = _BLOCK.search(tensor["name"])
        if block is not None and len(tensor["shape"]) == 2:
            yield int(block[1]), tensor


def _is_positive(number: Any) -> TypeGuard[float]:
    """Whether a logarithmic axis can show it."""
    return number is not None and math.isfinite(number) and number > 0
