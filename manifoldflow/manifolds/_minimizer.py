"""The manifold of minimisers of any loss with a known Hessian rank, for small models."""

import equinox as eqx
import jax
from jaxtyping import Array

from manifoldflow import _tree
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_count
from manifoldflow._jit import jit_part
from manifoldflow._types import Constraint, Point
from manifoldflow.losses import AbstractLoss
from manifoldflow.manifolds._base import AbstractStationaryManifold
from manifoldflow.manifolds._normal_space import HessianNormalSpace


class MinimizerManifold(AbstractStationaryManifold):
    """The local minimisers of a loss whose Hessian has constant rank on them.

    It uses the dense D×D Hessian: for models with up to a few thousand coordinates.

    Args:
        loss: any loss, e.g. `FunctionLoss`.
        rank: the rank of ∇²L on the manifold, an integer; or a float r in (0, 1): eigenvalues
            above r·λ_max count, and `dimension` is then not known beforehand.

    Raises:
        ValueError: a rank that is neither; when used, a rank above the number of coordinates.

    Assumes:
        L is C³ with ∇²L of constant rank and positive on its range [LiWangArora2022,
        Assumption 3.2].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.FunctionLoss(lambda x: jnp.cosh(x[0] * x[1] - 1))
        >>> hyperbola = mf.MinimizerManifold(loss, rank=1)
        >>> x = hyperbola.project(jnp.array([2.0, 1.0]))
        >>> print(f"{x[0] * x[1]:.4f} {hyperbola.dimension(x)}")
        1.0000 1
    """

    loss: AbstractLoss
    rank_rule: int | float = eqx.field(static=True)

    @checked_but("rank")
    def __init__(self, loss: AbstractLoss, rank: int | float):
        is_cutoff = isinstance(rank, float) and 0 < rank < 1
        self.loss = loss
        self.rank_rule = rank if is_cutoff else checked_count("MinimizerManifold: rank", rank)

    def codimension(self, point: Point) -> int:
        """The rank of the Hessian that the manifold was given."""
        if not isinstance(self.rank_rule, int):
            raise ValueError(
                "The codimension of a MinimizerManifold is its rank as an integer; got "
                f"rank={self.rank_rule}. Measure it with `rank(point)`, then build it anew."
            )
        return self.rank_rule

    def constraint(self, point: Point) -> Constraint:
        """The gradient ∇L."""
        return self.loss.gradient(point)

    @jit_part
    def normal_space(self, point: Point) -> HessianNormalSpace:
        coordinates, remainder = self.split(point)
        flat, unravel = _tree.ravel(coordinates)
        if isinstance(self.rank_rule, int) and self.rank_rule > flat.size:
            raise ValueError(
                f"MinimizerManifold: rank {self.rank_rule} exceeds the {flat.size} coordinates."
            )

        def loss(x: Array) -> Array:
            return self.loss(_tree.join(unravel(x), remainder))

        # Forward over reverse, D columns at once: D×D numbers, and the memory of D gradients.
        return HessianNormalSpace(jax.hessian(loss)(flat), self.rank_rule, coordinates)
