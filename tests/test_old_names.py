"""Names that were changed still work, as aliases of the new ones and as nothing else."""

import ast
import pathlib

import pytest

import manifoldflow as mf
from manifoldflow import geometry

pytestmark = pytest.mark.quick

PACKAGE = pathlib.Path(mf.__file__).parent

# The old name, where it is, and what it means now.
ALIASES = {"Walk": (mf, mf.GeodesicOptions), "geometry.Walk": (geometry, mf.GeodesicOptions)}
# What these words were used for has the field's words now.
GONE = {
    "land": "gauss_newton_project",
    "retreat": "orthographic_retract",
    "touch_up": "AbstractManifold.newton_correct",
    "Bending": "AbstractLocalGeometry",
    "bending_along": "AbstractManifold.local",
    "gradient_of_rows": "potential_gradient",
    "second_derivative_of": "AbstractManifold.local",
}


def test_old_names_are_aliases():
    for name, (room, meaning) in ALIASES.items():
        assert getattr(room, name.rpartition(".")[2]) is meaning, name


def definitions(tree):
    kinds = ast.ClassDef, ast.FunctionDef
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def test_old_names_are_defined_nowhere():
    """But for the hook of retractions that land on a point near by."""
    found = [
        f"{path.relative_to(PACKAGE)}: {name}, now {GONE[name]}"
        for path in PACKAGE.rglob("*.py")
        for name in definitions(ast.parse(path.read_text(encoding="utf-8"))) & set(GONE)
        if not (name == "land" and "_retraction" in path.name)
    ]
    assert not found, "\n".join(found)
    classes = {
        name
        for path in PACKAGE.rglob("*.py")
        for name in definitions(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert "Walk" not in classes
