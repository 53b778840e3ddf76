"""Finding a model's files: local folders, Hugging Face hub ids, shard indexes."""

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from elutq.checkpoint.safetensors import SafetensorsFile, WeightFile, parse_json_object
from elutq.checkpoint.torch_file import TorchFile
from elutq.errors import ConfigError, HeaderError, MissingFileError

CONFIG_FILE = "config.json"
_GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_CARD_FILE = "README.md"
_TORCH_FILE = "pytorch_model.bin"
_TORCH_INDEX_FILE = "pytorch_model.bin.index.json"

#: Files beside the weights that make up a model: tokenizer, generation settings, licence.
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*")

#: `org/model`, or a bare `model`.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_JSON_LIMIT = 100_000_000


def resolve(source: str | os.PathLike[str]) -> Path:
    """A local folder as it is; a hub id, such as `org/model`, as the folder its files were downloaded to.

    Raises:
        MissingFileError: there is no such folder, and the hub has no such model or cannot be reached.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise MissingFileError(f"{path} is a file; give the model's folder")
    name = os.fspath(source)
    if not HUB_ID.fullmatch(name):
        raise MissingFileError(f"there is no folder {name}")
    return _download(name)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(*weights: str) -> Path:
        return Path(
            snapshot_download(
                hub_id, allow_patterns=[*SIDE_FILES, _CARD_FILE, *weights], ignore_patterns=["*/*"]
            )
        )

    try:
        folder = fetch("model*.safetensors")
        if not any(folder.glob("model*.safetensors")):
            folder = fetch("pytorch_model*.bin")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingFileError(
            f"there is no folder {hub_id}, "
            f"and it cannot be downloaded from the Hugging Face hub: {reason[:300]}"
        ) from error
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json`.

    Raises:
        ConfigError: it is missing or malformed.
    """
    try:
        text = _read_json_file(folder / CONFIG_FILE)
    except MissingFileError as error:
        raise ConfigError(f"{error}; is {folder} a Hugging Face model folder?") from error
    return parse_json_object(text, str(folder / CONFIG_FILE), ConfigError)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The parsed `generation_config.json`, empty if there is none.

    Raises:
        ConfigError: it is malformed.
    """
    path = folder / _GENERATION_CONFIG_FILE
    return parse_json_object(_read_json_file(path), str(path), ConfigError) if path.exists() else {}


def open_weights(folder: Path) -> list[WeightFile]:
    """Open the weight files of a folder: safetensors before PyTorch, one file before shards.

    Raises:
        MissingFileError: there are no weights, or a shard is missing.
        HeaderError: a file or the index is malformed, or they contradict each other.
        TruncatedFileError: a file is shorter than its header says.
        MissingDependencyError: PyTorch files without torch.
    """
    if (folder / WEIGHTS_FILE).exists():
        return [SafetensorsFile(folder / WEIGHTS_FILE)]
    if (folder / INDEX_FILE).exists():
        return _open_shards(folder, INDEX_FILE, SafetensorsFile)
    if (folder / _TORCH_FILE).exists():
        return [TorchFile(folder / _TORCH_FILE)]
    if (folder / _TORCH_INDEX_FILE).exists():
        return _open_shards(folder, _TORCH_INDEX_FILE, TorchFile)
    raise MissingFileError(
        f"{folder} has no weights: "
        f"none of {WEIGHTS_FILE}, {INDEX_FILE}, {_TORCH_FILE} and {_TORCH_INDEX_FILE}"
    )


def _open_shards(
    folder: Path, index_name: str, kind: type[SafetensorsFile] | type[TorchFile]
) -> list[WeightFile]:
    index_path = folder / index_name
    index = parse_json_object(_read_json_file(index_path), str(index_path), HeaderError)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(f"{index_path} must have a weight_map of tensor names to shard names")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise HeaderError(f"{index_path}: {shard!r:.200} is not the name of a file in the same folder")
        shards.setdefault(shard, set()).add(tensor)
    files: list[WeightFile] = []
    try:
        for shard, tensors in sorted(shards.items()):
            files.append(kind(folder / shard))
            _check_shard(index_path, shard, tensors, files[-1].tensors)
    except BaseException:
        for file in files:
            file.close()
        raise
    return files


def _check_shard(index_path: Path, shard: str, indexed: set[str], held: Iterable[str]) -> None:
    held = set(held)
    for name in sorted(indexed ^ held):
        fault = "lacks" if name in indexed else "holds, beside what the index lists,"
        raise HeaderError(
            f"{index_path.parent / shard} {fault} {name!r:.200}: {index_path.name} is of another model"
        )


def _is_plain_name(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not set(name) & {"/", "\\", "\0"}


def _read_json_file(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            text = file.read(_JSON_LIMIT + 1)
    except OSError as error:
        raise MissingFileError(f"cannot read {path}: {error.strerror or error}") from error
    if len(text) > _JSON_LIMIT:
        raise HeaderError(f"{path} is larger than {_JSON_LIMIT} bytes; it cannot be a model's {path.name}")
    return text


def side_files(folder: Path) -> list[Path]:
    """The files that go along when a model is copied: all but weights, index, config, code, hidden files."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and any(fnmatchcase(path.name, pattern) for pattern in SIDE_FILES)
        and path.name != CONFIG_FILE
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
    ]
