"""The flow of weight decay on the networks that fit their data."""

import equinox as eqx

from manifoldflow import _tree
from manifoldflow._boundary import checked, checked_fields
from manifoldflow._clock import DecayClock
from manifoldflow._types import Coordinates, Point, Tangent
from manifoldflow.flows._base import AbstractFlow
from manifoldflow.manifolds import AbstractManifold


class WeightDecayFlow(AbstractFlow):
    """The flow Y' = −PY: Riemannian gradient flow of ½|Y|², on the clock kηλ of weight decay.

    Gradient descent θ ← θ − η∇L(θ) − ηλθ lands on the manifold of minimisers, by about kη of
    gradient flow, and then follows this flow as λ → 0, at any fixed η < 2/λ_max(∇²L) on the
    way; so does SGD where its noise vanishes on the manifold and η is stable. The start is the
    landing point of that descent: `limit_map` for small η. In Optax it is
    `chain(add_decayed_weights(λ), sgd(η))`; AdamW has another projector than P.

    To first order in λ the iterates are θ = Y + λ(z − H†Y), with H = ∇²L and z tangent: λ must
    be far below the smallest eigenvalue of H that is not zero. Frozen leaves of the loss
    (`trainable`) neither move nor count in |Y|.

    Args:
        manifold: the minimisers of the loss, or any other manifold.

    References:
        K. Lyu et al., Dichotomy of early and late phase implicit biases can provably induce
        grokking, ICLR 2024, for homogeneous models.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> line = mf.LevelSet(lambda x: x[0] + x[1] - 2)
        >>> flow = mf.WeightDecayFlow(line)
        >>> print(flow.drift(jnp.array([3.0, -1.0])).round(3))  # to the shortest point, (1, 1)
        [-2.  2.]
    """

    manifold: AbstractManifold

    def __check_init__(self):
        checked_fields(self)

    @property
    def clock(self) -> DecayClock:
        """The clock Σηλ, in units of 1/λ."""
        return DecayClock()

    def split(self, point: Point) -> tuple[Coordinates, Point]:
        return self.manifold.split(point)

    @checked
    @eqx.filter_jit
    def drift(self, point: Point) -> Tangent:
        """The drift −PY."""
        # Frozen leaves are no coordinates: they do not decay.
        coordinates = self.split(point)[0]
        return _tree.scale(-1, self.manifold.normal_space(point).tangent(coordinates))
