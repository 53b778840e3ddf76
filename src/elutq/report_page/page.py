"""The report as one HTML page that needs no other file, no network and no script."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from elutq.report_page.charts import error_charts, level_charts
from elutq.report_page.levels import LevelHistogram
from elutq.report_page.series import facts, stages, title
from elutq.report_page.theme import DARK, LIGHT, Theme

_NONE = "\N{EN DASH}"


def report_page(report: Mapping[str, Any], histograms: Sequence[LevelHistogram]) -> str:
    """The report as a page: figures, warnings, charts, samples, and every tensor.

    It follows the reader's choice of light or dark. Text from the report is escaped.

    Args:
        report: content of `quantization_report.json`.
        histograms: groups to show, from `level_histograms`; may be empty.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"image": _image, "error": _error, "value": _value}
    template = environment.from_string((files(__package__) / "page.html").read_text(encoding="utf-8"))
    tensors: dict[str, list[Mapping[str, Any]]] = {}
    for tensor in report["summary"]["tensors"]:
        tensors.setdefault(tensor["kind"], []).append(tensor)
    return template.render(
        title=title(report),
        facts=facts(report),
        stages=stages(report),
        report=report,
        outputs=report.get("outputs") or {},
        warnings=report.get("warnings") or [],
        generation=report.get("generation"),
        tables={
            "Settings": report["settings"],
            "Calibration": report.get("calibration") or {},
            "Run": {
                "source": report["source"],
                "weight files": f"{report['file_bytes'] / 1e6:,.1f} MB",
                "seconds": f"{report['seconds']:,.1f}",
                **{f"version of {name}": value for name, value in report["versions"].items()},
            },
        },
        charts=error_charts(report),
        levels=level_charts(histograms),
        calibrated=any(histogram.hlq_error is None for histogram in histograms),
        weighed=any(histogram.weighed for histogram in histograms),
        tensors=tensors,
        themes={"light": asdict(LIGHT), "dark": asdict(DARK)},
        light=LIGHT,
        dark=DARK,
    )


def _image(chart: Any, theme: Theme) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(chart.svg(theme)).decode()


def _error(number: float | None) -> str:
    """A relative error to three digits."""
    if number is None:
        return _NONE
    if not 1e-4 <= abs(number) < 1:
        return f"{number:.3g}"
    return f"{number:.{2 - math.floor(math.log10(abs(number)))}f}"


def _value(value: Any) -> str:
    """An entry of a table of settings."""
    if value is None or value in ([], {}):
        return _NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return str(value)
