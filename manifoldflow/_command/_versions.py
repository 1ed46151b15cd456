"""Versions of what the library stands on, against the ranges that it was declared for."""

import operator
import platform
import re
from importlib import metadata
from itertools import zip_longest

import manifoldflow as mf
from manifoldflow._command._finding import Finding

EXTRAS = "plot", "demo", "models", "orbax"
COMPARISONS = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
    ">": operator.gt, "<": operator.lt,
}  # fmt: skip


def versions() -> list[Finding]:
    """Python, the library, what it requires, jaxlib, and what its extras add."""
    system = f"{platform.system()} {platform.machine()}"
    found = [Finding(f"manifoldflow {mf.__version__}, {system}")]
    try:
        python, required = _declared("manifoldflow")
    except metadata.PackageNotFoundError:
        text = "manifoldflow is not installed, so the ranges of versions are not known"
        return [*found, Finding(text, "In its folder: `python -m pip install -e .`")]
    found.append(of_version("python", platform.python_version(), python))
    for name, (bounds, extra) in required.items():
        found.append(of_package(name, bounds, extra))
        if name == "jax" and _version("jax"):
            found.append(of_package("jaxlib", _declared("jax")[1]["jaxlib"][0], ""))
    return found


def of_package(name: str, bounds: str, extra: str) -> Finding:
    """One that is required, or that belongs to an extra and may be absent."""
    version = _version(name)
    if version is None and extra:
        return Finding(f"{name}: not installed (extra `{extra}`)")
    return of_version(name, version, bounds)


def of_version(name: str, version: str | None, bounds: str) -> Finding:
    """A version against bounds such as ">=0.7.2,<0.8"; no version is outside."""
    shown = f"{name} {version or 'is not installed'} (supported: {bounds or 'any'})"
    if version is not None and is_within(version, bounds):
        return Finding(shown)
    remedy = f'`python -m pip install "{name}{bounds}"`'
    if name == "python":
        remedy = f"Make an environment with Python {bounds}"
    return Finding(shown, remedy, is_wrong=True)


def is_within(version: str, bounds: str) -> bool:
    """True if the release numbers of a version keep comma-separated bounds."""
    for bound in filter(None, bounds.replace(" ", "").split(",")):
        sign, other = re.match(r"([<>=!~]*)(.*)", bound).groups()  # pyright: ignore[reportOptionalMemberAccess]
        pairs = zip_longest(_release(version), _release(other), fillvalue=0)
        left, right = zip(*pairs)
        if sign in COMPARISONS and not COMPARISONS[sign](left, right):
            return False
    return True


def _release(version: str) -> list[int]:
    found = re.match(r"\d+(\.\d+)*", version)
    return [int(number) for number in found[0].split(".")] if found else [0]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _declared(name: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """The bounds on Python, and name → bounds and extra of what users need."""
    required: dict[str, tuple[str, str]] = {}
    for line in metadata.requires(name) or []:
        wanted, _, marker = line.partition(";")
        package, bounds = re.match(r"([\w.-]+)(?:\[.*\])?\s*(.*)", wanted).groups()  # pyright: ignore[reportOptionalMemberAccess]
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
        if package != name and (extra is None or extra[1] in EXTRAS):
            required.setdefault(package, (bounds.strip().strip("()"), extra[1] if extra else ""))
    return metadata.metadata(name)["Requires-Python"] or "", required
