"""Hugging Face folders to GGUF and back, for llama.cpp and its forks.

Needs the packages `gguf` and `safetensors`.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter, TokenType
from numpy.typing import NDArray
from random_gguf import BLOCK_NAMES
from safetensors.numpy import save_file

from elutq.architectures import EMBEDDING, FINAL_NORM, HEAD, EngineConfig, block_linears
from elutq.checkpoint import Checkpoint

#: Text splitters that llama.cpp knows: what tells their regular expression -> its name for them.
_SPLITTERS = {r"|\p{N}|": "qwen2", r"|\p{N}{1,3}|": "llama-bpe"}


def write_gguf(folder: Path, path: Path) -> None:
    """Write an unquantized Llama or Mistral with a byte-level BPE tokenizer, all weights in float32."""
    with Checkpoint.open(folder) as checkpoint:
        config = checkpoint.engine
        if config.model_type not in ("llama", "mistral"):
            raise SystemExit(
                f"{folder} is a {config.model_type}; only llama and mistral can be written as GGUF"
            )
        writer = GGUFWriter(path, "llama")
        _add_config(writer, config)
        _add_tokenizer(writer, config.vocab_size, json.loads((folder / "tokenizer.json").read_text()))
        for name, gguf_name, heads in _tensors(config):
            weight = checkpoint.read_float32(name)
            writer.add_tensor(gguf_name, _interleaved(weight, heads) if heads else weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_gguf(path: Path, source: Path, out: Path) -> None:
    """The way back: a copy of the folder `source` with the weights of a GGUF file, all of them float32."""
    with Checkpoint.open(source) as checkpoint:
        config = checkpoint.engine
    found = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    weights = {
        name: np.ascontiguousarray(
            _split_halves(found[gguf_name], heads) if heads else found[gguf_name], np.float32
        )
        for name, gguf_name, heads in _tensors(config)
    }
    out.mkdir()
    for file in source.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, out)
    save_file(weights, out / "model.safetensors")


def gguf_text(folder: Path, text: str) -> str:
    """A text as that model's GGUF reads it, with the names that it has for added tokens."""
    for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]:
        text = text.replace(token["content"], _added_name(token["id"]))
    return text


def _added_name(token_id: int) -> str:
    return f"<added token {token_id}>"


def _tensors(config: EngineConfig) -> Iterator[tuple[str, str, int]]:
    """Hugging Face's name, GGUF's, and where GGUF pairs rotary dimensions otherwise, the number of heads."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    yield f"{EMBEDDING}.weight", "token_embd.weight", 0
    yield FINAL_NORM, "output_norm.weight", 0
    if not config.tie_word_embeddings:
        yield f"{HEAD}.weight", "output.weight", 0
    for linear in block_linears(config):
        layer, module = linear.name.removeprefix("model.layers.").split(".", 1)
        gguf_name = f"blk.{layer}.{BLOCK_NAMES[module]}.weight"
        yield f"{linear.name}.weight", gguf_name, heads.get(module.rpartition(".")[2], 0)
    for layer in map(str, range(config.num_hidden_layers)):
        yield f"model.layers.{layer}.input_layernorm.weight", f"blk.{layer}.attn_norm.weight", 0
        yield f"model.layers.{layer}.post_attention_layernorm.weight", f"blk.{layer}.ffn_norm.weight", 0


def _interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head from halves, as Hugging Face rotates them, to pairs, as GGUF does."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, -1, columns).swapaxes(1, 2).reshape(rows, columns)


def _split_halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """The inverse of `_interleaved`."""
    rows, columns = weight.shape
    return weight.reshape(heads, -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _add_config(writer: GGUFWriter, config: EngineConfig) -> None:
    inv_freq = np.array(config.rope_inv_freq)
    base = inv_freq[1] ** (-config.head_dim / 2)
    plain = base ** (-2 * np.arange(len(inv_freq)) / config.head_dim)
    if not np.allclose(inv_freq, plain, rtol=1e-4) or config.rope_attention_factor != 1:
        raise SystemExit("models with scaled rotary embeddings cannot be written as GGUF")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(base))
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: GGUFWriter, vocab_size: int, tokenizer: Mapping[str, Any]) -> None:
    """Added tokens become user-defined ones, which llama.cpp finds in any text, as Hugging Face does.

    It takes those whose names it knows, such as <|endoftext|>, for control tokens all the same and then not
    out of a text, so they have names that it does not know (`gguf_text`).
    """
    pattern = json.dumps(tokenizer["pre_tokenizer"])
    known = [name for part, name in _SPLITTERS.items() if json.dumps(part)[1:-1] in pattern]
    if tokenizer["model"]["type"] != "BPE" or not known:
        raise SystemExit(
            "only byte-level BPE tokenizers that split text as Llama 3 or Qwen 2 do can be written"
        )
    tokens = {id_: token for token, id_ in tokenizer["model"]["vocab"].items()}
    added = {token["id"]: _added_name(token["id"]) for token in tokenizer["added_tokens"]}
    tokens |= added
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(known[0])
    writer.add_token_list([tokens.get(i, f"[unused {i}]") for i in range(vocab_size)])
    writer.add_token_types(
        [
            TokenType.USER_DEFINED if i in added else TokenType.NORMAL if i in tokens else TokenType.UNUSED
            for i in range(vocab_size)
        ]
    )
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(min(added, default=0))
