"""The installed command as a user runs it: separate processes, real pipes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import elutq
from elutq.models import bundled_model

MODEL = str(bundled_model())
PROMPT = "Once upon a time"


def elutq_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "elutq", *map(str, arguments)]


def run(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        elutq_command(*arguments), input=stdin, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("e2e") / "model"
    result = run("quantize", MODEL, "-o", out, "--bits", 2, "--threads", 2, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["settings"]["bits"] == 2
    assert result.stderr == ""  # progress is for terminals
    return out


def test_generate_is_what_python_gives(quantized: Path) -> None:
    expected = elutq.load(quantized).generate(PROMPT, max_new_tokens=24)
    from_option = run("generate", quantized, "-p", PROMPT, "-n", 24)
    assert from_option.stdout == expected + "\n"
    assert run("generate", quantized, "-n", 24, stdin=PROMPT).stdout == from_option.stdout
    as_json = json.loads(run("generate", quantized, "-p", PROMPT, "-n", 24, "--json").stdout)
    assert as_json["text"] == expected


def test_evaluate_against_the_original(quantized: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        f"{PROMPT} there was a little dog. The dog liked to run in the park with his friend. " * 20
    )
    result = run("eval", quantized, "--text", text, "--ctx", 64, "--reference", MODEL, "--json")
    (model,) = json.loads(result.stdout.splitlines()[-1])["models"]
    (found,) = model["texts"]
    assert model["bits_per_weight"] == pytest.approx(2.375)
    assert 0 < found["kl"] < 1
    assert 0.3 < found["top1_agreement"] < 1
    assert found["tokens"] % 63 == 0


def test_8_bit_parameters_from_quantizing_to_generating(quantized: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    assert run("quantize", MODEL, "-o", out, "--bits", 2, "--param-bits", 8, "--threads", 2).returncode == 0
    assert "2-bit HLQ in groups of 128, format version 2" in run("inspect", out).stdout
    text.write_text(f"{PROMPT} there was a little dog. The dog liked to run in the park. " * 20)
    found = {
        model: json.loads(
            run("eval", model, "--text", text, "--ctx", 64, "--reference", MODEL, "--json").stdout
        )["models"][0]
        for model in (quantized, out)
    }
    assert found[out]["bits_per_weight"] < 2.25
    assert found[out]["mean"]["kl"] < found[quantized]["mean"]["kl"] + 0.005
    assert len(run("generate", out, "-p", PROMPT, "-n", 24).stdout) > 24
    folder = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert folder < sum(path.stat().st_size for path in quantized.glob("*.safetensors"))


def test_help_is_light() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "elutq", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "elutq.cli" in imported
    assert not imported & {
        "numpy",
        "tokenizers",
        "jinja2",
        "huggingface_hub",
        "torch",
        "prompt_toolkit",
        "elutq._core",
    }


def test_an_error_is_one_line() -> None:
    result = run("generate", "/no/such/folder", "-p", PROMPT)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: there is no folder /no/such/folder\n"


def test_a_reader_that_leaves_early_ends_it_quietly(quantized: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = subprocess.run(
        elutq_command("generate", quantized, "-p", PROMPT, "-n", 4),
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write_end)
    assert process.stderr == ""
    assert process.returncode != 0
