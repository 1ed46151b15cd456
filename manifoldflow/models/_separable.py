"""Linear classification of separable data, whose loss is lowest at infinity."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from manifoldflow import _precision, theory
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count, checked_floats, checked_nonnegative, is_traced
from manifoldflow._types import Key, Scalar
from manifoldflow.losses import FunctionLoss

KINDS = "logistic", "exponential"


class SeparableClassification(eqx.Module):
    """Classification of labels ±1 by the sign of ⟨w, x⟩, on points w: (d,), L = Σᵢ ℓ(yᵢ⟨w, xᵢ⟩).

    ℓ(z) = ln(1 + e^{−z}) or e^{−z}. On separable data L has no minimiser, so there is no manifold:
    gradient flow goes to infinity, in the direction of the largest margin γ̄. The smooth margin
    ℓ⁻¹(L)/|w| lies below the margin, increases once it is positive, and from w = 0 is, with
    ψ = −ℓ⁻¹(L(0)),

        γ̄ ≥ margin ≥ smooth margin ≥ γ̄ − ψ/|w|,   |w| ≥ ln(γ̄²t)/γ̄ + O(1),

    so that it approaches γ̄ like 1/ln t. ψ is ln n for the exponential loss.

    Args:
        inputs: x, (n, d).
        labels: y, (n,), each −1 or 1.
        kind: "logistic" or "exponential", the ℓ.

    Raises:
        ValueError: wrong shapes, other labels, another kind. `max_margin_direction` raises for
            data that no plane through the origin separates.

    References:
        [Soudry2018; Ma2022, section 9.4]. The sum, not the mean, makes L < 1 the threshold for
        the exponential loss; ln 2 is that of the logistic one.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> x, y = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 1.0])
        >>> model = mf.models.SeparableClassification(x, y)
        >>> print(f"{model.max_margin:.4f}", model.margin(jnp.array([3.0, 4.0])).round(3))  # 1/√2
        0.7071 0.6
    """

    inputs: Float[Array, "n d"]
    labels: Float[Array, " n"]
    kind: str = eqx.field(static=True)

    @checked
    def __init__(self, inputs: Any, labels: Any, kind: str = "logistic"):
        self.inputs = checked_floats("SeparableClassification: inputs", inputs)
        self.labels = checked_floats("SeparableClassification: labels", labels)
        self.kind = kind
        if self.inputs.ndim != 2 or self.labels.shape != self.inputs.shape[:1]:
            raise ValueError(
                f"The inputs must be (n, d) and the labels (n,); got shapes {self.inputs.shape} "
                f"and {self.labels.shape}."
            )
        if not is_traced(self.labels) and not np.all(np.abs(np.asarray(self.labels)) == 1):
            raise ValueError(f"The labels must be -1 or 1; got {np.unique(self.labels)[:5]}.")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}; got {kind!r}.")

    @property
    def loss(self) -> FunctionLoss:
        """The loss L."""
        return FunctionLoss(_Loss(self.inputs * self.labels[:, None], self.kind))

    @property
    def log_loss(self) -> FunctionLoss:
        """The loss −ℓ⁻¹(L), which is ln L for the exponential loss.

        Gradient descent on it is gradient descent on L with steps that grow as L falls, like 1/L:
        its margin lacks 1/k of γ̄ after k steps, where constant steps on L lack 1/ln k.
        """
        return FunctionLoss(_LogLoss(self))

    def initial(self) -> Float[Array, " d"]:
        """The start w = 0."""
        return jnp.zeros(self.inputs.shape[1], self.inputs.dtype)

    def random(self, key: Key, scale: Any = 1.0) -> Float[Array, " d"]:
        """Independent normal coordinates with this standard deviation."""
        return scale * jr.normal(key, self.inputs.shape[1:], self.inputs.dtype)

    def margin(self, point: Float[Array, " d"]) -> Scalar:
        """The margin minᵢ yᵢ⟨w, xᵢ⟩/|w|, at most `max_margin`; −∞ at w = 0."""
        return _per_length(jnp.min(self._products(point)), point)

    def smooth_margin(self, point: Float[Array, " d"]) -> Scalar:
        """The smooth margin ℓ⁻¹(L)/|w|, −∞ at w = 0.

        It is −ln Σexp(−yᵢ⟨w, xᵢ⟩)/|w| for the exponential loss.
        """
        return _per_length(self._inverse_loss(point), point)

    def max_margin_direction(self) -> Float[np.ndarray, " d"]:
        """The direction of gradient flow at late times, of length 1."""
        return theory.max_margin_direction(self.inputs, self.labels)

    @property
    def max_margin(self) -> float:
        """The largest margin γ̄."""
        # From the direction, not from the dual value: the margin is then exact for this direction.
        products = self._products(jnp.asarray(self.max_margin_direction()))
        return float(jnp.min(products))

    def margin_bound(self, time: Any) -> Float[np.ndarray, "..."]:
        """A lower bound of the smooth margin along gradient flow from 0, of the order γ̄ − c/ln t.

        p = ℓ⁻¹(L) grows at least like γ̄|dw| and like −γ̄²ℓ'(p) dt. The bound is −∞ at times at
        which that does not show p > 0 yet.
        """
        # Here, since scipy is slow to import.
        from scipy.special import wrightomega

        start = float(self._inverse_loss(self.initial()))
        gained = self.max_margin**2 * np.asarray(time, float)
        if self.kind == "exponential":  # p' ≥ γ̄²e^{−p} for p = ℓ⁻¹(L)
            reached = np.log(np.exp(start) + gained)
        else:  # p' ≥ γ̄²/(1 + e^p)
            # p + e^p = s has the solution p = ln ω(s), ω Wright's omega: stable for all s.
            reached = np.log(wrightomega(start + np.exp(start) + gained))
        is_separated = reached > 0
        share = start / np.where(is_separated, reached, 1)
        return np.where(is_separated, self.max_margin * (1 + share), -np.inf)

    def _products(self, point: Float[Array, " d"]) -> Float[Array, " n"]:
        return _products(self.inputs * self.labels[:, None], point)

    def _inverse_loss(self, point: Float[Array, " d"]) -> Scalar:
        """The value ℓ⁻¹(L), also where L underflows."""
        products = self._products(point)
        exponents = logsumexp(-products)
        if self.kind == "exponential":
            return -exponents
        # −ln(e^L − 1), which is −ln Σe^{−z} where the products of exponentials do not count.
        loss = jnp.sum(jax.nn.softplus(-products))
        # For small L, −ln(e^L − 1) → −ln L, which `logsumexp` has without underflow.
        is_small = exponents < -30
        safe = jnp.where(is_small, 1, loss)
        return -jnp.where(is_small, exponents, safe + jnp.log(-jnp.expm1(-safe)))


class _Loss(eqx.Module):
    signed: Float[Array, "n d"]
    kind: str = eqx.field(static=True)

    def __call__(self, point: Float[Array, " d"]) -> Scalar:
        products = _products(self.signed, point)
        if self.kind == "exponential":
            return jnp.sum(jnp.exp(-products))
        return jnp.sum(jax.nn.softplus(-products))


class _LogLoss(eqx.Module):
    model: SeparableClassification

    def __call__(self, point: Float[Array, " d"]) -> Scalar:
        return -self.model._inverse_loss(point)


def _products(signed: Float[Array, "n d"], point: Float[Array, " d"]) -> Float[Array, " n"]:
    """The products yᵢ⟨w, xᵢ⟩, in the point's dtype."""
    return _precision.matmul(signed.astype(point.dtype), point)


def _per_length(value: Scalar, point: Float[Array, " d"]) -> Scalar:
    length = jnp.linalg.norm(point)
    # The inner `where` keeps 0/0 out of the derivative: NaN times 0 is NaN.
    return jnp.where(length > 0, value / jnp.where(length > 0, length, 1), -jnp.inf)


@checked
def separable_data(
    key: Key, num_examples: int, num_features: int, *, margin: float = 0.1
) -> tuple[Float[Array, "n d"], Float[Array, " n"], Float[Array, " d"]]:
    """Normal inputs on both sides of a random plane through the origin, with a gap about it.

    Args:
        key: a key of `jax.random`.
        num_examples: n.
        num_features: d.
        margin: the least distance of an input from the plane, ≥ 0.

    Returns:
        Inputs (n, d), labels ±1 (n,) and the plane's normal (d,), of length 1: its margin is
        at least `margin`, the largest margin of the data larger.

    Examples:
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> x, y, normal = mf.models.separable_data(jr.key(0), 20, 3, margin=0.1)
        >>> print(x.shape, bool(jnp.all(y * (x @ normal) > 0.0999)))
        (20, 3) True
    """
    n, d = checked_count("num_examples", num_examples), checked_count("num_features", num_features)
    least = checked_nonnegative("margin", margin, "It is a distance.")
    of_inputs, of_plane = jr.split(key)
    inputs = jr.normal(of_inputs, (n, d), jnp.result_type(float))
    normal = jr.normal(of_plane, (d,), inputs.dtype)
    normal = normal / jnp.linalg.norm(normal)
    labels = jnp.where(inputs @ normal < 0, -1.0, 1.0)
    return inputs + least * labels[:, None] * normal, labels, normal
