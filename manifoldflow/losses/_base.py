"""What a loss is: a number at every point, and its derivatives as operators."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._jit import jit_part
from manifoldflow._types import Coordinates, Example, Point, Scalar, Tangent
from manifoldflow.losses._reach import check_reach


class AbstractLoss(eqx.Module):
    """A loss L on points. Subclasses say what it is; derivatives are the same for all."""

    trainable: eqx.AbstractVar[_tree.Static | None]

    @abc.abstractmethod
    def __call__(self, point: Point) -> Scalar:
        """L(point)."""

    def split(self, point: Point) -> tuple[Coordinates, Point]:
        """`(coordinates, remainder)` of a point; frozen leaves are in the remainder."""
        return _tree.split(point, self.trainable)

    @checked
    @jit_part
    def gradient(self, point: Point) -> Tangent:
        """∇L(point), with the structure of the point's coordinates."""
        coordinates, remainder = self.split(point)
        return jax.grad(lambda x: self(_tree.join(x, remainder)))(coordinates)

    @checked
    def hessian(self, point: Point) -> lx.AbstractLinearOperator:
        """∇²L(point), a self-adjoint lineax operator on tangents, never a matrix."""
        coordinates, remainder = self.split(point)

        def gradient(x: Coordinates, args: Any) -> Tangent:
            del args
            return jax.grad(lambda x: self(_tree.join(x, remainder)))(x)

        return lx.JacobianLinearOperator(gradient, coordinates, tags=lx.symmetric_tag)

    @checked
    @jit_part
    def trace_hessian(self, point: Point) -> Scalar:
        """tr ∇²L(point), exactly, by one Hessian-vector product for each coordinate.

        Costs D gradients. On the zero-loss manifold of a residual loss
        `trace_gauss_newton` gives the same number for a few.
        """
        coordinates, remainder = self.split(point)
        flat, unravel = _tree.ravel(coordinates)

        def gradient(x: Array) -> Array:
            return jax.grad(lambda x: self(_tree.join(unravel(x), remainder)))(x)

        def diagonal_entry(index: Array) -> Array:
            direction = jnp.zeros_like(flat).at[index].set(1)
            return jax.jvp(gradient, (flat,), (direction,))[1][index]

        return jnp.sum(jax.lax.map(diagonal_entry, jnp.arange(flat.size), batch_size=64))


class AbstractResidualLoss(AbstractLoss):
    """A loss that is minimal exactly where n scalar residuals vanish.

    Near its zero-loss manifold L = (scale/2)·Σᵢ rᵢ² up to third order. Subclasses say
    what the residuals of one example are; the Jacobian of all of them follows.
    """

    data: eqx.AbstractVar[PyTree[Array]]
    scale: eqx.AbstractVar[Scalar]

    @abc.abstractmethod
    def example_residual(self, point: Point, example: Example) -> Float[Array, " k"]:
        """The residuals of one example, k numbers."""

    @abc.abstractmethod
    def gauss_newton_root(self, point: Point) -> linalg.AbstractJacobian:
        """A with AᵀA = the Gauss-Newton matrix of L at this point (anywhere, not only on Γ)."""

    @checked
    @jit_part
    def residual(self, point: Point) -> Float[Array, " n"]:
        """All residuals r, in the order of the examples."""
        coordinates, remainder = self.split(point)
        data = _tree.cast_floats(self.data, _tree.dtype_of(coordinates))
        check_reach(self.example_residual, coordinates, remainder, data)
        point = _tree.join(coordinates, remainder)
        return jax.vmap(lambda example: self.example_residual(point, example))(data).reshape(-1)

    @checked
    @jit_part
    def jacobian(self, point: Point, *, batch_size: int | None = None) -> linalg.AbstractJacobian:
        """J = ∂r, a lineax operator from tangents to n residuals.

        With a `batch_size`, rows are formed anew for that many examples at a time wherever it is
        used; else where all of them would take too much memory.
        """
        return _jacobian_of(self, self.example_residual, point, self.data, batch_size)

    @checked
    def gauss_newton(self, point: Point) -> lx.AbstractLinearOperator:
        """scale·JᵀJ on tangents, equal to ∇²L on the zero-loss manifold."""
        jacobian = self.jacobian(point)
        return linalg.gauss_newton(jacobian, self.scale.astype(jacobian.out_structure().dtype))

    @checked
    @jit_part
    def trace_gauss_newton(self, point: Point) -> Scalar:
        """scale·‖J‖²_F, equal to tr ∇²L on the zero-loss manifold.

        Off the manifold the full trace has the extra term scale·Σᵢ rᵢ tr∇²rᵢ:
        see `trace_hessian`.
        """
        norms = self.jacobian(point).row_norms_squared()
        return self.scale.astype(norms.dtype) * jnp.sum(norms)


class AbstractExampleLoss(AbstractLoss):
    """A mean over examples, L = (1/N) Σᵢ ℓ(f(θ, xᵢ), yᵢ) + (λ/2)‖θ‖² with a weight decay λ.

    Mini-batches estimate it, its labels can be noisy, and it has a Gauss-Newton matrix JᵀWJ,
    with J = ∂f and W the second derivative of the mean in all outputs. Whether it has residuals,
    and with them a zero-loss manifold, is another matter: `AbstractResidualLoss`.
    """

    data: eqx.AbstractVar[PyTree[Array]]
    inputs: eqx.AbstractVar[PyTree[Array]]
    targets: eqx.AbstractVar[PyTree[Array]]
    # λ, None where there is none: its gradient is no sum over examples.
    weight_decay: eqx.AbstractVar[Scalar | None]

    @abc.abstractmethod
    def example_output(self, point: Point, x: Example) -> Float[Array, "..."]:
        """f(point, x), the output for the inputs of one example."""

    @abc.abstractmethod
    def output_gradient(
        self, outputs: Float[Array, "N ..."], targets: PyTree[Array]
    ) -> Float[Array, "N ..."]:
        """∂L/∂f at these outputs, for targets like those of the loss."""

    @abc.abstractmethod
    def residual_weights(self, weights: Float[Array, "N outputs"]) -> Float[Array, " n"] | None:
        """The u with Jᵀu = ∂fᵀw for any w, or None if there is none for some w.

        J is the Jacobian of the residuals. There is none where they say less than the
        outputs do, as with a singular output Hessian, and of losses without residuals.
        """

    @abc.abstractmethod
    def gauss_newton_root(self, point: Point) -> linalg.AbstractJacobian:
        """A with AᵀA = the Gauss-Newton matrix of the mean over examples at this point."""

    @abc.abstractmethod
    def gauss_newton(self, point: Point) -> lx.AbstractLinearOperator:
        """The Gauss-Newton matrix of the mean over examples, an operator on tangents."""

    @abc.abstractmethod
    def trace_gauss_newton(self, point: Point) -> Scalar:
        """Its trace, exactly."""

    @abc.abstractmethod
    def select(self, indices: Any) -> "AbstractExampleLoss":
        """The loss on some of the examples, scaled to stay an unbiased estimate."""

    @property
    def num_examples(self) -> int:
        """N."""
        return jax.tree.leaves(self.inputs)[0].shape[0]

    def outputs(self, point: Point) -> Float[Array, "N ..."]:
        """The outputs of all examples, in the point's dtype."""
        coordinates, remainder = self.split(point)
        dtype = _tree.dtype_of(coordinates)
        point = _tree.join(coordinates, remainder)
        inputs = _tree.cast_floats(self.inputs, dtype)
        check_reach(self.example_output, coordinates, remainder, inputs)
        return jax.vmap(lambda x: self.example_output(point, x).astype(dtype))(inputs)

    def output_jacobian(
        self, point: Point, *, batch_size: int | None = None
    ) -> linalg.AbstractJacobian:
        """∂f, from tangents to all outputs in the order of the examples.

        With a `batch_size`, formed anew for that many examples at a time, as `jacobian`.
        """
        return _jacobian_of(self, self.example_output, point, self.inputs, batch_size)


def _jacobian_of(
    loss: AbstractLoss,
    fn: Callable[[Point, Example], Array],
    point: Point,
    data: PyTree[Array],
    batch_size: int | None,
) -> linalg.AbstractJacobian:
    coordinates, remainder = loss.split(point)
    of_coordinates = lambda x, example: fn(_tree.join(x, remainder), example)
    data = _tree.cast_floats(data, _tree.dtype_of(coordinates))
    check_reach(fn, coordinates, remainder, data)
    if batch_size is not None:
        return linalg.chunked_jacobian(of_coordinates, coordinates, data, batch_size)
    return linalg.jacobian(of_coordinates, coordinates, data)
