"""What the benchmark programs print and write."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def results_file(name: str) -> Path:
    """Where a result of this name is kept."""
    return Path(__file__).parent / "results" / f"{name}.json"


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same keys as a Markdown table; keys become column headings."""
    cells = [[key.replace("_", " ") for key in rows[0]]]
    cells += [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    for line in cells:
        print("|", " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), "|")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
