"""How nearly inputs keep the norms of sparse vectors, what sparse recovery asks of them."""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Num

from manifoldflow._boundary import checked
from manifoldflow.theory._arguments import matrix

_ENUMERATED = 20_000
_MAX_STEPS = 100


class RestrictedIsometry(NamedTuple):
    """Bounds of the constant ``delta_k`` of a matrix.

    Attributes:
        lower: attained on `support`; equal to delta_k if `is_exact`.
        upper: by Gershgorin's circles, from the mutual coherence; often far above 1.
        support: the columns on which `lower` is attained, ascending.
        is_exact: whether all supports were looked at.
    """

    lower: float
    upper: float
    support: Int[np.ndarray, " k"]
    is_exact: bool

    @property
    def bilinear_bound(self) -> float:
        """Of ``|<Z v, Z w>/n - <v, w>|`` for unit v, w with at most k entries each.

        ``2 delta_k`` for even k, ``3 delta_k`` for odd k, by splitting both supports so that two
        parts have k entries together; inf for k = 1, where two equal columns of length ``sqrt(n)``
        have ``delta_1 = 0`` and the product 1. Printed is 4 delta for every k [Ma2022, Lemma 9.11].
        """
        k = len(self.support)
        delta = self.lower if self.is_exact else self.upper
        return math.inf if k == 1 else (2 + k % 2) * delta


@checked
def restricted_isometry(
    inputs: Num[ArrayLike, "..."], sparsity: int, *, num_starts: int = 32, seed: int = 0
) -> RestrictedIsometry:
    """``delta_k``, the least with ``(1 - delta)|x|^2 <= |Z x|^2/n <= (1 + delta)|x|^2`` for all
    x with at most k entries.

    To compute it is NP-hard. Up to 20,000 supports are enumerated; of more, the worst one is
    sought by truncated power iterations from random starts, which gives a lower bound: delta_k
    itself may be larger.

    Args:
        inputs: Z, shape (n, d), with entries of variance 1 (else divide by their scale).
        sparsity: k, between 1 and d.
        num_starts: random starts of each search.
        seed: of these.

    Raises:
        ValueError: a sparsity out of range.

    References:
        [Ma2022, section 9.2]; E. Candes, T. Tao, Decoding by linear programming, IEEE Trans.
        Inform. Theory 51 (2005); X.-T. Yuan, T. Zhang, Truncated power method for sparse
        eigenvalue problems, JMLR 14 (2013).
    """
    z = matrix("inputs", inputs)
    n, d = z.shape
    if not 1 <= sparsity <= d:
        raise ValueError(f"sparsity: got {sparsity}, expected between 1 and d = {d}.")
    z = z / np.sqrt(n)
    is_exact = math.comb(d, sparsity) <= _ENUMERATED
    supports: Iterable[np.ndarray]
    if is_exact:
        supports = map(np.array, itertools.combinations(range(d), sparsity))
    else:
        starts = np.random.default_rng(seed).standard_normal((num_starts, d))
        supports = (_worst_support(z, x, sparsity, sign) for x in starts for sign in (1, -1))
    lower, support = max(((_distortion(z, s), s) for s in supports), key=lambda found: found[0])
    return RestrictedIsometry(lower, max(lower, _circles(z, sparsity)), support, is_exact)


def _distortion(z: Float[np.ndarray, "n d"], support: np.ndarray) -> float:
    """The largest eigenvalue of Z_S' Z_S - I in size."""
    part = z[:, support]
    return float(np.max(np.abs(np.linalg.eigvalsh(part.T @ part) - 1)))


def _worst_support(z: np.ndarray, x: np.ndarray, sparsity: int, sign: int) -> np.ndarray:
    """Power iteration with Z'Z (sign 1), or with what is left of it (-1), keeping k entries."""
    shift = 0.0 if sign > 0 else float(np.linalg.norm(z, 2) ** 2)
    support = np.arange(sparsity)
    for _ in range(_MAX_STEPS):
        x = sign * (z.T @ (z @ x)) + shift * x
        kept = np.sort(np.argpartition(np.abs(x), -sparsity)[-sparsity:])
        if np.array_equal(kept, support):
            break
        support, previous = kept, x
        x = np.zeros_like(previous)
        x[support] = previous[support] / np.linalg.norm(previous[support])
    return support


def _circles(z: np.ndarray, sparsity: int) -> float:
    """max |G_jj - 1| + (k - 1) max |G_jl|, in blocks of columns: no d x d matrix."""
    on, off = 0.0, 0.0
    for start in range(0, z.shape[1], 256):
        columns = slice(start, start + 256)
        gram = np.abs(z[:, columns].T @ z)
        diagonal = np.arange(len(gram)), np.arange(start, start + len(gram))
        on = max(on, float(np.max(np.abs(gram[diagonal] - 1))))
        gram[diagonal] = 0.0
        off = max(off, float(np.max(gram)))
    return on + (sparsity - 1) * off
