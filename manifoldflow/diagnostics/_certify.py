"""Certificates that the theorems' assumptions hold along a path, each with its margin."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked_concrete
from manifoldflow._results import Solution
from manifoldflow._types import Coordinates, Key, Point, Tangent
from manifoldflow.diagnostics._dimension import counted_constraints
from manifoldflow.losses import AbstractLoss, AbstractResidualLoss, LeastSquares
from manifoldflow.manifolds import AbstractManifold
from manifoldflow.noise import AbstractNoise

_NUM_PROBES = 4


class Certificate(NamedTuple):
    """One assumption of a theorem, measured along a path.

    Attributes:
        name: the assumption.
        value: the worst value that was seen.
        threshold: the bound that it is compared with.
        relation: ">", "≥" or "≤": the relation in which the value must be to the threshold.
        where: the place of the worst value: the number of a save on the path, or an argument.
        citation: the source of the assumption, by the keys of the README.

    Examples:
        >>> from manifoldflow import diagnostics
        >>> rank = diagnostics.Certificate("rank", 3.0, 2.0, "≥", "save 0", "LiWangArora2022")
        >>> print(rank.holds, rank.margin)
        True 1.0
    """

    name: str
    value: float
    threshold: float
    relation: str
    where: str
    citation: str

    @property
    def margin(self) -> float:
        """The distance to the threshold: positive on the right side, negative on the wrong one."""
        gap = self.value - self.threshold
        return (-gap if self.relation == "≤" else gap) + 0.0  # not −0

    @property
    def holds(self) -> bool:
        """True where the value is on the right side of the threshold; False where it is NaN."""
        return self.margin > 0 if self.relation == ">" else self.margin >= 0


class Certificates(tuple[Certificate, ...]):
    """All certificates of a path: true if all hold; printed as a table.

    Examples:
        >>> from manifoldflow import diagnostics
        >>> rank = diagnostics.Certificate("rank", 1.0, 2.0, "≥", "save 0", "LiWangArora2022")
        >>> found = diagnostics.Certificates([rank])
        >>> print(bool(found), found.named("rank").margin)
        False -1.0
    """

    def __bool__(self) -> bool:
        return all(certificate.holds for certificate in self)

    def named(self, name: str) -> Certificate:
        """The certificate with this name.

        Raises:
            KeyError: there is none.
        """
        for certificate in self:
            if certificate.name == name:
                return certificate
        raise KeyError(f"No certificate {name!r}; there are {[each.name for each in self]}.")

    def __str__(self) -> str:
        heads = ("assumption", "value", "must be", "margin", "", "where", "source")
        rows = [heads, *map(_row, self)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def _row(certificate: Certificate) -> tuple[str, ...]:
    return (
        certificate.name,
        f"{certificate.value:.4g}",
        f"{certificate.relation} {certificate.threshold:.4g}",
        f"{certificate.margin:.3g}",
        "holds" if certificate.holds else "FAILS",
        certificate.where,
        certificate.citation,
    )


@runtime_checkable
class TwoLayer(Protocol):
    """The part of a two-layer network that `certify` needs; `models.TwoLayerNet` has it."""

    @property
    def inputs(self) -> Array: ...

    @property
    def second_layer(self) -> Array: ...

    @property
    def activation(self) -> Callable[..., Any]: ...

    def features(self, point: Any) -> Array: ...


@checked_concrete
def certify(
    manifold: AbstractManifold,
    path: Solution | Point,
    *,
    noise: AbstractNoise | None = None,
    network: TwoLayer | None = None,
    key: Key | None = None,
) -> Certificates:
    """The assumptions of the theorems, measured along a path, each with its margin.

    Always: the path is on the manifold, the rank is constant, and the spectrum of JJᵀ has a gap.
    With a residual loss: the constant c of ‖∇L‖² ≥ c·L, and that tr∇²L does not grow. With a noise:
    its covariance is normal, and proportional to the Hessian. With a two-layer network: norms and
    coherence of its inputs, and the constants of its activation on the range of features that the
    path visits.

    Args:
        manifold: a manifold, with the loss in question as its `loss`.
        path: a `Solution`, or one point. The cost is a spectrum and some products for each save.
        noise: a noise, as for `LimitDiffusion`.
        network: a `models.TwoLayerNet`, or an object with its fields and `features`.
        key: draws the random vectors on which covariance and Hessian are compared.

    Returns:
        `Certificates`: true if all hold, and printable.

    Raises:
        ValueError: a path that is not finite; a network on a loss other than `LeastSquares`; a call
            inside jit.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=lambda p, x: p[0] * p[1] * x)
        >>> manifold = mf.ZeroLossManifold(loss)
        >>> found = mf.diagnostics.certify(manifold, jnp.array([2.0, 0.5]))
        >>> print(bool(found), found.named("rank").value, found.named("c of ‖∇L‖² ≥ c·L").value)
        True 1.0 8.5

    References:
        [LiWangArora2022, Assumptions 3.1 and 3.2, section 5; Gatmiry2024, Assumptions 1-3].
    """
    coordinates, remainder = _stacked(manifold, path)
    if not bool(_tree.all_finite(coordinates)):
        raise ValueError(
            "The path to certify has coordinates that are NaN or infinite. Did its solve fail? "
            "solution.result says how; project with throw=True."
        )
    seen = _measured(manifold, noise, coordinates, remainder, jr.key(0) if key is None else key)
    # Distances on a path are those of its solver, far above rounding.
    tol = _tree.eps_of(coordinates) ** (1 / 3)
    codimension = counted_constraints(manifold, _tree.join(_at(coordinates, 0), remainder))
    found = [*_of_manifold(seen, codimension, tol)]
    if noise is not None:
        found += _of_noise(seen, tol)
    if network is not None:
        found += _of_network(manifold, network, seen, coordinates, remainder)
    return Certificates(found)


def _stacked(manifold: AbstractManifold, path: Solution | Point) -> tuple[Coordinates, Point]:
    if isinstance(path, Solution):
        return path.points, manifold.split(path.point(0))[1]
    coordinates, remainder = manifold.split(path)
    return jax.tree.map(lambda leaf: leaf[None], coordinates), remainder


@eqx.filter_jit
def _measured(
    manifold: AbstractManifold,
    noise: AbstractNoise | None,
    coordinates: Coordinates,
    remainder: Point,
    key: Key,
) -> dict[str, Array]:
    """The numbers of all certificates, at each save."""
    loss: AbstractLoss = manifold.loss

    def at(x: Coordinates) -> dict[str, Any]:
        point = _tree.join(x, remainder)
        space = manifold.normal_space(point)
        # The range only: the rest of a Hessian's spectrum is zero by design.
        values = space.eigenvalues()[-manifold.codimension(point) :]
        size = _tree.norm(x)
        seen = {
            "distance": manifold.defect(point) / size,
            "rank": space.rank(),
            "gap": values[0] / values[-1],
        }
        if isinstance(loss, AbstractResidualLoss):
            trace = loss.trace_gauss_newton
            of_coordinates = lambda x: trace(_tree.join(x, remainder))
            seen["trace"], slope = jax.value_and_grad(of_coordinates)(x)
            seen["slope"] = _tree.norm(space.tangent(slope))
            # ∇L = Gᵀρ and L = ½|ρ|² for a square root G of the Gauss-Newton matrix.
            gram = jnp.linalg.eigvalsh(loss.gauss_newton_root(point).gram())
            seen["contraction"] = 2 * gram[0]
        if noise is not None:
            seen |= _compared(manifold, noise, point, x, key)
        return seen

    # One save after the other: a spectrum of each at once would take the memory of all.
    return jax.lax.map(at, coordinates)


def _compared(
    manifold: AbstractManifold, noise: AbstractNoise, point: Point, x: Coordinates, key: Key
) -> dict[str, Array]:
    """Products of the covariance and of the Hessian with the same random vectors."""
    covariance, hessian = noise.covariance(manifold.loss, point), manifold.loss.hessian(point)

    def of_probe(key: Key) -> dict[str, Array]:
        probe = _tree.random_normal_like(key, x)
        noisy, bent = covariance.mv(probe), hessian.mv(probe)
        along: Tangent = manifold.tangent_projection(point, noisy, throw=False)
        return {
            "noise": _tree.inner(noisy, noisy),
            "bend": _tree.inner(bent, bent),
            "both": _tree.inner(noisy, bent),
            "along": _tree.inner(along, along),
        }

    sums = jax.lax.map(of_probe, jr.split(key, _NUM_PROBES))
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums)


def _of_manifold(seen: dict[str, Array], rank: int, tol: float) -> Iterator[Certificate]:
    source = "LiWangArora2022, Assumption 3.1"
    yield _most("distance to the manifold", seen["distance"], tol, source)
    yield _least("rank", seen["rank"], rank, source, "≥")
    floor = rank * _precision.eps_of_dtype(seen["gap"])
    yield _least("λ_min/λ_max of JJᵀ", seen["gap"], floor, source)
    if "trace" in seen:
        source = "LiWangArora2022, Assumption 3.2"
        yield _least("c of ‖∇L‖² ≥ c·L", seen["contraction"], 0, source)
        trace = np.asarray(seen["trace"])
        growth = np.diff(trace, prepend=trace[:1]) / trace[0]
        yield _most("growth of tr∇²L", growth, tol, "LiWangArora2022, Corollary 5.2")


def _of_noise(seen: dict[str, Array], tol: float) -> Iterator[Certificate]:
    noise, bend, both = (np.asarray(seen[name]) for name in ("noise", "bend", "both"))
    source = "LiWangArora2022, Corollary 5.2"
    yield _most("|PΣv|/|Σv|", np.sqrt(np.asarray(seen["along"]) / noise), tol, source)
    # One c for the whole path.
    multiple = np.sum(both) / np.sum(bend)
    left = np.maximum(noise - 2 * multiple * both + multiple**2 * bend, 0) / noise
    yield _most(f"|Σv − {multiple:.3g}·Hv|/|Σv|", np.sqrt(left), tol, source)


def _of_network(
    manifold: AbstractManifold,
    network: TwoLayer,
    seen: dict[str, Array],
    coordinates: Coordinates,
    remainder: Point,
) -> Iterator[Certificate]:
    if not isinstance(manifold.loss, LeastSquares):
        raise ValueError(
            "The theorems on two-layer networks are about LeastSquares; got a manifold of "
            f"{type(manifold.loss).__name__}. Leave `network` out."
        )
    inputs = np.asarray(network.inputs)
    layer = np.asarray(network.second_layer)
    norms = np.abs(np.linalg.norm(inputs, axis=1) - 1)
    unit = float(np.sqrt(_precision.eps_of_dtype(network.inputs)))
    yield _most("|‖xᵢ‖ − 1|", norms, unit, "Gatmiry2024, section 3", "example")
    yield _most("|wⱼ − 1|", np.abs(layer - 1), 0, "Gatmiry2024, section 3", "neuron")
    from manifoldflow import theory  # only now: most who import the package need none of it

    coherence = theory.coherence(inputs)
    source = "Gatmiry2024, Assumption 2"
    yield Certificate("coherence μ", coherence, unit**2 * len(inputs), ">", "", source)

    points = jax.vmap(lambda x: network.features(_tree.join(x, remainder)))(coordinates)
    low, high = float(jnp.min(points)), float(jnp.max(points))
    widen = 1e-6 * max(1.0, abs(low), abs(high))
    from manifoldflow import theory

    constants = theory.activation_constants(network.activation, low - widen, high + widen)
    for name, value, where, source in (
        ("ϱ₁ = min φ′", constants.slope, constants.slope_at, "Assumption 1"),
        ("ϱ₂ = min φ‴", constants.third_derivative, constants.third_derivative_at, "Assumption 1"),
        ("β of β|φ″| ≤ φ′²φ‴", constants.normality, constants.normality_at, "Assumption 3"),
    ):
        yield Certificate(name, value, 0.0, ">", f"z = {where:.4g}", f"Gatmiry2024, {source}")

    scale = float(manifold.loss.scale)
    slope = max(constants.slope, 0.0)
    bound = 2 * scale * float(np.sum(layer**2)) * coherence * slope**2
    contraction = np.asarray(seen["contraction"]) * (1 + 1e3 * unit**2)
    yield _least("c ≥ 4μϱ₁²·½s‖w‖²", contraction, bound, "Gatmiry2024, Lemma 12", "≥")
    # F = tr∇²L/scale in their units; the last save is the one that may be stationary.
    stationary = float(np.sqrt(max(coherence, 0.0))) * max(constants.normality, 0.0)
    last = float(seen["slope"][-1]) / scale
    where = f"save {len(seen['slope']) - 1}"
    yield Certificate("‖∇F‖ ≤ √μ·β", last, stationary, "≤", where, "Gatmiry2024, Lemma 4")


def _least(
    name: str, values: Any, threshold: float, source: str, relation: str = ">"
) -> Certificate:
    """The certificate of a number that must be large at each save."""
    values = np.asarray(values, float)
    worst = int(np.argmin(values))  # of NaN the first
    where = f"save {worst}"
    return Certificate(name, float(values[worst]), float(threshold), relation, where, source)


def _most(
    name: str, values: Any, threshold: float, source: str, place: str = "save"
) -> Certificate:
    """The certificate of a number that must be small at each save."""
    values = np.asarray(values, float)
    worst = int(np.argmax(values))
    where = f"{place} {worst}"
    return Certificate(name, float(values[worst]), float(threshold), "≤", where, source)


def _at(coordinates: Coordinates, index: int) -> Coordinates:
    return jax.tree.map(lambda leaf: leaf[index], coordinates)
