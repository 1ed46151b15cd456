"""The rules of the house: floors, abstract or final, small files, documented and tested names."""

import ast
import importlib
import inspect
import json
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from importlinter.application import use_cases
from importlinter.configuration import configure

import manifoldflow

pytestmark = pytest.mark.quick

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "manifoldflow"
TESTS = ROOT / "tests"
MAX_LINES = 400
MAX_IMPORT_SHARE = 0.5
MAX_BYTES = 1_000_000


def relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def sources(*folders: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def parsed(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def git(*arguments: str) -> list[str] | None:
    """Output of git, split at NUL; None where this is no git checkout."""
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.split("\0")[:-1] if run.returncode == 0 else None


# --- Floors -----------------------------------------------------------------------------


def test_floors_and_rooms(monkeypatch, capsys):
    """The contracts of import-linter in pyproject.toml are kept."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    configure()
    kept = use_cases.lint_imports("pyproject.toml", cache_dir=None)
    assert kept, capsys.readouterr().out


IMPORT = """
import sys, time
began = time.process_time()
import jax, equinox, diffrax, optax
between = time.process_time()
import manifoldflow
seconds = time.process_time() - between
import json
print(json.dumps({
    "share": seconds / (between - began),
    "unwanted": sorted({
        "matplotlib", "sklearn", "pytest", "beartype", "manifoldflow.models", "manifoldflow.theory",
        "manifoldflow.diagnostics", "manifoldflow.optimize", "manifoldflow.sgd",
        "manifoldflow.walks",
    } & set(sys.modules)),
    "x64": bool(jax.config.jax_enable_x64),
}))
"""


def import_report() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_X64"}
    run = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


def test_import_is_quick_and_light():
    """`import manifoldflow` is fast, draws nothing and leaves the precision alone.

    Counted in processor time and against the import of what it stands on, so that the
    speed of the machine does not count.
    """
    shares = []
    for _ in range(3):
        report = import_report()
        assert report["unwanted"] == []
        assert not report["x64"], "import manifoldflow must not set jax_enable_x64"
        shares.append(report["share"])
        if shares[-1] < MAX_IMPORT_SHARE:
            return
    pytest.fail(f"import manifoldflow adds {shares} of its dependencies', bound {MAX_IMPORT_SHARE}")


# --- Files ------------------------------------------------------------------------------


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_version(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"


def is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and all(a.asname == a.name for a in node.names)


def is_lazy(node: ast.stmt) -> bool:
    """What the root has for a room that is imported when it is asked for."""
    is_tool = isinstance(node, ast.Import) and all((a.asname or "")[:1] == "_" for a in node.names)
    is_shown = isinstance(node, ast.If) and ast.unparse(node.test) == "_typing.TYPE_CHECKING"
    is_getter = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
    return is_tool or (is_shown and all(map(is_import, node.body))) or is_getter


def test_init_files_only_re_export():
    """A docstring, `from … import name as name`, and at the root `__version__` and lazy rooms."""
    wrong = [
        f"{relative(path)}:{node.lineno}: {ast.unparse(node)}"
        for path in sources(PACKAGE)
        if path.name == "__init__.py"
        for i, node in enumerate(parsed(path).body)
        if not (i == 0 and is_docstring(node))
        and not is_import(node)
        and not is_version(node)
        and not (path.parent == PACKAGE and is_lazy(node))
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_have_docstrings():
    missing = [relative(path) for path in sources(PACKAGE) if not ast.get_docstring(parsed(path))]
    assert not missing, f"modules without a docstring: {missing}"


def test_no_drawer_for_everything():
    names = {"utils.py", "_utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    found = [relative(path) for path in sources(PACKAGE) if path.name in names]
    assert not found, f"say what these are about: {found}"


def test_files_are_small():
    folders = PACKAGE, TESTS, ROOT / "benchmarks"
    lengths = {
        relative(p): len(p.read_text(encoding="utf-8").splitlines()) for p in sources(*folders)
    }
    long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert not long, f"files of more than {MAX_LINES} lines: {long}"


def test_files_are_light():
    sizes = {relative(path): path.stat().st_size for path in project_files()}
    heavy = {name: size for name, size in sizes.items() if size > MAX_BYTES}
    assert not heavy, f"files of more than {MAX_BYTES} bytes: {heavy}"


FOREIGN = {
    # A path from the root of some machine; a shebang and the null device are portable.
    "absolute path": r"(?<![\w./:~*<+=)\]}>-])/(?!usr/bin/env\b|dev/null\b)[A-Za-z]\w*/[\w.]+",
    "Windows path": r"\b[A-Z]:\\\w",
    "package index": r"index[-_]url\b|\bpy[p]i\.\w+|\bpython[h]osted\b",
}


def project_files() -> list[pathlib.Path]:
    """What git tracks or would track; in an unpacked archive, all but hidden folders."""
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if names is not None:
        return [ROOT / name for name in names if (ROOT / name).is_file()]
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.parts)
    ]


def readable(path: pathlib.Path) -> str:
    """The text of a file; of a notebook, without the pictures; "" for binary files."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    return re.sub(r'"image/[\w+]+": (?:"[^"]*"|\[[^\]]*\])', "", text)


def test_files_stand_on_their_own():
    """No file names a place that exists on one machine only."""
    found = [
        f"{relative(path)}:{number}: {kind}: {match.group()}"
        for path in project_files()
        if path.name != "LICENSE"
        for number, line in enumerate(readable(path).splitlines(), start=1)
        for kind, pattern in FOREIGN.items()
        for match in re.finditer(pattern, line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "see /" + "home/someone/data.csv",
        'open("/' + 'opt/data/x.npz")',
        "--extra-index" + "-url x",
    ],
)
def test_foreign_places_are_recognised(text):
    assert any(re.search(pattern, text) for pattern in FOREIGN.values())


@pytest.mark.parametrize(
    "text",
    ["#!/usr/bin/env bash", "1/n and/or a/b/c", "https://arxiv.org/abs/2110.06914", "2>/dev/null"],
)
def test_portable_places_are_allowed(text):
    assert not any(re.search(pattern, text) for pattern in FOREIGN.values())


def test_one_version():
    """pyproject.toml, CITATION.cff, the changelog and the package name the same version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = {
        "manifoldflow.__version__": manifoldflow.__version__,
        "pyproject.toml": project["version"],
        "CITATION.cff": re.findall(r"^version: (\S+)", citation, flags=re.MULTILINE)[0],
        "CHANGELOG.md": re.findall(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)[0],
    }
    assert len(set(versions.values())) == 1, versions


# --- Classes ----------------------------------------------------------------------------


def modules() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages([str(PACKAGE)], prefix="manifoldflow."):
        if not info.name.endswith("__main__"):
            yield importlib.import_module(info.name)


def is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "manifoldflow"


def classes() -> list[type]:
    found = {
        cls
        for module in modules()
        for cls in vars(module).values()
        if isinstance(cls, type) and is_ours(cls) and not getattr(cls, "_is_protocol", False)
    }
    return sorted(found, key=lambda cls: (cls.__module__, cls.__qualname__))


def is_abstract(cls: type) -> bool:
    variables = ("__abstractvars__", "__abstractclassvars__")
    return inspect.isabstract(cls) or any(getattr(cls, name, None) for name in variables)


def is_concrete_member(cls: type, name: str) -> bool:
    """Whether the body of `cls` itself gives `name` a meaning."""
    if name not in vars(cls) or (name.startswith("__") and name != "__call__"):
        return False
    return not getattr(vars(cls)[name], "__isabstractmethod__", False)


def overrides(cls: type) -> list[str]:
    """Concrete members of our own base classes that the body of `cls` replaces."""
    bases = [base for base in cls.__mro__[1:] if is_ours(base)]
    names = set(vars(cls)) | set(cls.__dict__.get("__annotations__", {}))
    return [
        f"{cls.__module__}.{cls.__qualname__}.{name} overrides {base.__qualname__}.{name}"
        for base in bases
        for name in sorted(names)
        if is_concrete_member(base, name) and not name.startswith("_abc_")
    ]


def test_there_are_classes():
    assert len(classes()) > 10


def test_no_class_overrides_a_concrete_method():
    wrong = [line for cls in classes() for line in overrides(cls)]
    assert not wrong, "\n".join(wrong)


def test_abstract_by_name_and_by_nature():
    """`Abstract…` has something abstract; every other class has nothing left open."""
    wrong = [
        f"{cls.__module__}.{cls.__qualname__}"
        for cls in classes()
        if cls.__name__.lstrip("_").startswith("Abstract") != is_abstract(cls)
    ]
    assert not wrong, wrong


def test_only_abstract_classes_have_subclasses():
    wrong = [
        f"{cls.__qualname__}({base.__qualname__})"
        for cls in classes()
        for base in cls.__mro__[1:]
        if is_ours(base) and not is_abstract(base) and not getattr(base, "_is_protocol", False)
    ]
    assert not wrong, wrong


def test_an_override_is_recognised():
    abstract = manifoldflow.AbstractManifold

    class Wrong(abstract):
        def dimension(self, point):
            return 0

    Wrong.__module__ = "manifoldflow.wrong"
    assert overrides(Wrong) == [
        f"manifoldflow.wrong.{Wrong.__qualname__}.dimension overrides AbstractManifold.dimension"
    ]


# --- Names ------------------------------------------------------------------------------


def public_names() -> dict[str, Any]:
    """Dotted name → object, for every re-export of the root and of the public rooms."""
    rooms = [manifoldflow, *(m for m in modules() if "._" not in m.__name__)]
    return {
        f"{room.__name__}.{alias.name}": getattr(room, alias.name)
        for room in rooms
        for node in ast.walk(parsed(pathlib.Path(str(room.__file__))))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def has_docstring(obj: Any) -> bool:
    """Whether it was written by hand: dataclasses make one up out of their fields."""
    text = vars(obj).get("__doc__") if isinstance(obj, type) else getattr(obj, "__doc__", None)
    return bool(text and not text.startswith(f"{getattr(obj, '__name__', '')}("))


def test_public_names_are_documented():
    missing = [name for name, obj in public_names().items() if not has_docstring(obj)]
    assert not missing, f"public names without a docstring: {missing}"


def test_public_names_are_tested():
    others = (path for path in sources(TESTS) if path != pathlib.Path(__file__))
    words = {w for path in others for w in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    missing = sorted({name for name in public_names() if name.rsplit(".", 1)[1] not in words})
    assert not missing, f"public names that no test mentions: {missing}"
