"""What does `simulate` cost beside a hand-written `lax.scan` of the same steps?

Seconds per step of both, measured next to each other in one run, and their ratio: for a
network, for a model so small that only overhead counts, and for many seeds of that one.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import _harness
import manifoldflow as mf

BOUND = 1.3


def network(width: int, num_examples: int) -> tuple:
    model = eqx.nn.MLP(32, 1, width, 2, activation=jnp.tanh, key=jr.key(0))
    inputs = jr.normal(jr.key(1), (num_examples, 32))
    return mf.LeastSquares(inputs, jr.normal(jr.key(2), (num_examples, 1))), model


def squares(point: dict, x: jax.Array) -> jax.Array:
    return jnp.dot(x, point["u"] ** 2 - point["v"] ** 2)


def small(dimension: int, num_examples: int) -> tuple:
    inputs = jr.normal(jr.key(1), (num_examples, dimension))
    loss = mf.LeastSquares(inputs, inputs[:, 0], predict=squares)
    return loss, {"u": jnp.full(dimension, 0.3), "v": jnp.full(dimension, 0.3)}


def by_hand(optimizer: Callable, num_steps: int) -> Callable:
    """What one writes without the library: no saves, no clock, no look at divergence."""

    def run(loss: Any, noise: Any, point: Any, rate: jax.Array, key: jax.Array) -> Any:
        transform = optimizer(rate)
        coordinates, rest = eqx.partition(point, eqx.is_inexact_array)

        def step(carry: tuple, k: jax.Array) -> tuple:
            here, state = carry
            gradient = noise.gradient(loss, eqx.combine(here, rest), jr.fold_in(key, k))
            updates, state = transform.update(gradient, state, here)
            return (optax.apply_updates(here, updates), state), None

        start = coordinates, transform.init(coordinates)
        return jax.lax.scan(step, start, jnp.arange(num_steps))[0][0]

    return run


def by_simulate(optimizer: Callable, num_steps: int, num_saves: int) -> Callable:
    def run(loss: Any, noise: Any, point: Any, rate: jax.Array, key: jax.Array) -> Any:
        return mf.simulate(
            loss, noise, optimizer, point, learning_rate=rate, num_steps=num_steps,
            num_saves=num_saves, key=key, throw=False,
        ).points  # fmt: skip

    return run


def over_seeds(run: Callable) -> Callable:
    return eqx.filter_vmap(run, in_axes=(None, None, None, None, 0))


def heavy_ball(rate: Any) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=0.9)


def measure(smoke: bool, repeats: int) -> list[dict]:
    steps = 50 if smoke else 1000
    big = network(16, 8) if smoke else network(256, 256)
    tiny = small(20, 5)
    key, keys = jr.key(3), jr.split(jr.key(3), 4 if smoke else 256)
    one, half = mf.LabelNoise(1.0, batch_size=1), mf.LabelNoise(0.1, batch_size=4)
    rows = []
    cases = (
        ("network", big, half, optax.sgd, steps // 5, 1, key),
        ("network, 10 saves", big, half, heavy_ball, steps // 5, 10, key),
        ("network, Adam", big, half, optax.adam, steps // 5, 1, key),
        ("small model", tiny, one, optax.sgd, 20 * steps, 1, key),
        ("small model, 50 saves", tiny, one, heavy_ball, 20 * steps, 50, key),
        ("small model, many seeds", tiny, one, optax.sgd, steps, 1, keys),
    )
    for what, (loss, point), noise, optimizer, num_steps, num_saves, seeds in (
        cases[1::4] if smoke else cases
    ):
        hand, ours = by_hand(optimizer, num_steps), by_simulate(optimizer, num_steps, num_saves)
        if seeds is keys:
            hand, ours = over_seeds(hand), over_seeds(ours)
        arguments = loss, noise, point, jnp.asarray(0.01), seeds
        compiled = [_harness.Compiled(run, *arguments) for run in (hand, ours)]
        # Alternating, so that whatever else runs on the machine hits both.
        seconds = [[each.seconds(1) for each in compiled] for _ in range(repeats)]
        best = [min(column) for column in zip(*seconds)]
        row = {
            "what": what,
            "by hand (µs/step)": 1e6 * best[0] / num_steps,
            "simulate (µs/step)": 1e6 * best[1] / num_steps,
            "ratio": best[1] / best[0],
            "by hand compile s": compiled[0].compile_seconds,
            "simulate compile s": compiled[1].compile_seconds,
        }
        rows.append(row)
        print(_harness.table([row]), flush=True)
    return rows


def main() -> None:
    arguments = _harness.options(__doc__)
    rows = measure(arguments.smoke, arguments.repeats)
    worst = max(row["ratio"] for row in rows)
    print(f"largest ratio {worst:.2f}, wanted at most {BOUND}")
    _harness.write("simulate", __doc__.splitlines()[0], rows, arguments)


if __name__ == "__main__":
    main()
