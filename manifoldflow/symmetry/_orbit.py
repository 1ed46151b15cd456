"""The potential of SGD's noise along the orbit λ ↦ e^{λ₁A₁ + … + λₖAₖ}θ of commuting symmetries.

With Φ(λ) = γ‖θ_λ‖² + ½σ² tr Σ(θ_λ), Gᵢ = −∂Φ/∂λᵢ. Since ‖θ_λ‖² = θᵀe^{2λA}θ and tr Σ(θ_λ) =
tr(e^{−2λA}Σ), Φ is a sum of exponentials and convex. A noise equilibrium is the point of the orbit
where it is least. In steps of finite length Φ has a third term, ¼η‖∇L(θ_λ)‖², which behaves as tr Σ
does.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from manifoldflow import _precision, _tree
from manifoldflow._types import Coordinates, Point, Scalar, Tangent
from manifoldflow.symmetry._generators import (
    AbstractGenerator,
    AbstractSpectralGenerator,
    Elementwise,
    is_leafwise,
)
from manifoldflow.symmetry._gradients import gradient_moments, LeafSquares
from manifoldflow.symmetry._sgd_noise import SGDNoise


class Local(NamedTuple):
    """Φ, −∇Φ and ∇²Φ at one point of an orbit."""

    potential: Scalar
    drift: Float[Array, " k"]
    curvature: Float[Array, "k k"]


Orbit = Callable[[Float[Array, " k"]], Local]


def moved(
    generators: Sequence[AbstractGenerator], coordinates: Coordinates, at: Float[Array, " k"]
) -> Coordinates:
    """The coordinates of e^{λ₁A₁ + … + λₖAₖ}θ."""
    for index, generator in enumerate(generators):
        coordinates = generator.exp_mv(at[index], coordinates)
    return coordinates


def swept_orbit(generators: Sequence[AbstractGenerator], point: Point, noise: SGDNoise) -> Orbit:
    """The potential by the gradients of all examples, anew at every λ; for any generators."""
    coordinates, remainder = _tree.split(point)

    def moments(v: Tangent) -> tuple[Scalar, Array, Array]:
        """|v|², vᵀA_iv, vᵀA_iA_jv."""
        images = [generator.mv(v) for generator in generators]
        first = jnp.stack([_tree.inner(v, image) for image in images])
        second = jnp.stack([jnp.stack([_tree.inner(a, b) for b in images]) for a in images])
        return _tree.inner(v, v), first, second

    def local(at: Float[Array, " k"]) -> Local:
        x = moved(generators, coordinates, at)
        noisy = _kicks(noise, _tree.join(x, remainder), moments)
        decaying, gamma = moments(x), noise.weight_decay
        return Local(
            # θ goes as e^{λA} and a gradient as e^{−λA}: each derivative of a square gives ±2.
            gamma * decaying[0] + noisy[0] / 2,
            noisy[1] - 2 * gamma * decaying[1],
            2 * noisy[2] + 4 * gamma * decaying[2],
        )

    return local


def spectral_orbit(
    generators: Sequence[AbstractSpectralGenerator], point: Point, noise: SGDNoise
) -> Orbit:
    """The potential by the variances of the gradients' modes at θ.

    It needs one pass over the examples for all λ. For generators that share their modes: one, or
    several elementwise ones.
    """
    coordinates, _ = _tree.split(point)
    # e^{λA} takes a mode to e^{λμ} times itself and its gradient to e^{−λμ}: variances at θ are
    # enough.
    leafwise = is_leafwise(generators, coordinates)
    by_mode = lambda v: jax.tree.map(jnp.square, generators[0].modes(v))
    square = LeafSquares() if leafwise else by_mode
    kicks = _kicks(noise, point, square)
    energies = square(coordinates)
    rates = [generator.rates(coordinates) for generator in generators]

    def local(at: Float[Array, " k"]) -> Local:
        def of_leaf(kick: Array, energy: Array, *rates: Array) -> Local:
            stretch = sum(2 * parameter * rate for parameter, rate in zip(at, rates))
            noisy = jnp.exp(-stretch) * kick
            decaying = 2 * noise.weight_decay * jnp.exp(stretch) * energy
            drifts = jnp.stack([jnp.sum(rate * (noisy - decaying)) for rate in rates])
            both = noisy + decaying
            curvatures = [jnp.stack([2 * jnp.sum(a * b * both) for b in rates]) for a in rates]
            return Local(jnp.sum(both) / 2, drifts, jnp.stack(curvatures))

        leaves = jax.tree.leaves(jax.tree.map(of_leaf, kicks, energies, *rates), is_leaf=_is_it)
        return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *leaves)

    return local


def _kicks(noise: SGDNoise, point: Point, quadratic: Callable[[Tangent], Any]) -> Any:
    """The moments σ²E q(g − ∇L), plus ½η·q(∇L) in steps of finite length."""
    mean, centred = gradient_moments(noise.example_loss, point, noise.data, quadratic)
    kicks = _tree.scale(noise.noise_scale, centred)
    if noise.mean_scale is None:
        return kicks
    return _tree.add(kicks, _tree.scale(noise.mean_scale, quadratic(mean)))


def _is_it(node: object) -> bool:
    return isinstance(node, Local)


def semidefinite_solve(
    matrix: Float[Array, "k k"], right: Float[Array, " k"], is_free: Bool[Array, " k"]
) -> Float[Array, " k"]:
    """matrix⁻¹·right on the coordinates that are free; 0 where the matrix vanishes."""
    diagonal = jnp.diag(matrix)
    moves = is_free & (diagonal > 0)
    # With ones on the diagonal: symmetries differ in scale by many decades.
    scale = jnp.where(moves, jax.lax.rsqrt(jnp.where(moves, diagonal, 1)), 0)
    # The ridge is for symmetries that depend on each other.
    ridge = jnp.where(moves, 8 * _precision.eps_of_dtype(matrix), 1)
    scaled = scale[:, None] * matrix * scale + jnp.diag(ridge)
    return scale * jnp.linalg.solve(scaled, scale * right)


def orbit_of(generators: Sequence[AbstractGenerator], point: Point, noise: SGDNoise) -> Orbit:
    """The potential by the variances of modes if they are known, else by sweeps over the data."""
    elementwise = all(isinstance(generator, Elementwise) for generator in generators)
    spectral = [g for g in generators if isinstance(g, AbstractSpectralGenerator)]
    if elementwise or (len(generators) == 1 and spectral):
        return spectral_orbit(spectral, point, noise)
    return swept_orbit(generators, point, noise)
