"""Charges of symmetries that are not linear in θ, and the check that a loss conserves them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked, checked_concrete
from manifoldflow._errors import checked_count, checked_positive
from manifoldflow._types import Coordinates, Example, Point, Scalar, Tangent
from manifoldflow.symmetry._check import asymmetry_of, default_tolerance, share, SymmetryCheck
from manifoldflow.symmetry._generators import Function
from manifoldflow.symmetry._gradients import (
    checked_examples,
    example_value,
    ExampleLoss,
    over_chunks,
)

_NUM_STEPS = 32  # of a Runge-Kutta method of order 4, for a tenth of the scale of the flow


class Charge(eqx.Module):
    """The charge C with ∇C = K and C(θ₀) = 0, for a velocity field K of symmetries.

    C(θ) = ∫₀¹ K(θ₀ + s(θ − θ₀))·(θ − θ₀) ds. K(θ) = dQ_ρ(θ)/dρ at ρ = 0 for transformations Q_ρ
    under which every ℓ(θ, z) stays the same, for example (a, b) ↦ (a + ρ, e^{−ρ}b) where a and b
    enter as eᵃ·b. Then ∇C·∇ℓ = 0: gradient flow conserves C, and SGD moves it at the rate of
    `charge_drift`. Derivatives of C are those of K: ∇C is K itself, ∇²C its derivative.

    Args:
        velocity_fn: K, point → PyTree like the point's coordinates. For a linear K use
            `ExponentialSymmetry`.
        origin: θ₀, a point; the straight line from there to θ must be free of singularities.
        num_nodes: of the Gauss-Legendre rule for the integral. C is exact for polynomials K up to
            degree 2·num_nodes − 1, its derivatives always.

    Assumes:
        K is a gradient, so that ∂K is symmetric, and the loss has the symmetry. `check_charge`
        tests both.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> velocity = lambda p: {"a": jnp.array(1.0), "b": -p["b"]}  # eᵃ·b stays
        >>> start = {"a": jnp.array(0.0), "b": jnp.array(0.0)}
        >>> charge = symmetry.Charge(velocity, start)  # a − ½b²
        >>> print(round(float(charge({"a": jnp.array(3.0), "b": jnp.array(2.0)})), 4))
        1.0

    References:
        [Ziyin2024, eqs. (3) to (5)].
    """

    velocity_fn: Callable[..., Any]
    origin: Point
    num_nodes: int = eqx.field(static=True)

    @checked
    def __init__(self, velocity_fn: Callable[[Point], Any], origin: Point, *, num_nodes: int = 16):
        self.velocity_fn = _tree.as_pytree_callable(velocity_fn)
        _tree.split(origin)  # refuses what is no point
        self.origin = origin
        self.num_nodes = checked_count("Charge: num_nodes", num_nodes)

    @checked
    def __call__(self, point: Point) -> Scalar:
        coordinates, remainder = _tree.split(point)
        start = _tree.as_tangent(coordinates, _tree.split(self.origin)[0], "Charge: origin")

        def velocity(x: Coordinates) -> Tangent:
            found = self.velocity_fn(_tree.join(x, remainder))
            return _tree.as_tangent(x, _tree.split(found)[0], "The value of velocity_fn")

        return _integral(velocity, start, coordinates, self.num_nodes)


def _integral(
    velocity: Callable[[Coordinates], Tangent],
    start: Coordinates,
    end: Coordinates,
    num_nodes: int,
) -> Scalar:
    """∫ K·dθ along the straight line, with K·v as its derivative."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)

    # ∇C is K itself. Through the quadrature it would be an average of K along the line, right only
    # to the rule's error.
    @jax.custom_jvp
    def charge(x: Coordinates) -> Scalar:
        way = _tree.subtract(x, start)
        at = lambda s: _tree.inner(velocity(_tree.add(start, _tree.scale(s, way))), way)
        dtype = _tree.dtype_of(x)
        # By a loop: one copy of K in the program, not one for each node.
        values = jax.lax.map(at, jnp.asarray((nodes + 1) / 2, dtype))
        return jnp.sum(values * jnp.asarray(weights / 2, dtype))

    @charge.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[Scalar, Scalar]:
        (x,), (v,) = primals, tangents
        return charge(x), _tree.inner(velocity(x), v)

    return charge(end)


@checked_concrete
def check_charge(
    charge: Callable[[Point], Any],
    example_loss: ExampleLoss,
    point: Point,
    data: PyTree[Any],
    *,
    tolerance: float | None = None,
) -> SymmetryCheck:
    """The check that ∇ℓ·∇C vanishes for every example and the flow θ′ = ∇C leaves ℓ unchanged.

    It is `check_symmetry` for charges that are not quadratic, and looks near this point only. Not
    for use inside jit.

    Args:
        charge: C, point → scalar; a `Charge`, or any function.
        example_loss: ℓ(point, example) → scalar.
        point: θ; a random one tells more than a minimum, where gradients vanish.
        data: PyTree of arrays with a leading axis of examples.
        tolerance: the bound on all three measures; None for 4e-11 in float64 and 2e-5 in float32.

    Returns:
        A `SymmetryCheck`: true or false, and printable. Its `asymmetry` is that of ∂∇C. It is not
        zero where the velocity of a `Charge` is no gradient, such as that of a rotation.

    Raises:
        ValueError: wrong data; a tolerance that is not positive; a call inside jit.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> loss = lambda p, x: (jnp.exp(p["a"]) * p["b"] * x - 1.0) ** 2
        >>> point, data = {"a": jnp.array(0.4), "b": jnp.array(0.7)}, jnp.arange(1.0, 4.0)
        >>> charge = lambda p: p["a"] - p["b"] ** 2 / 2
        >>> print(bool(symmetry.check_charge(charge, loss, point, data)))
        True
    """
    if tolerance is None:
        tolerance = default_tolerance(point)
    bound = float(checked_positive("check_charge: tolerance", tolerance))
    charge, example_loss = map(_tree.as_pytree_callable, (charge, example_loss))
    left, terms, losses, changes, asymmetry = _measured(
        charge, example_loss, point, checked_examples(data)
    )
    numbers = share(jnp.abs(left), terms), share(changes, losses), float(asymmetry)
    holds = all(number <= bound for number in numbers)
    return SymmetryCheck(*numbers, bound, int(jnp.argmax(jnp.abs(left))), holds)


@eqx.filter_jit
def _measured(
    charge: Callable[..., Any], example_loss: ExampleLoss, point: Point, data: PyTree[Array]
) -> tuple[Array, Array, Array, Array, Scalar]:
    coordinates, remainder = _tree.split(point)
    velocity = jax.grad(lambda x: jnp.asarray(charge(_tree.join(x, remainder))))
    along = velocity(coordinates)
    bend = Function(lambda v: jax.jvp(velocity, (coordinates,), (v,))[1])
    size = bend.norm(coordinates)
    parameter = 0.1 / jnp.where(size > 0, size, 1)
    moved = [_flowed(velocity, coordinates, sign * parameter) for sign in (1, -1)]
    loss = example_value(example_loss, remainder)

    def of_example(example: Example) -> tuple[Scalar, Scalar, Scalar, Scalar]:
        gradient = jax.grad(loss)(coordinates, example)
        products = jax.tree.leaves(jax.tree.map(jnp.multiply, gradient, along))
        left = sum(jnp.sum(leaf) for leaf in products)
        terms = sum(jnp.sum(jnp.abs(leaf)) for leaf in products)
        here = loss(coordinates, example)
        there = jnp.stack([loss(x, example) for x in moved])
        largest = jnp.maximum(jnp.max(jnp.abs(there)), jnp.abs(here))
        return jnp.asarray(left), jnp.asarray(terms), largest, jnp.max(jnp.abs(there - here))

    with _precision.full_precision():
        found = over_chunks(of_example, data, _tree.size(coordinates))
    return *found, asymmetry_of(bend, coordinates)


def _flowed(
    velocity: Callable[[Coordinates], Tangent], start: Coordinates, time: Scalar
) -> Coordinates:
    """θ(time) of θ' = K(θ), by the Runge-Kutta method of order 4."""
    step = time / _NUM_STEPS

    def body(x: Coordinates, _: None) -> tuple[Coordinates, None]:
        at = lambda part, slope: velocity(_tree.add(x, _tree.scale(part * step, slope)))
        first = velocity(x)
        second = at(0.5, first)
        third = at(0.5, second)
        fourth = at(1.0, third)
        inner = _tree.scale(2.0, _tree.add(second, third))
        total = _tree.add(_tree.add(first, inner), fourth)
        return _tree.add(x, _tree.scale(step / 6, total)), None

    return jax.lax.scan(body, start, None, length=_NUM_STEPS)[0]
