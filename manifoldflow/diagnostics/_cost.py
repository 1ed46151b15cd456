"""The form in which a Jacobian is kept, leaf by leaf."""

from typing import Any, NamedTuple

import equinox as eqx
import jax

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked_but
from manifoldflow._types import Point
from manifoldflow.losses import AbstractExampleLoss, AbstractResidualLoss


class LeafCost(NamedTuple):
    """One leaf of a point: the form in which its columns of the Jacobian are kept, and its cost."""

    leaf: str
    shape: tuple[int, ...]
    treatment: str
    bytes_kept: int
    bytes_dense: int


class Explanation(tuple[LeafCost, ...]):
    """The cost of the Jacobian, one `LeafCost` for every leaf; prints as a table.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.ones((5, 2)), jnp.ones(5), predict=jnp.dot)
        >>> table = mf.diagnostics.explain(loss, jnp.zeros(2))
        >>> print(isinstance(table, mf.diagnostics.Explanation), len(table))
        True 1
    """

    def __str__(self) -> str:
        lines = [f"{'leaf':<36} {'shape':<16} {'kept as':<24} {'MB':>9} {'dense MB':>9}"]
        for row in self:
            lines.append(
                f"{row.leaf:<36} {row.shape!s:<16} {row.treatment:<24} "
                f"{row.bytes_kept / 2**20:>9.3g} {row.bytes_dense / 2**20:>9.3g}"
            )
        return "\n".join(lines)


@checked_but("loss")
def explain(loss: AbstractResidualLoss | AbstractExampleLoss, point: Point) -> Explanation:
    """The form in which the Jacobian of a loss is kept, for each leaf of a point.

    Nothing is computed. A leaf with `dense rows` is used in a way whose structure is not known: it
    costs n × its size. All others cost n × (their layer's width × the places where it is used);
    `summed` says that explicit rows are smaller than that, and kept.

    Args:
        loss: with residuals, or over examples: then it is the Jacobian of the outputs.
        point: the model.

    Returns:
        An `Explanation`: a tuple of `LeafCost`, which prints as a table.

    Raises:
        ValueError: a loss without residuals and examples.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> predict = lambda p, x: jnp.tanh(p["w"] @ x)
        >>> loss = mf.LeastSquares(jnp.ones((6, 4)), jnp.ones((6, 3)), predict=predict)
        >>> (leaf,) = mf.diagnostics.explain(loss, {"w": jnp.zeros((3, 4))})
        >>> print(leaf.leaf, leaf.shape, leaf.bytes_kept < leaf.bytes_dense)
        ['w'] (3, 4) True
    """
    if isinstance(loss, AbstractResidualLoss):
        fn, data = loss.example_residual, loss.data
    elif isinstance(loss, AbstractExampleLoss):
        fn, data = loss.example_output, loss.inputs
    else:
        raise ValueError(
            "explain needs a loss with residuals, or over examples; got "
            f"{type(loss).__name__}. Use LeastSquares or PerExampleLoss."
        )
    coordinates, remainder = loss.split(point)
    data = _tree.cast_floats(data, _tree.dtype_of(coordinates))

    def build(x: Any, data: Any) -> linalg.StructuredJacobian:
        return linalg.structured_jacobian(
            lambda x, example: fn(_tree.join(x, remainder), example), x, data
        )

    jacobian = eqx.filter_eval_shape(build, coordinates, data)
    rows = []
    for (path, treatment), leaf, blocks in zip(
        jacobian.labels, jacobian.leaves, jacobian.blocks, strict=True
    ):
        kept = sum(_bytes(array) for array in jax.tree.leaves(blocks))
        dense = jacobian.out_structure().shape[0] * _bytes(leaf)
        rows.append(LeafCost(path, leaf.shape, treatment, kept, dense))
    return Explanation(rows)


def _bytes(array: Any) -> int:
    return array.size * array.dtype.itemsize
