"""Random weights of the outputs whose covariance is the output Hessian."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree
from manifoldflow._errors import is_traced, shapes_of
from manifoldflow._types import Key
from manifoldflow.losses import LeastSquares, PerExampleLoss, ResidualForm

Outputs = Float[Array, "N ..."]
Probe = Callable[[Outputs], Outputs]

_NUM_OUTPUTS_TRIED = 3


def checked_curvature(name: str, loss: Any) -> LeastSquares | PerExampleLoss:
    """The loss over examples, if `probe` knows roots of its output Hessians."""
    if isinstance(loss, ResidualForm):
        return loss.loss
    if isinstance(loss, LeastSquares | PerExampleLoss):
        return loss
    raise ValueError(
        f"{name} lowers the Gauss-Newton trace of a LeastSquares or a PerExampleLoss; got "
        f"{type(loss).__name__}."
    )


def probe(loss: LeastSquares | PerExampleLoss, outputs: Outputs, key: Key) -> Probe:
    """A random field w of weights with E w(f)w(f)ᵀ = ∂²L/∂f² at every f, and Jᵀw a gradient.

    The field is the derivative of εᵀφ(f) for random signs ε and a φ with ∂φᵀ∂φ = ∂²L/∂f². So
    w(f(θ)), pulled back to θ, is the gradient of a function q of θ, and
    ∇ tr JᵀWJ = ∇ E‖∇q‖² = 2 E ∇²q∇q holds exactly: nothing is missing for outputs that move W.

        squared loss      φ = √scale·f
        outputs apart     φ' = √ℓ'', one output at a time
        labels y          φ = 2√p(y | f), one for every label [the Hellinger embedding]
    """
    if isinstance(loss, LeastSquares):
        signs = jr.rademacher(key, outputs.shape, outputs.dtype)
        return lambda f: jnp.sqrt(loss.scale).astype(f.dtype) * signs
    if (labels := _labels(loss, outputs)) is not None:
        return _of_labels(loss, labels, outputs, key)
    targets = _tree.cast_floats(loss.targets, outputs.dtype)
    signs = jr.rademacher(key, outputs.shape, outputs.dtype)

    def apart(f: Outputs) -> Outputs:
        curvature = jax.vmap(functools.partial(_diagonal, loss))(f, targets)
        return signs * jnp.sqrt(jnp.maximum(curvature, 0) / len(f))

    return apart


def _of_labels(loss: PerExampleLoss, labels: np.ndarray, outputs: Outputs, key: Key) -> Probe:
    signs = jr.rademacher(key, (len(outputs), len(labels)), outputs.dtype)

    def embedded(f: Array, signs: Array) -> Array:
        losses = jax.vmap(lambda label: loss.example_loss(f, label))(labels)
        return 2 * _precision.vdot(signs, jnp.exp(-losses / 2))

    return lambda f: jax.vmap(jax.grad(embedded))(f, signs) / jnp.sqrt(len(f)).astype(f.dtype)


def _labels(loss: PerExampleLoss, outputs: Outputs) -> np.ndarray | None:
    """All labels of one example if the outputs are the logits of a likelihood, else None.

    Raises:
        ValueError: several outputs of an example that are neither that nor apart.
    """
    shape, targets = outputs.shape[1:], jax.tree.leaves(loss.targets)
    if np.prod(shape, dtype=int) == 1:
        return None
    if len(shape) == 1 and len(targets) == 1 and targets[0].shape[1:] in ((), shape):
        is_index = targets[0].ndim == 1
        # In NumPy: within jit JAX makes tracers even of constants, and nothing could be checked.
        dtype = targets[0].dtype if is_index else outputs.dtype
        labels = (np.arange(*shape) if is_index else np.eye(*shape)).astype(dtype)
        if _is_likelihood(loss, labels, outputs):
            return labels
    if _is_apart(loss, outputs):
        return None
    raise ValueError(
        "StochasticWalk knows the output Hessian of losses of one output, of sums of such, and of "
        "negative log-likelihoods of classes with the outputs as logits; this loss of outputs "
        f"{shape} and targets {shapes_of(loss.targets)} is none of these. Of labels that are "
        "smoothed or weighted make probabilities, targets (examples, classes) of "
        "lambda f, p: jax.nn.logsumexp(f) - p @ f."
    )


def _is_likelihood(loss: PerExampleLoss, labels: np.ndarray, outputs: Outputs) -> bool:
    """True where Σ exp(−ℓ(f, y)) = 1 over the labels, and ∂²ℓ/∂f² is the same for all of them."""

    def asked(f: Array, v: Array) -> tuple[Array, Array]:
        total = jnp.sum(jnp.exp(-jax.vmap(lambda y: loss.example_loss(f, y))(labels)))
        some = np.concatenate([labels[:4], labels[-1:]])
        bent = jax.vmap(lambda y: _hessian_product(loss, f, y, v))(some)
        return total - 1, (bent - bent[:1]) / _tree.size_of(bent)

    return _vanish(asked, outputs)


def _is_apart(loss: PerExampleLoss, outputs: Outputs) -> bool:
    """True where ∂²ℓ/∂f² is diagonal, and each entry depends on its own output alone."""
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), loss.targets)

    def asked(f: Array, v: Array) -> tuple[Array, Array]:
        target = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.3).astype(leaf.dtype), like)
        diagonal = lambda f: _diagonal(loss, f, target)
        along = lambda v: jax.jvp(diagonal, (f,), (v,))[1]
        here = diagonal(f)
        return (
            (_hessian_product(loss, f, target, v) - here * v) / _tree.size_of(here),
            (along(v) - along(jnp.ones_like(v)) * v) / _tree.size_of(here),
        )

    return _vanish(asked, outputs)


def _vanish(asked: Callable[[Array, Array], Any], outputs: Outputs) -> bool:
    """True where a function of outputs and directions vanishes for a few that are drawn.

    Known where the program is traced, unless the loss itself holds traced values: those are
    taken on trust.
    """
    rng = np.random.default_rng(0)
    f, v = rng.standard_normal((2, _NUM_OUTPUTS_TRIED, *outputs.shape[1:]))
    with jax.ensure_compile_time_eval(), _precision.full_precision():
        dtype = jnp.promote_types(outputs.dtype, jnp.float32)
        found = jax.tree.leaves(jax.jit(jax.vmap(asked))(f.astype(dtype), v.astype(dtype)))
    if is_traced(found):
        return True
    return all(
        np.all(np.abs(x) < _precision.eps_of_dtype(x) ** 0.5) for x in map(np.asarray, found)
    )


def _hessian_product(loss: PerExampleLoss, f: Array, target: Any, v: Array) -> Array:
    return jax.jvp(lambda f: jax.grad(loss.example_loss)(f, target), (f,), (v,))[1]


def _diagonal(loss: PerExampleLoss, f: Array, target: Any) -> Array:
    """∂²ℓ/∂f² of outputs that are apart, its diagonal."""
    return _hessian_product(loss, f, target, jnp.ones_like(f))
