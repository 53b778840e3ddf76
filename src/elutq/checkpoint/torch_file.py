"""`pytorch_model.bin` files, through torch's safe loader."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from elutq.checkpoint.safetensors import TensorInfo
from elutq.errors import HeaderError, MissingDependencyError, MissingFileError, TensorDtypeError

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}


class TorchFile:
    """A PyTorch state dict, mapped by torch. Nothing in it is executed: only tensors are unpickled.

    Raises:
        MissingDependencyError: torch is not installed.
        MissingFileError: there is no such file.
        HeaderError: the file is damaged, or holds anything but tensors.
    """

    def __init__(self, path: Path) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingDependencyError(
                f"reading {path.name} needs torch: pip install 'elutq[quantize]', "
                "or convert the model to safetensors"
            ) from error
        if not path.is_file():
            raise MissingFileError(f"{path} does not exist or is not a file")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except Exception as error:  # torch reports damage with almost any exception type
            raise HeaderError(f"torch cannot read {path} ({str(error)[:200]}); get the file again") from error
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
        ):
            raise HeaderError(f"{path} is not a state dict: it holds something besides named tensors")
        self._state: dict[str, Any] = {name: value.detach() for name, value in state.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(
                _dtype_name(value), tuple(value.shape), path, 0, value.numel() * value.element_size()
            )
            for name, value in self._state.items()
        }

    def view(self, name: str) -> NDArray[Any]:
        """The tensor as an array on torch's map."""
        info = self.tensors[name]
        if info.dtype not in _DTYPES.values():
            raise TensorDtypeError(
                f"{name} in {info.file.name} has dtype {info.dtype}; "
                f"only {', '.join(_DTYPES.values())} can be read"
            )
        tensor = self._state[name].contiguous()
        if info.dtype == "BF16":
            import torch

            bits: NDArray[np.int16] = tensor.view(torch.int16).numpy()
            return bits.view(ml_dtypes.bfloat16)
        array: NDArray[Any] = tensor.numpy()
        return array

    def prefetch(self, name: str) -> None:
        """Torch's map is read on demand."""

    def release(self, name: str) -> None:
        """Torch's map is clean file memory: the system takes its pages back when it needs them."""

    def close(self) -> None:
        """Drop the tensors."""
        self._state = {}


def _is_zip(path: Path) -> bool:
    """Whether torch can map the file; files older than torch 1.6 it must read whole."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _dtype_name(tensor: Any) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)
