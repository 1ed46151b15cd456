"""Steepest descent along a manifold, with steps chosen by the last change of the gradient."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int

from manifoldflow import _tree
from manifoldflow._boundary import checked_fields
from manifoldflow._results import RESULTS
from manifoldflow._types import Scalar
from manifoldflow.manifolds import AbstractRetraction, NewtonRetraction
from manifoldflow.optimize._base import (
    AbstractMethod,
    Attempt,
    Iterate,
    Problem,
    shortest_step,
    usual_step,
    value_rounding,
)

_SUFFICIENT = 1e-4
_MEMORY = 0.85


class _State(eqx.Module):
    rate: Scalar  # the step is −rate·gradient
    reference: Scalar  # what a new value is compared with: an average of those before
    weight: Scalar
    num_steps: Int[Array, ""]


class RiemannianGradientDescent(AbstractMethod):
    """Gradient descent with Barzilai-Borwein steps and Armijo's condition.

    The length of a step follows from the change of the gradient in the last one; it is
    quartered until the value falls below an average of the last ones. An attempt costs one
    gradient. It takes many more steps than `RiemannianTrustRegion`, and needs no second
    derivatives.

    Args:
        retraction: the way back to the manifold; `NewtonRetraction()` by default.

    References:
        [IannazzoPorcelli2018]; the average is that of [ZhangHager2004].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, start = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> method = mf.RiemannianGradientDescent()
        >>> found = mf.minimize(circle, lambda x: x[1], start, method=method)
        >>> print(found.final.round(3) + 0.0)
        [ 0. -1.]
    """

    retraction: AbstractRetraction = eqx.field(default_factory=NewtonRetraction)

    def __check_init__(self):
        checked_fields(self)

    @property
    def patience(self) -> int:
        return 50

    def init(self, problem: Problem, iterate: Iterate) -> _State:
        size = iterate.gradient_norm
        rate = usual_step(iterate) / _tree.where(size > 0, size, 1)
        return _State(rate, iterate.value, jnp.ones_like(rate), jnp.asarray(0))

    def step(self, problem: Problem, iterate: Iterate, state: _State) -> Attempt:
        rate, size = state.rate, iterate.gradient_norm
        trial = problem.moved(self.retraction, iterate, _tree.scale(-rate, iterate.gradient))
        there = trial.iterate
        # Near the minimum values differ by rounding alone: without slack every step would be
        # refused.
        slack = 10 * value_rounding(iterate, there)
        wanted = state.reference - _SUFFICIENT * rate * size**2
        is_accepted = trial.is_fine & (there.value <= wanted + slack)
        # The old gradient as a tangent at the new point.
        old = there.space.tangent(iterate.gradient)
        change = _tree.subtract(there.gradient, old)
        turn = -_tree.inner(old, change)
        # Barzilai and Borwein's two lengths, in turn: ⟨s, s⟩/⟨s, y⟩ and ⟨s, y⟩/⟨y, y⟩ with s =
        # −rate·g.
        long = rate * _tree.inner(old, old) / turn
        short = rate * turn / _tree.inner(change, change)
        guess = _tree.where(state.num_steps % 2 == 0, long, short)
        is_known = (turn > 0) & jnp.isfinite(guess)
        # Where the function curves downwards there is no such length: a longer step is tried.
        guess = _tree.where(is_known, jnp.clip(guess, rate / 1e3, rate * 1e3), 4 * rate)
        # Zhang and Hager's average of the values so far: descent need not be monotone.
        weight = _MEMORY * state.weight + 1
        reference = (_MEMORY * state.weight * state.reference + there.value) / weight
        is_lost = ~is_accepted & (rate * size <= shortest_step(iterate))
        going_on = _State(guess, reference, weight, state.num_steps + 1)
        again = eqx.tree_at(lambda s: s.rate, state, rate / 4)
        return Attempt(
            _tree.where(is_accepted, there, iterate),
            _tree.where(is_accepted, going_on, again),
            is_accepted,
            _tree.where(is_lost, RESULTS.stalled, RESULTS.successful),
            trial.work,
            _tree.where(is_accepted, trial.defect, 0),
        )
