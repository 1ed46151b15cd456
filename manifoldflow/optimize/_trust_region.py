"""Newton's method along a manifold, made safe by a trust region."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from manifoldflow import _tree
from manifoldflow._boundary import checked_fields
from manifoldflow._errors import checked_count, checked_nonnegative, checked_positive
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
    Work,
)
from manifoldflow.optimize._conjugate_gradients import truncated_cg


class _State(eqx.Module):
    radius: Scalar
    largest_gradient: Scalar


class RiemannianTrustRegion(AbstractMethod):
    """Truncated conjugate gradients on the covariant Hessian, within a radius that adapts.

    It converges quadratically to minima with a positive Hessian, and leaves saddles by their
    directions of negative curvature. An attempt costs a gradient and the products with
    the Hessian that it takes to solve for the step: few far from the minimum, at most the number of
    coordinates near it.

    Args:
        retraction: the way back to the manifold; `NewtonRetraction()` by default.
        initial_radius: of the trust region, > 0; by default ‖θ‖/8.
        kappa: a step is solved for until the residual is at most
            ‖g‖·min(kappa, (‖g‖/g₀)^theta) for the gradient g and the largest one so far, g₀.
        theta: 1 + theta is the order of convergence, at most 2.
        max_products: products with the Hessian for one step; by default the number of
            coordinates.

    Raises:
        ValueError: numbers out of range.

    References:
        [AbsilBakerGallivan2007]; the rounding of values as in [BoumalMishraAbsilSepulchre2014].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, start = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> method = mf.RiemannianTrustRegion(initial_radius=0.5)
        >>> found = mf.minimize(circle, lambda x: x[1], start, method=method)
        >>> print(found.final.round(3) + 0.0)
        [ 0. -1.]
    """

    retraction: AbstractRetraction = eqx.field(default_factory=NewtonRetraction)
    initial_radius: Any = None
    kappa: Any = 0.1
    theta: Any = 1.0
    max_products: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        checked_fields(self)
        for name in ("initial_radius", "kappa", "theta"):
            value = getattr(self, name)
            if value is not None or name != "initial_radius":
                check = checked_nonnegative if name == "theta" else checked_positive
                check(f"RiemannianTrustRegion: {name}", value)
        if self.max_products is not None:
            checked_count("RiemannianTrustRegion: max_products", self.max_products)

    @property
    def patience(self) -> int:
        return 5

    def init(self, problem: Problem, iterate: Iterate) -> _State:
        given, size = self.initial_radius, iterate.gradient_norm
        return _State(usual_step(iterate) if given is None else jnp.full_like(size, given), size)

    def step(self, problem: Problem, iterate: Iterate, state: _State) -> Attempt:
        radius, size = state.radius, iterate.gradient_norm
        largest = jnp.maximum(state.largest_gradient, size)
        share = size / _tree.where(largest > 0, largest, 1)
        hessian, most = problem.hessian(iterate), self.max_products
        # No more digits than the gradient has.
        floor = 10 * _tree.eps_of(iterate.slope) * iterate.slope_norm
        model = truncated_cg(
            hessian,
            iterate.gradient,
            radius,
            jnp.maximum(floor, size * jnp.minimum(self.kappa, share**self.theta)),
            _tree.size(iterate.coordinates) if most is None else most,
        )
        trial = problem.moved(self.retraction, iterate, model.vector)
        # Near the minimum the decrease is smaller than the rounding of the values, and the
        # model knows better: there the ratio tends to one.
        slack = 1e3 * value_rounding(iterate, trial.iterate)
        actual = iterate.value - trial.iterate.value
        ratio = _tree.where(trial.is_fine, (actual + slack) / (model.decrease + slack), -1)
        is_accepted = (ratio > 0.1) & (model.decrease > 0)
        # A failed step says nothing of radii beyond its own length.
        shorter = jnp.minimum(radius, _tree.norm(model.vector)) / 4
        wider = _tree.where((ratio > 0.75) & model.is_at_boundary, 2 * radius, radius)
        radius = _tree.where((ratio >= 0.25) & (model.decrease > 0), wider, shorter)
        is_lost = ~is_accepted & (radius <= shortest_step(iterate))
        spent = Work(num_hessian_products=model.num_products)
        return Attempt(
            _tree.where(is_accepted, trial.iterate, iterate),
            _State(radius, largest),
            is_accepted,
            _tree.where(is_lost, RESULTS.stalled, RESULTS.successful),
            trial.work + spent,
            _tree.where(is_accepted, trial.defect, 0),
        )
