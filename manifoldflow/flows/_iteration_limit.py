"""The limit of any iteration with small steps along the zeros of its mean field."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree, linalg
from manifoldflow._boundary import checked_but
from manifoldflow._clock import LimitClock
from manifoldflow._errors import described, is_traced
from manifoldflow._types import Coordinates, Flag, Point, Tangent
from manifoldflow.flows._base import AbstractDiffusion
from manifoldflow.flows._oblique import (
    Matrix,
    product,
    semidefinite_root,
    Splitting,
    splitting,
)
from manifoldflow.manifolds import AbstractManifold


class IterationCheck(eqx.Module):
    """The hypotheses of `IterationLimit` at a point, in numbers.

    Attributes:
        rank: the rank of A = ∂F, the codimension of Γ.
        defect: |A^#F|, about the distance from Γ; A is meant to be taken on it.
        cosine: the cosine of the largest angle between ker A and ker Aᵀ: 0 where A is not
            semisimple, 1 where A is symmetric.
        slowest_rate: the smallest real part of the eigenvalues of A off its kernel.
        problem: the hypothesis that fails, in words; empty where all hold.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> field = lambda w: jnp.stack([w[0] * (1 + w[1] ** 2), w[1] * w[0] ** 2])
        >>> flow = mf.IterationLimit(field, lambda w: jnp.eye(2))
        >>> found = flow.check(jnp.array([0.0, 1.0]))
        >>> print(found.is_fine, found.rank, f"{found.cosine:.3f} {found.slowest_rate:.3f}")
        True 1 1.000 2.000
    """

    rank: int
    defect: float
    cosine: float
    slowest_rate: float
    problem: str

    @property
    def is_fine(self) -> bool:
        """True where the limit exists near this point."""
        return not self.problem

    def __str__(self) -> str:
        numbers = (
            f"rank of ∂F {self.rank}, about {self.defect:.3g} from its zeros, cosine between the "
            f"kernels {self.cosine:.3g}, slowest rate {self.slowest_rate:.3g}"
        )
        return f"{self.problem} ({numbers})" if self.problem else numbers


class IterationLimit(AbstractDiffusion):
    """The limit of θ ← θ − η(F(θ) + ξ) + η²G(θ) along Γ = {F = 0}, as η → 0.

    E ξ = 0 and Cov ξ = Σ(θ); F need not be a gradient, and A = ∂F need not be symmetric. With Π
    the oblique projector on ker A along range A, Π̄ = 1 − Π, A^# the group inverse and
    𝓛_A⁻¹(S) the solution of A M + M Aᵀ = S on range A, in the sense of Itô and on t = kη²,

        dY = Πσ dW + { ΠG − ½A^#∂²F[ΠΣΠᵀ] − Π∂²F[sym(A^#Π̄ΣΠᵀ)] − ½Π∂²F[𝓛_A⁻¹(Π̄ΣΠ̄ᵀ)] } dt,

    which is ½∂²Φ[Σ] + ΠG for Φ the limit of θ' = −F(θ). F = ∇L gives `LimitDiffusion`. The
    state of an optimiser that relaxes in some 1/η steps (momenta, second moments) belongs to θ.

    It is dense: A has D×D numbers, and ∂²F takes 2D second directional derivatives of F.

    Args:
        mean_field: F, point → tangent: a PyTree like the coordinates.
        covariance: Σ, point → array (D, D) in the raveled order of the coordinates, or a lineax
            operator on tangents.
        slow_drift: G, point → tangent; by default zero.
        rank: the rank of A on Γ, D less the dimension of Γ: an integer, or a float in [0, 1), the
            share of A's largest singular value from which on others count. By default eps^(1/3).
        manifold: Γ, if `solve` is to keep every step on it: without one, the rounding and the
            steps of a solver lead away from Γ, and the formula is evaluated at the point reached.

    Raises:
        ValueError: wrong options; a field or covariance of another structure; outside of jit, a
            point where a hypothesis fails. Under jit the drift is NaN there.

    Assumes:
        On Γ, A has constant rank, is semisimple at 0 (ker A ⊕ range A is the whole space) and
        has Re λ > 0 for its other eigenvalues: `check` tells.

    References:
        [Katzenberger1991]; [LiWangArora2022, Theorem 4.6] for F = ∇L.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> field = lambda w: jnp.stack([w[0] * (1 + w[1] ** 2), w[1] * w[0] ** 2])  # 0 at w₀ = 0
        >>> noise = lambda w: jnp.diag(jnp.array([1.0, 0.0]))
        >>> flow = mf.IterationLimit(field, noise)
        >>> print((flow.drift(jnp.array([0.0, 1.0])) + 0.0).round(3))  # −w₁/(2(1 + w₁²))
        [ 0.   -0.25]
    """

    mean_field: Callable[..., Any]
    covariance: Callable[..., Any]
    slow_drift: Callable[..., Any] | None
    rank_rule: int | float | None = eqx.field(static=True)
    manifold: AbstractManifold | None

    @checked_but("rank", "manifold")
    def __init__(
        self,
        mean_field: Callable[..., Any],
        covariance: Callable[..., Any],
        slow_drift: Callable[..., Any] | None = None,
        *,
        rank: int | float | None = None,
        manifold: AbstractManifold | None = None,
    ):
        self.mean_field = _tree.as_pytree_callable(mean_field)
        self.covariance = _tree.as_pytree_callable(covariance)
        self.slow_drift = None if slow_drift is None else _tree.as_pytree_callable(slow_drift)
        self.rank_rule = _checked_rank(rank)
        if not isinstance(manifold, AbstractManifold | None):
            raise ValueError(
                "IterationLimit: manifold must be the zeros of the mean field, as LevelSet(fn), "
                f"or None; got {described(manifold)}."
            )
        self.manifold = manifold

    @property
    def clock(self) -> LimitClock:
        """The clock Ση²."""
        return LimitClock()

    @property
    def is_stochastic(self) -> bool:
        return True

    def split(self, point: Point) -> tuple[Coordinates, Point]:
        return _tree.split(point) if self.manifold is None else self.manifold.split(point)

    def drift(self, point: Point) -> Tangent:
        """The drift in the sense of Itô; NaN under jit where a hypothesis fails."""
        drift, is_fine = _drift(self, point)
        if not is_traced(is_fine) and not is_fine:
            raise ValueError(f"IterationLimit has no drift at this point: {self.check(point)}")
        return drift

    def diffusion(self, point: Point) -> lx.AbstractLinearOperator:
        """The operator σ = (ΠΣΠᵀ)^½, symmetric, on tangents."""
        coordinates, _ = self.split(point)
        unravel = _tree.ravel(coordinates)[1]
        root = _root(self, point)

        def mv(vector: Tangent) -> Tangent:
            flat = _tree.ravel(vector)[0]
            return unravel(_precision.matmul(root, flat))

        structure = _tree.structure_of(coordinates)
        return lx.FunctionLinearOperator(mv, structure, lx.symmetric_tag)

    def check(self, point: Point) -> IterationCheck:
        """The hypotheses at a point, in numbers; not under jit."""
        if is_traced((self, point)):
            raise ValueError("IterationLimit.check looks at values; call it outside of jit.")
        here = _here(self, point)
        spaces = here.spaces
        rank, size = int(spaces.rank), float(spaces.size)
        defect = float(_tree.norm(product(spaces.inverse, here.field)))
        cosine = float(spaces.cosine)
        # By NumPy: not every backend of JAX has eigenvalues of general matrices.
        rates = np.sort_complex(np.linalg.eigvals(np.asarray(here.jacobian, np.float64)))
        # Those of the kernel are the nearest to zero.
        off = rates[np.argsort(np.abs(rates))[len(rates) - rank :]]
        slowest = float(np.min(off.real, initial=np.inf))
        return IterationCheck(rank, defect, cosine, slowest, _problem(here, cosine, slowest / size))


class _Here(NamedTuple):
    """F, A and its spaces at one point, in the raveled order of the coordinates."""

    coordinates: Float[Array, " D"]
    field_fn: Callable[[Array], Array]
    field: Float[Array, " D"]
    jacobian: Matrix
    spaces: Splitting


def _here(flow: IterationLimit, point: Point) -> _Here:
    coordinates, remainder = flow.split(point)
    flat, unravel = _tree.ravel(coordinates)

    def field(x: Array) -> Array:
        at = unravel(x)
        value = flow.mean_field(_tree.join(at, remainder))
        return _tree.ravel(_tree.as_tangent(at, value, "The value of mean_field"))[0]

    rank = flow.rank_rule
    if isinstance(rank, int) and rank > flat.size:
        raise ValueError(f"IterationLimit: rank {rank} exceeds the {flat.size} coordinates.")
    if rank is None:
        # A point off Γ by δ blurs zero eigenvalues by the order of δ: far more than eps is needed.
        rank = _precision.eps_of_dtype(flat) ** (1 / 3)
    # TF32 and bfloat16 products on accelerators leave no gap between zero eigenvalues and others.
    with _precision.full_precision():
        jacobian = jax.jacfwd(field)(flat)
    return _Here(flat, field, field(flat), jacobian, splitting(jacobian, rank))


@eqx.filter_jit
def _drift(flow: IterationLimit, point: Point) -> tuple[Tangent, Flag]:
    coordinates, _ = flow.split(point)
    here = _here(flow, point)
    spaces, sigma = here.spaces, _covariance(flow, point)
    tangent = spaces.tangent
    normal, is_stable = spaces.lyapunov_solve(sigma)
    mixed = product(spaces.inverse, sigma, tangent.T)
    flat = product(tangent, sigma, tangent.T)
    # 2·sym(A^#Π̄ΣΠᵀ), with A^#Π̄ = A^#: the ½ of both sums comes at the end.
    bent, pushed = _contracted(here, jnp.stack([flat, normal + mixed + mixed.T]))
    total = -(product(spaces.inverse, bent) + product(tangent, pushed)) / 2
    if flow.slow_drift is not None:
        slow = _tree.as_tangent(coordinates, flow.slow_drift(point), "The value of slow_drift")
        total = total + product(tangent, _tree.ravel(slow)[0])
    is_fine = is_stable & (spaces.cosine > _least_cosine(total.dtype))
    # By a product, so that derivatives are NaN as well.
    total = total * _tree.where(is_fine, jnp.ones((), total.dtype), jnp.nan)
    return _tree.ravel(coordinates)[1](total), is_fine


@eqx.filter_jit
def _root(flow: IterationLimit, point: Point) -> Matrix:
    tangent = _here(flow, point).spaces.tangent
    along = product(tangent, _covariance(flow, point), tangent.T)
    # Symmetric up to rounding; a root by eigenvectors needs it to be so exactly.
    return semidefinite_root((along + along.T) / 2)


def _contracted(here: _Here, matrices: Float[Array, "2 D D"]) -> Float[Array, "2 D"]:
    """The vectors ∂²F[Q] for symmetric matrices Q, by one derivative per row of each."""
    identity = lx.IdentityLinearOperator(_tree.structure_of(here.coordinates))

    def contracted(matrix: Matrix) -> Array:
        along = lx.MatrixLinearOperator(matrix)
        return linalg.second_derivative_sum(here.field_fn, here.coordinates, identity, along)

    return jax.vmap(contracted)(matrices)


def _covariance(flow: IterationLimit, point: Point) -> Matrix:
    coordinates, _ = flow.split(point)
    size = _tree.size(coordinates)
    value = flow.covariance(point)
    if isinstance(value, lx.AbstractLinearOperator):
        value = _dense(value, coordinates)
    value = jnp.asarray(value)
    if value.shape != (size, size):
        raise ValueError(
            f"The value of covariance must be an array of shape ({size}, {size}), in the raveled "
            f"order of the coordinates, or an operator on tangents; got shape {value.shape}."
        )
    return ((value + value.T) / 2).astype(_tree.dtype_of(coordinates))


def _dense(operator: lx.AbstractLinearOperator, coordinates: Coordinates) -> Matrix:
    """The transposed matrix of an operator on tangents."""
    tangents = jax.tree.map(jnp.shape, _tree.structure_of(coordinates))
    for structure in (operator.in_structure(), operator.out_structure()):
        if jax.tree.map(jnp.shape, structure) != tangents:
            raise ValueError(
                f"The value of covariance must map tangents, {tangents}, to tangents; got an "
                f"operator with {jax.tree.map(jnp.shape, structure)}."
            )
    row = lambda index: _tree.ravel(linalg.column(operator, index))[0]
    return jax.vmap(row)(jnp.arange(_tree.size(coordinates)))


def _checked_rank(rank: Any) -> int | float | None:
    if rank is None or (isinstance(rank, float) and 0 <= rank < 1):
        return rank
    is_count = isinstance(rank, int | np.integer) and not isinstance(rank, bool)
    if not is_count or rank < 0:
        raise ValueError(
            "IterationLimit: rank must be an integer, that of the derivative of the mean field on "
            "its zeros, a float in [0, 1), a share of its largest singular value, or None; got "
            f"{rank!r}."
        )
    return int(rank)


def _least_cosine(dtype: Any) -> float:
    """Below it the two kernels are too far apart for the precision."""
    return _precision.eps_of_dtype(dtype) ** 0.5


def _problem(here: _Here, cosine: float, slowest: float) -> str:
    if not bool(_tree.all_finite((here.field, here.jacobian))):
        return "The mean field or its derivative is not finite. Look at both there."
    if not cosine > _least_cosine(here.jacobian.dtype):
        return (
            "∂F is not semisimple: a vector of its kernel lies in its range, so that noise grows "
            "without end. Give the rank of ∂F on the zeros of F; if it is right, there is no limit."
        )
    if not slowest > _least_cosine(here.jacobian.dtype):
        return (
            "∂F has eigenvalues off its kernel whose real part is not positive: F does not lead "
            "back to its zeros. Check the sign of F (θ moves along −F) and the rank."
        )
    return ""
