"""Output: results go to stdout, progress to stderr, and only where a person watches."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Called with units done, units in all, and what is being worked on.
Progress = Callable[[int, int, str], None]

_WIDTH_WITHOUT_TERMINAL = 120
_MOST_WIDTH = 10_000


def is_main_process() -> bool:
    """Whether this process speaks for its job: of those that torchrun starts, the first does."""
    return os.environ.get("RANK", "0") == "0"


def print_json(result: Mapping[str, Any]) -> None:
    """One object on one line of stdout."""
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def announce(text: str) -> None:
    """A line on stderr, for people and logs alike."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def show(*items: "RenderableType") -> None:
    """Text as it is, and tables, on stdout; plain characters, nothing cut off, when it is not a terminal."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    for item in items:
        if isinstance(item, str):
            sys.stdout.write(f"{item}\n")
            continue
        if not console.is_terminal:
            console.width = _MOST_WIDTH
            console.width = max(_WIDTH_WITHOUT_TERMINAL, console.measure(item).maximum)
        console.print(item)
    sys.stdout.flush()


@contextmanager
def progress_bar(unit: str | None = None) -> Iterator[Progress]:
    """A bar on stderr; silent when stderr is not a terminal, and in all processes of a job but the first.

    Args:
        unit: what is counted, e.g. "weights", to show a rate and the time left; None where steps are unequal.
    """
    if not (sys.stderr.isatty() and is_main_process()):
        yield lambda done, total, what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with Bar(
        BarColumn(),
        TaskProgressColumn(),
        *([TextColumn("{task.fields[rate]}"), TimeRemainingColumn()] if unit else []),
        TextColumn("{task.description}"),
        console=Console(file=sys.stderr),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None, rate="")

        def update(done: int, total: int, what: str) -> None:
            speed = bar.tasks[0].speed
            rate = "" if speed is None else f"{magnitude(speed)} {unit}/s"
            bar.update(task, completed=done, total=total, description=what, rate=rate)

        yield update


def magnitude(value: float) -> str:
    """A large number in a few characters: 950, 12.3k, 4.56M, 7.89G."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"


def megabytes(nbytes: float) -> str:
    """Bytes for people: 0.82 MB, 14.7 MB, 2.31 GB (powers of ten)."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
