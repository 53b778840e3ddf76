"""Calibrated quantization of whole models: what it gains, that it survives kills, and hostile text."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elutq import errors
from elutq.calibration import load_calibration
from elutq.eval import evaluate
from elutq.models import bundled_model
from elutq.quantize import CALIBRATED_METHODS, METHODS, quantize
from elutq.runtime import load

torch = pytest.importorskip("torch", reason="needs pip install '.[quantize]'")
transformers = pytest.importorskip("transformers")

SMALL = {"calibration_samples": 8, "calibration_length": 64}
VOLATILE = {"quantization_report.json", "quantization_report.html", "quantization_report.png"}


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in VOLATILE}


def test_methods_have_solvers() -> None:
    from elutq.calibrated import METHODS as SOLVERS

    assert set(SOLVERS) == set(CALIBRATED_METHODS)
    assert set(CALIBRATED_METHODS) < set(METHODS)


@pytest.mark.slow
def test_calibration_pays_and_the_engine_agrees(tmp_path: Path, texts: tuple[Path, list[int]]) -> None:
    file, held_out = texts
    reports = {
        method: quantize(
            bundled_model(),
            tmp_path / method,
            bits=2,
            method=method,
            calibration=[str(file)],
            calibration_samples=32,
            calibration_length=64,
        )
        for method in ("hlq", "gptq", "hlq-gptq")
    }
    full = load(bundled_model())
    kl = {
        method: evaluate(load(tmp_path / method), held_out, 64, reference=full).kl or 1.0
        for method in reports
    }
    assert kl["hlq-gptq"] < 0.8 * kl["gptq"] < 0.8 * kl["hlq"]

    report = reports["hlq-gptq"]
    assert report.nll is not None
    assert report.generation is not None
    assert not report.generation["collapsed"]
    assert (tmp_path / "hlq-gptq" / "quantization_report.json").read_text() == report.to_json()
    assert "Calibration places them" in (tmp_path / "hlq-gptq" / "quantization_report.html").read_text()
    assert (tmp_path / "hlq-gptq" / "quantization_report.png").read_bytes().startswith(b"\x89PNG")
    assert len(report.blocks) == 8
    assert [block["index"] for block in report.blocks] == list(range(8))
    errors_by_depth = [block["output_error"] for block in report.blocks]
    assert all(0 < error < 0.2 for error in errors_by_depth)
    assert set(report.outputs) == {t.name for t in report.summary.tensors if t.kind.endswith("_proj")}
    # The engine, on the same windows, gives the nll that torch found.
    data = load_calibration([str(file)], full.tokenizer, samples=32, length=64)
    with load(tmp_path / "hlq-gptq", exact=True) as model:
        by_engine = evaluate(model, data.held_out.ravel().tolist(), 64, reference=full)
    assert by_engine.nll == pytest.approx(report.nll["quantized"], abs=0.002)
    assert by_engine.kl == pytest.approx(report.nll["kl"], abs=0.002)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mistral", "qwen3_moe", "mixtral"])
def test_every_family_is_calibrated(
    model_type: str, tmp_path: Path, make_folder: Callable[..., Path], texts: tuple[Path, list[int]]
) -> None:
    vocabulary = json.loads((bundled_model() / "config.json").read_text())["vocab_size"]
    mixture = {
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    }
    source = make_folder(
        tmp_path / "m",
        model_type=model_type,
        vocab_size=vocabulary,
        max_position_embeddings=64,
        **(mixture if "m" in model_type[5:] or model_type == "mixtral" else {}),
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((bundled_model() / name).read_bytes())
    report = quantize(
        source,
        tmp_path / "out",
        bits=3,
        group_size=32,
        method="hlq-gptq",
        calibration=[str(texts[0])],
        **SMALL,
    )
    assert not any(outcome["fallback"] for outcome in report.outputs.values())
    assert all(0 < outcome["output_error"] < 0.2 for outcome in report.outputs.values())
    tokens = {name: outcome["tokens"] for name, outcome in report.outputs.items()}
    routed = [
        count for name, count in tokens.items() if ".experts." in name and name.endswith(("gate_proj", "w1"))
    ]
    if routed:
        # Every token reaches two of the four experts of each of the sparse blocks.
        assert sum(routed) % (2 * 8 * 64) == 0
        assert sum(routed) > 0
    with load(tmp_path / "out") as model:
        assert model.generate("Once", max_new_tokens=4) is not None


@pytest.mark.usefixtures("undrawn")
def test_embedding_and_head_may_be_quantized_too(
    tmp_path: Path, two_blocks: Path, texts: tuple[Path, list[int]]
) -> None:
    report = quantize(
        two_blocks,
        tmp_path / "out",
        bits=2,
        method="hlq-gptq",
        embedding_bits=4,
        calibration=[str(texts[0])],
        **SMALL,
    )
    assert report.nll is not None
    data = load_calibration([str(texts[0])], load(two_blocks).tokenizer, samples=8, length=64)
    with load(tmp_path / "out", exact=True) as model:
        by_engine = evaluate(model, data.held_out.ravel().tolist(), 64)
    assert by_engine.nll == pytest.approx(report.nll["quantized"], abs=0.002)


@pytest.mark.usefixtures("undrawn")
def test_activations_may_lie_on_disk(tmp_path: Path, two_blocks: Path, texts: tuple[Path, list[int]]) -> None:
    for name, offload in (("memory", False), ("disk", True)):
        quantize(
            two_blocks,
            tmp_path / name,
            bits=2,
            method="gptq",
            calibration=[str(texts[0])],
            offload=offload,
            **SMALL,
        )
    assert weights(tmp_path / "memory") == weights(tmp_path / "disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "memory"]


@pytest.mark.usefixtures("undrawn")
def test_rotation_gives_a_model_of_its_own(
    tmp_path: Path, two_blocks: Path, texts: tuple[Path, list[int]]
) -> None:
    report = quantize(
        two_blocks,
        tmp_path / "out",
        bits=4,
        method="hlq-gptq",
        rotate=True,
        calibration=[str(texts[0])],
        **SMALL,
    )
    assert report.nll is not None
    with load(tmp_path / "out", exact=True) as rotated, load(two_blocks) as full:
        assert not rotated.config.tie_word_embeddings
        kl = evaluate(rotated, texts[1], 64, reference=full).kl
    assert kl is not None
    assert kl < 0.02


QUANTIZE = """
import sys
import elutq.checkpoint.writer
from elutq.quantize import quantize

elutq.checkpoint.writer._SYNC_BYTES = 1  # every matrix survives a kill, as the large ones of real models do
quantize(
    sys.argv[1], sys.argv[2], bits=2, method="hlq-gptq", calibration=[sys.argv[3]],
    calibration_samples=8, calibration_length=64,
    progress=lambda done, total, name: print(done, name, flush=True),
)
"""


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, two_blocks: Path, texts: tuple[Path, list[int]]
) -> dict[str, bytes]:
    """What QUANTIZE writes when nobody kills it."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    command = [sys.executable, "-c", QUANTIZE, str(two_blocks), str(out), str(texts[0])]
    subprocess.run(command, check=True, capture_output=True)
    return weights(out)


@pytest.mark.slow
def test_killed_and_resumed_it_writes_the_same_bytes(
    tmp_path: Path,
    two_blocks: Path,
    texts: tuple[Path, list[int]],
    undisturbed: dict[str, bytes],
) -> None:
    command = [sys.executable, "-c", QUANTIZE, str(two_blocks), str(tmp_path / "out"), str(texts[0])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(12):  # inside the second block
        assert process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "out.partial").is_dir()
    assert not (tmp_path / "out").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert weights(tmp_path / "out") == undisturbed


@pytest.mark.usefixtures("undrawn")
def test_other_settings_are_not_resumed(
    tmp_path: Path, two_blocks: Path, texts: tuple[Path, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"bits": 2, "method": "gptq", "calibration": [str(texts[0])], **SMALL}

    def stop(done: int, total: int, name: str) -> None:
        if "layers.1" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(two_blocks, tmp_path / "out", progress=stop, **options)
    for changes in (
        {"calibration_seed": 1},
        {"method": "hlq-gptq"},
        {"calibration_samples": 7},
        {"rotate": True},
    ):
        with pytest.raises(errors.ResumeMismatchError):
            quantize(two_blocks, tmp_path / "out", **{**options, **changes})
    quantize(two_blocks, tmp_path / "out", **options)


@pytest.mark.usefixtures("undrawn")
def test_one_token_repeated_is_survived(tmp_path: Path, two_blocks: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a" * 40_000)
    report = quantize(
        two_blocks, tmp_path / "out", bits=2, method="hlq-gptq", calibration=[str(text)], **SMALL
    )
    with load(tmp_path / "out") as model:
        assert np.isfinite(model.logits([1, 2, 3])).all()
    assert report.nll is not None


@pytest.mark.usefixtures("undrawn")
def test_dead_inputs_fall_back_to_the_data_free_solver(
    tmp_path: Path, make_folder: Callable[..., Path], texts: tuple[Path, list[int]]
) -> None:
    source = make_folder(
        tmp_path / "m",
        vocab_size=json.loads((bundled_model() / "config.json").read_text())["vocab_size"],
        dtype="F32",
        max_position_embeddings=64,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((bundled_model() / name).read_bytes())
    from safetensors.numpy import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.weight"][:] = 0  # nothing reaches down_proj
    save_file(tensors, source / "model.safetensors")
    report = quantize(
        source, tmp_path / "out", bits=2, method="hlq-gptq", calibration=[str(texts[0])], **SMALL
    )
    assert report.outputs["model.layers.0.mlp.down_proj"]["fallback"]
    assert any("layers.0.mlp.down_proj" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "empty|no text|tokens"), (b"Once upon a time.", "token"), (b"\xff\xfe\x00bad", "UTF-8")],
)
def test_hostile_calibration_gets_one_line_and_leaves_nothing(
    content: bytes, complaint: str, tmp_path: Path, two_blocks: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    command = [sys.executable, "-m", "elutq", "quantize", str(two_blocks), "-o", str(tmp_path / "out")]
    command += ["--method", "gptq", "--calibration", str(text)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert re.search(complaint, line)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_too_little_memory_is_refused_with_advice(
    tmp_path: Path, two_blocks: Path, texts: tuple[Path, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elutq.calibrated._free_memory", lambda device: 1 << 20)
    with pytest.raises(errors.InsufficientMemoryError, match="offload"):
        quantize(two_blocks, tmp_path / "out", bits=2, method="gptq", calibration=[str(texts[0])], **SMALL)
