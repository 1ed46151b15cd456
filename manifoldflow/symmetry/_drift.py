"""The rate at which SGD changes a charge, by the noise of its gradients and by weight decay."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count, checked_nonnegative
from manifoldflow._types import Coordinates, Point, Scalar, Tangent
from manifoldflow.symmetry._generators import is_leafwise
from manifoldflow.symmetry._gradients import (
    ExampleLoss,
    gradient_moments,
    LeafSquares,
)
from manifoldflow.symmetry._orbit import semidefinite_solve
from manifoldflow.symmetry._sgd_noise import noise_of_steps, SGDNoise
from manifoldflow.symmetry._symmetry import like, noether_charge, Symmetries, symmetries_of


@checked
def charge_drift(
    charge: Callable[[Point], Any],
    example_loss: ExampleLoss,
    point: Point,
    data: PyTree[Any],
    *,
    noise_scale: Any,
    weight_decay: Any = 0.0,
) -> Scalar:
    """The drift dC/dt = −∇C·∇L − 2γ∇C·θ + σ² tr(Σ∇²C) under SGD, of any scalar C of the point.

    It is Itô's formula on the clock kη, with Σ the centred covariance of per-example gradients. For
    a charge, ∇C·∇ℓ = 0: the first term vanishes and there is no noise in dC. Where a symmetry is
    approximate the first term is what breaks it.

    Args:
        charge: C, point → scalar.
        example_loss: ℓ(point, example) → scalar, without the decay.
        point: θ.
        data: PyTree of arrays with a leading axis of examples.
        noise_scale: σ² = η/(2S) ≥ 0, the learning rate over twice the batch size.
        weight_decay: γ ≥ 0, where γ‖θ‖² is added to the loss.

    Returns:
        dC/dt. It costs a gradient and two products with ∇²C for each example.

    Raises:
        ValueError: wrong data, shapes, σ² or γ.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> loss = lambda p, x: p["u"] * p["w"] * x  # gradients (wx, ux)
        >>> point, data = {"u": jnp.array(3.0), "w": jnp.array(1.0)}, jnp.array([-1.0, 1.0])
        >>> charge = lambda p: (p["u"] ** 2 - p["w"] ** 2) / 2
        >>> print(symmetry.charge_drift(charge, loss, point, data, noise_scale=0.5))  # ½(w² − u²)
        -4.0

    References:
        [Ziyin2024, eqs. (5), (7), (20)].
    """
    noise = SGDNoise(
        example_loss,
        data,
        noise_scale=noise_scale,
        weight_decay=weight_decay,
        name="charge_drift",
    )
    return _charge_drift(_tree.as_pytree_callable(charge), noise, point)


@eqx.filter_jit
def _charge_drift(charge: Callable[..., Any], noise: SGDNoise, point: Point) -> Scalar:
    coordinates, remainder = _tree.split(point)
    gradient = jax.grad(lambda x: jnp.asarray(charge(_tree.join(x, remainder))))

    def bend(vector: Tangent) -> Scalar:
        return _tree.inner(vector, jax.jvp(gradient, (coordinates,), (vector,))[1])

    mean, trace = gradient_moments(noise.example_loss, point, noise.data, bend)
    slope = gradient(coordinates)
    decay = 2 * noise.weight_decay * _tree.inner(slope, coordinates)
    return (noise.noise_scale * trace - _tree.inner(slope, mean) - decay).astype(trace.dtype)


@checked
def noether_drift(
    symmetry: Symmetries,
    example_loss: ExampleLoss,
    point: Point,
    data: PyTree[Any],
    *,
    noise_scale: Any,
    weight_decay: Any = 0.0,
) -> Float[Array, "..."]:
    """The drift G(θ) = dC/dt = −4γC + σ² tr(ΣA) of the charge C = ½θᵀAθ under SGD.

    On the clock kη, for dθ = −∇L dt + √(2σ²Σ) dW with weight decay γ‖θ‖². Σ is the centred
    covariance of per-example gradients. Since ΣAθ = 0 there is no noise in dC.

    Args:
        symmetry: an `ExponentialSymmetry`, or a sequence of k of them.
        example_loss: ℓ(point, example) → scalar, without the decay.
        point: θ.
        data: PyTree of arrays with a leading axis of examples.
        noise_scale: σ² = η/(2S) ≥ 0, the learning rate over twice the batch size.
        weight_decay: γ ≥ 0.

    Returns:
        A scalar, or (k,). No covariance is formed. It costs one gradient for each example; for
        networks and weights that are one number for each leaf, a few gradients of the whole loss.

    Raises:
        ValueError: wrong data, shapes, σ² or γ.

    Assumes:
        ℓ has the symmetry. `check_symmetry` tests it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> loss = lambda p, x: p["u"] * p["w"] * x  # gradients (wx, ux)
        >>> point, data = {"u": jnp.array(3.0), "w": jnp.array(1.0)}, jnp.array([-1.0, 1.0])
        >>> pair = symmetry.ExponentialSymmetry({"u": 1.0, "w": -1.0})
        >>> print(symmetry.noether_drift(pair, loss, point, data, noise_scale=0.5))  # ½(w² − u²)
        -4.0

    References:
        [Ziyin2024, eq. (7)].
    """
    noise = SGDNoise(
        example_loss,
        data,
        noise_scale=noise_scale,
        weight_decay=weight_decay,
        name="noether_drift",
    )
    return like(symmetry, drift(symmetry, noise, point))


@eqx.filter_jit
def drift(symmetry: Symmetries, noise: SGDNoise, point: Point) -> Float[Array, " k"]:
    """The drift G of every symmetry, (k,)."""
    mean, traces = noise_traces(symmetry, noise.example_loss, point, noise.data)
    charges = noether_charge(symmetries_of(symmetry), point)
    # γ‖θ‖² pulls by 2γθ, and ∇C·2γθ = 2γθᵀAθ = 4γC.
    rates = noise.noise_scale * traces - 4 * noise.weight_decay * charges
    if noise.mean_scale is not None:
        rates += noise.mean_scale * quadratic_forms(symmetry, point)(mean)
    return rates.astype(traces.dtype)


@checked
@eqx.filter_jit
def orbit_velocity(symmetry: Symmetries, noise: SGDNoise, point: Point) -> Tangent:
    """The velocity θ′ along the orbit with dCᵢ/dt = Gᵢ for all charges.

    It is the one vector in the span of all Aᵢθ that moves the charges as SGD does.

    Args:
        symmetry: an `ExponentialSymmetry`, or a sequence of k that commute.
        noise: an `SGDNoise`, which moves the charges.
        point: θ; a fixed point of a symmetry, Aθ = 0, has no orbit to move on and stays.

    Returns:
        A tangent at θ.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> loss = lambda p, x: p["u"] * p["w"] * x
        >>> point, data = {"u": jnp.array(3.0), "w": jnp.array(1.0)}, jnp.array([-1.0, 1.0])
        >>> pair = symmetry.ExponentialSymmetry({"u": 1.0, "w": -1.0})
        >>> noise = symmetry.SGDNoise(loss, data, noise_scale=0.5)
        >>> velocity = symmetry.orbit_velocity(pair, noise, point)
        >>> print({name: round(float(value), 4) for name, value in velocity.items()})
        {'u': -1.2, 'w': 0.4}

    References:
        [Ziyin2024, eq. (7)].
    """
    rates = drift(symmetry, noise, point)
    along = [one.velocity(point) for one in symmetries_of(symmetry)]
    # ∇Cᵢ = Aᵢθ, so that dCᵢ/dt = Σⱼ⟨Aᵢθ, Aⱼθ⟩·speedⱼ.
    gram = jnp.stack([jnp.stack([_tree.inner(u, v) for v in along]) for u in along])
    speeds = semidefinite_solve(gram, rates, jnp.ones(rates.shape, bool))
    total = _tree.zeros_like(along[0])
    for speed, v in zip(speeds, along):
        total = _tree.add(total, _tree.scale(speed, v))
    return total


def noise_traces(
    symmetry: Symmetries, example_loss: ExampleLoss, point: Point, data: PyTree[Array]
) -> tuple[Tangent, Float[Array, " k"]]:
    """∇L, and tr(ΣA) of every symmetry."""
    coordinates, _ = _tree.split(point)
    generators = [one.at(point) for one in symmetries_of(symmetry)]
    # Only squared norms of whole leaves are known without the gradient of an example.
    if not is_leafwise(generators, coordinates):
        return gradient_moments(example_loss, point, data, quadratic_forms(symmetry, point))
    mean, squares = gradient_moments(example_loss, point, data, LeafSquares())
    rates = [jax.tree.map(lambda rate: rate.reshape(()), g.rates(coordinates)) for g in generators]
    return mean, jnp.stack([_tree.inner(rate, squares) for rate in rates])


def quadratic_forms(
    symmetry: Symmetries, point: Point
) -> Callable[[Coordinates], Float[Array, " k"]]:
    """The function v ↦ vᵀAv, for every symmetry."""
    generators = [one.at(point) for one in symmetries_of(symmetry)]
    return lambda v: jnp.stack([_tree.inner(v, generator.mv(v)) for generator in generators])


@checked
def discrete_noether_drift(
    symmetry: Symmetries,
    example_loss: ExampleLoss,
    point: Point,
    data: PyTree[Any],
    *,
    learning_rate: Any,
    batch_size: int,
    weight_decay: Any = 0.0,
    replacement: bool = False,
) -> Float[Array, "..."]:
    """The exact mean change E[Cₖ₊₁] − Cₖ of a charge in one step of SGD.

    Cₖ₊₁ = (1 − 2ηγ)²Cₖ + ½η²gᵀAg, with g the gradient of the mini-batch without decay, and E[gᵀAg]
    = f·tr(ΣA)/S + ∇LᵀA∇L. The factor f is 1 for examples drawn with replacement, else (N − S)/(N −
    1). Divided by η, for small η, it is `noether_drift` at σ² = η/(2S), plus ½η∇LᵀA∇L, which
    full-batch gradient descent has too. It vanishes at the `noise_equilibrium` of this learning
    rate and batch size.

    Args:
        symmetry: an `ExponentialSymmetry`, or a sequence of k of them.
        example_loss: ℓ(point, example) → scalar, without the decay.
        point: θₖ.
        data: PyTree of arrays with a leading axis of N examples.
        learning_rate: η ≥ 0.
        batch_size: S.
        weight_decay: γ ≥ 0.
        replacement: True where batches are drawn with replacement.

    Returns:
        A scalar, or (k,).

    Raises:
        ValueError: wrong data, shapes, η or γ; S above N without replacement.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> loss = lambda p, x: p["u"] * p["w"] * x
        >>> point, data = {"u": jnp.array(3.0), "w": jnp.array(1.0)}, jnp.array([-1.0, 1.0])
        >>> pair = symmetry.ExponentialSymmetry({"u": 1.0, "w": -1.0})
        >>> options = {"learning_rate": 0.5, "batch_size": 1}
        >>> print(
        ...     symmetry.discrete_noether_drift(pair, loss, point, data, **options)
        ... )  # ½η²(w² − u²)
        -1.0

    References:
        [Ziyin2024, eq. (98)].
    """
    name = "discrete_noether_drift"
    eta = checked_nonnegative(f"{name}: learning_rate", learning_rate, "It is a step size.")
    noise = noise_of_steps(
        example_loss,
        data,
        learning_rate=eta,
        batch_size=checked_count(f"{name}: batch_size", batch_size),
        replacement=replacement,
        weight_decay=weight_decay,
        name=name,
    )
    rates = drift(symmetry, noise, point)
    return like(symmetry, (eta * rates).astype(rates.dtype))
