"""Short forms of the limit of SGD: a function of the Hessian that falls along the manifold."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import equinox as eqx
from jaxtyping import Array, Float

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_number, is_traced
from manifoldflow._types import Scalar


@runtime_checkable
class LocalHessian(Protocol):
    """The Hessian ∇²L at a point of the manifold, where L is minimal, as potentials may ask for it.

    It is a protocol; `manifold.local(point)` satisfies it.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> local = mf.LevelSet(lambda x: x @ x - 1).local(jnp.array([1.0, 0.0]))
        >>> isinstance(local, mf.noise.LocalHessian)
        True
        >>> print(local.hessian_trace())
        4.0
    """

    def hessian_trace(self) -> Scalar: ...

    def log_determinant(self) -> Scalar: ...

    def hessian_eigenvalues(self) -> Float[Array, " n"]: ...


class ShortLimit(eqx.Module):
    """The drift −rate·P∇potential in place of the drift along the manifold of the diffusion.

    Args:
        potential: a number from the Hessian at a point: `noise.hessian_trace`,
            `noise.log_determinant`, or a function of `local.hessian_eigenvalues()`.
        rate: the factor, per unit of the limit clock.
        is_ode: True if the noise is normal to the manifold all along it, so that the limit is
            an ordinary differential equation. Else its tangent part keeps its own terms,
            PF dW and ½ tr II[PΣP] dt, while the mixed part vanishes.
        at_zero_loss: True if it holds only where residuals vanish, not for other minimisers.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> limit = mf.noise.ShortLimit(mf.noise.hessian_trace, jnp.array(0.25), is_ode=True)
        >>> print(limit.rate, limit.is_ode)
        0.25 True
    """

    potential: Callable[[LocalHessian], Scalar]
    rate: Scalar
    is_ode: bool = eqx.field(static=True)
    at_zero_loss: bool = eqx.field(static=True)

    @checked
    def __init__(
        self,
        potential: Callable[[LocalHessian], Scalar],
        rate: Scalar,
        *,
        is_ode: bool,
        at_zero_loss: bool = False,
    ):
        self.potential = potential
        # A traced rate has no value to look at.
        self.rate = rate if is_traced(rate) else checked_number("ShortLimit: rate", rate)
        self.is_ode = is_ode
        self.at_zero_loss = at_zero_loss


@checked
def hessian_trace(local: LocalHessian) -> Scalar:
    """The trace tr ∇²L, the potential of label noise.

    Args:
        local: the geometry of a manifold at a point, `manifold.local(point)`.

    Returns:
        A number.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.LevelSet(lambda x: x @ x - 1)  # of the loss ½(x·x − 1)²
        >>> print(mf.noise.hessian_trace(circle.local(jnp.array([1.0, 0.0]))))
        4.0
    """
    return local.hessian_trace()


@checked
def log_determinant(local: LocalHessian) -> Scalar:
    """The logarithm ln|∇²L|₊, the potential of isotropic noise.

    Args:
        local: the geometry of a manifold at a point, `manifold.local(point)`.

    Returns:
        A number, up to a constant along the manifold.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.LevelSet(lambda x: x @ x - 1)
        >>> value = mf.noise.log_determinant(circle.local(jnp.array([1.0, 0.0])))
        >>> print(f"{value:.3f}")  # ln 4
        1.386
    """
    return local.log_determinant()
