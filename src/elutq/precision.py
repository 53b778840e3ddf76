"""How exactly GPUs multiply matrices of float32.

In TF32 they round what they multiply to 10 bits of mantissa and add up in float32, several times as fast.
That is more than the bfloat16 that models come in, and enough for activations and moments of them; not for
what solves equations, or tells apart what is nearly equal.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products_in_tf32(device: torch.device) -> Iterator[None]:
    """On a GPU, products are rounded; elsewhere nothing changes."""
    with _precision("high" if device.type == "cuda" else torch.get_float32_matmul_precision()):
        yield


@contextmanager
def products_in_float32() -> Iterator[None]:
    """Products are exact, also inside `products_in_tf32`."""
    with _precision("highest"):
        yield


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
