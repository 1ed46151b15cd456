"""The whole spectrum of a report's Gauss-Newton matrix from its Gram matrix, where that fits."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manifoldflow import _precision, _tree, linalg
from manifoldflow._types import Point, Scalar
from manifoldflow.flows import LimitDiffusion
from manifoldflow.losses import AbstractExampleLoss, AbstractResidualLoss
from manifoldflow.manifolds import ZeroLossManifold
from manifoldflow.noise import LabelNoise


class Rows(NamedTuple):
    """The Gram matrix of the n rows of A with G = AᵀA, and numbers from it.

    Attributes:
        gram: AAᵀ.
        eigenvalues: of AAᵀ, ascending: those of G, zeros aside.
        rank: the number of them above rounding, that of the coarsest leaf.
        rounding: a bound on the error of the eigenvalues.
        distance: ‖A†u‖ for √scale times the residuals u: how far, to first order, the zero-loss
            manifold is; NaN for losses without residuals.
        beyond: ‖u‖ out of the range of A, which to first order no step takes away; as NaN.
    """

    gram: Float[Array, "n n"]
    eigenvalues: Float[Array, " n"]
    rank: Int[Array, ""]
    rounding: Scalar
    distance: Scalar
    beyond: Scalar


@eqx.filter_jit
def rows_of(loss: AbstractExampleLoss, point: Point) -> Rows:
    """The Gram matrix of the rows of A and its eigendecomposition."""
    root = loss.gauss_newton_root(point)
    gram = root.gram()
    values, vectors = linalg.eigh(gram)
    coordinates, _ = loss.split(point)
    # Rows carry the rounding of the coarsest leaf, whatever their own precision.
    eps = _tree.eps_of(coordinates)
    kept = values > len(values) * eps * jnp.maximum(values[-1], 0)
    # n rows of D < n numbers have rank D at most.
    kept &= jnp.arange(len(values)) >= len(values) - _tree.size(coordinates)
    distance = beyond = jnp.asarray(jnp.nan, values.dtype)
    if isinstance(loss, AbstractResidualLoss):
        scaled = jnp.sqrt(loss.scale.astype(values.dtype)) * loss.residual(point)
        if scaled.shape == values.shape:
            turned = _precision.matmul(vectors.T, scaled.astype(values.dtype))
            inverse = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1)), 0)
            distance = jnp.linalg.norm(inverse * turned)
            beyond = jnp.linalg.norm(jnp.where(kept, 0, turned))
    rounding = len(values) ** 0.5 * eps * jnp.maximum(values[-1], 0)
    return Rows(gram, values, jnp.sum(kept), rounding, distance, beyond)


def bytes_of_rows(loss: AbstractExampleLoss, point: Point) -> int:
    """The bytes of the rows of A and their Gram matrix; nothing is computed."""
    root = eqx.filter_eval_shape(lambda loss, point: loss.gauss_newton_root(point), loss, point)
    count = root.out_structure().shape[0]
    kept = sum(_bytes(leaf) for leaf in _arrays(root))
    return kept + 4 * count**2 * root.out_structure().dtype.itemsize


@eqx.filter_jit
def rate_of_fall(loss: AbstractResidualLoss, point: Point) -> tuple[Scalar, Scalar]:
    """The rate −d tr∇²L/dt = (c/4)‖P∇tr∇²L‖² under unit label noise, one label a step; and c."""
    noise = LabelNoise(std=1.0, batch_size=1)
    drift = LimitDiffusion(ZeroLossManifold(loss), noise).drift(point)
    strength = noise.strength(loss).astype(_tree.dtype_of(drift))
    return 4 / strength * _tree.inner(drift, drift), strength


def _arrays(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]


def _bytes(array: Any) -> int:
    return array.size * array.dtype.itemsize
