"""How fast a quantized model on disk is ready, and what memory it takes, against its file and KV cache.

    python benchmarks/load.py [--shape llama-2-7b] [--bits 2] [--threads 1 2] [--folder DIR]

Writes a folder of random weights (to --folder, which is kept and used again, or a temporary one), so that it
lies in the page cache, and loads it in a fresh process --repeat times per number of threads. Each process
then reads a prompt of --prompt tokens. Prints one JSON object; figures are medians.
"""

import argparse
import json
import multiprocessing
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from elutq import load
from elutq.architectures import engine_config
from elutq.bench import source_commit
from elutq.checkpoint import CheckpointWriter, TensorSpec, model_parts
from elutq.quantize import plan
from elutq.runtime import cpu_name
from elutq.scheme import QuantScheme
from elutq.shapes import SHAPES, random_linears


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-2-7b", choices=SHAPES)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as work:
        folder = args.folder or Path(work) / "model"
        if not folder.exists():
            write_random_folder(args.shape, QuantScheme(args.bits, args.group_size), folder)
        results = [measure(folder, threads, args.prompt, args.repeat) for threads in args.threads]
        file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(
        json.dumps(
            {
                "shape": args.shape,
                "bits": args.bits,
                "group_size": args.group_size,
                "file_bytes": file_bytes,
                "cpu": cpu_name(),
                "commit": source_commit(),
                "results": [
                    {
                        **result,
                        "resident_over_file_and_cache": result["resident_bytes"]
                        / (file_bytes + result["cache_bytes"]),
                    }
                    for result in results
                ],
            },
            indent=2,
        )
    )


def write_random_folder(shape: str, scheme: QuantScheme, out: Path) -> None:
    """An HLQ folder of this shape, as `elutq quantize` would make it, with random weights."""
    config = engine_config(SHAPES[shape])
    whole = plan(config, scheme, None, None)
    parts = {part.name: part for part in model_parts(config, whole)}
    specs = [
        TensorSpec(name, tensor.dtypes[0] if part.scheme else "F32", tensor.shape)
        for part in parts.values()
        for name, tensor in part.tensors.items()
    ]
    with CheckpointWriter(out, specs, "random") as writer:
        for module, matrix in random_linears(config, scheme, seed=0):
            for name in ("planes", "scales", "zeros"):
                writer.write(f"{module}.{name}", getattr(matrix, name))
            writer.commit(module, parts.pop(module).tensors, {})
        for name, part in parts.items():
            writer.write(part.source, np.ones(part.shape, np.float32))
            writer.commit(name, part.tensors, {})
        writer.finish({**SHAPES[shape], "quantization_config": whole.to_config()})


def measure(folder: Path, threads: int, prompt: int, repeat: int) -> dict[str, Any]:
    """Medians over fresh processes."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        runs = [pool.apply(load_once, (folder, threads, prompt)) for _ in range(repeat)]
    return {"threads": threads, **{figure: median(run[figure] for run in runs) for figure in runs[0]}}


def load_once(folder: Path, threads: int, prompt: int) -> dict[str, float]:
    """Load, run a prompt, look at the process's memory: what it takes beyond Python and its modules."""
    before = resident_bytes()
    with load(folder, threads=threads) as model:
        loaded = resident_bytes()
        sequence = model.new_sequence()
        model.step([(sequence, [1] * prompt)])
        c = model.config
        return {
            "load_s": model.load_seconds,
            "loaded_bytes": loaded - before,
            "resident_bytes": resident_bytes() - before,
            "cache_bytes": 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * prompt,
        }


def resident_bytes() -> int:
    """Memory of this process now, mapped files included."""
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) * 1024


if __name__ == "__main__":
    main()
