"""Large models are worked on a piece of a tensor at a time (benchmarks/quantize_memory.py)."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks/quantize_memory.py"
MEGABYTE = 1 << 20

RUN = """
import sys
from elutq.quantize import quantize

quantize(sys.argv[1], sys.argv[2], bits=2, method="rtn", threads=2)
"""
ROTATE = """
import sys
from elutq.rotation import rotate_model

rotate_model(sys.argv[1], sys.argv[2])
"""


@pytest.fixture
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quantize_memory", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path: Path, benchmark: ModuleType) -> tuple[Path, int]:
    """A folder of more than 300 MB, and the number of its weights."""
    config = {
        **benchmark.LLAMA_2_7B,
        "vocab_size": 1 << 16,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    params = benchmark.write_model(tmp_path / "model", config)
    assert 2 * params > 300 * MEGABYTE
    return tmp_path / "model", params


def test_memory_does_not_grow_with_the_model(
    tmp_path: Path, benchmark: ModuleType, model: tuple[Path, int]
) -> None:
    (source, params), out = model, tmp_path / "out"
    peaks, _ = benchmark.sample_memory([sys.executable, "-c", RUN, str(source), str(out)])
    # Python with NumPy has 30 MB of its own and maps 30 MB of libraries; a piece of 2^24 weights is 32 MB of
    # file pages and up to 10 MB quantized.
    assert peaks["RssAnon"] < 80 * MEGABYTE
    assert peaks["VmRSS"] < 160 * MEGABYTE
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["summary"]["params"] == params


def test_rotation_streams(tmp_path: Path, benchmark: ModuleType, model: tuple[Path, int]) -> None:
    command = [sys.executable, "-c", ROTATE, str(model[0]), str(tmp_path / "out")]
    peaks, _ = benchmark.sample_memory(command)
    # A piece of 2^24 weights: 64 MB in float32, as much again while its range is checked, 32 MB in fp16.
    assert peaks["RssAnon"] < 220 * MEGABYTE
    assert peaks["VmRSS"] < 300 * MEGABYTE
