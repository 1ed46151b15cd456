"""The limits of updates: what they ask of manifold and noise, and the path for each kind."""

import jax.numpy as jnp

from manifoldflow._types import Point
from manifoldflow.flows._limit_of_rows import FAILURE, rows_limit
from manifoldflow.flows._limit_of_scaling import scaling_limit
from manifoldflow.flows._own_limit import OwnLimit
from manifoldflow.losses import AbstractExampleLoss
from manifoldflow.manifolds import AbstractManifold
from manifoldflow.noise import (
    AbstractBatchNoise,
    AbstractNoise,
    hessian_trace,
    short_limit,
    ShortLimit,
)
from manifoldflow.updates import (
    AbstractLimitedUpdate,
    AbstractPotentialUpdate,
    AbstractPreconditionedUpdate,
    AbstractRowsUpdate,
    AbstractUpdate,
    Setting,
)


def check_update(update: AbstractUpdate, manifold: AbstractManifold, noise: AbstractNoise) -> None:
    """Refuse an update whose limit is not known for this noise on this manifold."""
    if not isinstance(update, AbstractLimitedUpdate) or update.fits(setting_of(manifold, noise)):
        return
    name = type(update).__name__
    raise ValueError(
        f"LimitDiffusion has the limit of updates.{name} for {update.needs}; got "
        f"{type(noise).__name__} on a {type(manifold).__name__} of "
        f"{type(manifold.loss).__name__}. For any other iteration with small steps give its mean "
        "field and covariance to IterationLimit."
    )


def setting_of(manifold: AbstractManifold, noise: AbstractNoise) -> Setting:
    """The facts about the noise at the minimisers that updates may know."""
    loss, zero = manifold.loss, manifold.residual_loss
    limit, multiple = short_limit(noise, loss), None
    if limit is not None and limit.is_ode and limit.potential is hessian_trace:
        # 4·rate: a short form has the rate c/4.
        multiple = None if limit.at_zero_loss and zero is None else 4 * limit.rate
    if not isinstance(zero, AbstractExampleLoss):
        return Setting(multiple, None, None, None, False, 0, zero is not None)
    batch = noise.batch(zero) if isinstance(noise, AbstractBatchNoise) else None
    num_outputs = getattr(zero, "num_residuals", 0) // zero.num_examples
    if batch is None:
        return Setting(multiple, None, None, None, False, num_outputs, True)
    if batch.label_std is None:
        return Setting(multiple, None, None, batch.size, batch.is_full, num_outputs, True)
    is_one = batch.size == 1 and num_outputs == 1
    std, slope = (batch.label_std, zero.num_examples * zero.scale) if is_one else (None, None)
    return Setting(multiple, std, slope, None, False, num_outputs, True)


def potential_limit(
    update: AbstractPotentialUpdate, manifold: AbstractManifold, noise: AbstractNoise
) -> ShortLimit:
    """The short form of an update that has one."""
    rate = jnp.asarray(update.rate(setting_of(manifold, noise)))
    return ShortLimit(update.potential, rate, is_ode=True)


def has_own_limit(update: AbstractUpdate) -> bool:
    """True for an update whose drift is neither that of SGD nor the gradient of a potential."""
    return isinstance(update, AbstractRowsUpdate | AbstractPreconditionedUpdate)


def own_limit(
    update: AbstractUpdate, manifold: AbstractManifold, noise: AbstractNoise, point: Point
) -> OwnLimit:
    """The drift of such an update at a point."""
    setting = setting_of(manifold, noise)
    if isinstance(update, AbstractRowsUpdate):
        return rows_limit(update, setting, manifold, point)
    assert isinstance(update, AbstractPreconditionedUpdate)
    return scaling_limit(update, setting, manifold, noise, point)


def failure(update: AbstractUpdate) -> str:
    """The reason why an update has no drift somewhere."""
    return update.failure if isinstance(update, AbstractPreconditionedUpdate) else FAILURE
