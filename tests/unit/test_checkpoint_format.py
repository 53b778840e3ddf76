"""One test, or more, for every numbered rule of docs/format.md."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from elutq import errors
from elutq.checkpoint import Checkpoint, CheckpointWriter, TensorSpec
from elutq.hlq import dequantize

ROOT = Path(__file__).parents[2]
LAYER = "model.layers.0"
Q, O_PROJ, UP, DOWN = (
    f"{LAYER}.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
)


class Folder:
    """A copy of a golden folder, to be damaged."""

    def __init__(self, source: Path, path: Path, golden: ModuleType) -> None:
        self.path = shutil.copytree(source, path)
        self.golden = golden

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    def edit_config(self, edit: Callable[[dict[str, Any]], Any]) -> None:
        config = json.loads((self.path / "config.json").read_text())
        edit(config)
        (self.path / "config.json").write_text(json.dumps(config))

    def edit_scheme(self, edit: Callable[[dict[str, Any]], Any]) -> None:
        self.edit_config(lambda config: edit(config["quantization_config"]))

    def edit_tensors(self, edit: Callable[[dict[str, Any]], Any]) -> None:
        tensors = self.golden.decode(self.weights.read_bytes())
        edit(tensors)
        self.weights.write_bytes(self.golden.encode(tensors))

    def edit_values(self, name: str, index: Any, value: Any) -> None:
        def edit(tensors: dict[str, Any]) -> None:
            dtype, shape, data = tensors[name]
            array = np.frombuffer(data, {"F16": "<f2", "U8": "u1", "I8": "i1"}[dtype]).reshape(shape).copy()
            array[index] = value
            tensors[name] = (dtype, shape, array.tobytes())

        self.edit_tensors(edit)

    def edit_header(self, edit: Callable[[dict[str, Any]], Any]) -> None:
        file = self.weights.read_bytes()
        start = 8 + int.from_bytes(file[:8], "little")
        header = json.loads(file[8:start])
        edit(header)
        self.write_header(json.dumps(header).encode(), file[start:])

    def write_header(self, header: bytes, data: bytes = b"") -> None:
        self.weights.write_bytes(len(header).to_bytes(8, "little") + header + data)

    def shard(self, edit: Callable[[dict[str, Any]], Any] = lambda index: None) -> None:
        """Split the weights over two files, quantized tensors in the second."""
        tensors = self.golden.decode(self.weights.read_bytes())
        self.weights.unlink()
        names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        stored = (".planes", ".scales", ".zeros", ".row_scales")
        place = {name: names[name.endswith(stored)] for name in tensors}
        for shard in names:
            content = {name: tensors[name] for name in tensors if place[name] == shard}
            (self.path / shard).write_bytes(self.golden.encode(content))
        index = {"metadata": {"total_size": 1}, "weight_map": place}
        edit(index)
        (self.path / "model.safetensors.index.json").write_text(json.dumps(index))

    def read_all(self) -> dict[str, np.ndarray[Any, Any]]:
        """Open the folder and read everything in it."""
        with Checkpoint.open(self.path) as checkpoint:
            values = {name: np.array(checkpoint.read(name)) for name in checkpoint.names()}
            for module in checkpoint.schemes:
                values[module] = dequantize(checkpoint.read_hlq(module))
        return values

    def rejects(self, error: type[errors.ElutqError], message: str) -> None:
        with pytest.raises(error, match=message) as caught:
            self.read_all()
        assert type(caught.value) is error


@pytest.fixture
def folder(tmp_path: Path, golden: ModuleType) -> Folder:
    return Folder(golden.FOLDER, tmp_path / "model", golden)


@pytest.fixture
def folder_v2(tmp_path: Path, golden: ModuleType) -> Folder:
    return Folder(golden.FOLDER_V2, tmp_path / "model", golden)


def test_every_rule_has_a_test() -> None:
    stated = set(re.findall(r"\*\*(F\d+)\*\*", (ROOT / "docs/format.md").read_text()))
    tested = set(re.findall(r"def test_(F\d+)_", Path(__file__).read_text(), flags=re.IGNORECASE))
    assert {rule.upper() for rule in tested} == stated


def test_golden_folders_are_what_their_writer_writes(
    tmp_path: Path, golden: ModuleType, monkeypatch: Any
) -> None:
    monkeypatch.setattr(golden, "FOLDER", tmp_path / "hlq-v1")
    monkeypatch.setattr(golden, "FOLDER_V2", tmp_path / "hlq-v2")
    golden.main()
    for version in ("hlq-v1", "hlq-v2"):
        for name in ("config.json", "model.safetensors"):
            committed = ROOT / "tests/golden" / version / name
            assert (tmp_path / version / name).read_bytes() == committed.read_bytes()


@pytest.mark.parametrize(
    "text", [b"[]", b"", b"{", b'{"a": 1, "a": 1}', b'{"a": NaN}', b"\xff{}", b"[" * 100_000], ids=repr
)
def test_f1_config_is_one_json_object(folder: Folder, text: bytes) -> None:
    (folder.path / "config.json").write_bytes(text)
    folder.rejects(errors.ConfigError, "config.json")


def test_f1_config_is_required(folder: Folder) -> None:
    (folder.path / "config.json").unlink()
    folder.rejects(errors.ConfigError, "config.json")


def test_f2_a_single_file_is_preferred(folder: Folder) -> None:
    (folder.path / "model.safetensors.index.json").write_text("not read")
    folder.read_all()


def test_f2_weights_are_required(folder: Folder) -> None:
    folder.weights.unlink()
    folder.rejects(errors.MissingFileError, "no weights")


def test_f3_shards_are_read(folder: Folder) -> None:
    whole = folder.read_all()
    folder.shard()
    sharded = folder.read_all()
    assert whole.keys() == sharded.keys()
    assert all(whole[name].tobytes() == sharded[name].tobytes() for name in whole)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "a\0b", 1, None], ids=repr
)
def test_f3_a_shard_is_a_file_in_the_folder(folder: Folder, shard: Any) -> None:
    folder.shard(lambda index: index["weight_map"].update({f"{Q}.planes": shard}))
    folder.rejects(errors.HeaderError, "not the name of a file")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}], ids=repr)
def test_f3_an_index_maps_tensors(folder: Folder, index: Any) -> None:
    folder.shard()
    (folder.path / "model.safetensors.index.json").write_text(json.dumps(index))
    folder.rejects(errors.HeaderError, "weight_map")


def test_f3_every_shard_exists(folder: Folder) -> None:
    folder.shard()
    (folder.path / "model-00002-of-00002.safetensors").unlink()
    folder.rejects(errors.MissingFileError, "model-00002")


def test_f4_a_shard_holds_what_the_index_says(folder: Folder) -> None:
    folder.shard(lambda index: index["weight_map"].update({f"{Q}.bias": "model-00001-of-00002.safetensors"}))
    folder.rejects(errors.HeaderError, "lacks")


def test_f4_a_shard_holds_nothing_else(folder: Folder) -> None:
    folder.shard(lambda index: index["weight_map"].pop(f"{Q}.planes"))
    folder.rejects(errors.HeaderError, "beside")


SPECS = [TensorSpec(f"t{i}", "U8", (100,)) for i in range(5)]


def test_f5_shards_are_named_as_hugging_face_does(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", SPECS, "f", shard_bytes=250) as writer:
        for spec in SPECS:
            writer.write(spec.name, np.zeros(100, np.uint8))
        writer.finish({})
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 500}
    assert index["weight_map"] == {f"t{i}": f"model-0000{i // 2 + 1}-of-00003.safetensors" for i in range(5)}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {*index["weight_map"].values(), "config.json", "model.safetensors.index.json"}


def test_f6_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with CheckpointWriter(out, SPECS, "f") as writer:
        for spec in SPECS[:-1]:
            writer.write(spec.name, np.zeros(100, np.uint8))
        with pytest.raises(errors.MissingTensorError, match="t4"):
            writer.finish({})
        assert not out.exists()
        writer.write("t4", np.zeros(100, np.uint8))
        writer.finish({})
    assert out.exists()


@pytest.mark.parametrize("length", [100_000_001, 1 << 40, (1 << 64) - 1])
def test_f7_a_header_is_not_too_long(folder: Folder, length: int) -> None:
    folder.weights.write_bytes(length.to_bytes(8, "little") + folder.weights.read_bytes()[8:])
    folder.rejects(errors.HeaderError, "limit")


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_f7_a_header_lies_inside_the_file(folder: Folder, size: int) -> None:
    folder.weights.write_bytes(folder.weights.read_bytes()[:size])
    folder.rejects(errors.TruncatedFileError, "get the file again")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b" {}",
        b"{",
        b"{}x",
        b'{"a": NaN}',
        b'{"\xff": 1}',
        b'{"a": {}}',
        b'{"a": 1}',
        b'{"__metadata__": []}',
        b'{"__metadata__": {"a": 1}}',
        b'{"a":' * 50_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0], "more": 1}}',
        b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "U9", "shape": [0], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": ["U8"], "shape": [0], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "U8", "shape": 0, "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "U8", "shape": [-1, 0], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "U8", "shape": [0.0], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "U8", "shape": [false], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0]}}',
        b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [1, 0]}}',
        b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [-1, -1]}}',
        b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 18446744073709551616]}}',
    ],
    ids=lambda header: repr(header[:60]),
)
def test_f8_a_header_is_well_formed(folder: Folder, header: bytes) -> None:
    folder.write_header(header)
    folder.rejects(errors.HeaderError, "model.safetensors")


@pytest.mark.parametrize("padding", [b" ", b" " * 7])
def test_f8_trailing_spaces_are_allowed(folder: Folder, padding: bytes) -> None:
    file = folder.weights.read_bytes()
    start = 8 + int.from_bytes(file[:8], "little")
    folder.write_header(file[8:start] + padding, file[start:])
    folder.read_all()


def test_f9_offsets_span_the_tensor(folder: Folder) -> None:
    folder.edit_header(lambda header: header[f"{Q}.planes"].update(shape=[3, 40, 4]))
    folder.rejects(errors.HeaderError, "shape and dtype need")


@pytest.mark.parametrize("shape", [[1 << 62, 1 << 62], [1 << 32, 1 << 32], [1] * 1000])
def test_f9_sizes_do_not_overflow(folder: Folder, shape: list[int]) -> None:
    folder.edit_header(lambda header: header[f"{Q}.planes"].update(shape=shape))
    folder.rejects(errors.HeaderError, "shape")


def test_f10_there_are_no_holes(folder: Folder) -> None:
    folder.edit_header(lambda header: header.pop(f"{Q}.planes"))
    folder.rejects(errors.HeaderError, "hole")


def test_f10_there_is_no_overlap(folder: Folder) -> None:
    def overlap(header: dict[str, Any]) -> None:
        begin, end = header[f"{Q}.planes"]["data_offsets"]
        header[f"{Q}.planes"]["data_offsets"] = [begin - 1, end - 1]

    folder.edit_header(overlap)
    folder.rejects(errors.HeaderError, "overlaps")


def test_f10_nothing_follows_the_tensors(folder: Folder) -> None:
    folder.weights.write_bytes(folder.weights.read_bytes() + b"\0")
    folder.rejects(errors.HeaderError, "damaged")


def test_f11_every_truncation_is_found_before_data_is_read(folder: Folder) -> None:
    file = folder.weights.read_bytes()
    for size in [*range(0, len(file), 97), len(file) - 1]:
        folder.weights.write_bytes(file[:size])
        with pytest.raises(errors.TruncatedFileError):
            Checkpoint.open(folder.path)


@pytest.mark.parametrize("shift", [1, 2, 3, 5])
def test_f12_tensors_may_be_unaligned(folder: Folder, shift: int) -> None:
    aligned = folder.read_all()
    file = folder.weights.read_bytes()
    start = 8 + int.from_bytes(file[:8], "little")
    folder.write_header(file[8:start] + b" " * shift, file[start:])
    shifted = folder.read_all()
    assert all(aligned[name].tobytes() == shifted[name].tobytes() for name in aligned)


@pytest.mark.parametrize("method", ["gptq", "HLQ", None, 1])
def test_f13_quant_method_is_hlq(folder: Folder, method: Any) -> None:
    folder.edit_scheme(lambda scheme: scheme.update(quant_method=method))
    folder.rejects(errors.UnsupportedVersionError, "quant_method")


@pytest.mark.parametrize("version", [0, 3, -1])
def test_f14_unknown_versions_are_rejected(folder: Folder, version: int) -> None:
    folder.edit_scheme(lambda scheme: scheme.update(version=version))
    folder.rejects(errors.UnsupportedVersionError, "version")


@pytest.mark.parametrize("version", ["1", 1.0, True, None])
def test_f14_version_is_an_integer(folder: Folder, version: Any) -> None:
    folder.edit_scheme(lambda scheme: scheme.update(version=version))
    folder.rejects(errors.ConfigError, "version")


@pytest.mark.parametrize(
    ("key", "value"),
    [("bits", value) for value in (0, 5, -1, 2.0, "2", True, None, [])]
    + [("group_size", value) for value in (0, 1, 16, 512, -2, 128.0, "128", None, {})],
)
def test_f15_bits_and_group_size_are_in_range(folder: Folder, key: str, value: Any) -> None:
    folder.edit_scheme(lambda scheme: scheme.update({key: value}))
    folder.rejects(errors.ConfigError, key)


@pytest.mark.parametrize(
    "modules",
    [[], "lm_head", {"lm_head": 4}, {"lm_head": {"bits": 4}}, {"lm_head": {"bits": 5, "group_size": 32}}],
)
def test_f16_modules_have_bits_and_group_size(folder: Folder, modules: Any) -> None:
    folder.edit_scheme(lambda scheme: scheme.update(modules=modules))
    folder.rejects(errors.ConfigError, "modules")


def test_f16_the_head_is_quantized_only_if_listed(folder: Folder) -> None:
    folder.edit_scheme(lambda scheme: scheme["modules"].pop("lm_head"))
    folder.rejects(errors.MissingTensorError, r"lm_head\.weight")


@pytest.mark.parametrize("names", ["lm_head", [1], {}])
def test_f17_modules_to_not_convert_is_a_list_of_names(folder: Folder, names: Any) -> None:
    folder.edit_scheme(lambda scheme: scheme.update(modules_to_not_convert=names))
    folder.rejects(errors.ConfigError, "modules_to_not_convert")


def test_f17_no_module_is_both_converted_and_not(folder: Folder) -> None:
    folder.edit_scheme(lambda scheme: scheme.update(modules_to_not_convert=[O_PROJ, UP]))
    folder.rejects(errors.ConfigError, "both")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj", "model.norm", "", f"{UP}.weight"])
def test_f18_names_are_those_of_modules(folder: Folder, name: str) -> None:
    folder.edit_scheme(lambda scheme: scheme["modules_to_not_convert"].append(name))
    folder.rejects(errors.ConfigError, "no linear module")


def test_f19_unknown_keys_are_ignored(folder: Folder) -> None:
    folder.edit_scheme(lambda scheme: scheme.update(desc="any", calibration={"tokens": 1}))
    folder.read_all()


ROUTER = f"{LAYER}.block_sparse_moe.gate"


@pytest.fixture
def mixture(tmp_path: Path, golden: ModuleType) -> Folder:
    """The golden model with a mixture of three experts in place of its MLP."""
    folder = Folder(golden.FOLDER, tmp_path / "mixture", golden)
    folder.edit_config(
        lambda config: config.update(model_type="mixtral", num_local_experts=3, num_experts_per_tok=2)
    )
    folder.edit_scheme(lambda scheme: scheme["modules"].pop(UP))

    def edit(tensors: dict[str, Any]) -> None:
        parts = ("planes", "scales", "zeros")
        gate, _, down = (
            {part: tensors.pop(f"{LAYER}.mlp.{name}_proj.{part}") for part in parts}
            for name in ("gate", "up", "down")
        )
        for expert in range(3):
            for name, stored in (("w1", gate), ("w3", gate), ("w2", down)):
                prefix = f"{LAYER}.block_sparse_moe.experts.{expert}.{name}"
                tensors |= {f"{prefix}.{part}": tensor for part, tensor in stored.items()}
        tensors[f"{ROUTER}.weight"] = ("F16", [3, 40], bytes(240))

    folder.edit_tensors(edit)
    return folder


def test_f30_a_router_is_not_quantized(mixture: Folder) -> None:
    mixture.read_all()
    mixture.edit_scheme(lambda scheme: scheme["modules_to_not_convert"].append(ROUTER))
    mixture.read_all()
    mixture.edit_scheme(lambda scheme: scheme["modules_to_not_convert"].remove(ROUTER))
    mixture.edit_scheme(lambda scheme: scheme["modules"].update({ROUTER: {"bits": 4, "group_size": 32}}))
    mixture.rejects(errors.ConfigError, "router")


@pytest.mark.parametrize("name", [f"{LAYER}.block_sparse_moe.experts.2.w3.scales", f"{ROUTER}.weight"])
def test_f24_no_tensor_of_a_mixture_may_be_missing(mixture: Folder, name: str) -> None:
    mixture.edit_tensors(lambda tensors: tensors.pop(name))
    mixture.rejects(errors.MissingTensorError, re.escape(name))


def test_f25_an_expert_too_many_is_rejected(mixture: Folder) -> None:
    mixture.edit_config(lambda config: config.update(num_local_experts=2))
    mixture.edit_tensors(lambda tensors: tensors.update({f"{ROUTER}.weight": ("F16", [2, 40], bytes(160))}))
    mixture.rejects(errors.UnexpectedTensorError, r"experts\.2")


@pytest.mark.parametrize("part", ["planes", "scales", "zeros"])
def test_f20_shapes_are_exact(folder: Folder, part: str) -> None:
    def reshape(tensors: dict[str, Any]) -> None:
        dtype, shape, data = tensors[f"{UP}.{part}"]
        tensors[f"{UP}.{part}"] = (dtype, [*shape[1:], shape[0]], data)

    folder.edit_tensors(reshape)
    folder.rejects(errors.TensorShapeError, f"{UP}.{part}")


@pytest.mark.parametrize(("part", "dtype"), [("planes", "I8"), ("scales", "BF16"), ("zeros", "I16")])
def test_f20_dtypes_are_exact(folder: Folder, part: str, dtype: str) -> None:
    folder.edit_header(lambda header: header[f"{Q}.{part}"].update(dtype=dtype))
    folder.rejects(errors.TensorDtypeError, f"{Q}.{part}")


@pytest.mark.parametrize("version", ["folder", "folder_v2"])
def test_f21_golden_codes(version: str, request: pytest.FixtureRequest) -> None:
    folder: Folder = request.getfixturevalue(version)
    tensors = folder.read_all()
    for module, (name, rows, columns, bits, _) in enumerate(folder.golden.QUANTIZED):
        planes = tensors[f"{name}.planes"]
        for row in range(rows):
            for column in range(columns):
                code = sum(int(planes[p, row, column // 8] >> column % 8 & 1) << p for p in range(bits))
                assert code == folder.golden.code(module, row, column, bits)


def test_f22_padding_bits_are_zero(folder: Folder) -> None:
    folder.edit_values(f"{DOWN}.planes", (1, 39, 4), 0x10)
    folder.rejects(errors.TensorValueError, "padding bits")


@pytest.mark.parametrize("part", ["scales", "zeros"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_f23_parameters_are_finite(folder: Folder, part: str, value: float) -> None:
    folder.edit_values(f"{UP}.{part}", -1, value)
    folder.rejects(errors.TensorValueError, f"{UP}.{part}")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", f"{O_PROJ}.weight"])
def test_f24_other_tensors_are_required(folder: Folder, name: str) -> None:
    folder.edit_tensors(lambda tensors: tensors.pop(name))
    folder.rejects(errors.MissingTensorError, name)


def test_f24_other_tensors_are_floating_point(folder: Folder) -> None:
    folder.edit_header(lambda header: header["model.norm.weight"].update(dtype="I32"))
    folder.rejects(errors.TensorDtypeError, r"model\.norm\.weight")


def test_f24_other_tensors_keep_their_shape(folder: Folder) -> None:
    folder.edit_header(lambda header: header["model.norm.weight"].update(shape=[1, 40]))
    folder.rejects(errors.TensorShapeError, r"model\.norm\.weight")


@pytest.mark.parametrize("name", [f"{Q}.weight", f"{Q}.bias", "model.layers.1.mlp.up_proj.planes", "x\n"])
def test_f25_there_are_no_other_tensors(folder: Folder, name: str) -> None:
    folder.edit_tensors(lambda tensors: tensors.update({name: ("F16", [1], b"\0\0")}))
    folder.rejects(errors.UnexpectedTensorError, re.escape(name.strip()))


def test_f26_a_tied_head_is_not_stored(folder: Folder) -> None:
    folder.edit_config(lambda config: config.update(tie_word_embeddings=True))
    folder.rejects(errors.ConfigError, "lm_head")
    folder.edit_scheme(lambda scheme: scheme["modules"].pop("lm_head"))
    folder.rejects(errors.UnexpectedTensorError, "lm_head")
    folder.edit_tensors(
        lambda tensors: [tensors.pop(f"lm_head.{part}") for part in ("planes", "scales", "zeros")]
    )
    folder.edit_scheme(lambda scheme: scheme["modules_to_not_convert"].append("lm_head"))
    folder.read_all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", (1 << 20) + 8),
        ("intermediate_size", 1 << 21),
        ("num_hidden_layers", 1025),
        ("vocab_size", 1 << 25),
    ],
)
def test_f27_dimensions_have_limits(folder: Folder, key: str, value: int) -> None:
    folder.edit_config(lambda config: config.update({key: value}))
    folder.rejects(errors.ConfigError, key)


def test_f28_golden_values(folder: Folder) -> None:
    values = folder.read_all()
    for module, (name, rows, columns, _, _) in enumerate(folder.golden.QUANTIZED):
        expected = [[folder.golden.weight(module, row, k) for k in range(columns)] for row in range(rows)]
        np.testing.assert_array_equal(values[name], np.array(expected, np.float32))


def test_f28_sums_are_rounded_to_float32_in_plane_order(folder: Folder) -> None:
    """2^-24 is lost beside 1024, but not beside 0; 1024 - 1024 leaves what came before the sums."""
    for index, value in enumerate([2.0**-24, 1024.0, -1024.0]):
        folder.edit_values(f"{Q}.scales", (0, 0, index), value)
    folder.edit_values(f"{Q}.zeros", (0, 0), 0.0)
    folder.edit_values(f"{Q}.planes", (slice(None), 0, 0), 1)
    assert folder.read_all()[Q][0, 0] == 0.0


@pytest.mark.parametrize("value", [4, 0, -8, 8.0, "8", True, None, [8]])
def test_f31_param_bits_are_16_or_8(folder_v2: Folder, value: Any) -> None:
    folder_v2.edit_scheme(lambda scheme: scheme.update(param_bits=value))
    folder_v2.rejects(errors.ConfigError, "param_bits")
    folder_v2.edit_scheme(lambda scheme: scheme.update(param_bits=8))
    folder_v2.edit_scheme(lambda scheme: scheme["modules"][UP].update(param_bits=value))
    folder_v2.rejects(errors.ConfigError, "param_bits")


def test_f31_param_bits_that_are_not_stated_are_16(folder_v2: Folder) -> None:
    """In a module's own entry, too, whatever the other modules have."""
    folder_v2.edit_scheme(lambda scheme: scheme["modules"][UP].update(param_bits=16))
    with Checkpoint.open(folder_v2.path) as checkpoint:
        found = {module: scheme.param_bits for module, scheme in checkpoint.schemes.items()}
    assert found.pop(UP) == 16
    assert set(found.values()) == {8}
    folder_v2.edit_scheme(lambda scheme: scheme["modules"][Q].pop("param_bits"))
    folder_v2.rejects(errors.UnexpectedTensorError, f"{Q}.row_scales")


def test_f31_version_1_has_no_8_bit_parameters(folder_v2: Folder) -> None:
    folder_v2.edit_scheme(lambda scheme: scheme.update(version=1))
    folder_v2.rejects(errors.ConfigError, "version must be 2")
    folder_v2.edit_scheme(lambda scheme: scheme.pop("param_bits"))  # only a module's own is left
    folder_v2.rejects(errors.ConfigError, "version must be 2")


def test_f31_either_version_may_have_16_bit_parameters(folder: Folder) -> None:
    before = folder.read_all()
    folder.edit_scheme(lambda scheme: scheme.update(param_bits=16))
    folder.read_all()
    folder.edit_scheme(lambda scheme: scheme.update(version=2))
    assert all(before[name].tobytes() == values.tobytes() for name, values in folder.read_all().items())


@pytest.mark.parametrize(
    ("part", "dtype"), [("scales", "I8"), ("zeros", "U8"), ("row_scales", "BF16"), ("row_scales", "I16")]
)
def test_f32_dtypes_are_exact(folder_v2: Folder, part: str, dtype: str) -> None:
    folder_v2.edit_header(lambda header: header[f"{Q}.{part}"].update(dtype=dtype))
    folder_v2.rejects(errors.TensorDtypeError, f"{Q}.{part}")


def test_f32_fp16_and_bytes_are_not_confused(folder_v2: Folder) -> None:
    """The parameters of a module that the config gives the other width."""
    folder_v2.edit_scheme(lambda scheme: scheme["modules"][UP].update(param_bits=8))
    folder_v2.rejects(errors.MissingTensorError, f"{UP}.row_scales")
    content = ("F16", [36], np.ones(36, "<f2").tobytes())
    folder_v2.edit_tensors(lambda tensors: tensors.update({f"{UP}.row_scales": content}))
    folder_v2.rejects(errors.TensorDtypeError, f"{UP}.scales")


@pytest.mark.parametrize("part", ["scales", "zeros", "row_scales"])
def test_f32_shapes_are_exact(folder_v2: Folder, part: str) -> None:
    def reshape(tensors: dict[str, Any]) -> None:
        dtype, shape, data = tensors[f"{DOWN}.{part}"]
        tensors[f"{DOWN}.{part}"] = (dtype, [*shape, 1], data)

    folder_v2.edit_tensors(reshape)
    folder_v2.rejects(errors.TensorShapeError, f"{DOWN}.{part}")


@pytest.mark.parametrize("part", ["scales", "zeros", "row_scales"])
def test_f32_every_tensor_is_required(folder_v2: Folder, part: str) -> None:
    folder_v2.edit_tensors(lambda tensors: tensors.pop(f"{DOWN}.{part}"))
    folder_v2.rejects(errors.MissingTensorError, f"{DOWN}.{part}")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_f33_row_scales_are_finite(folder_v2: Folder, value: float) -> None:
    folder_v2.edit_values(f"{Q}.row_scales", -1, value)
    folder_v2.rejects(errors.TensorValueError, f"{Q}.row_scales")


@pytest.mark.parametrize("value", [-1.0, -(2.0**-24), -0.0])
def test_f33_row_scales_have_no_sign(folder_v2: Folder, value: float) -> None:
    folder_v2.edit_values(f"{Q}.row_scales", 10, value)
    folder_v2.rejects(errors.TensorValueError, f"{Q}.row_scales")


@pytest.mark.parametrize("part", ["scales", "zeros"])
def test_f33_a_row_scale_of_0_is_for_rows_of_zeros(folder_v2: Folder, part: str) -> None:
    """Row 10 of the golden folder is one; a row of zeros with another factor is one, too."""
    folder_v2.edit_values(f"{Q}.row_scales", 10, 1.0)
    assert not folder_v2.read_all()[Q][10].any()
    folder_v2.edit_values(f"{Q}.row_scales", 10, 0.0)
    folder_v2.edit_values(f"{Q}.{part}", (10, 0), 1)
    folder_v2.rejects(errors.TensorValueError, f"{Q}.row_scales")


def test_f34_golden_values(folder_v2: Folder) -> None:
    values = folder_v2.read_all()
    for module, (name, rows, columns, _, _) in enumerate(folder_v2.golden.QUANTIZED):
        expected = [
            [folder_v2.golden.weight(module, row, k, 2) for k in range(columns)] for row in range(rows)
        ]
        np.testing.assert_array_equal(values[name], np.array(expected, np.float32))


def test_f34_the_extremes_are_exact(folder_v2: Folder) -> None:
    """Largest and smallest sums of the most bits, times factors of all their 11 bits."""
    folder_v2.edit_values("lm_head.scales", slice(None), 255)
    for row, zero, factor in ((0, 127, 65504.0), (1, -128, 65504.0), (2, 127, 2047 * 2.0**-24)):
        folder_v2.edit_values("lm_head.zeros", row, zero)
        folder_v2.edit_values("lm_head.row_scales", row, factor)
    folder_v2.edit_values("lm_head.row_scales", 10, 1.0)
    folder_v2.edit_values("lm_head.planes", (slice(None), slice(0, 3), 0), 1)
    values = folder_v2.read_all()["lm_head"].astype(np.float64)
    assert values[0, 0] == 65504.0 * (127 + 4 * 255)
    assert values[1, 1] == 65504.0 * -128
    assert values[2, 0] == 2047 * 2.0**-24 * (127 + 4 * 255)


def test_f29_a_damaged_folder_gives_one_error(folder: Folder) -> None:
    """Any byte of the header flipped: an error of ours, or a folder that still reads."""
    file = folder.weights.read_bytes()
    start = 8 + int.from_bytes(file[:8], "little")
    rng = np.random.default_rng(0)
    rejected = 0
    for position in range(0, start, 5):
        damaged = bytearray(file)
        damaged[position] ^= 1 << int(rng.integers(8))
        folder.weights.write_bytes(damaged)
        try:
            folder.read_all()
        except errors.CheckpointError:
            rejected += 1
    assert rejected > start // 5 * 0.9
