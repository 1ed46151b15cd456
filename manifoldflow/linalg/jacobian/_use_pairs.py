"""A use that is known by its map and by the inner product of two of its rows: all else follows.

With z = U(w; a), rows Σ_t U(aₜ)ᵀδₜ and p(δ, a, ε, b) = ⟨U(a)ᵀδ, U(b)ᵀε⟩,

    Jv = Σ_t δₜ·U(v; aₜ),   Jᵀw = the transpose of that,   K = Σ_{t, s} p(δₜ, aₜ, εₛ, bₛ).
"""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from manifoldflow import _precision
from manifoldflow.linalg.jacobian._block import (
    AbstractBlock,
    AbstractPositionBlock,
    column_norms_of_rows,
    einsum,
    LeafView,
    merge_positions,
    over_positions,
    Place,
)
from manifoldflow.linalg.jacobian._use import AbstractUse
from manifoldflow.linalg.jacobian._use_rows import RowBlock


class AbstractPairUse(AbstractUse):
    """A use that gives its map and the inner product of two rows, each for one example.

    Both are mapped over examples, outputs and positions with `jax.vmap`. `apply` must be linear in
    the weight, since its transpose is taken. `register_use` tells the library of the class.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> @jax.jit
        ... def circulant(w, a):  # the products of all rotations of w with a
        ...     return jnp.stack([jnp.roll(w, k) @ a for k in range(w.size)])
        >>> @linalg.register_use(circulant)
        ... class Circulant(linalg.AbstractPairUse):
        ...     @classmethod
        ...     def recognise(cls, equation, index):
        ...         return linalg.Recognised(cls(), factor=equation.operands[1 - index])
        ...
        ...     def apply(self, weight, factor):
        ...         return circulant(weight, factor)
        ...
        ...     def inner(self, delta, factor, other_delta, other_factor):
        ...         rows = [
        ...             jax.vjp(lambda w: circulant(w, a), a)[1](d)[0]
        ...             for d, a in ((delta, factor), (other_delta, other_factor))
        ...         ]
        ...         return rows[0] @ rows[1]
        >>> jacobian = linalg.structured_jacobian(
        ...     circulant, jnp.zeros(3), jnp.arange(6.0).reshape(2, 3)
        ... )
        >>> print(jacobian.treatments, jacobian.gram().shape)
        {'': 'Circulant, summed'} (6, 6)
    """

    @abc.abstractmethod
    def apply(self, weight: Array, factor: PyTree[Array]) -> Array:
        """U(w; a): what the derivative of z in the weight makes of a weight."""

    @abc.abstractmethod
    def inner(
        self,
        delta: Array,
        factor: PyTree[Array],
        other_delta: Array,
        other_factor: PyTree[Array],
    ) -> Float[Array, ""]:
        """⟨U(a)ᵀδ, U(b)ᵀε⟩, by fewer numbers than the two rows hold."""

    def block(
        self, delta: Float[Array, "n k ..."], factor: PyTree[Array], leaf: LeafView
    ) -> "PairBlock":
        as_leaf = lambda x: x.astype(delta.dtype) if eqx.is_inexact_array(x) else x
        factor = jax.tree.map(lambda x: as_leaf(x)[:, None], factor)
        return PairBlock(delta[:, :, None], factor, self, leaf)


class PairBlock(AbstractPositionBlock):
    """Rows Σ_t U(aₜ)ᵀδₜ of a leaf that is used at T positions."""

    delta: Float[Array, "n k T ..."]
    factor: PyTree[Array]  # (n, T, ...) each
    use: AbstractPairUse = eqx.field(static=True)
    leaf: LeafView = eqx.field(static=True)

    @property
    def _num_positions(self) -> int:
        return self.delta.shape[2]

    def merged(self) -> "PairBlock":
        merge = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
        factor = jax.tree.map(merge, self.factor)
        return PairBlock(merge_positions(self.delta), factor, self.use, self.leaf)

    def joined(self, others: "Sequence[PairBlock]") -> "PairBlock":
        """One block with the positions of all."""
        every = [self, *others]
        delta = jnp.concatenate([block.delta for block in every], axis=2)
        join = lambda *parts: jnp.concatenate(parts, axis=1)
        factor = jax.tree.map(join, *(block.factor for block in every))
        return PairBlock(delta, factor, self.use, self.leaf)

    def compact(self) -> AbstractBlock:
        """The rows themselves where they are fewer numbers than what they are made of."""
        num_rows = math.prod(self.delta.shape[:2]) * math.prod(self.leaf.shape)
        num_kept = sum(x.size for x in jax.tree.leaves((self.delta, self.factor)))
        return self if num_rows > num_kept else RowBlock(self.rows())

    def _apply(self, leaf: Array) -> Float[Array, "n T ..."]:
        weight = self.leaf.apply(leaf)
        with _precision.full_precision():
            return jax.vmap(jax.vmap(lambda a: self.use.apply(weight, a)))(self.factor)

    def mv(self, leaf: Array) -> Float[Array, "n k"]:
        shape = (*self.delta.shape[:2], -1)
        z = self._apply(leaf).reshape(shape[0], -1)
        return einsum("nkz,nz->nk", self.delta.reshape(shape), z)

    def transpose_mv(self, weights: Float[Array, "n k"]) -> Array:
        flat = self.delta.reshape(*self.delta.shape[:2], -1)
        cotangent = einsum("nk,nkz->nz", weights.astype(flat.dtype), flat)
        leaf = jax.ShapeDtypeStruct(self.leaf.shape, self.delta.dtype)
        pull = jax.linear_transpose(self._apply, leaf)
        return pull(cotangent.reshape(self.delta.shape[:1] + self.delta.shape[2:]))[0]

    def rows(self) -> Float[Array, "n k ..."]:
        leaf = jax.ShapeDtypeStruct(self.leaf.shape, self.delta.dtype)

        def of_example(delta: Array, factor: PyTree[Array]) -> Array:
            one = lambda w: jax.vmap(lambda a: self.use.apply(self.leaf.apply(w), a))(factor)
            return jax.vmap(lambda d: jax.linear_transpose(one, leaf)(d)[0])(delta)

        with _precision.full_precision():
            return jax.vmap(of_example)(self.delta, self.factor)

    def cross_gram(self, other: AbstractBlock) -> Float[Array, "n k m l"]:
        if not isinstance(other, PairBlock) or (other.use, other.leaf) != (self.use, self.leaf):
            return RowBlock(self.rows()).cross_gram(other)

        def term(at: Place) -> Array:
            mine, theirs = self._at(at[0]), other._at(at[1])
            return _over_outputs(self.use, pairs=True)(*mine, *theirs)

        counts = self._num_positions, other._num_positions, 1
        return term((0, 0, 0)) if counts == (1, 1, 1) else over_positions(term, counts)

    def norms(self) -> Float[Array, "n k"]:
        def term(at: Place) -> Array:
            return _over_outputs(self.use, pairs=False)(*self._at(at[0]), *self._at(at[1]))

        counts = self._num_positions, self._num_positions, 1
        return term((0, 0, 0)) if counts == (1, 1, 1) else over_positions(term, counts)

    def column_norms(self) -> Array:
        return column_norms_of_rows(self)

    def _at(self, position: Array | int) -> tuple[Array, PyTree[Array]]:
        """δ and a at one position."""
        return self.delta[:, :, position], jax.tree.map(lambda x: x[:, position], self.factor)


def _over_outputs(use: AbstractPairUse, *, pairs: bool) -> Callable[..., Array]:
    """The inner products of all pairs of rows (n, k, m, l), or of each with itself (n, k)."""

    def inner(delta: Array, factor: Any, other_delta: Array, other_factor: Any) -> Array:
        with _precision.full_precision():
            return use.inner(delta, factor, other_delta, other_factor)

    if not pairs:
        return jax.vmap(jax.vmap(inner, (0, None, 0, None)))
    # The last axes first: whatever depends on one row alone is computed once for it.
    for axes in (
        (None, None, 0, None),
        (None, None, 0, 0),
        (0, None, None, None),
        (0, 0, None, None),
    ):
        inner = jax.vmap(inner, axes)
    return inner
