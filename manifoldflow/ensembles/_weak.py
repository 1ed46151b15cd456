"""Weak errors of an ensemble's mean, their order, and extrapolation to step zero."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from manifoldflow._boundary import checked
from manifoldflow._clock import check_same_clock
from manifoldflow._errors import checked_count, checked_positive, is_traced, real_numbers, shapes_of
from manifoldflow._jit import jit_part
from manifoldflow._results import Solution
from manifoldflow._types import Flag, Scalar
from manifoldflow.ensembles._statistics import statistics


class WeakError(eqx.Module):
    """The weak error E φ(X) − E φ(Y), estimated from finitely many members.

    Attributes:
        error: mean − reference, with its sign.
        standard_error: of that difference; the reference's own uncertainty is in it.
        count: members that went into the mean.
        num_failed: members left out.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> found = mf.ensembles.weak_error(jnp.array([0.9, 1.1]), 1.2)
        >>> print(found.error.round(3), found.standard_error.round(3), found.agrees())
        -0.2 0.1 True
    """

    error: PyTree[Array]
    standard_error: PyTree[Array]
    count: Int[Array, ""]
    num_failed: Int[Array, ""]

    def agrees(self, num_standard_errors: float = 4.0, bias: Any = 0.0) -> Flag:
        """True where |error| ≤ num_standard_errors·standard_error + bias, everywhere.

        It is never true when a standard error is unknown (fewer than two members).
        """

        def within(error: Array, standard_error: Array) -> Array:
            allowed = num_standard_errors * standard_error + bias
            return jnp.all((jnp.abs(error) <= allowed) & jnp.isfinite(allowed))

        agree = jax.tree.map(within, self.error, self.standard_error)
        return jnp.all(jnp.stack(jax.tree.leaves(agree)))


_ERROR = "reference_standard_error"


@checked
def weak_error(
    values: PyTree[Any], reference: PyTree[Any], reference_standard_error: Any = 0.0, axis: int = 0
) -> WeakError:
    """The weak error mean(values) − reference, and the standard error of that difference.

    Args:
        values: a PyTree of real arrays with an axis of members: φ(Xᵢ) of every member.
            Or a `Solution` with such an axis, whose points count.
        reference: the expected mean; of the structure of the values, without the
            axis of members. For a `Solution`, another one on the same clock, with saves at the
            same times.
        reference_standard_error: of the reference, of the same structure or one number,
            independent of the values.
        axis: of the members.

    Returns:
        The `WeakError`.

    Raises:
        ValueError: a reference of another structure or shape; solutions on different clocks.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> found = mf.ensembles.weak_error(jnp.array([0.9, 1.1]), 1.0)
        >>> print(bool(abs(found.error) < 1e-6), found.count)
        True 2
    """
    values, reference = _points(values, reference, axis)
    found = statistics(values, axis, levels=())
    reference = _like(found.mean, reference, "reference")
    for leaf in jax.tree.leaves(reference_standard_error):
        if not is_traced(leaf) and not np.all(real_numbers(_ERROR, leaf) >= 0):
            raise ValueError(f"{_ERROR} must not be negative or NaN; got {leaf}.")
    if isinstance(reference_standard_error, float | int):
        number = reference_standard_error
        reference_standard_error = jax.tree.map(
            lambda leaf: jnp.full(leaf.shape, number, leaf.dtype), found.mean
        )
    extra = _like(found.mean, reference_standard_error, "reference_standard_error")
    return WeakError(
        error=jax.tree.map(jnp.subtract, found.mean, reference),
        standard_error=jax.tree.map(jnp.hypot, found.standard_error, extra),
        count=found.count,
        num_failed=found.num_failed,
    )


def _points(values: Any, reference: Any, axis: int) -> tuple[Any, Any]:
    """The points of two solutions that can be compared; anything else as it is."""
    if not (isinstance(values, Solution) and isinstance(reference, Solution)):
        return values, reference
    check_same_clock("weak_error", values, reference)
    if not is_traced((values.times, reference.times)):
        times, expected = np.take(np.asarray(values.times), 0, axis), np.asarray(reference.times)
        if times.shape != expected.shape or not np.allclose(times, expected, rtol=1e-4):
            raise ValueError(
                f"weak_error compares saves at the same times; got {times} and {expected}. Ask "
                "for as many saves of both, to the same end_time."
            )
    return values.points, reference.points


def _like(mean: PyTree[Array], tree: PyTree[Any], name: str) -> PyTree[Array]:
    """The tree as arrays of the shapes of the mean, and never broadcast."""
    arrays = jax.tree.map(lambda leaf: jnp.asarray(real_numbers(name, leaf)), tree)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(both)] for both in (mean, arrays)]
    if jax.tree.structure(arrays) != jax.tree.structure(mean) or shapes[0] != shapes[1]:
        raise ValueError(
            f"{name} must have the structure and shapes of the values without their axis of "
            f"members, {shapes_of(mean)}; got {shapes_of(arrays)}."
        )
    return arrays


class Estimate(eqx.Module):
    """A number fitted to several measurements.

    Attributes:
        value: the estimate.
        standard_error: propagated from the standard errors of the measurements; without
            those, from the residuals of the fit, and infinite where there are none left.
        chi_squared: the sum of the squared residuals, in standard errors. Much above
            `num_excess`, the fit's formula does not hold for these measurements. NaN
            without standard errors.
        num_excess: measurements beyond those that the fit needs.

    Examples:
        >>> import manifoldflow as mf
        >>> found = mf.ensembles.extrapolate([0.1, 0.2], [1.1, 1.2], [0.01, 0.01])
        >>> print(found.value.round(3), found.standard_error.round(4), found.num_excess)
        1.0 0.0224 0
    """

    value: Scalar
    standard_error: Scalar
    chi_squared: Scalar
    num_excess: int = eqx.field(static=True)


@checked
def weak_order(step_sizes: Any, errors: Any, standard_errors: Any = None) -> Estimate:
    """The order p of errors that fall like hᵖ: the slope of log|error| against log h.

    It is fitted by a weighted straight line; the standard error of log|e| is s/|e| to first order,
    so that errors below two of their standard errors are noise, and refused when concrete.

    Args:
        step_sizes: (levels,) positive, at least two different ones.
        errors: (levels,) nonzero.
        standard_errors: (levels,) positive and independent of each other; None for errors
            without noise.

    Returns:
        The `Estimate` of p.

    Raises:
        ValueError: shapes that differ; steps, errors or standard errors out of range; errors
            that drown in their noise.

    Examples:
        >>> import manifoldflow as mf
        >>> found = mf.ensembles.weak_order([0.1, 0.2, 0.4], [0.01, 0.04, 0.16])
        >>> print(found.value.round(3))
        2.0
    """
    steps, errors, sigmas = _levels(step_sizes, errors, standard_errors, 2)
    if not is_traced((errors, sigmas)):
        # By NumPy: within jit JAX traces operations on constants as well.
        sizes = np.abs(np.asarray(errors))
        noise = 0 if sigmas is None else 2 * np.asarray(sigmas)
        if not np.all((sizes != 0) & (sizes >= noise)):
            raise ValueError(
                "weak_order needs errors other than zero, of at least two standard errors each, "
                f"or the slope is one of noise; got errors {errors.tolist()} and standard errors "
                f"{None if sigmas is None else sigmas.tolist()}. Take more members or larger "
                "steps."
            )
    magnitudes = jnp.abs(errors)
    # In units of the largest step, so that both columns are of one size.
    design = jnp.stack([jnp.log(steps / jnp.max(steps)), jnp.ones_like(steps)], axis=1)
    return _fitted(design, jnp.log(magnitudes), None if sigmas is None else sigmas / magnitudes)


@checked
def extrapolate(
    step_sizes: Any, values: Any, standard_errors: Any = None, *, order: Any = 1, num_terms: int = 1
) -> Estimate:
    """Richardson extrapolation to step zero: the m of value(h) = m + Σⱼ cⱼ h^{order+j}.

    j runs from 0 to num_terms − 1; weighted least squares. With num_terms + 1 step sizes it
    is the classical formula: m = 2 value(h/2) − value(h) for order 1.

    Args:
        step_sizes: (levels,) positive, at least num_terms + 1 different ones.
        values: (levels,) at those step sizes.
        standard_errors: (levels,) positive and independent of each other; None for values
            without noise.
        order: of the leading error, positive.
        num_terms: the number of powers of the step to remove.

    Returns:
        The `Estimate` of m.

    Raises:
        ValueError: shapes that differ, too few levels, values out of range.

    Examples:
        >>> import manifoldflow as mf
        >>> print(mf.ensembles.extrapolate([0.1, 0.2], [1.1, 1.2]).value.round(3))
        1.0
    """
    num_terms = checked_count("num_terms", num_terms)
    order = checked_positive("order", order)
    steps, values, sigmas = _levels(step_sizes, values, standard_errors, num_terms + 1)
    powers = [(steps / jnp.max(steps)) ** (order + j) for j in range(num_terms)]
    return _fitted(jnp.stack([jnp.ones_like(steps), *powers], axis=1), values, sigmas)


def _vector(name: str, value: Any) -> Array:
    return jnp.asarray(real_numbers(name, value), float)


def _levels(
    step_sizes: Any, values: Any, standard_errors: Any, at_least: int
) -> tuple[Array, Array, Array | None]:
    """Step sizes, values and standard errors as float vectors of one length."""
    steps = _vector("step_sizes", step_sizes)
    values = _vector("values and errors", values)
    sigmas = None if standard_errors is None else _vector("standard_errors", standard_errors)
    shapes = [a.shape for a in (steps, values, sigmas) if a is not None]
    if len(set(shapes)) != 1 or steps.ndim != 1 or len(steps) < at_least:
        raise ValueError(
            "step_sizes, values and standard_errors must be vectors of one length, at least "
            f"{at_least}; got shapes {shapes}."
        )
    if not is_traced(values) and not np.all(np.isfinite(np.asarray(values))):
        raise ValueError(f"values and errors must be finite; got {values.tolist()}.")
    if not is_traced(steps):
        known = np.asarray(steps)
        is_positive = bool(np.all((known > 0) & (known < math.inf)))
        if not is_positive or len(np.unique(known)) < at_least:
            raise ValueError(
                f"step_sizes must be positive, with at least {at_least} different ones; got "
                f"{known.tolist()}."
            )
    if sigmas is not None and not is_traced(sigmas):
        known = np.asarray(sigmas)
        if not np.all((known > 0) & (known < math.inf)):
            raise ValueError(
                "standard_errors must be positive and finite, or None for values without noise; "
                f"got {known.tolist()}."
            )
    return steps, values, sigmas


@jit_part
def _fitted(
    design: Float[Array, "levels terms"],
    values: Float[Array, " levels"],
    sigmas: Float[Array, " levels"] | None,
) -> Estimate:
    """The first coefficient by weighted least squares."""
    num_excess = design.shape[0] - design.shape[1]
    weights = jnp.ones_like(values) if sigmas is None else 1 / sigmas
    # By an SVD: the normal equations would square the condition of nearly equal step sizes.
    inverse = jnp.linalg.pinv(weights[:, None] * design)
    coefficients = inverse @ (weights * values)
    squares = jnp.sum((weights * (values - design @ coefficients)) ** 2)
    spread = jnp.linalg.norm(inverse[0])
    if sigmas is None:
        noise = jnp.sqrt(squares / num_excess) if num_excess else jnp.inf
        return Estimate(coefficients[0], noise * spread, jnp.asarray(jnp.nan), num_excess)
    return Estimate(coefficients[0], spread, squares, num_excess)
