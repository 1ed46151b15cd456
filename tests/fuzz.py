"""Bad arguments for every public callable, and what becomes of them; run by `test_fuzz`.

One argument of a valid call at a time is replaced by a value that does not fit. Three things may
follow: one of the library's own sentences (a `raise` in its source, or a failure that a search
reports), a result that is NaN, or, wrongly, an error from the depths or a plain result.
Run without the tests' type checker, as users do:

    python fuzz.py 0 400    # seed, and how many inputs; "all" for every one
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import pathlib
import sys
import traceback
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import manifoldflow as mf
from fuzz_table import CALLS, KEY

PACKAGE = pathlib.Path(mf.__file__).parent
NAN, INF = float("nan"), float("inf")
FOREIGN = {"a string": "text", "an object": object(), "a dict": {"x": "y"}}

KINDS: dict[str, dict[str, Any]] = {
    "instance": FOREIGN | {"None": None, "a number": 3.0, "an array": np.ones(3), "a list": []},
    "function": FOREIGN | {"None": None, "a number": 3.0, "an array": np.ones(3)},
    "point": FOREIGN | {
        "None": None, "a number": 3.0, "integers": np.arange(3), "complex": np.ones(3, complex),
        "a list": [], "booleans": np.ones(3, bool), "strings": np.array(["a", "b", "c"]),
    },
    "vector": FOREIGN | {
        "None": None, "a number": 3.0, "longer": np.ones(7), "a matrix": np.ones((3, 3)),
        "complex": np.ones(3, complex), "another structure": {"x": np.ones(3)},
        "strings": np.array(["a", "b", "c"]), "ragged": [[1.0], [1.0, 2.0]],
    },
    "key": FOREIGN | {
        "None": None, "an integer": 3, "a number": 1.5, "floats": np.ones(2),
        "several keys": jr.split(KEY, 3), "a list": [],
    },
    "count": FOREIGN | {
        "None": None, "zero": 0, "negative": -1, "a fraction": 1.5, "NaN": NAN, "infinity": INF,
        "True": True, "a list": [1], "complex": 1j, "an array": np.ones(2, int),
    },
    "integer": FOREIGN | {
        "None": None, "a fraction": 1.5, "NaN": NAN, "a list": [1], "complex": 1j, "huge": 10**9,
        "an array": np.ones(2, int),
    },
    "number": FOREIGN | {
        "None": None, "NaN": NAN, "infinity": INF, "complex": 1j, "an array": np.ones(2),
        "a list": [], "empty": np.zeros(0),
    },
    "flag": FOREIGN | {"None": None, "a number": 2, "an array": np.ones(2, bool)},
    "array": FOREIGN | {
        "None": None, "a number": 3.0, "NaN": np.full((2, 2), NAN), "infinity": np.full(2, INF),
        "a cube": np.ones((2, 2, 2)), "empty": np.zeros((0, 3)),
        "complex": np.ones((2, 2), complex),
        "ragged": [[1.0], [1.0, 2.0]], "strings": np.array([["a", "b"]]), "longer": np.ones(7),
        "oblong": np.ones((2, 5)),
    },
    "word": {"another word": "text", "None": None, "a number": 3.0, "an object": object()},
    "sequence": FOREIGN | {
        "None": None, "a number": 3.0, "empty": [], "NaN": [NAN, NAN, NAN], "nested": [[[1.0]]],
        "strings": ["a"], "negative": [-1.0, -2.0],
    },
    "observe": FOREIGN | {"a number": 3.0, "a list": [1], "not functions": {"h": 3.0}},
}  # fmt: skip
KINDS["positive"] = KINDS["number"] | {"zero": 0.0, "negative": -1.0}
KINDS["nonnegative"] = KINDS["number"] | {"negative": -1.0}

ARGUMENTS = {
    "instance": "manifold loss flow noise retraction solver adjoint method gram walk mesh jacobian"
    " operator left right multipliers tangents residual_factor hessian check mlp"
    " loss_or_manifold symmetry symmetries until network_ objective optimizer local update use"
    " report",
    "function": "fn field factor_fn loss_fn predict minimizer_fn sample_fn example_loss path"
    " charge activation first second where term jacobian_fn potential mean_field slow_drift"
    " mv operation margin_loss velocity_fn",
    "point": "point other network coordinates params like origin",
    "vector": "vector velocity u v normal gradient columns directions covariance",
    "key": "key keys",
    "count": "batch_size num_samples num_saves num_steps max_steps num_members num_examples"
    " num_groups num_terms num_draws chunk_size width size dimension num_rows num_columns"
    " num_phases num_features num_starts count max_products memory limit num sparsity rank"
    " modulus num_workers num_bytes num_eigenvalues max_rows memory num_directions"
    " num_times num_nodes bits",
    "integer": "layer neuron head seed axis index preconditioner_rank",
    "positive": "length end_time step_size rtol atol learning_rate order scale initial_radius kappa"
    " rate major minor radius accuracy slope gradient_tolerance margin coherence normality"
    " third_derivative train_fraction max_norm averaging batch_factor seconds probability"
    " label_variance batch_fraction failure_probability stationarity"
    " max_change relative_step",
    "nonnegative": "flatness least_flatness landing_time std noise_scale weight_decay tolerance"
    " momentum input_trace strength"
    " reference_standard_error noise_constant label_std averaging_rate gradient_time trace"
    " b1 eps lag multiple",
    "number": "time low high parameter degree theta",
    "flag": "throw replacement is_likelihood is_factor discrete projected test per_neuron"
    " is_ode at_zero_loss decoupled per_example halved gauss_newton",
    "array": "inputs targets data matrix rhs values errors reference eigenvalues norms_squared"
    " input_covariance noise_covariance target_map target truth residuals product input_noise"
    " output_noise features weights labels generator direction start coefficients second_moments"
    " margins gradients",
    "word": "kind design distribution per",
    "sequence": "widths sizes variances axes radii times save_times levels step_sizes"
    " standard_errors parameters second_layer",
    "observe": "observe",
}
ARGUMENTS["count"] += " num_blocks"
ARGUMENTS["word"] += " name colour"
KIND_OF = {name: kind for kind, names in ARGUMENTS.items() for name in names.split()}
# Where a name means something else.
EXCEPTIONS = {
    ("plotting.shades", "number"): "count",
    ("ensemble", "keys"): "array",
    ("linalg.pseudo_inverse_mv", "vector"): "array",
    ("symmetry.low_rank", "values"): "sequence",
    ("symmetry.balance", "loss"): "instance",
    ("theory.overparametrized_linear_flow", "time"): "nonnegative",
    ("theory.overparametrized_linear_charges", "time"): "nonnegative",
    ("theory.ornstein_uhlenbeck_covariance", "hessian"): "array",
    ("theory.ornstein_uhlenbeck_law", "hessian"): "array",
    ("theory.ornstein_uhlenbeck_law", "time"): "nonnegative",
    ("theory.margin_kkt", "point"): "array",
    ("theory.margin_kkt", "degree"): "positive",
    ("theory.quadratically_parametrized_flow", "time"): "nonnegative",
    ("theory.approximate_symmetry_displacement", "hessian"): "array",
    ("theory.approximate_symmetry_displacement", "point"): "array",
    ("diagnostics.certify", "path"): "point",
    ("linalg.gauss_newton", "scale"): "number",
    ("linalg.as_sigma", "given"): "instance",
    ("IterationLimit", "covariance"): "function",
    ("noise.ShortLimit", "rate"): "number",
    ("linalg.tangent_solve", "right"): "vector",
}
POTENTIALS = "diagnostics.is_gradient_flow"
EXCEPTIONS |= {(POTENTIALS, "metric"): "function", (POTENTIALS, "loop"): "function"}
EXCEPTIONS |= {(POTENTIALS, "num_tangents"): "count", ("mesh", "examples"): "count"}
EXCEPTIONS |= {("mesh", "parameters"): "count"}
CURVES = ["adam", "local_sgd", "sgd", "slow_adam"]
CURVES = [f"theory.scalar_factorization_{name}" for name in CURVES] + [
    "theory.scale_invariant_norm"
]
EXCEPTIONS |= {(name, "start"): "number" for name in CURVES}
EXCEPTIONS |= {(name, "time"): "nonnegative" for name in CURVES}
# How long two-layer networks take.
LANDING = ["landing_time_bound", "landing_distance_bound", "landed_flatness_bound"]
EXCEPTIONS |= {(f"theory.{name}", "loss"): "nonnegative" for name in LANDING}
STEPS = ["label_noise_num_steps", "sharpness_aware_num_steps", "landing_distance_bound"]
EXCEPTIONS |= {(f"theory.{name}", "time"): "nonnegative" for name in STEPS}


EXCEPTIONS[("symmetry.product_drift", "product")] = "instance"

# Values that do fit: other numbers of examples or features, all levels of a spectrum, no noise.
FITS = {
    ("models.TwoLayerNet", "second_layer"): "negative",
    ("models.FixedProduct", "target"): "oblong",
    ("models.digits", "seed"): "huge",
    ("models.ModularAddition", "seed"): "huge",
    ("models.separable_data", "margin"): "zero",
    ("models.sparse_regression", "sparsity"): "zero",
    ("theory.landed_flatness_bound", "features"): "oblong",
    ("theory.restricted_isometry", "seed"): "huge",
    ("theory.two_layer_minimizer", "second_layer"): "negative",
    ("theory.deep_linear_equilibrium_of_examples", "batch_size"): "None",
    ("theory.deep_linear_sides_of_examples", "batch_size"): "None",
    ("theory.two_layer_minimizer", "targets"): "longer",
    ("theory.two_layer_noise_matrices", "residuals"): "oblong",
    ("theory.overparametrized_linear_charges", "time"): "an array|a list|empty",
    ("theory.overparametrized_linear_flow", "time"): "an array|a list|empty",
    ("theory.quadratically_parametrized_flow", "time"): "an array|a list|empty",
    ("theory.ornstein_uhlenbeck_law", "time"): "an array|a list|empty",
    ("theory.kernel_rich_potential", "weights"): "a cube|longer|oblong|empty",
    ("ensembles.statistics", "values"): "a cube|longer|oblong",
    ("ensembles.statistics", "levels"): "empty",
    ("ensembles.weak_error", "values"): "longer",
    ("ensembles.weak_error", "reference"): "a number",
    ("ensembles.weak_error", "reference_standard_error"): "infinity",
    ("linalg.AutoGram", "preconditioner_rank"): "huge",
    ("linalg.IterativeGram", "preconditioner_rank"): "huge",
    ("linalg.chunked_jacobian", "data"): "infinity|a cube|complex|longer|oblong",
    ("linalg.dense_jacobian", "data"): "longer|infinity",
    ("linalg.jacobian", "data"): "longer|infinity",
    ("linalg.structured_jacobian", "inputs"): "longer|infinity",
    ("linalg.factor_operator", "columns"): "a matrix",
    ("linalg.register_use", "operation"): "a string",
    ("linalg.tangent_solve", "right"): "longer|a matrix|another structure",
    ("linalg.numerical_rank", "eigenvalues"): "infinity",
    ("linalg.row_scale", "norms_squared"): "infinity|NaN|longer",
    ("linalg.contract_hessians", "coefficients"): "NaN",  # times the Hessian 0
    ("geodesic", "times"): "negative",
    ("geometry.geodesic_with_velocity", "times"): "negative",
    ("diagnostics.check_geodesic_convexity", "directions"): "a matrix",
    ("symmetry.low_rank", "values"): "negative",
    ("symmetry.discrete_noether_drift", "learning_rate"): "zero",
    ("symmetry.noise_equilibrium_with_info", "learning_rate"): "zero",
    ("symmetry.ExponentialSymmetry", "generator"): "a number|a cube|ragged|longer|oblong",
    ("PerExampleLoss", "targets"): "complex",  # they may be anything
    ("linalg.displacement", "origin"): "integers|booleans",
    ("theory.kernel_regime_error_bound", "truth"): "longer",
    ("SAMGradient", "radius"): "zero",
    ("shard_parameters", "point"): "complex",  # frozen leaves may be
    ("SGDDiffusion", "learning_rate"): "zero",
    ("simulate", "learning_rate"): "zero",
}
FITS |= {(name, "time"): "an array|a list|empty" for name in CURVES}
NAMED = "symmetry.product_symmetry", "symmetry.attention_products"
FITS |= {(name, "name"): "another word" for name in NAMED}
FITTING_NAMES = {"inputs": "oblong|a cube|complex|longer", "data": "longer|oblong|a cube|complex"}
FITTING_NAMES |= {"eigenvalues": "longer", "rank": "zero", "targets": "oblong|a cube"}


def fits(name: str, argument: str, label: str) -> bool:
    known = FITS.get((name, argument), "") + "|" + FITTING_NAMES.get(argument, "")
    return label in known.split("|") or (label == "None" and is_optional(name, argument))


@dataclasses.dataclass(frozen=True)
class Case:
    """One argument of one call with a value that does not fit it."""

    name: str
    argument: str
    label: str

    def __str__(self) -> str:
        return f"{self.name}({self.argument}={self.label})"

    @property
    def value(self) -> Any:
        return KINDS[kind_of(self.name, self.argument)][self.label]


def kind_of(name: str, argument: str) -> str:
    return EXCEPTIONS.get((name, argument)) or KIND_OF[argument]


def callable_of(name: str) -> Any:
    room, _, last = name.rpartition(".")
    return getattr(
        importlib.import_module(f"manifoldflow.{room}" if room else "manifoldflow"), last
    )


def cases() -> list[Case]:
    return [
        Case(name, argument, label)
        for name, arguments in CALLS.items()
        for argument in arguments
        for label in KINDS[kind_of(name, argument)]
        if not fits(name, argument, label)
    ]


@functools.cache
def is_optional(name: str, argument: str) -> bool:
    return inspect.signature(callable_of(name)).parameters[argument].default is None


def outcome(case: Case) -> str:
    """ "own", "nan", "accepted", or "raw: …" with the error."""
    arguments = CALLS[case.name] | {case.argument: case.value}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = callable_of(case.name)(**arguments)
            jax.block_until_ready([leaf for leaf in jax.tree.leaves(result) if eqx.is_array(leaf)])
    except Exception as error:
        if is_own(error) or is_theirs(error, case.value):
            return "own"
        return f"raw: {where(error)}"
    return "nan" if has_nan(result) else "accepted"


def has_nan(result: Any) -> bool:
    leaves = [np.asarray(x) for x in jax.tree.leaves(result) if _is_float(x)]
    return any(np.isnan(leaf).any() for leaf in leaves)


def _is_float(leaf: Any) -> bool:
    is_array = eqx.is_array_like(leaf) and not isinstance(leaf, bool | complex)
    return is_array and jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)


def is_own(error: Exception) -> bool:
    """Whether the library raised it on purpose: a `raise` in its source, or its RESULTS."""
    if isinstance(error, eqx.EquinoxRuntimeError):
        return any(mf.RESULTS[r] in str(error) for r in members()) or is_sentence(str(error))
    if not isinstance(error, ValueError | TypeError | RuntimeError | MemoryError):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return frame.lineno in raising_lines(frame.filename)


def is_theirs(error: Exception, value: Any) -> bool:
    """Whether a function of the caller failed on arrays, which it alone can judge."""
    frames = [pathlib.Path(f.filename) for f in traceback.extract_tb(error.__traceback__)]
    own = max((i for i, path in enumerate(frames) if PACKAGE in path.parents), default=-1)
    is_inside = any(path.name == "fuzz_table.py" for path in frames[own + 1 :])
    return is_inside and isinstance(value, np.ndarray | jax.Array) and value.dtype.kind in "fibc"


@functools.cache
def members() -> tuple[Any, ...]:
    return tuple(
        getattr(mf.RESULTS, name) for name in mf.RESULTS._name_to_item if name != "successful"
    )


@functools.cache
def raising_lines(filename: str) -> set[int]:
    path = pathlib.Path(filename)
    if PACKAGE not in path.parents:
        return set()
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    raises = [node for node in nodes if isinstance(node, ast.Raise)]
    return {line for r in raises for line in range(r.lineno, (r.end_lineno or r.lineno) + 1)}


@functools.cache
def source() -> str:
    return " ".join(p.read_text(encoding="utf-8") for p in sorted(PACKAGE.rglob("*.py")))


def is_sentence(message: str) -> bool:
    """Whether an error inside a compiled program is one that the library wrote."""
    return message.strip().split("\n")[0][:25] in source()


def where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if PACKAGE in pathlib.Path(f.filename).parents]
    place = ""
    if ours:
        inside = [f for f in ours if not f.filename.endswith("_boundary.py")] or ours
        place = f"{pathlib.Path(inside[-1].filename).relative_to(PACKAGE)}:{inside[-1].lineno}"
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__} at {place}: {first[:100]}"


def sampled(seed: int, count: int | None) -> list[Case]:
    """Some of all cases, in their order; without `count` all of them."""
    every = cases()
    picked = np.random.default_rng(seed).permutation(len(every))[:count]
    return [every[i] for i in sorted(picked)]


def main(seed: str, count: str, *only: str) -> None:
    for case in sampled(int(seed), None if count == "all" else int(count)):
        if not only or case.name in only or case.name.split(".")[0] in only:
            print(json.dumps([str(case), outcome(case)]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
