"""Does fine-tuning in the null space of the old outputs keep them, and what does it cost?

A tanh MLP learns the digits 0-4, then 5-9. In its second training the outputs on the images
of the first are held by `walks.hold_outputs`, or not: plain training, replay (half of the loss is
that of the old images), and a penalty on the distance from the first weights, the best of
three strengths by the sum of both test accuracies. Images of the test part are in neither
training.
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

PENALTIES = (1e-2, 1e-1, 1.0)
RATE = 1e-3


def cross_entropy(f: jax.Array, y: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(f) - f[y]


def halves(seed: int, size: int | None, *, test: bool) -> list[tuple[jax.Array, jax.Array]]:
    """Images and classes of the digits 0-4, then of 5-9."""
    images, labels = mf.models.digits(test=test, seed=seed)
    classes = np.argmax(labels, axis=1)
    parts = [np.flatnonzero(classes < 5)[:size], np.flatnonzero(classes >= 5)[:size]]
    return [(images[part], jnp.asarray(classes[part])) for part in parts]


def trained(
    start: Any, loss: Callable[[Any], jax.Array], num_steps: int, held: Any = None
) -> tuple[Any, Any]:
    """The model after Adam on a loss with the outputs of a manifold held, and Optax's state."""
    optimizer = optax.adam(RATE)
    if held is not None:
        optimizer = mf.walks.hold_outputs(optimizer, held, start)
    coordinates, rest = eqx.partition(start, eqx.is_inexact_array)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        here, state = carry
        gradient = jax.grad(lambda x: loss(eqx.combine(x, rest)))(here)
        updates, state = optimizer.update(gradient, state, here)
        return (optax.apply_updates(here, updates), state), None

    @jax.jit
    def run(here: Any) -> Any:
        return jax.lax.scan(step, (here, optimizer.init(here)), None, length=num_steps)[0]

    found, state = jax.block_until_ready(run(coordinates))
    return eqx.combine(found, rest), state


@eqx.filter_jit
def accuracy(model: Any, images: jax.Array, classes: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(jax.vmap(model)(images), axis=1) == classes)


def one_seed(seed: int, width: int, size: int, num_steps: int) -> list[dict[str, Any]]:
    old, new = halves(seed, size, test=False)
    old_test, new_test = halves(seed, None, test=True)
    model = eqx.nn.MLP(64, 10, width, 2, activation=jnp.tanh, key=jr.key(seed))
    old_loss, new_loss = (mf.PerExampleLoss(*part, cross_entropy) for part in (old, new))
    first, _ = trained(model, old_loss, num_steps)
    manifold = mf.OutputManifold(None, old[0], like=first)
    away = lambda m: sum(
        jnp.sum((a - b) ** 2)
        for a, b in zip(*(jax.tree.leaves(eqx.filter(x, eqx.is_inexact_array)) for x in (m, first)))
    )

    def row(name: str, loss: Callable[[Any], jax.Array], held: Any = None) -> dict[str, Any]:
        began = time.process_time()
        after, state = trained(first, loss, num_steps, held)
        seconds = time.process_time() - began
        change = jnp.abs(manifold.constraint(after))
        return {
            "method": name,
            "seed": seed,
            "largest change of old outputs": float(jnp.max(change)),
            "largest on the way": float("nan") if held is None else float(state.worst),
            "old loss": float(old_loss(after)),
            "old train accuracy": float(accuracy(after, *old)),
            "old test accuracy": float(accuracy(after, *old_test)),
            "new loss": float(new_loss(after)),
            "new test accuracy": float(accuracy(after, *new_test)),
            "steps shortened": 0 if held is None else int(state.num_shortened),
            "CPU s": seconds,
        }

    penalised = [
        row(f"distance, {p:g}", lambda m, p=p: new_loss(m) + p / 2 * away(m)) for p in PENALTIES
    ]
    best = max(penalised, key=lambda r: r["old test accuracy"] + r["new test accuracy"])
    rows = [
        row("plain", new_loss),
        row("replay", lambda m: (new_loss(m) + old_loss(m)) / 2),
        best,
        row("held", new_loss, manifold),
    ]
    before = {
        **dict.fromkeys(rows[0], float("nan")),
        "method": "before",
        "seed": seed,
        "largest change of old outputs": 0.0,
        "old loss": float(old_loss(first)),
        "old train accuracy": float(accuracy(first, *old)),
        "old test accuracy": float(accuracy(first, *old_test)),
        "new test accuracy": float(accuracy(first, *new_test)),
    }
    return [before, *rows]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, and of the changes the least and the largest."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["method"].split(",")[0], []).append(row)
    change = "largest change of old outputs"
    return [
        {
            "method": name,
            "least change": min(row[change] for row in some),
            "largest change": max(row[change] for row in some),
            **{
                key: float(np.mean([row[key] for row in some]))
                for key in some[0]
                if key not in ("method", "seed", change)
            },
        }
        for name, some in kinds.items()
    ]


def main() -> None:
    arguments = _harness.options(__doc__)
    sizes = (16, 12, 20) if arguments.smoke else (128, 150, 300)
    rows = []
    for seed in range(1 if arguments.smoke else 5):
        rows += _harness.kept(f"null space {seed}", lambda seed=seed: one_seed(seed, *sizes))
        print(_harness.table(rows[-5:]), flush=True)
    print("\nMeans over the seeds:\n\n" + _harness.table(summary(rows)))
    _harness.write("null_space", __doc__.splitlines()[0], rows, arguments)


if __name__ == "__main__":
    main()
