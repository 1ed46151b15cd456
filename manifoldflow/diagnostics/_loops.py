"""The circulation of a field round a loop, and round a manifold that is a closed curve."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _tree
from manifoldflow._types import Coordinates, Flag, Key, Point, Scalar, Tangent
from manifoldflow.manifolds import AbstractManifold

Field = Callable[[Coordinates], Tangent]
_MAX_NODES = 4096
_MAX_STEPS = 20_000
_STEP = 0.1  # of a walk, in radii of curvature
_NODES, _WEIGHTS = (np.polynomial.legendre.leggauss(3)[k] for k in (0, 1))


class Circulation(NamedTuple):
    """∮⟨b, dγ⟩, and ∮|b||dγ|."""

    value: float
    path_integral: float


def circulation_of(
    field: Field,
    split: Callable[[Point], tuple[Coordinates, Point]],
    loop: Callable[[Any], Point],
    tolerance: float,
) -> Circulation:
    """By the trapezoidal rule, which converges fast on a smooth loop; refined until it has."""
    ends = [_tree.ravel(split(loop(jnp.asarray(t)))[0])[0] for t in (0.0, 1.0)]
    reach = max(float(jnp.linalg.norm(ends[0])), 1e-300)
    gap = float(jnp.linalg.norm(ends[1] - ends[0]))
    if not gap <= tolerance * reach:
        raise ValueError(
            f"is_gradient_flow needs a closed loop, loop(0) = loop(1); its ends are {gap:.2e} apart."
        )

    @jax.jit
    def at(times: Float[Array, " n"]) -> tuple[Array, Array]:
        def rates(t: Scalar) -> tuple[Scalar, Scalar]:
            x, moving = jax.jvp(lambda t: split(loop(t))[0], (t,), (jnp.ones_like(t),))
            b = field(x)
            return _tree.inner(b, moving), _tree.norm(b) * _tree.norm(moving)

        return jax.lax.map(rates, times)

    def integral(offset: float, count: int) -> np.ndarray:
        return np.array([np.mean(x) for x in at((jnp.arange(count) + offset) / count)])

    count, found = 32, integral(0.0, 32)
    while count < _MAX_NODES:
        finer, count = (found + integral(0.5, count)) / 2, 2 * count
        if np.all(np.abs(finer - found) <= tolerance / 4 * finer[1]):
            return Circulation(float(finer[0]), float(finer[1]))
        found = finer
    raise ValueError(
        f"is_gradient_flow cannot integrate round this loop with {_MAX_NODES} nodes. Give one that "
        "is smooth all round."
    )


class _Here(NamedTuple):
    """A point of a curve, the direction in which to go on, and how far in one step."""

    point: Point
    direction: Tangent
    length: Scalar


def closed_curve(
    field: Field, manifold: AbstractManifold, point: Point, tolerance: float, key: Key
) -> Circulation | None:
    """Round a manifold of dimension 1; None if it does not come back.

    In steps of the orthographic retraction, which reaches a point y from x by ⟨y − x, t⟩ along the
    unit tangent t: so the last step ends exactly at the start.
    """
    start = _here(manifold, point, manifold.random_tangent(point, key))
    here, total = start, np.zeros(2)
    for number in range(_MAX_STEPS):
        left, is_last = _left(manifold, here, start) if number else (here.length, False)
        length = left if bool(is_last) else here.length
        here, part = _step(field, manifold, here, length)
        total += np.asarray(part)
        if not np.all(np.isfinite(total)):
            return None
        if bool(is_last):
            gap = _tree.subtract(manifold.split(here.point)[0], manifold.split(start.point)[0])
            is_back = float(_tree.norm(gap)) <= np.sqrt(tolerance) * float(start.length)
            return Circulation(float(total[0]), float(total[1])) if is_back else None
    return None


@eqx.filter_jit
def _here(manifold: AbstractManifold, point: Point, towards: Tangent) -> _Here:
    local = manifold.local(point)
    direction = local.space.tangent(towards)
    direction = _tree.scale(1 / _tree.norm(direction), direction)
    curvature = _tree.norm(local.form(direction, direction))
    # Where it is straight the distance from the origin is all there is to go by.
    size = _tree.norm(local.coordinates)
    curvature = jnp.maximum(curvature, 1 / jnp.where(size > 0, size, 1))
    return _Here(point, direction, _STEP / curvature)


@eqx.filter_jit
def _left(manifold: AbstractManifold, here: _Here, start: _Here) -> tuple[Scalar, Flag]:
    """How far it is to the start along the tangent, and whether that is the next step."""
    way = _tree.subtract(manifold.split(start.point)[0], manifold.split(here.point)[0])
    left = _tree.inner(way, here.direction)
    aside = _tree.norm(_tree.subtract(way, _tree.scale(left, here.direction)))
    is_ahead = (left > 0) & (left <= here.length) & (aside <= here.length / 2)
    return left, is_ahead & (_tree.inner(here.direction, start.direction) > 0)


@eqx.filter_jit
def _step(
    field: Field, manifold: AbstractManifold, here: _Here, length: Scalar
) -> tuple[_Here, Float[Array, " 2"]]:
    """One step, and both integrals along it by three Gauss nodes.

    With t₀ the tangent at the start, a step h of the retraction has ⟨dγ/dh, t₀⟩ = 1.
    """
    shares = jnp.asarray(np.append((_NODES + 1) / 2, 1.0), length.dtype)

    def at(share: Scalar) -> tuple[Coordinates, Array]:
        step = _tree.scale(share * length, here.direction)
        there, _ = manifold.retract_with_info(here.point, step, throw=False)
        x = manifold.split(there)[0]
        tangent = manifold.normal_space(there).tangent(here.direction)
        # dγ = t/⟨t, t₀⟩ dh, with t = P t₀ of any length.
        moving = _tree.scale(1 / _tree.inner(tangent, here.direction), tangent)
        b = field(x)
        return x, jnp.stack([_tree.inner(b, moving), _tree.norm(b) * _tree.norm(moving)])

    points, rates = jax.lax.map(at, shares)
    weights = jnp.asarray(_WEIGHTS / 2, length.dtype)
    end = _tree.join(jax.tree.map(lambda leaf: leaf[-1], points), manifold.split(here.point)[1])
    return _here(manifold, end, here.direction), length * (weights @ rates[:3])
