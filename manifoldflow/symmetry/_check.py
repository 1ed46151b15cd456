"""The check that a loss has a symmetry, on given examples."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_positive
from manifoldflow._types import Example, Point, Scalar, Tangent
from manifoldflow.symmetry._generators import AbstractGenerator
from manifoldflow.symmetry._gradients import (
    checked_examples,
    example_value,
    ExampleLoss,
    over_chunks,
)
from manifoldflow.symmetry._products import ProductSymmetry
from manifoldflow.symmetry._symmetry import ExponentialSymmetry


class SymmetryCheck(eqx.Module):
    """The verdict on a symmetry of a loss, with what was measured; true or false, and printable.

    Attributes:
        defect: the largest |∇ℓ·Aθ| of all examples, over the largest Σⱼ|∇ℓⱼ(Aθ)ⱼ|: the share that
            is left of terms that should cancel.
        change: the largest |ℓ(e^{λA}θ) − ℓ(θ)| over the largest |ℓ| of both, at λ = ±0.1/‖A‖.
        asymmetry: |⟨u, Av⟩ − ⟨Au, v⟩| over ‖Au‖‖v‖ for random u and v.
        tolerance: the bound on all three.
        worst_example: the number of the example with the largest |∇ℓ·Aθ|.
        holds: True where all three are at most the tolerance.

    Examples:
        >>> from manifoldflow import symmetry
        >>> check = symmetry.SymmetryCheck(0.0, 1e-16, 0.0, 1e-11, 2, True)
        >>> print(bool(check), check)
        True symmetry: ∇ℓ·Aθ is 0.0e+00 of its terms, ... tolerance 1.0e-11: holds
    """

    defect: float
    change: float
    asymmetry: float
    tolerance: float
    worst_example: int
    holds: bool

    def __bool__(self) -> bool:
        return self.holds

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        return (
            f"symmetry: ∇ℓ·Aθ is {self.defect:.1e} of its terms, worst at example "
            f"{self.worst_example}; e^{{λA}} changes ℓ by {self.change:.1e}; A differs from Aᵀ by "
            f"{self.asymmetry:.1e}; tolerance {self.tolerance:.1e}: {verdict}"
        )


@checked_but("symmetry", is_concrete=True)
def check_symmetry(
    symmetry: ExponentialSymmetry | ProductSymmetry,
    example_loss: ExampleLoss,
    point: Point,
    data: PyTree[Any],
    *,
    tolerance: float | None = None,
) -> SymmetryCheck:
    """The check that ∇ℓ·Aθ vanishes for every example and that e^{λA} leaves every ℓ as it is.

    It looks near this point only: a symmetry of a network whose ReLUs are all dead there holds
    trivially. Not for use inside jit.

    Args:
        symmetry: the symmetry to check; of a `ProductSymmetry` a random member, which holds only
            where all members do.
        example_loss: ℓ(point, example) → scalar.
        point: θ; a random one tells more than a minimum, where gradients vanish.
        data: PyTree of arrays with a leading axis of examples.
        tolerance: the bound on all three measures; None for 4e-11 in float64 and 2e-5 in float32.
            Scaling before a LayerNorm is broken by its ε: 1e-4 lets it pass.

    Returns:
        A `SymmetryCheck`: true or false, and printable.

    Raises:
        ValueError: no symmetry; wrong data; a tolerance that is not positive; a call inside jit.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> loss = lambda p, x: (p["u"] * p["w"] * x - 1.0) ** 2
        >>> point, data = {"u": jnp.array(2.0), "w": jnp.array(0.3)}, jnp.arange(1.0, 4.0)
        >>> opposite = symmetry.ExponentialSymmetry({"u": 1.0, "w": -1.0})
        >>> together = symmetry.ExponentialSymmetry({"u": 1.0, "w": 1.0})
        >>> [bool(symmetry.check_symmetry(one, loss, point, data)) for one in (opposite, together)]
        [True, False]
    """
    if isinstance(symmetry, ProductSymmetry):
        symmetry = _member(symmetry, point)
    if not isinstance(symmetry, ExponentialSymmetry):
        raise ValueError(f"Expected an ExponentialSymmetry; got {type(symmetry).__name__}.")
    if tolerance is None:
        tolerance = default_tolerance(point)
    bound = float(checked_positive("check_symmetry: tolerance", tolerance))
    example_loss = _tree.as_pytree_callable(example_loss)
    left, terms, losses, changes, asymmetry = _measured(
        symmetry, example_loss, point, checked_examples(data)
    )
    defect, change = share(jnp.abs(left), terms), share(changes, losses)
    numbers = defect, change, float(asymmetry)
    holds = all(number <= bound for number in numbers)
    return SymmetryCheck(*numbers, float(bound), int(jnp.argmax(jnp.abs(left))), holds)


def _member(product: ProductSymmetry, point: Point) -> ExponentialSymmetry:
    size = product.size(point)
    root = jax.random.normal(jax.random.key(0), (product.num_blocks, size, size))
    return product.member(point, root + jnp.swapaxes(root, 1, 2))


def default_tolerance(point: Point) -> float:
    # Between the rounding of a sum, some eps, and a broken symmetry, of order 1.
    return _tree.eps_of(_tree.split(point)[0]) ** (2 / 3)


def share(part: Float[Array, " N"], whole: Float[Array, " N"]) -> float:
    largest = float(jnp.max(whole))
    return float(jnp.max(part)) / largest if largest != 0 else 0.0


@eqx.filter_jit
def _measured(
    symmetry: ExponentialSymmetry, example_loss: ExampleLoss, point: Point, data: PyTree[Array]
) -> tuple[Array, Array, Array, Array, Scalar]:
    coordinates, remainder = _tree.split(point)
    generator = symmetry.at(point)
    velocity = generator.mv(coordinates)
    size = generator.norm(coordinates)
    # Far enough that e^{λA} is no rounding, near enough that no activation saturates.
    parameter = 0.1 / jnp.where(size > 0, size, 1)
    moved = [generator.exp_mv(sign * parameter, coordinates) for sign in (1, -1)]
    loss = example_value(example_loss, remainder)

    def of_example(example: Example) -> tuple[Scalar, Scalar, Scalar, Scalar]:
        gradient = jax.grad(loss)(coordinates, example)
        products = jax.tree.leaves(jax.tree.map(jnp.multiply, gradient, velocity))
        left = sum(jnp.sum(leaf) for leaf in products)
        terms = sum(jnp.sum(jnp.abs(leaf)) for leaf in products)
        here, there = (
            jnp.stack([loss(x, example) for x in points]) for points in ([coordinates], moved)
        )
        largest = jnp.maximum(jnp.max(jnp.abs(there)), jnp.abs(here[0]))
        change = jnp.max(jnp.abs(there - here))
        return jnp.asarray(left), jnp.asarray(terms), largest, change

    # The model's own products as well: TF32 would break every symmetry at 1e-3.
    with _precision.full_precision():
        found = over_chunks(of_example, data, _tree.size(coordinates))
    return *found, asymmetry_of(generator, coordinates)


def asymmetry_of(generator: AbstractGenerator, like: Tangent) -> Scalar:
    # One pair of random vectors: a matrix that differs from Aᵀ passes with probability 0.
    u, v = (_tree.probe_like(jax.random.key(seed), like) for seed in (0, 1))
    image = generator.mv(u)
    gap = jnp.abs(_tree.inner(u, generator.mv(v)) - _tree.inner(image, v))
    size = _tree.norm(image) * _tree.norm(v)
    return gap / jnp.where(size > 0, size, 1)
