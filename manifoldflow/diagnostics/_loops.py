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
_MAX_STEPS = 2000
_FAR = 1e6  # how far from the start a curve is followed, in first steps
_STEP = 0.1  # of a walk, in radii of curvature
_NODES, _WEIGHTS = (np.polynomial.legendre.leggauss(3)[k] for k in (0, 1))


class Circulation(NamedTuple):
    """∮⟨b, dγ⟩, ∮|b||dγ|, and what rounding makes of the latter."""

    value: float
    path_integral: float
    rounding: float

    def is_still(self, tolerance: float) -> bool:
        return abs(self.value) <= tolerance * self.path_integral + 10 * self.rounding


def jittered(x: Coordinates) -> Coordinates:
    """The same point but for a few roundings: a drift that vanishes is another one there."""
    size = 4 * _tree.eps_of(x)
    signs = lambda leaf: 1 - 2 * (jnp.arange(leaf.size).reshape(leaf.shape) % 2)
    return jax.tree.map(lambda leaf: leaf * (1 + size * signs(leaf).astype(leaf.dtype)), x)


def _rates(field: Field, x: Coordinates, moving: Tangent) -> Float[Array, " 3"]:
    """The integrands of a `Circulation`."""
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), x, jittered(x))
    drifts = jax.lax.map(field, both)  # one copy of the drift in the program
    b, near = (jax.tree.map(lambda leaf, k=k: leaf[k], drifts) for k in (0, 1))
    # A drift that vanishes is rounding: its circulation must be seen against that.
    speed, gap = _tree.norm(moving), _tree.norm(_tree.subtract(b, near))
    return jnp.stack([_tree.inner(b, moving), _tree.norm(b) * speed, gap * speed])


def circulation_of(
    field: Field,
    split: Callable[[Point], tuple[Coordinates, Point]],
    loop: Callable[[Any], Point],
    tolerance: float,
) -> Circulation:
    """The circulation ∮⟨b, dγ⟩ round a loop, by the trapezoidal rule until it converges."""
    ends = [_tree.ravel(split(loop(jnp.asarray(t)))[0])[0] for t in (0.0, 1.0)]
    reach = max(float(jnp.linalg.norm(ends[0])), 1e-300)
    gap = float(jnp.linalg.norm(ends[1] - ends[0]))
    if not gap <= tolerance * reach:
        raise ValueError(
            f"is_gradient_flow needs a loop with loop(0) = loop(1); its ends are {gap:.1e} apart."
        )

    @jax.jit
    def at(times: Float[Array, " n"]) -> Float[Array, "n 3"]:
        def rates(t: Scalar) -> Float[Array, " 3"]:
            x, moving = jax.jvp(lambda t: split(loop(t))[0], (t,), (jnp.ones_like(t),))
            return _rates(field, x, moving)

        return jax.lax.map(rates, times)

    def integral(offset: float, count: int) -> np.ndarray:
        return np.mean(np.asarray(at((jnp.arange(count) + offset) / count)), axis=0)

    count, found = 32, integral(0.0, 32)
    while count < _MAX_NODES and np.all(np.isfinite(found)):
        finer, count = (found + integral(0.5, count)) / 2, 2 * count
        if abs(finer[0] - found[0]) <= tolerance / 4 * finer[1] + 10 * finer[2]:
            return Circulation(*map(float, finer))
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
    here, total, reach = start, np.zeros(3), _FAR * float(start.length)
    for number in range(_MAX_STEPS):
        left, is_last = _left(manifold, here, start) if number else (here.length, False)
        length = left if bool(is_last) else here.length
        here, part = _step(field, manifold, here, length)
        total += np.asarray(part)
        if not np.all(np.isfinite(total)) or float(_gap(manifold, here, start)) > reach:
            return None
        if bool(is_last):
            is_back = float(_gap(manifold, here, start)) <= np.sqrt(tolerance) * float(start.length)
            return Circulation(*map(float, total)) if is_back else None
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
def _gap(manifold: AbstractManifold, here: _Here, start: _Here) -> Scalar:
    ends = (manifold.split(place.point)[0] for place in (here, start))
    return _tree.norm(_tree.subtract(*ends))


@eqx.filter_jit
def _left(manifold: AbstractManifold, here: _Here, start: _Here) -> tuple[Scalar, Flag]:
    """The distance to the start along the tangent, and True where the next step reaches it."""
    way = _tree.subtract(manifold.split(start.point)[0], manifold.split(here.point)[0])
    left = _tree.inner(way, here.direction)
    aside = _tree.norm(_tree.subtract(way, _tree.scale(left, here.direction)))
    is_ahead = (left > 0) & (left <= here.length) & (aside <= here.length / 2)
    return left, is_ahead & (_tree.inner(here.direction, start.direction) > 0)


@eqx.filter_jit
def _step(
    field: Field, manifold: AbstractManifold, here: _Here, length: Scalar
) -> tuple[_Here, Float[Array, " 3"]]:
    """One step, and the integrals along it by three Gauss nodes.

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
        return x, _rates(field, x, moving)

    points, rates = jax.lax.map(at, shares)
    weights = jnp.asarray(_WEIGHTS / 2, length.dtype)
    end = _tree.join(jax.tree.map(lambda leaf: leaf[-1], points), manifold.split(here.point)[1])
    return _here(manifold, end, here.direction), length * (weights @ rates[:3])
