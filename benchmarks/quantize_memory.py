"""Peak memory and speed of `elutq quantize` on a folder with the shapes of a known model.

    python benchmarks/quantize_memory.py --work /tmp/memory [--shape llama-2-7b] [--layers 32] [--bits 2]
    python benchmarks/quantize_memory.py --work /tmp/memory --layers 2 --method hlq-gptq --calibration FILE

The weights are one random block repeated. Quantization runs in a process of its own, whose memory is sampled
from /proc: anonymous memory, which only the process can give back, and resident memory, which adds the file
pages that happen to be mapped. Prints one JSON object.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from elutq.architectures import engine_config
from elutq.checkpoint import CheckpointWriter, TensorSpec, model_parts
from elutq.models import bundled_model
from elutq.runtime import cpu_name

LLAMA_2_7B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": LLAMA_2_7B,
    "llama-3.2-1b": {
        **LLAMA_2_7B,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
}


def write_model(folder: Path, config: Mapping[str, Any]) -> int:
    """Write a random bfloat16 model in shards of 5 GB; the number of its weights."""
    parts = model_parts(engine_config(config), None)
    specs = [TensorSpec(part.source, "BF16", part.shape) for part in parts]
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(np.float32).astype(ml_dtypes.bfloat16)
    total = 0
    with CheckpointWriter(folder, specs, "synthetic") as writer:
        for spec in specs:
            size = spec.nbytes // 2
            for begin in range(0, size, block.size):
                writer.write(spec.name, block[: min(block.size, size - begin)], at=begin)
            writer.commit(spec.name, [spec.name], {})
            total += size
        # Any tokenizer of a smaller vocabulary will do to calibrate.
        writer.finish(config, bundled_model().glob("tokenizer*.json"))
    return total


def sample_memory(command: list[str]) -> tuple[dict[str, int], float]:
    """Run a command; the highest RssAnon and VmRSS seen, in bytes, and the seconds it took."""
    peaks = {"RssAnon": 0, "VmRSS": 0}
    started = time.monotonic()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            for line in status.splitlines():
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]) << 10)
            time.sleep(0.01)
    if process.returncode:
        sys.exit(process.returncode)
    return peaks, time.monotonic() - started


QUANTIZE = """
import json, sys
from elutq.quantize import quantize

def announce(text):
    print(text, file=sys.stderr)

quantize(sys.argv[1], sys.argv[2], announce=announce, overwrite=True, **json.loads(sys.argv[3]))
"""


def main() -> None:
    """Make the model unless it is there, quantize it, print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the models; the source is kept")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="blocks; by default all that the shape has")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--method", default="hlq")
    parser.add_argument("--calibration", nargs="+", default=["self"])
    parser.add_argument("--calibration-samples", type=int, default=128)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()

    config = dict(SHAPES[options.shape])
    layers = options.layers or config["num_hidden_layers"]
    source = options.work / f"{options.shape}-{layers}-layers"
    out = options.work / "quantized"
    if not source.exists():
        write_model(source, {**config, "num_hidden_layers": layers})
    passed = (
        "bits",
        "method",
        "calibration",
        "calibration_samples",
        "calibration_length",
        "offload",
        "threads",
    )
    settings = {name: getattr(options, name) for name in passed}
    peaks, seconds = sample_memory(
        [sys.executable, "-c", QUANTIZE, str(source), str(out), json.dumps(settings)]
    )
    report = json.loads((out / "quantization_report.json").read_text())
    largest = max(tensor["params"] for tensor in report["summary"]["tensors"])
    shutil.rmtree(out)
    print(
        json.dumps(
            {
                "shape": options.shape,
                "layers": layers,
                **settings,
                "calibration": [Path(text).name for text in options.calibration],
                "params": report["summary"]["params"],
                "largest_tensor_bytes": 2 * largest,
                "peak_anonymous_bytes": peaks["RssAnon"],
                "peak_resident_bytes": peaks["VmRSS"],
                "file_bytes": report["file_bytes"],
                "seconds": seconds,
                "weights_per_second": report["weights_per_second"],
                "cpu": cpu_name(),
            }
        )
    )


if __name__ == "__main__":
    main()
