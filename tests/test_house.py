"""The house itself: public names, imports that point one way, tables that are made from the code."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import secateur

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src/secateur"


def test_public_names():
    assert sorted(secateur.__all__) == [
        "Recipe",
        "Report",
        "SecateurError",
        "__version__",
        "load",
        "method",
        "prune",
        "prune_",
        "structure",
        "training",
    ]
    assert all(getattr(secateur, name).__doc__ for name in secateur.__all__ if name != "__version__")


def imports(folder: str) -> dict[Path, set[str]]:
    """What each module below a folder imports from the package."""
    found = {}
    for path in (SOURCE / folder).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[path] = {
            node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module is not None
        }
    return found


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("weights", ("secateur.stream", "secateur.recipe", "secateur.plan", "secateur.prune", "secateur.pipeline")),
        ("stream", ("secateur.recipe", "secateur.plan", "secateur.prune", "secateur.weights.criteria")),
        ("structure", ("secateur.prune", "secateur.pipeline", "secateur.plan", "secateur.smaller", "secateur.cli")),
        ("training", ("secateur.pipeline", "secateur.smaller", "secateur.module", "secateur.recover")),
        ("recover", ("secateur.pipeline", "secateur.smaller", "secateur.recipe", "secateur.weights")),
        ("measure", ("secateur.prune", "secateur.pipeline", "secateur.stream", "secateur.weights")),
        ("", ("secateur.cli",)),
    ],
)
def test_imports_point_one_way(folder, forbidden):
    for path, names in imports(folder).items():
        assert not [name for name in names if name.startswith(forbidden)], path


def test_importing_the_package_is_light():
    """Heavy and optional libraries load when they are needed."""
    code = (
        "import sys, secateur; print([m for m in ('transformers', 'accelerate', 'rich', 'typer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(
    not (ROOT / "scripts/tables.py").exists(), reason="the scripts are not part of an installed package"
)
def test_tables_are_up_to_date():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "scripts/tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{path.name}: run scripts/tables.py"
