"""Addition modulo p by a small network: fitted long before it is understood."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count, checked_positive
from manifoldflow._types import Key, Scalar
from manifoldflow.losses import LeastSquares
from manifoldflow.manifolds import ZeroLossManifold

Weights = dict[str, Float[Array, "..."]]


class ModularAddition(eqx.Module):
    """Addition a + b mod p from a part of all p² pairs, by a small network on one-hot digits.

    f(x) = V (W x)², squares by entry, with W (m, 2p) and V (p, m); x is one-hot in a, then in b,
    and the target one-hot in (a + b) mod p. Points are dicts {"W", "V"} without biases.

    Known facts, for p = 11, m = 96, 80 % of the pairs and starts at scale ½:

    - Gradient flow fits all training pairs and next to none of the others: test accuracy at most
      0.1, where guessing gives 1/11. From there `WeightDecayFlow`, along which the training loss
      stays zero, takes it to at least 0.99 by time 6 on the clock kηλ: grokking without a change
      of the training loss [Power2022].
    - V ← V/t², W ← tW leaves f as it is, and the norm is least where |W|² = 2|V|². Along
      `WeightDecayFlow` the difference |W|² − 2|V|² falls exactly as e^(−2t), whatever p and m.

    Args:
        modulus: p ≥ 2.
        width: m.
        train_fraction: the part of the p² pairs to train on, in (0, 1); rounded down, at least
            one pair on either side.
        seed: of the choice of pairs.

    Raises:
        ValueError: a modulus below 2, a width that is no positive integer, a fraction outside
            of (0, 1).

    References:
        A. Power et al., Grokking, arXiv:2201.02177 [Power2022]; A. Gromov, Grokking modular
        arithmetic, arXiv:2301.02679, for the network.

    Examples:
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> problem = mf.models.ModularAddition(modulus=3, width=4)
        >>> point = problem.initial(jr.key(0))
        >>> print(problem.train.shape, problem.test.shape, point["W"].shape, point["V"].shape)
        (7, 2) (2, 2) (4, 6) (3, 4)
    """

    modulus: int = eqx.field(static=True)
    width: int = eqx.field(static=True)
    train: Int[Array, "train 2"]
    test: Int[Array, "test 2"]

    @checked
    def __init__(
        self, modulus: int = 11, width: int = 96, train_fraction: Any = 0.8, *, seed: int = 0
    ):
        self.modulus = checked_count("ModularAddition: modulus", modulus)
        self.width = checked_count("ModularAddition: width", width)
        fraction = float(checked_positive("ModularAddition: train_fraction", train_fraction))
        if self.modulus < 2:
            raise ValueError(f"ModularAddition: modulus must be at least 2; got {modulus}.")
        if not fraction < 1:
            raise ValueError(
                f"ModularAddition: train_fraction must be below 1; got {train_fraction}. Some "
                "pairs are left out for the test."
            )
        if seed < 0:
            raise ValueError(f"ModularAddition: seed must not be negative; got {seed}.")
        # NumPy's generator: the split must not depend on JAX's version or device.
        order = np.random.default_rng(seed).permutation(modulus**2)
        # At least one pair on either side: an accuracy over no pairs is NaN.
        count = min(max(1, int(fraction * modulus**2)), modulus**2 - 1)
        pairs = np.stack([order % modulus, order // modulus], axis=1)
        self.train, self.test = jnp.asarray(pairs[:count]), jnp.asarray(pairs[count:])

    @property
    def loss(self) -> LeastSquares:
        """Half the mean square over the training pairs and the p outputs of each."""
        sums = jnp.sum(self.train, axis=1) % self.modulus
        return LeastSquares(self._encoded(self.train), self._one_hot(sums), predict=_network)

    @property
    def manifold(self) -> ZeroLossManifold:
        """The networks that fit all training pairs."""
        return ZeroLossManifold(self.loss)

    @checked
    def initial(self, key: Key, scale: Any = 0.5) -> Weights:
        """Independent normal weights of standard deviation scale/√2 in W and scale/√m in V."""
        scale = checked_positive("initial: scale", scale)
        first, second = jr.split(key)
        p, m = self.modulus, self.width
        return {
            "W": scale * jr.normal(first, (m, 2 * p)) / np.sqrt(2),
            "V": scale * jr.normal(second, (p, m)) / np.sqrt(m),
        }

    def train_accuracy(self, point: Weights) -> Scalar:
        """The part of the training pairs whose largest output is at their sum."""
        return self._accuracy(point, self.train)

    def test_accuracy(self, point: Weights) -> Scalar:
        """The part of the other pairs whose largest output is at their sum."""
        return self._accuracy(point, self.test)

    def _accuracy(self, point: Weights, pairs: Int[Array, "n 2"]) -> Scalar:
        outputs = jax.vmap(lambda x: _network(point, x))(self._encoded(pairs))
        sums = jnp.sum(pairs, axis=1) % self.modulus
        return jnp.mean(jnp.argmax(outputs, axis=1) == sums, dtype=outputs.dtype)

    def _encoded(self, pairs: Int[Array, "n 2"]) -> Float[Array, "n _"]:
        return self._one_hot(pairs).reshape(len(pairs), 2 * self.modulus)

    def _one_hot(self, digits: Int[Array, "..."]) -> Float[Array, "... p"]:
        return jax.nn.one_hot(digits, self.modulus, dtype=jnp.result_type(float))


def _network(point: Weights, x: Float[Array, " _"]) -> Float[Array, " p"]:
    return point["V"] @ (point["W"] @ x.astype(point["W"].dtype)) ** 2
