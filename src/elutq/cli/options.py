"""Options that several commands share."""

from typing import Annotated, Literal

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
KvCacheOption = Annotated[
    Literal["fp16", "int8"],
    typer.Option(
        help="How keys and values are kept; int8 halves their memory and is a little less accurate."
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object, the last line of stdout.")
]
