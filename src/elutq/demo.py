"""The whole path on the bundled model, offline: quantize, compare, tell a story.

The evaluation text is sampled from the full model itself at temperature 1. So no text has to be shipped, and
the figures have a meaning of their own: on such text, the increase in mean nll over the full model is an
unbiased estimate of the KL divergence, which is also measured directly.
"""

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from elutq.bench import time_generation
from elutq.calibration import sample_text
from elutq.errors import OutputExistsError
from elutq.eval import evaluate_all
from elutq.models import bundled_model
from elutq.quantize import quantize
from elutq.report import describe
from elutq.runtime import load

if TYPE_CHECKING:
    from elutq.runtime import LanguageModel

BITS = (2, 3, 4)
METHODS = ("rtn", "uniform", "hlq")
GROUP_SIZE = 128
FULL = "full"

_SEQUENCES, _CONTEXT = 32, 256  # of the evaluation text
_SPEED_TOKENS, _SPEED_REPEATS = 64, 5
_PROMPT = "Once upon a time"
_STORY_TOKENS = 160

#: Called with steps done, steps in all, and what is being done.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class DemoRow:
    """One model of the comparison.

    Attributes:
        method: "full", "rtn" (min-max grid), "uniform" (best-clipped grid) or "hlq".
        bits: bits per weight of the decoder blocks before scales and zeros.
        bits_per_weight: the same with them.
        nbytes: size of all tensors; embedding and head stay in 16 bits.
        nll: mean negative log-likelihood per token of the evaluation text, in nats.
        perplexity: exp(nll).
        kl: mean KL(full || this) per token in nats.
        top1_agreement: share of positions where the full model ranks the same token first.
        decode_tok_s: tokens per second, one sequence.
    """

    method: str
    bits: int
    bits_per_weight: float
    nbytes: int
    nll: float
    perplexity: float
    kl: float
    top1_agreement: float
    decode_tok_s: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        rows: the full model first, then by bits and method.
        tokens: tokens scored per model.
        prompt: start of the stories.
        full_story: continuation by the full model.
        hlq_story: continuation by the 2-bit HLQ model, same seed.
        isa: kernels that ran.
        threads: threads that ran.
    """

    rows: tuple[DemoRow, ...]
    tokens: int
    prompt: str
    full_story: str
    hlq_story: str
    isa: str
    threads: int


def run_demo(folder: Path, *, threads: int | None = None, progress: Progress | None = None) -> DemoResult:
    """Quantize the bundled model at 2, 3 and 4 bits by each method and compare.

    Args:
        folder: where the quantized models go, as `hlq-2bit` and so on.
        threads: all physical cores by default.
        progress: called before each step.

    Raises:
        OutputExistsError: one of the models is already there.
    """
    plan = [(bits, method) for bits in BITS for method in METHODS]
    steps = iter(range(len(plan) + 4))

    def say(what: str) -> None:
        if progress is not None:
            progress(next(steps), len(plan) + 4, what)

    source = bundled_model()
    paths = [folder / f"{method}-{bits}bit" for bits, method in plan]
    for path in paths:
        if path.exists():
            raise OutputExistsError(f"{path} exists; give another folder with --out, or remove it")
    for (bits, method), path in zip(plan, paths, strict=True):
        say(f"quantizing to {bits} bits by {method}")
        quantize(source, path, bits=bits, group_size=GROUP_SIZE, method=method, threads=threads)

    say("sampling an evaluation text from the full model")
    full = load(source, threads=threads)
    text = sample_text(full, _SEQUENCES, _CONTEXT, seed=0)
    models = [full, *(load(path, threads=threads) for path in paths)]
    say(f"predicting {text.size} tokens with each model")
    evaluations = evaluate_all(models, text.ravel().tolist(), _CONTEXT, reference=full)
    say("measuring decode speed")
    speeds = decode_speeds(models)
    rows = []
    for (bits, method), path, evaluation, speed in zip(
        [(16, FULL), *plan], [source, *paths], evaluations, speeds, strict=True
    ):
        size = describe(path)
        rows.append(
            DemoRow(
                method=method,
                bits=bits,
                bits_per_weight=size["linear_bits_per_weight"],
                nbytes=size["nbytes"],
                nll=evaluation.nll,
                perplexity=evaluation.perplexity,
                kl=evaluation.kl or 0.0,
                top1_agreement=evaluation.top1_agreement or 0.0,
                decode_tok_s=speed,
            )
        )
    say("telling a story")
    hlq_2bit = models[1 + plan.index((2, "hlq"))]
    return DemoResult(
        rows=tuple(rows),
        tokens=evaluations[0].tokens,
        prompt=_PROMPT,
        full_story=tell(full),
        hlq_story=tell(hlq_2bit),
        isa=full.isa,
        threads=full.threads,
    )


def decode_speeds(models: Sequence["LanguageModel"]) -> list[float]:
    """Tokens per second of each model: medians over repeats that take turns."""
    prompt = models[0].tokenizer.encode(_PROMPT)
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(_SPEED_REPEATS):
        for own, model in zip(seconds, models, strict=True):
            own.append(time_generation(model, [prompt], _SPEED_TOKENS)[1])
    return [_SPEED_TOKENS / statistics.median(own) for own in seconds]


def tell(model: "LanguageModel") -> str:
    """A short story, the prompt left out, up to the end of its last whole sentence."""
    text = model.generate(_PROMPT, max_new_tokens=_STORY_TOKENS, temperature=0.8, top_p=0.9, seed=10)
    whole = re.match(r"""(?s).*[.!?]["']?""", text)
    return whole.group() if whole else text
