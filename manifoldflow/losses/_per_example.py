"""Means of any per-example loss that is minimal at a finite output."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float, PyTree

from manifoldflow import _precision, _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_data, checked_indices, is_traced, shapes_of
from manifoldflow._types import Example, Point, Scalar
from manifoldflow.losses._base import AbstractExampleLoss
from manifoldflow.losses._predict import call_point, model_output

LossFn = Callable[[Array, PyTree[Array]], Scalar]


class PerExampleLoss(AbstractExampleLoss):
    """L(θ) = (1/N) Σᵢ ℓ(f(θ, xᵢ), yᵢ), with ℓ minimal at a finite output f*(yᵢ).

    With Wᵢ = ∂²ℓ/∂f² at the minimum and Bᵢ Bᵢᵀ = Wᵢ, the residuals are Bᵢᵀ(fᵢ − f*ᵢ) and
    the scale is 1/N, so that scale·JᵀJ is the Hessian on the manifold. A singular Wᵢ
    (softmax ignores a common shift of the logits) gives as many residuals as its rank.

    Args:
        inputs: PyTree of arrays with a leading axis of N examples.
        targets: PyTree of arrays with the same leading axis; yᵢ may be anything.
        loss_fn: `loss_fn(output, target)` → scalar, convex near its minimum over outputs.
        predict: `predict(point, x)` → output; by default `point(x)`.
        minimizer_fn: `minimizer_fn(target)` → the output f*(y) at which ℓ is minimal.
            Without it, f* is searched for from zero, for outputs shaped like the targets.
        trainable: which leaves may move, as for `LeastSquares`.

    Raises:
        ValueError: lengths differ, NaN or inf in the data; ℓ has no finite minimum (hard
            labels under a cross-entropy: smooth them), or the rank of Wᵢ varies with i.

    Assumes:
        ℓ is smooth with ∂²ℓ positive semidefinite at its minimum: checked when built.
    """

    inputs: PyTree[Array]
    targets: PyTree[Array]
    loss_fn: Callable[..., Any]
    predict: Callable[..., Any]
    minimizers: Float[Array, "N ..."]
    roots: Float[Array, "N outputs rank"]
    trainable: _tree.Static | None = eqx.field(static=True)

    @checked
    def __init__(
        self,
        inputs: PyTree[Any],
        targets: PyTree[Any],
        loss_fn: LossFn,
        *,
        predict: Callable[[Point, Example], Array] | None = None,
        minimizer_fn: Callable[[PyTree[Array]], Array] | None = None,
        trainable: PyTree[Any] | None = None,
    ):
        self.inputs, self.targets = checked_data("PerExampleLoss", (inputs, targets))
        if not jax.tree.leaves(inputs) or not jax.tree.leaves(targets):
            raise ValueError("PerExampleLoss needs inputs and targets; got none of one of them.")
        if is_traced((self.inputs, self.targets)):
            raise ValueError(
                "PerExampleLoss counts the rank of its output Hessians when it is built, so "
                "it cannot be built inside jit or vmap. Build it outside and pass it in."
            )
        self.loss_fn = _tree.as_pytree_callable(loss_fn)
        self.predict = _tree.as_pytree_callable(call_point if predict is None else predict)
        self.trainable = None if trainable is None else _tree.Static(trainable)
        self.minimizers = _minimizers(_scalar(loss_fn), minimizer_fn, self.targets)
        hessians = jax.vmap(lambda f, y: _output_hessian(loss_fn, f, y))(
            self.minimizers, self.targets
        )
        self.roots = _roots_of_constant_rank(np.asarray(hessians))

    @property
    def data(self) -> PyTree[Array]:
        return self.inputs, self.targets, self.minimizers, self.roots

    @property
    def scale(self) -> Scalar:
        return jnp.asarray(1 / len(self.minimizers))

    @property
    def num_residuals(self) -> int:
        """Examples × rank of the output Hessian."""
        return len(self.roots) * self.roots.shape[-1]

    def example_output(self, point: Point, x: Example) -> Float[Array, "..."]:
        return model_output(self.predict, point, x, self.minimizers.shape[1:])

    def example_residual(self, point: Point, example: Example) -> Float[Array, " k"]:
        x, _, minimizer, root = example
        output = self.example_output(point, x)
        return _precision.matmul((output - minimizer).reshape(-1), root)

    def __call__(self, point: Point) -> Scalar:
        coordinates, remainder = self.split(point)
        data = _tree.cast_floats((self.inputs, self.targets), _tree.dtype_of(coordinates))
        point = _tree.join(coordinates, remainder)

        def one(x: Example, y: PyTree[Array]) -> Scalar:
            return jnp.asarray(self.loss_fn(self.example_output(point, x), y))

        return jnp.mean(jax.vmap(one)(*data))

    def gauss_newton_root(self, point: Point) -> linalg.AbstractJacobian:
        """Rows √(Wᵢ/N)·Jᵢ with the output Hessian Wᵢ at the present outputs."""
        coordinates, remainder = self.split(point)
        dtype = _tree.dtype_of(coordinates)
        inputs, targets = _tree.cast_floats((self.inputs, self.targets), dtype)

        def output(x: PyTree[Array], example: Example) -> Array:
            return self.example_output(_tree.join(x, remainder), example)

        def root(example: Example, target: PyTree[Array]) -> Array:
            hessian = _output_hessian(self.loss_fn, output(coordinates, example), target)
            return _square_root(hessian / len(self.minimizers))

        def rooted(x: PyTree[Array], example: Example) -> Array:
            example_inputs, factor = example
            return _precision.matmul(factor, output(x, example_inputs).reshape(-1))

        roots = jax.lax.stop_gradient(jax.vmap(root)(inputs, targets))
        return linalg.jacobian(rooted, coordinates, (inputs, roots))

    def output_gradient(
        self, outputs: Float[Array, "N ..."], targets: PyTree[Array]
    ) -> Float[Array, "N ..."]:
        """∂ℓ(fᵢ, yᵢ)/∂fᵢ/N."""
        targets = _tree.cast_floats(targets, outputs.dtype)
        slopes = jax.vmap(jax.grad(self.loss_fn))(outputs, targets)
        return slopes / len(self.minimizers)

    def residual_weights(self, weights: Float[Array, "N outputs"]) -> Float[Array, " n"] | None:
        """Bᵢ⁻¹wᵢ, if the output Hessians are regular."""
        if self.roots.shape[1] != self.roots.shape[2]:
            return None
        roots = self.roots.astype(weights.dtype)
        return jnp.linalg.solve(roots, weights[..., None])[..., 0].reshape(-1)

    def select(self, indices: Any) -> "PerExampleLoss":
        indices = checked_indices(indices, self.num_examples)
        data = jax.tree.map(lambda leaf: leaf[indices], self.data)
        return eqx.tree_at(
            lambda loss: (loss.inputs, loss.targets, loss.minimizers, loss.roots), self, data
        )


def _scalar(loss_fn: LossFn) -> LossFn:
    """The loss of one example, or an error that says what it must be."""

    def checked_loss(output: Array, target: PyTree[Array]) -> Scalar:
        value = jnp.asarray(loss_fn(output, target))
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                "PerExampleLoss: loss_fn(output, target) must be one real number for one example; "
                f"got shape {value.shape} of {value.dtype} for an output of shape {output.shape} "
                f"and the target {shapes_of(target)}."
            )
        return value

    return checked_loss


def _output_hessian(loss_fn: Callable[..., Any], output: Array, target: PyTree[Array]) -> Array:
    size = math.prod(output.shape)
    return jax.hessian(loss_fn)(output, target).reshape(size, size)


def _square_root(matrix: Array) -> Array:
    """A symmetric S with S² = the positive part of a symmetric matrix."""
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0))) @ vectors.T


def _minimizers(
    loss_fn: LossFn, minimizer_fn: Callable[..., Array] | None, targets: PyTree[Array]
) -> Array:
    if minimizer_fn is None:
        found = jax.jit(jax.vmap(lambda y: _search_minimizer(loss_fn, y)))(targets)
    else:
        found = jax.vmap(lambda y: jnp.asarray(minimizer_fn(y)))(targets)
        found = found.astype(jnp.result_type(found.dtype, jnp.float32))
    root = _precision.eps_of_dtype(found) ** 0.5

    def newton_step(output: Array, target: PyTree[Array]) -> tuple[Array, Array]:
        slope = jax.grad(loss_fn)(output, target).reshape(-1)
        inverse = linalg.pseudo_inverse(_output_hessian(loss_fn, output, target), root)
        return jnp.max(jnp.abs(slope)), jnp.max(jnp.abs(inverse @ slope))

    slopes, steps = jax.jit(jax.vmap(newton_step))(found, targets)
    worst = float(jnp.max(slopes))
    # Far out a loss without a minimum is flat as well, but a Newton step still goes on.
    is_far = float(jnp.max(steps)) > root * (1 + float(jnp.max(jnp.abs(found))))
    if not worst < root or is_far:
        how = "the numerical search found" if minimizer_fn is None else "minimizer_fn gives"
        raise ValueError(
            f"PerExampleLoss needs outputs at which the loss is minimal; {how} outputs where "
            f"its gradient is still {worst:.2g}. A loss whose minimum is at infinity (cross-"
            "entropy with hard labels) has no zero-loss manifold: smooth the labels, or pass "
            "a minimizer_fn that returns the minimising output of one target."
        )
    return found


def _search_minimizer(loss_fn: LossFn, target: PyTree[Array]) -> Array:
    leaves = jax.tree.leaves(target)
    if len(leaves) != 1 or not jnp.issubdtype(leaves[0].dtype, jnp.inexact):
        raise ValueError(
            "PerExampleLoss can search for the minimising outputs only where targets are one "
            f"floating array shaped like the outputs; got {shapes_of(target)}. Pass minimizer_fn."
        )
    start = jnp.zeros(leaves[0].shape, leaves[0].dtype)
    tolerance = _precision.eps_of_dtype(start) ** 0.75
    solver = optx.BFGS(rtol=tolerance, atol=tolerance)
    rough = optx.minimise(loss_fn, solver, start, target, max_steps=512, throw=False).value
    for _ in range(3):  # Newton's method takes it to rounding error
        slope = jax.grad(loss_fn)(rough, target).reshape(-1)
        step = linalg.pseudo_inverse(_output_hessian(loss_fn, rough, target)) @ slope
        rough = rough - step.reshape(rough.shape)
    return rough


def _roots_of_constant_rank(hessians: np.ndarray) -> Array:
    """Bᵢ (k × rank) with Bᵢ Bᵢᵀ = Wᵢ."""
    values, vectors = np.linalg.eigh(hessians)
    largest = values[:, -1:]
    threshold = np.sqrt(_precision.eps_of_dtype(values)) * np.maximum(largest, 0)
    ranks = np.sum(values > threshold, axis=1)
    if np.any(values < -threshold) or np.any(ranks == 0) or len(set(ranks.tolist())) != 1:
        raise ValueError(
            "PerExampleLoss needs output Hessians at the minimum that are positive "
            "semidefinite and of one rank for all examples; got ranks "
            f"{sorted(set(ranks.tolist()))} and smallest eigenvalue {values.min():.2g}. "
            "Check minimizer_fn."
        )
    rank = int(ranks[0])
    return jnp.asarray(vectors[:, :, -rank:] * np.sqrt(values[:, None, -rank:]))
