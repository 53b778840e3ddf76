"""Options that several commands share."""

from typing import Annotated

import typer

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, or a Hugging Face hub id.")
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", "-t", help="Threads to use; by default one per physical core.")
]
IsaOption = Annotated[
    str | None, typer.Option("--isa", help="Kernels to use, e.g. avx2; by default the machine's best.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object, the last line of stdout.")
]
