"""The largest eigenvalues of G, one product a call: until they are found or the time is over.

Band Lanczos with thick restarts, as `linalg.largest_eigenvalues`, led by Python: the clock can be
looked at between two products, and XLA's convolutions are quick on CPUs, which within loops they
are not. The basis is one buffer that is written in place.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _precision

# The residual that is asked for, relative to the largest eigenvalue.
TOLERANCE = 5e-5
# Bytes of the basis, within these bounds for its length.
_MEMORY, _SHORTEST, _LONGEST = 2**25, 24, 128


class Top(NamedTuple):
    """Eigenvalues, descending, and how good they are.

    Attributes:
        values: (num,).
        bounds: ‖Av − λv‖ and the rounding of products: so near there is an eigenvalue.
        is_found: True where all are as good as was asked for.
        num_products: that it took.
        num_bytes: of the basis.
    """

    values: np.ndarray
    bounds: np.ndarray
    is_found: bool
    num_products: int
    num_bytes: int


class _Stopped(Exception):
    """The time is over."""


def top_eigenvalues(
    product: Callable[[Array], Array],
    like: Array,
    num: int,
    seconds: float,
    max_products: int = 2000,
) -> Top:
    """The algebraically largest eigenvalues of a self-adjoint v ↦ Av.

    The first product, which is compiled, is no part of the seconds.
    """
    num = min(num, like.size)
    band = min(num + 1, like.size)
    length = max(_SHORTEST, min(_LONGEST, _MEMORY // like.nbytes))
    length = max(3 * band, length // band * band)
    search = _Search(product, band, min(length, like.size), like, seconds, max_products)
    try:
        search.run(num)
    except _Stopped:
        pass
    return search.found(num)


class _Search:
    def __init__(
        self,
        product: Callable[[Array], Array],
        band: int,
        length: int,
        like: Array,
        seconds: float,
        max_products: int,
    ):
        self.product = product
        self.band, self.length = band, length
        self.eps = _precision.eps_of_dtype(like)
        self.basis = jnp.zeros((length + band, like.size), like.dtype)
        self.is_there = np.zeros(length + band, bool)
        # ⟨vᵢ, A vⱼ⟩, i ≤ j; of columns below `count`.
        self.matrix = np.zeros((length + band, length + band))
        self.count, self.scale = 0, 0.0
        self.num_products, self.max_products = 0, max_products
        self.seconds, self.end = seconds, float("inf")
        random = np.random.default_rng(0)
        for index in range(band):
            drawn = random.standard_normal(like.size, np.float32)
            self._add(jnp.asarray(drawn, like.dtype), index, 0.0)

    def run(self, num: int) -> None:
        while True:
            while self.count < self.length:
                self._grow()
                if self.count % self.band == 0 and self._is_found(num):
                    return
            if self.length == self.basis.shape[1]:  # the whole space
                return
            self._restart()

    def _grow(self) -> None:
        """One more column of the matrix, one more vector."""
        if time.perf_counter() > self.end or self.num_products >= self.max_products:
            raise _Stopped
        image = self._product(_row(self.basis, self.count))
        size = float(jnp.linalg.norm(image))
        if not np.isfinite(size):
            self.end = -1.0
            raise _Stopped
        self.scale = max(self.scale, size)
        # What is left of a product in an invariant subspace is rounding and no direction.
        column = self._add(image, self.count + self.band, 0.1 * self.eps**0.75 * self.scale)
        self.matrix[:, self.count] = column
        self.count += 1

    def _product(self, vector: Array) -> Array:
        # JAX returns before it has computed: the clock would stop too early.
        image = jax.block_until_ready(self.product(vector))
        if self.num_products == 0:
            self.end = time.perf_counter() + self.seconds
        self.num_products += 1
        return image

    def _add(self, vector: Array, index: int, floor: float) -> np.ndarray:
        self.basis, column = _orthogonalised(self.basis, vector, index, floor)
        column = np.asarray(column, float)
        self.is_there[index] = column[index] > 0
        return column

    def _ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values, descending, rotations and residuals."""
        upper = np.triu(self.matrix[: self.count, : self.count])
        # Places without a vector go to the lower end.
        is_there = self.is_there[: self.count]
        full = upper + np.triu(upper, 1).T
        full = np.where(is_there[:, None] & is_there, full, 0)
        full -= np.diag(np.where(is_there, 0, 1 + 2 * np.linalg.norm(full)))
        values, rotations = np.linalg.eigh(full)
        values, rotations = values[::-1], rotations[:, ::-1]
        # What A makes of a Ritz vector leaves the basis through its last band only.
        beyond = self.matrix[self.count : self.count + self.band, : self.count]
        return values, rotations, np.linalg.norm(beyond @ rotations, axis=0)

    def _is_found(self, num: int) -> bool:
        if self.count < num:
            return False
        values, _, residuals = self._ritz()
        return bool(np.all(residuals[:num] <= TOLERANCE * max(abs(values[0]), 1e-300)))

    def _restart(self) -> None:
        """The best Ritz vectors and the last band in place of all vectors."""
        values, rotations, _ = self._ritz()
        kept = self.band * max(1, self.length // (3 * self.band))
        is_there = np.sum(rotations[self.is_there[: self.count], :kept] ** 2, axis=0) > 0.5
        rotation = jnp.asarray(rotations[:, :kept].T * is_there[:, None], self.basis.dtype)
        self.basis = _restarted(self.basis, rotation, self.length)
        following = self.is_there[self.length :]
        self.is_there = np.zeros_like(self.is_there)
        self.is_there[: kept + self.band] = np.concatenate([is_there, following])
        self.matrix = np.zeros_like(self.matrix)
        self.matrix[np.arange(kept), np.arange(kept)] = values[:kept]
        self.count = kept

    def found(self, num: int) -> Top:
        if self.count < num or self.end < 0:
            nothing = np.full(num, np.nan)
            return Top(nothing, nothing, False, self.num_products, self.basis.nbytes)
        values, rotations, residuals = self._ritz()
        for index in range(num if self.end > time.perf_counter() else 0):
            rotation = np.zeros(len(self.basis))
            rotation[: self.count] = rotations[:, index]
            rotation = jnp.asarray(rotation, self.basis.dtype)
            unit = _combined(self.basis, rotation)
            values[index], residuals[index] = _judged(unit, self._product(unit))
        bounds = residuals[:num] + 8 * self.eps * abs(values[0])
        is_found = bool(np.all(residuals[:num] <= 2 * TOLERANCE * abs(values[0])))
        return Top(values[:num], bounds, is_found, self.num_products, self.basis.nbytes)


@jax.jit
def _row(basis: Float[Array, "n D"], index: Any) -> Float[Array, " D"]:
    return basis[index]


@jax.jit
def _combined(basis: Float[Array, "n D"], rotation: Float[Array, " n"]) -> Float[Array, " D"]:
    vector = _precision.matmul(rotation, basis)
    return vector / jnp.linalg.norm(vector)


@jax.jit
def _judged(unit: Float[Array, " D"], image: Float[Array, " D"]) -> tuple[Array, Array]:
    """⟨v, Av⟩ and ‖Av − ⟨v, Av⟩v‖."""
    value = _precision.vdot(unit, image)
    return value, jnp.linalg.norm(image - value * unit)


def _orthogonalise(
    basis: Float[Array, "n D"], vector: Float[Array, " D"], index: Any, floor: Any
) -> tuple[Float[Array, "n D"], Float[Array, " n"]]:
    column = jnp.zeros(len(basis), basis.dtype)
    for _ in range(2):  # twice is enough
        parts = _precision.matmul(basis, vector)
        vector = vector - _precision.matmul(parts, basis)
        column = column + parts
    left = jnp.linalg.norm(vector)
    is_new = left > floor
    unit = jnp.where(is_new, vector / jnp.where(is_new, left, 1), 0)
    return basis.at[index].set(unit), column.at[index].set(jnp.where(is_new, left, 0))


# Donated: else every new vector would copy the whole basis.
_orthogonalised = jax.jit(_orthogonalise, donate_argnums=0)


def _restart(basis: Float[Array, "n D"], rotation: Float[Array, "kept m"], length: int) -> Array:
    kept, band = len(rotation), len(basis) - length
    best = _precision.matmul(rotation, basis[:length])
    following = basis[length:]
    basis = basis.at[:kept].set(best).at[kept : kept + band].set(following)
    return basis.at[kept + band :].set(0)


_restarted = jax.jit(_restart, donate_argnums=0, static_argnums=2)
