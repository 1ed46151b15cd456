"""How many gradients does the flattest fit take, by a trust region, by descent, by the flow?

Two-layer networks Σⱼ φ(θⱼᵀx) with φ(z) = z³ + z that fit their data exactly; the flattest of
them is known [Gatmiry2024, Theorem 2]: all neurons do the same. From random fits down to a
gradient of 10⁻¹⁰. An equivalent gradient is a gradient of F, or half of a product with its
covariant Hessian. The flow is followed by Tsit5 at two relative tolerances, and by Euler's
method at the best of some fixed steps, which nobody knows beforehand. Where it does not
arrive, its gradients are those up to the end of its time, and its ratio a lower bound.
"""

from collections.abc import Callable
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import _harness
import manifoldflow as mf
from manifoldflow.optimize import minimize, RiemannianGradientDescent, RiemannianTrustRegion

TOLERANCE = 1e-10
BOUND = 10


def phi(z: jax.Array) -> jax.Array:
    return z**3 + z


class Flatness(eqx.Module):
    """F = Σᵢⱼ φ'(θⱼᵀxᵢ)², half the trace of the Hessian on unit inputs."""

    inputs: jax.Array

    def __call__(self, theta: jax.Array) -> jax.Array:
        return jnp.sum((3 * (theta @ self.inputs.T) ** 2 + 1) ** 2)


def problem(num_examples: int, num_inputs: int, width: int, size: float, seed: int) -> tuple:
    """Manifold, F, a start on the manifold, and the activations at the theorem's point."""
    keys = jr.split(jr.key(seed), 3)
    inputs = jr.normal(keys[0], (num_examples, num_inputs))
    inputs = inputs / jnp.linalg.norm(inputs, axis=1, keepdims=True)
    targets = size * jr.normal(keys[1], (num_examples,))
    predict = lambda theta, x: jnp.sum(phi(theta @ x))
    manifold = mf.ZeroLossManifold(mf.LeastSquares(inputs, targets, predict=predict, scale=2.0))
    start = manifold.project(jr.normal(keys[2], (width, num_inputs)))
    roots = [np.roots([1, 0, 1, -float(y) / width]) for y in targets]
    flattest = [float(r[np.argmin(np.abs(r.imag))].real) for r in roots]
    return manifold, Flatness(inputs), start, jnp.asarray(flattest)


def by_method(method: Any) -> Callable:
    def run(manifold: Any, fn: Any, start: jax.Array) -> mf.Solution:
        return minimize(
            manifold, fn, start, method=method, gradient_tolerance=TOLERANCE, throw=False
        )

    return run


def by_flow(end_time: float, **options: Any) -> Callable:
    def run(manifold: Any, fn: Any, start: jax.Array) -> mf.Solution:
        flow = mf.RiemannianGradientFlow(manifold, fn)
        return mf.solve(
            flow, start, end_time=end_time, until=mf.Stationary(TOLERANCE), max_steps=200_000,
            throw=False, **options,
        )  # fmt: skip

    return run


def measure(smoke: bool, repeats: int) -> list[dict]:
    longest = 20.0 if smoke else 400.0
    methods = {
        "trust region": by_method(RiemannianTrustRegion()),
        "gradient descent": by_method(RiemannianGradientDescent()),
        "flow, rtol 1e-3": by_flow(longest, rtol=1e-3),
        "flow, rtol 1e-12": by_flow(longest, rtol=1e-12, atol=1e-14),
    }
    if smoke:
        del methods["flow, rtol 1e-12"]
    sizes = [(2, 4, 4, 1.0)] if smoke else [(2, 4, 4, 1.0), (3, 5, 6, 3.0), (20, 30, 40, 3.0)]
    steps = (0.02,) if smoke else (0.002, 0.005, 0.01, 0.02, 0.05)
    rows = []
    for size in sizes:
        *arguments, flattest = problem(*size, seed=0)
        what = f"{size[0]} examples, {size[2]}×{size[1]}"
        best = None
        for step in steps:
            run = by_flow(longest, solver=dfx.Euler(), step_size=step)
            row = row_of(what, f"flow, Euler {step}", run, arguments, flattest, repeats)
            is_better = row["arrives"] and (best is None or row["gradients"] < best["gradients"])
            best = row if is_better else best
        here = [row_of(what, *each, arguments, flattest, repeats) for each in methods.items()]
        here += [best] if best is not None else []
        for row in here:
            row["ratio"] = row["equivalent"] / here[0]["equivalent"]
        rows += here
        print(_harness.table(here), flush=True)
    return rows


def row_of(
    what: str, name: str, run: Callable, arguments: list, flattest: jax.Array, repeats: int
) -> dict:
    compiled = _harness.Compiled(run, *arguments)
    manifold, fn, _ = arguments
    solution = compiled._call(*arguments)
    end = solution.point(-1)
    distance = float(jnp.max(jnp.abs(end @ fn.inputs.T - flattest)))
    gradient = float(jnp.linalg.norm(mf.riemannian_gradient(manifold, fn, end)))
    gradients = int(solution.stats["num_gradients"])
    products = int(solution.stats.get("num_hessian_products", 0))
    return {
        "problem": what,
        "method": name,
        "gradients": gradients,
        "Hessian products": products,
        "equivalent": gradients + 2 * products,
        "seconds": compiled.seconds(repeats),
        "gradient norm": gradient,
        "distance": distance,
        "arrives": gradient <= TOLERANCE,
    }


def main() -> None:
    arguments = _harness.options(__doc__)
    rows = measure(arguments.smoke, arguments.repeats)
    ratios = [row["ratio"] for row in rows if "rtol" in row["method"]]
    print(f"smallest ratio of the flow {min(ratios):.1f}, wanted at least {BOUND}")
    _harness.write("minimize", __doc__.splitlines()[0], rows, arguments)


if __name__ == "__main__":
    main()
