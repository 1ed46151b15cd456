"""The balance of products of matrices under SGD's noise and decay: one point of a GL(d) orbit.

Along (UQ⁻¹, QW) gradients go as ∇_U ↦ ∇_UQᵀ, ∇_W ↦ Q⁻ᵀ∇_W. With P = QᵀQ, therefore, Φ = γ‖θ‖² + ½σ²
tr Σ = tr(PR) + tr(P⁻¹T) for R = γWWᵀ + ½σ²E∇_Uᵀ∇_U and T = γUᵀU + ½σ²E∇_W∇_Wᵀ, with centred
gradients. Φ is convex along geodesics of positive definite matrices, and least where the charge UᵀU
− WWᵀ has no drift, 4(R − T) = 0. One product is so balanced in one step, whatever the loss; several
with common leaves take turns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked
from manifoldflow._results import Info, RESULTS
from manifoldflow._types import Coordinates, Example, Flag, Point, Scalar, Tangent
from manifoldflow.symmetry._equilibrium import MAX_STEPS, noise_equilibrium_with_info
from manifoldflow.symmetry._gradients import (
    example_value,
    ExampleLoss,
    gradient_moments,
    over_chunks,
)
from manifoldflow.symmetry._mean import balancing, rotation_to_symmetric
from manifoldflow.symmetry._orbit import moved
from manifoldflow.symmetry._products import ProductSymmetry
from manifoldflow.symmetry._sgd_noise import in_own_units, SGDNoise
from manifoldflow.symmetry._symmetry import ExponentialSymmetry

Blocks = Float[Array, "_ _ _"]
# As for single symmetries: scaling before a LayerNorm holds up to its ε.
_BROKEN = 1e-3


@checked
def product_drift(
    product: ProductSymmetry,
    example_loss: ExampleLoss,
    point: Point,
    data: PyTree[Any],
    *,
    noise_scale: Any,
    weight_decay: Any = 0.0,
) -> Float[Array, "blocks d d"]:
    """The drift dC/dt of the matrix C = UᵀU − WWᵀ under SGD: 2σ²E[∇_Uᵀ∇_U − ∇_W∇_Wᵀ] − 4γC.

    On the clock kη, with centred gradients. Its product with ½B is the `noether_drift` of the
    member B.

    Args:
        product: a `ProductSymmetry`.
        example_loss: ℓ(point, example) → scalar, without the decay.
        point: θ.
        data: PyTree of arrays with a leading axis of examples.
        noise_scale: σ² = η/(2S) ≥ 0, the learning rate over twice the batch size.
        weight_decay: γ ≥ 0, where γ‖θ‖² is added to the loss.

    Returns:
        (blocks, d, d).

    Raises:
        ValueError: wrong data, shapes, σ² or γ.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> loss = lambda p, x: (p["U"] @ p["W"])[0, 0] * x
        >>> point, data = {"U": 3 * jnp.eye(1), "W": jnp.eye(1)}, jnp.array([-1.0, 1.0])
        >>> product = symmetry.product_symmetry(point, lambda p: p["U"], lambda p: p["W"])
        >>> print(symmetry.product_drift(product, loss, point, data, noise_scale=0.5))  # w² − u²
        [[[-8.]]]

    References:
        [Ziyin2024, Proposition 5.1]; its right side is half of this.
    """
    noise = SGDNoise(
        example_loss, data, noise_scale=noise_scale, weight_decay=weight_decay, name="product_drift"
    )
    return _drift(product, noise, point)


@eqx.filter_jit
def _drift(product: ProductSymmetry, noise: SGDNoise, point: Point) -> Blocks:
    ((right, left),) = _both_sides([product], noise, point)
    return 4 * (right - left)


def _both_sides(
    products: Sequence[ProductSymmetry], noise: SGDNoise, point: Point
) -> list[tuple[Blocks, Blocks]]:
    """R and T of every product, by one pass over the examples."""
    coordinates, _ = _tree.split(point)
    grams = lambda vector: [product.grams(vector) for product in products]
    _, noisy = gradient_moments(noise.example_loss, point, noise.data, grams)
    dtype = _tree.dtype_of(coordinates)
    sigma, gamma = (x.astype(dtype) for x in (noise.noise_scale, noise.weight_decay))
    return [
        (gamma * w + sigma / 2 * of_u, gamma * u + sigma / 2 * of_w)
        for (u, w), (of_u, of_w) in zip(grams(coordinates), noisy)
    ]


class ProductBalance(NamedTuple):
    """The common balance of products and commuting symmetries."""

    coordinates: Coordinates
    matrices: tuple[Blocks, ...]  # Q of every product
    parameters: Float[Array, " k"]  # λ of the others, summed over the turns
    info: Info


class _State(NamedTuple):
    coordinates: Coordinates
    matrices: tuple[Blocks, ...]
    parameters: Float[Array, " k"]
    is_done: Flag
    result: RESULTS  # of the others
    num_turns: Int[Array, ""]


@eqx.filter_jit
def balanced_products(
    products: Sequence[ProductSymmetry],
    others: Sequence[ExponentialSymmetry],
    noise: SGDNoise,
    point: Point,
) -> ProductBalance:
    """The point of the orbit under all of them at which γ‖θ‖² + ½σ² tr Σ is least.

    Products that share no leaf are balanced together and at once; those that do, and the
    commuting symmetries, take turns; each turn lowers the same convex function.
    """
    start, remainder = _tree.split(point)
    dtype = _tree.dtype_of(start)
    noise = in_own_units(noise.astype(dtype), point)
    eps = _precision.eps_of_dtype(dtype)
    sizes = _sizes(products, start)
    groups = _disjoint(products, start)

    def is_endless(x: Coordinates) -> Flag:
        return jnp.any(_sizes(products, x) > sizes * eps**-0.5)

    def going(state: _State) -> Flag:
        is_on_its_way = ~state.is_done & (state.num_turns < MAX_STEPS)
        return is_on_its_way & ~is_endless(state.coordinates)

    def turn(state: _State) -> _State:
        x, matrices, imbalance = state.coordinates, list(state.matrices), jnp.zeros((), dtype)
        for group in groups:
            sides = _both_sides([products[i] for i in group], noise, _tree.join(x, remainder))
            for index, both in zip(group, sides):
                imbalance = jnp.maximum(imbalance, _imbalance(*both))
                q = jax.lax.map(lambda pair: balancing(*pair), both)
                x = products[index].turned(x, q.matrix, q.inverse)
                matrices[index] = _precision.matmul(q.matrix, matrices[index])
        way = _sizes(products, _tree.subtract(x, state.coordinates)) / _sizes(products, x)
        # A product of zeros stays where it is; 0/0 would end nothing.
        way = jnp.max(jnp.where(_sizes(products, x) == 0, 0, way))
        x, parameters, last, result = _along(others, noise, x, remainder)
        # Directions that only one side reaches go to zero, and need not be followed there.
        is_level = (imbalance <= eps**0.75) & (way <= eps**0.375)
        is_done = (is_level | (way <= eps**0.6)) & (last <= eps**0.6) | ~jnp.isfinite(way)
        parameters = state.parameters + parameters
        return _State(x, tuple(matrices), parameters, is_done, result, state.num_turns + 1)

    identities = tuple(_identity(product, start) for product in products)
    first = _State(
        start,
        identities,
        jnp.zeros(len(others), dtype),
        jnp.asarray(False),
        RESULTS.successful,
        jnp.asarray(0),
    )
    end = jax.lax.while_loop(going, turn, first)
    # Q is known up to a rotation on its left.
    x, matrices = _straightened(products, end.coordinates, end.matrices)
    result = _tree.where(end.is_done, end.result, RESULTS.out_of_steps)
    result = _tree.where(is_endless(x), RESULTS.no_equilibrium, result)
    defect = _broken(products, noise, jax.lax.stop_gradient(x), remainder)
    result = _tree.where(defect <= _BROKEN, result, RESULTS.not_a_symmetry)
    is_finite = _tree.all_finite((x, defect)) | (end.result != RESULTS.successful)
    result = _tree.where(is_finite, result, RESULTS.nonfinite)
    info = Info(result, defect, end.num_turns, end.num_turns)
    return ProductBalance(x, matrices, end.parameters, info)


def _sizes(products: Sequence[ProductSymmetry], vector: Tangent) -> Float[Array, " products"]:
    """The norm of the leaves of every product."""
    leaves = [product.where(vector) for product in products]
    return jnp.stack([_tree.norm(of_product) for of_product in leaves])


def _imbalance(right: Blocks, left: Blocks) -> Scalar:
    """The relative difference ‖R − T‖ over the traces."""
    size = jnp.sum(jnp.trace(right + left, axis1=1, axis2=2))
    return jnp.linalg.norm(right - left) / jnp.where(size == 0, 1, size)


def _identity(product: ProductSymmetry, coordinates: Coordinates) -> Blocks:
    size = product.size(coordinates)
    one = jnp.eye(size, dtype=_tree.dtype_of(coordinates))
    return jnp.broadcast_to(one, (product.num_blocks, size, size))


def _straightened(
    products: Sequence[ProductSymmetry], x: Coordinates, matrices: tuple[Blocks, ...]
) -> tuple[Coordinates, tuple[Blocks, ...]]:
    """The same point up to rotations, with Q symmetric; rotations do not change its balance."""
    straight = []
    for product, matrix in zip(products, matrices):
        back = jax.lax.map(rotation_to_symmetric, matrix)
        x = product.turned(x, back, jnp.swapaxes(back, 1, 2))
        straight.append(_precision.matmul(back, matrix))
    return x, tuple(straight)


def _disjoint(products: Sequence[ProductSymmetry], coordinates: Coordinates) -> list[list[int]]:
    """The numbers of the products, in groups that share no leaf."""
    leaves, treedef = jax.tree.flatten(coordinates)
    numbered = jax.tree.unflatten(treedef, list(range(len(leaves))))
    groups: list[tuple[set[int], list[int]]] = []
    for index, product in enumerate(products):
        of_product = set(product.where(numbered))
        for taken, group in groups:
            if not taken & of_product:
                taken |= of_product
                group.append(index)
                break
        else:
            groups.append((of_product, [index]))
    return [group for _, group in groups]


def _along(
    others: Sequence[ExponentialSymmetry], noise: SGDNoise, x: Coordinates, remainder: Point
) -> tuple[Coordinates, Float[Array, " k"], Scalar, RESULTS]:
    """Moves to the equilibrium of the commuting symmetries, but not along those without one.

    Returns:
        The coordinates there, λ, the largest |λ|·‖A‖ that was gone, and how it ended.
    """
    dtype = _tree.dtype_of(x)
    if not others:
        return x, jnp.zeros(0, dtype), jnp.zeros((), dtype), RESULTS.successful
    found, info = noise_equilibrium_with_info(
        others,
        noise.example_loss,
        _tree.join(x, remainder),
        noise.data,
        noise_scale=noise.noise_scale,
        weight_decay=noise.weight_decay,
    )
    result = _tree.where(jnp.any(jnp.isinf(found)), RESULTS.no_equilibrium, info.result)
    generators = [other.at(x) for other in others]
    by = jnp.where(jnp.isinf(found), 0, found)
    stretches = jnp.abs(by) * jnp.stack([generator.norm(x) for generator in generators])
    return moved(generators, x, by), found, jnp.max(stretches), result


def _broken(
    products: Sequence[ProductSymmetry], noise: SGDNoise, x: Coordinates, remainder: Point
) -> Scalar:
    """The relative difference of ∇_WWᵀ and Uᵀ∇_U, which are equal for functions of UW."""
    value = example_value(noise.example_loss, remainder)
    sides = [product.sides(x) for product in products]

    def squares(example: Example) -> Float[Array, "products 2"]:
        gradient: Tangent = jax.grad(value)(x, example)
        found = []
        for product, (u, w) in zip(products, sides):
            of_u, of_w = product.sides(gradient)
            one = _precision.einsum("bik,bjk->bij", of_w, w)
            other = _precision.einsum("bik,bjk->bij", u, of_u)
            found.append(jnp.stack([jnp.sum((one - other) ** 2), jnp.sum(one**2 + other**2)]))
        return jnp.stack(found)

    with _precision.full_precision():
        left, terms = jnp.mean(over_chunks(squares, noise.data, _tree.size(x)), axis=0).T
    return jnp.sqrt(jnp.max(left / jnp.where(terms == 0, 1, terms))).astype(_tree.dtype_of(x))
