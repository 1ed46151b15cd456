"""Generators of symmetries: symmetric matrices A on tangents, never D×D unless given so.

The methods are Av, e^{λA}v and ‖A‖. Generators with known eigenvectors also give the modes of a
vector, on which A is a multiplication by rates.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, PyTree

from manifoldflow import _precision, _tree
from manifoldflow._errors import is_traced, real_numbers, shapes_of
from manifoldflow._types import Coordinates, Scalar, Tangent
from manifoldflow.symmetry._views import as_view, View


class AbstractGenerator(eqx.Module):
    """A symmetric linear map A from tangents to tangents."""

    @abc.abstractmethod
    def mv(self, vector: Tangent) -> Tangent:
        """The product Av."""

    @abc.abstractmethod
    def exp_mv(self, parameter: Scalar, vector: Tangent) -> Tangent:
        """The product e^{λA}v."""

    @abc.abstractmethod
    def norm(self, vector: Tangent) -> Scalar:
        """The largest |eigenvalue| of A on vectors like this one."""


class AbstractSpectralGenerator(AbstractGenerator):
    """A generator whose eigenvectors are known.

    The modes of a vector are its components along orthonormal eigenvectors; those with
    eigenvalue zero may be left out.
    """

    @abc.abstractmethod
    def modes(self, vector: Tangent) -> PyTree[Array]:
        """The components of a vector along the eigenvectors."""

    @abc.abstractmethod
    def with_modes(self, modes: PyTree[Array], vector: Tangent) -> Tangent:
        """The vector with its modes replaced."""

    @abc.abstractmethod
    def rates(self, vector: Tangent) -> PyTree[Array]:
        """The eigenvalues, broadcastable against the modes of vectors like this one."""

    def mv(self, vector: Tangent) -> Tangent:
        scaled = jax.tree.map(jnp.multiply, self.rates(vector), self.modes(vector))
        return self.with_modes(scaled, _tree.zeros_like(vector))

    def exp_mv(self, parameter: Scalar, vector: Tangent) -> Tangent:
        def stretched(rate: Array, mode: Array) -> Array:
            return (jnp.exp(parameter * rate) * mode).astype(mode.dtype)

        scaled = jax.tree.map(stretched, self.rates(vector), self.modes(vector))
        return self.with_modes(scaled, vector)

    def norm(self, vector: Tangent) -> Scalar:
        largest = [jnp.max(jnp.abs(rate)) for rate in jax.tree.leaves(self.rates(vector))]
        return jnp.max(jnp.stack(largest)).astype(_tree.dtype_of(vector))


class Elementwise(AbstractSpectralGenerator):
    """The diagonal generator A = diag(weights).

    Args:
        weights: a PyTree like the point, or a prefix of it; leaves broadcast against the point's.
            None and leaves that are no numbers count as 0.
    """

    weights: PyTree[Any]

    def modes(self, vector: Tangent) -> PyTree[Array]:
        return vector

    def with_modes(self, modes: PyTree[Array], vector: Tangent) -> Tangent:
        return jax.tree.map(lambda m, v: m.astype(v.dtype), modes, vector)

    def rates(self, vector: Tangent) -> PyTree[Array]:
        def spread(weight: Any, part: Tangent) -> Tangent:
            # A whole module may be given as weights: its strings and functions count as 0.
            weight = weight if _is_number(weight) else 0
            return jax.tree.map(lambda leaf: _broadcastable(weight, leaf), part)

        try:
            return jax.tree.map(spread, self.weights, vector, is_leaf=lambda x: x is None)
        except (ValueError, TypeError) as error:
            raise ValueError(
                "The weights of a symmetry must be like the point, or a prefix of it, and "
                f"broadcast against its coordinates {shapes_of(vector)}; got "
                f"{shapes_of(self.weights)}."
            ) from error


def _is_number(leaf: Any) -> bool:
    return eqx.is_array_like(leaf) and not isinstance(leaf, bool)


def _broadcastable(weight: Any, leaf: Array) -> Array:
    if jnp.broadcast_shapes(jnp.shape(weight), leaf.shape) != leaf.shape:
        raise ValueError(f"{jnp.shape(weight)} does not broadcast to {leaf.shape}.")
    return jnp.asarray(weight, leaf.dtype)


def is_leafwise(
    generators: Sequence[AbstractGenerator], vector: Tangent
) -> TypeGuard[Sequence[Elementwise]]:
    """True where each generator multiplies every leaf by one number."""
    return all(
        isinstance(generator, Elementwise)
        and all(rate.size == 1 for rate in jax.tree.leaves(generator.rates(vector)))
        for generator in generators
    )


class LowRank(AbstractSpectralGenerator):
    """A = E diag(values) Eᵀ with orthonormal columns of E; built by `low_rank`.

    Attributes:
        basis: E, (D, r), in the order of the raveled coordinates.
        values: the eigenvalues, (r,).
    """

    basis: Float[Array, "D r"]
    values: Float[Array, " r"]

    def modes(self, vector: Tangent) -> Float[Array, " r"]:
        flat, _ = _tree.ravel(vector)
        if flat.size != self.basis.shape[0]:
            raise ValueError(
                f"The symmetry acts on {self.basis.shape[0]} numbers; the point has "
                f"{flat.size} coordinates, {shapes_of(vector)}."
            )
        return _precision.matmul(flat, self.basis.astype(flat.dtype))

    def with_modes(self, modes: Float[Array, " r"], vector: Tangent) -> Tangent:
        # Only the change along E is added: what is orthogonal to E stays bit by bit.
        change = modes - self.modes(vector)
        moved = _precision.matmul(self.basis.astype(change.dtype), change)
        return _tree.add(vector, _tree.ravel(vector)[1](moved))

    def rates(self, vector: Tangent) -> Float[Array, " r"]:
        return self.values.astype(_tree.dtype_of(vector))


class Rotation(AbstractSpectralGenerator):
    """The generator of a double rotation: it multiplies axes of some leaves by ±B.

    B = V diag(values) Vᵀ may have several blocks, one after the other along the axis.

    Attributes:
        where: picks the leaves out of a point, as a tuple.
        axes: the axis of each leaf on which B acts, or a `View` of several or of a part.
        signs: +1 or −1 for each leaf.
        vectors: V, (blocks, d, d).
        values: the eigenvalues of B, (blocks, d).
    """

    where: Callable[[Any], tuple[Any, ...]] = eqx.field(static=True)
    axes: tuple[int | View, ...] = eqx.field(static=True)
    signs: tuple[int, ...] = eqx.field(static=True)
    vectors: Float[Array, "blocks d d"]
    values: Float[Array, "blocks d"]

    def _turned(self, array: Array, spec: str) -> Array:
        vectors = self.vectors.astype(array.dtype)
        return _precision.einsum(spec, vectors, array)

    def modes(self, vector: Tangent) -> tuple[Array, ...]:
        def mode(leaf: Array, axis: int | View) -> Array:
            blocks = as_view(axis, leaf.ndim).rows(leaf).reshape(*self.values.shape, -1)
            return self._turned(blocks, "bij,bik->bjk")

        return tuple(mode(leaf, axis) for leaf, axis in zip(self.where(vector), self.axes))

    def with_modes(self, modes: tuple[Array, ...], vector: Tangent) -> Tangent:
        def back(mode: Array, leaf: Array, axis: int | View) -> Array:
            turned = self._turned(mode, "bij,bjk->bik").reshape(self.values.size, -1)
            return as_view(axis, leaf.ndim).with_rows(turned, leaf)

        leaves = map(back, modes, self.where(vector), self.axes)
        return eqx.tree_at(self.where, vector, tuple(leaves))

    def rates(self, vector: Tangent) -> tuple[Array, ...]:
        values = self.values.astype(_tree.dtype_of(vector))
        return tuple(sign * values[:, :, None] for sign in self.signs)


# Steps and degree of the Taylor series for e^{λA}v: to rounding for |λ|·‖A‖ up to 36, and that
# scales some coordinates by 4·10¹⁵ against others.
_NUM_STEPS, _DEGREE = 24, 20


class Function(AbstractGenerator):
    """The generator given as a linear function v ↦ Av, whose eigenvectors stay unknown.

    Args:
        fn: maps a PyTree like the point's coordinates to another one.
    """

    fn: Callable[..., Any]

    def mv(self, vector: Tangent) -> Tangent:
        return _tree.as_tangent(vector, self.fn(vector), "The value of the generator")

    def exp_mv(self, parameter: Scalar, vector: Tangent) -> Tangent:
        def term(carry: tuple[Tangent, Tangent], order: Scalar) -> tuple[Any, None]:
            total, power = carry
            power = _tree.scale(parameter / (_NUM_STEPS * order), self.mv(power))
            return (_tree.add(total, power), power), None

        # Without it reverse mode would keep every term of every series.
        @jax.checkpoint
        def step(v: Tangent, _: None) -> tuple[Tangent, None]:
            orders = jnp.arange(1, _DEGREE + 1, dtype=_tree.dtype_of(v))
            return jax.lax.scan(term, (v, v), orders)[0][0], None

        return jax.lax.scan(step, vector, None, length=_NUM_STEPS)[0]

    def norm(self, vector: Tangent) -> Scalar:
        """A lower bound of ‖A‖ by power iteration, close enough to measure λ by."""

        def step(v: Tangent, _: None) -> tuple[Tangent, Scalar]:
            image = self.mv(v)
            size = _tree.norm(image)
            return _tree.scale(1 / jnp.where(size == 0, 1, size), image), size

        start = _tree.random_normal_like(jax.random.key(0), vector)
        start = _tree.scale(1 / _tree.norm(start), start)
        return jnp.max(jax.lax.scan(step, start, None, length=20)[1])


def spectral_of(matrix: Float[Array, "D D"]) -> LowRank:
    """The generator of a dense symmetric matrix, by its eigenvectors."""
    values, vectors = jnp.linalg.eigh(checked_symmetric(matrix))
    return LowRank(vectors, values)


def checked_symmetric(matrix: Any) -> Float[Array, "d d"]:
    matrix = jnp.asarray(real_numbers("The generator", matrix))
    matrix = matrix.astype(jnp.result_type(float, matrix))
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"The generator must be a square matrix; got shape {matrix.shape}.")
    if not is_traced(matrix):
        # By NumPy: within jit JAX traces operations on constants as well.
        known = np.asarray(matrix)
        gap, size = (float(np.max(np.abs(m))) for m in (known - known.T, known))
        if not gap <= 1e-5 * size:
            raise ValueError(
                f"The generator must be symmetric; got a matrix with |A − Aᵀ| up to {gap:.2g}. An "
                "antisymmetric one generates rotations, whose charge ½θᵀAθ is zero."
            )
    return (matrix + matrix.T) / 2


def resolved(generator: Any, coordinates: Coordinates) -> AbstractGenerator:
    """The generator that was given in any of its forms, for points with these coordinates."""
    if isinstance(generator, AbstractGenerator):
        return generator
    if isinstance(generator, lx.MatrixLinearOperator):
        return spectral_of(generator.as_matrix())
    if isinstance(generator, lx.AbstractLinearOperator):
        return Function(generator.mv)
    # A module of weights can be called as well.
    if callable(generator) and type(generator) is not type(coordinates):
        return Function(generator)
    # A (D, D) array is a matrix, unless the point itself has that shape: then it is weights.
    shape = (_tree.size(coordinates),) * 2
    if isinstance(generator, jax.Array) and generator.shape == shape:
        if jax.tree.map(jnp.shape, coordinates) != shape:
            return spectral_of(generator)
    return Elementwise(generator)
