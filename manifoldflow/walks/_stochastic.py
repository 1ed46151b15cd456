"""A walk to flatter fits by ordinary gradients of batches, without any matrix."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count, checked_nonnegative, checked_positive, is_traced
from manifoldflow._jit import jit_part
from manifoldflow._types import Coordinates, Key, Point, Scalar, Tangent
from manifoldflow.losses import AbstractLoss, LeastSquares, PerExampleLoss
from manifoldflow.noise import AbstractStochasticGradient
from manifoldflow.walks._probe import checked_curvature, probe

# Of products that the compiler may cut: TF32 on GPUs, bfloat16 on TPUs.
_PRODUCT_ROUNDING = {"cpu": 0.0, "tpu": 2.0**-8}


class StochasticWalk(AbstractStochasticGradient):
    """The unbiased gradient of L + `strength`·tr G on a batch, for any Optax training loop.

    G is the Gauss-Newton matrix, so that tr G = tr ∇²L at zero loss. One draw takes two passes
    forwards and three backwards, less than three gradients, and as much memory as one of them:
    no Jacobian, no Gram matrix, no second derivative, for any number of examples and weights.
    With random signs ε on the outputs of the batch, q = εᵀφ(f) and g = ∇q,

        gradient = ∇L + strength · 2·[∇q(θ + h·g) − g]/h,    E 2∇²q·g = ∇ tr G,

    where ∂φᵀ∂φ is the output Hessian: φ = √scale·f of a squared loss, 2√p(y | f) of labels y. As
    −ε is as likely as ε, the difference is biased in h² only. The step h is relative to the
    weights, h = `relative_step`·Σ|θⱼgⱼ|/‖g‖², so that units of outputs and weights do not matter.

    It holds no loss: hand it that of a batch, in a loop of your own, or give it to `simulate`,
    which draws batches of `batch_size`.

        walk = mf.walks.StochasticWalk(strength=1e-3)

        @jax.jit
        def step(params, state, images, labels, key):
            batch = mf.LeastSquares(images, labels, predict=predict)
            updates, state = optimizer.update(walk.gradient(batch, params, key), state, params)
            return optax.apply_updates(params, updates), state

    **What it follows.** For small learning rates η and strengths, SGD on it follows
    Y' = −P∇tr G on the manifold of fits, in the time strength·Ση after its steps (η/(1 − β) in
    the place of η with momentum β). That of label noise, Y' = −(c/4)P∇tr∇²L with
    c = `LabelNoise.strength(loss)`, is at

        t = (4/c)·strength·Ση

    then, so that strength = ηc/4 takes as many steps as label noise does. (`times` of `simulate`
    are Ση² here as for any noise.) The loss on the way is of order strength²; some steps
    without it, or `limit_map`, take it off again.

    Args:
        strength: λ ≥ 0, of the trace against the loss. It may be traced: a schedule is
            `StochasticWalk(schedule(step))` in the training step.
        batch_size: B, examples drawn from those of the loss, without replacement; None for
            all of them, as where the loss is that of a batch already.
        relative_step: δ in (0, 1), by which h·g changes the weights. By default the cube root
            of the rounding of the model: that of its coarsest numbers, bfloat16 within a model
            of float32 weights among them.

    Raises:
        ValueError: a negative strength, a batch size below 1 or above N; a loss other than
            `LeastSquares` and `PerExampleLoss`, or one of the latter with several outputs that is
            neither a sum over them nor a negative log-likelihood of classes.

    Assumes:
        The curvature of ℓ in the output is not negative; where it is, it counts as zero. Kinks
        of a ReLU that a step of h·g crosses count as curvature.

    Examples:
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=lambda w, x: x @ jnp.sinh(w))
        >>> point = jnp.arcsinh(jnp.ones(2))  # of loss zero, where tr G = cosh(w)²/2, summed
        >>> gradient = mf.walks.StochasticWalk(strength=1.0).gradient(loss, point, jr.key(0))
        >>> print(gradient.round(1), (jnp.sinh(2 * point) / 2).round(1))
        [1.4 1.4] [1.4 1.4]

    References:
        The limit: [Blanc2020; LiWangArora2022, Corollary 5.2].
    """

    strength: Scalar
    batch_size: int | None = eqx.field(static=True)
    relative_step: Scalar | None

    @checked
    def __init__(self, strength: Any, batch_size: Any = None, *, relative_step: Any = None):
        name = "StochasticWalk"
        self.strength = checked_nonnegative(f"{name}: strength", strength, "Use 0 for none.")
        known = f"{name}: batch_size (None for all examples)"
        self.batch_size = None if batch_size is None else checked_count(known, batch_size)
        if relative_step is not None:
            relative_step = checked_positive(f"{name}: relative_step", relative_step)
            if not is_traced(relative_step) and not float(relative_step) < 1:
                raise ValueError(
                    f"{name}: relative_step must be below 1, a part of the weights; got "
                    f"{float(relative_step):g}. Leave it out for the cube root of rounding."
                )
        self.relative_step = relative_step

    def gradient(self, loss: AbstractLoss, point: Point, key: Key) -> Tangent:
        """The stochastic gradient of L + strength·tr G, with the structure of the coordinates."""
        return self.gradient_and_trace(loss, point, key)[0]

    @checked
    @jit_part
    def gradient_and_trace(
        self, loss: AbstractLoss, point: Point, key: Key
    ) -> tuple[Tangent, Scalar]:
        """`gradient`, and ‖g‖², an unbiased estimate of tr G that comes with it."""
        batch_key, sign_key = jr.split(key)
        batch = self._batch(loss, batch_key)
        coordinates, remainder = batch.split(point)

        def outputs_at(x: Coordinates) -> Array:
            return batch.outputs(_tree.join(x, remainder))

        outputs, pull = jax.vjp(outputs_at, coordinates)
        targets = _tree.cast_floats(batch.targets, outputs.dtype)
        (slope,) = pull(batch.output_gradient(outputs, targets).astype(outputs.dtype))
        if batch.weight_decay is not None:
            slope = _tree.add(slope, _tree.scale(batch.weight_decay, coordinates))
        weights = probe(batch, outputs, sign_key)
        (here,) = pull(weights(outputs))
        relative = self.relative_step
        if relative is None:
            # The bias grows like h² and rounding like 1/h, so that their sum is least near the cube
            # root.
            relative = _rounding(outputs_at, coordinates) ** (1 / 3)
        unit, size = _tree.in_own_units(here)
        step = _step(coordinates, unit, relative)
        moved = _tree.add(coordinates, _tree.scale(step, unit))
        outputs, pull = jax.vjp(outputs_at, moved)
        (there,) = pull(weights(outputs))
        # h = step/size, as the direction is g/size.
        factor = 2 * self.strength * (size / step)
        bent = _tree.scale(factor, jax.tree.map(jnp.subtract, there, here))
        return _tree.add(slope, bent), _tree.inner(here, here)

    def _batch(self, loss: AbstractLoss, key: Key) -> LeastSquares | PerExampleLoss:
        known = checked_curvature("StochasticWalk", loss)
        num_examples, size = known.num_examples, self.batch_size
        if size is None or size == num_examples:
            return known
        if size > num_examples:
            raise ValueError(
                f"StochasticWalk: batch_size={size} exceeds the {num_examples} examples of the "
                "loss. Use batch_size=None for all of them."
            )
        return known.select(jr.choice(key, num_examples, (size,), replace=False))


def _step(coordinates: Coordinates, unit: Tangent, relative: Any) -> Scalar:
    """h per unit of g: relative·Σ|θⱼgⱼ|/‖g‖².

    It is a change by `relative` in the weights that g changes: in each of two layers of which one
    is large and has small gradients.
    """
    # Sums over all weights have no digit left in half precision.
    wide = lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    coordinates, unit = jax.tree.map(wide, coordinates), jax.tree.map(wide, unit)
    square = _tree.inner(unit, unit)
    reach = _tree.inner(jax.tree.map(jnp.abs, coordinates), jax.tree.map(jnp.abs, unit))
    # At the origin there is no unit but that of the coordinates themselves.
    reach = _tree.where(reach > 0, reach, jnp.sqrt(square))
    return relative * _tree.where(square > 0, reach / jnp.where(square > 0, square, 1), 1)


def _rounding(fn: Any, coordinates: Coordinates) -> float:
    """The rounding of the coarsest floating-point numbers that come up in a function."""
    program = jax.make_jaxpr(fn)(coordinates)
    coarsest = max(_precision.eps_of_dtype(dtype) for dtype in _dtypes(program))
    if coarsest < 1e-10 or _precision.asked_for() == "highest":
        return coarsest
    return max(coarsest, _PRODUCT_ROUNDING.get(jax.default_backend(), 2.0**-10))


def _dtypes(program: Any) -> Iterator[Any]:
    body = getattr(program, "jaxpr", program)
    for variable in (*body.invars, *(v for equation in body.eqns for v in equation.outvars)):
        dtype = getattr(variable.aval, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            yield dtype
    for equation in body.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(value):
                yield from _dtypes(value)


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns")
