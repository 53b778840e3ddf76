"""llama.cpp's tools, or those of a fork, as a quantizer and as a judge of its own models."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

#: Times to run a program that may exit before its logging thread has written the last lines.
_TRIES = 3


@dataclass(frozen=True)
class LlamaCpp:
    """The tools of one build.

    Attributes:
        name: what to call it.
        folder: where `llama-quantize`, `llama-imatrix` and `llama-perplexity` lie; None if on PATH.
        threads: threads they run on.
    """

    name: str
    folder: Path | None
    threads: int

    def version(self) -> str:
        """What it says of itself."""
        return self._run("llama-perplexity", "--version").splitlines()[0].removeprefix("version: ")

    def imatrix(self, model: Path, text: Path, context: int, out: Path) -> None:
        """Write each column's mean square over a calibration text, in windows of `context` tokens."""
        self._run("llama-imatrix", "-m", model, "-f", text, "-o", out, *self._windows(context))

    def quantize(self, model: Path, kind: str, imatrix: Path | None, out: Path) -> None:
        """Quantize the block linears of a float32 model; embedding and head are left alone.

        Args:
            model: the model.
            kind: the tool's name for a mixture of types, such as "Q2_K"; with "/pure" behind it, that type
                for every block linear.
            imatrix: what `imatrix` wrote, or None.
            out: the file to make.
        """
        name, _, pure = kind.partition("/")
        options = ["--token-embedding-type", "f32", "--output-tensor-type", "f32"]
        options += ["--pure"] if pure else []
        options += ["--imatrix", str(imatrix)] if imatrix else []
        self._run("llama-quantize", *options, model, out, name, self.threads)

    def dequantize(self, model: Path, out: Path) -> None:
        """Write a quantized model in float32."""
        self._run("llama-quantize", "--allow-requantize", model, out, "F32", self.threads)

    def save_logits(self, model: Path, text: Path, context: int, max_tokens: int, out: Path) -> list[int]:
        """Write what `kl` compares with, of the second half of each window; returns the windows' tokens."""
        options = ["-f", text, "--chunks", max_tokens // context, *self._windows(context)]
        self._run("llama-perplexity", "-m", model, "--kl-divergence-base", out, *options)
        with out.open("rb") as file:
            file.seek(len("_logits_"))
            context, _, windows = np.fromfile(file, np.int32, 3)
            return np.fromfile(file, np.int32, context * windows).tolist()

    def kl(self, model: Path, logits: Path, context: int) -> float:
        """Mean KL divergence from saved logits, in nats per token of the second half of each window."""
        options = ["--kl-divergence", "--kl-divergence-base", logits, *self._windows(context)]
        for _ in range(_TRIES):
            output = self._run("llama-perplexity", "-m", model, *options)
            found = re.search(r"Mean +KLD: *(\S+)", output)
            if found is not None:
                return float(found[1])
        raise SystemExit(f"{self.name}: llama-perplexity printed no mean KLD:\n{output[-2000:]}")

    def _windows(self, context: int) -> Sequence[object]:
        return "-c", context, "-b", context, "-t", self.threads

    def _run(self, tool: str, *arguments: object) -> str:
        program = shutil.which(tool, path=self.folder or os.environ["PATH"])
        if program is None:
            raise SystemExit(f"{self.name}: {tool} is not in {self.folder or 'any folder of PATH'}")
        done = subprocess.run(
            [program, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{self.name}: {' '.join(map(str, done.args))} failed:\n{done.stdout[-2000:]}")
        return done.stdout
