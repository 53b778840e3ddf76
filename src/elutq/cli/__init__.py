"""The `elutq` command: reads options, calls the library, prints. Heavy imports wait for their command."""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from elutq import __version__
from elutq.cli.bench import bench
from elutq.cli.chat import chat
from elutq.cli.demo import demo
from elutq.cli.evaluate import evaluate
from elutq.cli.generate import generate
from elutq.cli.inspect import inspect
from elutq.cli.quantize import quantize
from elutq.cli.serve import serve
from elutq.errors import ElutqError

__all__ = ["app", "main"]


class _Group(TyperGroup):
    """Turns the package's own errors into one line on stderr and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ElutqError as error:
            if not error.elsewhere:
                print("error:", " ".join(str(error).split()), file=sys.stderr)  # noqa: T201
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize language models to 2-4 bits and run them on an ordinary CPU.",
)
app.command("quantize")(quantize)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("chat")(chat)
app.command("serve")(serve)
app.command("bench")(bench)
app.command("inspect")(inspect)
app.command("demo")(demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"elutq {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    app()
