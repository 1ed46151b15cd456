"""The noise equilibrium: the point on the orbit of a symmetry at which SGD comes to rest."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_nonnegative, checked_positive
from manifoldflow._results import delivered, Info, or_nan, RESULTS
from manifoldflow._types import Coordinates, Example, Flag, Point, Scalar
from manifoldflow.symmetry._drift import drift
from manifoldflow.symmetry._generators import (
    AbstractGenerator,
    AbstractSpectralGenerator,
    Elementwise,
)
from manifoldflow.symmetry._gradients import (
    example_value,
    ExampleLoss,
    gradient_moments,
    LeafSquares,
    over_chunks,
)
from manifoldflow.symmetry._orbit import (
    Local,
    moved,
    Orbit,
    orbit_of,
    semidefinite_solve,
)
from manifoldflow.symmetry._sgd_noise import (
    checked_decay,
    in_own_units,
    noise_of_steps,
    SGDNoise,
)
from manifoldflow.symmetry._symmetry import like, Symmetries, symmetries_of

MAX_STEPS = 200
# Symmetries that hold up to this share of what they cancel are taken as such: scaling
# before a LayerNorm does up to its ε.
_BROKEN = 1e-3


@checked
def noise_equilibrium(
    symmetry: Symmetries,
    example_loss: ExampleLoss,
    point: Point,
    data: PyTree[Any],
    *,
    noise_scale: Any = None,
    learning_rate: Any = None,
    batch_size: int | None = None,
    replacement: bool = False,
    weight_decay: Any = 0.0,
    throw: bool = True,
) -> Float[Array, "..."]:
    """The λ* with G(e^{λ*A}θ) = 0: the one point on the orbit of θ where SGD's drift vanishes.

    Given σ², it is that of the limit of small learning rates, where G is `noether_drift`. Given a
    learning rate, it is that of SGD in steps of this length, where G is `discrete_noether_drift`:

        f·tr(ΣA)/S + ∇LᵀA∇L = 8γ(1 − ηγ)C/η,

    with f = 1 for batches drawn with replacement, else (N − S)/(N − 1). Gradient descent (S = N)
    has this one too.

    At λ* the potential γ‖θ‖² + ½σ² tr Σ(θ) is least on the orbit; steps of finite length add
    ¼η‖∇L‖². The problem is convex in λ and solved by Newton's method. For generators whose
    eigenvectors are known (all but functions) the gradients of the examples are formed twice (three
    times with a learning rate), however far λ* is; otherwise in every step. For networks and
    weights that are one number for each leaf not even twice.

    Args:
        symmetry: an `ExponentialSymmetry`, or a sequence of k that commute, for which all k drifts
            vanish together.
        example_loss: ℓ(point, example) → scalar, without the decay.
        point: θ, any point of the orbit.
        data: PyTree of arrays with a leading axis of N examples.
        noise_scale: σ² = η/(2S) ≥ 0; without decay it does not matter.
        learning_rate: η ≥ 0, in place of σ²; without decay it does not matter.
        batch_size: S, with a learning rate; None for all N examples, gradient descent.
        replacement: True where batches are drawn with replacement; with a learning rate.
        weight_decay: γ ≥ 0; with a learning rate below 1/η.
        throw: True raises on failure; False returns NaN.

    Returns:
        λ*, a scalar or (k,). It is ±inf where G does not change its sign, as for A = I without
        decay, or where noise acts on one side of a rescaling only. |λ*|·‖A‖ above ln(1/eps) counts
        as infinite. So does a λ* at which one side is below rounding of the other, where only
        rounding balances it (not detected for generators that are functions). Where one of several
        is infinite, the others are those with it at its bound. It is 0 where neither noise nor
        decay acts on the orbit. Differentiable in everything, in forward and reverse mode, with
        derivative 0 where infinite.

    Raises:
        ValueError: wrong data, shapes, σ², η, S or γ; both or neither of σ² and η.
        EquinoxRuntimeError: NaN, or the loss does not have the symmetry.

    Assumes:
        ℓ has the symmetry. It is checked at the result (`Info.defect`).

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> loss = lambda p, x: (p["u"] * p["w"] * x - 1.0) ** 2
        >>> point, data = {"u": jnp.array(4.0), "w": jnp.array(1.0)}, jnp.array([1.0, 2.0])
        >>> pair = symmetry.ExponentialSymmetry({"u": 1.0, "w": -1.0})
        >>> where = symmetry.noise_equilibrium(pair, loss, point, data, noise_scale=0.1)
        >>> print(where.round(4))  # −ln 2: both weights become 2
        -0.6931

    References:
        [Ziyin2024, Theorem 4.3, and Theorem D.1 in steps of finite length].
    """
    return noise_equilibrium_with_info(
        symmetry,
        example_loss,
        point,
        data,
        noise_scale=noise_scale,
        learning_rate=learning_rate,
        batch_size=batch_size,
        replacement=replacement,
        weight_decay=weight_decay,
        throw=throw,
    )[0]


@checked
def noise_equilibrium_with_info(
    symmetry: Symmetries,
    example_loss: ExampleLoss,
    point: Point,
    data: PyTree[Any],
    *,
    noise_scale: Any = None,
    learning_rate: Any = None,
    batch_size: int | None = None,
    replacement: bool = False,
    weight_decay: Any = 0.0,
    throw: bool = False,
) -> tuple[Float[Array, "..."], Info]:
    """The result of `noise_equilibrium`, with the `Info` of the search.

    It takes the arguments of `noise_equilibrium`, but `throw` is False by default. `Info.defect`
    tells how far the loss is from having the symmetry at the result: the root mean square of ∇ℓ·Aθ
    over that of |∇ℓ||Aθ| in each leaf, from 0 to about 1.

    Returns:
        (λ*, `Info`).

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> loss = lambda p, x: (p["u"] * p["w"] * x - 1.0) ** 2
        >>> point, data = {"u": jnp.array(4.0), "w": jnp.array(1.0)}, jnp.array([1.0, 2.0])
        >>> pair = symmetry.ExponentialSymmetry({"u": 1.0, "w": -1.0})
        >>> where, info = symmetry.noise_equilibrium_with_info(
        ...     pair, loss, point, data, noise_scale=0.1
        ... )
        >>> print(bool(info.is_successful), bool(info.defect < 1e-5))
        True True
    """
    options = {"weight_decay": weight_decay, "name": "noise_equilibrium", "throw": throw}
    if learning_rate is None:
        _check_in_the_limit(noise_scale, batch_size, replacement)
        noise = SGDNoise(example_loss, data, noise_scale=noise_scale, **options)
    else:
        noise = noise_of_steps(
            example_loss,
            data,
            learning_rate=_checked_rate(noise_scale, learning_rate, weight_decay),
            batch_size=batch_size,
            replacement=replacement,
            **options,
        )
    found, info = _equilibrium(symmetries_of(symmetry), noise, point)
    return like(symmetry, delivered(found, info.result, throw)), info


def _check_in_the_limit(noise_scale: Any, batch_size: int | None, replacement: bool) -> None:
    if noise_scale is None:
        raise ValueError(
            "noise_equilibrium: give noise_scale=η/(2S), or learning_rate=η with batch_size=S for "
            "steps of that length; got neither."
        )
    if batch_size is not None or replacement:
        raise ValueError(
            "noise_equilibrium: batch_size and replacement go with learning_rate; got noise_scale, "
            "which is η/(2S) already. Give learning_rate in its place for steps of that length."
        )


def _checked_rate(noise_scale: Any, learning_rate: Any, weight_decay: Any) -> Array:
    """η, with ηγ < 1."""
    if noise_scale is not None:
        raise ValueError(
            "noise_equilibrium: give noise_scale or learning_rate; got both. The first is the "
            "limit of small learning rates, the second steps of that length."
        )
    rate = checked_nonnegative(
        "noise_equilibrium: learning_rate", learning_rate, "It is a step size."
    )
    # From ηγ = 1 on decay makes charges grow, and nothing holds them.
    left = 1 - rate * checked_decay("noise_equilibrium", weight_decay)
    left = checked_positive(
        "noise_equilibrium: 1 − learning_rate·weight_decay", left, "Lower one of the two."
    )
    return jnp.where(left > 0, rate, jnp.nan)  # inside jit what is not used is not checked


@eqx.filter_jit
def _equilibrium(
    symmetries: Symmetries, noise: SGDNoise, point: Point
) -> tuple[Float[Array, " k"], Info]:
    generators = [symmetry.at(point) for symmetry in symmetries_of(symmetries)]
    coordinates, remainder = _tree.split(point)
    dtype = _tree.dtype_of(coordinates)
    noise = _without_rounding(in_own_units(noise.astype(dtype), point), point)
    norms = jnp.stack([generator.norm(coordinates) for generator in generators])

    def drifts(at: Float[Array, " k"]) -> Float[Array, " k"]:
        there = _tree.join(moved(generators, coordinates, at), remainder)
        return drift(symmetries, noise, there)

    def search(_: object, start: Float[Array, " k"]) -> tuple[Array, tuple]:
        end = _least(orbit_of(generators, point, noise), start, norms)
        # Floats, as `custom_root` wants them.
        flags = end.is_done, end.outward, _is_finite(end.local), end.num_steps
        return end.at, tuple(jnp.asarray(flag, dtype) for flag in flags)

    # Its derivative is that of a root of `drifts`, whatever the search does.
    start = jnp.zeros(len(generators), dtype)
    at, (is_done, outward, is_finite, num_steps) = jax.lax.custom_root(
        drifts, start, search, _solved, has_aux=True
    )
    frozen = jax.lax.stop_gradient((coordinates, at))
    there = _tree.join(moved(generators, *frozen), remainder)
    defect = jnp.maximum(
        _broken(generators, there, noise.example_loss, noise.data),
        _noncommuting(generators, frozen[0]),
    )
    result = _tree.where(is_done > 0, RESULTS.successful, RESULTS.out_of_steps)
    result = _tree.where(defect <= _BROKEN, result, RESULTS.not_a_symmetry)
    is_finite = (is_finite > 0) & jnp.isfinite(defect)
    num_steps = num_steps.astype(int)
    info = Info(_tree.where(is_finite, result, RESULTS.nonfinite), defect, num_steps, num_steps)
    outward = jnp.where(outward != 0, outward, _vanished_side(generators, there))
    at = jnp.where(outward != 0, jnp.copysign(jnp.inf, outward), at)
    return or_nan(at, info.is_successful), info


def _without_rounding(noise: SGDNoise, point: Point) -> SGDNoise:
    """The noise without ∇L where that is rounding of the examples' gradients, at a minimum."""
    if noise.mean_scale is None:
        return noise
    square = LeafSquares()
    mean, centred = gradient_moments(noise.example_loss, point, noise.data, square)
    size, spread = (sum(jax.tree.leaves(squares)) for squares in (square(mean), centred))
    is_rounding = size <= (64 * _precision.eps_of_dtype(noise.mean_scale)) ** 2 * spread
    kept = jnp.where(is_rounding, 0, noise.mean_scale)
    return eqx.tree_at(lambda noise: noise.mean_scale, noise, kept)


class _Step(eqx.Module):
    at: Float[Array, " k"]
    local: Local
    stretch: Scalar  # of the next Newton step
    outward: Float[Array, " k"]  # ±1 where λ is at its bound and pushed beyond
    is_done: Flag
    num_steps: Int[Array, ""]


def _is_finite(local: Local) -> Flag:
    return _tree.all_finite(local)


def _least(orbit: Orbit, start: Float[Array, " k"], norms: Float[Array, " k"]) -> _Step:
    """The minimum of a convex sum of exponentials, by damped Newton within bounds.

    Where one exponential e^{2μλ} rules, a Newton step has length 1/(2μ) however far there
    is to go: while the slope goes on steps are doubled.
    """
    eps = _precision.eps_of_dtype(start)
    # Beyond it one side of θ is rounding of the other: e^{λ‖A‖} = 1/eps.
    bound = -math.log(eps) / jnp.where(norms > 0, norms, 1)

    def pushed(at: Float[Array, " k"], local: Local) -> Float[Array, " k"]:
        return jnp.sign(at) * ((jnp.abs(at) >= bound) & (at * local.drift > 0))

    def going(state: _Step) -> Flag:
        return ~state.is_done & (state.num_steps < MAX_STEPS)

    def body(state: _Step) -> _Step:
        newton = semidefinite_solve(state.local.curvature, state.local.drift, state.outward == 0)
        is_last = jnp.max(jnp.abs(newton) * norms) <= eps**0.5
        stretch = jnp.where(is_last, 1, state.stretch)
        trial = jnp.clip(state.at + stretch * newton, -bound, bound)
        local = orbit(trial)
        step = trial - state.at
        slope = _precision.vdot(state.local.drift, step)
        # Armijo's condition, the drift being −∇Φ. At the minimum Φ no longer falls but by rounding.
        allowed = state.local.potential * (1 + 8 * eps) - 1e-4 * slope
        is_good = (_is_finite(local) & (local.potential <= allowed)) | is_last
        goes_on = _precision.vdot(local.drift, step) > slope / 2
        grown = jnp.where(goes_on, 2 * stretch, 1)
        at = jnp.where(is_good, trial, state.at)
        local = _tree.where(is_good, local, state.local)
        return _Step(
            at,
            local,
            jnp.where(is_good, grown, stretch / 4).astype(start.dtype),
            pushed(at, local),
            is_last,
            state.num_steps + 1,
        )

    first = orbit(start)
    dead = ~_is_finite(first)
    one = jnp.ones((), start.dtype)
    state = _Step(start, first, one, pushed(start, first), dead, jnp.asarray(0))
    return jax.lax.while_loop(going, body, state)


def _solved(linear: Any, right: Float[Array, " k"]) -> Float[Array, " k"]:
    """linear⁻¹(right), 0 where `linear` is flat: at infinity, or without any noise."""
    matrix = jax.jacfwd(linear)(jnp.zeros_like(right))
    return semidefinite_solve(-matrix, -right, jnp.ones(right.shape, bool))


def _vanished_side(generators: Sequence[AbstractGenerator], point: Point) -> Float[Array, " k"]:
    """±1 where one side of θ has shrunk below rounding of the other, at an equilibrium.

    For ∇ℓ·A₊θ = −∇ℓ·A₋θ the gradients of the larger side are then orthogonal to it up to
    rounding, so that rounding balanced it and not noise. 0 where eigenvectors are unknown.
    """
    coordinates, _ = _tree.split(point)
    dtype = _tree.dtype_of(coordinates)

    def of(generator: AbstractGenerator) -> Scalar:
        if not isinstance(generator, AbstractSpectralGenerator):
            return jnp.zeros((), dtype)
        modes, rates = generator.modes(coordinates), generator.rates(coordinates)
        side = lambda m, r, sign: jnp.sum(jnp.where(sign * r > 0, (r * m) ** 2, 0))
        up, down = (
            sum(jax.tree.leaves(jax.tree.map(lambda m, r, s=sign: side(m, r, s), modes, rates)))
            for sign in (1, -1)
        )
        least = (64 * _precision.eps_of_dtype(dtype)) ** 2
        shrunk = lambda small, large: (small > 0) & (small < least * large)
        return (shrunk(down, up).astype(dtype) - shrunk(up, down)).astype(dtype)

    return jnp.stack([of(generator) for generator in generators])


def _broken(
    generators: Sequence[AbstractGenerator],
    point: Point,
    example_loss: ExampleLoss,
    data: PyTree[Array],
) -> Scalar:
    """The largest √(E(∇ℓ·Aθ)² / Σ E|∇ℓ|²|Aθ|²), with a sum over leaves."""
    coordinates, remainder = _tree.split(point)
    velocities = [generator.mv(coordinates) for generator in generators]
    value = example_value(example_loss, remainder)

    def slopes(example: Example) -> Float[Array, " k"]:
        of = lambda x: value(x, example)
        return jnp.stack([jax.jvp(of, (coordinates,), (v,))[1] for v in velocities])

    with _precision.full_precision():
        left = jnp.mean(over_chunks(slopes, data, _tree.size(coordinates)) ** 2, axis=0)
    square = LeafSquares()
    mean, centred = gradient_moments(example_loss, point, data, square)
    gradients = _tree.add(centred, square(mean))
    terms = jnp.stack([_tree.inner(gradients, square(v)) for v in velocities])
    ratio = left / jnp.where(terms == 0, 1, terms)
    return jnp.sqrt(jnp.max(ratio)).astype(_tree.dtype_of(coordinates))


def _noncommuting(generators: Sequence[AbstractGenerator], coordinates: Coordinates) -> Scalar:
    """The largest |A_iA_jθ − A_jA_iθ| against |A_iA_jθ|."""
    worst = jnp.zeros((), _tree.dtype_of(coordinates))
    for index, a in enumerate(generators):
        for b in generators[:index]:
            if isinstance(a, Elementwise) and isinstance(b, Elementwise):
                continue
            one, other = a.mv(b.mv(coordinates)), b.mv(a.mv(coordinates))
            size = _tree.norm(one) + _tree.norm(other)
            gap = _tree.norm(_tree.subtract(one, other))
            worst = jnp.maximum(worst, gap / jnp.where(size == 0, 1, size))
    return worst
