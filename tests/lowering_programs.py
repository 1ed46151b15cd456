"""Lowers the hot functions for accelerators that are not there; run by test_lowering.py.

In a process of its own: only before Equinox is imported can its checks of values, which call
back to Python, be turned into NaN (EQX_ON_ERROR=nan).
"""

import json
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import manifoldflow as mf
import quick
from manifoldflow import linalg

SPHERE = mf.LevelSet(lambda x: jnp.sum(x**2) - 1.0)
POINT, TANGENT = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 0.5, 0.2])
MODEL = eqx.nn.MLP(2, "scalar", 3, 1, activation=jnp.tanh, key=jr.key(0))
INPUTS, TARGETS = jr.normal(jr.key(1), (3, 2)), jnp.array([0.3, -0.2, 0.1])
LABELS = mf.LabelNoise(std=1.0, batch_size=1)


def on_sphere(fn):
    """A function of manifold, point and tangent."""
    return lambda: (lambda x, v: fn(SPHERE, x, v), (POINT, TANGENT))


def on_loss(fn):
    """A function of loss, its manifold and a model."""

    def program():
        arrays, static = eqx.partition((MODEL, INPUTS, TARGETS), eqx.is_array)

        def of_arrays(arrays):
            model, inputs, targets = eqx.combine(arrays, static)
            loss = mf.LeastSquares(inputs, targets)
            return eqx.filter(fn(loss, mf.ZeroLossManifold(loss), model), eqx.is_array)

        return of_arrays, (arrays,)

    return program


def flow(manifold, noise=LABELS):
    return mf.LimitDiffusion(manifold, noise)


def height(x):
    return x[2] + x[0] * x[1]


PROGRAMS = {
    "value_and_grad": on_loss(lambda l, m, p: eqx.filter_value_and_grad(l)(p)),
    "hessian": on_loss(lambda l, m, p: l.hessian(p).mv(l.gradient(p))),
    "trace_gauss_newton": on_loss(lambda l, m, p: l.trace_gauss_newton(p)),
    "tangent_projection": on_loss(lambda l, m, p: m.tangent_projection(p, l.gradient(p))),
    "defect, rank": on_loss(lambda l, m, p: (m.defect(p), m.rank(p))),
    "project": on_loss(lambda l, m, p: m.project(p, throw=False)),
    "retract": on_sphere(lambda m, x, v: m.retract(x, v, throw=False)),
    "drift": on_loss(lambda l, m, p: flow(m).drift(p)),
    "drift, any noise": on_loss(lambda l, m, p: flow(m, mf.IsotropicNoise()).drift(p)),
    "limit_map": on_loss(lambda l, m, p: mf.limit_map(l, p, throw=False)),
    "limit_map_derivative": on_sphere(mf.limit_map_derivative),
    "limit_map_second_derivative": on_loss(
        lambda l, m, p: mf.limit_map_second_derivative(m, p, mf.IsotropicNoise().factor(l, p))
    ),
    "solve": on_loss(lambda l, m, p: mf.solve(flow(m), p, end_time=0.1, throw=False).points),
    "solve, stochastic": on_sphere(
        lambda m, x, v: (
            mf.solve(mf.BrownianMotion(m), x, end_time=0.1, key=jr.key(0), throw=False).points
        )
    ),
    "simulate": on_loss(
        lambda l, m, p: (
            mf.simulate(
                l, LABELS, optax.sgd, p, learning_rate=0.1, num_steps=5, key=jr.key(0)
            ).points
        )
    ),
    "geodesic": on_sphere(lambda m, x, v: mf.geodesic(m, x, v, jnp.array([0.5, 1.0]))),
    "logarithm_map": on_sphere(lambda m, x, v: mf.logarithm_map(m, x, -v / 0.3, throw=False)),
    "parallel_transport": on_sphere(lambda m, x, v: mf.transport_along_geodesic(m, x, v, v, 1.0)),
    "mean_curvature": on_loss(lambda l, m, p: mf.mean_curvature(m, p)),
    "scalar_curvature": on_sphere(lambda m, x, v: mf.scalar_curvature(m, x)),
    "covariant_hessian": on_sphere(lambda m, x, v: mf.covariant_hessian(m, height, x).mv(v)),
    "minimize": on_sphere(lambda m, x, v: mf.minimize(m, height, x, throw=False).points),
    "largest_eigenvalues": on_loss(lambda l, m, p: linalg.largest_eigenvalues(l.hessian(p), 1)),
}


# QR has no promise of compatibility between versions of its library, which matters only for
# programs that are kept.
UNPROMISED = [
    jax.export.DisabledSafetyCheck.custom_call(name)
    for name in ("cusolver_geqrf_ffi", "cusolver_ormqr_ffi")
]


def lower(name: str) -> dict[str, Any]:
    """For which platforms a function was lowered, or why it was not."""
    fn, arguments = PROGRAMS[name]()
    export = jax.export.export(jax.jit(fn), platforms=("tpu", "cuda"), disabled_checks=UNPROMISED)
    try:
        return {"name": name, "platforms": export(*arguments).platforms}
    except Exception as error:
        return {"name": name, "error": repr(error)[:1000]}


def main() -> None:
    quick.settle()
    for name in sys.argv[1:] or PROGRAMS:
        print(json.dumps(lower(name)), flush=True)


if __name__ == "__main__":
    main()
