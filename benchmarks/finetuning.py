"""What each stage of finetuning is worth: KL divergence from the original, and increase in nll.

    python benchmarks/finetuning.py MODEL --text FILE [FILE ...] --calibration FILE [...]
        [--bits 2 3] [--variants "block + e2e" ...] [--finetune-samples 512]

Every block linear of MODEL is quantized to groups of 128, embedding and head are left alone, and the model is
finetuned in each of the variants below; texts, windows and figures are those of `benchmarks/accuracy.py`.
Prints one JSON object, and each result to stderr as it comes.
"""

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from straight_through import straight_through

from elutq import load
from elutq.bench import source_commit
from elutq.eval import evaluate
from elutq.finetune.options import FinetuneOptions, choose
from elutq.quantize import quantize
from elutq.runtime import cpu_name


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--variants", nargs="+", default=list(variants(512)), choices=list(variants(512)))
    parser.add_argument("--finetune-samples", type=int, default=512)
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=8192)
    args = parser.parse_args()

    full = load(args.model)
    texts = [full.tokenizer.encode(path.read_text(), add_special_tokens=False) for path in args.text]
    full_nll = [evaluate(full, ids, args.ctx, max_tokens=args.max_tokens).nll for ids in texts]
    results: list[dict[str, Any]] = []
    for bits in args.bits:
        for variant in args.variants:
            method, finetune = variants(args.finetune_samples)[variant]
            rounding = straight_through() if "straight-through" in variant else nullcontext()
            with tempfile.TemporaryDirectory() as work, rounding:
                report = quantize(
                    args.model,
                    Path(work) / "out",
                    bits=bits,
                    method=method,
                    calibration=args.calibration,
                    calibration_length=args.ctx,
                    finetune=finetune,
                    lm_head_bits=16,
                    embedding_bits=16,
                )
                model = load(Path(work) / "out")
                scores = [
                    evaluate(model, ids, args.ctx, reference=full, max_tokens=args.max_tokens)
                    for ids in texts
                ]
            results.append(
                {
                    "bits": bits,
                    "variant": variant,
                    "bits_per_weight": report.summary.linear_bits_per_weight,
                    "kl": fmean(score.kl or 0.0 for score in scores),
                    "nll_increase": fmean(
                        score.nll - base for score, base in zip(scores, full_nll, strict=True)
                    ),
                    "kl_by_text": {
                        path.name: score.kl for path, score in zip(args.text, scores, strict=True)
                    },
                    "nll_increase_by_text": {
                        path.name: score.nll - base
                        for path, score, base in zip(args.text, scores, full_nll, strict=True)
                    },
                    "stages": {stage["name"]: stage["seconds"] for stage in report.stages},
                }
            )
            print(json.dumps(results[-1]), file=sys.stderr)
    print(
        json.dumps(
            {
                "model": args.model.name,
                "context": args.ctx,
                "max_tokens": args.max_tokens,
                "calibration": [Path(text).name for text in args.calibration],
                "finetune_samples": args.finetune_samples,
                "cpu": cpu_name(),
                "isa": full.isa,
                "commit": source_commit(),
                "results": results,
            },
            indent=2,
        )
    )


def variants(samples: int) -> dict[str, tuple[str, FinetuneOptions | None]]:
    """Name -> method and finetuning."""
    best = choose("best", None, samples)
    default = choose("balanced", None, samples)
    assert best is not None
    assert default is not None
    block, e2e = (replace(default, stages=(stage,)) for stage in ("block", "e2e"))
    uniform = replace(
        default, block=replace(default.block, uniform=True), e2e=replace(default.e2e, uniform=True)
    )
    return {
        "hlq-gptq": ("hlq-gptq", None),
        "block, scales alone": ("hlq-gptq", replace(block, block=replace(block.block, latent_rate=0.0))),
        "block": ("hlq-gptq", block),
        "block, straight-through codes": (
            "hlq-gptq",
            replace(block, block=replace(block.block, latent_rate=0.0225)),
        ),
        "block, half of the inputs full": (
            "hlq-gptq",
            replace(block, block=replace(block.block, full_share=0.5)),
        ),
        "e2e": ("hlq-gptq", e2e),
        "e2e, codes too": ("hlq-gptq", replace(best, stages=("e2e",))),
        "block + e2e": ("hlq-gptq", default),
        "block + e2e, codes too": ("hlq-gptq", best),
        "block + e2e on the text": ("hlq-gptq", replace(default, objective="lm")),
        "uniform grid, block + e2e": ("gptq", uniform),
    }


if __name__ == "__main__":
    main()
