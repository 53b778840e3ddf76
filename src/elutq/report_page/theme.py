"""Colors of charts and page, on light and dark paper; those of the chat page."""

from collections.abc import Mapping
from dataclasses import dataclass

#: Linears of a block in the order of the forward pass, and their markers.
MARKERS = {
    "q_proj": "o",
    "k_proj": "s",
    "v_proj": "D",
    "o_proj": "^",
    "gate_proj": "v",
    "up_proj": "P",
    "down_proj": "X",
}


@dataclass(frozen=True)
class Theme:
    """Colors, as #rrggbb.

    Attributes:
        paper: behind everything.
        raised: behind tiles and notes.
        ink: text.
        muted: labels and ticks.
        line: grids and frames.
        bars: histograms.
        hlq: levels of HLQ, and whatever has one color.
        uniform: levels of uniform grids, and warnings.
        kinds: of the linears of a block: cool for attention, warm for the MLP.
    """

    paper: str
    raised: str
    ink: str
    muted: str
    line: str
    bars: str
    hlq: str
    uniform: str
    kinds: Mapping[str, str]


def _kinds(*colors: str) -> Mapping[str, str]:
    return dict(zip(MARKERS, colors, strict=True))


LIGHT = Theme(
    paper="#fdfcfa",
    raised="#f6f4f0",
    ink="#23211d",
    muted="#6b665d",
    line="#e5e1d9",
    bars="#d3cec3",
    hlq="#2c6e5d",
    uniform="#b4552d",
    kinds=_kinds("#1f4e79", "#3a86c8", "#2c8c7c", "#7a6bb5", "#8f3b1b", "#d07a2d", "#b33f62"),
)
DARK = Theme(
    paper="#171716",
    raised="#20201e",
    ink="#e9e7e1",
    muted="#a19d93",
    line="#33332f",
    bars="#4a4944",
    hlq="#7cc4ae",
    uniform="#e39a72",
    kinds=_kinds("#6ba3d6", "#a9d2f5", "#6fc7b4", "#b5a6e8", "#e07f58", "#f2b26b", "#ec8fab"),
)
