"""The response of an update to a noisy label when it keeps only the sign of the error."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from manifoldflow.updates._setting import Setting

NEEDS = (
    "LabelNoise(std, batch_size=1), its labels being normal, on LeastSquares with one output for "
    "each example"
)


def sign_response(
    lengths: Float[Array, " n"], setting: Setting
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """The means E sign'(r + ε) = √(2/π)/δ at r = 0, infinite without noise, and E sign² = 1."""
    assert setting.label_std is not None
    # E sign(r + ε) = erf(r/(√2 δ)), whose slope at 0 is √(2/π)/δ.
    gain = jnp.sqrt(2 / jnp.pi) / setting.label_std
    return jnp.full_like(lengths, gain), jnp.ones_like(lengths)
