"""Does a walk at fixed outputs make networks that survive rounding, and does anything else?

A convolutional network and a small transformer, both with GELU, learn 50 of scikit-learn's digits
under a squared loss, in double precision. `walk` then moves them with their outputs on these images
held, to lower what rounding to 4 bits a row costs. Rivals start at the same network: weights
balanced by the rescalings of layers (cross-layer equalisation), SAM, and the mean of the weights of
further training; the last two have 13,000 gradients of the loss, which take about as long as a
walk. All are rounded to 3, 4 and 5 bits, per tensor and per row, with 32 random offsets of the
grids; five seeds. Where the environment has a folder KEPT, seeds that are done stay there.
"""

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import _harness
import manifoldflow as mf
from manifoldflow import symmetry
from manifoldflow.walks import Rounding

jax.config.update("jax_enable_x64", True)

BITS, GRIDS = (3, 4, 5), ("tensor", "row")
NUM_OFFSETS = 32
RADIUS = 0.05
# By timed parts a walk of the transformer takes as long as 12,900.
NUM_GRADIENTS = 13_000


class Convolutional(eqx.Module):
    """Two convolutions and two dense layers, with GELU; an 8×8 image to 10 numbers."""

    layers: tuple[Any, ...]

    def __init__(self, width: int, key: Any):
        keys = jr.split(key, 4)
        self.layers = (
            eqx.nn.Conv2d(1, width, 3, padding=1, key=keys[0]),
            eqx.nn.Conv2d(width, 2 * width, 3, padding=1, key=keys[1]),
            eqx.nn.Linear(8 * width, 8 * width, key=keys[2]),
            eqx.nn.Linear(8 * width, 10, key=keys[3]),
        )

    def __call__(self, image: jax.Array) -> jax.Array:
        pool = lambda x: x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2).mean((2, 4))
        first, second, third, last = self.layers
        x = pool(jax.nn.gelu(first(image.reshape(1, 8, 8))))
        x = pool(jax.nn.gelu(second(x))).reshape(-1)
        return last(jax.nn.gelu(third(x)))


class Transformer(eqx.Module):
    """One block over the eight rows of an image, with GELU and layer norms; to 10 numbers."""

    embed: eqx.nn.Linear
    places: jax.Array
    attention: eqx.nn.MultiheadAttention
    layers: tuple[Any, ...]
    norms: tuple[Any, ...]

    def __init__(self, width: int, key: Any):
        keys = jr.split(key, 6)
        self.embed = eqx.nn.Linear(8, width, key=keys[0])
        self.places = 0.1 * jr.normal(keys[1], (8, width))
        self.attention = eqx.nn.MultiheadAttention(4, width, key=keys[2])
        self.layers = (
            eqx.nn.Linear(width, 4 * width, key=keys[3]),
            eqx.nn.Linear(4 * width, width, key=keys[4]),
            eqx.nn.Linear(width, 10, key=keys[5]),
        )
        self.norms = (eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width))

    def __call__(self, image: jax.Array) -> jax.Array:
        x = jax.vmap(self.embed)(image.reshape(8, 8)) + self.places
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y)
        y = jax.vmap(self.norms[1])(x)
        inner, outer, last = self.layers
        x = x + jax.vmap(outer)(jax.nn.gelu(jax.vmap(inner)(y)))
        return last(jnp.mean(x, axis=0))


def trained(
    model: Any, loss: Any, num_steps: int, rate: float, radius: float | None = None
) -> tuple[Any, Any]:
    """The model after Adam with a cosine schedule, and the mean of the last half of the weights.

    With a radius by SAM: the gradient is that of a point uphill, at that distance.
    """
    # As arrays, so that one program serves all numbers of steps and all rates.
    return jax.block_until_ready(
        _run(model, loss, jnp.asarray(num_steps), jnp.asarray(rate), radius)
    )


@eqx.filter_jit
def _run(model: Any, loss: Any, num_steps: Any, rate: Any, radius: float | None) -> Any:
    optimizer = optax.scale_by_adam()
    start, rest = eqx.partition(model, eqx.is_inexact_array)
    gradient = jax.grad(lambda x: loss(eqx.combine(x, rest)))

    def step(index: Any, carry: Any) -> Any:
        here, state, mean = carry
        slope = gradient(here)
        if radius is not None:
            length = radius / (optax.global_norm(slope) + 1e-12)
            slope = gradient(jax.tree.map(lambda x, g: x + length * g, here, slope))
        updates, state = optimizer.update(slope, state)
        now = rate * (1 + jnp.cos(jnp.pi * index / num_steps)) / 2
        here = jax.tree.map(lambda x, u: x - now * u, here, updates)
        seen = jnp.maximum(index - num_steps // 2, 0)
        mean = jax.tree.map(lambda m, x: m + (x - m) / jnp.maximum(seen, 1), mean, here)
        return here, state, mean

    here, _, mean = jax.lax.fori_loop(0, num_steps, step, (start, optimizer.init(start), start))
    return eqx.combine(here, rest), eqx.combine(mean, rest)


@eqx.filter_jit
def measured(model: Any, grid: Rounding, train: Any, test: Any, classes: Any, keys: Any) -> Any:
    """Means over offsets of the grids: training loss, test loss, test accuracy."""

    def one(key: Any) -> Any:
        rounded = grid.rounded(model, key)
        hits = jnp.argmax(test.outputs(rounded), axis=1) == classes
        return train(rounded), test(rounded), jnp.mean(hits)

    return jax.tree.map(jnp.mean, jax.lax.map(one, keys, batch_size=4))


def one_seed(kind: type, seed: int, size: int, num_steps: int, max_steps: int, width: int) -> Any:
    """Rows for one network: as trained, walked, and by the rivals."""
    train = mf.LeastSquares(*mf.models.digits(num_examples=size, seed=seed))
    # All that there are; in smoke runs a few.
    keys = jr.split(jr.key(1), min(NUM_OFFSETS, size))
    test = mf.LeastSquares(*(a[: 20 * size] for a in mf.models.digits(test=True, seed=seed)))
    classes = jnp.argmax(test.targets, axis=1)
    model, _ = trained(eqx.filter_jit(kind)(width, jr.key(seed)), train, num_steps, 3e-3)
    budget = 10 if max_steps < 5 else NUM_GRADIENTS

    def timed(move: Callable[[], Any]) -> tuple[Any, float]:
        began = time.process_time()
        return move(), time.process_time() - began

    networks = {
        "as trained": (model, 0.0),
        "walk": timed(
            lambda: (
                mf.walk(
                    train, model, objective=Rounding(4), max_steps=max_steps, stationarity=1e-3
                ).final
            )
        ),
        "SAM": timed(lambda: trained(model, train, budget // 2, 1e-3, RADIUS)[0]),
        "weights' mean": timed(lambda: trained(model, train, budget, 1e-3)[1]),
    }
    # About GELU layers have no rescalings; about a normalisation and in attention they do.
    rescalings = symmetry.find_rescalings(model, *symmetry.examples_of(train))
    if rescalings:
        balanced = timed(lambda: symmetry.balance(model, train, symmetries=rescalings))
        networks["balanced"] = balanced
    change = lambda m: float(jnp.max(jnp.abs(train.outputs(m) - train.outputs(model))))
    rows = []
    for name, (network, seconds) in networks.items():
        hits = jnp.argmax(test.outputs(network), axis=1) == classes
        row = {
            "network": kind.__name__,
            "method": name,
            "seed": seed,
            "CPU s": seconds,
            "largest change of an output": change(network),
            "trace of G": float(train.trace_gauss_newton(network)),
            "train loss": float(train(network)),
            "test loss": float(test(network)),
            "test accuracy": float(jnp.mean(hits)),
        }
        for per in GRIDS:
            for bits in BITS:
                found = measured(network, Rounding(bits, per), train, test, classes, keys)
                for what, value in zip(("train loss", "test loss", "test accuracy"), found):
                    row[f"int{bits} per {per}: {what}"] = float(value)
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds with standard errors; of losses, as shares of those as trained."""
    found = []
    kinds = dict.fromkeys((row["network"], row["method"]) for row in rows)
    of = lambda kind, name: [r for r in rows if (r["network"], r["method"]) == (kind, name)]
    for kind, name in kinds:
        some, first = of(kind, name), of(kind, "as trained")
        line = {"network": kind, "method": name}
        for key in ("int3 per row", "int4 per row", "int5 per row", "int4 per tensor"):
            ratios = [
                a[f"{key}: train loss"] / b[f"{key}: train loss"] for a, b in zip(some, first)
            ]
            error = np.std(ratios, ddof=1) / len(ratios) ** 0.5 if len(ratios) > 1 else np.nan
            line[f"{key}, loss/trained"] = f"{np.mean(ratios):.3f} ± {error:.3f}"
        gains = [
            a["int4 per row: test accuracy"] - b["int4 per row: test accuracy"]
            for a, b in zip(some, first)
        ]
        error = np.std(gains, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else np.nan
        line["int4 per row, test accuracy gained"] = f"{np.mean(gains):+.3f} ± {error:.3f}"
        line["change of outputs"] = max(row["largest change of an output"] for row in some)
        found.append(line)
    return found


def main() -> None:
    arguments = _harness.options(__doc__)
    size, num_steps, max_steps, seeds = (4, 10, 2, 1) if arguments.smoke else (50, 1500, 15, 5)
    widths = [(Convolutional, 2)] if arguments.smoke else [(Convolutional, 6), (Transformer, 16)]
    rows = []
    for kind, width in widths:
        for seed in range(seeds):
            sizes = kind, seed, size, num_steps, max_steps, width
            name = f"rounding {kind.__name__} {seed}"
            rows += _harness.kept(name, lambda sizes=sizes: one_seed(*sizes))
            print(_harness.table(summary(rows)), flush=True)
    _harness.write("rounding", __doc__.splitlines()[0], rows, arguments)


if __name__ == "__main__":
    main()
