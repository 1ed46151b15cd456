"""Models in their kernel regime: replaced by their linearisation at one point."""

from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._errors import shapes_of
from manifoldflow._types import Coordinates, Example, Point
from manifoldflow.losses._least_squares import LeastSquares
from manifoldflow.losses._per_example import PerExampleLoss
from manifoldflow.losses._reach import check_reach

Loss = TypeVar("Loss", bound=LeastSquares | PerExampleLoss)


@checked
def linearized(loss: Loss, point: Point) -> Loss:
    """The same loss with its model linearised at a point: training in the kernel regime.

    f(θ) is replaced by f_lin(θ) = f(θ₀) + ∂f(θ₀)[θ − θ₀], whose Gram matrix (the neural tangent
    kernel) is K(θ₀) at every θ. The points stay those of the model, so that all that takes a loss
    takes this one: `simulate` runs gradient descent on it, `limit_map` gives the end of gradient
    flow, `ZeroLossManifold` its affine space of fits. An output costs one directional derivative;
    neither n×D nor D×D numbers are kept. `diagnostics.kernel_change` says how far a run of the
    model itself has left this regime.

    Args:
        loss: a `LeastSquares` or `PerExampleLoss` of any model.
        point: θ₀. What is frozen, or no coordinate, is taken from here.

    Returns:
        A loss of the same kind, on the same data and with the same `trainable`.

    Raises:
        ValueError: the loss has no derivative in some coordinate; when called, a point whose
            coordinates are not like those of θ₀.

    References:
        [LiWangArora2022, section 6.3].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=lambda w, x: x @ w**2)
        >>> lazy = mf.linearized(loss, jnp.ones(2))
        >>> print(lazy.outputs(jnp.array([1.0, 3.0])))  # the model itself gives 3² = 9
        [1. 5.]
    """
    coordinates, remainder = loss.split(point)
    inputs = _tree.cast_floats(loss.inputs, _tree.dtype_of(coordinates))
    check_reach(loss.example_output, coordinates, remainder, inputs)
    # Arrays stay leaves of the module: as static data they would be compiled in and have no hash.
    arrays, rest = eqx.partition(remainder, eqx.is_array)
    model = _Linearized(loss.predict, coordinates, arrays, _tree.Static(rest), loss.trainable)
    return eqx.tree_at(lambda loss: loss.predict, loss, model)


class _Linearized(eqx.Module):
    """The value predict(θ₀, x) plus its derivative along θ − θ₀."""

    predict: Any
    coordinates: Coordinates
    arrays: PyTree[Array]
    rest: _tree.Static = eqx.field(static=True)
    trainable: _tree.Static | None = eqx.field(static=True)

    def __call__(self, point: Point, x: Example) -> Array:
        here, _ = _tree.split(point, self.trainable)
        _check_alike(here, self.coordinates)
        # A point in float32 must not be promoted by an origin in float64, or `jvp` refuses the
        # pair.
        origin = _tree.cast_like(self.coordinates, here)
        remainder = _tree.join(self.arrays, self.rest.tree)

        def output(coordinates: Coordinates) -> Array:
            return self.predict(_tree.join(coordinates, remainder), x)

        value, change = jax.jvp(output, (origin,), (linalg.displacement(here, origin),))
        return value + change


def _check_alike(here: Coordinates, origin: Coordinates) -> None:
    shapes = [
        [(path, leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
        for tree in (here, origin)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"A linearized loss got a point with the coordinates {shapes_of(here)}; it was "
            f"linearized at one with {shapes_of(origin)}. Give it points of the same model."
        )
