"""Decoder blocks with quantized weights: to be trained, or as they have become."""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from elutq import hlq
from elutq.blocks import DecoderBlock
from elutq.finetune.quantized_linear import QuantizedLinear
from elutq.packing import HlqMatrix


class QuantizedModel(Protocol):
    """A quantized model: an `elutq.checkpoint.Checkpoint` of one."""

    def read_hlq(self, module: str) -> HlqMatrix:
        """A quantized matrix."""

    def read_float32(self, name: str) -> NDArray[np.float32]:
        """Any other tensor."""


@dataclass(frozen=True)
class Tuned:
    """What was tuned: quantized matrices by module, norms and biases in float32 by tensor name."""

    matrices: Mapping[str, HlqMatrix]
    vectors: Mapping[str, NDArray[np.float32]]


def make_trainable(
    block: DecoderBlock,
    model: QuantizedModel,
    quantized: Collection[str],
    device: torch.device,
    *,
    train_codes: bool,
    uniform: bool = False,
) -> None:
    """Give a block the weights of the quantized model, in a form that can be trained.

    Args:
        block: of the full model.
        model: the quantized model.
        quantized: names of its quantized modules.
        device: where the block is.
        train_codes: see `QuantizedLinear`.
        uniform: likewise.
    """
    for name, linear in list(block.linears.items()):
        if name in quantized:
            matrix = model.read_hlq(name)
            trainable = QuantizedLinear(matrix, linear.bias, device, train_codes=train_codes, uniform=uniform)
            block.replace(name, trainable)
    set_vectors(block.modules, {name: model.read_float32(name) for name in vectors(block.modules)})


def fill(block: DecoderBlock, tuned: Tuned) -> None:
    """Give a block the weights of a tuned one."""
    for name, matrix in tuned.matrices.items():
        weight = block.linears[name].weight
        weight.data = torch.from_numpy(hlq.dequantize(matrix)).to(weight)
    set_vectors(block.modules, tuned.vectors)


def result(block: DecoderBlock) -> Tuned:
    """What a trainable block has become."""
    matrices = {
        name: linear.matrix() for name, linear in block.linears.items() if isinstance(linear, QuantizedLinear)
    }
    return Tuned(matrices, {name: to_numpy(vector) for name, vector in vectors(block.modules).items()})


def vectors(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Norms and biases, by tensor name."""
    return {
        f"{module}.{name}": parameter
        for module, owner in modules.items()
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.ndim == 1
    }


def set_vectors(modules: Mapping[str, nn.Module], values: Mapping[str, NDArray[np.float32]]) -> None:
    """Set norms and biases."""
    found = vectors(modules)
    for name, value in values.items():
        found[name].data = torch.from_numpy(value).to(found[name])


def to_numpy(parameter: torch.Tensor) -> NDArray[np.float32]:
    """A copy in float32."""
    # Cloned first: FSDP cannot free storage that NumPy has seen.
    return parameter.detach().clone().float().cpu().numpy()


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in bfloat16 where the device gains from it."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
