"""Quantize a model with another Python package and save it with the weights it then computes with.

    PEER-PYTHON benchmarks/quantize_peer.py hqq MODEL OUT --bits 2 --group-size 64 --calibration WINDOWS.json

Runs in the peer's own environment and so imports nothing of elutq. OUT becomes a Hugging Face folder of
float32 weights. The block linears are quantized; embedding and head are left alone. WINDOWS.json holds lists
of token ids. The last line printed is a JSON object: the package's version, and the bits per weight that the
quantized linears need.
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize, save and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = json.loads(args.calibration.read_text())
    package, quantize = METHODS[args.method]
    model, bits_per_weight = quantize(model, tokenizer, windows, args.bits, args.group_size)
    model.float().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(json.dumps({"version": f"{package} {version(package)}", "bits_per_weight": bits_per_weight}))


def block_linears(model: Any) -> list[torch.nn.Linear]:
    """The linear modules of the decoder blocks."""
    return [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]


def hqq(
    model: Any, tokenizer: Any, windows: list[list[int]], bits: int, group_size: int
) -> tuple[Any, float]:
    """Half-quadratic quantization, data-free: float16 scale and zero per group, codes as it packs them."""
    from hqq.core.quantize import Quantizer

    stored = weights = 0
    for linear in block_linears(model):
        codes, meta = Quantizer.quantize(
            linear.weight.data,
            nbits=bits,
            group_size=group_size,
            axis=1,
            round_zero=bits == 4,  # as its own default configuration
            compute_dtype=torch.float32,
            device="cpu",
        )
        for name in ("scale", "zero"):
            meta[name] = meta[name].half().float()
            stored += 2 * meta[name].numel()
        stored += codes.numel() * codes.element_size()
        weights += linear.weight.numel()
        linear.weight.data = Quantizer.dequantize(codes, meta)
    return model, 8 * stored / weights


def auto_round(
    model: Any, tokenizer: Any, windows: list[list[int]], bits: int, group_size: int
) -> tuple[Any, float]:
    """Rounding and ranges trained block by block, its defaults: float16 scale and packed zero per group."""
    from auto_round import AutoRound

    rounder = AutoRound(
        model,
        tokenizer,
        bits=bits,
        group_size=group_size,
        sym=False,
        dataset=torch.utils.data.DataLoader([torch.tensor(ids) for ids in windows], batch_size=8),
        nsamples=len(windows),
        seqlen=len(windows[0]),
        device_map="cpu",
        enable_torch_compile=False,  # takes longer than it saves on a small model
    )
    model, _ = rounder.quantize()
    return model, bits + (16 + bits) / group_size


#: Name -> its package, and (model, tokenizer, windows, bits, group size) -> model, bits per weight.
METHODS: dict[str, tuple[str, Callable[..., tuple[Any, float]]]] = {
    "hqq": ("hqq", hqq),
    "auto-round": ("auto-round", auto_round),
}


if __name__ == "__main__":
    main()
