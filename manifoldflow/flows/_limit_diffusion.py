"""Where SGD goes after the loss is zero, in the limit of small learning rates."""

import equinox as eqx

from manifoldflow import _tree
from manifoldflow._types import Coordinates, Point, Tangent
from manifoldflow.flows._base import AbstractFlow
from manifoldflow.losses import LeastSquares
from manifoldflow.manifolds import AbstractManifold, riemannian_gradient, ZeroLossManifold
from manifoldflow.noise import AbstractNoise, LabelNoise


class LimitDiffusion(AbstractFlow):
    """The limit of SGD on the zero-loss manifold as the learning rate η → 0.

    Time is the limit clock: t = kη² after k steps, Σₖ ηₖ² for schedules. For label noise
    the limit is an ordinary differential equation,

        Y' = −(c/4) P∇tr∇²L(Y),   c = scale·std²·N/B,

    with tr∇²L the trace of the Gauss-Newton matrix, its value on the manifold.

    Args:
        manifold: the `ZeroLossManifold` of a `LeastSquares` loss.
        noise: `LabelNoise`.

    Raises:
        ValueError: for any other pair. A bare level set has no loss that noise could
            perturb; other noises have a diffusive limit, which is not implemented.

    Assumes:
        The Jacobian has full rank along the path; where it loses rank the drift is
        continued as far as it extends. `manifold.rank(point)` measures it.

    References:
        [LiWangArora2022, Theorem 4.6 and Corollary 5.2]; the constant ¼ as there, not as
        on the poster.
    """

    manifold: ZeroLossManifold
    noise: LabelNoise

    def __init__(self, manifold: AbstractManifold, noise: AbstractNoise):
        if not isinstance(manifold, ZeroLossManifold):
            raise ValueError(
                f"LimitDiffusion needs the ZeroLossManifold of a loss; got "
                f"{type(manifold).__name__}, which does not say what the noise perturbs. For "
                "a flow on it use RiemannianGradientFlow."
            )
        if not isinstance(noise, LabelNoise) or not isinstance(manifold.loss, LeastSquares):
            raise ValueError(
                "LimitDiffusion is implemented for LabelNoise on LeastSquares; got "
                f"{type(noise).__name__} on {type(manifold.loss).__name__}. Other pairs have a "
                "stochastic limit with terms that are not implemented here."
            )
        noise.strength(manifold.loss)  # raises if the batch does not fit the data
        self.manifold = manifold
        self.noise = noise

    def split(self, point: Point) -> tuple[Coordinates, Point]:
        return self.manifold.split(point)

    @eqx.filter_jit
    def drift(self, point: Point) -> Tangent:
        """−(c/4) P∇tr∇²L."""
        return self.normal_regularisation(point)

    def normal_regularisation(self, point: Point) -> Tangent:
        """The part of the drift that normal noise causes: all of it for label noise."""
        loss = self.manifold.loss
        gradient = riemannian_gradient(self.manifold, loss.trace_gauss_newton, point)
        return _tree.scale(-self.noise.strength(loss) / 4, gradient)
