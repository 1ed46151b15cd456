"""Second derivatives of many functions at once, contracted before they are formed.

With f: points → Rⁿ, sums over outputs of Hessian-vector products ∇²fᵢ·vᵢ and of quadratic
forms ⟨u, ∇²f v⟩ are what the drifts on a manifold are made of. Nothing here holds D×D
numbers, nor a tangent for each output: coefficients come as n×n matrices or as operators,
whose columns are formed a few at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import is_traced
from manifoldflow._types import Coordinates, Tangent
from manifoldflow.linalg.jacobian import AbstractJacobian

# Terms of a sum are formed together up to this many numbers: vectorised where points are
# small, one by one where a single tangent is large.
_TOGETHER = 2**19


@checked
def contract_hessians(
    jacobian_fn: Callable[[Coordinates], AbstractJacobian],
    coordinates: Coordinates,
    coefficients: Float[Array, "n n"],
) -> Tangent:
    """The sum Σᵢ ∇²fᵢ(JᵀC)ᵢ: one Hessian-vector product per output, each with its own tangent.

    (JᵀC)ᵢ, the i-th column, is a combination of the rows of J. The sum is the gradient of θ ↦
    tr(J(θ)J₀ᵀC) at J₀ = J: a Gram matrix in place of n tangents.

    Args:
        jacobian_fn: coordinates → J = ∂f there.
        coordinates: of the point.
        coefficients: C, (n, n), not necessarily symmetric.

    Returns:
        A tangent.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> of = lambda x: linalg.jacobian(
        ...     lambda x, a: a * x**2, x, jnp.ones((1, 2))
        ... )  # ∇²fᵢ = 2eᵢeᵢᵀ
        >>> print(linalg.contract_hessians(of, jnp.array([1.0, 3.0]), jnp.eye(2)))
        [ 4. 12.]
    """
    # J₀ is held fixed by not being differentiated: the gradient goes through J(θ) alone.
    frozen = jacobian_fn(coordinates)

    def weighted(x: Coordinates) -> Array:
        # tr(A·C) = Σ Aᵢⱼ Cⱼᵢ: hence the transpose.
        return jnp.sum(jacobian_fn(x).cross_gram(frozen) * coefficients.T)

    return jax.grad(weighted)(coordinates)


@checked
def hessian_product_sum(
    fn: Callable[[Coordinates], Float[Array, " n"]],
    coordinates: Coordinates,
    multipliers: lx.AbstractLinearOperator,
    tangents: lx.AbstractLinearOperator,
    *,
    chunk_size: int | None = None,
) -> Tangent:
    """The sum Σᵣ ∇²(bᵣ·f)vᵣ, with bᵣ and vᵣ the columns of two operators.

    It is Σᵢ ∇²fᵢ(VBᵀ)ᵢ with the columns of VBᵀ as tangents. One term costs about two gradients of
    b·f.

    Args:
        fn: f, coordinates → (n,).
        coordinates: of the point.
        multipliers: B, from any space of r numbers to Rⁿ.
        tangents: V, from the same space to tangents.
        chunk_size: the number of terms formed at once; None for a number that keeps memory small.

    Returns:
        A tangent.

    Raises:
        ValueError: the operators have different numbers of columns.

    Examples:
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> from manifoldflow import linalg
        >>> eye = lx.MatrixLinearOperator(jnp.eye(2))
        >>> square = lambda x: x**2  # ∇²fᵢ = 2eᵢeᵢᵀ
        >>> print(linalg.hessian_product_sum(square, jnp.ones(2), eye, eye))
        [2. 2.]
    """
    count = _common_columns(multipliers, tangents)

    def term(index: Int[Array, ""]) -> Tangent:
        multiplier, vector = column(multipliers, index), column(tangents, index)

        def transposed(x: Coordinates) -> Tangent:
            return jax.vjp(fn, x)[1](multiplier)[0]

        return jax.jvp(transposed, (coordinates,), (vector,))[1]

    return sum_terms(term, count, _chunk(chunk_size, coordinates))


@checked
def second_derivative_sum(
    fn: Callable[[Coordinates], PyTree[Array]],
    coordinates: Coordinates,
    left: lx.AbstractLinearOperator,
    right: lx.AbstractLinearOperator,
    *,
    chunk_size: int | None = None,
) -> PyTree[Array]:
    """The sum Σᵣ D²f[uᵣ, vᵣ], with uᵣ and vᵣ the columns of two operators to tangents.

    It is ⟨∇²fᵢ, UVᵀ⟩ for every output fᵢ: only the symmetric part of UVᵀ counts. One term costs
    about four evaluations of f, by forward mode over forward mode.

    Args:
        fn: f, coordinates → any PyTree of arrays.
        coordinates: of the point.
        left: U, from any space of r numbers to tangents.
        right: V, from the same space; may be the same operator.
        chunk_size: the number of terms formed at once; None for a number that keeps memory small.

    Returns:
        A PyTree like the value of f.

    Raises:
        ValueError: the operators have different numbers of columns.

    Examples:
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> from manifoldflow import linalg
        >>> eye = lx.MatrixLinearOperator(jnp.eye(3))
        >>> print(
        ...     linalg.second_derivative_sum(lambda x: x @ x, jnp.ones(3), eye, eye)
        ... )  # the Laplacian
        6.0
    """
    count = _common_columns(left, right)

    def term(index: Int[Array, ""]) -> PyTree[Array]:
        u = column(left, index)
        # One factor on both sides is the usual case. Whether two operators are equal cannot be
        # asked of traced arrays, but whether they are one can.
        v = u if right is left else column(right, index)

        def along(x: Coordinates) -> PyTree[Array]:
            return jax.jvp(fn, (x,), (u,))[1]

        return jax.jvp(along, (coordinates,), (v,))[1]

    return sum_terms(term, count, _chunk(chunk_size, coordinates))


@checked
def column(operator: lx.AbstractLinearOperator, index: Int[Array, ""]) -> PyTree[Array]:
    """One column of an operator between PyTrees, in the order of its raveled input.

    Args:
        operator: any lineax operator.
        index: the number of the column; from the end where negative.

    Returns:
        A PyTree like the operator's output.

    Raises:
        ValueError: there is no such column.

    Examples:
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> from manifoldflow import linalg
        >>> print(linalg.column(lx.MatrixLinearOperator(jnp.array([[1.0, 2.0], [3.0, 4.0]])), 1))
        [2. 4.]
    """
    structure = operator.in_structure()
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), structure)
    flat, unravel = ravel_pytree(zeros)
    if not is_traced(index) and not -flat.size <= int(index) < flat.size:
        raise ValueError(f"column: index must be one of {flat.size} columns; got {int(index)}.")
    # The operator may be a user's: products of float32 are cut to TF32 on GPUs by default.
    with _precision.full_precision():
        return operator.mv(unravel(flat.at[index].set(1)))


@checked
def columns(
    operator: lx.AbstractLinearOperator, *, chunk_size: int | None = None
) -> Float[Array, "m r"]:
    """The matrix of an operator to Rᵐ whose input is any PyTree, formed column by column.

    Args:
        operator: from r numbers to (m,).
        chunk_size: the number of columns formed at once; None for a number that keeps memory small.

    Returns:
        (m, r).

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> from manifoldflow import linalg
        >>> structure = {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}
        >>> double = lx.FunctionLinearOperator(lambda x: 2 * x["a"], structure)
        >>> print(linalg.columns(double).tolist())
        [[2.0, 0.0], [0.0, 2.0]]
    """
    count = _tree.size(operator.in_structure())
    chunk = _chunk(chunk_size, operator.in_structure())
    rows = jax.lax.map(
        lambda index: column(operator, index), jnp.arange(count), batch_size=min(chunk, count)
    )
    return rows.T


@checked
def sum_terms(
    term: Callable[[Int[Array, ""]], PyTree[Array]], count: int, chunk_size: int
) -> PyTree[Array]:
    """The sum of term(r) over r = 0 … count − 1, with the memory of `chunk_size` terms.

    All chunks have nearly the same size, at most `chunk_size`, so that one program serves for all
    of them. The last chunk may ask for terms beyond count − 1. They do not count, but must have a
    value.

    Args:
        term: r → PyTree of arrays.
        count: the number of terms.
        chunk_size: the number of terms formed at once.

    Returns:
        A PyTree like one term.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> print(linalg.sum_terms(lambda r: r * jnp.ones(2), 5, chunk_size=2))
        [10. 10.]
    """
    num_chunks = -(-count // chunk_size)
    size = -(-count // num_chunks)

    def partial_sum(start: Int[Array, ""]) -> PyTree[Array]:
        indices = start + jnp.arange(size)
        with _precision.full_precision():  # the model's own products as well
            terms = jax.vmap(term)(indices)

        def total(leaf: Array) -> Array:
            counts = (indices < count).reshape(-1, *[1] * (leaf.ndim - 1))
            return jnp.sum(leaf if size * num_chunks == count else leaf * counts, axis=0)

        return jax.tree.map(total, terms)

    if num_chunks == 1:
        return partial_sum(jnp.asarray(0))
    structure = jax.eval_shape(partial_sum, jnp.asarray(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), structure)
    # Without the checkpoint, reverse mode would keep what every term computed.
    step = jax.checkpoint(lambda total, start: (_tree.add(total, partial_sum(start)), None))
    return jax.lax.scan(step, zeros, size * jnp.arange(num_chunks))[0]


def _chunk(chunk_size: int | None, tree: PyTree[Any]) -> int:
    return max(1, _TOGETHER // _tree.size(tree)) if chunk_size is None else chunk_size


def _common_columns(a: lx.AbstractLinearOperator, b: lx.AbstractLinearOperator) -> int:
    counts = _tree.size(a.in_structure()), _tree.size(b.in_structure())
    if counts[0] != counts[1]:
        raise ValueError(
            f"The two operators need the same number of columns; got {counts[0]} and {counts[1]}."
        )
    return counts[0]
