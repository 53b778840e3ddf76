"""What quantization costs: KL divergence from the original and increase in nll, per method and bit width.

    python benchmarks/accuracy.py MODEL --text FILE [FILE ...] [--bits 2 3 4] [--methods rtn uniform ao hlq]
    python benchmarks/accuracy.py MODEL --text FILE [...] --methods gptq hlq-gptq --calibration FILE [...]
    python benchmarks/accuracy.py MODEL --text FILE [...] --ablation --bits 2 --calibration FILE [...]

Every block linear of MODEL is quantized, embedding and head are left alone. Each text is cut into windows of
--ctx tokens and only its first --max-tokens count; figures are the mean over the texts, in nats per token.
`+importance` marks methods whose columns are weighed (`elutq.importance`). Methods with calibration see 128
windows of --ctx tokens, as many from each of the calibration texts. `--ablation` runs hlq-gptq with one
option of its solver changed at a time. Prints one JSON object, and each result to stderr as it comes.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from elutq import load
from elutq.bench import source_commit
from elutq.eval import evaluate
from elutq.quantize import METHODS, quantize
from elutq.runtime import cpu_name


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group-size", type=int, nargs="+", default=[128])
    parser.add_argument("--param-bits", type=int, nargs="+", default=[16], help="of scales and zeros: 16, 8")
    parser.add_argument("--methods", nargs="+", default=["rtn", "uniform", "ao", "hlq"], choices=METHODS)
    parser.add_argument("--importance", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--calibration", nargs="+", default=["self"])
    parser.add_argument("--calibration-samples", type=int, default=128)
    parser.add_argument("--rotate", action="store_true")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--exact", action="store_true", help="without int8 tables")
    args = parser.parse_args()

    full = load(args.model)
    texts = [full.tokenizer.encode(path.read_text(), add_special_tokens=False) for path in args.text]
    full_nll = [evaluate(full, ids, args.ctx, max_tokens=args.max_tokens).nll for ids in texts]
    methods: list[tuple[str, str, Any]] = [(method, method, None) for method in args.methods]
    if args.ablation:
        methods = [("hlq-gptq", f"hlq-gptq, {name}", solver) for name, solver in ablations().items()]
    settings = [
        (bits, group_size, param_bits, *method, importance == "yes")
        for bits in args.bits
        for group_size in args.group_size
        for param_bits in args.param_bits
        for method in methods
        for importance in args.importance
        if method[0] in ("uniform", "hlq") or importance == "no"  # the others stay as published
    ]
    results: list[dict[str, Any]] = []
    for bits, group_size, param_bits, method, name, solver, importance in settings:
        with tempfile.TemporaryDirectory() as work:
            report = quantize(
                args.model,
                Path(work) / "out",
                bits=bits,
                group_size=group_size,
                param_bits=param_bits,
                method=method,
                importance=importance,
                calibration=args.calibration,
                calibration_samples=args.calibration_samples,
                calibration_length=args.ctx,
                rotate=args.rotate,
                solver=solver,
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
                "group_size": group_size,
                "param_bits": param_bits,
                "method": name + ("+importance" if importance else ""),
                "bits_per_weight": report.summary.linear_bits_per_weight,
                "kl": fmean(score.kl or 0.0 for score in scores),
                "nll_increase": fmean(score.nll - base for score, base in zip(scores, full_nll, strict=True)),
                "kl_by_text": {path.name: score.kl for path, score in zip(args.text, scores, strict=True)},
                "seconds": report.seconds,
            }
        )
        print(json.dumps(results[-1]), file=sys.stderr)
    print(
        json.dumps(
            {
                "model": args.model.name,
                "context": args.ctx,
                "max_tokens": args.max_tokens,
                "exact": args.exact,
                "rotate": args.rotate,
                "calibration": [Path(text).name for text in args.calibration],
                "calibration_samples": args.calibration_samples,
                "cpu": cpu_name(),
                "isa": full.isa,
                "commit": source_commit(),
                "full_nll": dict(zip((path.name for path in args.text), full_nll, strict=True)),
                "results": results,
            },
            indent=2,
        )
    )


def ablations() -> dict[str, Any]:
    """The solver as it is, and with one option changed at a time."""
    from elutq.gptq import SolverOptions

    default = SolverOptions()
    changes: list[dict[str, Any]] = [
        {"target_share": 0.0},
        {"target_share": 0.5},
        {"sweeps": 0},
        {"sweeps": 2},
        {"target_share": 0.0, "sweeps": 0},
        {"descents": 1},
        {"descents": 0},
        {"rounds": 2},
        {"rounds": 8},
        {"damp": 0.01},
        {"damp": 0.1},
    ]
    named = {
        ", ".join(f"{k} {v}" for k, v in change.items()): replace(default, **change) for change in changes
    }
    return {"default": default, **named}


if __name__ == "__main__":
    main()
