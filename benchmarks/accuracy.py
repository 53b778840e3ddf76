"""What quantization costs: KL divergence from the original and increase in nll, per method and bit width.

    python benchmarks/accuracy.py MODEL --text FILE [FILE ...] [--bits 2 3 4] [--methods rtn uniform ao hlq]

Every block linear of MODEL is quantized, embedding and head are left alone. Each text is cut into windows of
--ctx tokens and only its first --max-tokens count; figures are the mean over the texts, in nats per token.
`+importance` marks methods whose columns are weighed (`elutq.importance`). Prints one JSON object.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from elutq import hlq, load
from elutq.bench import source_commit
from elutq.eval import evaluate
from elutq.quantize import quantize
from elutq.runtime import cpu_name


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--param-bits", type=int, nargs="+", default=[16], help="of scales and zeros: 16, 8")
    parser.add_argument("--methods", nargs="+", default=["rtn", "uniform", "ao", "hlq"], choices=hlq.METHODS)
    parser.add_argument("--importance", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--exact", action="store_true", help="without int8 tables")
    args = parser.parse_args()

    full = load(args.model)
    texts = [full.tokenizer.encode(path.read_text(), add_special_tokens=False) for path in args.text]
    full_nll = [evaluate(full, ids, args.ctx, max_tokens=args.max_tokens).nll for ids in texts]
    settings = [
        (bits, param_bits, method, importance == "yes")
        for bits in args.bits
        for param_bits in args.param_bits
        for method in args.methods
        for importance in args.importance
        if method in ("uniform", "hlq") or importance == "no"  # the others stay as published
    ]
    results: list[dict[str, Any]] = []
    for bits, param_bits, method, importance in settings:
        with tempfile.TemporaryDirectory() as work:
            report = quantize(
                args.model,
                Path(work) / "out",
                bits=bits,
                group_size=args.group_size,
                param_bits=param_bits,
                method=method,
                importance=importance,
                lm_head_bits=16,
                embedding_bits=16,
            )
            model = load(Path(work) / "out", exact=args.exact)
            scores = [
                evaluate(model, ids, args.ctx, reference=full, max_tokens=args.max_tokens) for ids in texts
            ]
        results.append(
            {
                "bits": bits,
                "param_bits": param_bits,
                "method": method + ("+importance" if importance else ""),
                "bits_per_weight": report.summary.linear_bits_per_weight,
                "kl": fmean(score.kl or 0.0 for score in scores),
                "nll_increase": fmean(score.nll - base for score, base in zip(scores, full_nll, strict=True)),
                "kl_by_text": {path.name: score.kl for path, score in zip(args.text, scores, strict=True)},
            }
        )
    print(
        json.dumps(
            {
                "model": args.model.name,
                "group_size": args.group_size,
                "context": args.ctx,
                "max_tokens": args.max_tokens,
                "exact": args.exact,
                "cpu": cpu_name(),
                "isa": full.isa,
                "commit": source_commit(),
                "full_nll": dict(zip((path.name for path in args.text), full_nll, strict=True)),
                "results": results,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
