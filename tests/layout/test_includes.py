"""Import rules no off-the-shelf linter knows: rooms of the C++ core, and users of the compiled module."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: room -> rooms whose headers it may include, besides its own.
ALLOWED = {
    "base": set(),
    "kernels": {"base"},
    "solver": {"base"},
    "ops": {"base", "kernels"},
    "model": {"base", "kernels", "ops"},
    "engine": {"base", "kernels", "ops", "model"},
    "bindings": {"base", "kernels", "solver", "ops", "model", "engine"},
}
#: The only Python modules that may import the compiled core.
CORE_IMPORTERS = {"group_problem.py", "hf.py", "hlq.py", "runtime.py", "sampling.py", "soft_weights.py"}

SOURCES = sorted(p for p in (ROOT / "cpp").rglob("*") if p.suffix in {".h", ".cpp"})


def test_every_room_is_known():
    assert {p.relative_to(ROOT / "cpp").parts[0] for p in SOURCES} == set(ALLOWED)


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_includes_follow_the_rule(source):
    room = source.relative_to(ROOT / "cpp").parts[0]
    for header in re.findall(r'^\s*#\s*include\s+"([^"]+)"', source.read_text(), re.MULTILINE):
        target = header.split("/")[0]
        assert target in ALLOWED[room] | {room}, f"{room} may not include {header}"
        assert (ROOT / "cpp" / header).is_file(), f"{header}: include paths start at cpp/"


def test_few_modules_import_the_compiled_core():
    importers = set()
    for source in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            if any(name.startswith("elutq._core") for name in names):
                importers.add(source.name)
    assert importers <= CORE_IMPORTERS
