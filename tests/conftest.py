"""Fixtures shared by the tests."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
CHAT_TEMPLATE = """\
{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if tools %}tools: {{ tools | tojson }}
{% endif %}{% if add_generation_prompt %}assistant: {% endif %}"""


@pytest.fixture(scope="session")
def golden() -> ModuleType:
    """The independent writer of the golden HLQ folder: FOLDER, CONFIG, encode, decode, ..."""
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_folder(golden: ModuleType) -> Callable[..., Path]:
    """`make_folder(path, dtype="BF16", seed=0, **config)` writes a small random model, not quantized."""

    def make(path: Path, *, dtype: str = "BF16", seed: int = 0, **changes: Any) -> Path:
        from elutq.architectures import engine_config
        from elutq.checkpoint import model_parts

        config = {**golden.CONFIG, **changes}
        config.pop("quantization_config")
        kind = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[dtype]
        rng = np.random.default_rng(seed)
        tensors = {
            part.source: (dtype, list(part.shape), rng.normal(0, 0.1, part.shape).astype(kind).tobytes())
            for part in model_parts(engine_config(config), None)
        }
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
        (path / "tokenizer.json").write_text("{}")
        (path / "model.safetensors").write_bytes(golden.encode(tensors))
        return path

    return make


@pytest.fixture
def passed_in_interpreter() -> Callable[[str], int]:
    """`passed_in_interpreter(file)`: tests of a file that pass in Triton's interpreter. None may fail."""

    def run(file: str) -> int:
        # Triton looks at the variable when it is imported, which transformers may have done in this process.
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file]
        done = subprocess.run(
            command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
        passed = re.search(r"\b(\d+) passed", done.stdout)
        assert passed is not None, done.stdout
        return int(passed[1])

    return run


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a chat template: it tells stories in answer to anything."""
    from elutq.models import bundled_model

    folder = tmp_path_factory.mktemp("models") / "chat"
    shutil.copytree(bundled_model(), folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder
