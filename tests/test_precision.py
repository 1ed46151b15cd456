"""Every product of ours asks for full precision, which single precision on GPUs needs."""

import pathlib
import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import close, equal
from manifoldflow import _precision

PACKAGE = pathlib.Path(mf.__file__).parent


def predict(p, x):
    """A network without any product of matrices, so that all that are seen are ours."""
    hidden = jnp.tanh(jnp.sum(p["in"] * x, axis=1))
    return jnp.sum(p["out"] * hidden)


def example_loss(p, x):
    """Of a network with a symmetry."""
    return (jnp.sum(p["out"] * jnp.sum(p["in"] * x, axis=1)) - 1) ** 2


INPUTS = jr.normal(jr.key(0), (3, 2))
POINT = {"in": jr.normal(jr.key(1), (4, 2)), "out": jr.normal(jr.key(2), (4,))}
LOSS = mf.LeastSquares(INPUTS, jnp.array([0.1, -0.2, 0.3]), predict=predict)
GAMMA = mf.ZeroLossManifold(LOSS)
FLOWS = {
    "label": mf.LimitDiffusion(GAMMA, mf.LabelNoise(1.0)),
    "isotropic": mf.LimitDiffusion(GAMMA, mf.IsotropicNoise()),
    "custom": mf.LimitDiffusion(
        GAMMA, mf.CustomNoise(lambda p: jax.tree.map(lambda leaf: leaf[..., None], p))
    ),
}
HOT = {
    "project": lambda p: GAMMA.project(p, throw=False),
    "retract": lambda p: GAMMA.retract(p, p, throw=False),
    "limit_map": lambda p: mf.limit_map(LOSS, p, throw=False),
    "gradient of limit_map": jax.grad(
        lambda p: jnp.sum(mf.limit_map(LOSS, p, throw=False, max_steps=5)["out"])
    ),
    "solve": lambda p: mf.solve(FLOWS["label"], p, end_time=0.1, throw=False).points,
    "minimize": lambda p: mf.minimize(GAMMA, LOSS.trace_gauss_newton, p, throw=False).points,
    "exponential_map": lambda p: mf.exponential_map(GAMMA, p, p, throw=False),
    "MinimizerManifold": lambda p: mf.MinimizerManifold(LOSS, 3).project(p, throw=False),
    "gradient of eigh": jax.grad(
        lambda p: jnp.sum(mf.linalg.eigh(p["out"] * p["out"][:, None])[1][0])
    ),
    "second derivative of λ_max": lambda p: jax.jvp(
        jax.grad(lambda q: mf.linalg.gram_largest_eigenvalue(LOSS.jacobian(q))), (p,), (p,)
    ),
    "noise_equilibrium": lambda p: mf.symmetry.noise_equilibrium(
        mf.symmetry.ExponentialSymmetry({"in": 1.0, "out": -1.0}),
        example_loss,
        p,
        INPUTS,
        noise_scale=0.1,
    ),
    **{f"drift, {name}": flow.drift for name, flow in FLOWS.items()},
}


def products(jaxpr):
    """All `dot_general` in a program, those of what it calls included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


@pytest.mark.parametrize("name", HOT)
def test_all_products_of_the_hot_functions(name):
    found = list(products(jax.make_jaxpr(HOT[name])(POINT).jaxpr))
    assert found, "no product was seen at all"
    highest = (jax.lax.Precision.HIGHEST,) * 2
    cut = [e for e in found if e.params["precision"] not in (highest, jax.lax.Precision.HIGHEST)]
    assert not cut, f"{len(cut)} of {len(found)} products: {cut[0]}"


def test_a_product_without_precision_is_seen():
    found = list(products(jax.make_jaxpr(jax.jit(lambda x: x @ x))(jnp.eye(2)).jaxpr))
    equal("products", len(found), 1)
    assert found[0].params["precision"] is None


@pytest.mark.quick
def test_one_file_owns_precision():
    """Nobody else names a precision; `theory` computes in NumPy."""
    wrong = [
        f"{path.relative_to(PACKAGE)}: {match.group()}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "_precision.py" and "theory" not in path.parts
        for match in re.finditer(
            r"Precision\.\w+|matmul_precision|finfo\([^)]*\)\.eps|precision=", path.read_text()
        )
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.quick
def test_what_rounding_is():
    equal("eps", _precision.eps_of_dtype(jnp.float32), 2.0**-23)
    equal("eps", _precision.eps_of_dtype(np.ones(2)), 2.0**-52)
    assert _precision.is_double(jnp.float64) and not _precision.is_double(jnp.float32)
    x, y = jr.normal(jr.key(0), (2, 3, 3))
    close("matmul", _precision.matmul(x, y), np.asarray(x) @ np.asarray(y), 1e-14)
    close("einsum", _precision.einsum("ij,jk->ik", x, y), np.asarray(x) @ np.asarray(y), 1e-14)
    close("vdot", _precision.vdot(x, y), np.sum(np.asarray(x) * np.asarray(y)), 1e-14)
    close("tensordot", _precision.tensordot(x, y, 1), np.asarray(x) @ np.asarray(y), 1e-14)
