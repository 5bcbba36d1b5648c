"""A room imports only from lower layers, and only its keeper imports an optional library.

(`test_readme.py` holds the README's table of rooms to the one here.)
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS = {  # path prefix -> layer; the longest prefix that matches counts
    "train.py": 6,
    "benchmarks/": 6,
    "examples/": 6,
    "anchor_context/__init__.py": 6,
    "anchor_context/library_modified_files/": 6,
    # Commands stand high: they put rooms together.
    "anchor_context/evaluate/": 5,
    "anchor_context/precision/": 5,
    "anchor_context/data/__main__.py": 5,
    "anchor_context/data/ranks.py": 4,
    "anchor_context/demo.py": 5,
    "anchor_context/launch.py": 5,
    "anchor_context/integrations/": 5,
    "anchor_context/engine.py": 4,
    "anchor_context/memory/": 4,
    "anchor_context/parallel/": 3,
    "anchor_context/data/": 3,
    "anchor_context/attention/reference.py": 2,
    "anchor_context/attention/flash.py": 2,
    "anchor_context/attention/flex.py": 2,
    "anchor_context/run/": 2,
    "anchor_context/attention/patterns.py": 1,
    "anchor_context/command_line.py": 1,
    "anchor_context/loss.py": 1,
    "anchor_context/rope/": 1,
    "anchor_context/layout.py": 0,
    "anchor_context/attention/kernels/": 0,
    "anchor_context/files.py": 0,
    "anchor_context/hub.py": 0,
    "anchor_context/util.py": 3,
}
SAME_LAYER = {  # the exceptions: importer -> the rooms of its own layer that it may use
    "anchor_context/precision/": ("anchor_context/integrations/",),
}


def sources() -> list[Path]:
    """Every Python file with code in it."""
    folders = ("anchor_context", "benchmarks", "examples")
    files = [ROOT / "train.py", *(f for name in folders for f in (ROOT / name).rglob("*.py"))]
    return [file for file in files if file.read_text().strip()]


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
    names.discard("anchor_context")  # whose names are those of other files
    modules = [ROOT / name.replace(".", "/") for name in names]
    files = [f for m in modules for f in (m.with_suffix(".py"), m / "__init__.py") if f.exists()]
    return {file for file in files if file.read_text().strip()}


def sideways_imports(path: Path) -> set[tuple[str, str]]:
    """(its room, imported room) for what `path` imports of another room that is not lower."""
    rooms = {(layer_key(path), layer_key(imported)) for imported in imported_files(path)}
    return {
        (key, target) for key, target in rooms if key != target and LAYERS[target] >= LAYERS[key]
    }


def test_every_file_has_a_layer_and_every_layer_a_file():
    """Or a new file, or one under another name, would be held by nothing."""
    assert [path for path in sources() if layer_key(path) is None] == []
    assert LAYERS.keys() - {layer_key(path) for path in sources()} == set()


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_downwards(path):
    for key, target in sideways_imports(path):
        allowed = LAYERS[target] == LAYERS[key] and target in SAME_LAYER.get(key, ())
        assert allowed, f"{key} (layer {LAYERS[key]}) imports {target} (layer {LAYERS[target]})"


def test_every_exception_is_used():
    used = set().union(*map(sideways_imports, sources()))
    assert used == {(key, target) for key, targets in SAME_LAYER.items() for target in targets}


def test_the_engines_never_import_each_other():
    engines = {ROOT / f"anchor_context/attention/{n}.py" for n in ("reference", "flash", "flex")}
    for engine in engines:
        assert not imported_files(engine) & (engines - {engine})


def test_one_room_imports_the_attention_kernels():
    keeper = "anchor_context/attention/kernels/"
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
        assert not optional or path.relative_to(ROOT).as_posix().startswith(keeper)


def test_nothing_imports_what_stands_in_for_library_files():
    apart = ROOT / "anchor_context/library_modified_files"
    for path in sources():
        if path.is_relative_to(apart):
            continue
        assert not any(file.is_relative_to(apart) for file in imported_files(path)), path
