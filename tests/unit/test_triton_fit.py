"""The data-free solver in Triton against its reference: on a GPU if there is one, else interpreted."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs pip install '.[quantize]'")

import torch

pytest.importorskip("triton", reason="needs pip install '.[dev]'")

import triton

from elutq import gptq, hlq, triton_fit
from elutq.errors import TensorValueError
from elutq.scheme import QuantScheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiled_or_interpreted = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="runs in a process of its own"
)
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="these tests run as they are")
def test_tritons_interpreter_agrees(passed_in_interpreter: Callable[[str], int]) -> None:
    assert passed_in_interpreter(__file__) == 12


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def less_to_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer kicks, and tiles that take the interpreter about as long as small ones do."""
    if INTERPRETED:
        monkeypatch.setattr(hlq, "KICKS", (3, 3, 3, 3))
        monkeypatch.setattr(triton_fit, "_COLUMNS", 64)
        monkeypatch.setattr(triton_fit, "_FEWEST_ROWS", 32)


def groups(random: np.random.Generator, columns: int) -> np.ndarray:
    """Groups of all sorts, float32 [columns, 32]."""
    x = random.normal(size=(columns, 32))
    x[5, 6:9] *= 30  # an outlier
    x[:, 9] = 0.0
    x[:, 10] = 0.3
    x[:, 11:13] = np.abs(x[:, 11:13])
    x[:, 13] = np.sign(x[:, 13])
    x[:, 14:16] += 50
    x[:, 16] *= 1e-4
    x[:, 17] = 65504 * np.tanh(4 * x[:, 17])  # wants a scale beyond fp16
    return x.astype(np.float32)


def fit(x: np.ndarray, importance: np.ndarray, bits: int, method: str) -> np.ndarray:
    """By the kernel, [bits + 1, rows]."""
    arrays = (torch.from_numpy(array).to(DEVICE) for array in (x, importance))
    return triton_fit.fit_groups(*arrays, bits, method).cpu().numpy()


def fit_by_reference(x: np.ndarray, importance: np.ndarray, bits: int, method: str) -> np.ndarray:
    matrix = hlq.fit(np.ascontiguousarray(x.T), bits, -1, weights=importance, method=method, backend="numpy")
    return np.concatenate([matrix.scales[:, 0].T, matrix.zeros.T]).astype(np.float32)


def error(x: np.ndarray, importance: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """E of each group with the nearest level for each weight."""
    bits, rows = len(parameters) - 1, parameters.shape[1]
    codes = np.arange(2**bits)[:, None] >> np.arange(bits) & 1
    levels = codes @ parameters[:-1].astype(np.float64) + parameters[-1]
    distance = np.abs(x.astype(np.float64)[:, None] - levels).min(1)
    assert distance.shape == (len(x), rows)
    return importance.astype(np.float64) @ distance**2


@compiled_or_interpreted
@pytest.mark.parametrize(("bits", "columns"), [(1, 128), (2, 100), (3, 12), (4, 40)])
@pytest.mark.parametrize("method", ["hlq", "ao"])
def test_groups_are_fitted_as_by_the_reference(
    bits: int, columns: int, method: str, random: np.random.Generator
) -> None:
    x = groups(random, columns)
    importance = np.exp(2 * random.normal(size=columns)).astype(np.float32)
    found, expected = fit(x, importance, bits, method), fit_by_reference(x, importance, bits, method)
    assert np.array_equal(found, found.astype(np.float16))
    assert (np.diff(found[:-1], axis=0, prepend=0) >= 0).all()
    errors, wanted = error(x, importance, found), error(x, importance, expected)
    negligible = 1e-6 * (importance @ x.astype(np.float64) ** 2) + 1e-30
    assert (errors <= 1.03 * wanted + negligible).all()
    assert ((errors + negligible) / (wanted + negligible)).mean() <= 1.001
    # Rounding of sums leads a search elsewhere now and then, if two candidates are nearly as good.
    same = (found == expected).all(0)
    assert same.mean() >= 0.95


@compiled_or_interpreted
def test_of_two_equally_near_levels_the_lower_one_counts(random: np.random.Generator) -> None:
    # The first levels are 0, 2, 4, 6, every odd number lies between two of them, and all sums are exact.
    x = random.integers(0, 7, (32, 16)).astype(np.float32)
    x[0], x[1] = 0, 6
    ones = np.ones(32, np.float32)
    assert np.array_equal(fit(x, ones, 2, "ao"), fit_by_reference(x, ones, 2, "ao"))


@compiled_or_interpreted
def test_importances_of_zero_and_of_no_size_are_equal(random: np.random.Generator) -> None:
    x = random.normal(size=(70, 3)).astype(np.float32)
    nothing, everything = np.zeros(70, np.float32), np.full(70, 1e38, np.float32)
    expected = fit_by_reference(x, nothing, 2, "ao")
    assert np.array_equal(fit(x, nothing, 2, "ao"), expected)
    assert np.array_equal(fit(x, everything, 2, "ao"), expected)


@compiled_or_interpreted
def test_a_long_row_is_one_group(random: np.random.Generator) -> None:
    x = random.normal(size=(1100, 2)).astype(np.float32)
    ones = np.ones(1100, np.float32)
    found, expected = fit(x, ones, 2, "ao"), fit_by_reference(x, ones, 2, "ao")
    assert (error(x, ones, found) <= 1.001 * error(x, ones, expected)).all()


@compiled_or_interpreted
def test_what_is_no_number_is_refused() -> None:
    x = np.full((8, 2), np.nan, np.float32)
    with pytest.raises(TensorValueError, match="NaN"):
        fit(x, np.ones(8, np.float32), 2, "hlq")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("bits", [2, 4])
def test_it_compiles_for_a_gpu_and_its_registers_suffice(bits: int, tmp_path: Path) -> None:
    kernel = triton_fit._fit
    types = {"kicks": "*fp64", "starts": "*fp64", "paces": "*fp64", "rounds": "*i32"}
    types |= dict.fromkeys(("target", "importance", "found"), "*fp32")
    types |= dict.fromkeys(("columns", "rows", "start_count", "stages"), "i32")
    constants = triton_fit.sizes(bits)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 1, "enable_fp_fusion": True})
    (tmp_path / "cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", tmp_path / "cubin"], capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    assert registers < 200
    assert stack <= 16


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("param_bits", [8, 16])
def test_a_matrix_on_a_gpu_starts_like_one_on_a_cpu(param_bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((300, 256), generator=generator)
    inputs = torch.randn((512, 256), generator=generator) * torch.randn(256, generator=generator).exp()
    solvers = []
    for device in ("cpu", "cuda"):
        metric = gptq.Metric((inputs.T @ inputs).to(device), None, gptq.SolverOptions())
        scheme = QuantScheme(2, 128, param_bits)
        solvers.append(gptq._Solver(weight.T.contiguous().to(device), metric, scheme, None))
    importance = solvers[0].metric.factor.diagonal()[:128].square()
    parameters = [s._data_free(s.target[:128], importance.to(s.target.device)).cpu().numpy() for s in solvers]
    x, a = weight.T[:128].numpy(), importance.numpy()
    on_cpu, on_gpu = (error(x, a, each) for each in parameters)
    assert on_gpu.mean() <= 1.002 * on_cpu.mean()
    if param_bits == 8:
        torch.testing.assert_close(solvers[1].row_scales.cpu(), solvers[0].row_scales, rtol=0.02, atol=0)
