"""Base classes of flows: coefficients at a point, and the manifold that the flow stays on."""

import abc
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import lineax as lx
from jaxtyping import Array, Int

from manifoldflow import _tree, linalg
from manifoldflow._jit import jit_part
from manifoldflow._run import AbstractVectorField, Form
from manifoldflow._types import Coordinates, Point, Tangent
from manifoldflow.manifolds import AbstractManifold


class AbstractFlow(eqx.Module):
    """An autonomous differential equation on points.

    A subclass defines `drift`, `split` and `manifold`, the manifold that the flow stays on, or None
    for a flow of the whole space. `solve` follows it.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> class Rotation(mf.AbstractFlow):
        ...     manifold: None = None
        ...
        ...     def split(self, point):
        ...         return mf.split(point)
        ...
        ...     def drift(self, point):
        ...         return jnp.stack([-point[1], point[0]])
        >>> turned = mf.solve(Rotation(), jnp.array([1.0, 0.0]), end_time=jnp.pi / 6).final
        >>> print(turned.round(3))
        [0.866 0.5  ]
    """

    manifold: eqx.AbstractVar[AbstractManifold | None]

    @abc.abstractmethod
    def split(self, point: Point) -> tuple[Coordinates, Point]:
        """The coordinates, which are Diffrax's state, and the remainder of a point."""

    @abc.abstractmethod
    def drift(self, point: Point) -> Tangent:
        """The deterministic part of the velocity at a point (in the sense of Itô)."""

    def terms(
        self, point: Point, path: dfx.AbstractPath | None = None, *, form: Form = "ito"
    ) -> dfx.AbstractTerm:
        """Terms for `diffrax.diffeqsolve`, whose state is the coordinates of a point.

        Args:
            point: any point of the kind to be moved; its non-coordinates are kept.
            path: for stochastic flows, a Brownian path of the structure
                `flow.diffusion(point).in_structure()`.
            form: the sense of the stochastic integral that the solver approximates:
                "ito" for a `diffrax.AbstractItoSolver`, "stratonovich" for a
                `diffrax.AbstractStratonovichSolver`. `Projected` refuses a wrong pair.

        Raises:
            ValueError: a path is missing, or there is nothing that it could drive.
        """
        remainder = self.split(point)[1]
        if not is_stochastic(self):
            if path is not None:
                raise ValueError(f"{type(self).__name__} is deterministic; it takes no path.")
            return dfx.ODETerm(Drift(flow=self, remainder=remainder, form=None))
        if path is None:
            raise ValueError(
                f"{type(self).__name__} is stochastic: its terms need a Brownian path, as "
                "diffrax.VirtualBrownianTree(0, end_time, tol, "
                "flow.diffusion(point).in_structure(), key)."
            )
        noise = dfx.ControlTerm(_Diffusion(self, remainder), path)
        return dfx.MultiTerm(dfx.ODETerm(Drift(flow=self, remainder=remainder, form=form)), noise)


class AbstractDiffusion(AbstractFlow):
    """A flow with noise, dY = drift dt + diffusion dW in the sense of Itô.

    `is_stochastic` may be False for flows whose noise never moves a point; such a flow is an
    ordinary differential equation. `solve` needs a `key` for all others.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> flow = mf.BrownianMotion(mf.LevelSet(lambda x: x @ x - 1))
        >>> isinstance(flow, mf.flows.AbstractDiffusion), flow.is_stochastic
        (True, True)
        >>> print(flow.diffusion(jnp.array([1.0, 0.0])).as_matrix().round(3))
        [[0. 0.]
         [0. 1.]]
    """

    is_stochastic: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def diffusion(self, point: Point) -> lx.AbstractLinearOperator:
        """The operator σ, from the space of the noise to tangents."""

    @jit_part
    def stratonovich_drift(self, point: Point) -> Tangent:
        """The drift in the sense of Stratonovich, drift − ½ Σᵣ Dσᵣ[σᵣ] over the columns of σ.

        It takes one derivative of the diffusion per dimension of the noise.
        """
        coordinates, remainder = self.split(point)
        noise = self.diffusion(point).in_structure()

        def term(index: Int[Array, ""]) -> Tangent:
            def column(x: Coordinates) -> Tangent:
                return linalg.column(self.diffusion(_tree.join(x, remainder)), index)

            return jax.jvp(column, (coordinates,), (column(coordinates),))[1]

        # Some 2¹⁶ numbers at a time: all columns at once would be D×r.
        chunk_size = max(1, 2**16 // _tree.size(coordinates))
        correction = linalg.sum_terms(term, _tree.size(noise), chunk_size)
        return _tree.subtract(self.drift(point), _tree.scale(0.5, correction))


def is_stochastic(flow: AbstractFlow) -> bool:
    """True for flows whose solve takes a key."""
    return isinstance(flow, AbstractDiffusion) and flow.is_stochastic


class Drift(AbstractVectorField):
    """The drift as Diffrax calls it: a module, so that new data do not recompile."""

    flow: AbstractFlow
    remainder: Point
    form: Form | None = eqx.field(static=True)

    # Diffrax traces a step three times: jitted, all but the first find it done.
    @jit_part
    def __call__(self, t: Any, y: Coordinates, args: object) -> Tangent:
        del t, args
        point = _tree.join(y, self.remainder)
        if self.form == "stratonovich":
            assert isinstance(self.flow, AbstractDiffusion)
            return self.flow.stratonovich_drift(point)
        return self.flow.drift(point)


class _Diffusion(eqx.Module):
    flow: AbstractFlow
    remainder: Point

    def __call__(self, t: Any, y: Coordinates, args: object) -> lx.AbstractLinearOperator:
        del t, args
        assert isinstance(self.flow, AbstractDiffusion)
        return self.flow.diffusion(_tree.join(y, self.remainder))
