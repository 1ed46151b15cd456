"""How many times faster is the limiting flow than the SGD it describes, at equal weak error?

Two kinds of noise until a fixed limit time, at halving learning rates: the weak error against the
limit, and what one run costs. Label noise on a two-layer network, whose limit is an ordinary
differential equation; the observable is tr∇²L∘Φ. And noise in every direction, normal and tangent
at once and another one at every point, whose limit is stochastic; the observable is the squared
angle on a circle of minimisers, whose mean is known in closed form. One path of either limit gives
what one run gives without an error in η; the ratio of their costs is how much faster it is.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import _harness
import manifoldflow as mf

jax.config.update("jax_enable_x64", True)


class Case(NamedTuple):
    """A loss with its noise and its limit, and what is observed of an end point."""

    noise_name: str
    loss: mf.AbstractLoss
    noise: mf.AbstractNoise
    start: jax.Array
    observe: Callable[[jax.Array], jax.Array]
    exact: Callable[[float], float] | None  # the mean in the limit at a time, where it is known
    paired: Callable[..., jax.Array] | None  # the limit itself with the noise of a run


def label_noise() -> Case:
    """A network Σⱼ φ(wⱼ·x) with φ(z) = z + z³/3 on two examples."""
    width, num_inputs, num_examples = 3, 2, 2
    inputs = jr.normal(jr.key(0), (num_examples, num_inputs))
    inputs = inputs / jnp.linalg.norm(inputs, axis=1, keepdims=True)
    predict = lambda w, x: jnp.sum((lambda z: z + z**3 / 3)(w @ x))
    weights = 0.5 * jr.normal(jr.key(1), (width, num_inputs))
    targets = jr.uniform(jr.key(2), (num_examples,), minval=-1, maxval=1)
    loss = mf.LeastSquares(inputs, targets, predict=predict, scale=1 / num_examples)
    start = mf.ZeroLossManifold(loss).project(weights)
    observe = lambda p: loss.trace_gauss_newton(mf.limit_map(loss, p, throw=False))
    return Case("label", loss, mf.LabelNoise(1.0), start, observe, None, None)


def every_direction() -> Case:
    """Minimisers on the unit circle: the angle of the limit is Brownian motion with a drift."""
    loss = mf.LeastSquares(np.zeros(1), np.ones(1), predict=lambda x, i: x @ x, scale=0.25)
    normal, tangent = np.array([0.5, 0.3, 0.3]), np.array([-0.3, -0.1, 0.1])
    drift, variance = -normal @ tangent, tangent @ tangent

    def factor(x: jax.Array) -> jax.Array:
        n = x / jnp.linalg.norm(x)
        return n[:, None] * normal + jnp.array([-n[1], n[0]])[:, None] * tangent

    observe = lambda x: jnp.arctan2(x[1], x[0]) ** 2
    exact = lambda time: float((drift * time) ** 2 + variance * time)

    def paired(key: jax.Array, rate: float, num_steps: int) -> jax.Array:
        """The squared angle that the limit has where its noise is that of a run of SGD."""

        def step(angle: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            drawn = jr.normal(jr.split(jr.fold_in(key, number), 1)[0], (3,))
            return angle + rate**2 * drift - rate * drawn @ tangent, None

        return jax.lax.scan(step, jnp.zeros(()), jnp.arange(num_steps))[0] ** 2

    noise, start = mf.CustomNoise(factor), jnp.array([1.0, 0.0])
    return Case("any covariance", loss, noise, start, observe, exact, paired)


def seconds(fn, *arguments) -> float:
    """The least processor time of thirty calls, which other programs hardly stretch."""
    jax.block_until_ready(fn(*arguments))
    best = float("inf")
    for _ in range(30):
        began = time.process_time()
        jax.block_until_ready(fn(*arguments))
        best = min(best, time.process_time() - began)
    return best


def measure(case: Case, rates: list[float], num_runs: int, end_time: float) -> list[dict]:
    loss, noise, start = case.loss, case.noise, case.start
    flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), noise)
    # A hundred steps leave a weak error below that of the smallest rate.
    options = {"key": jr.key(4), "step_size": end_time / 100} if flow.is_stochastic else {}
    follow = jax.jit(lambda p: mf.solve(flow, p, end_time=end_time, throw=False, **options).final)
    reference = case.exact(end_time) if case.exact else float(case.observe(follow(start)))
    limit_seconds = seconds(follow, start)
    observed = jax.jit(jax.vmap(case.observe))
    keys = mf.member_keys(jr.key(3), num_runs)
    rows, errors = [], []
    for rate in rates:

        def run(key, rate=rate):
            options = {"learning_rate": rate, "end_time": end_time, "throw": False}
            return mf.simulate(loss, noise, optax.sgd, start, key=key, **options).final

        one = seconds(jax.jit(run), keys[0])
        values = observed(mf.ensemble(run, keys))
        if case.paired:  # of known mean, and so near that the difference hardly scatters
            steps = round(end_time / rate**2)
            pair = lambda key, rate=rate, steps=steps: case.paired(key, rate, steps)
            values = values - mf.ensemble(pair, keys) + reference
        error = mf.ensembles.weak_error(values, reference)
        errors.append((float(error.error), float(error.standard_error)))
        rows.append(
            {
                "noise": case.noise_name,
                "D": start.size,
                "n": loss.num_residuals,
                "learning rate": rate,
                "steps": round(end_time / rate**2),
                "weak error": errors[-1][0],
                "standard error": errors[-1][1],
                "one SGD run, ms": 1e3 * one,
                "the limit, ms": 1e3 * limit_seconds,
                "ratio": one / limit_seconds,
            }
        )
    _report(case, reference, rates, np.array(errors))
    return rows


def _report(case: Case, reference: float, rates: list[float], found: np.ndarray) -> None:
    print(f"{case.noise_name} noise, observable at the end of the limit: {reference:.4f}")
    terms = {"num_terms": min(2, len(rates) - 1)}
    left = mf.ensembles.extrapolate(jnp.asarray(rates), found[:, 0], found[:, 1], **terms)
    print(f"extrapolated weak error {float(left.value):.1e} ± {float(left.standard_error):.1e}")
    if np.all(np.abs(found[:, 0]) > 2 * found[:, 1]):
        order = mf.ensembles.weak_order(jnp.asarray(rates), found[:, 0], found[:, 1])
        print(f"weak order {float(order.value):.2f} ± {float(order.standard_error):.2f}")


def main() -> None:
    arguments = _harness.options(__doc__)
    cases = [label_noise(), every_direction()]
    if arguments.smoke:
        runs = [(case, [0.2, 0.1], 100, 0.5) for case in cases]
    else:
        rates = [0.1, 0.05, 0.025, 0.0125]
        runs = [(case, rates, 2000, 1.0) for case in cases]
    rows = [row for run in runs for row in measure(*run)]
    _harness.write("sgd_versus_limit", __doc__.splitlines()[0], rows, arguments)


if __name__ == "__main__":
    main()
