"""Rotated models against the originals in transformers, and on the engine."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from elutq.rotation import rotate_model
from elutq.runtime import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
#: name -> config.json
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-power-of-two": {
        "model_type": "llama",
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "llama-odd-shapes": {
        "model_type": "llama",
        "hidden_size": 360,
        "intermediate_size": 333,
        "num_attention_heads": 9,
        "head_dim": 24,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 24},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 40, "tie_word_embeddings": True},
    "qwen3-biases": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
}
IDS = np.random.default_rng(0).integers(0, 259, 100)


def random_model(name: str) -> Any:
    """A transformers model with weights, norms and biases that all matter and one channel that stands out."""
    config = transformers.AutoConfig.for_model(**copy.deepcopy({**SMALL, **MODELS[name]}))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if key.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif key.endswith(".bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        model.get_input_embeddings().weight[:, 5] *= 10
    return model


def logits(model: Any) -> NDArray[np.float32]:
    with torch.no_grad():
        result: NDArray[np.float32] = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    return result


@pytest.mark.parametrize("name", MODELS)
def test_logits_stay_the_same(name: str, tmp_path: Path) -> None:
    original = random_model(name)
    original.save_pretrained(tmp_path / "m")
    rotate_model(tmp_path / "m", tmp_path / "rotated", seed=7)
    rotated = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "rotated", attn_implementation="eager"
    )
    assert rotated.dtype == torch.float32
    expected = logits(original)
    assert np.abs(expected).max() > 1
    assert rotated.lm_head.weight is not rotated.get_input_embeddings().weight
    assert not torch.allclose(rotated.lm_head.weight, original.lm_head.weight)
    assert np.abs(logits(rotated) - expected).max() < 1e-4
    with load(tmp_path / "m", exact=True) as before, load(tmp_path / "rotated", exact=True) as after:
        assert np.abs(after.logits(IDS) - before.logits(IDS)).max() < 1e-2
        assert np.abs(after.logits(IDS) - expected).max() < 2e-2
