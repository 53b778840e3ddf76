"""`elutq generate`."""

import sys
from typing import Annotated

import typer

from elutq.cli.options import IsaOption, JsonOption, KvCacheOption, ModelArgument, ThreadsOption
from elutq.errors import InvalidArgumentError


def generate(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help='Text to continue; "-", the default, is stdin.'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Stop after so many.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many likeliest tokens; 0 is all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest that make up this probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens seen are less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Stop before this text; may be given several times."),
    ] = None,
    threads: ThreadsOption = None,
    isa: IsaOption = None,
    kv_cache: KvCacheOption = "fp16",
    as_json: JsonOption = False,
) -> None:
    """Continue a text."""
    import time

    from elutq.cli.console import print_json
    from elutq.runtime import load

    if prompt is None and sys.stdin.isatty():
        raise InvalidArgumentError("there is no prompt; give one with -p, or on stdin")
    if prompt in (None, "-"):
        prompt = sys.stdin.read().removesuffix("\n")  # the one that `echo` and editors add
    language_model = load(model, threads=threads, isa=isa, kv_cache=kv_cache)
    start = time.perf_counter()
    pieces: list[str] = []
    for piece in language_model.stream(
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    ):
        pieces.append(piece)
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if as_json:
        print_json(
            {
                "model": model,
                "prompt": prompt,
                "text": "".join(pieces),
                "seconds": time.perf_counter() - start,
                "seed": seed,
                "isa": language_model.isa,
            }
        )
    else:
        sys.stdout.write("\n")
        sys.stdout.flush()
