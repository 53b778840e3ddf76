"""Sensitivities against whole models in transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from elutq import hlq
from elutq.architectures import engine_config
from elutq.checkpoint import Checkpoint
from elutq.packing import HlqMatrix
from elutq.scheme import QuantScheme

torch = pytest.importorskip("torch", reason="needs pip install '.[quantize]'")
transformers = pytest.importorskip("transformers")

from elutq.blocks import BlockReader  # noqa: E402 (need torch)
from elutq.sensitivity import MEASURED, SCHEMES, Sensitivity, measure, some_windows, units  # noqa: E402

Make = Callable[..., Path]
IDS = np.random.default_rng(0).integers(0, 11, (3, 24))
CPU = torch.device("cpu")
MIXTURE = {
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 3},
    "tied": {"num_hidden_layers": 2, "tie_word_embeddings": True, "attention_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen3_moe": {"model_type": "qwen3_moe", **MIXTURE},
}


def fit(module: str, weight: NDArray[np.float32], scheme: QuantScheme) -> HlqMatrix:
    return hlq.fit(weight, scheme.bits, scheme.group_size, name=module)


def no_importance(module: str) -> None:
    return None


def measured(folder: Path, **options: Any) -> dict[str, Sensitivity]:
    with Checkpoint.open(folder) as checkpoint:
        reader = BlockReader(checkpoint, CPU)
        return measure(reader, checkpoint.engine, IDS, fit, no_importance, device=CPU, **options)


def log_probabilities(folder: Path, quantized: tuple[str, ...]) -> Any:
    """Of transformers' own model, with some modules quantized."""
    with Checkpoint.open(folder) as checkpoint:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        state = model.state_dict()
        with torch.no_grad():
            for name in quantized:
                weight = checkpoint.read_float32(f"{name}.weight")
                new = torch.from_numpy(hlq.dequantize(fit(name, weight, MEASURED)))
                parent, _, kind = name.rpartition(".")
                if ".experts." not in name:
                    state[f"{name}.weight"].copy_(new)
                    continue
                # transformers keeps all experts in one tensor, gate above up.
                block, _, expert = parent.rpartition(".")
                if kind == "down_proj":
                    state[f"{block}.down_proj"][int(expert)].copy_(new)
                else:
                    half = state[f"{block}.gate_up_proj"][int(expert)].chunk(2)[kind == "up_proj"]
                    half.copy_(new)
            return torch.log_softmax(model(torch.from_numpy(IDS)).logits.double(), -1)


@pytest.mark.parametrize("name", MODELS)
def test_kl_is_that_of_the_whole_model(name: str, tmp_path: Path, make_folder: Make) -> None:
    folder = make_folder(tmp_path / "m", dtype="F32", **MODELS[name])
    found = measured(folder)
    with Checkpoint.open(folder) as checkpoint:
        everything = units(checkpoint.engine)
    assert list(found) == [unit.name for unit in everything]
    full = log_probabilities(folder, ())
    for unit in everything:
        other = log_probabilities(folder, tuple(spec.name for spec in unit.linears))
        expected = float((full.exp() * (full - other)).sum(-1).mean())
        assert found[unit.name].kl == pytest.approx(expected, rel=0.02), unit.name
    assert max(s.kl for s in found.values()) > 1e-6


def test_experts_are_one_unit(tmp_path: Path, make_folder: Make) -> None:
    with Checkpoint.open(make_folder(tmp_path / "m", **MODELS["qwen3_moe"])) as checkpoint:
        found = units(checkpoint.engine)
    assert len(found) == 14
    gate = found[4]
    assert gate.name == "model.layers.0.mlp.experts.*.gate_proj"
    assert [spec.name for spec in gate.linears] == [gate.name.replace("*", str(i)) for i in range(4)]
    assert gate.weights == 4 * 24 * 40
    assert gate.stored_bits(MEASURED) == 4 * MEASURED.stored_bits(24, 40)


def test_errors_are_those_of_the_weights(tmp_path: Path, make_folder: Make) -> None:
    folder = make_folder(tmp_path / "m", dtype="F32")
    columns = np.linspace(0, 1, 40).astype(np.float32)

    def importance(module: str) -> NDArray[np.float32] | None:
        return columns if module.endswith("q_proj") else None

    with Checkpoint.open(folder) as checkpoint:
        reader = BlockReader(checkpoint, CPU)
        found = measure(reader, checkpoint.engine, IDS, fit, importance, device=CPU)
        for module, weights in (("self_attn.q_proj", columns), ("mlp.up_proj", np.ones(40))):
            name = f"model.layers.0.{module}"
            weight = checkpoint.read_float32(f"{name}.weight")
            for scheme, error in zip(SCHEMES, found[name].errors, strict=True):
                residual = weight - hlq.dequantize(fit(name, weight, scheme))
                expected = (residual**2 @ weights).sum() / (weight**2 @ weights).sum()
                assert error == pytest.approx(expected, rel=1e-4)


def test_offloading_changes_nothing(tmp_path: Path, make_folder: Make) -> None:
    folder = make_folder(tmp_path / "m", num_hidden_layers=2)
    assert measured(folder, place=tmp_path) == measured(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_losses_follow_the_errors() -> None:
    losses = Sensitivity(0.5, (0.1, 0.09, 0.05, 0.04, 0.01, 0.008)).losses()
    assert losses[SCHEMES.index(MEASURED)] == 0.5
    assert losses[2] == pytest.approx(0.5 * (0.5 + 0.25) / 2)
    assert list(losses) == sorted(losses, reverse=True)
    assert Sensitivity(0.5, (0.0,) * 6).losses() == (0.0,) * 6


def test_windows_are_bounded(golden: Any) -> None:
    engine = engine_config(golden.CONFIG)
    assert some_windows(engine, np.zeros((128, 2048), np.int64)).shape == (4, 256)
    assert some_windows(engine, np.zeros((2, 64), np.int64)).shape == (2, 64)
    large = engine_config(
        {
            **golden.CONFIG,
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "head_dim": 128,
        }
    )
    windows = some_windows(large, np.zeros((128, 2048), np.int64))
    assert 200 < windows.size < 256
    assert windows.size * 8192 * 4 * (80 * 7 + 1) <= 4 << 30
