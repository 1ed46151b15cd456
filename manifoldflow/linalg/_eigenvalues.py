"""The largest and smallest eigenvalues of self-adjoint operators between PyTrees."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow._results import RESULTS
from manifoldflow._types import Scalar
from manifoldflow.linalg._lanczos import lanczos, target
from manifoldflow.linalg._lapack import eigh

# Up to this size a dense eigendecomposition is as cheap as the first products.
_DENSE = 64


class Eigenvalues(eqx.Module):
    """Eigenvalues of a self-adjoint operator, with bounds on their errors.

    Attributes:
        values: λ, (num,).
        residuals: ‖Av − λv‖ for unit vectors v, (num,). An eigenvalue lies within this distance of
            λ, up to the rounding of the products.
        result: `RESULTS.successful`, `not_converged` or `nonfinite`.
        num_steps: products with the operator.

    Examples:
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> from manifoldflow import linalg
        >>> found = linalg.largest_eigenvalues(
        ...     lx.DiagonalLinearOperator(jnp.array([1.0, 5.0, 3.0]))
        ... )
        >>> print(isinstance(found, linalg.Eigenvalues), bool(found.is_successful), found.values)
        True True [5.]
    """

    values: Float[Array, " num"]
    residuals: Float[Array, " num"]
    result: RESULTS
    num_steps: Int[Array, ""]

    @property
    def is_successful(self) -> Bool[Array, "..."]:
        """True where all eigenvalues were found to tolerance."""
        return self.result == RESULTS.successful


@checked
def largest_eigenvalues(
    operator: lx.AbstractLinearOperator,
    num: int = 1,
    *,
    within: Callable[[PyTree[Any]], PyTree[Any]] | None = None,
    codimension: int = 0,
    max_steps: int = 10_000,
) -> Eigenvalues:
    """The algebraically largest eigenvalues of a self-adjoint operator, descending.

    The method is Lanczos' with full reorthogonalisation and restarts from random vectors, or a
    dense decomposition up to 64 dimensions. The residuals are at most eps^0.6·|λ| or eps^¾·‖A‖,
    whichever is more: 4e-10 and 2e-12 in float64, 7e-5 and 6e-6 in float32. Values are
    differentiable once in everything that the operator holds, by dλ = ⟨v, dA v⟩, where the
    eigenvalue is simple; at a crossing it is the derivative of one of the branches.

    Args:
        operator: A, self-adjoint on a space of PyTrees; by products alone.
        num: the number of eigenvalues.
        within: the orthogonal projection on an invariant subspace, such as the tangent space of a
            manifold, for its eigenvalues only.
        codimension: of that subspace.
        max_steps: products before the search gives up; checked between two restarts.

    Returns:
        `Eigenvalues`. Look at its `result`: the function never raises for values.

    Raises:
        ValueError: more eigenvalues than dimensions, or than a fifth of more than 64.

    Examples:
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> from manifoldflow import linalg
        >>> operator = lx.DiagonalLinearOperator(jnp.array([1.0, 5.0, 3.0]))
        >>> print(linalg.largest_eigenvalues(operator, 2).values)
        [5. 3.]
    """
    structure = operator.in_structure()
    size = _tree.size(structure)
    num = checked_count("num", num)
    max_steps = checked_count("max_steps", max_steps)
    if num > size - codimension:
        raise ValueError(f"A space of dimension {size - codimension} has no {num} eigenvalues.")
    if size > _DENSE and 5 * num >= size:
        raise ValueError(
            f"Lanczos' method finds fewer than a fifth of the {size} eigenvalues; got num={num}. "
            "For more take numpy.linalg.eigh of operator.as_matrix()."
        )
    return _largest(operator, num, within, codimension, max_steps)


@checked
def smallest_eigenvalues(
    operator: lx.AbstractLinearOperator,
    num: int = 1,
    *,
    within: Callable[[PyTree[Any]], PyTree[Any]] | None = None,
    codimension: int = 0,
    max_steps: int = 10_000,
) -> Eigenvalues:
    """The algebraically smallest eigenvalues of a self-adjoint operator, ascending.

    Method, arguments and errors are those of `largest_eigenvalues`. Eigenvalues near zero are as
    exact as products are: to eps^¾ of the largest in size.

    Returns:
        `Eigenvalues`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> from manifoldflow import linalg
        >>> operator = lx.DiagonalLinearOperator(jnp.array([1.0, -5.0, 3.0]))
        >>> print(linalg.smallest_eigenvalues(operator, 2).values)
        [-5.  1.]
    """
    options = {"within": within, "codimension": codimension, "max_steps": max_steps}
    found = largest_eigenvalues(-operator, num, **options)
    return eqx.tree_at(lambda e: e.values, found, -found.values)


@eqx.filter_jit
def _largest(
    operator: lx.AbstractLinearOperator,
    num: int,
    within: Callable[[PyTree[Any]], PyTree[Any]] | None,
    codimension: int,
    max_steps: int,
) -> Eigenvalues:
    structure = operator.in_structure()
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), structure)
    flat, unravel = _tree.ravel(zeros)
    eps = _tree.eps_of(zeros)

    def project(vector: Float[Array, " D"]) -> Float[Array, " D"]:
        return vector if within is None else _tree.ravel(within(unravel(vector)))[0]

    def product(vector: Float[Array, " D"]) -> Float[Array, " D"]:
        return _tree.ravel(operator.mv(unravel(vector)))[0]

    # Vectors are found without derivatives: those of λ are ⟨v, dA v⟩ at fixed v, to first order.
    fixed = lambda fn: lambda vector: jax.lax.stop_gradient(fn(vector))
    if flat.size <= _DENSE:
        vectors, scale, num_steps = _dense(fixed(product), fixed(project), flat, num)
    else:
        vectors, scale, num_steps = lanczos(
            fixed(product),
            fixed(project),
            flat,
            num,
            dimension=flat.size - codimension,
            eps=eps,
            max_steps=max_steps,
        )
    vectors = jax.lax.stop_gradient(vectors)
    images = jax.vmap(lambda v: project(product(v)))(vectors)
    # Rayleigh quotients, and not the values of the search: their error is of second order in that
    # of the vectors, and the derivative goes through them.
    values = jnp.sum(vectors * images, axis=1)
    return judged(values, images - values[:, None] * vectors, scale, num_steps + num, eps)


def judged(
    values: Float[Array, " num"],
    left: Float[Array, "num D"],
    scale: Scalar,
    num_steps: Any,
    eps: float,
) -> Eigenvalues:
    """The `Eigenvalues` with a verdict by what Av − λv leaves over."""
    residuals = jax.lax.stop_gradient(jnp.linalg.norm(left, axis=1))
    is_found = jnp.all(residuals <= target(eps, values, scale))
    result = _tree.where(is_found, RESULTS.successful, RESULTS.not_converged)
    # Last: NaN fails the comparison above as well, and would pass for a search that ran out of
    # steps.
    is_finite = jnp.all(jnp.isfinite(values)) & jnp.all(jnp.isfinite(residuals))
    result = _tree.where(is_finite, result, RESULTS.nonfinite)
    return Eigenvalues(values, residuals, result, jnp.asarray(num_steps, int))


def _dense(
    product: Any, project: Any, like: Array, num: int
) -> tuple[Float[Array, "num D"], Scalar, int]:
    eye = jnp.eye(like.size, dtype=like.dtype)
    projector = jax.vmap(project)(eye)
    matrix = jax.vmap(lambda v: project(product(v)))(projector)
    # What is projected away goes to the other end of the spectrum.
    size = jnp.linalg.norm(matrix)
    shift = jnp.where(size > 0, 2 * size, 1)
    shifted = (matrix + matrix.T) / 2 - shift * (eye - (projector + projector.T) / 2)
    return eigh(shifted)[1][:, ::-1][:, :num].T, size, like.size


@checked
def effective_rank(eigenvalues: Float[Array, " n"]) -> Scalar:
    """The effective rank of a spectrum: exp of the entropy of λᵢ/Σλ.

    It is between 1 and the number of eigenvalues that are not zero.

    Args:
        eigenvalues: of a positive semidefinite operator, (n,); rounding below zero counts as zero.

    Returns:
        A scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> print(linalg.effective_rank(jnp.array([2.0, 2.0, 0.0])).round(4))
        2.0

    References:
        Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    values = jnp.maximum(eigenvalues, 0)
    shares = values / jnp.sum(values)
    positive = shares > 0
    # ln 0 has an infinite derivative, and 0·∞ is NaN: hence two `where`s, one inside.
    logs = jnp.where(positive, jnp.log(jnp.where(positive, shares, 1)), 0)
    return jnp.exp(-jnp.sum(shares * logs))
