"""Products without TF32 or bfloat16 inside, and the rounding of a dtype.

On GPUs and TPUs the products of single precision are cut by default to 10 or 7 bits, which a Gram
matrix of condition 10⁴ does not survive.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

_HIGHEST = jax.lax.Precision.HIGHEST


def matmul(left: Any, right: Any) -> Array:
    return jnp.matmul(left, right, precision=_HIGHEST)


def vdot(left: Any, right: Any) -> Array:
    return jnp.vdot(left, right, precision=_HIGHEST)


def tensordot(left: Any, right: Any, axes: Any) -> Array:
    return jnp.tensordot(left, right, axes=axes, precision=_HIGHEST)


def einsum(spec: str, *operands: Any) -> Array:
    return jnp.einsum(spec, *operands, precision=_HIGHEST)


def full_precision() -> contextlib.AbstractContextManager:
    """A context of full precision for products that are not ours: those of a user's model."""
    return jax.default_matmul_precision("highest")


def asked_for() -> str:
    """The precision of products that nobody here has set: as JAX is told, or its default."""
    setting = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return setting or "default"


def eps_of_dtype(of: Any) -> float:
    """The distance from 1 to the next number in a dtype, or in that of an array."""
    return float(jnp.finfo(getattr(of, "dtype", of)).eps)


def is_double(of: Any) -> bool:
    """True for a dtype, or that of an array, of more than single precision."""
    return eps_of_dtype(of) < 1e-10
