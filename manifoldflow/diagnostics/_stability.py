"""The largest stable learning rate of SGD, and its spread, by second moments about a minimum."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float

from manifoldflow import _precision, _tree, linalg
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_count, checked_positive
from manifoldflow._results import delivered, RESULTS
from manifoldflow._types import Point, Scalar
from manifoldflow.diagnostics._mean_square import (
    Batches,
    following,
    largest_eigenvalue,
    Moments,
    solve,
    tolerance,
    Top,
)
from manifoldflow.losses import AbstractExampleLoss, AbstractLoss, LeastSquares
from manifoldflow.noise import AbstractNoise, checked_noise, MinibatchNoise


@checked_but("loss")
def largest_stable_learning_rate(
    loss: AbstractLoss,
    point: Point,
    batch_size: int | None = None,
    *,
    replacement: bool = False,
    throw: bool = True,
) -> Scalar:
    """The learning rate η* above which SGD leaves an interpolating minimum, in the mean square.

    One step of SGD on batches of B of the N examples takes the second moments Q = E[uuᵀ] of the
    residuals u to

        Q − η(KQ + QK) + η²K(aQ + b·bd(Q))K,    K = AAᵀ,

    with AᵀA the Gauss-Newton matrix of the loss, bd(Q) the blocks of Q of one example each, and

        a = N(B−1)/(B(N−1)),  b = N(N−B)/(B(N−1))   without replacement,
        a = (B−1)/B,          b = N/B               with it.

    They shrink exactly for η < η*, where 1/η* is the largest eigenvalue of Q ↦ 𝓛_K⁻¹(K(aQ +
    b·bd(Q))K) with 𝓛_K(Q) = KQ + QK [MulayoffMichaeli2024]. Full batches have η* = 2/λ₁(AᵀA); all
    others less. The eigenvalue is found by Lanczos' method, in about twenty steps of two products
    of n×n matrices, n being the number of residuals; with one eigendecomposition, and K as dense
    n×n numbers.

    Above η* the typical run can still shrink for a long time: few large excursions make the mean.

    Args:
        loss: with examples: `LeastSquares` or `PerExampleLoss`. Its weight decay does not count,
            nor negative parts of its output Hessians.
        point: a model that fits all examples. Elsewhere η* is that of the Gauss-Newton part of the
            loss, without the residuals' own curvature.
        batch_size: B, from 1 to N, with replacement above N as well; None for all examples.
        replacement: True where the same example can be drawn again within a batch.
        throw: True raises where it is not found; False returns NaN then.

    Returns:
        η* > 0. Its relative error is below eps^½, mostly far below. Differentiable once in the
        model and the data; output Hessians other than those of squares count as fixed.

    Raises:
        ValueError: a loss without examples; a batch size out of range.
        EquinoxRuntimeError: outputs that do not change with the coordinates; NaN; an eigenvalue
            that was not found.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(
        ...     jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros(2), predict=jnp.dot
        ... )
        >>> stable = lambda size: mf.largest_stable_learning_rate(loss, jnp.zeros(2), size)
        >>> print(stable(None).round(4), stable(1).round(4))  # 2/λ₁, and less for batches of one
        1.0 0.5

    References:
        [MulayoffMichaeli2024].
    """
    name = "largest_stable_learning_rate"
    loss = _checked_loss(name, loss)
    if batch_size is not None:
        batch_size = checked_count(f"{name}: batch_size", batch_size)
    size = loss.num_examples if batch_size is None else batch_size
    if size > loss.num_examples and not replacement:
        raise ValueError(
            f"{name}: batch_size must be from 1 to {loss.num_examples}, the number of examples; "
            f"got {size}. Larger batches need replacement=True."
        )
    value, result = _threshold(loss, point, size, replacement)
    return delivered(value, result, throw)


def _checked_loss(name: str, loss: Any) -> AbstractExampleLoss:
    if isinstance(loss, AbstractExampleLoss):
        return loss
    raise ValueError(
        f"{name} needs a loss of examples, of which batches are drawn: LeastSquares or "
        f"PerExampleLoss; got {type(loss).__name__}."
    )


@eqx.filter_jit
def _threshold(
    loss: AbstractExampleLoss, point: Point, batch_size: int, replacement: bool
) -> tuple[Scalar, RESULTS]:
    gram = loss.gauss_newton_root(point).gram()
    return threshold_of(gram, loss.num_examples, batch_size, replacement)


@eqx.filter_jit
def threshold_of(
    gram: Float[Array, "n n"], num_examples: int, batch_size: int, replacement: bool = False
) -> tuple[Scalar, RESULTS]:
    """The largest stable learning rate from K, and the `RESULTS` of the search for it."""
    # Lanczos is not differentiated: `following` has the derivative of the eigenvalue in K.
    moments = _moments(num_examples, jax.lax.stop_gradient(gram), batch_size, replacement)
    top = largest_eigenvalue(moments)
    return _learning_rate(following(top.value, gram, moments), top)


def _moments(
    num_examples: int, gram: Float[Array, "n n"], batch_size: int, replacement: bool
) -> Moments:
    rows = len(gram) // num_examples
    return Moments.of(gram, Batches.of(num_examples, rows, batch_size, replacement))


def _learning_rate(value: Scalar, top: Top) -> tuple[Scalar, RESULTS]:
    """The learning rate 1/λ, or NaN, and the reason."""
    is_found = top.residual <= tolerance(top.value)
    result = _tree.where(is_found, RESULTS.successful, RESULTS.not_converged)
    result = _tree.where(top.value > 0, result, RESULTS.flat)
    is_finite = jnp.isfinite(top.value) & jnp.isfinite(top.residual)
    result = _tree.where(is_finite, result, RESULTS.nonfinite)
    is_fine = result == RESULTS.successful
    return 1 / jnp.where(is_fine, value, jnp.nan), result


class StationaryCovariance(eqx.Module):
    """The spread of SGD about a minimum at a fixed learning rate, once its start is forgotten.

    Attributes:
        residuals: E[uuᵀ], (n, n), for u = A(θ − θ*) with AᵀA the Gauss-Newton matrix. For
            `LeastSquares` u = √scale·r: divided by `scale` it is the covariance of the residuals.
        learning_rate: η.
        largest_stable: η*, see `largest_stable_learning_rate`.
        result: `RESULTS.successful`; `unstable`, if η ≥ η*; or the reason of a failure.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(1), jnp.zeros(1), predict=jnp.dot)
        >>> spread = mf.diagnostics.stationary_covariance(
        ...     loss, jnp.zeros(1), mf.LabelNoise(std=1.0, batch_size=1), 0.1
        ... )
        >>> print(
        ...     bool(spread.is_successful), spread.covariance.mv(jnp.ones(1)).round(4)
        ... )  # η/(2 − η)
        True [0.0526]
    """

    residuals: Float[Array, "n n"]
    learning_rate: Scalar
    largest_stable: Scalar
    result: RESULTS
    root: linalg.AbstractJacobian
    weights: Float[Array, "n n"]  # K†E[uuᵀ]K†

    @property
    def is_successful(self) -> Bool[Array, "..."]:
        """True where the covariance was found."""
        return self.result == RESULTS.successful

    @property
    def excess_loss(self) -> Scalar:
        """The excess E[L] − L(θ*) = ½tr E[uuᵀ]; for small η and Σ = c∇²L it is (ηc/4)·tr∇²L."""
        return jnp.trace(self.residuals) / 2

    @property
    def covariance(self) -> lx.AbstractLinearOperator:
        """The covariance E[(θ − θ*)(θ − θ*)ᵀ] = A†E[uuᵀ]A†ᵀ on tangents, as an operator.

        It covers the directions that change outputs; along all others SGD walks on.
        """

        def mv(vector: Any) -> Any:
            inner = _precision.matmul(self.weights, self.root.mv(vector))
            return self.root.transpose_mv(inner)

        structure = self.root.in_structure()
        return lx.FunctionLinearOperator(mv, structure, lx.positive_semidefinite_tag)


@checked_but("loss", "noise")
def stationary_covariance(
    loss: AbstractLoss,
    point: Point,
    noise: AbstractNoise,
    learning_rate: Any,
    *,
    throw: bool = True,
) -> StationaryCovariance:
    """The covariance that SGD settles to near a minimum, at a learning rate that is not small.

    SGD is θ ← θ − η(g_B + ξ) about a minimum θ*. The gradient g_B of a batch is linear in θ − θ*,
    and ξ is what the noise adds at θ* itself: noisy labels, or the spread of the examples'
    gradients where they are not fitted. E[uuᵀ] is the fixed point of

        Q = Q − η(KQ + QK) + η²K(aQ + b·bd(Q))K + η²AΣAᵀ,    u = A(θ − θ*), K = AAᵀ,

    with a and b as for `largest_stable_learning_rate` and Σ = `noise.covariance(loss, θ*)`. It is
    found by conjugate gradients in the n×n numbers of Q.

    Args:
        loss: with examples: `LeastSquares` or `PerExampleLoss`.
        point: θ*, where the loss is minimal, fitted or not; curvature is the Gauss-Newton matrix.
        noise: a noise with a covariance; its batch size is that of SGD. Noises without a batch
            size, such as `IsotropicNoise`, go with full batches.
        learning_rate: η > 0, below the largest stable one.
        throw: True raises where there is none; False returns NaN then.

    Returns:
        A `StationaryCovariance`: `residuals`, `covariance` on tangents, and `excess_loss`, the loss
        that SGD keeps above the minimum.

    Raises:
        ValueError: a loss without examples; a noise that does not fit it; η ≤ 0.
        EquinoxRuntimeError: η is not stable, or the covariance was not found.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(1), jnp.zeros(1), predict=jnp.dot)
        >>> noise = mf.LabelNoise(std=1.0, batch_size=1)
        >>> found = mf.diagnostics.stationary_covariance(loss, jnp.zeros(1), noise, 0.1)
        >>> print(found.largest_stable.round(4), found.excess_loss.round(4))
        2.0 0.0263
    """
    name = "stationary_covariance"
    loss = _checked_loss(name, loss)
    noise = checked_noise(name, noise)
    rate = checked_positive(f"{name}: learning_rate", learning_rate)
    found = _stationary(loss, point, noise, rate)
    residuals = delivered(found.residuals, found.result, throw)
    return eqx.tree_at(lambda s: s.residuals, found, residuals)


@eqx.filter_jit
def _stationary(
    loss: AbstractExampleLoss, point: Point, noise: AbstractNoise, learning_rate: Scalar
) -> StationaryCovariance:
    root = loss.gauss_newton_root(point)
    gram = root.gram()
    rate = learning_rate.astype(gram.dtype)
    # Noises without batches, as IsotropicNoise, add to gradients of the whole loss.
    size = getattr(noise, "batch_size", None) or loss.num_examples
    replacement = isinstance(noise, MinibatchNoise) and noise.replacement
    moments = _moments(loss.num_examples, gram, size, replacement)
    fixed = jax.lax.stop_gradient(moments)
    largest, result = _learning_rate(*_both(largest_eigenvalue(fixed)))
    is_stable = ~(rate >= largest)
    result = _tree.where((result == RESULTS.successful) & ~is_stable, RESULTS.unstable, result)
    is_fine = result == RESULTS.successful
    # NaN rather than a solve that cannot converge; the solve itself gets 0.
    rate = jnp.where(is_fine, rate, jnp.nan)
    # (1 − ηS)Z = C/(D√F) for Q = √F ∘ Z, with what is added in a step over what is taken away.
    # Squared in the eigenbasis, C is as small as need be where K is.
    columns = _precision.matmul(moments.vectors.T, _pushed(loss, point, noise, root, gram))
    added = _precision.matmul(columns, columns.T)
    within = moments.root > 0
    right = jnp.where(within, rate * added / (moments.sums * jnp.where(within, moments.root, 1)), 0)
    solved = solve(moments, jnp.where(is_fine, rate, 0), right)
    is_solved = jnp.all(jnp.isfinite(solved))
    result = _tree.where(is_fine & ~is_solved, RESULTS.out_of_steps, result)
    found = moments.root * (solved + solved.T) / 2
    # An inverse needs to know where the range ends.
    values = moments.values
    inside = values > len(values) * _precision.eps_of_dtype(values) * values[-1]
    inverse = jnp.where(inside, 1 / jnp.where(inside, values, 1), 0)
    weights = moments.turned_back(inverse[:, None] * found * inverse[None, :])
    return StationaryCovariance(
        moments.turned_back(found), learning_rate, largest, result, root, weights
    )


def _both(top: Top) -> tuple[Scalar, Top]:
    return top.value, top


def _pushed(
    loss: AbstractExampleLoss,
    point: Point,
    noise: AbstractNoise,
    root: linalg.AbstractJacobian,
    gram: Float[Array, "n n"],
) -> Float[Array, "n r"]:
    """The matrix AF for Σ = FFᵀ, through the residuals where the noise acts through them."""
    factor = noise.checked_factor(loss, point)
    if isinstance(factor, linalg.ResidualFactor) and isinstance(loss, LeastSquares):
        # A = √scale·J, so that AJᵀ = K/√scale.
        small = linalg.columns(factor.small)
        return _precision.matmul(gram, small) / jnp.sqrt(loss.scale.astype(gram.dtype))
    return linalg.columns(root @ factor)
