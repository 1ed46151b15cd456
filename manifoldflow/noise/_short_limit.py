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
    """What a potential can ask of a point of the manifold: ∇²L as it is where L is minimal."""

    def hessian_trace(self) -> Scalar: ...

    def log_determinant(self) -> Scalar: ...

    def hessian_eigenvalues(self) -> Float[Array, " n"]: ...


class ShortLimit(eqx.Module):
    """−rate·P∇potential in place of the drift along the manifold of the limiting diffusion.

    Args:
        potential: a number from what is known of ∇²L at a point: `noise.hessian_trace`,
            `noise.log_determinant`, or a function of `local.hessian_eigenvalues()`.
        rate: the factor, per unit of the limit clock.
        is_ode: whether the noise is normal to the manifold all along it, so that the limit is
            an ordinary differential equation. Else its tangent part keeps its own terms,
            PF dW and ½ tr II[PΣP] dt, while the mixed part vanishes.
        at_zero_loss: whether it holds only where residuals vanish, not for other minimisers.
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
        self.rate = rate if is_traced(rate) else checked_number("ShortLimit: rate", rate)
        self.is_ode = is_ode
        self.at_zero_loss = at_zero_loss


@checked
def hessian_trace(local: LocalHessian) -> Scalar:
    """tr ∇²L, the potential of label noise.

    Args:
        local: the geometry of a manifold at a point, `manifold.local(point)`.
    """
    return local.hessian_trace()


@checked
def log_determinant(local: LocalHessian) -> Scalar:
    """ln|∇²L|₊, the potential of isotropic noise.

    Args:
        local: the geometry of a manifold at a point, `manifold.local(point)`.
    """
    return local.log_determinant()
