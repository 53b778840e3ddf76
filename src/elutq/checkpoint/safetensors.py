"""safetensors files: strict headers, zero-copy views, and the layout of files to be written.

Follows the specification (https://github.com/huggingface/safetensors, section "Format"): 8 bytes of header
length, a JSON header, then one buffer without holes. Sizes are checked against the file before anything is
mapped, so no file, however malformed, can make a read fail later.
"""

import contextlib
import json
import math
import mmap
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from elutq.errors import HeaderError, MissingFileError, TensorDtypeError, TruncatedFileError

HEADER_LIMIT = 100_000_000
"""Most bytes of a header, as the specification has it."""

_LENGTH_BYTES = 8
_METADATA = "__metadata__"

#: Bytes per element of every dtype that this reader can lay out.
ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}

#: dtypes whose values can be read.
NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        dtype: safetensors name, such as "BF16".
        shape: dimensions, outermost first.
        file: the weight file.
        offset: bytes from the start of the file to the first element; 0 in PyTorch files, which torch reads.
        nbytes: size of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


class WeightFile(Protocol):
    """An open weight file."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors of the file, in file order."""

    def view(self, name: str) -> NDArray[Any]:
        """The tensor without a copy, read-only in spirit."""

    def prefetch(self, name: str) -> None:
        """Start reading the tensor's pages from disk."""

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system; they are read again when touched."""

    def close(self) -> None:
        """Unmap the file as soon as the last view of it is gone."""


class SafetensorsFile:
    """A mapped safetensors file.

    Raises:
        MissingFileError: there is no such file, or it cannot be read.
        TruncatedFileError: the file is shorter than its header says.
        HeaderError: the header breaks the specification.
    """

    def __init__(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise MissingFileError(f"{path} is not a regular file")
                header, data_start = _read_header(file.read, path, status.st_size)
                self.tensors: Mapping[str, TensorInfo] = _parse_header(
                    header, data_start, path, status.st_size
                )
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise MissingFileError(f"cannot read {path}: {error.strerror or error}") from error

    def view(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only array on the map; a copy only if the file leaves it unaligned."""
        info = self.tensors[name]
        dtype = NUMPY_DTYPES.get(info.dtype)
        if dtype is None:
            raise TensorDtypeError(
                f"{name} in {info.file.name} has dtype {info.dtype}; "
                f"only {', '.join(NUMPY_DTYPES)} can be read"
            )
        array = np.frombuffer(self._map, dtype, math.prod(info.shape), info.offset if info.nbytes else 0)
        return (array if array.flags.aligned else array.copy()).reshape(info.shape)

    def prefetch(self, name: str) -> None:
        """Start reading the tensor's pages from disk."""
        self._advise(name, mmap.MADV_WILLNEED)

    def release(self, name: str) -> None:
        """Give the tensor's pages back; views stay valid and read them again when touched."""
        self._advise(name, mmap.MADV_DONTNEED)

    def _advise(self, name: str, advice: int) -> None:
        info = self.tensors[name]
        start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
        if info.nbytes:
            self._map.madvise(advice, start, info.offset + info.nbytes - start)

    def close(self) -> None:
        """Unmap the file, or leave that to the last view of it."""
        with contextlib.suppress(BufferError):  # views are still alive and keep the map with them
            self._map.close()


def _read_header(read: Any, path: Path, file_bytes: int) -> tuple[bytes, int]:
    """The header's bytes, and where the data begins."""
    if file_bytes < _LENGTH_BYTES:
        raise TruncatedFileError(f"{path} has only {file_bytes} bytes; get the file again")
    length = int.from_bytes(read(_LENGTH_BYTES), "little")
    if length > HEADER_LIMIT:
        raise HeaderError(
            f"{path}: header of {length} bytes, limit {HEADER_LIMIT}; this is not a safetensors file"
        )
    if _LENGTH_BYTES + length > file_bytes:
        raise TruncatedFileError(f"{path} ends inside its header of {length} bytes; get the file again")
    header = read(length)
    if len(header) != length:
        raise TruncatedFileError(f"{path} ends inside its header of {length} bytes; get the file again")
    return header, _LENGTH_BYTES + length


def _parse_header(header: bytes, data_start: int, path: Path, file_bytes: int) -> dict[str, TensorInfo]:
    """Header bytes -> tensors in the order of their offsets."""
    if not header.startswith(b"{"):
        raise HeaderError(f"{path}: the header does not begin with '{{'; this is not a safetensors file")
    entries = parse_json_object(header, f"{path}: header", HeaderError)
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"{path}: {_METADATA} must map strings to strings")

    tensors = [(name, _parse_entry(name, entry, data_start, path)) for name, entry in entries.items()]
    tensors.sort(key=lambda item: (item[1].offset, item[1].nbytes))
    end = data_start
    for name, info in tensors:
        if info.offset != end:
            fault = "overlaps the tensor before it" if info.offset < end else "leaves a hole before it"
            raise HeaderError(f"{path}: {name!r:.200} {fault}; the file is damaged")
        end += info.nbytes
    if end > file_bytes:
        raise TruncatedFileError(
            f"{path} has {file_bytes} bytes, its header calls for {end}; get the file again"
        )
    if end < file_bytes:
        raise HeaderError(f"{path} has {file_bytes} bytes, its header calls for {end}; the file is damaged")
    return dict(tensors)


def _parse_entry(name: str, entry: Any, data_start: int, path: Path) -> TensorInfo:
    where = f"{path}: {name!r:.200}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{where} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise HeaderError(f"{where} has unknown dtype {dtype!r:.80}")
    if not _are_sizes(shape) or len(shape) > 32:
        raise HeaderError(f"{where}: shape must be a list of at most 32 integers >= 0")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"{where}: data_offsets must be [begin, end] with 0 <= begin <= end")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if nbytes != offsets[1] - offsets[0]:
        raise HeaderError(
            f"{where}: shape and dtype need {nbytes} bytes, data_offsets give {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def parse_json_object(text: bytes, where: str, error_type: type[Exception]) -> dict[str, Any]:
    """Strict JSON: one object, UTF-8, no duplicate keys at any depth, no NaN.

    Raises:
        error_type: anything else, with `where` in the message.
    """

    def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("duplicate key")
        return result

    def reject_constant(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=reject_duplicates, parse_constant=reject_constant
        )
    except (ValueError, RecursionError) as error:
        raise error_type(f"{where} is not valid JSON ({str(error)[:200]}); get the file again") from None
    if not isinstance(value, dict):
        raise error_type(f"{where} must be a JSON object")
    return value


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def encode_header(tensors: Iterable[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Lay a file out.

    Wide dtypes come first, so that every tensor is aligned to its element.

    Returns:
        The first bytes of the file, a multiple of 8, and the file offset of each tensor.
    """
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    begin = 0
    for tensor in ordered:
        end = begin + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    data_start = _LENGTH_BYTES + len(text)
    offsets = {tensor.name: data_start + header[tensor.name]["data_offsets"][0] for tensor in ordered}
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, offsets
