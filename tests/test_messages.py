"""No message names an option that the function which gives it lacks."""

import ast
import importlib
import inspect
import pathlib
import re
from collections.abc import Iterator

import pytest

import manifoldflow as mf

pytestmark = pytest.mark.quick

PACKAGE = pathlib.Path(mf.__file__).parent
TREES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}

# Options that a `raise` names which are not those of the function or class that it stands in:
# whose they are.
WHOSE = {
    ("_clock/_sums.py", "num_steps_for"): {"num_steps": "simulate"},
    ("plotting/_before_after.py", "plot_before_after"): {"observe": "walk solve simulate"},
    ("plotting/_walk.py", "_observables"): {"observe": "walk solve simulate"},
    ("walks/_walk.py", "_method_of"): {"max_steps": "walk"},
    ("walks/_walk.py", "_checked_key"): {"max_steps": "walk"},
    ("flows/_base.py", "terms"): {"end_time": "solve"},
    ("ensembles/_weak.py", "_points"): {"end_time": "solve"},
    ("symmetry/_equilibrium.py", "_check_in_the_limit"): {
        "learning_rate": "symmetry.noise_equilibrium"
    },
    ("symmetry/_balance.py", "balance_with_info"): {"example_loss": "symmetry.find_rescalings"},
    ("diagnostics/_certify.py", "certify"): {"throw": "solve"},
    ("ensembles/_ensemble.py", "_num_members"): {"num_members": "member_keys"},
    ("losses/_residual_form.py", "__init__"): {"weight_decay": "PerExampleLoss"},
    ("losses/_residual_form.py", "_roots_of_constant_rank"): {"minimizer_fn": "PerExampleLoss"},
    ("losses/_residual_form.py", "_search_minimizer"): {
        "minimizer_fn": "PerExampleLoss",
        "like": "OutputManifold",
    },
    ("losses/_residual_form.py", "_minimizers"): {
        "minimizer_fn": "PerExampleLoss",
        "like": "OutputManifold",
    },
    ("_trainable.py", "_in_state"): {"predict": "LeastSquares PerExampleLoss OutputManifold"},
    ("manifolds/_outputs.py", "_finite"): {"like": "OutputManifold"},
    ("losses/_reach.py", "check_reach"): {"trainable": "LeastSquares PerExampleLoss LevelSet"},
    ("losses/_predict.py", "call_point"): {"predict": "LeastSquares PerExampleLoss"},
    ("_run/_recorded.py", "check_concrete"): {"checkpoint": "solve simulate minimize"},
    ("_run/_forms.py", "check_form"): {"form": "AbstractFlow.terms"},
    ("linalg/_sigma.py", "_refuse_square"): {
        "is_factor": "limit_map_second_derivative limits.limit_map_second_derivative_parts"
    },
    ("noise/_base.py", "checked_noise"): {
        "replacement": "MinibatchNoise",
        "std": "LabelNoise",
    },
    ("noise/_resampled.py", "_check_likelihood"): dict.fromkeys(
        ("batch_size", "is_likelihood"), "ResampledLabels"
    ),
    ("noise/_flipped.py", "_check_equal"): dict.fromkeys(
        ("batch_size", "is_likelihood"), "ResampledLabels"
    ),
    ("_journal/_journal.py", "read"): {"num_saves": "solve simulate"},
    ("sgd/_optimizer.py", "check_clock"): dict.fromkeys(
        ("end_time", "momentum", "num_steps"), "simulate"
    )
    | {"weight_decay": "updates.SGD"},
    ("sgd/_optimizer.py", "_elsewhere"): dict.fromkeys(("end_time", "num_steps"), "simulate"),
    ("sgd/_optimizer.py", "checked_optimizer"): dict.fromkeys(
        ("learning_rate", "momentum"), "simulate"
    ),
    ("sgd/_simulate.py", "_check_kinds"): {"batch_size": "LabelNoise"},
}
# The same for members of RESULTS, by the files that give them.
MEMBERS = {
    "stopped_early": {
        "flows/_here.py": "solve",
        "flows/_leg_by_diffrax.py": "solve",
        "flows/_leg_by_scan.py": "solve",
        "sgd/_loop.py": "simulate",
        "sgd/_simulate.py": "simulate",
        "walks/_walk.py": "solve",
    },
    "max_steps_reached": {
        "flows/_leg_by_diffrax.py": "solve",
        "geometry/_closest.py": "closest_point",
        "limits/_limit_map.py": "limit_map limit_map_with_info",
        "manifolds/_search.py": "AbstractManifold.project AbstractManifold.retract",
        "optimize/_resume.py": "minimize",
        "optimize/_search.py": "minimize",
        "walks/_walk.py": "walk",
    },
    "rank_too_small": {"manifolds/_normal_space.py": "MinimizerManifold"},
    "stalled": {
        "optimize/_gradient_descent.py": "minimize",
        "optimize/_search.py": "minimize",
        "optimize/_trust_region.py": "minimize",
        "walks/_walk.py": "minimize",
    },
    "no_equilibrium": {
        "symmetry/_balance.py": "symmetry.balance symmetry.balance_with_info",
        "symmetry/_product_equilibrium.py": "symmetry.balance symmetry.balance_with_info",
    },
    "bad_end_time": {"flows/_here.py": "solve"},
    "bad_learning_rate": {"sgd/_loop.py": "simulate"},
}


def options() -> set[str]:
    """The names of all parameters in the package."""
    functions = (n for t in TREES.values() for n in ast.walk(t) if isinstance(n, ast.FunctionDef))
    return {a.arg for f in functions for a in (*f.args.args, *f.args.kwonlyargs)}


OPTIONS = options()


def named(text: str) -> set[str]:
    """The options that a message names: in backticks, with a value, or by a long name."""
    patterns = r"`(\w+)[`=]", r"\b(\w+)=", r"\b([a-z]+(?:_[a-z]+)+)\b"
    return {word for pattern in patterns for word in re.findall(pattern, text)} & OPTIONS


def parameters(name: str) -> set[str]:
    room, _, last = name.rpartition(".")
    place = importlib.import_module(f"manifoldflow.{room}") if room.islower() and room else mf
    owner = getattr(mf, room) if room and not room.islower() else place
    return set(inspect.signature(getattr(owner, last)).parameters)


def strings(node: ast.AST, constants: dict[str, str]) -> str:
    """All text below a node, that of constants of the module as well."""
    found = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
    found += [constants.get(n.id, "") for n in ast.walk(node) if isinstance(n, ast.Name)]
    return " ".join(text for text in found if isinstance(text, str))


def constants_of(tree: ast.Module) -> dict[str, str]:
    return {
        target.id: strings(node.value, {})
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def messages() -> Iterator[tuple[str, str, set[str], str]]:
    """File, function, its own options and text of every error that is raised."""
    for file, tree in TREES.items():
        constants = constants_of(tree)
        parents = {c: n for n in ast.walk(tree) for c in ast.iter_child_nodes(n)}
        for node in ast.walk(tree):
            is_call = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("error_if")
            if isinstance(node, ast.Raise) or is_call:
                around = [node]
                while around[-1] in parents:
                    around.append(parents[around[-1]])
                functions = [n.name for n in around if isinstance(n, ast.FunctionDef)]
                yield file, (functions or [""])[0], own(around), strings(node, constants)


def own(around: list[ast.AST]) -> set[str]:
    """The parameters of the functions and classes around a node, and the fields of classes."""
    names: set[str] = set()
    for node in around:
        inits = [n for n in getattr(node, "body", []) if getattr(n, "name", "") == "__init__"]
        is_class = isinstance(node, ast.ClassDef)
        for f in [node, *(inits if is_class else [])]:
            if isinstance(f, ast.FunctionDef):
                names |= {a.arg for a in (*f.args.args, *f.args.kwonlyargs)}
        if is_class:
            names |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    return names


def test_errors_name_options_that_are_there():
    found: dict[tuple[str, str], set[str]] = {}
    for file, function, known, text in messages():
        rest = named(text) - known - set(re.findall(r"(\w+):", text))
        if rest and not file.startswith("__main__"):
            found.setdefault((file, function), set()).update(rest)
    listed = {place: set(whose) for place, whose in WHOSE.items()}
    wrong = {place: names for place, names in found.items() if names - listed.get(place, set())}
    assert not wrong, f"options of nobody knows whom: {wrong}"
    lacking = [
        (place, option, giver)
        for place, whose in WHOSE.items()
        for option, givers in whose.items()
        for giver in givers.split()
        if option not in parameters(giver)
    ]
    assert not lacking, lacking


def member_texts() -> dict[str, str]:
    return {name: mf.RESULTS[getattr(mf.RESULTS, name)] for name in mf.RESULTS._name_to_item}


@pytest.mark.every_case
@pytest.mark.parametrize("name", sorted(member_texts()))
def test_results_name_options_that_are_there(name):
    options = named(member_texts()[name])
    if not options:
        return
    files = {
        file
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == f"RESULTS.{name}"
        if file != "_results.py"
    }
    assert files == set(MEMBERS[name]), f"{name} is given in {files}"
    givers = [giver for names in MEMBERS[name].values() for giver in names.split()]
    lacking = [(giver, options - parameters(giver)) for giver in givers]
    assert not any(missing for _, missing in lacking), lacking


def test_a_flow_without_a_manifold_is_not_told_of_one():
    for name in ("max_steps_reached", "nonfinite", "step_too_small", "stopped_early"):
        assert "manifold" not in member_texts()[name], name


def test_a_missing_option_is_recognised():
    assert named("Raise `max_steps`, or give num_saves and rtol=1") == {
        "max_steps", "num_saves", "rtol"
    }  # fmt: skip
    assert "max_steps" not in parameters("exponential_map")
