"""Means of any per-example loss, with or without a minimum, with or without weight decay."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, PyTree

from manifoldflow import _precision, _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._errors import (
    checked_data,
    checked_indices,
    checked_nonnegative,
    is_traced,
    shapes_of,
)
from manifoldflow._jit import jit_part
from manifoldflow._types import Coordinates, Example, Point, Scalar, Tangent
from manifoldflow.losses._base import AbstractExampleLoss
from manifoldflow.losses._predict import call_point, model_output

LossFn = Callable[[Array, PyTree[Array]], Scalar]


class PerExampleLoss(AbstractExampleLoss):
    """A mean of any per-example loss: L(θ) = (1/N) Σᵢ ℓ(f(θ, xᵢ), yᵢ) + (λ/2)‖θ‖².

    ℓ needs no minimum. Cross-entropies with hard labels are fine, whole numbers among them:

        lambda f, y: jax.nn.logsumexp(f) - f[y]

    With J = ∂f and Wᵢ = ∂²ℓ/∂f² at the present outputs, the Gauss-Newton matrix is
    G = (1/N) Σᵢ JᵢᵀWᵢJᵢ, of the mean over examples and without λ. The Hessian includes λ:
    tr∇²L = tr G + (1/N) Σᵢ ∂ℓ/∂f·tr∇²fᵢ + λD. Where the labels are classes with the
    log-likelihood −ℓ, and f their logits, G is the Fisher matrix.

    A zero-loss manifold needs more: an ℓ that is minimal at a finite output, and no weight decay.
    `ZeroLossManifold` searches for that minimum when it is built, and says why there is none;
    `OutputManifold` needs none.

    Args:
        inputs: PyTree of arrays with a leading axis of N examples.
        targets: PyTree of arrays with the same leading axis; yᵢ may be anything.
        loss_fn: `loss_fn(output, target)` → scalar, for one example.
        predict: `predict(point, x)` → output; by default `point(x)`.
        weight_decay: λ ≥ 0, per unit of ‖θ‖² over the leaves that may move; 0 for none.
        minimizer_fn: `minimizer_fn(target)` → the output at which ℓ is minimal, for
            `ZeroLossManifold` and `limit_map`; without it, they search for that output.
        trainable: says which leaves may move, as for `LeastSquares`.

    Raises:
        ValueError: lengths differ, NaN or inf in the data, a negative weight decay; when called,
            a `loss_fn` whose value is no real scalar.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss_fn = lambda f, y: jax.nn.logsumexp(f) - f[y]
        >>> predict = lambda w, x: w @ x
        >>> loss = mf.PerExampleLoss(jnp.eye(2), jnp.array([0, 2]), loss_fn, predict=predict)
        >>> print(f"{loss.trace_gauss_newton(jnp.zeros((3, 2))):.4f}")
        0.6667
    """

    inputs: PyTree[Array]
    targets: PyTree[Array]
    loss_fn: Callable[..., Any]
    predict: Callable[..., Any]
    weight_decay: Scalar | None
    minimizer_fn: Callable[..., Any] | None
    trainable: _tree.Static | None = eqx.field(static=True)

    @checked
    def __init__(
        self,
        inputs: PyTree[Any],
        targets: PyTree[Any],
        loss_fn: LossFn,
        *,
        predict: Callable[[Point, Example], Array] | None = None,
        weight_decay: Any = 0,
        minimizer_fn: Callable[[PyTree[Array]], Array] | None = None,
        trainable: PyTree[Any] | None = None,
    ):
        self.inputs, self.targets = checked_data("PerExampleLoss", (inputs, targets))
        if not jax.tree.leaves(inputs) or not jax.tree.leaves(targets):
            raise ValueError("PerExampleLoss needs inputs and targets; got none of one of them.")
        self.loss_fn = _tree.as_pytree_callable(loss_fn)
        self.predict = _tree.as_pytree_callable(call_point if predict is None else predict)
        decay = checked_nonnegative("PerExampleLoss: weight_decay", weight_decay, "Use 0 for none.")
        # By its absence, not by its value, others know that the mean is all there is.
        is_none = not is_traced(weight_decay) and np.asarray(weight_decay) == 0
        self.weight_decay = None if is_none else decay
        self.minimizer_fn = None if minimizer_fn is None else _tree.as_pytree_callable(minimizer_fn)
        self.trainable = None if trainable is None else _tree.Static(trainable)

    @property
    def data(self) -> PyTree[Array]:
        return self.inputs, self.targets

    def example_output(self, point: Point, x: Example) -> Float[Array, "..."]:
        return model_output(self.predict, point, x, None)

    def example_loss(self, output: Array, target: PyTree[Array]) -> Scalar:
        """The loss ℓ of one example."""
        value = jnp.asarray(self.loss_fn(output, target))
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                "PerExampleLoss: loss_fn(output, target) must be one real number for one example; "
                f"got shape {value.shape} of {value.dtype} for an output of shape {output.shape} "
                f"and the target {shapes_of(target)}."
            )
        return value

    def __call__(self, point: Point) -> Scalar:
        outputs = self.outputs(point)
        targets = _tree.cast_floats(self.targets, outputs.dtype)
        mean = jnp.mean(jax.vmap(self.example_loss)(outputs, targets))
        if self.weight_decay is None:
            return mean
        coordinates, _ = self.split(point)
        decay = self.weight_decay.astype(mean.dtype)
        return mean + decay / 2 * _tree.inner(coordinates, coordinates).astype(mean.dtype)

    def output_gradient(
        self, outputs: Float[Array, "N ..."], targets: PyTree[Array]
    ) -> Float[Array, "N ..."]:
        """The derivatives ∂ℓ(fᵢ, yᵢ)/∂fᵢ/N."""
        targets = _tree.cast_floats(targets, outputs.dtype)
        return jax.vmap(jax.grad(self.example_loss))(outputs, targets) / len(outputs)

    def output_hessian(
        self, outputs: Float[Array, "N ..."], targets: PyTree[Array]
    ) -> Float[Array, "N outputs outputs"]:
        """The second derivatives ∂²ℓ(fᵢ, yᵢ)/∂fᵢ²/N, one matrix per example."""
        targets = _tree.cast_floats(targets, outputs.dtype)
        size = math.prod(outputs.shape[1:])
        hessians = jax.vmap(jax.hessian(self.example_loss))(outputs, targets)
        return hessians.reshape(len(outputs), size, size) / len(outputs)

    def residual_weights(self, weights: Float[Array, "N outputs"]) -> None:
        """None: there are no residuals."""
        del weights
        return None

    def gauss_newton_root(self, point: Point) -> linalg.AbstractJacobian:
        """The rows √(Wᵢ/N)·Jᵢ, with the output Hessian Wᵢ at the present outputs.

        Where W is not positive semidefinite, the root is that of its positive part. The derivatives
        of these rows are those of J, for constant W.
        """
        # `eigh` has no derivative where eigenvalues coincide, as those of a softmax at equal logits
        # do.
        roots = jax.lax.stop_gradient(jax.vmap(_square_root)(self._weights(point)))
        return self._turned_jacobian(point, roots)

    @checked
    def gauss_newton(self, point: Point) -> lx.AbstractLinearOperator:
        """The operator (1/N) Σᵢ JᵢᵀWᵢJᵢ: the Gauss-Newton matrix without the weight decay.

        One product costs a pass forwards and one backwards; no Jacobian is kept.
        """
        coordinates, remainder = self.split(point)
        weights = self._weights(point)
        # Linearised once: a solver's repeated products do not run the model again.
        _, push = jax.linearize(lambda x: self.outputs(_tree.join(x, remainder)), coordinates)
        pull = jax.linear_transpose(push, coordinates)

        def mv(vector: Tangent) -> Tangent:
            moved = push(vector)
            flat = moved.reshape(*weights.shape[:2])
            return pull(_precision.einsum("nij,nj->ni", weights, flat).reshape(moved.shape))[0]

        return lx.FunctionLinearOperator(mv, _tree.structure_of(coordinates), lx.symmetric_tag)

    @checked
    @jit_part
    def trace_gauss_newton(self, point: Point) -> Scalar:
        """The exact trace (1/N) Σᵢ tr JᵢᵀWᵢJᵢ at the present outputs, without the weight decay.

        It is a sum of squared norms of rows of a structured Jacobian, two per output, and never
        builds n×D numbers. W may be indefinite, and all derivatives in the point are there.
        """
        weights = self._weights(point)
        if weights.shape[-1] == 1:
            return jnp.sum(weights[:, 0, 0] * self.output_jacobian(point).row_norms_squared())
        # tr JᵀWJ = |A₊J|² − |A₋J|² with A± = (√c/2)(1 ± W/c): a root of W would have no
        # derivative where eigenvalues coincide, as all do at the start.
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(weights), axis=(1, 2), keepdims=True))
        size = _tree.where(largest > 0, largest, 1)
        identity = jnp.eye(weights.shape[-1], dtype=weights.dtype)
        factors = [jnp.sqrt(size) / 2 * (identity + sign * weights / size) for sign in (1, -1)]
        jacobian = self._turned_jacobian(point, jnp.concatenate(factors, axis=1))
        plus, minus = jnp.split(jacobian.row_norms_squared().reshape(len(weights), -1), 2, axis=1)
        return jnp.sum(jnp.sum(plus, axis=1) - jnp.sum(minus, axis=1))

    def _weights(self, point: Point) -> Float[Array, "N outputs outputs"]:
        return self.output_hessian(self.outputs(point), self.targets)

    def _turned_jacobian(
        self, point: Point, factors: Float[Array, "N rows outputs"]
    ) -> linalg.AbstractJacobian:
        """The Jacobian with the rows AᵢJᵢ."""
        coordinates, remainder = self.split(point)
        inputs = _tree.cast_floats(self.inputs, _tree.dtype_of(coordinates))

        def turned(x: Coordinates, example: Example) -> Array:
            example_inputs, factor = example
            output = self.example_output(_tree.join(x, remainder), example_inputs)
            return _precision.matmul(factor, output.reshape(-1).astype(factor.dtype))

        return linalg.jacobian(turned, coordinates, (inputs, factors))

    def select(self, indices: Any) -> "PerExampleLoss":
        indices = checked_indices(indices, self.num_examples)
        data = jax.tree.map(lambda leaf: leaf[indices], self.data)
        return eqx.tree_at(lambda loss: (loss.inputs, loss.targets), self, data)


def _square_root(matrix: Array) -> Array:
    """A symmetric S with S² = the positive part of a symmetric matrix."""
    values, vectors = jnp.linalg.eigh(matrix)
    return _precision.matmul(vectors * jnp.sqrt(jnp.maximum(values, 0)), vectors.T)
