"""Any Optax transform, along a manifold."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._types import Coordinates, Flag, Tangent
from manifoldflow.manifolds import (
    AbstractNormalSpace,
    AbstractRetraction,
    NewtonRetraction,
)
from manifoldflow.optimize._base import AbstractMethod, Attempt, Iterate, Problem


class _State(eqx.Module):
    inner: PyTree[Array]
    is_vector: list[Flag]  # for every copy of the parameters in the state of the transform


class RiemannianOptax(AbstractMethod):
    """An Optax transform on Riemannian gradients, its updates retracted.

    After each step the vectors in its state, such as momentum, are projected on the tangent
    space at the new point. Vectors are the parts of the state that look like the parameters
    and change their sign with the gradients: the first moments of Adam, and not its second.
    Every step is accepted. Transforms that ask for `value` and `grad` get them.

    Args:
        optimizer: the transform with its learning rate: `optax.adam(1e-2)`. Making it anew
            compiles anew; for many rates use `optax.inject_hyperparams` or a schedule.
        retraction: the way back to the manifold; `NewtonRetraction()` by default.

    Raises:
        ValueError: the optimizer is not an Optax transform.

    References:
        [BecigneulGanea2019], for retractions and projections in place of the exponential
        map and parallel transport.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> import optax
        >>> circle, start = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> method = mf.RiemannianOptax(optax.sgd(0.5))
        >>> found = mf.minimize(circle, lambda x: x[1], start, method=method)
        >>> print(found.final.round(3) + 0.0)
        [ 0. -1.]
    """

    optimizer: optax.GradientTransformationExtraArgs
    retraction: AbstractRetraction

    @checked
    def __init__(self, optimizer: Any, retraction: AbstractRetraction | None = None):
        if not isinstance(optimizer, optax.GradientTransformation):
            raise ValueError(
                "RiemannianOptax needs an Optax transform with its learning rate, as "
                f"optax.adam(1e-2); got a {type(optimizer).__name__}."
            )
        self.optimizer = optax.with_extra_args_support(optimizer)
        self.retraction = NewtonRetraction() if retraction is None else retraction

    @property
    def patience(self) -> int:
        return 100

    def init(self, problem: Problem, iterate: Iterate) -> _State:
        here = iterate.coordinates
        inner = jax.tree.map(jnp.asarray, self.optimizer.init(here))
        return _State(inner, self._is_vector(iterate, inner))

    def step(self, problem: Problem, iterate: Iterate, state: _State) -> Attempt:
        update, inner = self._update(iterate, state.inner)
        vector = iterate.space.tangent(_tree.as_tangent(iterate.coordinates, update, "The update"))
        # Optax knows nothing of the manifold: its update may leave the tangent space.
        trial = problem.moved(self.retraction, iterate, vector)
        inner = self._transported(trial.iterate.space, inner, state.is_vector, update)
        inner = jax.tree.map(lambda new, old: new.astype(old.dtype), inner, state.inner)
        return Attempt(
            _tree.where(trial.is_fine, trial.iterate, iterate),
            _State(inner, state.is_vector),
            trial.is_fine,
            trial.result,
            trial.work,
            trial.defect,
        )

    def _update(
        self, iterate: Iterate, inner: PyTree[Array], sign: int = 1
    ) -> tuple[Tangent, PyTree[Array]]:
        gradient = _tree.scale(sign, iterate.gradient)
        extras = {"value": iterate.value, "grad": gradient}
        update, inner = self.optimizer.update(gradient, inner, iterate.coordinates, **extras)
        return update, jax.tree.map(jnp.asarray, inner)

    def _is_vector(self, iterate: Iterate, inner: PyTree[Array]) -> list[Flag]:
        """Marks of the copies of the parameters that change their sign with the gradient."""
        answers: list[list[Any]] = [[], []]
        for sign, found in zip((1, -1), answers):
            _, after = self._update(iterate, inner, sign)
            self._map_copies(lambda copy, found=found: found.append(copy) or copy, after)
        return [
            _is_opposite(up, down) & _looks_like(up, iterate.coordinates)
            for up, down in zip(*answers, strict=True)
        ]

    def _transported(
        self, space: AbstractNormalSpace, inner: PyTree[Array], is_vector: list[Flag], like: Any
    ) -> PyTree[Array]:
        flags = iter(is_vector)

        def transport(copy: Tangent) -> Tangent:
            is_vector = next(flags)
            if not _looks_like(copy, like):
                return copy  # of some leaves only, as in `optax.masked`
            return _tree.where(is_vector, space.tangent(copy), copy)

        return self._map_copies(transport, inner)

    def _map_copies(self, fn: Callable[[Any], Any], inner: PyTree[Array]) -> PyTree[Array]:
        """The state with `fn` applied to each copy of the parameters in it, as a whole."""
        return optax.tree_map_params(self.optimizer, fn, inner, is_leaf=lambda _: True)


def _is_opposite(x: PyTree[Array], y: PyTree[Array]) -> Flag:
    return _tree.norm(_tree.add(x, y)) <= 1e-3 * _tree.norm(_tree.subtract(x, y))


def _looks_like(copy: PyTree[Array], coordinates: Coordinates) -> bool:
    shapes = lambda tree: [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    is_same = jax.tree.structure(copy) == jax.tree.structure(coordinates)
    return is_same and shapes(copy) == shapes(coordinates)
