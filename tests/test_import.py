import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import edge_ser

PACKAGE = Path(edge_ser.__file__).parent
HEAVY = {"torch", "onnxruntime", "onnx", "pyaudio", "soundfile", "soxr", "scipy"}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("edge_ser", HEAVY),
        ("edge_ser.cli", HEAVY),
        ("edge_ser.engines", HEAVY),
        ("export.run", {"transformers"}),
    ],
)
def test_importing_loads_no_heavy_package(module, heavy):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert heavy & set(done.stdout.split()) == set()


def test_public_names_are_there():
    assert all(hasattr(edge_ser, name) for name in edge_ser.__all__)


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


def test_the_runtime_imports_neither_export_nor_benchmarks():
    imported = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    assert "numpy" in imported
    assert not imported & {"export", "benchmarks", "torch", "transformers", "pickle"}
