"""A room imports only from lower layers, and only its keeper imports an optional library."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS = {  # path prefix -> layer; the longest prefix that matches counts
    "train.py": 5,
    "benchmarks/": 5,
    "examples/": 5,
    "anchor_context/plug.py": 5,
    # Commands stand at the top: they put rooms together.
    "anchor_context/demo.py": 5,
    "anchor_context/evaluate.py": 5,
    "anchor_context/data/__main__.py": 5,
    "anchor_context/rope/__main__.py": 5,
    "anchor_context/evaluation/": 4,
    "anchor_context/models.py": 4,
    "anchor_context/engine.py": 4,
    "anchor_context/parallel/": 3,
    "anchor_context/attention/reference.py": 2,
    "anchor_context/attention/flash.py": 2,
    "anchor_context/attention/flex.py": 2,
    "anchor_context/packed.py": 2,
    "anchor_context/summary.py": 2,
    "anchor_context/attention/patterns.py": 1,
    "anchor_context/attention/calls.py": 1,
    "anchor_context/data/": 1,
    "anchor_context/loss.py": 1,
    "anchor_context/memory.py": 1,
    "anchor_context/checkpoint.py": 1,
    "anchor_context/metrics.py": 1,
    "anchor_context/layout.py": 0,
    "anchor_context/attention/kernels.py": 0,
    "anchor_context/parallel/groups.py": 0,
    "anchor_context/rope/": 0,
    "anchor_context/agreement.py": 0,
    "anchor_context/command_line.py": 0,
    "anchor_context/util.py": 0,
}
SAME_LAYER = {  # the exceptions: importer -> the rooms of its own layer that it may use
    "anchor_context/data/": ("anchor_context/data/", "anchor_context/attention/patterns.py"),
    "anchor_context/parallel/": ("anchor_context/parallel/",),
    "anchor_context/rope/": ("anchor_context/rope/",),
    "anchor_context/memory.py": ("anchor_context/loss.py",),
    "anchor_context/util.py": ("anchor_context/agreement.py",),
    "examples/": ("anchor_context/plug.py",),
    "benchmarks/": ("train.py", "anchor_context/demo.py", "anchor_context/plug.py"),
    "anchor_context/metrics.py": ("anchor_context/attention/patterns.py",),
}


def sources() -> list[Path]:
    """Every Python file that stands in a layer."""
    folders = ("anchor_context", "benchmarks", "examples")
    files = [ROOT / "train.py", *(f for name in folders for f in (ROOT / name).rglob("*.py"))]
    return [f for f in files if f.exists() and layer_key(f) is not None]


def layer_key(path: Path) -> str | None:
    name = path.relative_to(ROOT).as_posix()
    matches = [key for key in LAYERS if name.startswith(key)]
    return max(matches, key=len) if matches else None


def imported_files(path: Path) -> set[Path]:
    """The project's files that `path` imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    found = set()
    for name in names:
        if name.split(".")[0] == "anchor_context":
            file = ROOT / (name.replace(".", "/") + ".py")
            found |= {file} if file.exists() else set()
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_downwards(path):
    key = layer_key(path)
    for imported in imported_files(path):
        target = layer_key(imported)
        if target is None or target == key:
            continue
        allowed = LAYERS[target] < LAYERS[key] or target in SAME_LAYER.get(key, ())
        assert allowed, f"{key} (layer {LAYERS[key]}) imports {target} (layer {LAYERS[target]})"


def test_the_engines_never_import_each_other():
    engines = {ROOT / f"anchor_context/attention/{n}.py" for n in ("reference", "flash", "flex")}
    for engine in engines:
        assert not imported_files(engine) & (engines - {engine})


def test_one_file_imports_the_attention_kernels():
    keeper = "anchor_context/attention/kernels.py"
    for path in sources():
        modules = {
            node.module if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        optional = {
            m for m in modules if m and m.startswith(("flash_attn", "torch.nn.attention.varlen"))
        }
        assert not optional or path.relative_to(ROOT).as_posix() == keeper


def test_nothing_imports_what_stands_in_for_library_files():
    apart = ROOT / "anchor_context/library_modified_files"
    for path in sources():
        assert not any(file.is_relative_to(apart) for file in imported_files(path)), path
