"""Finetuning of whole models: what it gains, that the engine agrees, and that it survives kills."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elutq import errors
from elutq.calibration import load_calibration
from elutq.eval import evaluate
from elutq.finetune.options import FinetuneOptions, TuneOptions
from elutq.models import bundled_model
from elutq.quantize import HELD_OUT, JUDGES, quantize
from elutq.runtime import load

torch = pytest.importorskip("torch", reason="needs pip install '.[quantize]'")
pytest.importorskip("transformers")
SolverOptions = pytest.importorskip("elutq.gptq").SolverOptions

LENGTH, SAMPLES = 48, 24
SMALL: dict[str, Any] = {
    "calibration_samples": 8,
    "calibration_length": LENGTH,
    "threads": 1,
    "solver": SolverOptions(rounds=1, sweeps=0),  # in a hurry: others test it
}
FEW = FinetuneOptions(
    samples=8,
    block=TuneOptions(epochs=1, latent_rate=0.02, warmup=1, checks=2),
    e2e=TuneOptions(epochs=1, warmup=1, checks=2),
)
VOLATILE = {"quantization_report.json", "quantization_report.html", "quantization_report.png"}


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in VOLATILE}


def check_stages(report: Any, *names: str) -> None:
    """All stages are reported, and none ends worse than it began."""
    assert [stage["name"] for stage in report.stages] == ["hlq-gptq", *names]
    assert report.stages[-1]["nll"] == report.nll
    for stage in report.stages[1:]:
        for tuned in stage.get("blocks", [stage]):
            assert 0 < tuned["after"] <= tuned["before"] < 1
            assert tuned["steps"] > 0


def check_engine(report: Any, out: Path, full: Path, text: Path, samples: int, **changes: Any) -> None:
    """The engine gives the scores that torch found, on the same windows."""
    with load(full) as original, load(out, exact=True) as model:
        data = load_calibration(
            [str(text)], original.tokenizer, samples=samples, length=LENGTH, held_out=HELD_OUT + JUDGES
        )
        windows = data.held_out[:: 1 + JUDGES // HELD_OUT]
        assert report.nll["tokens"] == len(windows) * (LENGTH - 1)
        by_engine = evaluate(model, windows.ravel().tolist(), LENGTH, reference=original)
    assert by_engine.nll == pytest.approx(report.nll["quantized"], abs=0.002)
    assert by_engine.kl == pytest.approx(report.nll["kl"], abs=0.002)


@pytest.mark.slow
def test_both_stages_pay_and_the_engine_agrees(
    tmp_path: Path, two_blocks: Path, texts: tuple[Path, list[int]]
) -> None:
    out = tmp_path / "out"
    options = FinetuneOptions(
        samples=SAMPLES,
        block=TuneOptions(epochs=3, latent_rate=0.02, warmup=2),
        e2e=TuneOptions(epochs=3, warmup=2),
    )
    said: list[str] = []
    report = quantize(
        two_blocks,
        out,
        bits=2,
        finetune=options,
        calibration=[str(texts[0])],
        progress=lambda done, total, name: said.append(name),
        **SMALL,
    )
    check_stages(report, "block", "e2e")
    assert [block["index"] for block in report.stages[1]["blocks"]] == [0, 1]
    kl = [stage["nll"]["kl"] for stage in report.stages]
    assert kl[2] < kl[1] < kl[0]
    assert {"block 1 of 2", "block 2 of 2", "end to end"} < set(said)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "quantization_report.json").read_text() == report.to_json()
    assert report.settings["finetune"] == options.record
    assert report.calibration["finetune"] == {"samples": SAMPLES, "held_out": JUDGES}
    check_engine(report, out, two_blocks, texts[0], SAMPLES)
    with load(out) as model:
        assert model.generate("Once", max_new_tokens=4)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("changes", [{"param_bits": 8, "embedding_bits": 4}, {"rotate": True}])
def test_every_form_of_a_model_is_finetuned(
    changes: dict[str, Any], tmp_path: Path, two_blocks: Path, texts: tuple[Path, list[int]]
) -> None:
    out = tmp_path / "out"
    report = quantize(two_blocks, out, bits=2, finetune=FEW, calibration=[str(texts[0])], **SMALL, **changes)
    check_stages(report, "block", "e2e")
    check_engine(report, out, two_blocks, texts[0], 8)
    assert report.versions["format"] == (2 if "param_bits" in changes else 1)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("stage", ["block", "e2e"])
def test_a_stage_may_stand_alone(
    stage: str, tmp_path: Path, two_blocks: Path, texts: tuple[Path, list[int]]
) -> None:
    options = replace(FEW, stages=(stage,), e2e=replace(FEW.e2e, latent_rate=0.02))
    report = quantize(
        two_blocks, tmp_path / "out", bits=2, finetune=options, calibration=[str(texts[0])], **SMALL
    )
    check_stages(report, stage)
    check_engine(report, tmp_path / "out", two_blocks, texts[0], 8)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mixtral"])
def test_every_family_is_finetuned(
    model_type: str, tmp_path: Path, make_folder: Callable[..., Path], texts: tuple[Path, list[int]]
) -> None:
    source = make_folder(
        tmp_path / "m",
        model_type=model_type,
        vocab_size=json.loads((bundled_model() / "config.json").read_text())["vocab_size"],
        max_position_embeddings=64,
        **({"num_local_experts": 8, "num_experts_per_tok": 2} if model_type == "mixtral" else {}),
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((bundled_model() / name).read_bytes())
    report = quantize(
        source, tmp_path / "out", group_size=32, finetune=FEW, calibration=[str(texts[0])], **SMALL
    )
    check_stages(report, "block", "e2e")
    check_engine(report, tmp_path / "out", source, texts[0], 8)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_neither_the_place_of_activations_nor_their_recomputation_matters(
    tmp_path: Path, two_blocks: Path, texts: tuple[Path, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(
        FEW,
        objective="lm",
        block=replace(FEW.block, full_share=0.5),
        e2e=replace(FEW.e2e, latent_rate=0.02),
    )
    for name, offload in (("memory", False), ("disk", True)):
        report = quantize(
            two_blocks,
            tmp_path / name,
            bits=2,
            finetune=options,
            calibration=[str(texts[0])],
            offload=offload,
            **SMALL,
        )
        assert 1 < report.stages[2]["after"] <= report.stages[2]["before"]
        monkeypatch.setattr("elutq.finetune.end_to_end._KEPT_BYTES", 0)
    assert weights(tmp_path / "memory") == weights(tmp_path / "disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "memory"]


@pytest.mark.usefixtures("undrawn")
def test_one_token_repeated_is_survived(tmp_path: Path, two_blocks: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a" * 40_000)
    report = quantize(two_blocks, tmp_path / "out", bits=2, finetune=FEW, calibration=[str(text)], **SMALL)
    assert len(report.stages) == 3
    with load(tmp_path / "out") as model:
        assert all(map(abs, model.logits([1, 2, 3])[0]))


RESUMED = replace(FEW, samples=12, save_seconds=0.0)

# It kills itself at the given occurrence of an event.
KILLED = """
import os, signal, sys

import elutq.checkpoint.writer
from elutq.finetune.options import FinetuneOptions, TuneOptions
from elutq.finetune.tuning import Tuning
from elutq.finetuned import FinetuneJob
from elutq.gptq import SolverOptions
from elutq.quantize import quantize

source, out, text, fatal, left = sys.argv[1:]
left = int(left)

def happen(event):
    global left
    left -= event.startswith(fatal)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def watch(owner, name):
    method = getattr(owner, name)

    def watched(*arguments):
        happen(name)
        return method(*arguments)

    setattr(owner, name, watched)

watch(Tuning, "_train")
watch(FinetuneJob, "_copy_rest")
elutq.checkpoint.writer._SYNC_BYTES = 1  # every matrix survives a kill, as the large ones of real models do
quantize(
    source, out, bits=2, calibration=[text], progress=lambda done, total, name: happen(name),
    finetune={options}, **{settings},
)
"""


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, two_blocks: Path, texts: tuple[Path, list[int]]
) -> dict[str, bytes]:
    """What KILLED would write if it lived."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    quantize(two_blocks, out, bits=2, finetune=RESUMED, calibration=[str(texts[0])], **SMALL)
    return weights(out)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "number", "left", "steps"),
    [
        ("model.layers.1", 1, ["fingerprint", "hlq-gptq.partial"], 9),
        ("_train", 5, ["block.partial", "fingerprint", "hlq-gptq"], 6),
        ("_train", 8, ["block", "fingerprint", "hlq-gptq"], 2),
        ("_copy_rest", 2, ["block", "fingerprint", "hlq-gptq"], 0),
    ],
)
def test_killed_and_resumed_it_writes_the_same_bytes(
    event: str,
    number: int,
    left: list[str],
    steps: int,
    tmp_path: Path,
    two_blocks: Path,
    texts: tuple[Path, list[int]],
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from elutq.finetune.tuning import Tuning

    out = tmp_path / "out"
    script = KILLED.replace("{options}", repr(RESUMED)).replace("{settings}", repr(SMALL))
    command = [sys.executable, "-c", script, str(two_blocks), str(out), str(texts[0]), event, str(number)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    stages = sorted(path.name for path in (tmp_path / "out.stages").iterdir())
    assert [name for name in stages if not name.startswith("e2e.")] == left
    assert not out.exists()

    done, train = 0, Tuning._train

    def count(*arguments: Any) -> None:
        nonlocal done
        done += 1
        train(*arguments)

    monkeypatch.setattr(Tuning, "_train", count)
    said: list[str] = []
    report = quantize(
        two_blocks,
        out,
        bits=2,
        finetune=RESUMED,
        calibration=[str(texts[0])],
        progress=lambda done, total, name: said.append(name),
        **SMALL,
    )
    # What was finished is not done again.
    assert done == steps
    assert not any(name.startswith("model.layers.0.") and name.endswith("_proj") for name in said)
    assert any(name.startswith("model.layers.1.") for name in said) == ("hlq-gptq" not in left)
    assert weights(out) == undisturbed
    check_stages(report, "block", "e2e")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("undrawn")
def test_other_settings_are_not_resumed(
    tmp_path: Path, two_blocks: Path, texts: tuple[Path, list[int]]
) -> None:
    options: dict[str, Any] = {"bits": 2, "finetune": FEW, "calibration": [str(texts[0])], **SMALL}

    def stop(done: int, total: int, name: str) -> None:
        if name == "block 2 of 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(two_blocks, tmp_path / "out", progress=stop, **options)
    changed = replace(FEW, block=replace(FEW.block, scale_rate=0.0))
    for changes in (
        {"finetune": changed},
        {"finetune": ["block"], "finetune_samples": 8},
        {"finetune_samples": 9},
        {"calibration_seed": 1},
        {"bits": 3},
    ):
        with pytest.raises(errors.ResumeMismatchError, match="stages"):
            quantize(two_blocks, tmp_path / "out", **{**options, **changes})
    assert (tmp_path / "out.stages" / "block.partial").is_dir()
    # A kill while they were deleted does not make them another call's.
    (tmp_path / "out.stages" / "fingerprint").unlink()
    with pytest.raises(errors.ResumeMismatchError, match="stages"):
        quantize(two_blocks, tmp_path / "out", **options)
    said: list[str] = []
    report = quantize(
        two_blocks,
        tmp_path / "out",
        overwrite=True,
        progress=lambda done, total, name: said.append(name),
        **{**options, "finetune": replace(changed, stages=("block",))},
    )
    assert any("layers.0" in name for name in said)
    assert report.settings["finetune"]["block"]["scale_rate"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("undrawn")
def test_an_existing_folder_is_replaced_only_if_told(
    tmp_path: Path, two_blocks: Path, texts: tuple[Path, list[int]]
) -> None:
    out = tmp_path / "out"
    quantize(two_blocks, out, bits=2, method="rtn")
    before = weights(out)
    options: dict[str, Any] = {
        "bits": 2,
        "finetune": replace(FEW, stages=("block",)),
        "calibration": [str(texts[0])],
        **SMALL,
    }
    with pytest.raises(errors.OutputExistsError):
        quantize(two_blocks, out, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    quantize(two_blocks, out, overwrite=True, **options)
    assert weights(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_little_text_is_refused(tmp_path: Path, two_blocks: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a dog. " * 30)
    with pytest.raises(errors.InvalidArgumentError, match="longer text"):
        quantize(two_blocks, tmp_path / "out", finetune=FEW, calibration=[str(text)], **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def elutq(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "elutq", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )


@pytest.mark.slow
def test_the_command_line_says_what_each_stage_gained(
    tmp_path: Path, two_blocks: Path, texts: tuple[Path, list[int]]
) -> None:
    command = ["quantize", str(two_blocks), "-o", str(tmp_path / "out"), "--calibration", str(texts[0])]
    command += ["--calibration-samples", "8", "--calibration-length", str(LENGTH), "--threads", "1"]
    done = elutq(*command, "--effort", "fast", "--finetune", "block,e2e", "--finetune-samples", "8")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert re.findall(r"after (\S+), \d+ s: nll \d\.\d+, KL 0\.\d+", said) == ["hlq-gptq", "block", "e2e"]
    with load(tmp_path / "out") as model:
        assert model.generate("Once", max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--finetune", "blocks"], "must be some of block, e2e"),
        (["--finetune", "e2e,block"], "in this order"),
        (["--effort", "great"], "effort must be one of"),
        (["--finetune-samples", "8"], "no effect"),
        (["--method", "rtn", "--finetune", "block"], "take hlq-gptq"),
    ],
)
def test_nonsense_gets_one_line(options: list[str], complaint: str, tmp_path: Path, two_blocks: Path) -> None:
    done = elutq("quantize", str(two_blocks), "-o", str(tmp_path / "out"), *options)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert complaint in line
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("undrawn")
def test_rounded_activations_change_little(
    tmp_path: Path, two_blocks: Path, texts: tuple[Path, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = []
    for name in ("kept", "rounded"):
        report = quantize(
            two_blocks, tmp_path / name, bits=2, finetune=FEW, calibration=[str(texts[0])], **SMALL
        )
        tuned = [block[when] for block in report.stages[1]["blocks"] for when in ("before", "after")]
        errors.append([*(block["output_error"] for block in report.blocks), *tuned])
        for module in ("elutq.layerwise", "elutq.finetune.block"):
            monkeypatch.setattr(f"{module}.may_round", lambda device: True)
    assert errors[0] != errors[1]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)


@pytest.mark.gpu
@pytest.mark.usefixtures("undrawn")
def test_a_gpu_finetunes_as_a_cpu_does(
    tmp_path: Path, two_blocks: Path, texts: tuple[Path, list[int]]
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tune = TuneOptions(epochs=4, latent_rate=0.07, warmup=2, checks=2)
    ends = {}
    for device in ("cpu", "cuda"):
        report = quantize(
            two_blocks,
            tmp_path / device,
            bits=2,
            finetune=replace(FEW, samples=24, block=tune),
            calibration=[str(texts[0])],
            device=device,
            **SMALL,
        )
        kl = [stage["nll"]["kl"] for stage in report.stages]
        assert kl[1] < 0.9 * kl[0]
        ends[device] = kl[-1]
    assert ends["cuda"] == pytest.approx(ends["cpu"], rel=0.1)
