"""The reader: every kind of folder it takes, and what it says of those it does not."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elutq import errors
from elutq.checkpoint import Checkpoint, model_parts, side_files

Make = Callable[..., Path]
NAME = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("dtype", "kind"), [("BF16", ml_dtypes.bfloat16), ("F16", np.float16), ("F32", np.float32)]
)
def test_reads_floating_point_tensors(tmp_path: Path, make_folder: Make, dtype: str, kind: Any) -> None:
    with Checkpoint.open(make_folder(tmp_path / "m", dtype=dtype)) as checkpoint:
        info = checkpoint.info(NAME)
        assert (info.dtype, info.shape) == (dtype, (8, 40))
        values = checkpoint.read(NAME)
        assert values.dtype == kind
        np.testing.assert_array_equal(checkpoint.read_float32(NAME), values.astype(np.float32))
        np.testing.assert_array_equal(
            checkpoint.read_float32(NAME, slice(2, 5)), values[2:5].astype(np.float32)
        )
        part = checkpoint.read_float32(NAME, slice(2, 5), slice(1, 4))
        np.testing.assert_array_equal(part, values[2:5, 1:4].astype(np.float32))
        assert checkpoint.read_float32(NAME).dtype == np.float32
        assert checkpoint.scheme is None
        assert checkpoint.schemes == {}


def test_bfloat16_conversion_is_exact_for_every_value(
    tmp_path: Path, make_folder: Make, golden: ModuleType
) -> None:
    folder = make_folder(tmp_path / "m", vocab_size=2048, hidden_size=40)
    tensors = golden.decode((folder / "model.safetensors").read_bytes())
    every = np.resize(np.arange(1 << 16, dtype="<u2"), (2048, 40))
    tensors["model.embed_tokens.weight"] = ("BF16", [2048, 40], every.tobytes())
    (folder / "model.safetensors").write_bytes(golden.encode(tensors))
    with Checkpoint.open(folder) as checkpoint:
        converted = checkpoint.read_float32("model.embed_tokens.weight")
    np.testing.assert_array_equal(converted, every.view(ml_dtypes.bfloat16).astype(np.float32))


def test_views_survive_release_and_close(tmp_path: Path, make_folder: Make) -> None:
    checkpoint = Checkpoint.open(make_folder(tmp_path / "m"))
    view = checkpoint.read(NAME)
    before = view.tobytes()
    assert not view.flags.owndata
    assert not view.flags.writeable
    checkpoint.prefetch(NAME)
    checkpoint.release(NAME)
    checkpoint.close()
    assert view.tobytes() == before


def test_reading_what_is_not_there(tmp_path: Path, make_folder: Make) -> None:
    with Checkpoint.open(make_folder(tmp_path / "m")) as checkpoint:
        with pytest.raises(errors.MissingTensorError, match="nothing"):
            checkpoint.read("nothing")
        with pytest.raises(errors.MissingTensorError, match="not quantized"):
            checkpoint.read_hlq("model.layers.0.self_attn.k_proj")


def test_planes_are_not_floats(golden: ModuleType) -> None:
    with Checkpoint.open(golden.FOLDER) as checkpoint, pytest.raises(errors.TensorDtypeError, match="planes"):
        checkpoint.read_float32("lm_head.planes")


@pytest.mark.parametrize("name", ["absent", "file"])
def test_a_source_is_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.MissingFileError, match=name):
        Checkpoint.open(tmp_path / name)


def test_a_shard_is_a_regular_file(tmp_path: Path, make_folder: Make) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(errors.MissingFileError, match=r"model\.safetensors"):
        Checkpoint.open(folder)


def test_a_tied_head_and_rotary_buffers_are_ignored(
    tmp_path: Path, make_folder: Make, golden: ModuleType
) -> None:
    folder = make_folder(tmp_path / "m", tie_word_embeddings=True)
    tensors = golden.decode((folder / "model.safetensors").read_bytes())
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", [4], bytes(16))
    (folder / "model.safetensors").write_bytes(golden.encode(tensors))
    with Checkpoint.open(folder) as checkpoint:
        assert [part.name for part in model_parts(checkpoint.engine, None)].count("lm_head") == 0


def test_a_tensor_in_two_shards(tmp_path: Path, make_folder: Make, golden: ModuleType) -> None:
    """The index cannot say so, but it can name a shard under two spellings of a hard-linked name."""
    folder = make_folder(tmp_path / "m")
    tensors = golden.decode((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    for shard in ("a.safetensors", "b.safetensors"):
        (folder / shard).write_bytes(golden.encode(tensors))
    index = dict.fromkeys(tensors, "a.safetensors") | {NAME: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(errors.HeaderError, match="beside"):
        Checkpoint.open(folder)


def test_another_models_quantization(tmp_path: Path, make_folder: Make) -> None:
    folder = make_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.UnsupportedVersionError, match="gptq"):
        Checkpoint.open(folder)


def test_side_files_leave_weights_and_code(tmp_path: Path) -> None:
    kept = {"tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt", "LICENSE", "NOTICE.txt"}
    left = {
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "code.py",
        ".x.json",
    }
    for name in kept | left:
        (tmp_path / name).write_text("")
    (tmp_path / "folder.json").mkdir()
    assert {path.name for path in side_files(tmp_path)} == kept


class TestTorchFiles:
    @pytest.fixture
    def state(self, tmp_path: Path, make_folder: Make) -> dict[str, Any]:
        """A model as a state dict; the folder tmp_path / "m" is left without weights."""
        torch = pytest.importorskip("torch")
        with Checkpoint.open(make_folder(tmp_path / "m")) as checkpoint:
            state = {
                name: torch.tensor(checkpoint.read_float32(name)).bfloat16() for name in checkpoint.names()
            }
        (tmp_path / "m/model.safetensors").rename(tmp_path / "original.safetensors")
        return state

    @pytest.fixture
    def original(self, tmp_path: Path, state: Any, golden: ModuleType) -> dict[str, bytes]:
        decoded = golden.decode((tmp_path / "original.safetensors").read_bytes())
        return {name: data for name, (_, _, data) in decoded.items()}

    def values(self, folder: Path) -> dict[str, bytes]:
        with Checkpoint.open(folder) as checkpoint:
            for name in checkpoint.names():
                checkpoint.prefetch(name)
                checkpoint.release(name)
            return {name: checkpoint.read(name).tobytes() for name in checkpoint.names()}

    @pytest.mark.parametrize("zipped", [True, False])
    def test_one_file(self, tmp_path: Path, state: Any, original: Any, zipped: bool) -> None:
        import torch

        torch.save(state, tmp_path / "m/pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert self.values(tmp_path / "m") == original

    def test_shards_and_views_that_are_not_contiguous(
        self, tmp_path: Path, state: Any, original: Any
    ) -> None:
        import torch

        state[NAME] = state[NAME].t().contiguous().t()
        names = sorted(state)
        place = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
        for shard in set(place.values()):
            torch.save({name: state[name] for name in names if place[name] == shard}, tmp_path / "m" / shard)
        (tmp_path / "m/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": place}))
        assert self.values(tmp_path / "m") == original

    def test_other_dtypes_are_an_error(self, tmp_path: Path, state: Any) -> None:
        import torch

        state[NAME] = state[NAME].double()
        torch.save(state, tmp_path / "m/pytorch_model.bin")
        with pytest.raises(errors.TensorDtypeError, match=NAME):
            Checkpoint.open(tmp_path / "m")

    def test_code_is_not_run(self, tmp_path: Path, state: Any) -> None:
        import torch

        class Hostile:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "pwned",))

        torch.save({**state, "x": Hostile()}, tmp_path / "m/pytorch_model.bin")
        with pytest.raises(errors.HeaderError, match="torch cannot read"):
            Checkpoint.open(tmp_path / "m")
        assert not (tmp_path / "pwned").exists()

    @pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: 2}], ids=repr)
    def test_only_state_dicts(self, tmp_path: Path, state: Any, content: Any) -> None:
        import torch

        torch.save(content, tmp_path / "m/pytorch_model.bin")
        with pytest.raises(errors.HeaderError, match="state dict"):
            Checkpoint.open(tmp_path / "m")

    def test_damage_is_one_error(self, tmp_path: Path, state: Any) -> None:
        import torch

        path = tmp_path / "m/pytorch_model.bin"
        torch.save(state, path)
        content = path.read_bytes()
        for size in (0, 1, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            with pytest.raises(errors.HeaderError, match="torch cannot read"):
                Checkpoint.open(tmp_path / "m")

    def test_without_torch(self, tmp_path: Path, make_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = make_folder(tmp_path / "m")
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        original = builtins.__import__

        def no_torch(name: str, *args: Any, **kwargs: Any) -> Any:
            if name == "torch":
                raise ImportError("No module named 'torch'")
            return original(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", no_torch)
        with pytest.raises(errors.MissingDependencyError, match=r"elutq\[quantize\]"):
            Checkpoint.open(folder)


class TestHub:
    def test_ids_are_downloaded(
        self, tmp_path: Path, make_folder: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = make_folder(tmp_path / "m")
        asked = []

        def download(hub_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
            asked.append((hub_id, allow_patterns))
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with Checkpoint.open("org/model") as checkpoint:
            assert checkpoint.path == folder
        assert len(asked) == 1
        assert asked[0][0] == "org/model"
        assert "model*.safetensors" in asked[0][1]
        assert "pytorch_model*.bin" not in asked[0][1]

    def test_torch_files_only_if_there_is_nothing_else(
        self, tmp_path: Path, make_folder: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = make_folder(tmp_path / "m")
        (folder / "model.safetensors").unlink()
        asked = []
        monkeypatch.setattr(
            huggingface_hub,
            "snapshot_download",
            lambda hub_id, allow_patterns, ignore_patterns: asked.extend(allow_patterns) or str(folder),
        )
        with pytest.raises(errors.MissingFileError, match="no weights"):
            Checkpoint.open("org/model")
        assert "pytorch_model*.bin" in asked

    def test_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(errors.MissingFileError, match=r"org/does-not-exist.*hub"):
            Checkpoint.open("org/does-not-exist")

    @pytest.mark.parametrize("name", ["./org/model", "/no/such/folder", "a/b/c", "org/mo del", "", "~x/y"])
    def test_paths_are_no_ids(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub")
        )
        with pytest.raises(errors.ElutqError):
            Checkpoint.open(name)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_folders_read_or_give_one_error(
    tmp_path: Path, golden: ModuleType, data: st.DataObject
) -> None:
    """Cut, flipped, overwritten and spliced files: an error of ours or a readable folder, nothing else."""
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(golden.FOLDER, folder)
    path = folder / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = bytearray(path.read_bytes())
    # Most of the file is data in which any value is legal; the structure is at its front.
    end = (
        min(len(content), 8 + int.from_bytes(content[:8], "little"))
        if path.suffix != ".json"
        else len(content)
    )
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, max(0, end - 1)))
        match data.draw(st.sampled_from(["cut", "flip", "digit", "splice"])):
            case "cut":
                del content[position : position + data.draw(st.integers(1, 64))]
            case "flip" if position < len(content):
                content[position] ^= 1 << data.draw(st.integers(0, 7))
            case "digit" if position < len(content):
                content[position] = data.draw(st.sampled_from(b'0123456789-."[]{},:e'))
            case "splice":
                content[position:position] = data.draw(st.binary(min_size=1, max_size=16))
    path.write_bytes(content)
    try:
        with Checkpoint.open(folder) as checkpoint:
            for module in checkpoint.schemes:
                checkpoint.read_hlq(module)
            for name in checkpoint.names():
                checkpoint.read(name).tobytes()
    except errors.ElutqError:
        pass
