"""Mean and centred quadratic moments of per-example gradients, a chunk at a time."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from manifoldflow import _precision, _tree, linalg
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_data, is_traced
from manifoldflow._types import Coordinates, Example, Point, Scalar, Tangent
from manifoldflow.losses import AbstractExampleLoss

ExampleLoss = Callable[..., Any]
"""ℓ(point, example) → scalar."""

# Gradients are formed together up to this many numbers.
_TOGETHER = 2**19
# Up to this many numbers in all gradients, they are simpler to compile than their structure.
_SMALL = 2**16


class _OfLoss(eqx.Module):
    """One example of a loss, by its number."""

    loss: AbstractExampleLoss

    def __call__(self, point: Point, index: Int[Array, ""]) -> Scalar:
        return self.loss.select(index[None])(point)


@checked_but("loss")
def examples_of(loss: AbstractExampleLoss) -> tuple[ExampleLoss, Int[Array, " N"]]:
    """The pair (example_loss, data) of a loss over examples, for the functions of `symmetry`.

    The mean of `example_loss` over `data` is the loss without its weight decay. The decay has no
    noise, and no symmetry but rotations; functions that need it take it by name.

    Args:
        loss: a loss over examples, such as `LeastSquares`.

    Returns:
        (example_loss, data), where the data are the numbers of the examples, (N,).

    Raises:
        ValueError: the loss has no examples.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> from manifoldflow import symmetry
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=jnp.dot)
        >>> example_loss, data = symmetry.examples_of(loss)
        >>> print(data, example_loss(jnp.array([3.0, 1.0]), data[0]), loss(jnp.array([3.0, 1.0])))
        [0 1] 2.0 1.0
    """
    if not isinstance(loss, AbstractExampleLoss):
        raise ValueError(
            f"Only a loss over examples has some, as LeastSquares; got {type(loss).__name__}."
        )
    if loss.weight_decay is not None:
        # Decay is told to the drifts as γ: inside ℓ it would break the symmetry.
        loss = eqx.tree_at(lambda loss: loss.weight_decay, loss, None)
    return _OfLoss(loss), jnp.arange(loss.num_examples)


def checked_examples(data: PyTree[Any], *, throw: bool = True) -> PyTree[Array]:
    """The data as arrays; without `throw` values inside jit are not looked at."""
    if throw or not is_traced(data):
        return checked_data("data", data)
    finite = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf)), data)
    checked_data("data", finite)
    return jax.tree.map(jnp.asarray, data)


def num_examples(data: PyTree[Array]) -> int:
    return jax.tree.leaves(data)[0].shape[0]


def example_value(
    example_loss: ExampleLoss, remainder: Point
) -> Callable[[Coordinates, Example], Scalar]:
    """ℓ of coordinates and one example, in the precision of the coordinates."""

    def value(x: Coordinates, example: Example) -> Scalar:
        # Data in float64 would promote a float32 model, and its gradients.
        example = _tree.cast_floats(example, _tree.dtype_of(x))
        loss = jnp.asarray(example_loss(_tree.join(x, remainder), example))
        if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
            raise ValueError(
                "example_loss(point, example) must return one real number; got shape "
                f"{loss.shape}, {loss.dtype}."
            )
        return loss

    return value


def over_chunks(fn: Callable[[PyTree[Array]], Any], data: PyTree[Array], size: int) -> Any:
    """The values of fn for every example, stacked, in chunks of bounded memory."""
    count = num_examples(data)
    return jax.lax.map(fn, data, batch_size=min(count, max(1, _TOGETHER // max(size, 1))))


class LeafSquares(eqx.Module):
    """The function v ↦ |v|², leaf by leaf; its moments need no gradient of an example."""

    def __call__(self, vector: Tangent) -> PyTree[Array]:
        return jax.tree.map(lambda leaf: _tree.inner(leaf, leaf), vector)


def _by_gradients(
    value: Callable[[Coordinates, Example], Scalar], at: Coordinates, quadratic: Any
) -> Callable[..., tuple]:
    """The function chunk → (its mean gradient, the sum of q over the gradients less that mean)."""

    def of_chunk(examples: PyTree[Array]) -> tuple[Tangent, PyTree[Array]]:
        with _precision.full_precision():  # the model's own products as well
            gradients = jax.vmap(lambda example: jax.grad(value)(at, example))(examples)
        mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)
        centred = jax.tree.map(lambda g, m: g - m, gradients, mean)
        return mean, jax.tree.map(lambda q: jnp.sum(q, axis=0), jax.vmap(quadratic)(centred))

    return of_chunk


def _by_structure(
    value: Callable[[Coordinates, Example], Scalar], at: Coordinates
) -> Callable[..., tuple]:
    """The same for `LeafSquares`, from the factors of the gradients."""

    def of_chunk(examples: PyTree[Array]) -> tuple[Tangent, PyTree[Array]]:
        jacobian = linalg.structured_jacobian(value, at, examples)
        count, dtype = num_examples(examples), jacobian.out_structure().dtype
        mean = jacobian.transpose_mv(jnp.full(count, 1 / count, dtype))

        def centred(norms: Array, leaf: Array) -> Array:
            total = jnp.sum(norms)
            rest = total - count * _tree.inner(leaf, leaf)
            # The difference is of rounding where all gradients are the same.
            floor = 16 * _precision.eps_of_dtype(rest) * total
            return jnp.where(rest > floor, rest, 0)

        return mean, jax.tree.map(centred, jacobian.leaf_row_norms_squared(), mean)

    return of_chunk


def gradient_moments(
    example_loss: ExampleLoss,
    point: Point,
    data: PyTree[Array],
    quadratic: Callable[[Tangent], PyTree[Array]],
) -> tuple[Tangent, PyTree[Array]]:
    """The mean gradient ∇L = E g and E q(g − ∇L) for a quadratic q, without a covariance.

    Chunks of examples are joined by their means (Chan, Golub and LeVeque): sums of squares about
    the mean of each, and q of the difference of the means.

    Args:
        example_loss: ℓ.
        point: where.
        data: N examples.
        quadratic: a homogeneous quadratic function of a tangent.

    Returns:
        The mean gradient, and the mean of `quadratic` over centred gradients.
    """
    coordinates, remainder = _tree.split(point)
    value = example_value(example_loss, remainder)
    count = num_examples(data)
    is_small = count * _tree.size(coordinates) <= _SMALL
    if isinstance(quadratic, LeafSquares) and not is_small:
        of_chunk = _by_structure(value, coordinates)
        one = jax.tree.map(lambda leaf: leaf[:1], data)
        jacobian = lambda at: linalg.structured_jacobian(value, at, one).blocks
        numbers = _tree.size(jax.eval_shape(jacobian, coordinates))
        chunk = min(count, max(1, 8 * _TOGETHER // max(numbers, 1)))
    else:
        of_chunk = _by_gradients(value, coordinates, quadratic)
        chunk = min(count, max(1, _TOGETHER // _tree.size(coordinates)))

    def joined(total: tuple, part: tuple, seen: Any, new: int) -> tuple:
        gap = _tree.subtract(part[0], total[0])
        # Chan, Golub and LeVeque: E g² − (E g)² would cancel where noise is small against the
        # gradient.
        share = new / (seen + new)
        mean = _tree.add(total[0], _tree.scale(share, gap))
        between = jax.tree.map(lambda q: seen * share * q, quadratic(gap))
        return mean, _tree.add(_tree.add(total[1], part[1]), between)

    num_whole, rest = divmod(count, chunk)
    cut = num_whole * chunk
    first = of_chunk(jax.tree.map(lambda leaf: leaf[:chunk], data))
    if num_whole > 1:
        # Without the checkpoint, reverse mode would keep every gradient.
        @jax.checkpoint
        def step(carry: tuple, examples: PyTree[Array]) -> tuple[tuple, None]:
            total, seen = carry
            return (joined(total, of_chunk(examples), seen, chunk), seen + chunk), None

        stacked = jax.tree.map(
            lambda leaf: leaf[chunk:cut].reshape(num_whole - 1, chunk, *leaf.shape[1:]), data
        )
        seen = jnp.asarray(chunk, _tree.dtype_of(coordinates))
        first = jax.lax.scan(step, (first, seen), stacked)[0][0]
    if rest:
        first = joined(first, of_chunk(jax.tree.map(lambda leaf: leaf[cut:], data)), cut, rest)
    return first[0], jax.tree.map(lambda q: q / count, first[1])
