"""A per-example loss around its minimum, as a sum of squares."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float, PyTree

from manifoldflow import _precision, _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_indices, is_traced, shapes_of
from manifoldflow._types import Example, Point, Scalar
from manifoldflow.losses._base import AbstractExampleLoss, AbstractResidualLoss
from manifoldflow.losses._per_example import LossFn, PerExampleLoss
from manifoldflow.losses._predict import model_output

_WAYS_OUT = (
    "Two ways out: smooth the labels, or give the probabilities that ResampledLabels draws them "
    "from, so that the minimum is finite; or take OutputManifold(predict, inputs, like=point), "
    "the level set of the present outputs, which needs no minimum."
)


class ResidualForm(AbstractResidualLoss, AbstractExampleLoss):
    """A `PerExampleLoss` that is minimal at finite outputs f*(yᵢ), written with residuals.

    With Wᵢ = ∂²ℓ/∂f² at the minimum and Bᵢ Bᵢᵀ = Wᵢ, the residuals are Bᵢᵀ(fᵢ − f*ᵢ) and
    the scale is 1/N, so that scale·JᵀJ is the Hessian on the manifold. A singular Wᵢ
    (softmax ignores a common shift of the logits) gives as many residuals as its rank.
    `ZeroLossManifold(loss)` builds it; the value and the gradient are those of the loss.

    Args:
        loss: without weight decay. f* is its `minimizer_fn`, or is searched for from zero, for
            outputs shaped like the targets.

    Raises:
        ValueError: ℓ has no finite minimum (hard labels under a cross-entropy), the rank of Wᵢ
            varies with i, or the loss has weight decay; inside jit or vmap, where ranks cannot
            be counted.

    Assumes:
        ℓ is smooth with ∂²ℓ positive semidefinite at its minimum: checked when built.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss_fn = lambda f, p: jnp.logaddexp(0, f) - p * f
        >>> targets = jnp.array([0.2, 0.9])
        >>> loss = mf.PerExampleLoss(jnp.eye(2), targets, loss_fn, predict=jnp.dot)
        >>> print(mf.losses.ResidualForm(loss).minimizers.round(2))  # log p/(1 − p)
        [-1.39  2.2 ]
    """

    loss: PerExampleLoss
    minimizers: Float[Array, "N ..."]
    roots: Float[Array, "N outputs rank"]

    @checked
    def __init__(self, loss: PerExampleLoss):
        if loss.weight_decay is not None:
            raise ValueError(
                "A PerExampleLoss with weight decay has no zero-loss manifold: the decay moves its "
                "minima off the set of fits. Leave weight_decay out and walk that set under "
                "WeightDecayFlow, or use MinimizerManifold(loss, rank) for the minima as they are."
            )
        if is_traced((loss.inputs, loss.targets)):
            raise ValueError(
                "The zero-loss manifold of a PerExampleLoss counts the rank of its output Hessians "
                "when it is built, so it cannot be built inside jit or vmap. Build "
                "ZeroLossManifold(loss) outside and pass that in."
            )
        self.loss = loss
        self.minimizers = _minimizers(loss)
        # `output_hessian` is that of the mean over N: times N it is Wᵢ.
        at = jax.jit(lambda loss, f: loss.output_hessian(f, loss.targets) * len(f))
        self.roots = _roots_of_constant_rank(np.asarray(at(loss, self.minimizers)))

    @property
    def inputs(self) -> PyTree[Array]:
        return self.loss.inputs

    @property
    def targets(self) -> PyTree[Array]:
        return self.loss.targets

    @property
    def trainable(self) -> _tree.Static | None:
        return self.loss.trainable

    @property
    def weight_decay(self) -> None:
        return None

    @property
    def data(self) -> PyTree[Array]:
        return self.inputs, self.targets, self.minimizers, self.roots

    @property
    def scale(self) -> Scalar:
        return jnp.asarray(1 / len(self.minimizers))

    @property
    def num_residuals(self) -> int:
        """The number of examples times the rank of the output Hessian."""
        return len(self.roots) * self.roots.shape[-1]

    def example_output(self, point: Point, x: Example) -> Float[Array, "..."]:
        return model_output(self.loss.predict, point, x, self.minimizers.shape[1:])

    def example_residual(self, point: Point, example: Example) -> Float[Array, " k"]:
        x, _, minimizer, root = example
        output = self.example_output(point, x)
        return _precision.matmul((output - minimizer).reshape(-1), root)

    def __call__(self, point: Point) -> Scalar:
        return self.loss(point)

    def gauss_newton_root(self, point: Point) -> linalg.AbstractJacobian:
        """The root of the `PerExampleLoss`, with the output Hessian at the present outputs."""
        return self.loss.gauss_newton_root(point)

    def output_gradient(
        self, outputs: Float[Array, "N ..."], targets: PyTree[Array]
    ) -> Float[Array, "N ..."]:
        """The derivatives ∂ℓ(fᵢ, yᵢ)/∂fᵢ/N."""
        return self.loss.output_gradient(outputs, targets)

    def residual_weights(self, weights: Float[Array, "N outputs"]) -> Float[Array, " n"] | None:
        """The vectors Bᵢ⁻¹wᵢ where the output Hessians are regular, else None."""
        if self.roots.shape[1] != self.roots.shape[2]:
            return None
        roots = self.roots.astype(weights.dtype)
        return jnp.linalg.solve(roots, weights[..., None])[..., 0].reshape(-1)

    def select(self, indices: Any) -> "ResidualForm":
        indices = checked_indices(indices, self.num_examples)
        chosen = self.loss.select(indices), self.minimizers[indices], self.roots[indices]
        return eqx.tree_at(lambda form: (form.loss, form.minimizers, form.roots), self, chosen)


def _newton(
    loss_fn: LossFn, output: Array, target: PyTree[Array], cutoff: float | None
) -> tuple[Array, Array]:
    """The gradient of ℓ in the outputs, and H⁺ times it."""
    slope = jax.grad(loss_fn)(output, target).reshape(-1)
    hessian = jax.hessian(loss_fn)(output, target).reshape(slope.size, slope.size)
    return slope, _precision.matmul(linalg.pseudo_inverse(hessian, cutoff), slope)


def _minimizers(loss: PerExampleLoss) -> Array:
    loss_fn, minimizer_fn = loss.example_loss, loss.minimizer_fn
    if minimizer_fn is None:
        found = jax.jit(jax.vmap(lambda y: _search_minimizer(loss_fn, y)))(loss.targets)
    else:
        found = jax.vmap(lambda y: jnp.asarray(minimizer_fn(y)))(loss.targets)
        found = found.astype(jnp.result_type(found.dtype, jnp.float32))
    root = _precision.eps_of_dtype(found) ** 0.5

    def newton_step(output: Array, target: PyTree[Array]) -> tuple[Array, Array]:
        slope, step = _newton(loss_fn, output, target, root)
        return jnp.max(jnp.abs(slope)), jnp.max(jnp.abs(step))

    slopes, steps = jax.jit(jax.vmap(newton_step))(found, loss.targets)
    worst = float(jnp.max(slopes))
    # Far out a loss without a minimum is flat as well, but a Newton step still goes on.
    is_far = float(jnp.max(steps)) > root * (1 + float(jnp.max(jnp.abs(found))))
    if not worst < root or is_far:
        how = "the numerical search found" if minimizer_fn is None else "minimizer_fn gives"
        raise ValueError(
            "A zero-loss manifold needs outputs at which the loss is minimal; for this "
            f"PerExampleLoss {how} outputs where its gradient is still {worst:.2g}. A loss whose "
            "minimum is at infinity (cross-entropy with hard labels) has no zero-loss manifold. "
            f"{_WAYS_OUT} If there is a finite minimum, give the minimising output of one target "
            "as minimizer_fn."
        )
    return found


def _search_minimizer(loss_fn: LossFn, target: PyTree[Array]) -> Array:
    leaves = jax.tree.leaves(target)
    if len(leaves) != 1 or not jnp.issubdtype(leaves[0].dtype, jnp.inexact):
        raise ValueError(
            "The zero-loss manifold of a PerExampleLoss needs the outputs at which it is minimal, "
            "which can be searched for only where targets are one floating array shaped like the "
            f"outputs; got {shapes_of(target)} for one example. Pass minimizer_fn to "
            f"PerExampleLoss. Hard labels have no finite minimum. {_WAYS_OUT}"
        )
    start = jnp.zeros(leaves[0].shape, leaves[0].dtype)
    tolerance = _precision.eps_of_dtype(start) ** 0.75
    solver = optx.BFGS(rtol=tolerance, atol=tolerance)
    rough = optx.minimise(loss_fn, solver, start, target, max_steps=512, throw=False).value
    for _ in range(3):  # Newton's method takes it to rounding error
        _, step = _newton(loss_fn, rough, target, None)
        rough = rough - step.reshape(rough.shape)
    return rough


def _roots_of_constant_rank(hessians: np.ndarray) -> Array:
    """The roots Bᵢ (k × rank) with Bᵢ Bᵢᵀ = Wᵢ."""
    # By NumPy, on concrete numbers: the rank is the shape of an array, which JAX cannot trace.
    values, vectors = np.linalg.eigh(hessians)
    largest = values[:, -1:]
    threshold = np.sqrt(_precision.eps_of_dtype(values)) * np.maximum(largest, 0)
    ranks = np.sum(values > threshold, axis=1)
    if np.any(values < -threshold) or np.any(ranks == 0) or len(set(ranks.tolist())) != 1:
        raise ValueError(
            "A zero-loss manifold needs output Hessians at the minimum that are positive "
            "semidefinite and of one rank for all examples; those of this PerExampleLoss have "
            f"ranks {sorted(set(ranks.tolist()))} and smallest eigenvalue {values.min():.2g}. "
            "Check minimizer_fn."
        )
    rank = int(ranks[0])
    return jnp.asarray(vectors[:, :, -rank:] * np.sqrt(values[:, None, -rank:]))
