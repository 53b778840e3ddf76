"""Charts of a quantization report, drawn by matplotlib's object interface: no window, no global state."""

import io
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elutq.errors import MissingDependencyError
from elutq.report_page.levels import LevelHistogram
from elutq.report_page.series import (
    ByKind,
    block_errors,
    facts,
    mixed_bits,
    output_errors,
    reconstruction,
    stages,
    title,
    weight_errors,
)
from elutq.report_page.theme import LIGHT, MARKERS, Theme

try:
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it tells of caches it builds
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap, to_rgb
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ImportError as error:
    raise MissingDependencyError(
        f"drawing a report needs {error.name or 'matplotlib'}; pip install 'elutq[quantize]'"
    ) from None

_DPI, _WIDTH, _PAD = 160, 12.0, 0.12  # of the picture; inches
_SMALL, _TEXT, _LARGE = 8.0, 9.0, 15.0  # points


@dataclass(frozen=True)
class Chart:
    """A chart with what is said about it.

    Attributes:
        title: its heading.
        caption: how to read it.
        alt: what it shows, for those who do not see it.
        size: width and height in inches.
        draw: draws it, in a theme.
    """

    title: str
    caption: str
    alt: str
    size: tuple[float, float]
    draw: Callable[[FigureBase, Theme], None]

    def svg(self, theme: Theme) -> bytes:
        """The chart as an SVG file without a background."""
        figure = Figure(figsize=self.size, layout="constrained", facecolor="none")
        self.draw(figure, theme)
        return _render(figure, "svg")


def report_figure(report: Mapping[str, Any], histograms: Sequence[LevelHistogram]) -> bytes:
    """The report as one picture, on light paper.

    Args:
        report: content of `quantization_report.json`.
        histograms: groups to show, from `level_histograms`; may be empty.

    Returns:
        A PNG file, 1920 pixels wide.
    """
    rows = [[chart] for chart in error_charts(report)]
    levels = level_charts(histograms)
    rows += [levels[i : i + 2] for i in range(0, len(levels), 2)]
    lines = _headlines(report)
    heights = [0.55 + 0.25 * len(lines), *(max(chart.size[1] for chart in row) + 0.45 for row in rows)]
    figure = Figure(
        figsize=(_WIDTH, sum(heights)),
        dpi=_DPI,
        layout=ConstrainedLayoutEngine(w_pad=_PAD, h_pad=0.06),
        facecolor=LIGHT.paper,
    )
    bands = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _headline(bands[0], title(report), lines, heights[0])
    for band, row in zip(bands[1:], rows, strict=True):
        for part, chart in zip(band.subfigures(1, len(row), squeeze=False)[0], row, strict=True):
            part.set_facecolor("none")
            part.suptitle(
                chart.title,
                x=_PAD * len(row) / _WIDTH,
                ha="left",
                fontsize=_TEXT + 1.5,
                color=LIGHT.ink,
                parse_math=False,
            )
            chart.draw(part, LIGHT)
    return _render(figure, "png")


def error_charts(report: Mapping[str, Any]) -> list[Chart]:
    """Charts of errors and bits along the blocks: those that the report has data for."""
    charts = []
    left = ", before finetuning" if stages(report) else ""
    panels = {
        "weights": weight_errors(report),
        f"outputs on the calibration data{left}": output_errors(report),
    }
    panels = {name: errors for name, errors in panels.items() if errors}
    if panels:
        charts.append(
            Chart(
                "Error along the depth",
                "Relative squared error of each linear, block by block. Cool colors are attention, warm ones "
                "the MLP. The scale is logarithmic.",
                "; ".join(f"Relative squared error of the {name}: {_range(e)}" for name, e in panels.items()),
                (11.0, 3.2),
                lambda figure, theme: _draw_depth(figure, theme, panels),
            )
        )
    if blocks := block_errors(report):
        charts.append(
            Chart(
                "Error of whole blocks",
                f"Relative squared error of what leaves each block, on the calibration data{left}, with "
                "every block before it quantized too. The scale is logarithmic.",
                f"Relative squared error of the blocks' outputs: {_range({'block': blocks})}",
                (11.0, 2.3),
                lambda figure, theme: _draw_blocks(figure, theme, {"block": blocks}),
            )
        )
    if rebuilt := reconstruction(report):
        charts.append(
            Chart(
                "Block reconstruction",
                "Relative squared error of what leaves each block, on windows held out of the tuning, before "
                "and after the block was tuned, with every block before it tuned already.",
                f"Relative squared error of the blocks' outputs: {_range(rebuilt)}",
                (11.0, 2.3),
                lambda figure, theme: _draw_blocks(figure, theme, rebuilt),
            )
        )
    if bits := mixed_bits(report):
        used = sorted({value for row in bits.values() for value in row.values()})
        charts.append(
            Chart(
                "Bits of each linear",
                "Where the budget went: bit planes per weight of each linear, block by block.",
                f"Grid of {len(bits)} kinds of linear by blocks; bits in use: {_listed(used)}",
                (11.0, 0.9 + 0.27 * len(bits)),
                lambda figure, theme: _draw_bits(figure, theme, bits),
            )
        )
    return charts


def level_charts(histograms: Sequence[LevelHistogram]) -> list[Chart]:
    """One chart per group: its weights under the levels of HLQ and under those of a uniform grid."""
    return [
        Chart(
            f"{histogram.module}, row {histogram.row}, group {histogram.group}",
            "",
            f"Histogram of {histogram.weights.size} weights with {histogram.hlq_levels.size} levels of "
            f"{_named('HLQ', histogram.hlq_error)} and of "
            f"{_named('the best-clipped uniform grid', histogram.uniform_error)}",
            (5.5, 2.0),
            lambda figure, theme, histogram=histogram: _draw_levels(figure, theme, histogram),  # type: ignore[misc]
        )
        for histogram in histograms
    ]


def _draw_depth(figure: FigureBase, theme: Theme, panels: Mapping[str, ByKind]) -> None:
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    kinds: dict[str, Any] = {}
    for axes, (name, errors) in zip(all_axes, panels.items(), strict=True):
        _frame(axes, theme)
        for kind in sorted(errors, key=_rank):
            (kinds[kind],) = _line(
                axes, errors[kind], theme.kinds.get(kind, theme.muted), MARKERS.get(kind, ".")
            )
        _log_scale(axes, (error for row in errors.values() for error in row.values()))
        axes.set_title(name, loc="left", fontsize=_TEXT, color=theme.muted)
    all_axes[0].set_ylabel("relative squared error")
    order = sorted(kinds, key=_rank)
    _legend(figure, theme, [kinds[kind] for kind in order], order)


def _draw_blocks(figure: FigureBase, theme: Theme, lines: ByKind) -> None:
    axes = figure.subplots()
    _frame(axes, theme)
    looks = {"before": (theme.uniform, "s")}
    drawn = [_line(axes, blocks, *looks.get(name, (theme.hlq, "o")))[0] for name, blocks in lines.items()]
    _log_scale(axes, (error for blocks in lines.values() for error in blocks.values()))
    axes.set_ylabel("relative squared error")
    if len(lines) > 1:
        _legend(figure, theme, drawn, list(lines))


def _draw_bits(figure: FigureBase, theme: Theme, bits: ByKind) -> None:
    axes = figure.subplots()
    kinds = sorted(bits, key=_rank)
    blocks = 1 + max(block for row in bits.values() for block in row)
    values = np.array([[bits[kind].get(block, np.nan) for block in range(blocks)] for kind in kinds])
    used = np.unique(values[np.isfinite(values)])
    shades = [_blend(theme.hlq, theme.paper, share) for share in np.linspace(0.2, 0.95, len(used))]
    ranks = np.where(np.isfinite(values), np.searchsorted(used, values), np.nan)
    axes.pcolormesh(
        np.arange(blocks + 1) - 0.5,
        np.arange(len(kinds) + 1) - 0.5,
        np.ma.masked_invalid(ranks),
        cmap=ListedColormap(shades),
        vmin=-0.5,
        vmax=len(used) - 0.5,
        edgecolors=theme.paper,
        linewidth=1.5 if blocks <= 48 else 0.4,
    )
    _frame(axes, theme, grid=False)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    handles = [axes.scatter([], [], marker="s", s=70, color=shade) for shade in shades]
    _legend(figure, theme, handles, [f"{value:.0f} bit{'s' if value > 1 else ''}" for value in used])


def _draw_levels(figure: FigureBase, theme: Theme, histogram: LevelHistogram) -> None:
    both = figure.subplots(1, 2, sharex=True, sharey=True)
    grids = (
        ("HLQ", histogram.hlq_levels, histogram.hlq_error, theme.hlq),
        ("uniform", histogram.uniform_levels, histogram.uniform_error, theme.uniform),
    )
    for axes, (name, levels, error, color) in zip(both, grids, strict=True):
        _frame(axes, theme, grid=False)
        axes.hist(histogram.weights, bins=32, color=theme.bars)
        for level in levels:
            axes.axvline(level, color=color, linewidth=1.4)
        axes.set_title(_named(name, error), loc="left", fontsize=_TEXT, color=color)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.set_xlabel("weight")
    both[0].set_ylabel("weights")


def _named(grid: str, error: float | None) -> str:
    return grid if error is None else f"{grid}: error {error:.4f}"


def _headlines(report: Mapping[str, Any]) -> list[str]:
    """The facts, and where the KL divergence went from stage to stage."""
    after = [(stage["stage"], stage["KL divergence"]) for stage in stages(report)]
    lines = [facts(report), [(f"KL divergence after {name}", value) for name, value in after if value]]
    return ["    ".join(f"{name} {value}" for name, value in line) for line in lines if line]


def _headline(figure: FigureBase, name: str, lines: Sequence[str], height: float) -> None:
    texts = [(0.12, name, _LARGE, LIGHT.ink)]
    texts += [(0.56 + 0.25 * i, line, _TEXT, LIGHT.muted) for i, line in enumerate(lines)]
    for down, text, size, color in texts:
        y = 1 - down / height
        figure.text(_PAD / _WIDTH, y, text, fontsize=size, color=color, va="top", parse_math=False)


def _frame(axes: Axes, theme: Theme, grid: bool = True) -> None:
    axes.set_facecolor("none")
    axes.tick_params(colors=theme.muted, labelsize=_SMALL, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.line)
    axes.set_xlabel("block", fontsize=_SMALL, color=theme.muted)
    axes.set_ylabel("", fontsize=_SMALL, color=theme.muted)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if grid:
        axes.grid(axis="y", color=theme.line, linewidth=0.8)
        axes.set_axisbelow(True)


def _line(axes: Axes, values: Mapping[int, float], color: str, marker: str) -> Any:
    blocks = sorted(values)
    size = 4.5 if len(blocks) <= 48 else 0.0
    return axes.plot(
        blocks,
        [values[block] for block in blocks],
        color=color,
        marker=marker,
        markersize=size,
        linewidth=1.4,
    )


def _legend(figure: FigureBase, theme: Theme, handles: Sequence[Any], names: Sequence[str]) -> None:
    figure.legend(
        handles, names, loc="outside right center", frameon=False, fontsize=_TEXT, labelcolor=theme.ink
    )


def _log_scale(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic axis of plain numbers, at least a factor of 2 high: small differences look small."""
    found = list(values)
    low, high = min(found), max(found)
    margin = max(1.15, (2 * low / high) ** 0.5)
    if high > 200 * low:
        steps: tuple[float, ...] = (1,)
    else:
        steps = (1, 2, 5) if high > 4 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    axes.set_yscale("log")
    axes.set_ylim(low / margin, high * margin)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _render(figure: Figure, kind: str) -> bytes:
    """The figure as a file. Characters that the font lacks become boxes, silently."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _blend(color: str, paper: str, share: float) -> tuple[float, ...]:
    return tuple(share * np.array(to_rgb(color)) + (1 - share) * np.array(to_rgb(paper)))


def _rank(kind: str) -> tuple[int, str]:
    order = list(MARKERS)
    return (order.index(kind) if kind in order else len(order)), kind


def _range(errors: ByKind) -> str:
    """From the smallest value to the largest, and where they are."""
    places = [(value, kind, block) for kind, row in errors.items() for block, value in row.items()]
    low, high = min(places), max(places)
    return f"from {low[0]:.3g} ({low[1]}, block {low[2]}) to {high[0]:.3g} ({high[1]}, block {high[2]})"


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
