"""`elutq bench`."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from elutq.cli.options import IsaOption, JsonOption, KvCacheOption, ThreadsOption
from elutq.errors import InvalidArgumentError

if TYPE_CHECKING:
    from elutq.bench import BenchResult
    from elutq.runtime import LanguageModel
    from elutq.scheme import QuantScheme


def bench(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A model folder or hub id.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Instead of MODEL: random weights of a known model's shape, e.g. llama-2-7b."),
    ] = None,
    bits: Annotated[int, typer.Option("--bits", "-b", help="With --shape: bits per weight, 1 to 4.")] = 2,
    group_size: Annotated[int, typer.Option(help="With --shape: weights that share scales.")] = 128,
    param_bits: Annotated[int, typer.Option(help="With --shape: bits of a scale or zero, 16 or 8.")] = 16,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    gen: Annotated[int, typer.Option(help="Tokens to generate after it.")] = 64,
    batch: Annotated[int, typer.Option(help="Sequences that run together; speeds are of all of them.")] = 1,
    context: Annotated[
        int | None, typer.Option(help="Also measure decoding after so many tokens, e.g. 4096.")
    ] = None,
    repeat: Annotated[int, typer.Option(help="Repeats; medians are printed.")] = 3,
    threads: ThreadsOption = None,
    isa: IsaOption = None,
    kv_cache: KvCacheOption = "fp16",
    as_json: JsonOption = False,
) -> None:
    """Measure prefill and decode speed, and decode's share of what the memory allows."""
    from dataclasses import asdict

    from elutq.bench import bench as run
    from elutq.cli.console import print_json, progress_bar, show

    if (model is None) == (shape is None):
        raise InvalidArgumentError("give either a model folder or --shape, e.g. --shape llama-2-7b")
    with progress_bar() as progress:
        progress(0, repeat, f"loading {model or shape}")
        subject, scheme = _load(model, shape, bits, group_size, param_bits, threads, isa, kv_cache)
        result = run(
            subject,
            scheme,
            prompt=prompt,
            gen=gen,
            batch=batch,
            context=context,
            repeat=repeat,
            progress=lambda done, total: progress(done, total, str(model or shape)),
        )
    if as_json:
        print_json({"model": model, "shape": shape, **asdict(result)})
    else:
        show(_lines(result))


def _load(
    model: str | None,
    shape: str | None,
    bits: int,
    group_size: int,
    param_bits: int,
    threads: int | None,
    isa: str | None,
    kv_cache: Literal["fp16", "int8"],
) -> "tuple[LanguageModel, QuantScheme | None]":
    from elutq.checkpoint import Checkpoint
    from elutq.runtime import load, random_model
    from elutq.scheme import QuantScheme

    if shape is not None:
        scheme = QuantScheme(bits, group_size, param_bits)
        drawn = random_model(shape, bits, group_size, param_bits, threads=threads, isa=isa, kv_cache=kv_cache)
        return drawn, scheme
    assert model is not None
    with Checkpoint.open(model) as checkpoint:
        default = None if checkpoint.scheme is None else checkpoint.scheme.default
    return load(model, threads=threads, isa=isa, kv_cache=kv_cache), default


def _lines(result: "BenchResult") -> str:
    kind = "16 bits" if result.group_size is None else f"{result.bits} bits, groups of {result.group_size}"
    roofline, bandwidth = result.decode_roofline_fraction, result.read_bandwidth_gb_s
    times = "" if result.batch == 1 else f"{result.batch} x "
    deep = () if result.context_decode_tok_s is None else (_deep_line(result),)
    return "\n".join(
        (
            f"prefill  {result.prefill_tok_s:8.2f} tok/s  ({times}{result.prompt} tokens)",
            f"decode   {result.decode_tok_s:8.2f} tok/s  ({times}{result.gen} tokens)",
            f"         {roofline:8.1%} of what the memory allows, which reads {bandwidth:.1f} GB/s",
            *deep,
            f"load     {result.load_s:8.2f} s",
            f"memory   {result.peak_rss_bytes / 1e9:8.2f} GB at most",
            f"{kind}, {result.kv_cache} keys and values",
            f"{result.isa} kernels on {result.threads} thread(s) of {result.cpu}",
        )
    )


def _deep_line(result: "BenchResult") -> str:
    assert result.context_decode_tok_s is not None
    share = result.context_decode_tok_s / result.decode_tok_s
    return (
        f"         {result.context_decode_tok_s:8.2f} tok/s  after {result.context} tokens: {share:.1%} of it"
    )
