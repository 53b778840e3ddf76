"""Tables that several commands print."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from elutq.cli.console import magnitude, megabytes


def new_table(*headers: str) -> Table:
    """An empty table: first column to the left, the others, numbers, to the right."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left", no_wrap=True)
    return table


def kinds_table(summary: Mapping[str, Any]) -> Table:
    """Size, bits and error of each kind of tensor, and of the whole model.

    Args:
        summary: an `elutq.report.ModelSummary` as a dict.
    """
    with_error = any(kind["relative_error"] is not None for kind in summary["kinds"])
    table = new_table(
        "tensors", "count", "weights", "bits", "bits/weight", "size", *(["error"] if with_error else [])
    )
    for kind in summary["kinds"]:
        row = [
            kind["kind"],
            str(kind["tensors"]),
            magnitude(kind["params"]),
            ", ".join(map(str, kind["bits"])),
            f"{kind['bits_per_weight']:.3f}",
            megabytes(kind["nbytes"]),
        ]
        if kind["relative_error"] is not None:
            row.append(f"{kind['relative_error']:.4f}")
        table.add_row(*row)
    table.add_section()
    table.add_row(
        "all",
        str(len(summary["tensors"])),
        magnitude(summary["params"]),
        "",
        f"{summary['bits_per_weight']:.3f}",
        megabytes(summary["nbytes"]),
        style="bold",
    )
    return table
