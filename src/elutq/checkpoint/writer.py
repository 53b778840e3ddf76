"""Writing a model folder: everything or nothing, resumable, in little memory."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elutq.checkpoint.folder import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from elutq.checkpoint.safetensors import NUMPY_DTYPES, TensorSpec, encode_header
from elutq.errors import (
    DiskSpaceError,
    MissingTensorError,
    OutputExistsError,
    ResumeMismatchError,
    TensorDtypeError,
    TensorShapeError,
)
from elutq.scheme import QUANT_METHOD

DEFAULT_SHARD_BYTES = 5_000_000_000
"""Largest shard by default, as Hugging Face's `max_shard_size`."""

_JOURNAL = ".elutq-journal"
_SYNC_BYTES = 64 << 20  # written data that a power failure or a kill may cost
_WRITE_BYTES = 1 << 30  # Linux writes at most 2 GiB at once
_SIDE_BYTES = 16 << 20  # room for the files beside the weights


@dataclass(frozen=True)
class _Shard:
    """A planned weight file: its first bytes and the offset of each tensor."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


class CheckpointWriter:
    """Writes the tensors of a folder, in any order, and puts the folder in place when all are there.

    Until then everything lies in `OUT.partial`: shards at their final size, and a journal of finished units
    of work. A unit is what the caller commits at once: some tensors and a record about them. Opened again
    with the same tensors and fingerprint, the writer knows the finished units and goes on. One process at a
    time.

    Attributes:
        out: where the folder will be.
        done: key of each finished unit -> its record.

    Args:
        out: the folder to make.
        tensors: what it will hold, in order; fixes the layout.
        fingerprint: names the source and all settings; partial output with another one is not continued.
        shard_bytes: most tensor bytes in one file; a larger tensor gets a file of its own.
        overwrite: replace `out` if it is a quantized model, and partial output of another run. The old
            folder stays until the new one is complete.

    Raises:
        OutputExistsError: `out` exists and must not be replaced, or another process is writing it.
        ResumeMismatchError: `OUT.partial` is of another source, or made with other settings.
        DiskSpaceError: there is too little room, now or during any later call.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        tensors: Sequence[TensorSpec],
        fingerprint: str,
        *,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        self.out = Path(out).resolve()
        self.done: dict[str, dict[str, Any]] = {}
        self._partial = self.out.with_name(self.out.name + ".partial")
        self._overwrite = overwrite
        self._specs = {tensor.name: tensor for tensor in tensors}
        self._shards = _plan_shards(tensors, shard_bytes)
        self._shard_of = {name: i for i, shard in enumerate(self._shards) for name in shard.offsets}
        self._written: dict[str, int] = {}
        self._pending: list[str] = []
        self._unsynced = 0
        self._files: list[int] = []
        self._journal = -1

        check_replaceable(self.out, overwrite)
        with self._disk_errors():
            self._partial.mkdir(parents=True, exist_ok=True)
            try:
                self._lock_journal()
                self._resume_or_start(_digest(fingerprint, self._shards))
                self._files = [os.open(self._partial / shard.name, os.O_RDWR) for shard in self._shards]
            except BaseException:
                self._close_files()
                raise

    @property
    def file_bytes(self) -> int:
        """Size of all weight files."""
        return sum(shard.nbytes for shard in self._shards)

    def write(self, name: str, array: NDArray[Any], at: int = 0) -> None:
        """Write a piece of a tensor.

        Args:
            name: the tensor.
            array: consecutive elements, of the tensor's dtype and any shape.
            at: index of the first of them in the flattened tensor.

        Raises:
            MissingTensorError: the tensor was not planned.
            TensorDtypeError: `array` has another dtype.
            TensorShapeError: `array` reaches beyond the tensor.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise MissingTensorError(f"{name} was not planned for {self.out}")
        if array.dtype != NUMPY_DTYPES[spec.dtype]:
            raise TensorDtypeError(f"{name} is planned as {spec.dtype}, not {array.dtype}")
        begin = at * array.itemsize
        if at < 0 or begin + array.nbytes > spec.nbytes:
            raise TensorShapeError(
                f"{array.size} elements from {at} on do not fit {name} of {list(spec.shape)}"
            )
        index = self._shard_of[name]
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        position = self._shards[index].offsets[name] + begin
        with self._disk_errors():
            while data:
                count = os.pwrite(self._files[index], data[:_WRITE_BYTES], position)
                data, position = data[count:], position + count
        self._written[name] = self._written.get(name, 0) + array.nbytes
        self._unsynced += array.nbytes

    def holds(self, name: str) -> bool:
        """Whether a tensor is wholly written."""
        return self._written.get(name, 0) == self._specs[name].nbytes

    def read(self, name: str) -> NDArray[Any]:
        """A tensor that is wholly written, a copy.

        Raises:
            MissingTensorError: it is not.
        """
        spec = self._specs.get(name)
        if spec is None or self._written.get(name, 0) != spec.nbytes:
            raise MissingTensorError(f"{name} is not wholly written to {self._partial}")
        index = self._shard_of[name]
        array = np.empty(spec.shape, NUMPY_DTYPES[spec.dtype])
        data = array.reshape(-1).view(np.uint8).data
        position = self._shards[index].offsets[name]
        while data:
            count = os.preadv(self._files[index], [data[:_WRITE_BYTES]], position)
            if count == 0:
                raise MissingTensorError(f"{self._partial / self._shards[index].name} was cut short")
            data, position = data[count:], position + count
        return array

    def commit(self, key: str, names: Iterable[str], record: Mapping[str, Any]) -> None:
        """Declare a unit finished: its tensors are written, and `record` (JSON) is what to remember of it.

        Raises:
            MissingTensorError: one of the tensors is not wholly written.
        """
        names = list(names)
        for name in names:
            if self._written.get(name, 0) != self._specs[name].nbytes:
                raise MissingTensorError(f"{name} is not wholly written to {self._partial}")
        self.done[key] = dict(record)
        self._pending.append(json.dumps({"key": key, "tensors": names, "record": self.done[key]}) + "\n")
        if self._unsynced >= _SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Make the committed units durable: data first, then the journal."""
        if not self._pending:
            return
        with self._disk_errors():
            for file in self._files:
                os.fdatasync(file)
            _write_all(self._journal, "".join(self._pending).encode())
            os.fsync(self._journal)
        self._pending = []
        self._unsynced = 0

    def finish(
        self,
        config: Mapping[str, Any],
        side_files: Iterable[Path] = (),
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Complete the folder and put it in place in one step.

        Args:
            config: content of `config.json`.
            side_files: files to copy beside the weights.
            texts: name -> content of further files; they win over side files of the same name.

        Raises:
            MissingTensorError: a tensor is not wholly written.
        """
        for name, spec in self._specs.items():
            if self._written.get(name, 0) != spec.nbytes:
                raise MissingTensorError(f"{name} is not wholly written to {self._partial}")
        self.sync()
        own = {CONFIG_FILE: _json_text(config), **(texts or {})}
        if len(self._shards) > 1:
            own[INDEX_FILE] = _json_text(self._index())
        with self._disk_errors():
            for path in side_files:
                if path.name not in own:
                    shutil.copyfile(path, self._partial / path.name)
                    _sync_path(self._partial / path.name)
            for name, text in own.items():
                (self._partial / name).write_text(text, encoding="utf-8")
                _sync_path(self._partial / name)
            _sync_path(self._partial)
            self._put_in_place()
        self._close_files()

    def close(self) -> None:
        """Stop writing. What was committed stays in `OUT.partial` for the next run."""
        if self._journal >= 0:
            try:
                self.sync()
            finally:
                self._close_files()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The error that ended the work matters more than one about keeping it.
        with contextlib.suppress(DiskSpaceError, OSError) if error else contextlib.nullcontext():
            self.close()

    def _lock_journal(self) -> None:
        self._journal = os.open(self._partial / _JOURNAL, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputExistsError(f"another process is writing {self._partial}; wait for it") from None

    def _resume_or_start(self, digest: str) -> None:
        lines = _complete_lines(self._journal)
        others = [path for path in self._partial.iterdir() if path.name != _JOURNAL]
        if not lines and others:
            raise OutputExistsError(f"{self._partial} is not partial output of elutq; move it away")
        if lines and lines[0].get("fingerprint") != digest:
            if not self._overwrite:
                raise ResumeMismatchError(
                    f"{self._partial} holds partial output of another source or other settings; "
                    "delete it, or say overwrite"
                )
            lines = []
        if len(lines) > 1:
            self._resume(lines[1:])
        else:
            for path in others:
                path.unlink()
            self._start(digest)

    def _resume(self, lines: Iterable[Mapping[str, Any]]) -> None:
        for shard in self._shards:
            path = self._partial / shard.name
            if not path.is_file() or path.stat().st_size != shard.nbytes:
                raise ResumeMismatchError(f"{path} was changed since it was written; delete {self._partial}")
        for line in lines:
            self.done[line["key"]] = line["record"]
            self._written.update({name: self._specs[name].nbytes for name in line["tensors"]})

    def _start(self, digest: str) -> None:
        os.ftruncate(self._journal, 0)
        os.lseek(self._journal, 0, os.SEEK_SET)
        _write_all(self._journal, (json.dumps({"fingerprint": digest}) + "\n").encode())
        os.fsync(self._journal)
        try:
            self._allocate()
        except BaseException:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise

    def _allocate(self) -> None:
        needed = self.file_bytes + _SIDE_BYTES
        free = shutil.disk_usage(self._partial).free
        if free < needed:
            raise DiskSpaceError(
                f"{self.out} needs {_gigabytes(needed)}, but there are {_gigabytes(free)} left; "
                "free some space or choose another disk"
            )
        for shard in self._shards:
            with open(self._partial / shard.name, "wb", buffering=0) as file:
                os.posix_fallocate(file.fileno(), 0, shard.nbytes)
                _write_all(file.fileno(), shard.header)
                os.fsync(file.fileno())
        _sync_path(self._partial)

    def _index(self) -> dict[str, Any]:
        return {
            "metadata": {"total_size": sum(spec.nbytes for spec in self._specs.values())},
            "weight_map": {name: self._shards[index].name for name, index in sorted(self._shard_of.items())},
        }

    def _put_in_place(self) -> None:
        """OUT.partial becomes OUT. An old OUT is moved aside, and deleted only once the new one stands."""
        check_replaceable(self.out, self._overwrite)
        replaced = self.out.with_name(f".{self.out.name}.replaced")
        if self._overwrite:
            shutil.rmtree(replaced, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.out, replaced)
        os.rename(self._partial, self.out)
        _sync_path(self.out.parent)
        (self.out / _JOURNAL).unlink()
        if self._overwrite:
            shutil.rmtree(replaced, ignore_errors=True)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            kept = f" What is finished is kept in {self._partial}." if self.done else ""
            needed = _gigabytes(self.file_bytes + _SIDE_BYTES)
            raise DiskSpaceError(
                f"the disk is full: {self.out} needs {needed} in all.{kept} "
                "Free some space and run the same command again"
            ) from error

    def _close_files(self) -> None:
        for file in (*self._files, self._journal):
            if file >= 0:
                os.close(file)
        self._files, self._journal = [], -1


def weight_bytes(tensors: Sequence[TensorSpec], shard_bytes: int) -> int:
    """Size of the weight files that a writer with these arguments makes, headers included."""
    return sum(shard.nbytes for shard in _plan_shards(tensors, shard_bytes))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, or replace it, at once: whoever reads it sees the old content or the new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    _sync_path(partial)
    os.rename(partial, path)


def check_replaceable(out: Path, overwrite: bool) -> None:
    """A model may be put where there is nothing, an empty folder, or an HLQ model that is to be overwritten.

    Raises:
        OutputExistsError: there is something else.
    """
    if not out.exists():
        return
    if out.is_dir() and not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputExistsError(f"{out} exists; choose another output folder, or say overwrite")
    try:
        config = json.loads((out / CONFIG_FILE).read_bytes())
        ours = config["quantization_config"]["quant_method"] == QUANT_METHOD
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise OutputExistsError(f"{out} is not a quantized model and will not be overwritten; move it away")


def _plan_shards(tensors: Sequence[TensorSpec], limit: int) -> list[_Shard]:
    """Fill files in order up to `limit` bytes of tensors each, and name them as Hugging Face does."""
    files: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.nbytes
    shards = []
    for number, content in enumerate(files, 1):
        name = WEIGHTS_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header, offsets = encode_header(content)
        shards.append(_Shard(name, header, offsets, len(header) + sum(tensor.nbytes for tensor in content)))
    return shards


def _digest(fingerprint: str, shards: Iterable[_Shard]) -> str:
    digest = hashlib.sha256(fingerprint.encode())
    for shard in shards:
        digest.update(shard.name.encode() + shard.header)
    return digest.hexdigest()


def _complete_lines(journal: int) -> list[dict[str, Any]]:
    """The journal's lines up to the first that a kill cut short, which is cut off."""
    text = os.pread(journal, os.fstat(journal).st_size, 0)
    lines: list[dict[str, Any]] = []
    end = 0
    for line in text.splitlines(keepends=True):
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            lines.pop()
            break
        end += len(line)
    os.ftruncate(journal, end)
    os.lseek(journal, end, os.SEEK_SET)
    return lines


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _sync_path(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _json_text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
