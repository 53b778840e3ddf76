"""Reading a model folder, quantized or not."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elutq.architectures import EngineConfig, LinearSpec, engine_config
from elutq.checkpoint.contents import check_contents, linears, module_schemes
from elutq.checkpoint.folder import open_weights, read_config, resolve
from elutq.checkpoint.safetensors import TensorInfo, WeightFile
from elutq.errors import HeaderError, MissingTensorError, TensorDtypeError, TensorValueError
from elutq.packing import HlqMatrix
from elutq.scheme import ModelScheme, QuantScheme

_ALL = slice(None)


class Checkpoint:
    """An open model folder. Tensors are read lazily; arrays are views on the mapped files.

    Once it is open, every tensor that the config calls for is there, with the right dtype and shape.

    Attributes:
        path: the folder.
        config: the parsed `config.json`.
        engine: the numbers the engine needs, from the config.
        linears: module name -> its name and shape: embedding, block linears, routers and, unless it is tied,
            the head.
        scheme: how the model is quantized, None for a 16- or 32-bit model.
        schemes: quantized module name -> how it is quantized; empty for a 16- or 32-bit model.
    """

    path: Path
    config: dict[str, Any]
    engine: EngineConfig
    linears: dict[str, LinearSpec]
    scheme: ModelScheme | None
    schemes: dict[str, QuantScheme]

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> "Checkpoint":
        """Open a local folder, or download a Hugging Face hub id and open that.

        Raises:
            CheckpointError: one subclass per fault (see `elutq.errors`).
            ConfigError: `config.json` is missing or malformed.
            UnsupportedArchitectureError: the model is of a family the engine does not run.
            MissingDependencyError: the weights are PyTorch files and torch is not installed.
        """
        return cls(resolve(source))

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config = read_config(folder)
        self.engine = engine_config(self.config)
        self.linears = {linear.name: linear for linear in linears(self.engine)}
        quantization = self.config.get("quantization_config")
        self.scheme = None if quantization is None else ModelScheme.from_config(quantization)
        self.schemes = module_schemes(self.engine, self.scheme)
        self._files = open_weights(folder)
        try:
            self._file_of = self._index()
            found = {name: file.tensors[name] for name, file in self._file_of.items()}
            check_contents(self.engine, self.scheme, found, str(folder))
        except BaseException:
            self.close()
            raise

    def _index(self) -> dict[str, WeightFile]:
        file_of: dict[str, WeightFile] = {}
        for file in self._files:
            for name, info in file.tensors.items():
                if name in file_of:
                    raise HeaderError(
                        f"{name!r:.200} is in {info.file} and in another shard; the folder is damaged"
                    )
                file_of[name] = file
        return file_of

    def files(self) -> list[tuple[str, int, int]]:
        """Name, size and modification time (ns) of each weight file: they tell whether the folder changed."""
        paths = sorted({self.info(name).file for name in self.names()})
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]

    def names(self) -> Iterator[str]:
        """Every tensor in the folder, file by file."""
        return iter(self._file_of)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor.

        Raises:
            MissingTensorError: there is no such tensor.
        """
        return self._file(name).tensors[name]

    def read(self, name: str, rows: slice = _ALL, columns: slice = _ALL) -> NDArray[Any]:
        """A part of a tensor as a view on the file: float32, float16, `ml_dtypes.bfloat16`, uint8 or int8.

        Args:
            name: the tensor.
            rows: of its first axis.
            columns: of its last axis.

        Raises:
            MissingTensorError: there is no such tensor.
            TensorDtypeError: its dtype is none of those.
        """
        return self._file(name).view(name)[rows][..., columns]

    def read_float32(self, name: str, rows: slice = _ALL, columns: slice = _ALL) -> NDArray[np.float32]:
        """`read` of a 16- or 32-bit tensor, in float32; exact. A view if the file has float32, else a copy.

        Raises:
            MissingTensorError: there is no such tensor.
            TensorDtypeError: it does not hold floating-point values.
        """
        array = self.read(name, rows, columns)
        if array.dtype.kind in "ui":
            raise TensorDtypeError(f"{name} in {self.path} is {array.dtype}, not a floating-point tensor")
        if array.dtype.name == "bfloat16":  # the upper half of a float32; several times faster than a cast
            return np.left_shift(array.view(np.uint16), np.uint32(16), dtype=np.uint32).view(np.float32)
        return array.astype(np.float32, copy=False)

    def read_hlq(self, module: str) -> HlqMatrix:
        """The quantized matrix of a module, its arrays views on the file, its values checked.

        Raises:
            MissingTensorError: the module is not quantized in this folder.
            TensorValueError: a scale or zero is not finite, a row scale is neither positive nor 0 for a row
                of zeros, or a padding bit is set.
        """
        if module not in self.schemes:
            raise MissingTensorError(
                f"{module} in {self.path} is not quantized; read {module}.weight instead"
            )
        in_features = self.linears[module].in_features
        matrix = HlqMatrix(
            planes=self.read(f"{module}.planes"),
            scales=self.read(f"{module}.scales"),
            zeros=self.read(f"{module}.zeros"),
            in_features=in_features,
            group_size=self.schemes[module].group_size,
            row_scales=self.read(f"{module}.row_scales") if self.schemes[module].param_bits == 8 else None,
        )
        for part, values in matrix.arrays.items():
            # 50 times as fast as isfinite
            if values.dtype == np.float16 and (values.view(np.uint16) & 0x7FFF).max() >= 0x7C00:
                raise TensorValueError(
                    f"{module}.{part} in {self.path} holds NaN or infinity; the file is damaged"
                )
        if matrix.row_scales is not None:
            empty = matrix.row_scales == 0
            if np.signbit(matrix.row_scales).any() or matrix.scales[empty].any() or matrix.zeros[empty].any():
                raise TensorValueError(
                    f"{module}.row_scales in {self.path} must be positive, or 0 for a row of zeros; "
                    "the file is damaged"
                )
        used = in_features % 8
        if used and (matrix.planes[..., -1] >> used).any():
            raise TensorValueError(
                f"{module}.planes in {self.path} has padding bits set; the file is damaged"
            )
        return matrix

    def prefetch(self, name: str) -> None:
        """Start reading a tensor's pages from disk, so that they are there when it is read."""
        self._file(name).prefetch(name)

    def release(self, name: str) -> None:
        """Give a tensor's pages back to the system. Views stay valid: touched again, they are read again."""
        self._file(name).release(name)

    def close(self) -> None:
        """Unmap the files. Views that are still alive keep their file mapped."""
        for file in self._files:
            file.close()

    def _file(self, name: str) -> WeightFile:
        try:
            return self._file_of[name]
        except KeyError:
            raise MissingTensorError(f"{self.path} has no tensor {name!r:.200}") from None

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
