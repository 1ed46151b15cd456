"""Parallel transport along any path: a linear differential equation on a moving tangent space."""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import is_traced
from manifoldflow._results import delivered, or_nan, RESULTS
from manifoldflow._types import Flag, Point, Scalar, Tangent
from manifoldflow.geometry._geodesics import ended, FIRST_STEP, GeodesicOptions, last, MAX_STEPS
from manifoldflow.manifolds import AbstractManifold


class _TransportField(eqx.Module):
    """The field V′ = II(γ′, V) along a given path."""

    manifold: AbstractManifold
    path: Callable[..., Any]

    def __call__(self, t: Any, y: Tangent, args: Any) -> Tangent:
        del args
        of_time = lambda t: self.manifold.split(self.path(t))[0]
        x, velocity = jax.jvp(of_time, (t,), (jnp.ones_like(t),))
        remainder = self.manifold.split(self.path(t))[1]
        space = self.manifold.normal_space(_tree.join(x, remainder))
        # Diffrax keeps one precision for all leaves.
        vector, velocity = _tree.cast_like(y, x), _tree.cast_like(velocity, x)
        return self.manifold.local(_tree.join(x, remainder), space=space).form(velocity, vector)


@checked
def parallel_transport(
    manifold: AbstractManifold,
    path: Callable[[Scalar], Point],
    vector: Tangent,
    *,
    walk: GeodesicOptions | None = None,
    throw: bool = True,
) -> Tangent:
    """The parallel transport of a tangent at path(0) along a path to path(1).

    Args:
        manifold: the manifold.
        path: time in [0, 1] → point of the manifold, differentiable in forward mode: one
            that is solved for, as by `geodesic`, with
            `GeodesicOptions(adjoint=diffrax.ForwardMode())`.
        vector: a tangent at path(0); its tangent part counts.
        walk: the options for solving.
        throw: as for `geodesic`.

    Returns:
        A tangent at path(1), as long as the tangent part of the vector.

    Raises:
        ValueError: the path leaves the manifold (checked at its ends and in its middle).
        EquinoxRuntimeError: with the message of the `RESULTS` member; under a trace, also where
            the path leaves the manifold.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> sphere = mf.LevelSet(lambda x: x @ x - 1)
        >>> arc = lambda t: jnp.stack([jnp.cos(t), jnp.sin(t), 0 * t])  # on the equator
        >>> print(mf.parallel_transport(sphere, arc, jnp.array([0.0, 1.0, 1.0])).round(3))
        [-0.841  0.54   1.   ]
    """
    path = _tree.as_pytree_callable(path)
    ends = [path(jnp.asarray(t)) for t in (0.0, 0.5, 1.0)]
    if not is_traced((manifold, ends)):
        with jax.ensure_compile_time_eval():
            for time, point in zip((0.0, 0.5, 1.0), ends):
                if not bool(manifold.is_on(point, tol=1e-4)):
                    raise ValueError(
                        f"The path must lie on the manifold; at time {time} it is "
                        f"{float(manifold.defect(point)):.3g} away. Wrap it in manifold.project."
                    )
    coordinates, _ = manifold.split(ends[0])
    vector = _tree.as_tangent(coordinates, vector)
    return delivered(*_transported(manifold, path, vector, walk or GeodesicOptions()), throw)


def _is_on_path(manifold: AbstractManifold, path: Callable[..., Any], time: Scalar) -> Flag:
    fixed, steady = jax.tree.map(
        lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, (manifold, path)
    )
    return fixed.is_on(steady(time), tol=1e-4)


@eqx.filter_jit
def _transported(
    manifold: AbstractManifold, path: Callable[..., Any], vector: Tangent, walk: GeodesicOptions
) -> tuple[Tangent, RESULTS]:
    dtype = _tree.dtype_of(vector)
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    size = _tree.size_of(jax.lax.stop_gradient(vector))
    solution = dfx.diffeqsolve(
        dfx.ODETerm(_TransportField(manifold, path)),
        walk.solver,
        zero,
        one,
        None,
        manifold.normal_space(path(zero)).tangent(vector),
        stepsize_controller=walk.controller(size, jnp.asarray(FIRST_STEP, dtype)),
        adjoint=walk.adjoint,
        max_steps=MAX_STEPS,
        throw=False,
    )
    assert solution.ys is not None
    # Transport keeps vectors tangent; what the solver left off it is its error.
    reached = _tree.cast_like(last(solution.ys), vector)
    moved = manifold.normal_space(path(one)).tangent(reached)
    result = ended(solution, moved)
    is_on = jax.lax.map(lambda time: _is_on_path(manifold, path, time), jnp.linspace(zero, one, 3))
    result = _tree.where(jnp.all(is_on), result, RESULTS.not_on_manifold)
    is_there = result == RESULTS.successful
    return or_nan(moved, is_there, of=(manifold, path, vector)), result
