"""Base classes of losses: the value at a point, and its derivatives as operators."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from manifoldflow import _mesh, _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._jit import jit_part
from manifoldflow._types import Coordinates, Example, Point, Scalar, Tangent
from manifoldflow.losses._reach import check_reach


class AbstractLoss(eqx.Module):
    """A loss L on points. A subclass gives the value; all derivatives follow from it.

    A subclass has a field `trainable` (None lets every weight move) and defines `__call__`. It
    inherits the gradient, the Hessian as an operator and its trace.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> class Quartic(mf.AbstractLoss):
        ...     trainable: None = None
        ...
        ...     def __call__(self, point):
        ...         return jnp.sum(point**4)
        >>> print(Quartic().gradient(jnp.array([1.0, 2.0])))
        [ 4. 32.]
    """

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
        """The gradient ∇L at a point, with the structure of the point's coordinates."""
        coordinates, remainder = self.split(point)
        return jax.grad(lambda x: self(_tree.join(x, remainder)))(coordinates)

    @checked
    def hessian(self, point: Point) -> lx.AbstractLinearOperator:
        """The Hessian ∇²L at a point, a self-adjoint operator on tangents and never a matrix."""
        coordinates, remainder = self.split(point)

        def gradient(x: Coordinates, args: Any) -> Tangent:
            del args
            return jax.grad(lambda x: self(_tree.join(x, remainder)))(x)

        return lx.JacobianLinearOperator(gradient, coordinates, tags=lx.symmetric_tag)

    @checked
    @jit_part
    def trace_hessian(self, point: Point) -> Scalar:
        """The trace tr∇²L at a point, exact, by one Hessian-vector product per coordinate.

        It costs D gradients for D coordinates. On the zero-loss manifold of a residual loss
        `trace_gauss_newton` gives the same number for the cost of a few gradients.
        """
        coordinates, remainder = self.split(point)
        flat, unravel = _tree.ravel(coordinates)

        def gradient(x: Array) -> Array:
            return jax.grad(lambda x: self(_tree.join(unravel(x), remainder)))(x)

        def diagonal_entry(index: Array) -> Array:
            direction = jnp.zeros_like(flat).at[index].set(1)
            return jax.jvp(gradient, (flat,), (direction,))[1][index]

        # All D products at once would hold D×D numbers; one at a time would leave the device idle.
        return jnp.sum(jax.lax.map(diagonal_entry, jnp.arange(flat.size), batch_size=64))


class AbstractResidualLoss(AbstractLoss):
    """A loss that is minimal exactly where its n scalar residuals vanish.

    Near its zero-loss manifold L = (scale/2)·Σᵢ rᵢ², up to terms of third order. A subclass
    defines the residuals of one example; the Jacobian of all residuals follows from them.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> x, y = jnp.array([[1.0, 2.0]]), jnp.array([3.0])
        >>> loss = mf.LeastSquares(x, y, predict=lambda w, x: w @ x)
        >>> isinstance(loss, mf.AbstractResidualLoss)
        True
        >>> print(loss.residual(jnp.ones(2)), loss.jacobian(jnp.ones(2)).as_matrix())
        [0.] [[1. 2.]]
    """

    data: eqx.AbstractVar[PyTree[Array]]
    scale: eqx.AbstractVar[Scalar]

    @abc.abstractmethod
    def example_residual(self, point: Point, example: Example) -> Float[Array, " k"]:
        """The k residuals of one example."""

    @abc.abstractmethod
    def gauss_newton_root(self, point: Point) -> linalg.AbstractJacobian:
        """An A with AᵀA = the Gauss-Newton matrix of L at this point, on the manifold or off it."""

    @checked
    @jit_part
    def residual(self, point: Point) -> Float[Array, " n"]:
        """All residuals r, in the order of the examples."""
        coordinates, remainder = self.split(point)
        # Data in float64 would promote a float32 point, and all that follows from it.
        data = _tree.cast_floats(self.data, _tree.dtype_of(coordinates))
        check_reach(self.example_residual, coordinates, remainder, data)
        point = _tree.join(_mesh.at_work(coordinates), remainder)
        return jax.vmap(lambda example: self.example_residual(point, example))(data).reshape(-1)

    @checked
    @jit_part
    def jacobian(self, point: Point, *, batch_size: int | None = None) -> linalg.AbstractJacobian:
        """The Jacobian J = ∂r, a lineax operator from tangents to the n residuals.

        With a `batch_size`, rows are formed anew for that many examples at a time wherever it is
        used; else where all of them would take too much memory.
        """
        return _jacobian_of(self, self.example_residual, point, self.data, batch_size)

    @checked
    def gauss_newton(self, point: Point) -> lx.AbstractLinearOperator:
        """The matrix scale·JᵀJ as an operator on tangents. On the zero-loss manifold it is ∇²L."""
        jacobian = self.jacobian(point)
        return linalg.gauss_newton(jacobian, self.scale.astype(jacobian.out_structure().dtype))

    @checked
    @jit_part
    def trace_gauss_newton(self, point: Point) -> Scalar:
        """The number scale·‖J‖²_F. On the zero-loss manifold it is tr∇²L.

        Off the manifold the trace of the Hessian has the extra term scale·Σᵢ rᵢ tr∇²rᵢ:
        see `trace_hessian`.
        """
        norms = self.jacobian(point).row_norms_squared()
        return self.scale.astype(norms.dtype) * jnp.sum(norms)


class AbstractExampleLoss(AbstractLoss):
    """A mean over N examples, L = (1/N) Σᵢ ℓ(f(θ, xᵢ), yᵢ) + (λ/2)‖θ‖², with a weight decay λ.

    Mini-batches estimate it, and its labels can be noisy. It has a Gauss-Newton matrix JᵀWJ, with
    J = ∂f and W the second derivative of the mean in all outputs. A loss that has residuals too,
    and so a zero-loss manifold, is also an `AbstractResidualLoss`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=jnp.dot)
        >>> isinstance(loss, mf.losses.AbstractExampleLoss), loss.num_examples
        (True, 2)
        >>> print(loss.outputs(jnp.array([3.0, 4.0])))
        [3. 4.]
    """

    data: eqx.AbstractVar[PyTree[Array]]
    inputs: eqx.AbstractVar[PyTree[Array]]
    targets: eqx.AbstractVar[PyTree[Array]]
    # λ, None where there is none: its gradient is no sum over examples.
    weight_decay: eqx.AbstractVar[Scalar | None]

    @abc.abstractmethod
    def example_output(self, point: Point, x: Example) -> Float[Array, "..."]:
        """The output f(point, x) for the inputs x of one example."""

    @abc.abstractmethod
    def output_gradient(
        self, outputs: Float[Array, "N ..."], targets: PyTree[Array]
    ) -> Float[Array, "N ..."]:
        """The derivative ∂L/∂f at these outputs, for targets like those of the loss."""

    @abc.abstractmethod
    def residual_weights(self, weights: Float[Array, "N outputs"]) -> Float[Array, " n"] | None:
        """The u with Jᵀu = ∂fᵀw for any w, or None where some w have no such u.

        J is the Jacobian of the residuals. None is the answer where the residuals say less than the
        outputs do (a singular output Hessian), and for losses without residuals.
        """

    @abc.abstractmethod
    def gauss_newton_root(self, point: Point) -> linalg.AbstractJacobian:
        """An A with AᵀA = the Gauss-Newton matrix of the mean over examples at this point."""

    @abc.abstractmethod
    def gauss_newton(self, point: Point) -> lx.AbstractLinearOperator:
        """The Gauss-Newton matrix of the mean over examples, an operator on tangents."""

    @abc.abstractmethod
    def trace_gauss_newton(self, point: Point) -> Scalar:
        """The exact trace of the Gauss-Newton matrix."""

    @abc.abstractmethod
    def select(self, indices: Any) -> "AbstractExampleLoss":
        """The loss on some of the examples, scaled to stay an unbiased estimate."""

    @property
    def num_examples(self) -> int:
        """The number N of examples."""
        return jax.tree.leaves(self.inputs)[0].shape[0]

    def outputs(self, point: Point) -> Float[Array, "N ..."]:
        """The outputs of all examples, in the point's dtype."""
        coordinates, remainder = self.split(point)
        dtype = _tree.dtype_of(coordinates)
        point = _tree.join(_mesh.at_work(coordinates), remainder)
        inputs = _tree.cast_floats(self.inputs, dtype)
        check_reach(self.example_output, coordinates, remainder, inputs)
        return jax.vmap(lambda x: self.example_output(point, x).astype(dtype))(inputs)

    def output_jacobian(
        self, point: Point, *, batch_size: int | None = None
    ) -> linalg.AbstractJacobian:
        """The Jacobian ∂f, from tangents to all outputs in the order of the examples.

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
