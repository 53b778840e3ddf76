"""`elutq eval`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elutq.cli.options import JsonOption, KvCacheOption, ThreadsOption
from elutq.errors import InvalidArgumentError

if TYPE_CHECKING:
    from rich.table import Table

    from elutq.eval import Evaluation
    from elutq.runtime import LanguageModel

_DEFAULT_CONTEXT = 2048


def evaluate(
    model: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Model folders, or Hugging Face hub ids.")
    ],
    text: Annotated[
        list[Path],
        typer.Option("--text", metavar="FILE", help="UTF-8 text to predict; repeat it for several."),
    ],
    context: Annotated[
        int | None,
        typer.Option(
            "--ctx", help=f"Tokens in a window; by default {_DEFAULT_CONTEXT}, or the models' limit."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also measure the distance from this model, e.g. the original."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Use only so many tokens from the start of a text.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compute without int8 rounding of the lookup tables; slower.")
    ] = False,
    kv_cache: KvCacheOption = "fp16",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity on texts, and the KL divergence from a reference model.

    A text is cut into windows that do not overlap, each seen on its own, without a BOS token. Several models
    are all loaded at once, so that the reference reads each text only once.
    """
    from elutq.cli.console import print_json, show
    from elutq.eval import mean_evaluation
    from elutq.report import describe
    from elutq.runtime import load

    words = {file: _read(file) for file in text}
    subjects = [load(source, threads=threads, exact=exact, kv_cache=kv_cache) for source in model]
    original = None if reference is None else load(reference, threads=threads, exact=exact)
    by_text = _score(subjects, original, words, context, max_tokens)
    models = []
    for source, evaluations in zip(model, zip(*by_text, strict=True), strict=True):
        description = describe(source)
        models.append(
            {
                "model": source,
                "bits_per_weight": description["linear_bits_per_weight"],
                "model_bits_per_weight": description["bits_per_weight"],
                "nbytes": description["nbytes"],
                "texts": [
                    {"text": str(file), **asdict(evaluation)}
                    for file, evaluation in zip(words, evaluations, strict=True)
                ],
                "mean": asdict(mean_evaluation(evaluations)),
            }
        )
    result = {
        "models": models,
        "reference": reference,
        "exact": exact,
        "kv_cache": kv_cache,
        "isa": subjects[0].isa,
    }
    if as_json:
        print_json(result)
    elif len(model) == len(words) == 1:
        show(_lines(models[0], reference))
    else:
        show(_table(models, list(words), reference), _legend(models[0], reference))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{file} is not UTF-8 text: {error}") from None


def _score(
    subjects: Sequence["LanguageModel"],
    reference: "LanguageModel | None",
    texts: dict[Path, str],
    context: int | None,
    max_tokens: int | None,
) -> list[list["Evaluation"]]:
    """For each text, how each of the models does."""
    from elutq.cli.console import progress_bar
    from elutq.eval import evaluate_all

    everyone = [*subjects, *([] if reference is None else [reference])]
    context = context or min(_DEFAULT_CONTEXT, *(m.config.max_position_embeddings for m in everyone))
    by_text = []
    with progress_bar("tokens") as progress:
        for file, words in texts.items():

            def report(done: int, total: int, name: str = file.name) -> None:
                progress(done, total, name)

            by_text.append(
                evaluate_all(
                    subjects,
                    _encode(everyone, words),
                    context,
                    reference=reference,
                    max_tokens=max_tokens,
                    progress=report,
                )
            )
    return by_text


def _encode(models: Sequence["LanguageModel"], words: str) -> list[int]:
    """The tokens of a text, the same for all models."""
    ids, *others = (model.tokenizer.encode(words, add_special_tokens=False) for model in models)
    if any(other != ids for other in others):
        raise InvalidArgumentError(
            "the models cut the text into different tokens; compare models that share a tokenizer"
        )
    return ids


def _lines(model: dict[str, Any], reference: str | None) -> str:
    """One model on one text."""
    found = model["mean"]
    lines = [
        f"perplexity  {found['perplexity']:.4f}  (nll {found['nll']:.4f} over {found['tokens']} tokens, "
        f"windows of {found['context']}; {model['bits_per_weight']:.3f} bits per weight)"
    ]
    if reference is not None:
        lines.append(
            f"KL          {found['kl']:.5f}  from {reference}, "
            f"which ranks the same token first at {found['top1_agreement']:.1%} of positions"
        )
    return "\n".join(lines)


def _table(models: list[dict[str, Any]], texts: list[Path], reference: str | None) -> "Table":
    """A section per text, and one for their mean; in each a row per model."""
    from rich.markup import escape

    from elutq.cli.console import megabytes
    from elutq.cli.tables import new_table

    compared = reference is not None
    figures = ["perplexity", *(["nll", "KL", "top-1"] if compared else [])]
    table = new_table("model", "bits/weight", "whole", "size", *figures)
    sections = [(file.name, [model["texts"][i] for model in models]) for i, file in enumerate(texts)]
    if len(texts) > 1:
        sections.append(("mean", [model["mean"] for model in models]))
    for name, evaluations in sections:
        table.add_section()
        table.add_row(escape(name), style="bold")
        for model, found in zip(models, evaluations, strict=True):
            row = [
                escape(f"  {model['model']}"),
                f"{model['bits_per_weight']:.3f}",
                f"{model['model_bits_per_weight']:.3f}",
                megabytes(model["nbytes"]),
                f"{found['perplexity']:.2f}",
            ]
            if compared:
                row += [
                    f"{found['nll_increase']:+.4f}",
                    f"{found['kl']:.4f}",
                    f"{found['top1_agreement']:.1%}",
                ]
            table.add_row(*row)
    return table


def _legend(model: dict[str, Any], reference: str | None) -> str:
    against = "" if reference is None else f"nll, KL and top-1 agreement are against {reference}; "
    return f"{against}windows of {model['mean']['context']} tokens"
