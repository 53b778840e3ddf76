"""The comparison with other quantizers (benchmarks/accuracy_peers.py), as far as it goes without them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import elutq
from elutq.eval import score_all
from elutq.models import bundled_model
from elutq.quantize import quantize

BENCHMARK = Path(__file__).parents[2] / "benchmarks/accuracy_peers.py"
CONTEXT = 64


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("peers") / "text.txt"
    file.write_text("Once upon a time there was a little fox who liked to sing to the moon.\n" * 30)
    return file


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARK, bundled_model(), *arguments, "--ctx", CONTEXT]
    return subprocess.run([str(a) for a in command], capture_output=True, text=True, check=False)


def test_our_folders_are_scored_by_the_protocol(text: Path, tmp_path: Path) -> None:
    for bits in (4, 2):
        quantize(
            bundled_model(),
            tmp_path / f"{bits}bit",
            bits=bits,
            method="rtn",
            embedding_bits=16,
            lm_head_bits=16,
        )
    out = tmp_path / "result.json"
    folders = (tmp_path / "4bit", tmp_path / "2bit")
    result = run("--text", text, "--calibration", f"{text}:2", "--elutq", *folders, "--out", out)
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["results"]
    assert [(row["method"], row["bits_per_weight"]) for row in rows] == [
        ("elutq 2bit", pytest.approx(2.375)),
        ("elutq 4bit", pytest.approx(4.625)),
    ]
    full = elutq.load(bundled_model())
    ids = full.tokenizer.encode(text.read_text(), add_special_tokens=False)
    (scores,) = score_all([elutq.load(tmp_path / "2bit")], ids, CONTEXT, reference=full)
    assert rows[0]["kl"] == pytest.approx(scores.kl.mean())
    assert rows[0]["kl_second_half"] == pytest.approx(scores.kl[:, CONTEXT // 2 :].mean())
    assert rows[0]["kl_own"] is None


def test_a_quantized_embedding_would_not_be_comparable(text: Path, tmp_path: Path) -> None:
    quantize(bundled_model(), tmp_path / "out", bits=4, method="rtn", embedding_bits=4)
    result = run("--text", text, "--calibration", f"{text}:1", "--elutq", tmp_path / "out")
    assert result.returncode == 1
    assert "quantize it with --embedding-bits 16" in result.stderr


def test_tools_that_are_not_there(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    result = run("--text", text, "--calibration", f"{text}:1", "--llama-cpp", f"theirs={tmp_path}:Q2_K")
    assert result.returncode == 1
    assert f"theirs: llama-imatrix is not in {tmp_path}" in result.stderr
