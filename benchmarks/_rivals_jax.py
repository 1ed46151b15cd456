"""Other JAX ways to tr∇²L, its gradient and the drift; not a benchmark itself.

Every way is a function of a model, written as a user of that library would write it, that
returns the value, the gradient as a PyTree, or the drift as a PyTree. Random ones take a
key as well.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree

import _plain
import manifoldflow as mf

NUM_PROBES = 30

VALUE, GRADIENT, DRIFT = "tr∇²L", "∇tr∇²L", "drift"
QUESTIONS = (VALUE, GRADIENT, DRIFT)


class Way(NamedTuple):
    """One way to one of the numbers. `package` is what must be installed for it."""

    question: str
    name: str
    package: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    is_random: bool = False


class Problem(NamedTuple):
    """A network at a point where its loss vanishes, so that all ways have the same limit."""

    loss: mf.LeastSquares
    flow: mf.LimitDiffusion
    model: eqx.nn.MLP

    @property
    def scale(self) -> float:
        return 1 / self.loss.num_residuals

    @property
    def factor(self) -> float:
        """The drift is this times P∇tr∇²L."""
        return float(-self.flow.noise.strength(self.loss) / 4)


def ours(problem: Problem) -> list[Way]:
    loss, flow, model = problem
    gradient = lambda l, m: eqx.filter_grad(l.trace_gauss_newton)(m)
    way = lambda question, *call: Way(question, "manifoldflow", "manifoldflow", call[0], call[1:])
    return [
        way(VALUE, lambda l, m: l.trace_gauss_newton(m), loss, model),
        way(GRADIENT, gradient, loss, model),
        way(DRIFT, lambda f, m: f.drift(m), flow, model),
    ]


def plain(problem: Problem, chunk: int) -> list[Way]:
    model, inputs, scale = problem.model, problem.loss.inputs, problem.scale
    to_drift = scale * problem.factor
    norms = lambda m, xs: scale * _plain.squared_norm(_plain.rows(m, xs))
    way = lambda question, name, function: Way(question, name, "jax", function, (model, inputs))
    chunked = lambda m, xs: _plain.trace_gradient_in_chunks(m, xs, scale, chunk)
    without_rows = lambda m, xs: _plain.drift_without_rows(m, xs, to_drift, chunk, 1e-5)
    return [
        way(VALUE, "vmap(grad)", norms),
        way(GRADIENT, "reverse over vmap(grad)", lambda m, xs: _plain.trace_gradient(m, xs, scale)),
        way(GRADIENT, f"scan of chunks of {chunk}", chunked),
        way(DRIFT, "vmap(grad), Cholesky of JJᵀ", lambda m, xs: _plain.drift(m, xs, to_drift)),
        way(DRIFT, f"scan of chunks of {chunk}, CG to 1e-5", without_rows),
    ]


def flat_loss(loss: mf.LeastSquares, model: eqx.nn.MLP) -> tuple[Callable[..., Any], Any, Any]:
    """The loss of one long vector, as the libraries below want it, and the way back."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    vector, unravel = ravel_pytree(params)
    return lambda v: loss(eqx.combine(unravel(v), static)), vector, unravel


def hessian_vector(fn: Callable[..., Any], at: jax.Array) -> Callable[[jax.Array], jax.Array]:
    return lambda v: jax.jvp(jax.grad(fn), (at,), (v,))[1]


def trace_of_hessian(loss: mf.LeastSquares, model: eqx.nn.MLP) -> jax.Array:
    fn, vector, _ = flat_loss(loss, model)
    return jnp.trace(jax.hessian(fn)(vector))


def by_traceax(plus_plus: bool) -> Callable[..., jax.Array]:
    import traceax

    # Its default probes are integers, which a float32 operator refuses.
    sampler = traceax.RademacherSampler(jnp.float32)
    kind = traceax.HutchPlusPlusEstimator if plus_plus else traceax.HutchinsonEstimator

    def trace(loss: mf.LeastSquares, model: eqx.nn.MLP, key: jax.Array) -> jax.Array:
        fn, vector, _ = flat_loss(loss, model)
        structure = jax.ShapeDtypeStruct(vector.shape, vector.dtype)
        hessian = lx.FunctionLinearOperator(hessian_vector(fn, vector), structure, lx.symmetric_tag)
        return kind(sampler)(key, hessian, NUM_PROBES)[0]

    return trace


def by_matfree(leave_one_out: bool) -> Callable[..., jax.Array]:
    from matfree import stochtrace

    def trace(loss: mf.LeastSquares, model: eqx.nn.MLP, key: jax.Array) -> jax.Array:
        fn, vector, _ = flat_loss(loss, model)
        product = hessian_vector(fn, vector)
        if leave_one_out:  # two products for each probe
            sampler = stochtrace.sampler_signs(vector, num=NUM_PROBES // 2)
            integrand = stochtrace.leave_one_out_xtrace()
            return stochtrace.estimator_leave_one_out(integrand, sampler)(product, key)
        sampler = stochtrace.sampler_signs(vector, num=NUM_PROBES)
        integrand = stochtrace.monte_carlo_trace()
        return stochtrace.estimator_monte_carlo(integrand, sampler)(product, key)

    return trace


def differentiated(trace: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda loss, model, *key: eqx.filter_grad(lambda m: trace(loss, m, *key))(model)


def projected(trace: Callable[..., jax.Array], factor: float) -> Callable[..., Any]:
    """A drift from any trace: its gradient, projected by explicit rows."""

    def drift(loss: mf.LeastSquares, model: eqx.nn.MLP, *key: jax.Array) -> Any:
        gradient = differentiated(trace)(loss, model, *key)
        tangent = _plain.projection(_plain.rows(model, loss.inputs), gradient)
        return jax.tree.map(lambda leaf: factor * leaf, tangent)

    return drift


def by_trace(
    problem: Problem, name: str, package: str, trace: Callable[..., Any], is_random: bool
) -> list[Way]:
    """The value, its gradient by reverse mode, and the drift from it."""
    arguments = (problem.loss, problem.model)
    return [
        Way(VALUE, name, package, trace, arguments, is_random),
        Way(GRADIENT, f"reverse over {name}", package, differentiated(trace), arguments, is_random),
        Way(
            DRIFT,
            f"reverse over {name}, Cholesky of JJᵀ",
            package,
            projected(trace, problem.factor),
            arguments,
            is_random,
        ),
    ]


def estimators(problem: Problem) -> list[Way]:
    """All that goes by products with the Hessian, or by the Hessian itself."""
    ways = by_trace(problem, "jnp.trace(jax.hessian)", "jax", trace_of_hessian, False)
    for name, package, trace in (
        (f"Hutchinson, {NUM_PROBES} probes", "traceax", lambda: by_traceax(False)),
        (f"Hutch++, {NUM_PROBES} products", "traceax", lambda: by_traceax(True)),
        (f"Hutchinson, {NUM_PROBES} probes", "matfree", lambda: by_matfree(False)),
        (f"XTrace, {NUM_PROBES} products", "matfree", lambda: by_matfree(True)),
    ):
        ways += by_trace(problem, name, package, _late(trace), True)
    return ways


def _late(make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """Import the library when the function is traced, not before."""
    return lambda *arguments: make()(*arguments)
