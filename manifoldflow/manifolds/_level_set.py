"""The manifold of a residual: {fn = 0} of any function, and {r = 0} of any residual loss."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked_but
from manifoldflow._errors import is_traced, shapes_of
from manifoldflow._jit import jit_part
from manifoldflow._types import Constraint, Coordinates, Point
from manifoldflow.losses import (
    AbstractLoss,
    AbstractResidualLoss,
    PerExampleLoss,
    ResidualForm,
    SquaredNorm,
)
from manifoldflow.manifolds._base import AbstractManifold
from manifoldflow.manifolds._normal_space import GramNormalSpace


class LevelSet(AbstractManifold):
    """{θ : fn(θ) = 0} for any smooth function of a PyTree.

    Args:
        fn: point → array or PyTree of arrays, n numbers in all. To differentiate in values
            it uses, hand them over as `jax.tree_util.Partial(fn, a)` or in a module; values
            it merely closes over cannot be differentiated in.
        gram: how Gram matrices are solved; by default `linalg.AutoGram()`.
        trainable: which leaves are coordinates, as for `LeastSquares`.

    Equations may be redundant, as those of RᵀR = 1 and det R = 1 are: what counts is their
    rank at a point.

    Raises:
        TypeError: fn is not callable.
    """

    fn: Callable[..., Any]
    gram: linalg.AbstractGram
    trainable: _tree.Static | None = eqx.field(static=True)

    @checked_but("fn")
    def __init__(
        self,
        fn: Callable[[Point], PyTree[Any]],
        *,
        gram: linalg.AbstractGram | None = None,
        trainable: PyTree[Any] | None = None,
    ):
        if not callable(fn):
            raise TypeError(
                f"LevelSet needs a function of the point; got {type(fn).__name__}. For "
                "{fn = c} write LevelSet(lambda point: fn(point) - c)."
            )
        self.fn = _tree.as_pytree_callable(fn)
        self.gram = linalg.AutoGram() if gram is None else gram
        self.trainable = None if trainable is None else _tree.Static(trainable)

    @property
    def loss(self) -> SquaredNorm:
        """½‖fn‖²."""
        return SquaredNorm(self.fn, trainable=self.trainable)

    def codimension(self, point: Point) -> int:
        """How many equations are independent at the point; under a trace, how many there are."""
        return independent_constraints(self, point)

    def constraint(self, point: Point) -> Constraint:
        return self.loss.residual(point)

    @jit_part
    def normal_space(self, point: Point) -> GramNormalSpace:
        return gram_normal_space(self.loss, self.gram, point)


class ZeroLossManifold(AbstractManifold):
    """Γ = {θ : r(θ) = 0}, the models that fit the data of a residual loss exactly.

    Args:
        loss: `LeastSquares`, or another residual loss; or a `PerExampleLoss` with finite minima,
            of which `manifold.loss` is then the `losses.ResidualForm`.
        gram: how Gram matrices are solved; by default `linalg.AutoGram()`.

    Raises:
        ValueError: a `PerExampleLoss` without a finite minimum, with weight decay, or inside jit;
            when used, if there are more residuals than coordinates.
    """

    loss: AbstractResidualLoss
    gram: linalg.AbstractGram

    @checked_but("loss")
    def __init__(self, loss: AbstractLoss, *, gram: linalg.AbstractGram | None = None):
        if isinstance(loss, PerExampleLoss):
            loss = ResidualForm(loss)
        if not isinstance(loss, AbstractResidualLoss):
            raise ValueError(
                f"ZeroLossManifold needs a loss with residuals; got {type(loss).__name__}. For "
                "the minimisers of any other loss use MinimizerManifold(loss, rank)."
            )
        self.loss = loss
        self.gram = linalg.AutoGram() if gram is None else gram

    def codimension(self, point: Point) -> int:
        """How many residuals are independent at the point; under a trace, how many there are."""
        return independent_constraints(self, point)

    def constraint(self, point: Point) -> Constraint:
        return self.loss.residual(point)

    @jit_part
    def normal_space(self, point: Point) -> GramNormalSpace:
        check_not_overdetermined(self, point)
        return gram_normal_space(self.loss, self.gram, point)


def gram_normal_space(
    loss: AbstractResidualLoss, gram: linalg.AbstractGram, point: Point
) -> GramNormalSpace:
    check_precision(loss.split(point)[0])
    jacobian = loss.jacobian(point)
    return GramNormalSpace(jacobian, gram(jacobian))


def check_precision(coordinates: Coordinates) -> None:
    dtype = _tree.dtype_of(coordinates)
    if jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"Manifolds need points in float32 or float64; got {dtype}. Cast the model, e.g. "
            "jax.tree.map(lambda x: x.astype(jnp.float32), params)."
        )


def independent_constraints(manifold: AbstractManifold, point: Point) -> int:
    """The rank of the constraint's derivative at a point, or its bound where that is traced."""
    if is_traced((manifold, point)):
        coordinates, _ = manifold.split(point)
        num_constraints = eqx.filter_eval_shape(manifold.constraint, point).size
        return min(num_constraints, _tree.size(coordinates))
    with jax.ensure_compile_time_eval():  # inside jit as well, of a point that is known
        return int(manifold.rank(point))


def check_not_overdetermined(manifold: ZeroLossManifold, point: Point) -> None:
    num_residuals = eqx.filter_eval_shape(manifold.constraint, point).size
    coordinates, _ = manifold.split(point)
    if num_residuals > _tree.size(coordinates):
        raise ValueError(
            f"ZeroLossManifold needs at most as many residuals as coordinates; got "
            f"{num_residuals} residuals and {_tree.size(coordinates)} coordinates in "
            f"{shapes_of(coordinates)}. Use fewer examples or a wider model."
        )
