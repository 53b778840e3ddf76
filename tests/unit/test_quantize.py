"""The pipeline: what is quantized and what is not, reports, resumption."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import elutq.data_free
from elutq import errors, hlq, load
from elutq.architectures import EMBEDDING, HEAD, engine_config
from elutq.checkpoint import Checkpoint
from elutq.eval import evaluate
from elutq.importance import input_importance
from elutq.quantize import plan, quantize
from elutq.report import describe
from elutq.scheme import QuantScheme

Make = Callable[..., Path]
LAYER = "model.layers.0"
VOLATILE = {"quantization_report.json"}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in VOLATILE}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("method", hlq.METHODS)
def test_matrices_are_what_the_solver_returns(
    tmp_path: Path, make_folder: Make, dtype: str, method: str
) -> None:
    source = make_folder(tmp_path / "m", dtype=dtype)
    report = quantize(source, tmp_path / "out", bits=2, group_size=32, method=method)
    with Checkpoint.open(source) as before, Checkpoint.open(tmp_path / "out") as after:
        assert len(after.schemes) == 7
        for module in after.schemes:
            weight = before.read_float32(f"{module}.weight")
            columns = None
            if method == "hlq":
                columns = input_importance(module, before.engine, before.read_float32)
            expected = hlq.fit(weight, 2, 32, weights=columns, method=method)
            found = after.read_hlq(module)
            for part in ("planes", "scales", "zeros"):
                np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))
            (tensor,) = (tensor for tensor in report.summary.tensors if tensor.name == module)
            assert tensor.relative_error == pytest.approx(hlq.relative_error(weight, expected), rel=1e-5)


@pytest.mark.parametrize("method", ["hlq", "uniform"])
def test_8_bit_parameters_follow_any_method(tmp_path: Path, make_folder: Make, method: str) -> None:
    source = make_folder(tmp_path / "m")
    options = {"bits": 2, "group_size": 32, "method": method, "lm_head_bits": 4, "embedding_bits": 4}
    report = quantize(source, tmp_path / "out", param_bits=8, **options)
    assert report.versions["format"] == report.settings["version"] == 2
    with Checkpoint.open(source) as before, Checkpoint.open(tmp_path / "out") as after:
        assert len(after.schemes) == 9
        for module, scheme in after.schemes.items():
            weight = before.read_float32(f"{module}.weight")
            columns = None
            if method == "hlq":
                columns = input_importance(module, before.engine, before.read_float32)
            fitted = hlq.fit(weight, scheme.bits, scheme.group_size, weights=columns, method=method)
            expected = hlq.to_8bit(weight, fitted, columns)
            found = after.read_hlq(module)
            for name, values in expected.arrays.items():
                np.testing.assert_array_equal(found.arrays[name], values)
            (tensor,) = (tensor for tensor in report.summary.tensors if tensor.name == module)
            assert tensor.relative_error == pytest.approx(hlq.relative_error(weight, expected), rel=1e-5)
            assert 8 * tensor.nbytes == scheme.stored_bits(*weight.shape)
    with load(tmp_path / "out", threads=1) as model:
        score = evaluate(model, list(range(11)) * 6, 16)
        assert np.isfinite(score.nll)


def test_8_bit_parameters_do_not_depend_on_the_pieces(
    tmp_path: Path, make_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path / "m")
    quantize(source, tmp_path / "whole", bits=3, param_bits=8, embedding_bits=2)
    monkeypatch.setattr("elutq.data_free._PIECE", 7 * 40)
    monkeypatch.setattr("elutq.hlq._CHUNK", 3 * 40)
    quantize(source, tmp_path / "pieces", bits=3, param_bits=8, embedding_bits=2)
    assert files(tmp_path / "pieces") == files(tmp_path / "whole")


def test_16_bit_parameters_are_written_as_version_1(tmp_path: Path, make_folder: Make) -> None:
    quantize(make_folder(tmp_path / "m"), tmp_path / "out", bits=2, param_bits=16, lm_head_bits=4)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["version"] == 1
    assert "param_bits" not in json.dumps(config)


def test_importance_can_be_switched(tmp_path: Path, make_folder: Make) -> None:
    source = make_folder(tmp_path / "m")
    for name, method, importance in (("off", "hlq", False), ("on", "uniform", True)):
        report = quantize(source, tmp_path / name, bits=2, method=method, importance=importance)
        assert report.settings["importance"] is importance
        default = quantize(source, tmp_path / f"{name}-default", bits=2, method=method)
        assert default.settings["importance"] is not importance
        assert (
            files(tmp_path / name)["model.safetensors"]
            != files(tmp_path / f"{name}-default")["model.safetensors"]
        )


def test_other_tensors_and_files_are_kept(tmp_path: Path, make_folder: Make) -> None:
    source = make_folder(tmp_path / "m")
    quantize(source, tmp_path / "out", bits=3)
    with Checkpoint.open(source) as before, Checkpoint.open(tmp_path / "out") as after:
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
            assert after.info(name).dtype == before.info(name).dtype
            assert after.read(name).tobytes() == before.read(name).tobytes()
        scheme = after.config.pop("quantization_config")
        assert after.config == before.config
        assert (scheme["bits"], scheme["group_size"]) == (3, 128)
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"


def test_pieces_do_not_change_the_result(
    tmp_path: Path, make_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path / "m")
    options: dict[str, Any] = {"bits": 3, "group_size": 32, "lm_head_bits": 4, "embedding_bits": 16}
    quantize(source, tmp_path / "whole", **options)
    monkeypatch.setattr(elutq.data_free, "_PIECE", 130)  # three rows
    quantize(source, tmp_path / "pieces", **options)
    assert files(tmp_path / "whole") == files(tmp_path / "pieces")


def test_shards_do_not_change_the_result(tmp_path: Path, make_folder: Make, golden: ModuleType) -> None:
    source = make_folder(tmp_path / "m")
    quantize(source, tmp_path / "whole", bits=2)
    quantize(source, tmp_path / "shards", bits=2, shard_bytes=1000)
    with Checkpoint.open(tmp_path / "whole") as whole, Checkpoint.open(tmp_path / "shards") as shards:
        assert len({shards.info(name).file for name in shards.names()}) > 3
        assert sorted(whole.names()) == sorted(shards.names())
        for name in whole.names():
            assert whole.read(name).tobytes() == shards.read(name).tobytes()


LARGE = {"vocab_size": 32000, "hidden_size": 4096, "head_dim": 128, "num_attention_heads": 32}


class TestPlan:
    def overrides(
        self, golden: ModuleType, lm_head_bits: int | None, embedding_bits: int | None, **config: Any
    ) -> dict[str, QuantScheme]:
        engine = engine_config({**golden.CONFIG, **config})
        return dict(plan(engine, QuantScheme(2, 64), lm_head_bits, embedding_bits).overrides)

    def test_small_matrices_are_left(self, golden: ModuleType) -> None:
        assert self.overrides(golden, None, None) == {}
        assert self.overrides(golden, None, None, tie_word_embeddings=True) == {}

    def test_large_ones_get_4_bits(self, golden: ModuleType) -> None:
        four = QuantScheme(4, 128)
        assert self.overrides(golden, None, None, **LARGE) == {EMBEDDING: four, HEAD: four}
        assert self.overrides(golden, None, None, **LARGE, tie_word_embeddings=True) == {EMBEDDING: four}

    def test_the_limit(self, golden: ModuleType) -> None:
        assert self.overrides(golden, None, None, vocab_size=1 << 21, hidden_size=8)
        assert not self.overrides(golden, None, None, vocab_size=(1 << 21) - 1, hidden_size=8)

    def test_options_win(self, golden: ModuleType) -> None:
        assert self.overrides(golden, 16, 2, **LARGE) == {EMBEDDING: QuantScheme(2, 128)}
        assert self.overrides(golden, 1, None) == {HEAD: QuantScheme(1, 128)}

    @pytest.mark.parametrize(("head", "embedding"), [(3, None), (None, 3), (3, 3)])
    def test_either_option_sets_a_tied_head(
        self, golden: ModuleType, head: int | None, embedding: int | None
    ) -> None:
        assert self.overrides(golden, head, embedding, tie_word_embeddings=True) == {
            EMBEDDING: QuantScheme(3, 128)
        }

    def test_a_tied_head_has_one_width(self, golden: ModuleType) -> None:
        with pytest.raises(errors.InvalidArgumentError, match="tie_word_embeddings"):
            self.overrides(golden, 16, 4, tie_word_embeddings=True)

    @pytest.mark.parametrize("bits", [0, 5, 8, 32, -1, "4", 2.5])
    def test_widths_are_checked(self, golden: ModuleType, bits: Any) -> None:
        for options in ((bits, None), (None, bits)):
            with pytest.raises(errors.InvalidArgumentError, match="must be 1 to 4 or 16"):
                self.overrides(golden, *options)


def test_a_tied_head_stays_tied(tmp_path: Path, make_folder: Make) -> None:
    source = make_folder(tmp_path / "m", tie_word_embeddings=True)
    quantize(source, tmp_path / "out", bits=2, lm_head_bits=4)
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert checkpoint.schemes[EMBEDDING].bits == 4
        assert not [name for name in checkpoint.names() if name.startswith(HEAD)]


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 16, "num_hidden_layers": 2},
        {"model_type": "mistral", "sliding_window": 16},
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_size": 320, "head_dim": 64, "vocab_size": 1003, "intermediate_size": 333},
    ],
    ids=str,
)
def test_every_family_and_odd_shapes(tmp_path: Path, make_folder: Make, changes: dict[str, Any]) -> None:
    source = make_folder(tmp_path / "m", **changes)
    report = quantize(source, tmp_path / "out", bits=1, embedding_bits=2, method="rtn")
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        for module in checkpoint.schemes:
            checkpoint.read_hlq(module)
    assert report.summary.params == describe(source)["params"]


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", f"{LAYER}.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_are_named(
    tmp_path: Path, make_folder: Make, golden: ModuleType, name: str, value: float
) -> None:
    source = make_folder(tmp_path / "m", dtype="F32")
    tensors = golden.decode((source / "model.safetensors").read_bytes())
    dtype, shape, data = tensors[name]
    values = np.frombuffer(data, "<f4").copy()
    values[-1] = value
    tensors[name] = (dtype, shape, values.tobytes())
    (source / "model.safetensors").write_bytes(golden.encode(tensors))
    with pytest.raises(errors.TensorValueError, match=name.replace(".", r"\.")):
        quantize(source, tmp_path / "out", bits=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 0},
        {"bits": 5},
        {"bits": 2, "group_size": 48},
        {"bits": 2, "method": "gguf"},
        {"bits": 2, "shard_bytes": 0},
        {"bits": 2, "threads": 0},
    ],
    ids=str,
)
def test_options_are_checked_before_anything_is_written(
    tmp_path: Path, make_folder: Make, options: dict[str, Any]
) -> None:
    with pytest.raises(errors.InvalidArgumentError):
        quantize(make_folder(tmp_path / "m"), tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path, golden: ModuleType) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="quantized already"):
        quantize(golden.FOLDER, tmp_path / "out", bits=2)


def test_the_source_is_never_the_output(tmp_path: Path, make_folder: Make) -> None:
    source = make_folder(tmp_path / "m")
    for overwrite in (False, True):
        with pytest.raises(errors.OutputExistsError):
            quantize(source, source, bits=2, overwrite=overwrite)


def test_report(tmp_path: Path, make_folder: Make) -> None:
    source = make_folder(tmp_path / "m")
    report = quantize(source, tmp_path / "out", bits=2, group_size=32, lm_head_bits=4)
    assert json.loads((tmp_path / "out/quantization_report.json").read_text()) == json.loads(report.to_json())
    assert report.file_bytes == (tmp_path / "out/model.safetensors").stat().st_size
    assert report.settings["modules"] == {"lm_head": {"bits": 4, "group_size": 128}}
    summary = report.summary
    assert summary.params == sum(math.prod(tensor.shape) for tensor in summary.tensors)
    assert summary.nbytes == sum(kind.nbytes for kind in summary.kinds)
    kinds = {kind.kind: kind for kind in summary.kinds}
    linears = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    assert list(kinds) == ["embedding", *linears, "head", "norm"]
    # 40 columns: 5 bytes in each of 2 planes, and 2 groups of 3 fp16 parameters.
    assert kinds["q_proj"].bits_per_weight == 8 * (2 * 5 + 2 * 3 * 2) / 40
    assert kinds["head"].bits == (4,)
    assert kinds["embedding"].bits == (16,)
    assert kinds["embedding"].relative_error is None
    assert 0.05 < (kinds["q_proj"].relative_error or 0) < 0.2
    described = describe(tmp_path / "out")
    assert described["format"] == "hlq"
    assert described["bits_per_weight"] == summary.bits_per_weight
    assert described["linear_bits_per_weight"] == summary.linear_bits_per_weight
    assert describe(source)["bits_per_weight"] == 16


def test_progress_counts_every_weight(tmp_path: Path, make_folder: Make) -> None:
    calls: list[tuple[int, int, str]] = []
    report = quantize(
        make_folder(tmp_path / "m"), tmp_path / "out", bits=2, progress=lambda *call: calls.append(call)
    )
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert {call[1] for call in calls} == {report.summary.params}
    assert done[-1] == report.summary.params
    assert {call[2] for call in calls} == {tensor.name for tensor in report.summary.tensors}


def test_an_interrupted_run_continues(tmp_path: Path, make_folder: Make) -> None:
    source = make_folder(tmp_path / "m")
    quantize(source, tmp_path / "reference", bits=2)
    started: list[str] = []

    def interrupt(done: int, total: int, name: str) -> None:
        started.append(name)
        if len(started) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", bits=2, progress=interrupt)
    assert not (tmp_path / "out").exists()
    with pytest.raises(errors.ResumeMismatchError):
        quantize(source, tmp_path / "out", bits=3)
    resumed: list[str] = []
    report = quantize(
        source, tmp_path / "out", bits=2, progress=lambda done, total, name: resumed.append(name)
    )
    assert set(resumed).isdisjoint(started[:4])
    assert all(kind.relative_error is not None for kind in report.summary.kinds if kind.bits == (2,))
    assert files(tmp_path / "out") == files(tmp_path / "reference")


def test_a_changed_source_is_not_continued(tmp_path: Path, make_folder: Make) -> None:
    def interrupt(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    source = make_folder(tmp_path / "m")
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", bits=2, progress=interrupt)
    os.utime(source / "model.safetensors", (1, 1))
    with pytest.raises(errors.ResumeMismatchError):
        quantize(source, tmp_path / "out", bits=2)


KILLED = """
import os, signal, sys
import elutq.checkpoint.writer
from elutq.quantize import quantize

elutq.checkpoint.writer._SYNC_BYTES = 1
calls = 0

def progress(done, total, name):
    global calls
    calls += 1
    if calls > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

quantize(sys.argv[1], sys.argv[2], bits=2, method="uniform", progress=progress)
"""


def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path, make_folder: Make) -> None:
    """SIGKILL again and again, each time a random way further on."""
    source = make_folder(tmp_path / "m", num_hidden_layers=3)
    quantize(source, tmp_path / "reference", bits=2, method="uniform")
    rng = np.random.default_rng(0)
    kills = 0
    while True:
        command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out"), str(rng.integers(1, 12))]
        status = subprocess.run(command, check=False, timeout=60).returncode
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        kills += 1
    assert kills >= 2
    assert files(tmp_path / "out") == files(tmp_path / "reference")
    assert not (tmp_path / "out.partial").exists()
