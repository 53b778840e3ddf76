"""The engine against transformers: tiny random models of every family, on every instruction set there is."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from elutq import _core, hlq
from elutq.architectures import EMBEDDING, HEAD, block_linears, engine_config, outer_linears
from elutq.checkpoint import Checkpoint
from elutq.packing import HlqMatrix
from elutq.quantize import quantize
from elutq.runtime import LanguageModel, load
from elutq.scheme import ModelScheme, QuantScheme

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ISAS = _core.available_isas()
REFERENCE_MODEL = Path(__file__).parents[2] / "src" / "elutq" / "models" / "llama-7m"

SMALL: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
#: name -> config.json
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-llama3-rope": {"model_type": "llama", "rope_scaling": LLAMA3_ROPE, "num_key_value_heads": 6},
    "llama-linear-rope-mqa": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "llama-yarn": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "llama-odd-shapes": {
        "model_type": "llama",
        "hidden_size": 320,
        "intermediate_size": 616,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "vocab_size": 1003,
    },
    "mistral-window": {"model_type": "mistral", "sliding_window": 24},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 17,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 40, "tie_word_embeddings": True},
    "qwen3-untied": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "head_dim": 24,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 72,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "qwen3-moe-windows": {
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "decoder_sparse_step": 2,
        "use_sliding_window": True,
        "sliding_window": 19,
        "tie_word_embeddings": True,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


#: Of few experts: where a token is as good as tied between two, rounding decides, and differently elsewhere.
MIXTURES = ("qwen3-moe", "qwen3-moe-windows", "mixtral")


def random_transformer(name: str, dtype: Any = None) -> Any:
    """A transformers model with weights, norms and biases that all matter, rounded to `dtype`."""
    config = transformers.AutoConfig.for_model(**copy.deepcopy({**SMALL, **MODELS[name]}))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
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
            if dtype is not None:
                parameter.copy_(parameter.to(dtype).float())
    return model


def save(model: Any, folder: Path, dtype: Any) -> Path:
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    return folder


def stored_tensors(model: Any) -> dict[str, Any]:
    """The model's tensors under the names they have on disk: of experts, views of what transformers fuses."""
    tensors: dict[str, Any] = {}
    for key, value in model.state_dict().items():
        experts, _, name = key.rpartition(".")
        if not experts.endswith(".experts"):
            tensors[key] = value
            continue
        for expert, matrix in enumerate(value):
            names, parts = ("down_proj",), (matrix,)
            if name == "gate_up_proj":
                names, parts = ("gate_proj", "up_proj"), matrix.chunk(2)
            tensors |= {f"{experts}.{expert}.{n}.weight": p for n, p in zip(names, parts, strict=True)}
    if model.config.model_type != "mixtral":
        return tensors
    renamed = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "mlp": "block_sparse_moe"}
    return {".".join(renamed.get(word, word) for word in key.split(".")): v for key, v in tensors.items()}


def reference_logits(model: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.no_grad():
        result: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return result


def relative(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def assert_close(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 2e-2
    assert relative(ours, theirs) < 1e-3


def prompt(model: LanguageModel, length: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, length)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", MODELS)
def test_dense_models_match_transformers(name: str, isa: str, tmp_path: Path) -> None:
    reference = random_transformer(name, torch.bfloat16)
    with load(save(reference, tmp_path, torch.bfloat16), isa=isa, threads=2) as model:
        assert model.isa == isa
        ids = prompt(model, 100)
        expected = reference_logits(reference, ids)
        prefill = model.logits(ids)
        assert_close(prefill, expected)
        assert np.array_equal(model.logits(ids, chunk=1), prefill)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_match_transformers(dtype: str, tmp_path: Path) -> None:
    reference = random_transformer("qwen3", getattr(torch, dtype))
    with load(save(reference, tmp_path, getattr(torch, dtype)), threads=2) as model:
        ids = prompt(model, 50)
        assert_close(model.logits(ids), reference_logits(reference, ids))


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3", "qwen3-moe", "mixtral"])
def test_ragged_sequences_match_transformers(name: str, tmp_path: Path) -> None:
    reference = random_transformer(name, torch.bfloat16)
    with load(save(reference, tmp_path, torch.bfloat16), threads=2) as model:
        texts = [prompt(model, length, seed=length) for length in (1, 7, 64, 65, 150)]
        expected = [reference_logits(reference, ids) for ids in texts]
        sequences = [model.new_sequence() for _ in texts]
        # Prompts of all, but for the last three tokens; then the rest one by one, all sequences in each step.
        heads = [max(len(ids) - 3, 1) for ids in texts]
        batch = list(zip(sequences, (ids[:n] for ids, n in zip(texts, heads, strict=True)), strict=True))
        for logits, n, theirs in zip(model.step(batch, all_logits=True), heads, expected, strict=True):
            assert_close(logits, theirs[:n])
        for _ in range(3):
            live = [i for i, sequence in enumerate(sequences) if len(sequence) < len(texts[i])]
            batch = [(sequences[i], texts[i][len(sequences[i]) : len(sequences[i]) + 1]) for i in live]
            for i, logits in zip(live, model.step(batch), strict=True):
                assert_close(logits, expected[i][len(sequences[i]) - 1])


def test_greedy_text_of_the_reference_model_is_that_of_transformers() -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        REFERENCE_MODEL, dtype=torch.bfloat16
    ).float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(REFERENCE_MODEL)
    with load(REFERENCE_MODEL, threads=2) as model:
        for text in ("Once upon a time", "The king said to his daughter,", "In the morning"):
            ids = tokenizer(text, return_tensors="pt").input_ids
            output = reference.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :]
            expected = tokenizer.decode(output, skip_special_tokens=True)
            assert model.generate(text, max_new_tokens=60) == expected


@pytest.mark.parametrize("name", MODELS)
def test_blocks_taken_apart_compute_what_transformers_does(name: str, tmp_path: Path) -> None:
    from elutq.blocks import BlockReader

    reference = random_transformer(name)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 259, (2, 50)))
    with Checkpoint.open(save(reference, tmp_path, torch.float32)) as source, torch.no_grad():
        reader = BlockReader(source, torch.device("cpu"))
        hidden = reader.embed(ids)
        for index in range(source.engine.num_hidden_layers):
            block = reader.block(index)
            attended = block.attend(
                block.attention_input(hidden), reader.positions(50), reader.mask(index, 50)
            )
            hidden = block.add_attention(hidden, attended)
            hidden = hidden + block.mlp(block.mlp_input(hidden))
        logits = reader.head_input(hidden) @ reader.head().T
        torch.testing.assert_close(logits.reshape(2, 50, -1), reference(ids).logits, rtol=1e-4, atol=1e-4)


# ---- Quantized models -----------------------------------------------------------------------


def quantized(reference: Any, folder: Path, schemes: dict[str, QuantScheme]) -> Path:
    """Write the model's HLQ folder, and put the dequantized weights into the model itself."""
    config = {**reference.config.to_dict(), "dtype": "float32"}
    default = next(iter(schemes.values()))
    outside = {name: scheme for name, scheme in schemes.items() if name in (EMBEDDING, HEAD)}
    blocks = {name: scheme for name, scheme in schemes.items() if name not in outside}
    skipped = [name for name, _, _ in block_linears(engine_config(config)) if name not in schemes]
    scheme = ModelScheme(default, {**blocks, **outside}, tuple(skipped))
    config["quantization_config"] = scheme.to_config()
    tensors: dict[str, NDArray[Any]] = {}
    with torch.no_grad():
        for key, value in stored_tensors(reference).items():
            module = key.removesuffix(".weight")
            if module in schemes:
                chosen = schemes[module]
                matrix = hlq.fit(value.numpy(), chosen.bits, chosen.group_size, method="rtn")
                if chosen.param_bits == 8:
                    matrix = hlq.to_8bit(value.numpy(), matrix)
                value.copy_(torch.from_numpy(hlq.dequantize(matrix)))
                tensors |= {f"{module}.{part}": array for part, array in matrix.arrays.items()}
            elif not (key == f"{HEAD}.weight" and reference.config.tie_word_embeddings):
                tensors[key] = value.contiguous().numpy()
    folder.mkdir(exist_ok=True)
    from safetensors.numpy import save_file

    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def every_scheme(name: str, seed: int) -> dict[str, QuantScheme]:
    """All bit widths, group sizes and parameters mixed, some linears dense; embedding and head at 4 bits."""
    config = engine_config({**SMALL, **MODELS[name]})
    rng = np.random.default_rng(seed)
    schemes = {}
    for linear in block_linears(config):
        if rng.random() > 0.1:
            schemes[linear.name] = QuantScheme(
                int(rng.integers(1, 5)), int(rng.choice([32, 64, 128, 256, -1])), int(rng.choice([16, 8]))
            )
    for linear in outer_linears(config):
        schemes[linear.name] = QuantScheme(4, 128, int(rng.choice([16, 8])))
    return schemes


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["llama", "llama-odd-shapes", "mistral-window", "qwen2", "qwen3", *MIXTURES])
def test_exact_hlq_models_match_the_dequantized_model(name: str, isa: str, tmp_path: Path) -> None:
    reference = random_transformer(name)
    folder = quantized(reference, tmp_path / "hlq", every_scheme(name, seed=1))
    with load(folder, isa=isa, exact=True, threads=2) as model:
        ids = prompt(model, 70)
        ours = model.logits(ids)
        assert_close(ours, reference_logits(reference, ids))
        assert np.array_equal(model.logits(ids, chunk=1), ours)


@pytest.mark.parametrize("param_bits", [16, 8])
@pytest.mark.parametrize("name", ["llama-odd-shapes", "qwen3"])
def test_int8_tables_are_the_same_on_every_isa_and_near_exact(
    name: str, param_bits: int, tmp_path: Path
) -> None:
    reference = random_transformer(name)
    schemes = {key: QuantScheme(4, 64, param_bits) for key in every_scheme(name, seed=2)}
    folder = quantized(reference, tmp_path / "hlq", schemes)
    ids = np.random.default_rng(0).integers(0, 259, 60)
    results = {}
    for isa in ISAS:
        with load(folder, isa=isa, threads=2) as model:
            results[isa] = model.logits(ids)
            assert np.array_equal(model.logits(ids, chunk=7), results[isa])
    for isa in ISAS:
        assert np.array_equal(results[isa], results[ISAS[0]]), isa
    # Rounding to int8 in pairs of slots: random weights show it more than trained ones.
    assert relative(results[ISAS[0]], reference_logits(reference, ids)) < 0.07


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_give_the_same_bits_on_every_isa_and_in_any_company(name: str, tmp_path: Path) -> None:
    folder = quantized(random_transformer(name), tmp_path / "hlq", every_scheme(name, seed=3))
    texts = [np.random.default_rng(length).integers(0, 259, length) for length in (1, 40, 160)]
    expected: list[NDArray[np.float32]] = []
    for isa in ISAS:
        for threads in (1, 3):
            with load(folder, isa=isa, threads=threads) as model:
                alone = [model.logits(ids, chunk=7) for ids in texts]
                batch = [(model.new_sequence(), ids) for ids in texts]
                together = model.step(batch, all_logits=True)
                expected = expected or alone
                for ours, theirs in zip([*alone, *together], [*expected, *expected], strict=True):
                    assert np.array_equal(ours, theirs)


def test_a_mixture_is_quantized_and_generates_text(tmp_path: Path) -> None:
    reference = random_transformer("qwen3-moe", torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(REFERENCE_MODEL)
    reference.resize_token_embeddings(len(tokenizer))
    source = save(reference, tmp_path / "source", torch.bfloat16)
    tokenizer.save_pretrained(source)
    report = quantize(source, tmp_path / "out", bits=4, group_size=32)
    kinds = {kind.kind: kind for kind in report.summary.kinds}
    assert (kinds["router"].tensors, kinds["router"].bits) == (2, (16,))
    assert (kinds["gate_proj"].tensors, kinds["gate_proj"].bits) == (2 * 7 + 1, (4,))
    assert kinds["down_proj"].relative_error is not None
    assert kinds["down_proj"].relative_error < 0.01
    with load(tmp_path / "out", threads=2) as model:
        text = model.generate("Once upon a time", max_new_tokens=12)
        assert text
        assert model.generate("Once upon a time", max_new_tokens=12) == text
        # Near the original: the probabilities of the next token hardly differ.
        ids = prompt(model, 40)
        assert relative(model.logits(ids), reference_logits(reference, ids)) < 0.5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_int8_tables_of_one_linear_are_within_two_percent(bits: int, group_size: int, isa: str) -> None:
    """A model that is its embedding and its head: logits are one linear of a normalized row."""
    config = engine_config(
        {
            **SMALL,
            "model_type": "llama",
            "hidden_size": 608,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
        }
    )
    rng = np.random.default_rng(bits)
    head: HlqMatrix = hlq.fit(
        rng.standard_normal((259, 608), dtype=np.float32), bits, group_size, method="rtn", name=HEAD
    )
    embedding = rng.standard_normal((259, 608), dtype=np.float32)
    results = []
    for exact in (True, False):
        engine = _core.Engine(config, isa, 1, exact, "fp16")
        engine.set_float32(EMBEDDING, embedding)
        engine.set_hlq(HEAD, head)
        for linear in block_linears(config):
            engine.set_float32(linear.name, np.zeros((linear.out_features, linear.in_features), np.float32))
        for name in ("input_layernorm", "post_attention_layernorm"):
            engine.set_vector(f"model.layers.0.{name}.weight", np.ones(608, np.float32))
        engine.set_vector("model.norm.weight", np.ones(608, np.float32))
        results.append(engine.step([(engine.new_sequence(20), np.arange(20, dtype=np.int32))], True))
    normalized = embedding[:20] / np.sqrt((embedding[:20] ** 2).mean(axis=1, keepdims=True) + 1e-5)
    assert relative(results[0], normalized @ hlq.dequantize(head).T) < 1e-5
    assert 0 < relative(results[1], results[0]) < 0.02
