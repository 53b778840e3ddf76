"""elutq beside llama.cpp: decode and prefill of one shape, interleaved, on random weights.

    python benchmarks/peers.py [--shape llama-2-7b] [--bits 2] [--threads 1 2] [--rounds 3]

Needs llama.cpp's `llama-bench` on PATH (or --llama-bench) and, unless --gguf names a model, the `gguf`
package to write a Q2_K one of the same shape. Both programs run in turn, so that a machine whose speed drifts
drifts for both; figures are medians over the rounds. Prints one JSON object.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from elutq.architectures import EngineConfig, engine_config
from elutq.bench import source_commit
from elutq.runtime import cpu_name
from elutq.shapes import SHAPES

FIGURES = ("prefill_tok_s", "decode_tok_s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-2-7b", choices=[s for s in SHAPES if s.startswith("llama")])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--gen", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-bench", default=shutil.which("llama-bench"))
    parser.add_argument("--gguf", type=Path)
    args = parser.parse_args()
    if not args.llama_bench:
        parser.error("llama-bench is not on PATH; build llama.cpp, or say --llama-bench")

    with tempfile.TemporaryDirectory() as work:
        gguf = args.gguf or write_gguf(engine_config(SHAPES[args.shape]), Path(work) / "q2_k.gguf")
        rows: list[dict[str, Any]] = []
        for threads in args.threads:
            ours, theirs = [], []
            for _ in range(args.rounds):
                ours.append(run_elutq(args.shape, args.bits, args.prompt, args.gen, threads))
                theirs.append(run_llama_bench(args.llama_bench, gguf, args.prompt, args.gen, threads))
            row: dict[str, Any] = {"threads": threads}
            for figure in FIGURES:
                row[figure] = median(run[figure] for run in ours)
                row[f"llama_cpp_{figure}"] = median(run[figure] for run in theirs)
                row[f"{figure}_ratio"] = row[figure] / row[f"llama_cpp_{figure}"]
            for figure in ("read_bandwidth_gb_s", "decode_roofline_fraction", "peak_rss_bytes", "load_s"):
                row[figure] = median(run[figure] for run in ours)
            row["rounds"] = {"elutq": ours, "llama_cpp": theirs}
            rows.append(row)
    result = {
        "shape": args.shape,
        "bits": args.bits,
        "group_size": 128,
        "llama_cpp_model": args.gguf.name if args.gguf else "Q2_K, random",
        "prompt": args.prompt,
        "gen": args.gen,
        "cpu": cpu_name(),
        "commit": source_commit(),
        "results": rows,
    }
    print(json.dumps(result, indent=2))


def run_elutq(shape: str, bits: int, prompt: int, gen: int, threads: int) -> dict[str, Any]:
    """One `elutq bench`, in a process of its own as the peer is."""
    command = [sys.executable, "-m", "elutq", "bench", "--shape", shape, "--bits", str(bits), "--json"]
    command += ["--prompt", str(prompt), "--gen", str(gen), "--threads", str(threads), "--repeat", "3"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    report: dict[str, Any] = json.loads(output.splitlines()[-1])
    return report


def run_llama_bench(program: str, model: Path, prompt: int, gen: int, threads: int) -> dict[str, Any]:
    """One `llama-bench`: its mean over three repeats."""
    command = [program, "-m", str(model), "-t", str(threads), "-p", str(prompt), "-n", str(gen)]
    command += ["-r", "3", "-o", "json"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    tests = json.loads(output.stdout)
    prefill = next(test for test in tests if test["n_prompt"])
    decode = next(test for test in tests if test["n_gen"])
    return {
        "prefill_tok_s": prefill["avg_ts"],
        "decode_tok_s": decode["avg_ts"],
        "build": prefill["build_commit"],
    }


def write_gguf(config: EngineConfig, path: Path) -> Path:
    """A Llama of this shape with random Q2_K blocks, a Q4_K head and a Q4_0 embedding."""
    import gguf

    types = gguf.GGMLQuantizationType
    rng = np.random.default_rng(0)
    scale = np.frombuffer(np.float16(0.0025).tobytes(), np.uint8)
    # Bytes of the half-precision scales in a block; everything else in it may be any bits.
    scale_offsets = {types.Q2_K: (80, 82), types.Q4_K: (0, 2), types.Q4_0: (0,)}

    def random_matrix(rows: int, columns: int, kind: Any) -> np.ndarray[Any, Any]:
        values, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (rows * columns // values, size), dtype=np.uint8)
        for offset in scale_offsets[kind]:
            blocks[:, offset : offset + 2] = scale
        return blocks.reshape(rows, -1)

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, rows: int, columns: int, kind: Any) -> None:
        writer.add_tensor(f"{name}.weight", random_matrix(rows, columns, kind), raw_dtype=kind)

    hidden, intermediate = config.hidden_size, config.intermediate_size
    kv_size = config.num_key_value_heads * config.head_dim
    add("token_embd", config.vocab_size, hidden, types.Q4_0)
    add("output", config.vocab_size, hidden, types.Q4_K)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(config.num_hidden_layers):
        for name, rows, columns in (
            ("attn_q", hidden, hidden),
            ("attn_k", kv_size, hidden),
            ("attn_v", kv_size, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", intermediate, hidden),
            ("ffn_up", intermediate, hidden),
            ("ffn_down", hidden, intermediate),
        ):
            add(f"blk.{layer}.{name}", rows, columns, types.Q2_K)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    main()
