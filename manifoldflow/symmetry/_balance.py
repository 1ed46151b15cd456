"""Moves of a network along its rescalings, to the point that noise or decay would bring it to."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import is_traced
from manifoldflow._results import delivered, Info, or_nan, RESULTS
from manifoldflow._types import Point
from manifoldflow.losses import AbstractExampleLoss
from manifoldflow.symmetry._equilibrium import noise_equilibrium_with_info
from manifoldflow.symmetry._find import find_rescalings, Rescaling
from manifoldflow.symmetry._find_scalings import Scaling
from manifoldflow.symmetry._gradients import ExampleLoss, examples_of
from manifoldflow.symmetry._orbit import moved
from manifoldflow.symmetry._product_equilibrium import balanced_products
from manifoldflow.symmetry._products import ProductSymmetry
from manifoldflow.symmetry._sgd_noise import SGDNoise
from manifoldflow.symmetry._symmetry import ExponentialSymmetry

_KINDS = ("noise", "norm")

AnySymmetry = ExponentialSymmetry | Rescaling | Scaling | ProductSymmetry

LossOrExamples = AbstractExampleLoss | tuple[ExampleLoss, PyTree[Any]]
"""A loss over examples, or an example loss with its data."""


class Balance(eqx.Module):
    """The moves that balanced a network, from `balance_with_info`; printable.

    Attributes:
        parameters: λ of the k commuting symmetries, (k,); ±inf where there is no balance. Beside
            products it is the sum over all turns.
        names: of the symmetries, as "first layer against second"; then of the products.
        info: of the search.
        matrices: Q of each product, symmetric and positive definite, (blocks, d, d).

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> point, data = {"u": jnp.array(4.0), "w": jnp.array(1.0)}, jnp.array([1.0, 2.0])
        >>> loss = lambda p, x: (p["u"] * p["w"] * x - 1.0) ** 2
        >>> opposite = symmetry.ExponentialSymmetry({"u": 1.0, "w": -1.0})
        >>> _, found = symmetry.balance_with_info(point, (loss, data), symmetries=[opposite])
        >>> print(isinstance(found, symmetry.Balance), found)
        True symmetries[0]: λ = -0.6931
    """

    parameters: Float[Array, " k"]
    names: tuple[str, ...] = eqx.field(static=True)
    info: Info
    matrices: tuple[Float[Array, "_ _ _"], ...] = ()

    def __str__(self) -> str:
        lines = [f"{n}: λ = {float(x):+.4g}" for n, x in zip(self.names, self.parameters)]
        for name, matrix in zip(self.names[len(lines) :], self.matrices):
            low, high = (float(f(jnp.linalg.eigvalsh(matrix))) for f in (jnp.min, jnp.max))
            lines.append(f"{name}: Q with eigenvalues from {low:.4g} to {high:.4g}")
        return "\n".join(lines)


@checked
def balance(
    network: Point,
    loss: LossOrExamples,
    *,
    kind: str = "noise",
    noise_scale: Any = None,
    weight_decay: Any = 0.0,
    symmetries: Sequence[AnySymmetry] | None = None,
    throw: bool = True,
) -> Point:
    """The same function in the weights at which SGD's noise or weight decay comes to rest.

    ReLU networks are unchanged when a layer is multiplied by c and the next one divided by it. SGD
    moves slowly along such symmetries. This function goes to the end at once, which makes a warm
    start.

    With kind "noise" the end is the one point of the orbit where γ‖θ‖² + ½σ² tr Σ is least, the
    `noise_equilibrium`. With kind "norm" it is the one where ‖θ‖² is least, as weight decay alone
    would have it. There every layer, with its bias, has the norm of the next one's weight (for an
    activation of degree p, ‖first‖² = p‖second‖²).

    Args:
        network: any point; by default with `equinox.nn.Linear` layers. All its coordinates are
            moved, also those that `trainable=` of a loss holds fixed.
        loss: a loss over examples, such as `LeastSquares`; or a pair (example_loss, data) with
            ℓ(point, example) → scalar.
        kind: "noise" or "norm".
        noise_scale: σ² = η/(2S), the learning rate over twice the batch size. Without decay it does
            not matter; with decay it must be given.
        weight_decay: γ ≥ 0 of SGD, for kind "noise".
        symmetries: commuting ones, made or found, where a `Rescaling` has names for messages; and
            products of matrices from `product_symmetry`, `attention_products` and `find_products`,
            whose members do not commute. None for those that `find_rescalings` finds, for layers as
            a whole. Finding is not for use inside jit or vmap: find once, and hand over.
        throw: True raises on failure; False returns NaN.

    Returns:
        A network of the same type, of the same function to rounding. Where neither noise nor decay
        acts it stays: at zero loss the batches make no noise. For the balance under label noise
        give a loss with noisy targets, `loss.shift_targets(…)`.

    Raises:
        ValueError: unknown kind; options that do not go together; no rescaling was found; a network
            with NaN or infinite weights.
        EquinoxRuntimeError: the balance is at infinity, with the names of the layers unless inside
            jit; or as `noise_equilibrium`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> point, data = {"u": jnp.array(4.0), "w": jnp.array(1.0)}, jnp.array([1.0, 2.0])
        >>> loss = lambda p, x: (p["u"] * p["w"] * x - 1.0) ** 2
        >>> opposite = symmetry.ExponentialSymmetry({"u": 1.0, "w": -1.0})
        >>> balanced = symmetry.balance(point, (loss, data), symmetries=[opposite])
        >>> print({name: round(float(value), 5) for name, value in balanced.items()})
        {'u': 2.0, 'w': 2.0}

    References:
        [Ziyin2024, Theorem 4.3].
    """
    return balance_with_info(
        network,
        loss,
        kind=kind,
        noise_scale=noise_scale,
        weight_decay=weight_decay,
        symmetries=symmetries,
        throw=throw,
    )[0]


@checked
def balance_with_info(
    network: Point,
    loss: LossOrExamples,
    *,
    kind: str = "noise",
    noise_scale: Any = None,
    weight_decay: Any = 0.0,
    symmetries: Sequence[AnySymmetry] | None = None,
    throw: bool = False,
) -> tuple[Point, Balance]:
    """The result of `balance`, with a `Balance` that tells how far the network went.

    It takes the arguments of `balance`, but `throw` is False by default: failures are NaN, and
    `Balance.info.result` says why.

    Returns:
        (network, `Balance`).

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> point, data = {"u": jnp.array(4.0), "w": jnp.array(1.0)}, jnp.array([1.0, 2.0])
        >>> loss = lambda p, x: (p["u"] * p["w"] * x - 1.0) ** 2
        >>> pair = symmetry.ExponentialSymmetry({"u": 1.0, "w": -1.0})
        >>> there, found = symmetry.balance_with_info(point, (loss, data), symmetries=[pair])
        >>> print(found.parameters.round(4), bool(found.info.is_successful))  # λ = −ln 2
        [-0.6931] True
    """
    sigma, gamma = _checked_scales(kind, noise_scale, weight_decay)
    example_loss, data = loss if isinstance(loss, tuple) else examples_of(loss)
    if symmetries is None:
        if is_traced((network, data)):
            raise ValueError(
                "balance cannot look for rescalings inside jit or vmap. Find them outside and "
                "hand them over: symmetries=find_rescalings(network, example_loss, data)."
            )
        symmetries = find_rescalings(network, example_loss, data)
        if not symmetries:
            raise ValueError(
                "balance found no rescaling: no layer of the network grows while others shrink "
                "without changing the loss, as about a homogeneous activation such as ReLU; about "
                "tanh or GELU none does. Look for others, `find_products` (linear layers in a row, "
                "attention) and `find_scalings` (in front of a normalisation), or build them "
                "(`rescaling`, …), and give symmetries=[…]."
            )
    products = [one for one in symmetries if isinstance(one, ProductSymmetry)]
    pairs = [
        _named(one, i) for i, one in enumerate(symmetries) if not isinstance(one, ProductSymmetry)
    ]
    names, generators = tuple(name for name, _ in pairs), [one for _, one in pairs]
    if products:
        noise = SGDNoise(
            example_loss, data, noise_scale=sigma, weight_decay=gamma, name="balance", throw=throw
        )
        return _with_products(products, generators, noise, network, names, throw)
    parameters, info = noise_equilibrium_with_info(
        generators,
        example_loss,
        network,
        data,
        noise_scale=sigma,
        weight_decay=gamma,
    )
    is_infinite = jnp.isinf(parameters)
    result = _tree.where(jnp.any(is_infinite), RESULTS.no_equilibrium, info.result)
    info = Info(result, info.defect, info.num_steps, info.num_factorizations)
    found = Balance(parameters, names, info)
    if throw and not is_traced(parameters):
        _refuse_infinite(found)
    # Not along those without a balance: e^{∞·0} would be NaN in every leaf. `info` says that it
    # failed.
    there = _moved(generators, network, jnp.where(is_infinite, 0, parameters), info, data)
    return delivered(there, info.result, throw), found


def _with_products(
    products: list[ProductSymmetry],
    others: list[ExponentialSymmetry],
    noise: SGDNoise,
    network: Point,
    names: tuple[str, ...],
    throw: bool,
) -> tuple[Point, Balance]:
    end = balanced_products(products, others, noise, network)
    names += tuple(product.name for product in products)
    found = Balance(end.parameters, names, end.info, end.matrices)
    if throw and not is_traced(end.parameters):
        _refuse_infinite(found)
    there = or_nan(end.coordinates, end.info.is_successful)
    there = _tree.join(there, _tree.split(network)[1])
    detail = lambda: f" It was sought along {'; '.join(names)}."
    return delivered(there, end.info.result, throw, detail), found


@eqx.filter_jit
def _moved(
    symmetries: list[ExponentialSymmetry],
    network: Point,
    parameters: Float[Array, " k"],
    info: Info,
    data: PyTree[Any],
) -> Point:
    coordinates, remainder = _tree.split(network)
    there = moved([one.at(network) for one in symmetries], coordinates, parameters)
    there = or_nan(there, info.is_successful, of=(symmetries, network, parameters, data))
    return _tree.join(there, remainder)


def _checked_scales(kind: str, noise_scale: Any, weight_decay: Any) -> tuple[Any, Any]:
    """σ² and γ of the equilibrium to look for, refused where they do not go together."""
    if kind not in _KINDS:
        raise ValueError(f"balance: kind must be one of {_KINDS}; got {kind!r}.")
    has_decay = is_traced(weight_decay) or weight_decay != 0
    if kind == "norm":
        if noise_scale is not None or has_decay:
            raise ValueError(
                "balance: kind='norm' takes neither noise_scale nor weight_decay, whatever they "
                "are it is the same. Leave them out, or take kind='noise'."
            )
        return 0.0, 1.0
    if noise_scale is None and has_decay:
        raise ValueError(
            "balance: where weight decay and noise meet depends on both; give noise_scale as "
            "well, learning rate over twice the batch size."
        )
    return 1.0 if noise_scale is None else noise_scale, weight_decay


def _named(symmetry: Any, index: int) -> tuple[str, ExponentialSymmetry]:
    if isinstance(symmetry, Scaling):
        return f"{symmetry.where} scaled", symmetry.symmetry
    if not isinstance(symmetry, Rescaling):
        return f"symmetries[{index}]", symmetry
    neuron = "" if symmetry.neuron is None else f", neuron {symmetry.neuron}"
    return f"{symmetry.first} against {symmetry.second}{neuron}", symmetry.symmetry


def _refuse_infinite(found: Balance) -> None:
    """Raises an error with the names of the symmetries that have no balance."""
    values = [float(parameter) for parameter in found.parameters]
    endless = [f"{n}, λ = {x:+}" for n, x in zip(found.names, values) if math.isinf(x)]
    if endless:
        raise eqx.EquinoxRuntimeError(
            f"{RESULTS[found.info.result]} That is so for {'; '.join(endless)}."
        )
