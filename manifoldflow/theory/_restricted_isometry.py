"""The restricted isometry constant of inputs, on which sparse recovery rests."""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Num

from manifoldflow._boundary import checked_concrete
from manifoldflow.theory._arguments import matrix

_ENUMERATED = 20_000
_MAX_STEPS = 100


class RestrictedIsometry(NamedTuple):
    """Bounds of the restricted isometry constant δₖ of a matrix.

    Attributes:
        lower: attained on `support`; equal to δₖ if `is_exact`.
        upper: by Gershgorin's circles, from the mutual coherence; often far above 1.
        support: the k columns on which `lower` is attained, ascending.
        is_exact: True where all supports were looked at.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> found = theory.restricted_isometry(np.sqrt(3) * np.eye(3), 2)
        >>> isinstance(found, theory.RestrictedIsometry), found.is_exact
        (True, True)
    """

    lower: float
    upper: float
    support: Int[np.ndarray, " k"]
    is_exact: bool

    @property
    def bilinear_bound(self) -> float:
        """A bound of |⟨Zv, Zw⟩/n − ⟨v, w⟩| for unit v and w with at most k entries each.

        It is 2δₖ for even k and 3δₖ for odd k, by splitting both supports so that two parts have k
        entries together. It is inf for k = 1, where two equal columns of length √n have δ₁ = 0 and
        the product 1. Printed is 4δ for every k [Ma2022, Lemma 9.11].
        """
        k = len(self.support)
        delta = self.lower if self.is_exact else self.upper
        return math.inf if k == 1 else (2 + k % 2) * delta


@checked_concrete
def restricted_isometry(
    inputs: Num[ArrayLike, "..."], sparsity: int, *, num_starts: int = 32, seed: int = 0
) -> RestrictedIsometry:
    """The least δₖ with (1 − δₖ)‖x‖² ≤ ‖Zx‖²/n ≤ (1 + δₖ)‖x‖² for all x with at most k entries.

    Its computation is NP-hard. Up to 20,000 supports are enumerated. Beyond that the worst support
    is sought by truncated power iterations from random starts, which gives a lower bound; δₖ may be
    larger.

    Args:
        inputs: Z, shape (n, d), with entries of variance 1 (else divide by their scale).
        sparsity: k, from 1 to d.
        num_starts: random starts of each search.
        seed: of the random starts.

    Returns:
        A `RestrictedIsometry`.

    Raises:
        ValueError: a sparsity out of range.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> inputs = np.sqrt(2) * np.array([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]])
        >>> found = theory.restricted_isometry(inputs, 2)
        >>> print(round(found.lower, 3), found.support.tolist(), found.is_exact)
        0.8 [1, 2] True

    References:
        [Ma2022, section 9.2]; E. Candes, T. Tao, Decoding by linear programming, IEEE Trans.
        Inform. Theory 51 (2005); X.-T. Yuan, T. Zhang, Truncated power method for sparse eigenvalue
        problems, JMLR 14 (2013).
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
    """The largest |eigenvalue| of Z_SᵀZ_S − I."""
    part = z[:, support]
    return float(np.max(np.abs(np.linalg.eigvalsh(part.T @ part) - 1)))


def _worst_support(z: np.ndarray, x: np.ndarray, sparsity: int, sign: int) -> np.ndarray:
    """The support at the end of truncated power iteration, with ZᵀZ or with shift·I − ZᵀZ."""
    # The smallest eigenvalue of ZᵀZ is the largest of shift·I − ZᵀZ, which is what power iteration
    # finds.
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
    """The bound max|Gⱼⱼ − 1| + (k − 1)·max|Gⱼₗ|, in blocks of columns: no d×d matrix."""
    on, off = 0.0, 0.0
    for start in range(0, z.shape[1], 256):
        columns = slice(start, start + 256)
        # 256 columns at a time: d×d numbers are never held.
        gram = np.abs(z[:, columns].T @ z)
        diagonal = np.arange(len(gram)), np.arange(start, start + len(gram))
        on = max(on, float(np.max(np.abs(gram[diagonal] - 1))))
        gram[diagonal] = 0.0
        off = max(off, float(np.max(gram)))
    return on + (sparsity - 1) * off
