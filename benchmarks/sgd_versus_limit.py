"""How many times faster is the limiting flow than the SGD it describes, at equal weak error?

Label-noise SGD on a two-layer network until a fixed limit time, at halving learning rates: the
weak error of tr∇²L∘Φ against the limit, and what one run costs. The limiting flow gives the same
number without an error of this kind; the ratio of the costs is how much faster it is.
"""

import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import _harness
import manifoldflow as mf

jax.config.update("jax_enable_x64", True)


def problem(width: int, num_inputs: int, num_examples: int) -> tuple:
    """A network Σⱼ φ(wⱼ·x) with φ(z) = z + z³/3, and a point of its zero-loss manifold."""
    inputs = jr.normal(jr.key(0), (num_examples, num_inputs))
    inputs = inputs / jnp.linalg.norm(inputs, axis=1, keepdims=True)
    predict = lambda w, x: jnp.sum((lambda z: z + z**3 / 3)(w @ x))
    weights = 0.5 * jr.normal(jr.key(1), (width, num_inputs))
    targets = jr.uniform(jr.key(2), (num_examples,), minval=-1, maxval=1)
    loss = mf.LeastSquares(inputs, targets, predict=predict, scale=1 / num_examples)
    return loss, mf.ZeroLossManifold(loss).project(weights)


def seconds(fn, *arguments) -> float:
    """The fastest of five calls after the first."""
    jax.block_until_ready(fn(*arguments))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(fn(*arguments))
        best = min(best, time.perf_counter() - began)
    return best


def measure(size: tuple, rates: list[float], num_runs: int, end_time: float) -> list[dict]:
    loss, start = problem(*size)
    noise = mf.LabelNoise(1.0)
    flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), noise)
    follow = jax.jit(lambda p: mf.solve(flow, p, end_time=end_time, throw=False).final)
    reference = float(loss.trace_gauss_newton(follow(start)))
    limit_seconds = seconds(follow, start)
    landed = jax.jit(
        jax.vmap(lambda p: loss.trace_gauss_newton(mf.limit_map(loss, p, throw=False)))
    )
    keys = mf.member_keys(jr.key(3), num_runs)
    rows, errors = [], []
    for rate in rates:

        def run(key, rate=rate):
            options = {"learning_rate": rate, "end_time": end_time, "throw": False}
            return mf.simulate(loss, noise, optax.sgd, start, key=key, **options).final

        one = seconds(jax.jit(run), keys[0])
        error = mf.ensembles.weak_error(landed(mf.ensemble(run, keys)), reference)
        errors.append((float(error.error), float(error.standard_error)))
        rows.append(
            {
                "D": start.size,
                "n": size[2],
                "learning rate": rate,
                "steps": round(end_time / rate**2),
                "weak error": errors[-1][0],
                "standard error": errors[-1][1],
                "one SGD run, ms": 1e3 * one,
                "the limit, ms": 1e3 * limit_seconds,
                "ratio": one / limit_seconds,
            }
        )
    found = np.array(errors)
    order = mf.ensembles.weak_order(jnp.asarray(rates), found[:, 0], found[:, 1])
    print(f"tr∇²L at the end of the limit: {reference:.4f}")
    print(f"weak order {float(order.value):.2f} ± {float(order.standard_error):.2f}")
    return rows


def main() -> None:
    arguments = _harness.options(__doc__)
    rates = [0.1, 0.05, 0.025, 0.0125]
    if arguments.smoke:
        rows = measure((3, 2, 2), [0.2, 0.1], 100, 0.5)
    else:
        rows = measure((3, 2, 2), rates, 2000, 1.0)
    _harness.write("sgd_versus_limit", __doc__.splitlines()[0], rows, arguments)


if __name__ == "__main__":
    main()
