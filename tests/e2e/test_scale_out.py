"""Calibration shared by the processes of torchrun: the result of one process, and what failures do."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from elutq import hlq
from elutq.checkpoint import Checkpoint
from elutq.models import bundled_model
from elutq.packing import HlqMatrix
from elutq.quantize import quantize
from elutq.runtime import load

pytest.importorskip("torch", reason="needs pip install '.[quantize]'")
pytest.importorskip("transformers")

SMALL = {"calibration_samples": 8, "calibration_length": 64, "threads": 1}

# At its end a process says which threads there still are: one of gloo's that outlives the interpreter can
# crash.
NAME_THREADS = """
import atexit
import os
from pathlib import Path


@atexit.register
def name_threads():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    # One write for each process, or their lines would mix.
    os.write(2, f"threads at the end: {' '.join(names)}\\n".encode())

"""

# The command line, but every matrix survives a kill, as the large ones of real models do.
COMMAND = """
import elutq.checkpoint.writer
from elutq.cli import main

elutq.checkpoint.writer._SYNC_BYTES = 1
main()
"""


def torchrun(processes: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={processes}", *arguments]


def options(source: Path, out: Path, text: Path, *more: str) -> list[str]:
    command = ["quantize", str(source), "-o", str(out), "--method", "hlq-gptq", "--calibration", str(text)]
    return [*command, "--calibration-samples", "8", "--calibration-length", "64", "--threads", "1", *more]


def run(command: Sequence[str], out: Path) -> dict[str, Any]:
    """Run it, and read the report it wrote."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("calibrating on") == 1
    printed = json.loads(done.stdout)
    assert printed == json.loads((out / "quantization_report.json").read_text())
    return dict(printed)


def matrices(folder: Path) -> dict[str, HlqMatrix]:
    with Checkpoint.open(folder) as checkpoint:
        found = {module: checkpoint.read_hlq(module) for module in checkpoint.schemes}
        return {
            module: replace(matrix, **{name: array.copy() for name, array in matrix.arrays.items()})
            for module, matrix in found.items()
        }


def check_threads_ended(stderr: str, processes: int) -> None:
    ends = [line for line in stderr.splitlines() if line.startswith("threads at the end:")]
    assert len(ends) == processes
    assert not any("gloo" in line for line in ends)


def check_alike(one: Path, several: Path, report: dict[str, Any]) -> None:
    """The same but for the order of sums, which tips a few codes that were as near to another."""
    expected, found = matrices(one), matrices(several)
    assert list(expected) == list(found)
    for module, matrix in expected.items():
        a, b = hlq.dequantize(matrix), hlq.dequantize(found[module])
        assert np.square(a - b).sum() < 1e-2 * np.square(a).sum(), module
    planes = [(expected[module].planes, found[module].planes) for module in expected]
    assert np.mean(np.concatenate([(a == b).ravel() for a, b in planes])) > 0.99
    single = json.loads((one / "quantization_report.json").read_text())
    assert report["nll"]["tokens"] == single["nll"]["tokens"]
    assert report["nll"]["full"] == pytest.approx(single["nll"]["full"], rel=1e-6)
    assert report["nll"]["quantized"] == pytest.approx(single["nll"]["quantized"], abs=2e-3)
    for found_block, block in zip(report["blocks"], single["blocks"], strict=True):
        assert found_block["output_error"] == pytest.approx(block["output_error"], rel=0.02)
    for module, outcome in single["outputs"].items():
        assert report["outputs"][module]["tokens"] == outcome["tokens"]
        assert report["outputs"][module]["output_error"] == pytest.approx(outcome["output_error"], rel=0.05)


@pytest.fixture(scope="module")
def text(texts: tuple[Path, list[int]]) -> Path:
    return texts[0]


@pytest.fixture(scope="module")
def by_two(
    tmp_path_factory: pytest.TempPathFactory, two_blocks: Path, text: Path
) -> tuple[Path, dict[str, Any]]:
    """What two processes make when nobody disturbs them."""
    out = tmp_path_factory.mktemp("by-two") / "out"
    return out, run(torchrun(2, "-m", "elutq", *options(two_blocks, out, text, "--json")), out)


@pytest.mark.slow
def test_two_processes_do_what_one_does(
    tmp_path: Path, two_blocks: Path, text: Path, by_two: tuple[Path, dict[str, Any]]
) -> None:
    quantize(two_blocks, tmp_path / "one", method="hlq-gptq", calibration=[str(text)], **SMALL)
    check_alike(tmp_path / "one", *by_two)


@pytest.mark.slow
def test_four_processes_share_experts(tmp_path: Path, make_folder: Callable[..., Path], text: Path) -> None:
    source = make_folder(
        tmp_path / "m",
        model_type="qwen3_moe",
        vocab_size=json.loads((bundled_model() / "config.json").read_text())["vocab_size"],
        max_position_embeddings=64,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((bundled_model() / name).read_bytes())
    more = ("--bits", "3", "--group-size", "32", "--embedding-bits", "4", "--offload", "--json")
    several, one = tmp_path / "several", tmp_path / "one"
    report = run(torchrun(4, "-m", "elutq", *options(source, several, text, *more)), several)
    quantize(
        source,
        one,
        bits=3,
        group_size=32,
        embedding_bits=4,
        method="hlq-gptq",
        calibration=[str(text)],
        **SMALL,
    )
    check_alike(one, several, report)


FINETUNE = """
import sys
from elutq.finetune.options import FinetuneOptions, TuneOptions
from elutq.quantize import quantize

tune = TuneOptions(epochs=3, latent_rate=0.05, warmup=1, checks=2)
quantize(
    sys.argv[1], sys.argv[2], calibration=[sys.argv[3]], calibration_samples=8, calibration_length=64,
    threads=1, target_bpw=2.42, finetune=FinetuneOptions(samples=8, block=tune, e2e=tune, shard=True),
)
"""


@pytest.mark.slow
def test_two_processes_finetune_what_one_does(tmp_path: Path, two_blocks: Path, text: Path) -> None:
    script, several, one = tmp_path / "finetune.py", tmp_path / "several", tmp_path / "one"
    script.write_text(NAME_THREADS + FINETUNE)
    for out, processes, command in (
        (one, 1, [sys.executable, str(script)]),
        (several, 2, torchrun(2, str(script))),
    ):
        done = subprocess.run(
            [*command, str(two_blocks), str(out), str(text)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        check_threads_ended(done.stderr, processes)
    single, report = (json.loads((out / "quantization_report.json").read_text()) for out in (one, several))
    check_alike(one, several, report)
    bits = {matrix.bits for matrix in matrices(several).values()}
    assert bits >= {2, 3}  # weights are pulled to their levels from 3 on
    for tuned, expected in zip(report["stages"][1:], single["stages"][1:], strict=True):
        assert tuned["name"] == expected["name"]
        for a, b in zip(tuned.get("blocks", [tuned]), expected.get("blocks", [expected]), strict=True):
            assert a["steps"] == b["steps"]
            assert a["before"] == pytest.approx(b["before"], rel=0.02)
            assert a["after"] == pytest.approx(b["after"], rel=0.02)
            assert a["after"] < a["before"]


@pytest.mark.slow
def test_two_processes_finetune_experts_that_not_both_reach(
    tmp_path: Path, make_folder: Callable[..., Path], text: Path
) -> None:
    source = make_folder(
        tmp_path / "m",
        model_type="qwen3_moe",
        vocab_size=json.loads((bundled_model() / "config.json").read_text())["vocab_size"],
        max_position_embeddings=64,
        num_experts=12,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((bundled_model() / name).read_bytes())
    more = ["--calibration-length", "16", "--bits", "3", "--group-size", "32", "--json"]
    more += ["--effort", "fast", "--finetune", "block,e2e", "--finetune-samples", "8"]
    report = run(
        torchrun(2, "-m", "elutq", *options(source, tmp_path / "out", text, *more)), tmp_path / "out"
    )
    for stage in report["stages"][1:]:
        for tuned in stage.get("blocks", [stage]):
            assert 0 < tuned["after"] <= tuned["before"] < 1
            assert tuned["steps"] == (4 if stage["name"] == "block" else 2)
    with load(tmp_path / "out") as model:
        assert model.generate("Once", max_new_tokens=4) is not None


@pytest.mark.slow
def test_a_dying_process_ends_the_job_which_goes_on_later(
    tmp_path: Path, two_blocks: Path, text: Path, by_two: tuple[Path, dict[str, Any]]
) -> None:
    script, out = tmp_path / "command.py", tmp_path / "out"
    script.write_text(NAME_THREADS + COMMAND)
    command = torchrun(2, str(script), *options(two_blocks, out, text, "--json"))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "out.partial" / ".elutq-journal"
    while not journal.exists() or journal.read_text().count("\n") < 4:
        assert process.poll() is None
        time.sleep(0.01)
    (second,) = [
        child.pid for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"
    ]
    os.kill(second, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "error: process 0 of 2 gives up, as another one of this job ended" in said
    assert not out.exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_threads_ended(done.stderr, processes=2)
    assert (out / "model.safetensors").read_bytes() == (by_two[0] / "model.safetensors").read_bytes()
    with load(out) as model:
        assert model.generate("Once", max_new_tokens=4)


def test_an_error_of_the_first_process_is_told_once(tmp_path: Path, two_blocks: Path, text: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    command = torchrun(2, "-m", "elutq", *options(two_blocks, tmp_path / "out", text))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "choose another output folder" in line
    assert "gives up" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


MEET = """
import numpy as np
import torch
from elutq.errors import InvalidArgumentError
from elutq.world import World

def fail():
    if not world.is_main:
        raise InvalidArgumentError("the second is at fault")

with World.join("cpu") as world, torch.inference_mode():
    tensors = [torch.full((2, 2), world.rank + 1, dtype=kind) for kind in (torch.float32, torch.uint8)]
    world.sum_(*tensors)
    assert [tensor.tolist() for tensor in tensors] == [[[3, 3], [3, 3]]] * 2
    half = torch.tensor([world.rank], dtype=torch.float16)
    world.broadcast_(half, source=1)
    assert half.item() == 1
    assert world.totals(world.rank, 0.5) == [1, 1]
    assert world.gather_objects(world.rank) == [0, 1]
    assert world.broadcast_object(np.arange(world.rank), source=1).size == 1
    assert world.on_main(lambda: "a") == ("a" if world.is_main else None)
    assert world.from_main(lambda: world.rank) == 0
    try:
        world.everywhere(fail)
    except InvalidArgumentError as error:
        assert error.elsewhere == world.is_main
        print(error)
"""


def test_processes_meet(tmp_path: Path) -> None:
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    done = subprocess.run(torchrun(2, str(script)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the second is at fault") == 2
