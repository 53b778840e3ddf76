"""`elutq quantize`."""

from pathlib import Path
from typing import Annotated

import typer

from elutq.cli.options import JsonOption, ModelArgument, ThreadsOption

_CALIBRATION = "Calibration"


def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder to write.")],
    bits: Annotated[
        int | None,
        typer.Option("--bits", "-b", help="Bits per weight of the decoder blocks: 1 to 4; by default 2."),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share scales: 32, 64, 128, 256, or -1 for a whole row; by default 128."
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            help="Instead of both: bits per weight of the decoder blocks, scales included. Each matrix gets "
            "2 to 4 bits by how much it matters, which is measured on calibration text."
        ),
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(help="The same for the size of the weight files, such as 2.0GB or 800MB.")
    ] = None,
    param_bits: Annotated[
        int, typer.Option(help="Bits of a scale or zero: 16, or 8 under one factor per row.")
    ] = 16,
    method: Annotated[
        str | None,
        typer.Option(
            help="hlq: in minutes, without data. hlq-gptq: the most accurate, with calibration data. "
            "To compare with: rtn (min-max grid), uniform (best-clipped grid), gptq (on that grid), "
            "ao and ao-gptq (HLQ as published), adam (its gradient variant). By default hlq, or hlq-gptq "
            "with --effort or --finetune."
        ),
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(
            help="How much to do for accuracy, with calibration data: fast (hlq-gptq, in a hurry), balanced "
            "(then finetuning), best (finetuning on more text)."
        ),
    ] = None,
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
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Turn the model's axes first: spreads outliers, costs no speed.")
    ] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            "-c",
            metavar="TEXT",
            help="A text, JSONL or Parquet file, a data set's name, or `self`: text that the model "
            "samples, the default. May be given several times.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    calibration_samples: Annotated[
        int, typer.Option(help="Windows of text to calibrate on.", rich_help_panel=_CALIBRATION)
    ] = 128,
    calibration_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a window; by default 2048, or the model's limit.", rich_help_panel=_CALIBRATION
        ),
    ] = None,
    calibration_seed: Annotated[
        int, typer.Option(help="Decides which windows are taken.", rich_help_panel=_CALIBRATION)
    ] = 0,
    finetune: Annotated[
        str | None,
        typer.Option(
            metavar="STAGES",
            help="What follows calibration: block (each block against the full model's), e2e (the whole "
            "model against the full one), or block,e2e.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    finetune_samples: Annotated[
        int | None,
        typer.Option(
            help="Windows of the same texts to finetune on; by default 512, with --effort best 2048.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="Under torchrun, spread the model over the processes in end-to-end tuning (FSDP).",
            rich_help_panel=_CALIBRATION,
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda; by default a GPU if there is one.", rich_help_panel=_CALIBRATION),
    ] = None,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="Keep activations on disk, beside OUT, when memory is short.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = False,
    threads: ThreadsOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a quantized model that is at OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a Hugging Face model into a folder of 1-4 bit weights.

    Interrupted, it continues where it stopped when it is run again. Methods with calibration data scale out:
    `torchrun --nproc-per-node N -m elutq quantize ...` (docs/scale.md).
    """
    from dataclasses import asdict

    from elutq.budget import parse_size
    from elutq.cli.console import (
        announce,
        is_main_process,
        magnitude,
        megabytes,
        print_json,
        progress_bar,
        show,
    )
    from elutq.cli.tables import kinds_table
    from elutq.quantize import quantize as run

    with progress_bar("weights") as progress:
        report = run(
            model,
            out,
            bits=bits,
            group_size=group_size,
            target_bpw=target_bpw,
            target_bytes=None if target_size is None else parse_size(target_size),
            param_bits=param_bits,
            method=method,
            importance=importance,
            lm_head_bits=lm_head_bits,
            embedding_bits=embedding_bits,
            rotate=rotate,
            calibration=calibration or ["self"],
            calibration_samples=calibration_samples,
            calibration_length=calibration_length,
            calibration_seed=calibration_seed,
            finetune=None if finetune is None else finetune.split(","),
            finetune_samples=finetune_samples,
            effort=effort,
            shard=shard,
            device=device,
            offload=offload,
            threads=threads,
            overwrite=overwrite,
            progress=progress,
            announce=announce,
        )
    if not is_main_process():
        return
    if as_json:
        print_json(asdict(report))
        return
    lines = [
        f"{report.out}: {megabytes(report.file_bytes)}, "
        f"{report.summary.linear_bits_per_weight:.3f} bits per weight in the decoder blocks; "
        f"{report.seconds:.1f} s, {magnitude(report.weights_per_second)} weights/s"
    ]
    lines += [
        f"after {stage['name']}, {stage['seconds']:.0f} s: nll {nll['quantized']:.4f}, KL {nll['kl']:.5f} "
        f"on {nll['tokens']} tokens held out, where the full model has nll {nll['full']:.4f}"
        for stage in report.stages
        if (nll := stage["nll"])
    ]
    show(kinds_table(asdict(report.summary)), *lines, *(f"warning: {text}" for text in report.warnings))
