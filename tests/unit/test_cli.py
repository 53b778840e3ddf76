"""The command line: options in, text or JSON out, one line per error. The work itself is tested elsewhere."""

import json
import math
import shutil
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
    for command in ("quantize", "eval", "generate", "chat", "bench", "inspect", "demo"):
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
    widths = "--bits 3 --group-size 64 --param-bits 8 --embedding-bits 4 --lm-head-bits 4"
    options = f"{widths} --method uniform --threads 2"
    command = ("quantize", MODEL, "-o", tmp_path / "out", *options.split(), "--overwrite", "--json")
    report = last_json(run(*command))
    assert report["settings"]["bits"] == 3
    assert report["settings"]["group_size"] == 64
    assert report["settings"]["method"] == "uniform"
    assert report["settings"]["modules"]["model.embed_tokens"] == {
        "bits": 4,
        "group_size": 128,
        "param_bits": 8,
    }
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
        (("quantize", MODEL, "-o", "{tmp}/out", "--param-bits", 4), "param_bits must be 16 or 8, not 4"),
        (("quantize", MODEL, "-o", "{tmp}/out", "--method", "best"), "method must be one of hlq"),
        (("quantize", MODEL, "-o", "{tmp}/out", "--embedding-bits", 9), "embedding_bits"),
        (("quantize", MODEL, "-o", "{tmp}/out", "--target-bpw", 2.1), "from 2.375 to 5.25 bits per weight"),
        (("quantize", MODEL, "-o", "{tmp}/out", "--target-size", "1.5kB"), "the target is too small"),
        (("quantize", MODEL, "-o", "{tmp}/out", "--target-size", "2G"), "write it like 2.0GB"),
        (
            ("quantize", MODEL, "-o", "{tmp}/out", "--target-bpw", 3, "--bits", 2),
            "leave bits and group_size out",
        ),
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


# ---- commands that run models ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("Once upon a time there was a little fox who liked to sing.\n" * 40)
    return file


@pytest.fixture(scope="module")
def without_tokenizer(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "no-tokenizer"
    shutil.copytree(quantized, folder)
    (folder / "tokenizer.json").unlink()
    return folder


EVAL_SIZES = ("--ctx", 64, "--max-tokens", 256, "--threads", 1)


def test_eval(quantized: Path, text: Path) -> None:
    command = ("eval", quantized, "--text", text, *EVAL_SIZES)
    (model,) = last_json(run(*command, "--reference", MODEL, "--json"))["models"]
    (found,) = model["texts"]
    assert model["bits_per_weight"] == pytest.approx(2.375)
    assert found["tokens"] == 4 * 63
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert found["kl"] > 0
    assert 0 < found["top1_agreement"] < 1
    exact = last_json(run(*command, "--exact", "--json"))["models"][0]["mean"]
    assert exact["nll"] == pytest.approx(found["nll"], rel=0.02)
    assert exact["nll"] != found["nll"]
    assert exact["kl"] is None
    sentence = run(*command, "--reference", MODEL).stdout
    assert f"perplexity  {found['perplexity']:.4f}" in sentence
    assert f"KL          {found['kl']:.5f}" in sentence


def test_eval_compares_models_on_several_texts(quantized: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    long_name = tmp_path / ("a-model-with-a-long-name" * 4)  # numbers are not cut off to make room for it
    long_name.symlink_to(quantized)
    quantized = long_name
    other.write_text("The bear said that winter was near, and that the fox should find a den.\n" * 40)
    command = ("eval", quantized, MODEL, "--text", text, "--text", other, *EVAL_SIZES, "--reference", MODEL)
    ours, original = last_json(run(*command, "--json"))["models"]
    assert [found["text"] for found in ours["texts"]] == [str(text), str(other)]
    for file, found in zip((text, other), ours["texts"], strict=True):
        alone = last_json(
            run("eval", quantized, "--text", file, *EVAL_SIZES, "--reference", MODEL, "--json")
        )["models"][0]
        assert alone["texts"] == [found]
    assert ours["mean"]["kl"] == pytest.approx(sum(found["kl"] for found in ours["texts"]) / 2)
    assert ours["mean"]["nll_increase"] == pytest.approx(ours["mean"]["nll"] - original["mean"]["nll"])
    assert original["mean"]["kl"] == 0
    assert original["nbytes"] > ours["nbytes"]

    lines = run(*command).stdout.splitlines()
    rows = [line.split() for line in lines if line.lstrip().startswith(str(quantized))]
    expected = [*ours["texts"], ours["mean"]]
    assert [row[-2] for row in rows] == [f"{found['kl']:.4f}" for found in expected]
    assert [row[-3] for row in rows] == [f"{found['nll_increase']:+.4f}" for found in expected]
    assert [line.strip() for line in lines if line.strip() in (text.name, other.name, "mean")] == [
        text.name,
        other.name,
        "mean",
    ]
    without = run("eval", quantized, MODEL, "--text", text, *EVAL_SIZES).stdout
    assert "KL" not in without
    assert "mean" not in without


def test_eval_takes_the_models_limit_where_it_is_short(text: Path) -> None:
    found = last_json(run("eval", MODEL, "--text", text, "--json"))
    assert found["models"][0]["mean"]["context"] == 512


@pytest.fixture(scope="module")
def other_tokens(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "other-tokens"
    shutil.copytree(quantized, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    del tokenizer["model"]["merges"][-2000:]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_generate(quantized: Path) -> None:
    command = ("generate", quantized, "-p", "Once upon a time", "-n", 12, "--threads", 1)
    sampled = (*command, "--temperature", 1, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--seed", 3)
    sampled = (*sampled, "--repetition-penalty", 1.1, "--isa", "scalar")
    result = last_json(run(*sampled, "--json"))
    assert (result["prompt"], result["seed"], result["isa"]) == ("Once upon a time", 3, "scalar")
    assert run(*sampled).stdout == result["text"] + "\n"
    greedy = run(*command).stdout
    assert greedy != result["text"] + "\n"
    word = greedy.split()[2]
    assert word not in run(*command, "--stop", "nowhere", "--stop", word).stdout
    for given in ((), ("-p", "-")):
        assert run("generate", quantized, *given, "-n", 12, stdin="Once upon a time\n").stdout == greedy


def test_bench(quantized: Path) -> None:
    sizes = ("--prompt", 4, "--gen", 2, "--repeat", 1, "--threads", 1)
    found = last_json(run("bench", quantized, *sizes, "--json"))
    assert (found["bits"], found["group_size"], found["threads"]) == (2, 128, 1)
    assert found["decode_tok_s"] > 0
    assert found["decode_roofline_fraction"] == pytest.approx(
        found["decode_bytes_per_token"] * found["decode_tok_s"] / found["read_bandwidth_gb_s"] / 1e9
    )
    assert last_json(run("bench", MODEL, *sizes, "--json"))["bits"] == 16
    assert "tok/s" in run("bench", quantized, *sizes).stdout
    shown = run("bench", quantized, *sizes, "--context", 100, "--kv-cache", "int8").stdout
    assert "after 100 tokens" in shown
    assert "int8 keys and values" in shown


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"BITS": (2,), "METHODS": ("rtn", "hlq"), "_SEQUENCES": 2, "_CONTEXT": 16, "_SPEED_TOKENS": 2}
    for name, value in small.items():
        monkeypatch.setattr(f"elutq.demo.{name}", value)
    found = last_json(run("demo", "--json"))
    assert [row["method"] for row in found["rows"]] == ["full", "rtn", "hlq"]
    shown = run("demo", "--out", tmp_path / "models").stdout
    for words in ("full model", "rtn", "hlq", "perplexity", "Once upon a time"):
        assert words in shown
    assert last_json(run("inspect", tmp_path / "models" / "hlq-2bit", "--json"))["format"] == "hlq"
    assert_one_line_error(run("demo", "--out", tmp_path / "models"), "exists; give another folder with --out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "{quantized}", "--text", "/no/such/file"), "/no/such/file cannot be read: No such file"),
        (("eval", "{quantized}", "--text", "{latin}"), "latin.txt is not UTF-8 text"),
        (("eval", "{quantized}", "--text", "{empty}"), "the text has 0 token(s)"),
        (("eval", "{quantized}", "--text", "{text}", "--ctx", 1), "context must be at least 2 tokens, not 1"),
        (("eval", "{quantized}", "--text", "{text}", "--ctx", 513), "the model's limit is 512"),
        (
            ("eval", "{quantized}", "--text", "{text}", "--reference", "/no/model"),
            "there is no folder /no/model",
        ),
        (("eval", "{without_tokenizer}", "--text", "{text}"), "has no tokenizer.json"),
        (
            ("eval", "{quantized}", "{other_tokens}", "--text", "{text}"),
            "the models cut the text into different tokens",
        ),
        (("generate", "{without_tokenizer}", "-p", "hi"), "has no tokenizer.json"),
        (("generate", "/no/such/folder", "-p", "hi"), "there is no folder /no/such/folder"),
        (("chat", "{quantized}"), "has no chat template, so it is not a chat model"),
        (("chat", "{without_tokenizer}"), "has no tokenizer.json"),
        (("chat", "{quantized}", "--ctx", 0), "context must be from 1"),
        (("generate", "{quantized}", "-p", ""), "the prompt has 0 tokens"),
        (("generate", "{quantized}", "-p", "hi", "-n", 0), "max_new_tokens must be at least 1, not 0"),
        (("generate", "{quantized}", "-p", "hi", "--temperature", -1), "temperature"),
        (("generate", "{quantized}", "-p", "hi", "--stop", ""), "stop must be"),
        (("generate", "{quantized}", "-p", "hi", "--isa", "mmx"), "mmx"),
        (("generate", "{quantized}", "-p", "hi", "--threads", 0), "threads must be from 1"),
        (("demo", "--out", "{text}"), "text.txt cannot be made a folder"),
        (("bench",), "give either a model folder or --shape"),
        (("bench", "{quantized}", "--shape", "llama-2-7b"), "give either a model folder or --shape"),
        (("bench", "--shape", "gpt-5"), "gpt-5"),
        (("bench", "--shape", "qwen3-0.6b", "--bits", 7), "bits must be 1 to 4, not 7"),
        (("bench", "--shape", "qwen3-0.6b", "--param-bits", 7), "param_bits must be 16 or 8, not 7"),
        (("bench", "{quantized}", "--prompt", 500, "--gen", 100), "the model's limit is 512"),
    ],
)
def test_errors_of_commands_that_run_models(
    arguments: tuple[object, ...],
    message: str,
    quantized: Path,
    without_tokenizer: Path,
    other_tokens: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    places = {
        "quantized": quantized,
        "without_tokenizer": without_tokenizer,
        "other_tokens": other_tokens,
        "text": text,
        "latin": tmp_path / "latin.txt",
        "empty": tmp_path / "empty.txt",
    }
    assert_one_line_error(run(*(str(a).format(**places) for a in arguments)), message)
