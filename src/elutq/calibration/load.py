"""From the names of texts to the windows of tokens a quantizer looks at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from elutq.calibration.corpus import Corpus, read_corpus
from elutq.calibration.self_text import self_windows
from elutq.calibration.windows import cut_windows
from elutq.errors import InvalidArgumentError
from elutq.tokenizer import Tokenizer

if TYPE_CHECKING:
    from elutq.runtime import LanguageModel

#: The source that stands for text sampled from the model itself.
SELF = "self"

#: Called with tokens done, tokens in all, and the source at work.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Windows of tokens, no two of which overlap.

    Attributes:
        token_ids: to calibrate with, int64 [samples, length], in random order.
        held_out: to check the result on, int64 [held, length]; held may be 0.
        record: what was used, JSON-ready, enough to make the same windows again: `sources` (file name and
            sha256, or data set, revision, config, split and column; and the windows each gave), `samples`,
            `length`, `held_out`, `seed`, `tokens` (samples * length), and what was `requested`.
        warnings: sentences for people, one per source that gave fewer windows than it should.
    """

    token_ids: NDArray[np.int64]
    held_out: NDArray[np.int64]
    record: dict[str, Any]
    warnings: tuple[str, ...] = ()


def load_calibration(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    *,
    samples: int = 128,
    length: int = 2048,
    held_out: int = 8,
    seed: int = 0,
    model: Callable[[], "LanguageModel"] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Cut windows of tokens from texts, the same number from each.

    Windows have no BOS token and lie at random places of the whole text; see `calibration.windows`. A source
    too short for its share gives what it has, first to calibrate with, and a warning says so.

    Args:
        sources: each one of
            - a file: `.jsonl` or `.json` with a `text` or `messages` on each line; `.parquet` with a column
              `text`; any other as UTF-8 text, documents separated by lines `<|endoftext|>`;
            - a data set: `wikitext2`, `c4`, `pile` or `org/name[@revision][:config][:split][:column]`;
            - `self`: text that the model samples.
        tokenizer: the model's.
        samples: windows to calibrate with.
        length: tokens of a window.
        held_out: further windows, which are not calibrated with.
        seed: of the places and of the sampling.
        model: loads the model that `self` samples from; it is closed when it has.
        progress: called now and then.

    Raises:
        InvalidArgumentError: an option is out of range, a source cannot be read or is named twice, or a text
            is shorter than a window.
        MissingDependencyError: a source needs pyarrow or datasets.
    """
    _check(sources, samples, length, held_out, seed)
    # Every text is opened before the model begins to sample, which can take hours.
    corpora = _open(sources, tokenizer)
    calibrate, check = _shares(samples, len(sources)), _shares(held_out, len(sources))
    counts = [a + b for a, b in zip(calibrate, check, strict=True)]

    def report(index: int, tokens: int) -> None:
        if progress is not None:
            progress(sum(counts[:index]) * length + tokens, sum(counts) * length, sources[index])

    chosen, spare, entries, warnings = [], [], [], []
    for index, (source, corpus) in enumerate(zip(sources, corpora, strict=True)):
        rng = np.random.default_rng([seed, index])
        share, wanted = calibrate[index], counts[index]
        report(index, 0)
        if corpus is None:
            with _load(model) as full:
                windows = self_windows(full, wanted, length, rng, partial(report, index))
        else:
            windows = cut_windows(corpus, tokenizer, wanted, length, rng)
        if len(windows) < wanted:
            warnings.append(_shortfall(source, windows, share, wanted))
        windows = rng.permutation(windows)
        chosen.append(windows[:share])
        spare.append(windows[share:])
        entries.append(
            {
                **({"model": SELF} if corpus is None else corpus.record),
                "samples": len(chosen[-1]),
                "held_out": len(spare[-1]),
            }
        )
        report(index, wanted * length)
    token_ids = np.random.default_rng([seed, len(sources)]).permutation(np.concatenate(chosen))
    rest = np.concatenate(spare)
    record = {
        "sources": entries,
        "samples": len(token_ids),
        "length": length,
        "held_out": len(rest),
        "seed": seed,
        "tokens": token_ids.size,
        "requested": {"samples": samples, "held_out": held_out},
    }
    return Calibration(token_ids, rest, record, tuple(warnings))


def _check(sources: Sequence[str], samples: int, length: int, held_out: int, seed: int) -> None:
    if isinstance(sources, str) or not sources:
        raise InvalidArgumentError("sources must be a list of texts to calibrate on, at least one")
    for name, value, least in (
        ("samples", samples, 1),
        ("length", length, 2),
        ("held_out", held_out, 0),
        ("seed", seed, 0),
    ):
        if value < least:
            raise InvalidArgumentError(f"{name} must be at least {least}, not {value}")
    if samples < len(sources):
        raise InvalidArgumentError(
            f"samples is {samples}, but there are {len(sources)} sources; take at least one sample of each"
        )


def _open(sources: Sequence[str], tokenizer: Tokenizer) -> list[Corpus | None]:
    """The texts; None stands for the model's own."""
    corpora = [None if source == SELF else read_corpus(source, tokenizer) for source in sources]
    # One text under two names would put the same tokens into both parts.
    seen: list[dict[str, Any]] = []
    for source, corpus in zip(sources, corpora, strict=True):
        identity = {} if corpus is None else {**corpus.record, "file": None}
        if identity in seen:
            raise InvalidArgumentError(f"{source} is the same text as a source before it; name it only once")
        seen.append(identity)
    return corpora


def _shares(count: int, parts: int) -> list[int]:
    """`count` in equal parts; the first ones get what does not divide."""
    return [count // parts + (i < count % parts) for i in range(parts)]


def _load(model: Callable[[], "LanguageModel"] | None) -> "LanguageModel":
    if model is None:
        raise InvalidArgumentError(f"the source {SELF} needs the model; name a text instead")
    return model()


def _shortfall(source: str, windows: NDArray[np.int64], share: int, wanted: int) -> str:
    found, length = windows.shape
    kept = min(found, share)
    return (
        f"{source} has room for {found} windows of {length} tokens, not {wanted}: "
        f"{kept} of {share} calibrate, {found - kept} of {wanted - share} are held out"
    )
