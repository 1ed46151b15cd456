"""The limit of iterations whose mean and noise act through one row for each residual.

Where the mean field is F = B(θ)ᵀρ(r(θ)) with ρ(0) = 0 and gains R = ρ'(0), and the noise has
the covariance BᵀCB, nothing larger than n×n is needed: with J = ∂r, G = JBᵀ and the T of

    R G T + T GᵀRᵀ = C,   Π = 1 − BᵀG⁻¹J,   drift = −Π Σᵢ ∂bᵢ[(BᵀTGᵀRᵀ)_{·i}],

and there is no noise along {r = 0}. SGD has B = J, a fixed preconditioner S has B = JS, clipping
B = J with its gains. It is `IterationLimit` for these fields.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manifoldflow import _tree, linalg
from manifoldflow._types import Coordinates, Flag, Tangent
from manifoldflow.flows._oblique import inverse, product, stable_lyapunov_solve

Square = Float[Array, "n n"]


class RowsDrift(NamedTuple):
    """A drift, and a mark if all eigenvalues of RG have positive real parts: else there is none."""

    drift: Tangent
    is_stable: Flag


def rows_form_drift(
    rows_fn: Callable[[Coordinates], linalg.AbstractJacobian],
    coordinates: Coordinates,
    jacobian: linalg.AbstractJacobian,
    gains: Square,
    noise: Square,
) -> RowsDrift:
    """The drift −Π Σᵢ ∂bᵢ[(BᵀTGᵀRᵀ)_{·i}]: n derivatives of a row, each along one tangent.

    Args:
        rows_fn: coordinates → B there, of the shape of J.
        coordinates: where, on {r = 0}.
        jacobian: J = ∂r there.
        gains: R, (n, n), not necessarily symmetric.
        noise: C, (n, n), symmetric.
    """
    rows = rows_fn(coordinates)
    gram = jacobian.cross_gram(rows)
    driven = product(gains, gram)
    spread, is_stable = stable_lyapunov_solve(driven, noise)
    turned = row_derivative_sum(rows_fn, coordinates, product(spread, driven.T))
    drift = _tree.scale(-1, oblique_component(rows, jacobian, gram, turned))
    return RowsDrift(drift, is_stable)


def row_derivative_sum(
    rows_fn: Callable[[Coordinates], linalg.AbstractJacobian],
    coordinates: Coordinates,
    coefficients: Square,
) -> Tangent:
    """The sum Σᵢ ∂bᵢ[(BᵀC)_{·i}] for rows that need not be gradients.

    Those of a Jacobian are; `linalg.contract_hessians` then takes one backward pass.
    """
    rows = rows_fn(coordinates)
    count = len(coefficients)

    def term(index: Int[Array, ""]) -> Tangent:
        unit = jnp.zeros(count, coefficients.dtype).at[index].set(1)
        along = rows.transpose_mv(product(coefficients, unit))
        row = lambda x: rows_fn(x).transpose_mv(unit)
        return jax.jvp(row, (coordinates,), (along,))[1]

    # Some 2¹⁹ numbers at a time: all rows at once would be n×D.
    chunk_size = max(1, 2**19 // _tree.size(coordinates))
    return linalg.sum_terms(term, count, chunk_size)


def oblique_component(
    rows: linalg.AbstractJacobian,
    jacobian: linalg.AbstractJacobian,
    gram: Square,
    vector: Tangent,
) -> Tangent:
    """The oblique component Πv = v − Bᵀ(JBᵀ)⁻¹Jv, along range Bᵀ on ker J; gram is JBᵀ."""
    lifted = product(inverse(gram), jacobian.mv(vector))
    return _tree.subtract(vector, rows.transpose_mv(lifted))
