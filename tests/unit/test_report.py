"""Sizes and errors, per tensor and per kind."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from elutq.checkpoint import Checkpoint, model_parts
from elutq.report import SquaredError, describe, summarize


def test_squared_errors_add_up() -> None:
    total = SquaredError(1.0, 4.0) + SquaredError(2.0, 8.0)
    assert total == SquaredError(3.0, 12.0)
    assert total.relative == 0.25
    assert SquaredError(0.0, 0.0).relative == 0.0


def test_a_kind_weighs_its_tensors_by_their_norm(golden: ModuleType) -> None:
    errors = {"model.layers.0.self_attn.q_proj": SquaredError(1.0, 10.0), "lm_head": SquaredError(3.0, 4.0)}
    with Checkpoint.open(golden.FOLDER) as checkpoint:
        found = {name: checkpoint.info(name) for name in checkpoint.names()}
        summary = summarize(model_parts(checkpoint.engine, checkpoint.scheme), found, errors)
    kinds = {kind.kind: kind for kind in summary.kinds}
    assert kinds["q_proj"].relative_error == 0.1
    assert kinds["head"].relative_error == 0.75
    assert kinds["v_proj"].relative_error is None


def test_golden_folder(golden: ModuleType) -> None:
    description = describe(golden.FOLDER)
    tensors = {tensor["name"]: tensor for tensor in description["tensors"]}
    assert description["scheme"] == golden.CONFIG["quantization_config"]
    assert (description["format"], description["model_type"]) == ("hlq", "llama")
    stored = {**golden.other_tensors(), **golden.quantized_tensors()}
    assert description["nbytes"] == sum(len(data) for _, _, data in stored.values())
    for name, rows, columns, bits, width in golden.QUANTIZED:
        groups = -(-columns // width)
        row_bits = 8 * bits * -(-columns // 8) + 16 * groups * (bits + 1)
        assert tensors[name]["bits_per_weight"] == pytest.approx(row_bits / columns)
        assert tensors[name]["bits"] == bits
        assert tensors[name]["params"] == rows * columns
    assert tensors["model.norm.weight"]["bits"] == 32
    assert tensors["model.embed_tokens"]["bits"] == 16


@pytest.mark.parametrize(("dtype", "bits"), [("BF16", 16), ("F32", 32)])
def test_plain_folder(tmp_path: Path, make_folder: Callable[..., Path], dtype: str, bits: int) -> None:
    description = describe(make_folder(tmp_path / "m", dtype=dtype, model_type="qwen2"))
    assert (description["format"], description["scheme"]) == ("safetensors", None)
    assert description["bits_per_weight"] == description["linear_bits_per_weight"] == bits
    kinds = {kind["kind"]: kind for kind in description["kinds"]}
    assert kinds["bias"]["params"] == 40 + 8 + 8
    assert kinds["norm"]["tensors"] == 3


def test_torch_folder(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    torch = pytest.importorskip("torch")
    folder = make_folder(tmp_path / "m")
    with Checkpoint.open(folder) as checkpoint:
        state = {name: torch.tensor(checkpoint.read_float32(name)) for name in checkpoint.names()}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert describe(folder)["format"] == "pytorch"
