"""The limit of SGD on the minimisers of a loss, for small learning rates."""

from typing import Any

import equinox as eqx
import lineax as lx

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked, checked_but
from manifoldflow._clock import AbstractClock
from manifoldflow._errors import is_traced
from manifoldflow._types import Coordinates, Flag, Point, Tangent
from manifoldflow.flows._base import AbstractDiffusion
from manifoldflow.flows._equation import equation_of
from manifoldflow.flows._own_limit import OwnLimit
from manifoldflow.flows._update_limits import (
    check_update,
    failure,
    has_own_limit,
    own_limit,
    potential_limit,
)
from manifoldflow.geometry import potential_gradient
from manifoldflow.losses import SquaredNorm
from manifoldflow.manifolds import AbstractLocalGeometry, AbstractManifold
from manifoldflow.noise import AbstractNoise, checked_noise, short_limit, ShortLimit
from manifoldflow.updates import (
    AbstractLimitedUpdate,
    AbstractPotentialUpdate,
    AbstractUpdate,
    SGD,
)


class LimitDiffusion(AbstractDiffusion):
    """The limit of SGD on the manifold of minimisers as the learning rate η → 0.

    For gradient noise of covariance Σ, in the sense of Itô,

        dY = PF(Y) dW + ½ ∂²Φ(Y)[Σ(Y)] dt,   Σ = F Fᵀ,

    with P the tangent projection and Φ the limit map of gradient flow. The drift has three
    parts: `tangent_noise_compensation`, `mixed_regularisation` and `normal_regularisation`.
    Time is the limit clock: t = kη² after k steps, Σₖ ηₖ² for schedules.

    Some noises have short forms. Where Σ = c∇²L on a zero-loss manifold the limit is an
    ordinary differential equation, and `is_stochastic` is False:

        Y' = −(c/4) P∇tr∇²L(Y).

    This holds for `LabelNoise` on `LeastSquares`, for `ResampledLabels` on a likelihood, for
    `FlippedLabels`, and for `HessianNoise` on the minimisers of any loss; the types alone decide.
    For `IsotropicNoise` Y is a Brownian motion on the manifold of speed std² with the drift
    −(std²/4) P∇ln|∇²L|₊, |·|₊ being the product of the non-zero eigenvalues.

    An update with a slow drift G adds PG: −wPY for a weight decay λ = wη of plain SGD. Updates
    other than SGD have a drift of their own instead, for the noises that they name, and always an
    ordinary differential equation.

    Args:
        manifold: the minimisers of a loss: `ZeroLossManifold` or, with dense D×D matrices,
            `MinimizerManifold`.
        noise: any noise with a covariance.
        update: the optimiser, such as `updates.SGD(momentum, weight_decay)` or `updates.Adam()`;
            plain SGD by default.

    Raises:
        ValueError: a bare level set, which has no loss that noise could perturb; a noise of data
            on a loss without examples, or with larger batches than there are examples; an
            update whose limit is not known for this noise; outside of jit, a point where it
            has none. Under jit the drift is NaN there.

    Assumes:
        The Hessian has constant rank along the path. Where the Jacobian of the residuals
        loses rank the drift is continued as far as it extends; `manifold.rank(point)`
        measures it.

    References:
        [LiWangArora2022, Theorem 4.6, Corollaries 5.1 and 5.2; Katzenberger1991]; the
        mixed part has the factor 1 and label noise ¼, not ½ and 1 as on the poster.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> predict = lambda w, x: w[0] * w[1] * x  # fits on the hyperbola w₀w₁ = 1
        >>> loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=predict)
        >>> noise = mf.LabelNoise(std=1.0, batch_size=1)
        >>> flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), noise)
        >>> print(flow.equation)
        Y' = −0.25·P∇tr∇²L, c = 1 in batches of 1 of 1 examples, t = Ση²/(1−β)²
        >>> print(flow.drift(jnp.array([2.0, 0.5])).round(3))  # −½PY, as tr∇²L = w₀² + w₁²
        [-0.882  0.221]
    """

    manifold: AbstractManifold
    noise: AbstractNoise
    update: AbstractUpdate

    @checked_but("manifold", "noise")
    def __init__(
        self, manifold: AbstractManifold, noise: Any, update: AbstractUpdate | None = None
    ):
        # A bare level set has a loss that stands in for one.
        if not isinstance(manifold, AbstractManifold) or isinstance(manifold.loss, SquaredNorm):
            raise ValueError(
                "LimitDiffusion needs the manifold of minimisers of a loss, as "
                f"ZeroLossManifold(loss); got {type(manifold).__name__}, which does not say "
                "what the noise perturbs. For a flow on it use RiemannianGradientFlow."
            )
        self.noise = checked_noise("LimitDiffusion", noise)
        short_limit(self.noise, manifold.loss)  # raises if the noise does not fit the loss
        self.manifold = manifold
        self.update = SGD() if update is None else update
        check_update(self.update, manifold, self.noise)

    @property
    def clock(self) -> AbstractClock:
        """The clock of the update."""
        return self.update.clock

    @property
    def short_limit(self) -> ShortLimit | None:
        """The short form of the limit, where this noise or update has one on this manifold."""
        if isinstance(self.update, AbstractPotentialUpdate):
            return potential_limit(self.update, self.manifold, self.noise)
        if has_own_limit(self.update):
            return None
        limit = short_limit(self.noise, self.manifold.loss)
        if limit is not None and limit.at_zero_loss and self.manifold.residual_loss is None:
            return None
        return limit

    @property
    def is_stochastic(self) -> bool:
        """True where the limit is a stochastic differential equation: by types, never by values."""
        # Asked before any value is known: `solve` needs a key or none, and compiles one of two
        # programs.
        if isinstance(self.update, AbstractLimitedUpdate):
            return False
        limit = self.short_limit
        return limit is None or not limit.is_ode

    @property
    def equation(self) -> str:
        """The limit in one line, with its numbers: its rate, c, and the time of a step."""
        return equation_of(self.short_limit, self.manifold.loss, self.noise, self.update)

    def __repr__(self) -> str:
        return f"{eqx.tree_pformat(self)}  # {self.equation}"

    def split(self, point: Point) -> tuple[Coordinates, Point]:
        return self.manifold.split(point)

    @checked
    def drift(self, point: Point) -> Tangent:
        """The drift ½ ∂²Φ[Σ] + PG in the sense of Itô: three parts and the update's own."""
        drift, is_fine = self._drift(point)
        if is_fine is not None and not is_traced(is_fine) and not is_fine:
            raise ValueError(f"LimitDiffusion has no drift at this point. {failure(self.update)}")
        return drift

    @eqx.filter_jit
    def _drift(self, point: Point) -> tuple[Tangent, Flag | None]:
        if has_own_limit(self.update):
            own = self._own(point)
            return _tree.add(own.drift, self._slow(own, point)), own.is_fine
        limit = self.short_limit
        if limit is not None:
            along, local = self._short(limit, point)
            total = along if limit.is_ode else _tree.add(along, self._bent(local, point))
        else:
            # ½∂²Φ[Σ] in three parts, from one factorisation of the Gram matrix.
            local, sigma = self.manifold.local(point).prepared(), self._sigma(point)
            along = _tree.add(local.mixed_part(sigma), local.normal_part(sigma))
            total = _tree.scale(0.5, _tree.add(local.tangent_part(sigma), along))
        slow = self.update.slow_drift(local.coordinates)
        return (total if slow is None else _tree.add(total, local.space.tangent(slow))), None

    def diffusion(self, point: Point) -> lx.AbstractLinearOperator:
        """The operator PF, from the space of the noise to tangents; zero where the noise is normal.

        `.in_structure()` is the structure of the Brownian motion that drives the limit.
        """
        tangents = _tree.structure_of(self.split(point)[0])
        project = self.manifold.normal_space(point).tangent
        projection = lx.FunctionLinearOperator(project, tangents, lx.symmetric_tag)
        return projection @ self.noise.checked_factor(self.manifold.loss, point)

    @checked
    @eqx.filter_jit
    def tangent_noise_compensation(self, point: Point) -> Tangent:
        """The part −½ H†∂²(∇L)[PΣP] of the drift, which keeps tangent noise on a curved manifold.

        It is ½ tr II against the tangent noise and lies in the normal space. Isotropic
        noise takes D second directional derivatives of all residuals for it.
        """
        if not self.is_stochastic:
            return _tree.zeros_like(self.split(point)[0])
        return self._bent(self.manifold.local(point), point)

    @checked
    @eqx.filter_jit
    def mixed_regularisation(self, point: Point) -> Tangent:
        """The part −P∂²(∇L)[H†P⊥ΣP] of the drift, from correlated normal and tangent noise."""
        if not self.is_stochastic or self.short_limit is not None:
            return _tree.zeros_like(self.split(point)[0])
        local = self.manifold.local(point)
        return _tree.scale(0.5, local.mixed_part(self._sigma(point)))

    @checked
    @eqx.filter_jit
    def normal_regularisation(self, point: Point) -> Tangent:
        """The part −½P∂²(∇L)[𝓛_H⁻¹(P⊥ΣP⊥)] of the drift, due to normal noise.

        For label noise it is the whole drift.
        """
        if has_own_limit(self.update):
            return self._own(point).drift
        limit = self.short_limit
        if limit is not None:
            return self._short(limit, point)[0]
        local = self.manifold.local(point)
        return _tree.scale(0.5, local.normal_part(self._sigma(point)))

    @checked
    @eqx.filter_jit
    def slow_drift(self, point: Point) -> Tangent:
        """The part PG of the drift that the update adds, as a weight decay does.

        It is ΠG where the update has a projection Π of its own.
        """
        if has_own_limit(self.update):
            return self._slow(self._own(point), point)
        local = self.manifold.local(point)
        slow = self.update.slow_drift(local.coordinates)
        zeros = _tree.zeros_like(local.coordinates)
        return zeros if slow is None else local.space.tangent(slow)

    def _own(self, point: Point) -> OwnLimit:
        return own_limit(self.update, self.manifold, self.noise, point)

    def _slow(self, own: OwnLimit, point: Point) -> Tangent:
        slow = self.update.slow_drift(self.split(point)[0])
        return _tree.zeros_like(own.drift) if slow is None else own.project(slow)

    def _short(self, limit: ShortLimit, point: Point) -> tuple[Tangent, AbstractLocalGeometry]:
        """The drift −rate·P∇potential, and the local geometry that it took."""
        gradient, local = potential_gradient(self.manifold, limit.potential, point)
        rate = limit.rate.astype(_tree.dtype_of(local.coordinates))
        return _tree.scale(-rate, local.space.tangent(gradient)), local

    def _bent(self, local: AbstractLocalGeometry, point: Point) -> Tangent:
        return _tree.scale(0.5, local.tangent_part(self._sigma(point)))

    def _sigma(self, point: Point) -> linalg.AbstractSigma:
        """The covariance of the noise, through the residuals where it acts through them."""
        factor = self.noise.checked_factor(self.manifold.loss, point)
        # F = JᵀG is normal to the manifold: tangent and mixed part vanish, and n×n matrices do.
        if isinstance(factor, linalg.ResidualFactor) and self.manifold.residual_loss is not None:
            return linalg.NormalFactor(factor.small)
        return linalg.as_sigma(self.split(point)[0], factor, is_factor=True)
