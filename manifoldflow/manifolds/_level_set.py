"""The manifold of a residual: {fn = 0} for any function, and {r = 0} for any residual loss."""

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
    """The zero set {θ : fn(θ) = 0} of any smooth function of a PyTree.

    Equations may be redundant, as RᵀR = 1 and det R = 1 are: their rank at a point counts.

    Args:
        fn: maps a point to an array or PyTree of arrays, n numbers in all. To differentiate in
            values it uses, hand them over as `jax.tree_util.Partial(fn, a)` or in a module; values
            it merely closes over cannot be differentiated in.
        gram: the solver for Gram matrices; by default `linalg.AutoGram()`.
        trainable: says which leaves are coordinates, as for `LeastSquares`.

    Raises:
        TypeError: fn is not callable.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> sphere = mf.LevelSet(lambda x: x @ x - 1)
        >>> x = sphere.project(jnp.array([1.0, 2.0, 2.0]))
        >>> print(x.round(3), sphere.dimension(x))
        [0.333 0.667 0.667] 2
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
        """The loss ½‖fn‖²."""
        return SquaredNorm(self.fn, trainable=self.trainable)

    def codimension(self, point: Point) -> int:
        """The number of independent equations at the point; under a trace, that of all of them."""
        return independent_constraints(self, point)

    def constraint(self, point: Point) -> Constraint:
        return self.loss.residual(point)

    @jit_part
    def normal_space(self, point: Point) -> GramNormalSpace:
        return gram_normal_space(self.loss, self.gram, point)


class ZeroLossManifold(AbstractManifold):
    """The manifold Γ = {θ : r(θ) = 0} of models that fit the data of a residual loss exactly.

    Args:
        loss: `LeastSquares`, or another residual loss; or a `PerExampleLoss` with finite minima,
            for which `manifold.loss` is then the `losses.ResidualForm`.
        gram: the solver for Gram matrices; by default `linalg.AutoGram()`.

    Raises:
        ValueError: a `PerExampleLoss` without a finite minimum, with weight decay, or inside jit;
            when used, if there are more residuals than coordinates.

    References:
        [LiWangArora2022, section 3].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=lambda w, x: w[:2] @ x * w[2])
        >>> manifold = mf.ZeroLossManifold(loss)
        >>> fit = manifold.project(jnp.array([0.5, 0.5, 1.0]))
        >>> print(manifold.dimension(fit), loss(fit) < 1e-12)
        1 True
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
        """The number of independent residuals at the point; under a trace, that of all of them."""
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
    # Gram matrices square the condition number: half precision has nothing left after that.
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
        # The rank of a traced point is no Python integer: only its bound is known.
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
