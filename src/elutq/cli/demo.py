"""`elutq demo`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elutq.cli.options import JsonOption, ThreadsOption
from elutq.errors import InvalidArgumentError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from elutq.demo import DemoResult


def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Keep the quantized models in this folder; by default they are removed."),
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize the bundled model, compare it with uniform grids, tell a story. Offline, about a minute."""
    from contextlib import nullcontext
    from dataclasses import asdict
    from tempfile import TemporaryDirectory

    from elutq.cli.console import print_json, progress_bar, show
    from elutq.demo import run_demo

    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgumentError(f"{out} cannot be made a folder: {error.strerror}") from None
    place = TemporaryDirectory(prefix="elutq-demo-") if out is None else nullcontext(out)
    with place as folder, progress_bar() as progress:
        result = run_demo(Path(folder), threads=threads, progress=progress)
    if as_json:
        print_json(asdict(result))
        return
    show(_table(result), _remarks(result), _stories(result))
    if out is not None:
        show(f'Go on with the models:  elutq generate {out / "hlq-2bit"} -p "Once upon a time"')


def _table(result: "DemoResult") -> "Table":
    from elutq.cli.console import megabytes
    from elutq.cli.tables import new_table

    table = new_table(
        "method",
        "bits",
        "bits per\nweight",
        "size",
        "perplexity",
        "KL from\nfull",
        "top-1\nagrees",
        "decode\ntok/s",
    )
    bits = result.rows[0].bits
    for row in result.rows:
        if row.bits != bits:
            table.add_section()
            bits = row.bits
        table.add_row(
            row.method,
            str(row.bits),
            f"{row.bits_per_weight:.3f}",
            megabytes(row.nbytes),
            f"{row.perplexity:.2f}",
            f"{row.kl:.4f}",
            f"{row.top1_agreement:.1%}",
            f"{row.decode_tok_s:.0f}",
            style="bold" if row.method == "hlq" else None,
        )
    return table


def _remarks(result: "DemoResult") -> "Text":
    from rich.text import Text

    return Text(
        "rtn: min-max grid; uniform: best-clipped grid; both are stored as HLQ, whose extra scales they do "
        "not need: alone they would save 0.125 (2 bits) to 0.375 (4 bits) a weight. Perplexity, KL in nats a "
        f"token and top-1 agreement with the full model are over {result.tokens} tokens that the full model "
        "wrote. Sizes include the embedding, which stays in 16 bits. Speed is with the "
        f"{result.isa} kernels on {result.threads} thread(s), of a model that fits in the cache; "
        "`elutq bench --shape llama-2-7b` shows it for one that does not.\n",
    )


def _stories(result: "DemoResult") -> "Table":
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    stories = Table.grid(expand=True)
    stories.add_column(ratio=1)
    stories.add_column(ratio=1)
    stories.add_row(
        *(
            Panel(Text.assemble((result.prompt, "bold"), story.rstrip()), title=title, padding=(1, 2))
            for title, story in (("2-bit HLQ", result.hlq_story), ("full model", result.full_story))
        )
    )
    return stories
