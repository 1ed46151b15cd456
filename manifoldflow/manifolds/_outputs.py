"""The manifold of models with the outputs of a given one, whatever they were trained for."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from manifoldflow import linalg
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_data, described, is_traced
from manifoldflow._jit import jit_part
from manifoldflow._types import Constraint, Example, Point
from manifoldflow.losses import LeastSquares, PerExampleLoss
from manifoldflow.manifolds._base import AbstractManifold
from manifoldflow.manifolds._level_set import gram_normal_space, independent_constraints
from manifoldflow.manifolds._normal_space import GramNormalSpace


class OutputManifold(AbstractManifold):
    """The models with the outputs of a given one: {θ : f(θ, xᵢ) = f(θ₀, xᵢ) for all i}.

    For any network under any loss: no minimum is needed, as there is none under a cross-entropy
    with hard labels. Along it every loss of the outputs keeps its value and its gradient in them,
    while tr JᵀWJ changes: a walk that lowers it is

        manifold = OutputManifold(predict, inputs, like=point)
        flow = RiemannianGradientFlow(manifold, loss.trace_gauss_newton)
        solve(flow, point, end_time=1.0)

    The outputs count as they are: logits may not shift together, though a softmax would not
    notice. Outputs may be dependent, and more than there are coordinates: their rank counts,
    and the manifold then has the directions that symmetries of the network leave.

    Its `loss` is half the mean squared difference of the outputs, a `LeastSquares`. The noise of
    another loss, and its limit, live on the `ZeroLossManifold` of that loss.

    Args:
        predict: `predict(point, x)` maps one example to its output; None for `point(x)`.
        inputs: PyTree of arrays with a leading axis of N examples.
        like: θ₀, a point; it lies on the manifold.
        gram: the solver for Gram matrices; by default `linalg.AutoGram()`.
        trainable: says which leaves are coordinates, as for `LeastSquares`.

    Raises:
        ValueError: data of different lengths, a model whose outputs are not one array of finite
            real numbers for every example.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> weights = {"out": jnp.ones((1, 2)), "hidden": jnp.eye(2)}
        >>> predict = lambda w, x: w["out"] @ jnp.tanh(w["hidden"] @ x)
        >>> mf.OutputManifold(predict, jnp.eye(2), like=weights).dimension(weights)
        4
    """

    loss: LeastSquares
    gram: linalg.AbstractGram

    @checked_but("predict")
    def __init__(
        self,
        predict: Callable[[Point, Example], Array] | None,
        inputs: PyTree[Any],
        *,
        like: Point,
        gram: linalg.AbstractGram | None = None,
        trainable: PyTree[Any] | None = None,
    ):
        if predict is not None and not callable(predict):
            raise ValueError(
                "OutputManifold needs a function predict(point, x) for one example, or None for "
                f"point(x); got {described(predict)}."
            )
        inputs = checked_data("OutputManifold", inputs)
        # The model's outputs as any loss over these examples would see them.
        seen = PerExampleLoss(inputs, inputs, jnp.sum, predict=predict, trainable=trainable)
        outputs = _finite(seen.outputs(like))
        self.loss = LeastSquares(inputs, outputs, predict=predict, trainable=trainable)
        self.gram = linalg.AutoGram() if gram is None else gram

    def codimension(self, point: Point) -> int:
        """The number of independent outputs at the point; under a trace, that of all of them."""
        return independent_constraints(self, point)

    def constraint(self, point: Point) -> Constraint:
        return self.loss.residual(point)

    @jit_part
    def normal_space(self, point: Point) -> GramNormalSpace:
        return gram_normal_space(self.loss, self.gram, point)


def _finite(outputs: Array) -> Array:
    if not is_traced(outputs):
        # Looked at here: NaN targets would make every search fail later, without a hint of the
        # cause.
        bad = np.argwhere(~np.isfinite(np.asarray(outputs)))
        if len(bad):
            raise ValueError(
                "OutputManifold needs a model with finite outputs; those of `like` are NaN or "
                f"infinite for {len(set(bad[:, 0].tolist()))} of the {len(outputs)} inputs, "
                f"first for number {bad[0][0]}. Was its training stable?"
            )
    return outputs
