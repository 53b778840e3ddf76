"""What choosing bits per matrix gains: KL divergence of models of a target size beside uniform ones.

    python benchmarks/budget.py MODEL --text FILE [FILE ...] --calibration FILE [FILE ...] [--method hlq]

Embedding and head are left alone. Sensitivities are measured on the calibration text, which a method with
calibration also uses, in 128 windows of --ctx tokens. Figures are the mean over the texts, in nats per token,
as in `benchmarks/accuracy.py`. Prints one JSON object.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from elutq import load
from elutq.bench import source_commit
from elutq.eval import evaluate
from elutq.quantize import METHODS, quantize
from elutq.runtime import cpu_name

UNIFORM: tuple[dict[str, Any], ...] = (
    {"bits": 2, "group_size": 128},
    {"bits": 2, "group_size": 64},
    {"bits": 3, "group_size": 128},
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--method", default="hlq", choices=METHODS)
    parser.add_argument("--targets", type=float, nargs="+", default=[2.375, 2.5, 2.75, 3.0, 3.5])
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=8192)
    args = parser.parse_args()

    full = load(args.model)
    texts = [full.tokenizer.encode(path.read_text(), add_special_tokens=False) for path in args.text]
    results: list[dict[str, Any]] = []
    for options in (*({"target_bpw": target} for target in args.targets), *UNIFORM):
        with tempfile.TemporaryDirectory() as work:
            report = quantize(
                args.model,
                Path(work) / "out",
                **options,
                method=args.method,
                lm_head_bits=16,
                embedding_bits=16,
                calibration=args.calibration,
                calibration_length=args.ctx,
            )
            model = load(Path(work) / "out")
            kl = [
                evaluate(model, ids, args.ctx, reference=full, max_tokens=args.max_tokens).kl or 0.0
                for ids in texts
            ]
        results.append(
            {
                **options,
                "bits_per_weight": report.summary.linear_bits_per_weight,
                "kl": fmean(kl),
                "kl_by_text": dict(zip((path.name for path in args.text), kl, strict=True)),
                "expected_kl": report.sensitivity and report.sensitivity["expected_kl"],
                "bits_per_weight_by_kind": {k.kind: k.bits_per_weight for k in report.summary.kinds},
            }
        )
    print(
        json.dumps(
            {
                "model": args.model.name,
                "method": args.method,
                "context": args.ctx,
                "max_tokens": args.max_tokens,
                "cpu": cpu_name(),
                "commit": source_commit(),
                "results": results,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
