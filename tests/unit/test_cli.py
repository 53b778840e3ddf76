"""The command line: options in, text or JSON out, one line per error. The work itself is tested elsewhere."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from elutq import __version__
from elutq.cli import app
from elutq.models import bundled_model

MODEL = str(bundled_model())


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def last_json(result: Result) -> dict:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def assert_one_line_error(result: Result, message: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "model"
    assert run("quantize", MODEL, "-o", out, "--bits", 2, "--method", "rtn").exit_code == 0
    return out


def test_help_lists_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("quantize", "eval", "generate", "bench", "inspect", "demo"):
        assert command in result.stdout
        assert run(command, "--help").exit_code == 0


def test_version() -> None:
    assert run("--version").stdout == f"elutq {__version__}\n"


# ---- quantize and inspect ----------------------------------------------------------------------------------


def test_quantize_prints_a_table(tmp_path: Path) -> None:
    result = run("quantize", MODEL, "-o", tmp_path / "out", "--method", "rtn", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "down_proj" in result.stdout
    assert "2.375 bits per weight" in result.stdout
    assert result.stderr == ""


def test_quantize_json_and_every_option(tmp_path: Path) -> None:
    options = "--bits 3 --group-size 64 --method uniform --embedding-bits 4 --lm-head-bits 4 --threads 2"
    command = ("quantize", MODEL, "-o", tmp_path / "out", *options.split(), "--overwrite", "--json")
    report = last_json(run(*command))
    assert report["settings"]["bits"] == 3
    assert report["settings"]["group_size"] == 64
    assert report["settings"]["method"] == "uniform"
    assert report["settings"]["modules"]["model.embed_tokens"] == {"bits": 4, "group_size": 128}
    assert report == json.loads((tmp_path / "out" / "quantization_report.json").read_text())


def test_inspect(quantized: Path) -> None:
    description = last_json(run("inspect", quantized, "--json"))
    assert description["scheme"]["bits"] == 2
    assert description["linear_bits_per_weight"] == pytest.approx(2.375, abs=1e-3)
    text = run("inspect", quantized).stdout
    assert "2-bit HLQ in groups of 128" in text
    assert "not quantized (safetensors)" in run("inspect", MODEL).stdout


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "/no/such/folder"), "there is no folder /no/such/folder"),
        (("inspect", "{tmp}"), "is {tmp} a Hugging Face model folder?"),
        (("quantize", "/no/such/folder", "-o", "{tmp}/out"), "there is no folder /no/such/folder"),
        (("quantize", MODEL, "-o", "{tmp}/out", "--bits", 5), "bits must be 1 to 4, not 5"),
        (("quantize", MODEL, "-o", "{tmp}/out", "--group-size", 7), "group_size must be one of"),
        (("quantize", MODEL, "-o", "{tmp}/out", "--method", "best"), "method must be one of hlq"),
        (("quantize", MODEL, "-o", "{tmp}/out", "--embedding-bits", 9), "embedding_bits"),
        (("quantize", MODEL, "-o", "{tmp}"), "{tmp}"),
        (("quantize", "{quantized}", "-o", "{tmp}/out"), "is quantized already"),
    ],
)
def test_quantize_and_inspect_errors(
    arguments: tuple[object, ...], message: str, tmp_path: Path, quantized: Path
) -> None:
    (tmp_path / "something").touch()
    places = {"tmp": tmp_path, "quantized": quantized}
    result = run(*(str(a).format(**places) for a in arguments))
    assert_one_line_error(result, message.format(**places))


def test_a_missing_option_is_a_usage_error() -> None:
    result = run("quantize", MODEL)
    assert result.exit_code == 2
    assert "--out" in result.stderr


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: str) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("elutq.report.describe", broken)
    assert isinstance(run("inspect", MODEL).exception, ZeroDivisionError)


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("elutq.report.describe", interrupted)
    assert run("inspect", MODEL).exit_code == 130
