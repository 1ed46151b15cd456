"""The check that the constraints of a manifold are independent at a point."""

import equinox as eqx

from manifoldflow._boundary import checked_concrete
from manifoldflow._types import Point
from manifoldflow.manifolds import AbstractManifold


class DimensionCheck(eqx.Module):
    """The numbers of independent and of counted constraints at a point; true where they agree.

    Attributes:
        rank: the number of independent constraints, measured.
        codimension: the number of constraints, counted.
        condition_number: of JJᵀ over the eigenvalues that make the rank.
        holds: True where the two agree.

    Examples:
        >>> from manifoldflow import diagnostics
        >>> bool(diagnostics.DimensionCheck(1, 2, 1.0, False))
        False
    """

    rank: int
    codimension: int
    condition_number: float
    holds: bool

    def __bool__(self) -> bool:
        return self.holds


def counted_constraints(manifold: AbstractManifold, point: Point) -> int:
    """The number of constraints, before anything is known of the point."""
    found: list[int] = []
    eqx.filter_eval_shape(lambda point: found.append(manifold.codimension(point)), point)
    return found[0]


@checked_concrete
def check_dimension(manifold: AbstractManifold, point: Point) -> DimensionCheck:
    """The check that all constraints are independent at a point.

    Args:
        manifold: the manifold.
        point: a point of the manifold.

    Returns:
        A `DimensionCheck`: true or false.

    Raises:
        ValueError: a call inside jit.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> twice = mf.LevelSet(lambda x: jnp.array([x @ x - 1, 2 * x @ x - 2]))
        >>> check = mf.diagnostics.check_dimension(twice, jnp.array([0.6, 0.8]))
        >>> print(bool(check), check.rank, check.codimension)
        False 1 2
    """
    rank, codimension = int(manifold.rank(point)), counted_constraints(manifold, point)
    condition = float(manifold.condition_number(point))
    return DimensionCheck(rank, codimension, condition, rank == codimension)
