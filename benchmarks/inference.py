"""Speed of whole models of known shapes with random weights, as `elutq bench` measures it, in one table.

    python benchmarks/inference.py [--shape llama-2-7b llama-3-8b ...] [--bits 2 3 4] [--threads 1 2]
        [--isa avx512vbmi avx2] [--prompt 128 512]

Decode follows the first prompt of --prompt, decode together one of 8 tokens; its fraction is of the read
bandwidth measured in turn with it. Prints a table, and writes JSON to --out. benchmarks/load.py measures
loading, benchmarks/kernels.cpp the kernels alone.
"""

import argparse
import json
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from tables import print_table, results_file

from elutq.bench import BenchResult, bench, source_commit
from elutq.runtime import cpu_name, random_model
from elutq.scheme import QuantScheme
from elutq.shapes import SHAPES


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", default=["llama-2-7b", "llama-3-8b"], choices=SHAPES)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", nargs="+", help="by default the best instruction set of this machine")
    parser.add_argument("--prompt", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--batch", type=int, default=8, help="sequences that decode together")
    parser.add_argument("--gen", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file; by default one in benchmarks/results/")
    args = parser.parse_args()

    results: list[list[BenchResult]] = []
    rows = []
    for shape, bits, isa, threads in product(args.shape, args.bits, args.isa or [None], args.threads):
        scheme = QuantScheme(bits, args.group_size)
        with random_model(shape, bits, args.group_size, threads=threads, isa=isa) as model:
            runs = [
                bench(model, scheme, prompt=prompt, gen=args.gen, batch=batch, repeat=args.repeat)
                for prompt, batch in (*((prompt, 1) for prompt in args.prompt), (8, args.batch))
            ]
        results.append(runs)
        rows.append(table_row(shape, runs))
    print_table(rows)
    report = {
        "cpu": cpu_name(),
        "commit": source_commit(),
        "results": [
            {"shape": row["shape"], "runs": [asdict(run) for run in runs]}
            for row, runs in zip(rows, results, strict=True)
        ],
    }
    out = args.out or results_file("inference")
    out.write_text(json.dumps(report, indent=2) + "\n")


def table_row(shape: str, runs: list[BenchResult]) -> dict[str, Any]:
    """What one model did on one number of threads."""
    *prompts, together = runs
    first = runs[0]
    return {
        "shape": shape,
        "bits": first.bits,
        "isa": first.isa,
        "threads": first.threads,
        "decode_tok_s": first.decode_tok_s,
        "read_gb_s": first.read_bandwidth_gb_s,
        "decode_fraction": first.decode_roofline_fraction,
        **{f"prefill_{run.prompt}_tok_s": run.prefill_tok_s for run in prompts},
        f"decode_{together.batch}_together_tok_s": together.decode_tok_s,
    }


if __name__ == "__main__":
    main()
