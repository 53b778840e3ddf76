"""HLQ folders in transformers, beside the engine."""

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elutq import _core, hlq
from elutq.checkpoint import Checkpoint
from elutq.errors import ConfigError, InvalidArgumentError
from elutq.models import bundled_model
from elutq.quantize import quantize
from elutq.runtime import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import elutq.hf as hf  # noqa: E402

IDS = [5, 6, 7, 100, 200, 301, 17, 9]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model; its head is its embedding, at 4 bits."""
    out = tmp_path_factory.mktemp("hf") / "tied"
    quantize(bundled_model(), out, bits=2, method="rtn", embedding_bits=4)
    return out


@pytest.fixture
def untied(make_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A random model with biases and odd shapes; embedding and head have bits of their own."""
    return quantize_untied(make_folder, tmp_path, param_bits=16)


@pytest.fixture
def untied_8bit(make_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """The same with 8-bit scales and zeros."""
    return quantize_untied(make_folder, tmp_path, param_bits=8)


def quantize_untied(make_folder: Callable[..., Path], folder: Path, param_bits: int) -> Path:
    shapes = {
        "model_type": "qwen2",
        "tie_word_embeddings": False,
        "hidden_size": 72,
        "intermediate_size": 100,
        "vocab_size": 310,
        "num_hidden_layers": 2,
    }
    source = make_folder(folder / "source", **shapes)
    bits = {"bits": 3, "group_size": 32, "embedding_bits": 2, "lm_head_bits": 4}
    quantize(source, folder / "out", param_bits=param_bits, **bits)
    return folder / "out"


@pytest.fixture
def qwen3_moe(make_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A random mixture of experts after a dense layer; its embedding is not quantized."""
    return mixture(make_folder, tmp_path, model_type="qwen3_moe", mlp_only_layers=[0])


@pytest.fixture
def mixtral(make_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """The same with Mixtral's names, which transformers changes in memory."""
    return mixture(make_folder, tmp_path, model_type="mixtral")


def mixture(make_folder: Callable[..., Path], folder: Path, **keys: Any) -> Path:
    sizes = {"hidden_size": 72, "intermediate_size": 100, "moe_intermediate_size": 40, "vocab_size": 310}
    sizes |= {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
    source = make_folder(folder / "source", **sizes, **keys)
    quantize(source, folder / "out", bits=3, group_size=32)
    return folder / "out"


def from_pretrained(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def logits(model: Any, ids: list[int] = IDS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids], device=model.device)).logits[0].float().cpu().numpy()


@pytest.mark.parametrize("which", ["tied", "untied", "untied_8bit", "qwen3_moe", "mixtral"])
def test_logits_are_near_the_engines(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(which)
    runner = _core.LinearRunner("", 2, exact=True)
    monkeypatch.setattr(hf, "_runner", lambda: runner)
    with load(folder, threads=2, exact=True) as engine:
        expected = engine.logits(IDS)
    assert np.abs(logits(from_pretrained(folder)) - expected).max() < 0.01 * expected.std()


def test_greedy_text_is_the_engines(tied: Path) -> None:
    model, tokenizer = from_pretrained(tied), transformers.AutoTokenizer.from_pretrained(tied)
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=30, do_sample=False)[0])
    with load(tied, threads=2) as engine:
        assert text == "Once upon a time" + engine.generate("Once upon a time", max_new_tokens=30)


@pytest.mark.parametrize("which", ["untied", "untied_8bit"])
def test_a_linear_is_dequantized_by_the_format(which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    model = from_pretrained(folder)
    with Checkpoint.open(folder) as checkpoint:
        for name in ("model.layers.1.mlp.down_proj", "model.embed_tokens", "lm_head"):
            module = model.get_submodule(name)
            assert isinstance(module, hf.HlqMatrixModule)
            assert np.array_equal(module.dequantize().numpy(), hlq.dequantize(checkpoint.read_hlq(name)))
        assert "bits=2, group_size=128" in repr(model.model.embed_tokens)
        bias = checkpoint.read_float32("model.layers.0.self_attn.q_proj.bias")
        assert np.array_equal(model.model.layers[0].self_attn.q_proj.bias.numpy(), bias)


@pytest.mark.parametrize("which", ["tied", "untied", "untied_8bit"])
def test_dequantizing_agrees_with_the_kernels(which: str, request: pytest.FixtureRequest) -> None:
    model = from_pretrained(request.getfixturevalue(which))
    fast = logits(model)
    model.requires_grad_(True)  # gradients may be wanted: every product goes through torch
    slow = model(torch.tensor([IDS])).logits[0]
    assert slow.requires_grad
    assert np.abs(fast - slow.detach().numpy()).max() < 0.5 * fast.std()


@pytest.mark.parametrize("which", ["tied", "untied", "untied_8bit", "qwen3_moe", "mixtral"])
def test_saved_again_it_is_the_same_folder(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(which)
    from_pretrained(folder, dtype="auto").save_pretrained(tmp_path / "again")
    with Checkpoint.open(folder) as old, Checkpoint.open(tmp_path / "again") as new:
        assert new.scheme == old.scheme
        assert set(new.names()) == set(old.names())
        for name in old.names():
            assert np.array_equal(new.read(name), old.read(name)), name
    with load(folder, threads=1) as before, load(tmp_path / "again", threads=1) as after:
        assert np.array_equal(before.logits(IDS), after.logits(IDS))


@pytest.mark.parametrize("which", ["untied", "untied_8bit"])
def test_casts_copies_and_pickles_keep_the_parameters(which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    model = from_pretrained(folder)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.float64)):
        before, after = model.model.layers[0].mlp.up_proj, other.model.layers[0].mlp.up_proj
        for name in ("scales", "zeros", "row_scales"):
            kept, moved = getattr(before, name), getattr(after, name)
            assert kept is moved is None or kept.dtype == moved.dtype != torch.float64
        assert np.allclose(logits(other), expected, atol=0.2 * expected.std())
    half = from_pretrained(folder, dtype=torch.bfloat16)
    assert half.model.embed_tokens(torch.tensor([1])).dtype == torch.bfloat16
    assert np.abs(logits(half) - expected).max() < expected.std()


def test_experts_are_quantized_all_or_none(qwen3_moe: Path) -> None:
    config = json.loads((qwen3_moe / "config.json").read_text())
    kept = "model.layers.1.mlp.experts.3.down_proj"
    config["quantization_config"]["modules_to_not_convert"] = [kept]
    (qwen3_moe / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgumentError, match=rf"{kept} is not quantized"):
        from_pretrained(qwen3_moe)


@pytest.mark.parametrize("which", ["untied", "untied_8bit"])
def test_new_weights_replace_the_packed_ones(which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    linear = from_pretrained(folder).lm_head
    x = torch.ones(1, 72)
    with torch.no_grad():
        assert linear(x).abs().max() > 0
        linear.load_state_dict({name: torch.zeros_like(t) for name, t in linear.state_dict().items()})
        assert linear(x).abs().max() == 0


def test_threads_may_share_a_model(tied: Path) -> None:
    model = from_pretrained(tied)
    texts = [[n + 1, 2 * n + 3, 50] for n in range(6)]
    alone = [logits(model, ids) for ids in texts]
    with ThreadPoolExecutor(6) as pool:
        for found, expected in zip(pool.map(lambda ids: logits(model, ids), texts), alone, strict=True):
            assert np.array_equal(found, expected)


def test_it_runs_on_the_meta_device(untied: Path) -> None:
    linear = from_pretrained(untied).lm_head.to("meta")
    assert linear(torch.zeros(2, 72, device="meta")).shape == (2, linear.out_features)


@pytest.mark.gpu
def test_it_runs_on_a_gpu(tied: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    expected = logits(from_pretrained(tied))
    assert np.abs(logits(from_pretrained(tied).cuda()) - expected).max() < 0.5 * expected.std()


def test_transformers_cannot_quantize_with_it() -> None:
    with pytest.raises(InvalidArgumentError, match="elutq quantize"):
        from_pretrained(bundled_model(), quantization_config=hf.HlqConfig(version=1, bits=2, group_size=64))
    with pytest.raises(ConfigError, match="version"):
        hf.HlqConfig(bits=2, group_size=64)


def test_without_torch_the_message_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-c", "import elutq.hf"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert process.stderr.splitlines()[-1] == (
        "elutq.errors.MissingDependencyError: elutq.hf needs torch and transformers (no torch here); "
        "install them with: pip install 'elutq[hf]'"
    )
