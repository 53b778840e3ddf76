"""elutq beside llama.cpp and its forks: decode and prefill of one shape, interleaved, on random weights.

    python benchmarks/peers.py --peer llama.cpp=PATH/llama-bench:Q2_K \
        --peer 'ik_llama.cpp=PATH/llama-bench:IQ2_K:-rtr 1' [--shape llama-2-7b] [--bits 2] [--threads 1 2]

A peer is NAME=PROGRAM:TYPE[:OPTIONS]: a `llama-bench` (a path, or a name on PATH), the type of its weights
(one of random_gguf.py), and options to give it, its best ones. Models of that type are written to --models,
or a temporary folder. All programs run in turn on the same threads, so that a machine whose speed drifts
drifts for all. Figures are medians over the rounds. elutq decodes after the first prompt of --prompt, peers
from an empty context, which spares them the cache. Prints a table, where speedup is elutq's over that program
and the fraction is of the read bandwidth measured between the runs, and writes JSON to --out.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from random_gguf import TYPES, token_bytes, write_random_gguf
from tables import print_table, results_file

from elutq.bench import bench, source_commit
from elutq.runtime import LanguageModel, cpu_name, random_model, read_bandwidth
from elutq.scheme import QuantScheme
from elutq.shapes import SHAPES, shape_config


@dataclass(frozen=True)
class Peer:
    """A program to compare with.

    Attributes:
        name: what to call it.
        program: its `llama-bench`.
        kind: type of its weights.
        options: given to it.
        model: its model.
        token_bytes: weights that a token of that model reads.
    """

    name: str
    program: str
    kind: str
    options: str
    model: Path
    token_bytes: int

    @property
    def label(self) -> str:
        """Name, type and options."""
        return f"{self.name} {self.kind} {self.options}".strip()

    def run(self, prompts: Sequence[int], gen: int, threads: int) -> tuple[dict[str, float], str]:
        """One `llama-bench`, each test once after a warm-up: tokens per second, and its commit."""
        command = [self.program, "-m", str(self.model), "-t", str(threads), "-r", "1", "-o", "json"]
        command += ["-p", ",".join(map(str, prompts)), "-n", str(gen), *shlex.split(self.options)]
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ).stdout
        tests = json.loads(output[output.index("[\n") :])
        figures = {
            f"prefill_{test['n_prompt']}" if test["n_prompt"] else "decode": test["avg_ts"] for test in tests
        }
        return figures, tests[0]["build_commit"]


def main() -> None:
    """Measure, print and write."""
    llamas = [name for name, config in SHAPES.items() if config["model_type"] == "llama"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", action="append", required=True, metavar="NAME=PROGRAM:TYPE[:OPTIONS]")
    parser.add_argument("--shape", default="llama-2-7b", choices=llamas)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--gen", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa", help="instruction set of elutq's kernels; by default the best one")
    parser.add_argument("--models", type=Path, help="keep the peers' models here and use them again")
    parser.add_argument("--out", type=Path, help="JSON file; by default one in benchmarks/results/")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as work:
        peers = [parse_peer(text, args.shape, args.models or Path(work)) for text in args.peer]
        rows = []
        for threads in args.threads:
            model = random_model(args.shape, args.bits, threads=threads, isa=args.isa)
            rows += compare(model, args.bits, peers, args.prompt, args.gen, args.rounds)
            isa = model.isa
            model.close()
    result = {
        "shape": args.shape,
        "bits": args.bits,
        "group_size": 128,
        "isa": isa,
        "gen": args.gen,
        "rounds": args.rounds,
        "cpu": cpu_name(),
        "commit": source_commit(),
        "results": rows,
    }
    print(f"{args.shape} on {cpu_name()}, {isa} kernels")
    print_table([{key: value for key, value in row.items() if key != "runs"} for row in rows])
    out = args.out or results_file(f"peers-{args.shape}-{args.bits}bit{f'-{args.isa}' if args.isa else ''}")
    out.write_text(json.dumps(result, indent=2) + "\n")


def parse_peer(text: str, shape: str, models: Path) -> Peer:
    """A peer of the command line, its model written."""
    name, _, rest = text.partition("=")
    program, kind, options, *_ = [*rest.split(":", 2), "", ""]
    found = shutil.which(program)
    if found is None or kind not in TYPES:
        raise SystemExit(f"--peer {text}: must be NAME=PROGRAM:TYPE, TYPE one of {', '.join(TYPES)}")
    path = models / f"{shape}-{kind}.gguf"
    config = shape_config(shape)
    if not path.exists():
        write_random_gguf(config, kind, path)
    return Peer(name, found, kind, options, path, token_bytes(config, kind))


def compare(
    model: LanguageModel, bits: int, peers: Sequence[Peer], prompts: Sequence[int], gen: int, rounds: int
) -> list[dict[str, Any]]:
    """One row per program: medians, and how many times as fast elutq is as that program."""
    runs: dict[str, list[dict[str, float]]] = {}
    commits = {"elutq": source_commit()}
    bandwidth = []
    for _ in range(rounds):
        runs.setdefault("elutq", []).append(run_elutq(model, bits, prompts, gen))
        bandwidth.append(read_bandwidth(model.threads))
        for peer in peers:
            figures, commits[peer.label] = peer.run(prompts, gen, model.threads)
            runs.setdefault(peer.label, []).append(figures)
            bandwidth.append(read_bandwidth(model.threads))
    read_bytes = [model.bytes_per_token(prompts[0] + gen // 2), *(peer.token_bytes for peer in peers)]
    medians = {name: {key: median(r[key] for r in found) for key in found[0]} for name, found in runs.items()}
    rows = []
    for (name, figures), nbytes in zip(medians.items(), read_bytes, strict=True):
        row: dict[str, Any] = {"program": name, "commit": commits[name], "threads": model.threads}
        row["mb_per_token"] = nbytes / 1e6
        for figure, own in medians["elutq"].items():
            row[f"{figure}_tok_s"] = figures[figure]
            row[f"{figure}_speedup"] = own / figures[figure]
        row["read_gb_s"] = median(bandwidth)
        row["decode_fraction"] = nbytes * figures["decode"] / 1e9 / median(bandwidth)
        rows.append({**row, "runs": runs[name]})
    return rows


def run_elutq(model: LanguageModel, bits: int, prompts: Sequence[int], gen: int) -> dict[str, float]:
    """The same tests, each once after its own warm-up."""
    figures = {"decode": 0.0}
    for prompt in prompts:
        result = bench(model, QuantScheme(bits), prompt=prompt, gen=gen, repeat=1)
        figures[f"prefill_{prompt}"] = result.prefill_tok_s
        figures["decode"] = figures["decode"] or result.decode_tok_s
    return figures


if __name__ == "__main__":
    main()
