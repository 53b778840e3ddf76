"""The writer: exact bytes, resumption, and what it refuses to replace."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from elutq import errors
from elutq.checkpoint import Checkpoint, CheckpointWriter, TensorSpec, model_parts

SPECS = [
    TensorSpec("a", "U8", (3, 5)),
    TensorSpec("b", "F32", (7,)),
    TensorSpec("c", "BF16", (2, 3)),
    TensorSpec("d", "F16", (0, 4)),
]
RNG = np.random.default_rng(0)
VALUES: dict[str, np.ndarray[Any, Any]] = {
    "a": RNG.integers(0, 256, (3, 5), np.uint8),
    "b": RNG.normal(size=7).astype(np.float32),
    "c": RNG.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
    "d": np.zeros((0, 4), np.float16),
}


def write(writer: CheckpointWriter, *names: str) -> None:
    for name in names:
        writer.write(name, VALUES[name])
        writer.commit(name, [name], {"of": name})


def whole(out: Path, **options: Any) -> Path:
    with CheckpointWriter(out, SPECS, "f", **options) as writer:
        write(writer, *VALUES)
        writer.finish({"quantization_config": {"quant_method": "hlq"}})
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(folder: Path, golden: ModuleType) -> dict[str, bytes]:
    result: dict[str, bytes] = {}
    for path in folder.glob("*.safetensors"):
        result |= {name: data for name, (_, _, data) in golden.decode(path.read_bytes()).items()}
    return result


EXPECTED = {name: value.tobytes() for name, value in VALUES.items()}


@pytest.mark.parametrize("shard_bytes", [1 << 30, 28, 20, 1])
def test_any_order_and_pieces_give_the_same_bytes(
    tmp_path: Path, golden: ModuleType, shard_bytes: int
) -> None:
    first = whole(tmp_path / "first", shard_bytes=shard_bytes)
    assert decoded(first, golden) == EXPECTED
    with CheckpointWriter(tmp_path / "second", SPECS, "f", shard_bytes=shard_bytes) as writer:
        write(writer, "d", "c")
        for row in (2, 0, 1):
            writer.write("a", VALUES["a"][row], at=5 * row)
        writer.write("b", VALUES["b"][::-1][:3][::-1], at=4)
        writer.write("b", VALUES["b"][:4])
        writer.finish({"quantization_config": {"quant_method": "hlq"}})
    assert files(first) == files(tmp_path / "second")


@pytest.mark.parametrize("version", ["FOLDER", "FOLDER_V2"])
def test_writes_the_golden_file(tmp_path: Path, golden: ModuleType, version: str) -> None:
    """The committed folder, written by other code, byte for byte; and its config from the parsed one."""
    folder = getattr(golden, version)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.scheme is not None
        assert checkpoint.scheme.to_config() == checkpoint.config["quantization_config"]
        found = {name: checkpoint.info(name) for name in sorted(checkpoint.names())}
        specs = [
            spec for part in model_parts(checkpoint.engine, checkpoint.scheme) for spec in part.specs(found)
        ]
        with CheckpointWriter(tmp_path / "out", sorted(specs, key=lambda spec: spec.name), "f") as writer:
            for spec in specs:
                writer.write(spec.name, checkpoint.read(spec.name))
            writer.finish(checkpoint.config)
    assert files(tmp_path / "out") == files(folder)


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    out = whole(tmp_path / "out")
    loaded = dict(safetensors.deserialize((out / "model.safetensors").read_bytes()))
    assert {name: bytes(tensor["data"]) for name, tensor in loaded.items()} == EXPECTED
    assert {name: tensor["dtype"] for name, tensor in loaded.items()} == {s.name: s.dtype for s in SPECS}


def test_tensors_are_aligned(tmp_path: Path, golden: ModuleType) -> None:
    out = whole(tmp_path / "out")
    content = (out / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name, value in VALUES.items():
        assert (start + header[name]["data_offsets"][0]) % value.itemsize == 0


def test_side_files_and_texts(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "README.md"):
        (tmp_path / name).write_text(f"old {name}")
    with CheckpointWriter(tmp_path / "out", SPECS, "f") as writer:
        write(writer, *VALUES)
        sources = [tmp_path / "tokenizer.json", tmp_path / "README.md"]
        writer.finish({"ä": 1}, sources, {"README.md": "new"})
    content = files(tmp_path / "out")
    assert content.keys() == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert content["tokenizer.json"] == b"old tokenizer.json"
    assert content["README.md"] == b"new"
    assert json.loads(content["config.json"]) == {"ä": 1}


def test_resumes_where_it_stopped(tmp_path: Path) -> None:
    reference = files(whole(tmp_path / "reference"))
    out = tmp_path / "out"

    def interrupted() -> None:
        with CheckpointWriter(out, SPECS, "f") as writer:
            write(writer, "a", "c")
            writer.write("b", VALUES["b"][:3])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not out.exists()
    with CheckpointWriter(out, SPECS, "f") as writer:
        assert writer.done == {"a": {"of": "a"}, "c": {"of": "c"}}
        write(writer, "b", "d")
        writer.finish({"quantization_config": {"quant_method": "hlq"}})
    assert files(out) == reference
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_journal_loses_only_its_last_line(tmp_path: Path, cut: int) -> None:
    out = tmp_path / "out"
    with CheckpointWriter(out, SPECS, "f") as writer:
        write(writer, "a", "b")
    journal = tmp_path / "out.partial/.elutq-journal"
    journal.write_bytes(journal.read_bytes()[:-cut])
    with CheckpointWriter(out, SPECS, "f") as writer:
        assert writer.done.keys() == {"a"}
        write(writer, "b")
    with CheckpointWriter(out, SPECS, "f") as writer:
        assert writer.done.keys() == {"a", "b"}


def test_a_journal_cut_in_its_first_line_is_not_trusted(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", SPECS, "f") as writer:
        write(writer, "a")
    (tmp_path / "out.partial/.elutq-journal").write_text('{"finger')
    with pytest.raises(errors.OutputExistsError, match="not partial output"):
        CheckpointWriter(tmp_path / "out", SPECS, "f")


@pytest.mark.parametrize("change", ["fingerprint", "layout", "shards"])
def test_partial_output_of_something_else(tmp_path: Path, change: str) -> None:
    out = tmp_path / "out"
    with CheckpointWriter(out, SPECS, "f") as writer:
        write(writer, "a")
    other: dict[str, Any] = {
        "fingerprint": {"tensors": SPECS, "fingerprint": "g"},
        "layout": {"tensors": SPECS[:3], "fingerprint": "f"},
        "shards": {"tensors": SPECS, "fingerprint": "f", "shard_bytes": 1},
    }[change]
    with pytest.raises(errors.ResumeMismatchError, match=r"out\.partial"):
        CheckpointWriter(out, **other)
    with CheckpointWriter(out, **other, overwrite=True) as writer:
        assert writer.done == {}
    expected = {".elutq-journal", *(shard.name for shard in writer._shards)}
    assert {path.name for path in (tmp_path / "out.partial").iterdir()} == expected


def test_a_partial_shard_that_was_changed(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", SPECS, "f") as writer:
        write(writer, "a")
    os.truncate(tmp_path / "out.partial/model.safetensors", 10)
    with pytest.raises(errors.ResumeMismatchError, match="changed"):
        CheckpointWriter(tmp_path / "out", SPECS, "f")


def test_a_foreign_partial_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(errors.OutputExistsError, match="move it away"):
            CheckpointWriter(tmp_path / "out", SPECS, "f", overwrite=overwrite)
    assert (tmp_path / "out.partial/precious").read_text() == "x"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        CheckpointWriter(tmp_path / "out", SPECS, "f"),
        pytest.raises(errors.OutputExistsError, match="wait"),
    ):
        CheckpointWriter(tmp_path / "out", SPECS, "f")


def test_existing_output(tmp_path: Path) -> None:
    out = whole(tmp_path / "out")
    with pytest.raises(errors.OutputExistsError, match="exists"):
        whole(out)
    (out / "old").write_text("")
    whole(out, overwrite=True)
    assert not (out / "old").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    whole(tmp_path / "out")


@pytest.mark.parametrize(
    "content", [None, "{}", "[]", "x", '{"quantization_config": {"quant_method": "gptq"}}']
)
def test_only_our_models_are_overwritten(tmp_path: Path, content: str | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    if content is not None:
        (out / "config.json").write_text(content)
    with pytest.raises(errors.OutputExistsError, match="move it away"):
        whole(out, overwrite=True)
    assert (out / "precious").exists()


def test_the_old_folder_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = whole(tmp_path / "out")
    before = files(out)
    with CheckpointWriter(out, SPECS, "g", overwrite=True) as writer:
        write(writer, "a")
        assert files(out) == before
    assert files(out) == before


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    whole(tmp_path / "link")
    assert (tmp_path / "real/model.safetensors").exists()


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1_000_000))
    with pytest.raises(errors.DiskSpaceError, match=r"needs 0\.02 GB, but there are 0\.00 GB left"):
        CheckpointWriter(tmp_path / "out", SPECS, "f")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    out = tmp_path / "out"
    real = os.pwrite

    def full(file: int, data: Any, offset: int) -> int:
        raise OSError(code, "full")

    def fill_up() -> None:
        with CheckpointWriter(out, SPECS, "f") as writer:
            write(writer, "a")
            monkeypatch.setattr(os, "pwrite", full)
            write(writer, "b")

    with pytest.raises(errors.DiskSpaceError, match="kept in"):
        fill_up()
    monkeypatch.setattr(os, "pwrite", real)
    with CheckpointWriter(out, SPECS, "f") as writer:
        assert writer.done.keys() == {"a"}
        write(writer, "b", "c", "d")
        writer.finish({})
    assert (out / "config.json").exists()


def test_short_writes_are_continued(
    tmp_path: Path, golden: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:3], offset))
    assert decoded(whole(tmp_path / "out"), golden) == EXPECTED


@pytest.mark.parametrize(
    ("error", "name", "array", "at"),
    [
        (errors.MissingTensorError, "x", VALUES["a"], 0),
        (errors.TensorDtypeError, "a", VALUES["b"], 0),
        (errors.TensorShapeError, "a", VALUES["a"], 1),
        (errors.TensorShapeError, "a", VALUES["a"][0], -1),
    ],
)
def test_pieces_must_fit(tmp_path: Path, error: type[Exception], name: str, array: Any, at: int) -> None:
    with CheckpointWriter(tmp_path / "out", SPECS, "f") as writer, pytest.raises(error):
        writer.write(name, array, at=at)


def test_an_unfinished_tensor_is_not_committed(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", SPECS, "f") as writer:
        writer.write("a", VALUES["a"][:2])
        with pytest.raises(errors.MissingTensorError, match="a is not wholly written"):
            writer.commit("a", ["a"], {})
