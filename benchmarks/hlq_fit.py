"""Speed and error of the data-free solver, `elutq.hlq.fit`: weights in, packed planes, scales and zeros out.

    python benchmarks/hlq_fit.py [--bits 1 2 3 4] [--methods hlq uniform ...] [--dtype float32] [--threads N]

Weights are normal, of the shape given; the best of --repeat runs counts. Prints one JSON object.
"""

import argparse
import json
import os
import time
from typing import Any

import ml_dtypes
import numpy as np

from elutq import _core, hlq

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--group-size", type=int, nargs="+", default=[128])
    parser.add_argument(
        "--methods", nargs="+", default=["hlq"], choices=[m for m in hlq.METHODS if m != "adam"]
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()

    weight = np.random.default_rng(0).standard_normal((args.rows, args.columns), np.float32)
    weight = weight.astype(DTYPES[args.dtype])
    results: list[dict[str, Any]] = []
    for bits in args.bits:
        for group_size in args.group_size:
            for method in args.methods:
                seconds = []
                for _ in range(args.repeat):
                    begin = time.perf_counter()
                    matrix = hlq.fit(weight, bits, group_size, method=method, threads=args.threads)
                    seconds.append(time.perf_counter() - begin)
                error, norm = hlq.squared_error(weight, matrix)
                results.append(
                    {
                        "bits": bits,
                        "group_size": group_size,
                        "method": method,
                        "weights_per_s": round(weight.size / min(seconds)),
                        "relative_error": error / norm,
                    }
                )
    report = {
        "cpu": _core.cpu_model_name(),
        "threads": args.threads,
        "shape": [args.rows, args.columns],
        "dtype": args.dtype,
        "results": results,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
