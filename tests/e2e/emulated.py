"""Compare generation on another machine, or an emulated one, with this one: the same bits in every logit.

    python tests/e2e/emulated.py qemu-aarch64-static -L /usr/aarch64-linux-gnu BUILD/tests/cpp/greedy_logits

The arguments are a command that runs `greedy_logits` (tests/cpp) of the other build. The bundled model,
quantized to 2 bits with parameters of either width, is given to it in a plain dump: no more than numbers and
arrays in the order the program reads them.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO, get_args

import numpy as np
from numpy.typing import NDArray

from elutq import load
from elutq.architectures import vectors
from elutq.checkpoint import Checkpoint
from elutq.models import bundled_model
from elutq.quantize import quantize
from elutq.runtime import KvCacheType, LanguageModel
from elutq.scheme import PARAM_BITS

ISAS = ("neon", "scalar")
PROMPT = "Once upon a time, in a small house near the forest, there lived a little girl who"
NEW_TOKENS = 48


def main() -> None:
    """Quantize, run both, compare."""
    with tempfile.TemporaryDirectory() as work:
        for param_bits in PARAM_BITS:
            folder, dump = Path(work) / f"model-{param_bits}", Path(work) / "dump"
            print(f"parameters of {param_bits} bits")
            quantize(bundled_model(), folder, bits=2, param_bits=param_bits)
            with Checkpoint.open(folder) as checkpoint, dump.open("wb") as file:
                write_dump(checkpoint, file)
            for kv_cache in get_args(KvCacheType):
                with load(folder, kv_cache=kv_cache) as model:
                    compare(model, kv_cache, dump)


def compare(model: LanguageModel, kv_cache: str, dump: Path) -> None:
    """Generate here and there."""
    prompt = model.tokenizer.encode(PROMPT)
    sequence, logits, step = model.new_sequence(), [], prompt
    for _ in range(NEW_TOKENS):
        logits.append(model.step([(sequence, step)])[0])
        step = [int(logits[-1].argmax())]
    tokens = [int(row.argmax()) for row in logits]
    print(f"{model.isa}, {kv_cache} cache: {model.tokenizer.decode(tokens)}")
    for isa in ISAS:
        command = [*sys.argv[1:], str(dump), isa, kv_cache, str(NEW_TOKENS), *map(str, prompt)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        other = np.frombuffer(output, "<f4").reshape(NEW_TOKENS, -1)
        if (theirs := other.argmax(axis=1).tolist()) != tokens:
            raise SystemExit(f"{isa}: other tokens: {model.tokenizer.decode(theirs)}")
        if other.tobytes() != np.stack(logits).tobytes():
            raise SystemExit(f"{isa}: the same tokens, but other logits")
        print(f"{isa}: the same {NEW_TOKENS} tokens, the same bits in all {other.size} logits")


def write_dump(checkpoint: Checkpoint, file: BinaryIO) -> None:
    """What `greedy_logits` reads: the config, then name, kind and values of every tensor."""

    def integers(*values: int) -> None:
        file.write(np.array(values, "<i8").tobytes())

    def array(values: NDArray[np.generic]) -> None:
        integers(values.size)
        file.write(np.ascontiguousarray(values).tobytes())

    def text(value: str) -> None:
        array(np.frombuffer(value.encode(), np.uint8))

    c = checkpoint.engine
    integers(c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads)
    integers(c.num_key_value_heads, c.head_dim, c.max_position_embeddings, c.tie_word_embeddings)
    integers(c.attention_bias_qkv, c.attention_bias_o, c.mlp_bias, c.qk_norm)
    array(np.array(c.sliding_windows, "<i8"))
    array(np.array(c.rope_inv_freq, "<f4"))
    array(np.array([c.rms_norm_eps, c.rope_attention_factor], "<f4"))
    for name, linear in checkpoint.linears.items():
        text(name)
        if name not in checkpoint.schemes:
            weight = checkpoint.read(f"{name}.weight")
            text(weight.dtype.name)
            integers(linear.out_features, linear.in_features)
            array(weight)
            continue
        matrix = checkpoint.read_hlq(name)
        text("hlq")
        integers(linear.out_features, linear.in_features, matrix.bits, matrix.group_size, matrix.param_bits)
        for values in (matrix.planes, matrix.scales, matrix.zeros):
            array(np.ascontiguousarray(values).view(np.uint8))
        array(np.zeros(0, np.float16) if matrix.row_scales is None else matrix.row_scales)
    for name, _ in vectors(c):
        text(name)
        text("vector")
        array(checkpoint.read_float32(name))


if __name__ == "__main__":
    main()
