"""Texts on disk and on the hub, read piece by piece and never held whole.

A text is a row of documents. Text files separate them by a line `<|endoftext|>`; a row of a JSON lines file,
a Parquet file or a data set is a document of its own.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elutq.errors import ElutqError, InvalidArgumentError, MissingDependencyError
from elutq.tokenizer import Tokenizer

SEPARATOR = "<|endoftext|>"

#: A piece of text that continues the one before it, or None between two documents.
Piece = str | None

#: Characters of a data set that are read and kept in memory, from its start. Some have terabytes.
_DATASET_CHARACTERS = 1 << 26

_FILE_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
_DATASET = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[^:]+))?"
    r"(:(?P<config>[^:]*))?(:(?P<split>[^:]*))?(:(?P<column>[^:]*))?"
)


@dataclass(frozen=True)
class Corpus:
    """A text that can be read several times.

    Attributes:
        name: the source, as it was given.
        record: what it was, JSON-ready: a file's name and sha256, or a data set with its revision.
        pieces: begins to read: pieces of text, None between documents.
        characters: characters of all pieces.
    """

    name: str
    record: dict[str, Any]
    pieces: Callable[[], Iterable[Piece]]
    characters: int


@dataclass(frozen=True)
class _Dataset:
    """A column of a data set on the hub; None for a default of the data set."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    column: str = "text"


_KNOWN_DATASETS = {
    "wikitext2": _Dataset("Salesforce/wikitext", config="wikitext-2-raw-v1"),
    "c4": _Dataset("allenai/c4", config="en"),
    "pile": _Dataset("NeelNanda/pile-10k"),
}
#: Data sets whose rows are the paragraphs of one text. Two line breaks join them, as in the literature.
_ROWS_ARE_PARAGRAPHS = {"Salesforce/wikitext"}


def read_corpus(source: str, tokenizer: Tokenizer) -> Corpus:
    """Open a source and read it once from end to end, so that whatever is wrong with it shows now.

    Args:
        source: a file, `wikitext2`, `c4`, `pile`, or `org/name[@revision][:config][:split][:column]`.
        tokenizer: renders conversations in JSON lines.

    Raises:
        InvalidArgumentError: there is no such source, or it does not hold text in the form its name promises.
        MissingDependencyError: Parquet without pyarrow, a data set without datasets.
    """
    if os.path.isdir(source):
        raise InvalidArgumentError(f"{source} is a folder; name the text files in it one by one")
    if os.path.isfile(source):
        return _file_corpus(Path(source), tokenizer)
    if os.path.exists(source):
        raise InvalidArgumentError(f"{source} is not a regular file; write its text to a file first")
    match = _DATASET.fullmatch(source)
    if source in _KNOWN_DATASETS:
        return _dataset_corpus(source, _KNOWN_DATASETS[source])
    if match is None or source.endswith(_FILE_SUFFIXES):
        raise InvalidArgumentError(
            f"there is no file {source!r:.300}; give a text file, self, or a data set: "
            f"{', '.join(_KNOWN_DATASETS)} or org/name[:config][:split][:column]"
        )
    given = {part: text for part, text in match.groupdict().items() if text}
    return _dataset_corpus(source, _Dataset(**given))


def _corpus(name: str, record: dict[str, Any], pieces: Callable[[], Iterable[Piece]]) -> Corpus:
    characters = sum(len(piece) for piece in pieces() if piece is not None)
    if not characters:
        raise InvalidArgumentError(f"{name} holds no text; give a text to calibrate on")
    return Corpus(name, record, pieces, characters)


# ---- files -----------------------------------------------------------------------------------------------


def _file_corpus(path: Path, tokenizer: Tokenizer) -> Corpus:
    with _reading(path), open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    def pieces() -> Iterable[Piece]:
        if path.suffix == ".parquet":
            return _parquet_pieces(path)
        if path.suffix in (".json", ".jsonl"):
            return _json_pieces(path, tokenizer)
        return _text_pieces(path)

    return _corpus(str(path), {"file": path.name, "sha256": sha256}, pieces)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{path} is not UTF-8 text ({error}); convert it") from None


def _lines(path: Path) -> Iterator[str]:
    with _reading(path), open(path, encoding="utf-8-sig") as file:
        for line in file:
            if "\0" in line:
                raise InvalidArgumentError(f"{path} holds zero bytes; it is not a text file")
            yield line.removesuffix("\n")


def _text_pieces(path: Path) -> Iterator[Piece]:
    # A line break ends a line only where another line of the same document follows.
    line_break = ""
    for line in _lines(path):
        if line == SEPARATOR:
            line_break = ""
            yield None
        else:
            yield line_break + line
            line_break = "\n"


def _json_pieces(path: Path, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Documents of `text`. Conversations hold their own start and end tokens: nothing stands between two."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            yield from _json_row(line, tokenizer)
        except (ElutqError, RecursionError, ValueError) as error:
            raise InvalidArgumentError(f"{path}, line {number}: {error}") from None


def _json_row(line: str, tokenizer: Tokenizer) -> Iterator[Piece]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"each line must be one JSON object; {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"each line must be one JSON object, not {type(row).__name__}")
    if "text" not in row and isinstance(messages := row.get("messages"), list):
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("messages must be a list of objects with role and content")
        if not tokenizer.has_chat_template:
            raise ValueError("messages need a chat template, which this model lacks; give rows with text")
        yield _well_formed(tokenizer.apply_chat_template(messages, add_generation_prompt=False))
        return
    if not isinstance(text := row.get("text"), str):
        raise ValueError(f"needs a string `text` or a list `messages`; its keys are {sorted(row)!r:.200}")
    yield _well_formed(text)
    yield None


def _well_formed(text: str) -> str:
    text.encode()  # JSON can write half of a character, which no tokenizer takes
    return text


def _parquet_pieces(path: Path) -> Iterator[Piece]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingDependencyError(
            f"reading {path} needs pyarrow; install it with: pip install 'elutq[calibrate]'"
        ) from None
    try:
        with ParquetFile(path) as file:
            columns = {field.name: field.type for field in file.schema_arrow}
            if columns.get("text") not in (pyarrow.string(), pyarrow.large_string()):
                raise InvalidArgumentError(
                    f"{path} needs a column of strings named text; it has "
                    f"{', '.join(f'{name} ({kind})' for name, kind in columns.items()):.300}"
                )
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if text is not None:
                        yield text
                        yield None
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise InvalidArgumentError(f"{path} is not a readable Parquet file: {str(error).strip()}") from None


# ---- data sets -------------------------------------------------------------------------------------------


def _dataset_corpus(source: str, dataset: _Dataset) -> Corpus:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            f"there is no file {source}, and to load the data set {dataset.name} needs datasets; "
            "install it with: pip install 'elutq[calibrate]'"
        ) from None
    try:
        builder = datasets.load_dataset_builder(dataset.name, dataset.config, revision=dataset.revision)
        rows = builder.as_streaming_dataset(split=dataset.split)
        pieces = list(_row_pieces(rows, dataset))
    except ElutqError:
        raise
    except Exception as error:  # of the hub, of the network, of any file format
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InvalidArgumentError(
            f"there is no file {source}, and the data set {dataset.name} cannot be loaded: {reason[0]:.300}"
        ) from error
    record = {
        "dataset": dataset.name,
        "revision": builder.hash,  # of a data set on the hub, its commit
        "config": builder.config.name,
        "split": dataset.split,
        "column": dataset.column,
    }
    return _corpus(source, record, lambda: pieces)


def _row_pieces(rows: Iterable[dict[str, Any]], dataset: _Dataset) -> Iterator[Piece]:
    left = _DATASET_CHARACTERS
    for row in rows:
        text = row.get(dataset.column)
        if not isinstance(text, str):
            raise InvalidArgumentError(
                f"the data set {dataset.name} has no strings in a column {dataset.column}; its columns are "
                f"{', '.join(row):.300}: name one as org/name:config:split:column"
            )
        if dataset.name in _ROWS_ARE_PARAGRAPHS:
            yield text[:left] + "\n\n"
        else:
            yield text[:left]
            yield None
        left -= len(text)
        if left <= 0:
            return
