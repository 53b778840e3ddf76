"""`elutq eval`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from elutq.cli.options import JsonOption, KvCacheOption, ModelArgument, ThreadsOption
from elutq.errors import InvalidArgumentError

_DEFAULT_CONTEXT = 2048


def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text to predict.")],
    context: Annotated[
        int | None,
        typer.Option(
            "--ctx", help=f"Tokens in a window; by default {_DEFAULT_CONTEXT}, or the model's limit."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also measure the distance from this model, e.g. the original."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Use only so many tokens from the start.")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compute without int8 rounding of the lookup tables; slower.")
    ] = False,
    kv_cache: KvCacheOption = "fp16",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity on a text, and the KL divergence from a reference model.

    The text is cut into windows that do not overlap, each seen on its own, without a BOS token.
    """
    from elutq.cli.console import print_json, progress_bar, show
    from elutq.eval import evaluate as run
    from elutq.report import describe
    from elutq.runtime import load

    words = _read(text)
    subject = load(model, threads=threads, exact=exact, kv_cache=kv_cache)
    context = context or min(_DEFAULT_CONTEXT, subject.config.max_position_embeddings)
    with progress_bar("tokens") as progress:
        evaluation = run(
            subject,
            subject.tokenizer.encode(words, add_special_tokens=False),
            context,
            reference=None if reference is None else load(reference, threads=threads, exact=exact),
            max_tokens=max_tokens,
            progress=lambda done, total: progress(done, total, text.name),
        )
    description = describe(model)
    result = {
        "model": model,
        "text": str(text),
        **asdict(evaluation),
        "bits_per_weight": description["linear_bits_per_weight"],
        "model_bits_per_weight": description["bits_per_weight"],
        "reference": reference,
        "exact": exact,
        "kv_cache": kv_cache,
        "isa": subject.isa,
    }
    if as_json:
        print_json(result)
    else:
        show(_lines(result))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{file} is not UTF-8 text: {error}") from None


def _lines(result: dict[str, Any]) -> str:
    lines = [
        f"perplexity  {result['perplexity']:.4f}  (nll {result['nll']:.4f} over {result['tokens']} tokens, "
        f"windows of {result['context']}; {result['bits_per_weight']:.3f} bits per weight)"
    ]
    if result["kl"] is not None:
        lines.append(
            f"KL          {result['kl']:.5f}  from {result['reference']}, "
            f"which ranks the same token first at {result['top1_agreement']:.1%} of positions"
        )
    return "\n".join(lines)
