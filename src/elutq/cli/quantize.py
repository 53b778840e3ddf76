"""`elutq quantize`."""

from pathlib import Path
from typing import Annotated

import typer

from elutq.cli.options import JsonOption, ModelArgument, ThreadsOption


def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder to write.")],
    bits: Annotated[
        int, typer.Option("--bits", "-b", help="Bits per weight of the decoder blocks: 1 to 4.")
    ] = 2,
    group_size: Annotated[
        int, typer.Option(help="Weights that share scales: 32, 64, 128, 256, or -1 for a whole row.")
    ] = 128,
    param_bits: Annotated[
        int, typer.Option(help="Bits of a scale or zero: 16, or 8 under one factor per row.")
    ] = 16,
    method: Annotated[
        str,
        typer.Option(
            help="hlq; or, to compare with: rtn (min-max grid), uniform (best-clipped grid), "
            "ao (HLQ as published), adam (its gradient variant)."
        ),
    ] = "hlq",
    importance: Annotated[
        bool | None,
        typer.Option(
            help="Weigh columns by what the norms in front tell of them; by default with hlq alone."
        ),
    ] = None,
    lm_head_bits: Annotated[
        int | None, typer.Option(help="1 to 4, or 16 to leave the head; by default 4 if it is large.")
    ] = None,
    embedding_bits: Annotated[
        int | None, typer.Option(help="1 to 4, or 16 to leave the embedding; by default 4 if it is large.")
    ] = None,
    threads: ThreadsOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a quantized model that is at OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a Hugging Face model into a folder of 1-4 bit weights.

    Interrupted, it continues where it stopped when it is run again.
    """
    from dataclasses import asdict

    from elutq.cli.console import magnitude, megabytes, print_json, progress_bar, show
    from elutq.cli.tables import kinds_table
    from elutq.quantize import quantize as run

    with progress_bar("weights") as progress:
        report = run(
            model,
            out,
            bits=bits,
            group_size=group_size,
            param_bits=param_bits,
            method=method,
            importance=importance,
            lm_head_bits=lm_head_bits,
            embedding_bits=embedding_bits,
            threads=threads,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json(asdict(report))
        return
    show(
        kinds_table(asdict(report.summary)),
        f"{report.out}: {megabytes(report.file_bytes)}, "
        f"{report.summary.linear_bits_per_weight:.3f} bits per weight in the decoder blocks; "
        f"{report.seconds:.1f} s, {magnitude(report.weights_per_second)} weights/s",
    )
