"""The projector on the tangent space of all models with the same outputs, from products alone."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count, checked_positive, described
from manifoldflow._jit import jit_part
from manifoldflow._types import Flag, Point, Scalar, Tangent
from manifoldflow.linalg._gram import AbstractGram, AbstractGramSolve
from manifoldflow.linalg._iterative import AutoGram, frozen, IterativeGramSolve
from manifoldflow.linalg.jacobian import AbstractJacobian

# Without a factor, what is left does not fall steadily.
_NUM_IDLE = {True: 30, False: 2}


class TangentProjector(eqx.Module):
    """The projector P = I − Jᵀ(JJᵀ)⁻¹J at one point, made by `tangent_projector`.

    Attributes:
        jacobian: J.
        gram: the preconditioner of the iteration.
        tolerance: the certificate at which it ends.
        max_steps: the most iterations.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2)[:1], jnp.zeros(1), predict=jnp.dot)
        >>> projector = mf.linalg.tangent_projector(loss, jnp.ones(2))
        >>> print(projector.certificate(jnp.array([3.0, 4.0])).round(3))
        0.6
    """

    jacobian: AbstractJacobian
    gram: AbstractGramSolve
    tolerance: float = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    @checked
    @jit_part
    def project(self, vector: Tangent) -> tuple[Tangent, Scalar]:
        """The tangent P v, and its certificate, a number that is zero for exact tangents.

        Args:
            vector: v, like the coordinates of the point: a gradient, an update of an optimiser.

        Returns:
            (P v, certificate of P v); the certificate is above `tolerance` where the steps ran out
            or rounding left no more to gain, and NaN where the Jacobian is not finite.
        """
        vector = _tree.as_tangent(self.jacobian.in_structure(), vector)
        projector = frozen(self)
        # P is linear and its own transpose: no derivative goes through the iterations. As a solve,
        # since that is what JAX lets one say it of: on its range P is its own inverse.
        tangent = jax.lax.custom_linear_solve(
            lambda tangent: tangent, vector, lambda _, v: _projected(projector, v), symmetric=True
        )
        certificate = self.certificate(jax.lax.stop_gradient(tangent))
        # Not the vector as it came, which might be taken for a tangent.
        return _tree.scale(_tree.where(jnp.isfinite(certificate), 1, jnp.nan), tangent), certificate

    @checked
    @jit_part
    def certificate(self, vector: Tangent) -> Scalar:
        """The ratio ‖Ĵv‖/‖v‖, with Ĵ the Jacobian whose rows have length one: zero for tangents.

        Each entry of Ĵv/‖v‖ is the cosine of the angle between v and the gradient of one output.
        So the units of parameters, outputs and v do not count, and no cosine is larger.
        """
        vector = _tree.as_tangent(self.jacobian.in_structure(), vector)
        unit, _ = _tree.in_own_units(vector)
        return _certificate(self, self.jacobian.mv(unit), unit)


def _certificate(
    projector: TangentProjector, values: Float[Array, " n"], vector: Tangent
) -> Scalar:
    length = _tree.norm(vector)
    found = _tree.norm(projector.gram.row_scale * values)
    # Of nothing, as a vector that is normal to the last digit leaves it.
    return _tree.where(length == 0, 0, found / _tree.where(length == 0, 1, length))


class _State(eqx.Module):
    tangent: Tangent
    direction: Float[Array, " n"]
    size: Scalar
    values: Float[Array, " n"]  # J of the tangent
    best: Tangent
    least: Scalar
    num_idle: Int[Array, ""]
    num_steps: Int[Array, ""]


def _projected(projector: TangentProjector, vector: Tangent) -> Tangent:
    """v − Jᵀw for the w that minimises its norm, by preconditioned conjugate gradients.

    What is left of the equations, J(v − Jᵀw), is taken from the tangent anew in every step, so
    that rounding does not pile up, and says how tangent it is.
    """
    jacobian = projector.jacobian
    most_idle = _NUM_IDLE[isinstance(projector.gram, IterativeGramSolve)]
    # In units of v: in float32 the squares of small ones are zero.
    unit, size = _tree.in_own_units(vector)

    def is_going(state: _State) -> Flag:
        is_useful = (state.least > projector.tolerance) & (state.num_idle < most_idle)
        return is_useful & (state.num_steps < projector.max_steps) & (state.size != 0)

    def step(state: _State) -> _State:
        preconditioned = _preconditioned(projector.gram, state.values)
        size = _precision.vdot(state.values, preconditioned)
        direction = preconditioned + size / state.size * state.direction
        change = jacobian.transpose_mv(direction)
        length = _tree.inner(change, change)
        factor = _tree.where(length == 0, 0, size / _tree.where(length == 0, 1, length))
        tangent = _tree.subtract(state.tangent, _tree.scale(factor, change))
        values = jacobian.mv(tangent)
        found = _certificate(projector, values, tangent)
        is_better = found < state.least
        num_idle = _tree.where(found < 0.9 * state.least, 0, state.num_idle + 1)
        return _State(
            tangent,
            direction,
            size,
            values,
            _tree.where(is_better, tangent, state.best),
            jnp.minimum(found, state.least),
            num_idle,
            state.num_steps + 1,
        )

    values = jacobian.mv(unit)
    zero = jnp.asarray(0)
    # An infinite size before the first step: its direction then has no part of an earlier one.
    infinite = jnp.asarray(jnp.inf, values.dtype)
    least = _certificate(projector, values, unit)
    start = _State(unit, jnp.zeros_like(values), infinite, values, unit, least, zero, zero)
    return _tree.scale(size, jax.lax.while_loop(is_going, step, start).best)


def _preconditioned(gram: AbstractGramSolve, values: Float[Array, " n"]) -> Float[Array, " n"]:
    return gram.precondition(values) if isinstance(gram, IterativeGramSolve) else gram.solve(values)


@checked
def tangent_projector(
    loss: Any,
    point: Point,
    *,
    batch_size: int | None = None,
    gram: AbstractGram | None = None,
    tolerance: float | None = None,
    max_steps: int = 200,
) -> TangentProjector:
    """The projector P = I − Jᵀ(JJᵀ)⁻¹J on the directions that leave all outputs of a model alone.

    J is the Jacobian of the outputs on the data of the loss, or of its residuals where it has no
    outputs. To first order, a step along P v changes none of them: gradients of a new task that are
    filtered in this way leave what the model does on old examples.

    No n×D numbers are formed. P v is found by conjugate gradients for JJᵀw = Jv, with what J does
    to the tangent taken anew in every step. A factorised Gram matrix, 3n² numbers, preconditions
    them where it fits, and two to four steps do; beyond, a Nyström sketch of JJᵀ from 256 products
    (Frangella, Tropp, Udell, SIAM J. Matrix Anal. Appl. 44(2), 2023). Within
    `with manifoldflow.mesh(…)`, everything is spread over its devices.

    Args:
        loss: with N examples; k outputs for each make n = N·k equations.
        point: where J is taken.
        batch_size: examples at a time, whose rows of J are formed anew in every product, as
            products of factors. By default as many as fit in an eighth of the memory.
        gram: what preconditions the iteration, by default `linalg.AutoGram()`.
        tolerance: of the certificate; by default 8 roundings, 1e-6 in single precision.
        max_steps: the most iterations; each costs a product with J and one with Jᵀ.

    Returns:
        A value with two methods: `project(vector)` gives P v and its certificate, and
        `certificate(tangent)` that of any tangent.

    Raises:
        ValueError: if the loss has neither outputs nor residuals.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> old = mf.LeastSquares(jnp.eye(3)[:2], jnp.zeros(2), predict=jnp.dot)
        >>> projector = mf.linalg.tangent_projector(old, jnp.ones(3), batch_size=1)
        >>> tangent, certificate = projector.project(jnp.array([1.0, 2.0, 3.0]))
        >>> print(tangent.round() + 0.0, bool(certificate < 1e-6))
        [0. 0. 3.] True
    """
    if tolerance is not None:
        checked_positive("tangent_projector: tolerance", tolerance)
    max_steps = checked_count("tangent_projector: max_steps", max_steps)
    jacobian_fn = getattr(loss, "output_jacobian", getattr(loss, "jacobian", None))
    if jacobian_fn is None:
        raise ValueError(
            "tangent_projector: loss must have outputs or residuals; got "
            f"{described(loss)}. LeastSquares and PerExampleLoss have them."
        )
    jacobian = jacobian_fn(point, batch_size=batch_size)
    prepared = _prepared(AutoGram() if gram is None else gram, jacobian)
    eps = _tree.eps_of(jacobian.in_structure())
    tolerance = 8 * eps if tolerance is None else float(tolerance)
    return TangentProjector(jacobian, prepared, tolerance, max_steps)


@jit_part
def _prepared(gram: AbstractGram, jacobian: AbstractJacobian) -> AbstractGramSolve:
    return gram(jacobian)
