"""What other quantizers cost the same model: KL divergence and nll beside ours, by one protocol.

    python benchmarks/accuracy_peers.py MODEL --text FILE [FILE ...] --calibration FILE:WINDOWS [...] \
        [--llama-cpp NAME[=FOLDER]:TYPE,TYPE,...] [--python METHOD=PYTHON:BITS/GROUP,...] [--elutq OUT ...]

MODEL is an unquantized Hugging Face folder. Texts are cut as in accuracy.py: windows of --ctx tokens, each on
its own, without BOS, the first --max-tokens of each text; texts have equal weight. Only block linears are
quantized.

- --llama-cpp: the tools of llama.cpp or a fork, in FOLDER or on PATH. TYPE is a name that `llama-quantize`
  knows; with "/pure" behind it, every block linear has that one type. MODEL is written as GGUF, calibrated,
  quantized, and written in float32 again. Needs the package `gguf`.
- --python: a package in its own environment, METHOD one of quantize_peer.py, PYTHON that environment's.
- --elutq: folders that `elutq quantize` made of MODEL with --embedding-bits 16 --lm-head-bits 16.

All are evaluated on our engine: `kl` over all predicted tokens, `kl_second_half` over those that
llama-perplexity scores. `kl_own` is what llama-perplexity finds with llama.cpp's own kernels, which round
activations. Calibration is WINDOWS windows of each FILE, evenly spread. All models are in memory together:
meant for small ones. Prints a table and writes JSON to --out.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from llama_cpp import LlamaCpp
from tables import print_table, results_file

from elutq.bench import source_commit
from elutq.eval import Scores, mean_evaluation, score_all
from elutq.report import describe
from elutq.runtime import LanguageModel, cpu_name, load


@dataclass
class Subject:
    """A quantized model.

    Attributes:
        method: who quantized it, and how.
        version: of that program.
        folder: where it lies, as Hugging Face or HLQ folder.
        bits_per_weight: of its block linears, as the method stores them.
        kl_own: KL divergence by text on the method's own kernels.
    """

    method: str
    version: str
    folder: Path
    bits_per_weight: float
    kl_own: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """What every method is given: the model, texts and windows of calibration tokens, and a place to work."""

    model: Path
    full: LanguageModel
    texts: Sequence[Path]
    context: int
    max_tokens: int
    calibration: Sequence[Sequence[int]]
    work: Path


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration", nargs="+", required=True, metavar="FILE:WINDOWS")
    parser.add_argument("--llama-cpp", nargs="+", default=[], metavar="NAME[=FOLDER]:TYPE,TYPE,...")
    parser.add_argument("--python", nargs="+", default=[], metavar="METHOD=PYTHON:BITS/GROUP,...")
    parser.add_argument("--elutq", type=Path, nargs="+", default=[], metavar="OUT")
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, help="JSON file; by default one in benchmarks/results/")
    args = parser.parse_args()

    full = load(args.model)
    with tempfile.TemporaryDirectory() as work:
        task = Task(
            args.model,
            full,
            args.text,
            args.ctx,
            args.max_tokens,
            [window for spec in args.calibration for window in calibration_windows(full, spec, args.ctx)],
            Path(work),
        )
        subjects = [elutq_subject(folder) for folder in args.elutq]
        subjects += [subject for spec in args.python for subject in python_subjects(spec, task)]
        subjects += [subject for spec in args.llama_cpp for subject in llama_cpp_subjects(spec, task)]
        rows = evaluate(subjects, task)
    result = {
        "model": args.model.name,
        "context": args.ctx,
        "max_tokens": args.max_tokens,
        "texts": [path.name for path in args.text],
        "calibration": [Path(spec).name for spec in args.calibration],
        "cpu": cpu_name(),
        "isa": full.isa,
        "commit": source_commit(),
        "results": rows,
    }
    print_table(
        [
            {key: row[key] for key in row if key not in ("version", "by_text")}
            | {"bits_per_weight": f"{row['bits_per_weight']:.3f}"}
            for row in rows
        ]
    )
    out = args.out or results_file(f"accuracy-peers-{args.model.name}")
    out.write_text(json.dumps(result, indent=2) + "\n")


def calibration_windows(full: LanguageModel, spec: str, context: int) -> list[list[int]]:
    """Evenly spread windows of a text."""
    file, _, count = spec.rpartition(":")
    ids = full.tokenizer.encode(Path(file).read_text(), add_special_tokens=False)
    starts = np.linspace(0, len(ids) - context, int(count)).astype(int)
    return [ids[start : start + context] for start in starts]


def elutq_subject(folder: Path) -> Subject:
    """A folder of ours."""
    description = describe(folder)
    quantized = {tensor["kind"] for tensor in description["tensors"] if tensor["group_size"]}
    if quantized & {"embedding", "head"}:
        raise SystemExit(f"{folder}: quantize it with --embedding-bits 16 --lm-head-bits 16, as the others")
    return Subject(f"elutq {folder.name}", source_commit(), folder, description["linear_bits_per_weight"])


def python_subjects(spec: str, task: Task) -> list[Subject]:
    """Those that quantize_peer.py makes in another environment."""
    method, _, rest = spec.partition("=")
    python, _, schemes = rest.rpartition(":")
    windows = task.work / "calibration.json"
    windows.write_text(json.dumps(task.calibration))
    subjects = []
    for scheme in schemes.split(","):
        bits, _, group = scheme.partition("/")
        out = task.work / f"{method}-{bits}-{group}"
        command = [python, Path(__file__).with_name("quantize_peer.py"), method, task.model, out]
        command += ["--bits", bits, "--group-size", group, "--calibration", windows]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        label = f"{method} {bits} bits, groups of {group}"
        subjects.append(Subject(label, found["version"], out, found["bits_per_weight"]))
    return subjects


def llama_cpp_subjects(spec: str, task: Task) -> list[Subject]:
    """Those of llama.cpp's own tools."""
    from gguf_model import gguf_text, read_gguf, write_gguf

    program, _, kinds = spec.rpartition(":")
    name, _, folder = program.partition("=")
    tools = LlamaCpp(name, Path(folder) if folder else None, task.full.threads)
    work = task.work / name
    work.mkdir()
    full, text, imatrix = work / "full.gguf", work / "text.txt", work / "imatrix"
    write_gguf(task.model, full)
    tokenizer = task.full.tokenizer
    calibration = "".join(tokenizer.decode(ids, skip_special_tokens=False) for ids in task.calibration)
    text.write_text(gguf_text(task.model, calibration))
    tools.imatrix(full, text, task.context, imatrix)
    logits = [work / f"{path.name}.logits" for path in task.texts]
    for path, saved in zip(task.texts, logits, strict=True):
        text.write_text(gguf_text(task.model, path.read_text()))
        tokens = tools.save_logits(full, text, task.context, task.max_tokens, saved)
        if tokens != tokenizer.encode(path.read_text(), add_special_tokens=False)[: len(tokens)]:
            raise SystemExit(f"{name} cuts {path} into other tokens than Hugging Face's tokenizer")
    subjects = []
    for kind in kinds.split(","):
        packed, unpacked = work / "packed.gguf", work / "unpacked.gguf"
        tools.quantize(full, kind, imatrix, packed)
        tools.dequantize(packed, unpacked)
        out = work / kind.replace("/", "-")
        read_gguf(unpacked, task.model, out)
        bits = linear_bits_per_weight(full, packed, task.model)
        kl_own = [tools.kl(packed, saved, task.context) for saved in logits]
        subjects.append(Subject(f"{name} {kind}", tools.version(), out, bits, kl_own))
    return subjects


def linear_bits_per_weight(full: Path, packed: Path, model: Path) -> float:
    """From what quantizing the block linears, float32 before, took off the file."""
    linears = [t for t in describe(model)["tensors"] if len(t["shape"]) == 2]
    weights = sum(t["params"] for t in linears if t["kind"] not in ("embedding", "head"))
    return 32 - 8 * (full.stat().st_size - packed.stat().st_size) / weights


def score(models: Sequence[LanguageModel], text: Path, task: Task) -> list[Scores]:
    """Models against the full one on a text."""
    ids = task.full.tokenizer.encode(text.read_text(), add_special_tokens=False)
    return score_all(models, ids, task.context, reference=task.full, max_tokens=task.max_tokens)


def second_half(scores: Scores) -> Any:
    """Of the tokens that llama-perplexity scores."""
    return scores.evaluation(first=scores.context // 2 + 1)


def evaluate(subjects: Sequence[Subject], task: Task) -> list[dict[str, Any]]:
    """A row per quantized model, by bits per weight."""
    models = [load(subject.folder) for subject in subjects]
    by_text = [score(models, text, task) for text in task.texts]
    rows = []
    for subject, scores in zip(subjects, zip(*by_text, strict=True), strict=True):
        whole = [found.evaluation() for found in scores]
        mean, half = mean_evaluation(whole), mean_evaluation([second_half(found) for found in scores])
        rows.append(
            {
                "method": subject.method,
                "version": subject.version,
                "bits_per_weight": subject.bits_per_weight,
                "kl": mean.kl,
                "nll_increase": mean.nll_increase,
                "top1_agreement": mean.top1_agreement,
                "kl_second_half": half.kl,
                "kl_own": fmean(subject.kl_own) if subject.kl_own else None,
                "by_text": {
                    text.name: {
                        "kl": found.evaluation().kl,
                        "kl_second_half": second_half(found).kl,
                        "kl_own": subject.kl_own[i] if subject.kl_own else None,
                    }
                    for i, (text, found) in enumerate(zip(task.texts, scores, strict=True))
                },
            }
        )
    return sorted(rows, key=lambda row: row["bits_per_weight"])


if __name__ == "__main__":
    main()
