"""The rotation: orthogonal, fast, and a view that says of every tensor what it is."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import elutq.rotation
from elutq import errors, load
from elutq.checkpoint import Checkpoint
from elutq.eval import evaluate
from elutq.models import bundled_model
from elutq.rotation import RotatedCheckpoint, Rotation, rotate_model

Make = Callable[..., Path]
LAYER = "model.layers.0"
BIASES = {"attention_bias": True, "mlp_bias": True}
#: Whole factors, odd ones, and Hadamard matrices of one, two and three passes.
SIZES = [1, 2, 7, 8, 40, 96, 128, 256, 320, 1024, 8 * 81, 12288]


def matrix(size: int, seed: int = 0) -> NDArray[np.float64]:
    return Rotation(size, np.random.default_rng(seed)).apply(np.eye(size))


@contextmanager
def opened(folder: Path, seed: int = 0) -> Iterator[tuple[Checkpoint, RotatedCheckpoint]]:
    with Checkpoint.open(folder) as checkpoint:
        yield checkpoint, RotatedCheckpoint(checkpoint, seed)


class TestRotation:
    @pytest.mark.parametrize("size", [size for size in SIZES if size < 2000])
    def test_is_orthogonal(self, size: int) -> None:
        q = matrix(size)
        np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-13)

    @pytest.mark.parametrize("size", [2, 64, 512, 4096])
    def test_a_power_of_two_is_a_hadamard_matrix_with_signs(self, size: int) -> None:
        column = np.zeros((size, 1))
        column[size // 3] = math.sqrt(size)
        rotation = Rotation(size, np.random.default_rng(0))
        values = rotation.apply(column)[:, 0]
        np.testing.assert_allclose(np.abs(values), 1, rtol=1e-15)
        i, j = np.arange(size), size // 3
        parity = np.array([(k & j).bit_count() % 2 for k in i.tolist()])
        np.testing.assert_allclose(values * values[0], 1 - 2 * parity, rtol=1e-15)

    def test_the_odd_factor_mixes_too(self) -> None:
        """No entry of one column is far larger than the others, as a block-diagonal matrix would have it."""
        for size in (40, 96, 320, 8 * 81):
            assert np.abs(matrix(size)).max(axis=0).max() < 12 * size**-0.5
            assert (np.abs(matrix(size)) > 1e-6).mean() > 0.999

    @pytest.mark.parametrize("size", SIZES)
    def test_single_rows_are_those_of_the_whole(self, size: int) -> None:
        rng = np.random.default_rng(1)
        rotation = Rotation(size, rng)
        values = rng.standard_normal((2, size, 3))
        whole = rotation.apply(values)
        np.testing.assert_allclose(np.linalg.norm(whole, axis=1), np.linalg.norm(values, axis=1), rtol=1e-13)
        for _ in range(5):
            start, stop = sorted(rng.integers(0, size + 1, 2).tolist())
            if start < stop:
                part = rotation.apply(values, slice(start, stop))
                np.testing.assert_allclose(part, whole[:, start:stop], rtol=0, atol=1e-13)

    def test_single_vectors_are_columns(self) -> None:
        for size in (8, 96, 320, 4096):
            rng = np.random.default_rng(2)
            rotation = Rotation(size, rng)
            values = rng.standard_normal((3, size, 1))
            together = rotation.apply(values[..., 0].T)
            np.testing.assert_allclose(rotation.apply(values)[..., 0], together.T, atol=1e-13)

    def test_the_seed_decides(self) -> None:
        assert np.array_equal(matrix(40, 3), matrix(40, 3))
        assert not np.allclose(matrix(40, 3), matrix(40, 4))


@pytest.mark.parametrize(
    "changes",
    [
        {**BIASES, "num_key_value_heads": 5},
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3", "hidden_size": 96, "head_dim": 24, "num_attention_heads": 4},
    ],
    ids=str,
)
def test_every_tensor_is_what_the_formulas_say(
    tmp_path: Path, make_folder: Make, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    folder = make_folder(tmp_path / "m", dtype="F32", **changes)
    monkeypatch.setattr(elutq.rotation, "_TILE", 200)  # several tiles of every kind
    with opened(folder, seed=5) as (before, after):
        engine = before.engine
        q = Rotation(engine.hidden_size, np.random.default_rng((5, 0))).apply(np.eye(engine.hidden_size))
        p = Rotation(engine.head_dim, np.random.default_rng((5, 1))).apply(np.eye(engine.head_dim))
        v_heads = np.kron(np.eye(engine.num_key_value_heads), p)
        o_heads = np.kron(np.eye(engine.num_attention_heads), p)
        w = {name: before.read_float32(name).astype(np.float64) for name in before.names()}
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        expected = {
            **w,
            "model.embed_tokens.weight": w["model.embed_tokens.weight"] @ q.T,
            "lm_head.weight": head * w["model.norm.weight"] @ q.T,
            "model.norm.weight": np.ones(engine.hidden_size),
        }
        gain = {
            "attn": w[f"{LAYER}.input_layernorm.weight"],
            "mlp": w[f"{LAYER}.post_attention_layernorm.weight"],
        }
        for name in ("input_layernorm", "post_attention_layernorm"):
            expected[f"{LAYER}.{name}.weight"] = np.ones(engine.hidden_size)
        for name in ("q_proj", "k_proj", "v_proj"):
            expected[f"{LAYER}.self_attn.{name}.weight"] *= gain["attn"]
            expected[f"{LAYER}.self_attn.{name}.weight"] @= q.T
        for name in ("gate_proj", "up_proj"):
            expected[f"{LAYER}.mlp.{name}.weight"] *= gain["mlp"]
            expected[f"{LAYER}.mlp.{name}.weight"] @= q.T
        for module, turn in (
            ("self_attn.v_proj", v_heads),
            ("self_attn.o_proj", q),
            ("mlp.down_proj", q),
        ):
            for kind in ("weight", "bias"):
                if f"{LAYER}.{module}.{kind}" in w:
                    expected[f"{LAYER}.{module}.{kind}"] = turn @ expected[f"{LAYER}.{module}.{kind}"]
        expected[f"{LAYER}.self_attn.o_proj.weight"] = (
            expected[f"{LAYER}.self_attn.o_proj.weight"] @ o_heads.T
        )
        assert sorted(after.names()) == sorted(expected)
        rng = np.random.default_rng(0)
        for name, values in expected.items():
            found = after.read_float32(name)
            assert (found.dtype, found.shape) == (np.float32, after.info(name).shape)
            np.testing.assert_allclose(found, values, rtol=1e-6, atol=1e-7, err_msg=name)
            for start, stop in (*rng.integers(0, len(found) + 2, (4, 2)).tolist(), (0, 0)):
                np.testing.assert_allclose(
                    after.read_float32(name, slice(start, stop)), found[start:stop], rtol=1e-6, atol=1e-9
                )


def test_the_view_describes_an_untied_model(tmp_path: Path, make_folder: Make) -> None:
    with opened(make_folder(tmp_path / "m", tie_word_embeddings=True)) as (before, after):
        assert before.config["tie_word_embeddings"] is True
        assert after.config == {
            **before.config,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        }
        assert not after.engine.tie_word_embeddings
        assert [*after.linears] == [*before.linears, "lm_head"]
        assert set(after.names()) == {*before.names(), "lm_head.weight"}
        assert (after.path, after.scheme, after.files()) == (before.path, None, before.files())
        for name in after.names():
            after.prefetch(name)
            after.release(name)


@pytest.mark.parametrize(("dtype", "rotated"), [("BF16", "F16"), ("F16", "F16"), ("F32", "F32")])
def test_dtypes(tmp_path: Path, make_folder: Make, dtype: str, rotated: str) -> None:
    folder = make_folder(tmp_path / "m", dtype=dtype, model_type="qwen3", attention_bias=True)
    kept = {f"{LAYER}.self_attn.{name}" for name in ("q_norm.weight", "k_norm.weight", "q_proj.bias")}
    kept.add(f"{LAYER}.self_attn.k_proj.bias")
    with opened(folder) as (before, after):
        for name in after.names():
            info = after.info(name)
            assert info.dtype == (dtype if name in kept else rotated)
            assert info.nbytes == before.info(name).nbytes
            values = after.read(name)
            exact = after.read_float32(name)
            np.testing.assert_allclose(values.astype(np.float32), exact, rtol=2**-11, atol=2**-25)
            assert values.dtype.itemsize * values.size == info.nbytes
            if name in kept:
                assert values.tobytes() == before.read(name).tobytes()


def test_outliers_are_spread(tmp_path: Path, make_folder: Make, golden: ModuleType) -> None:
    """Channels of the stream and of the values 50 times as large as the others."""

    def kurtosis(weight: NDArray[np.float32], axis: int) -> float:
        """Fourth moment over the squared second along an axis, on average: 3 for a normal distribution."""
        squares = np.square(weight.astype(np.float64))
        return float((np.square(squares).mean(axis) / np.square(squares.mean(axis))).mean())

    by_row = ("v_proj", "o_proj", "down_proj")
    folder = make_folder(
        tmp_path / "m",
        dtype="F32",
        hidden_size=192,
        head_dim=32,
        num_attention_heads=6,
        num_key_value_heads=1,
    )
    file = folder / "model.safetensors"
    tensors = golden.decode(file.read_bytes())
    for name, (dtype, shape, data) in tensors.items():
        values = np.frombuffer(data, "<f4").reshape(shape).copy()
        if name.removesuffix(".weight").endswith(by_row):
            values[7] *= 50
        elif not name.endswith("norm.weight"):
            values[..., 7] *= 50
        tensors[name] = (dtype, shape, values.tobytes())
    file.write_bytes(golden.encode(tensors))
    with opened(folder) as (before, after):
        for module in before.linears:
            name, axis = f"{module}.weight", 0 if module.endswith(by_row) else 1
            assert kurtosis(before.read_float32(name), axis) > 20, name
            assert kurtosis(after.read_float32(name), axis) < 5, name


class TestRotateModel:
    def test_writes_what_the_view_shows(self, tmp_path: Path, make_folder: Make) -> None:
        folder = make_folder(tmp_path / "m", tie_word_embeddings=True, **BIASES)
        rotate_model(folder, tmp_path / "out", seed=3, shard_bytes=5000)
        with opened(folder, seed=3) as (_, view), Checkpoint.open(tmp_path / "out") as written:
            assert written.config == view.config
            assert written.linears == view.linears
            assert sorted(written.names()) == sorted(view.names())
            assert len(written.files()) > 2
            for name in view.names():
                assert written.info(name).dtype == view.info(name).dtype
                assert written.read(name).tobytes() == view.read(name).tobytes()
        assert (tmp_path / "out/tokenizer.json").read_text() == "{}"

    def test_pieces_hardly_matter(
        self, tmp_path: Path, make_folder: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = make_folder(tmp_path / "m", dtype="F32")
        rotate_model(folder, tmp_path / "whole")
        monkeypatch.setattr(elutq.rotation, "_PIECE", 130)
        rotate_model(folder, tmp_path / "pieces")
        with Checkpoint.open(tmp_path / "whole") as whole, Checkpoint.open(tmp_path / "pieces") as pieces:
            for name in whole.names():
                np.testing.assert_allclose(whole.read(name), pieces.read(name), rtol=1e-6, atol=1e-9)

    def test_an_interrupted_run_continues(
        self, tmp_path: Path, make_folder: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = make_folder(tmp_path / "m")
        rotate_model(folder, tmp_path / "reference")
        read, calls = RotatedCheckpoint.read, []

        def interrupt(self: RotatedCheckpoint, name: str, rows: slice) -> NDArray[Any]:
            calls.append(name)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return read(self, name, rows)

        monkeypatch.setattr(RotatedCheckpoint, "read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            rotate_model(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        with pytest.raises(errors.ResumeMismatchError):
            rotate_model(folder, tmp_path / "out", seed=1)
        rotate_model(folder, tmp_path / "out")
        assert calls.count(calls[0]) == 1
        for path in (tmp_path / "reference").iterdir():
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()

    def test_the_bundled_model_keeps_its_perplexity(self, tmp_path: Path) -> None:
        rotate_model(bundled_model(), tmp_path / "out")
        text = "Once upon a time there was a little girl who lived in a house by the sea. " * 4
        with load(bundled_model()) as before, load(tmp_path / "out") as after:
            score = evaluate(after, before.tokenizer.encode(text), 64, reference=before)
            base = evaluate(before, before.tokenizer.encode(text), 64)
            assert score.perplexity == pytest.approx(base.perplexity, rel=1e-3)
            assert 0 <= (score.kl or 0.0) < 1e-5
            assert score.top1_agreement == 1.0

    def test_a_rotated_model_may_be_rotated_again(self, tmp_path: Path, make_folder: Make) -> None:
        rotate_model(make_folder(tmp_path / "m", dtype="F32"), tmp_path / "once")
        rotate_model(tmp_path / "once", tmp_path / "twice", seed=1)
        with load(tmp_path / "m") as before, load(tmp_path / "twice") as after:
            ids = [1, 5, 2, 10, 0, 3]
            np.testing.assert_allclose(after.logits(ids), before.logits(ids), atol=1e-5)

    def test_quantized_models_are_refused(self, tmp_path: Path, golden: ModuleType) -> None:
        with pytest.raises(errors.InvalidArgumentError, match="quantized already"):
            rotate_model(golden.FOLDER, tmp_path / "out")

    def test_the_seed_is_checked(self, tmp_path: Path, make_folder: Make) -> None:
        with pytest.raises(errors.InvalidArgumentError, match="0 or more"):
            rotate_model(make_folder(tmp_path / "m"), tmp_path / "out", seed=-1)
        assert not (tmp_path / "out.partial").exists()

    def test_nothing_is_replaced(self, tmp_path: Path, make_folder: Make) -> None:
        source = make_folder(tmp_path / "m")
        with pytest.raises(errors.OutputExistsError):
            rotate_model(source, source)


def put(folder: Path, golden: ModuleType, name: str, value: float) -> None:
    """Make a value the last one of a BF16 tensor."""
    file = folder / "model.safetensors"
    tensors = golden.decode(file.read_bytes())
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, data[:-2] + np.array(value, ml_dtypes.bfloat16).tobytes())
    file.write_bytes(golden.encode(tensors))


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", f"{LAYER}.mlp.down_proj.weight"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_are_named(
    tmp_path: Path, make_folder: Make, golden: ModuleType, name: str, value: float
) -> None:
    folder = make_folder(tmp_path / "m")
    put(folder, golden, name, value)
    with pytest.raises(errors.TensorValueError, match=name.replace(".", r"\.")):
        rotate_model(folder, tmp_path / "out")


def test_values_beyond_fp16_are_an_error(tmp_path: Path, make_folder: Make, golden: ModuleType) -> None:
    folder = make_folder(tmp_path / "m")
    put(folder, golden, "lm_head.weight", 1e30)
    with pytest.raises(errors.TensorValueError, match=r"lm_head\.weight.*float16"):
        rotate_model(folder, tmp_path / "out")


def test_unknown_tensors(tmp_path: Path, make_folder: Make) -> None:
    with opened(make_folder(tmp_path / "m")) as (_, after):
        for read in (after.read, after.read_float32, after.info, after.prefetch, after.release):
            with pytest.raises(errors.MissingTensorError, match="nothing"):
                read("nothing")
