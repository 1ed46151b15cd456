"""The quadratic model of a trust region, minimised by truncated conjugate gradients."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from manifoldflow import _tree
from manifoldflow._types import Flag, Scalar, Tangent


class ModelStep(eqx.Module):
    """A step within the radius that lowers the model ⟨g, v⟩ + ½⟨v, Hv⟩.

    Attributes:
        vector: v.
        decrease: the amount by which it lowers the model.
        is_at_boundary: True if it is as long as the radius allows.
        num_products: products with H.
    """

    vector: Tangent
    decrease: Scalar
    is_at_boundary: Flag
    num_products: Int[Array, ""]


class _State(eqx.Module):
    vector: Tangent
    image: Tangent  # Hv
    residual: Tangent  # g + Hv
    direction: Tangent
    is_at_boundary: Flag
    is_done: Flag
    num_products: Int[Array, ""]


def truncated_cg(
    product: Callable[[Tangent], Tangent],
    gradient: Tangent,
    radius: Scalar,
    tolerance: Scalar,
    max_products: int,
) -> ModelStep:
    """Truncated conjugate gradients, the method of Steihaug and Toint.

    Conjugate gradients from zero until the residual is at most `tolerance`; on directions
    of negative curvature, and where the next iterate would be outside, to the boundary.

    Args:
        product: v ↦ Hv.
        gradient: g.
        radius: of the trust region.
        tolerance: bound on ‖g + Hv‖.
        max_products: bound on the products with H.

    References:
        [Steihaug1983]; [AbsilBakerGallivan2007, Algorithm 2].
    """

    # In units of the gradient: in single precision the squares of a small one are zero.
    gradient, size = _tree.in_own_units(gradient)
    radius, tolerance = radius / size, tolerance / size

    def going(state: _State) -> Flag:
        return ~state.is_done & (state.num_products < max_products)

    def step(state: _State) -> _State:
        vector, direction, residual = state.vector, state.direction, state.residual
        image = product(direction)
        curvature = _tree.inner(direction, image)
        square = _tree.inner(residual, residual)
        length = square / _tree.where(curvature > 0, curvature, 1)
        ahead = _tree.add(vector, _tree.scale(length, direction))
        # True for NaN as well: the step before is then kept.
        goes_out = ~(curvature > 0) | (_tree.norm(ahead) >= radius)
        length = _tree.where(goes_out, _to_boundary(vector, direction, radius), length)
        new_residual = _tree.add(residual, _tree.scale(length, image))
        new_square = _tree.inner(new_residual, new_residual)
        turned = _tree.subtract(_tree.scale(new_square / square, direction), new_residual)
        new = _State(
            _tree.add(vector, _tree.scale(length, direction)),
            _tree.add(state.image, _tree.scale(length, image)),
            new_residual,
            turned,
            goes_out,
            goes_out | (jnp.sqrt(new_square) <= tolerance),
            state.num_products + 1,
        )
        # In exact arithmetic the model falls at every step. Where it does not, rounding has
        # taken over (or H is not finite): the step before was the best.
        is_better = _decrease(gradient, new) > _decrease(gradient, state)
        kept = eqx.tree_at(
            lambda s: (s.is_done, s.num_products),
            state,
            (jnp.asarray(True), state.num_products + 1),
        )
        return _tree.where(is_better, new, kept)

    zero, false = _tree.zeros_like(gradient), jnp.asarray(False)
    start = _State(zero, zero, gradient, _tree.scale(-1, gradient), false, false, jnp.asarray(0))
    end = jax.lax.while_loop(going, step, start)
    return ModelStep(
        _tree.scale(size, end.vector),
        size**2 * _decrease(gradient, end),
        end.is_at_boundary,
        end.num_products,
    )


def _decrease(gradient: Tangent, state: _State) -> Scalar:
    """The decrease −⟨g, v⟩ − ½⟨v, Hv⟩ of the model, as −½⟨v, g + residual⟩."""
    return -_tree.inner(state.vector, _tree.add(gradient, state.residual)) / 2


def _to_boundary(vector: Tangent, direction: Tangent, radius: Scalar) -> Scalar:
    """The τ > 0 with ‖v + τd‖ = radius, for v inside."""
    a, b = _tree.inner(direction, direction), _tree.inner(vector, direction)
    room = jnp.maximum(radius**2 - _tree.inner(vector, vector), 0)
    root = jnp.sqrt(b**2 + a * room)
    # Of the two ways to write the solution, the one that does not cancel.
    return _tree.where(b > 0, room / _tree.where(b > 0, b + root, 1), (root - b) / a)
