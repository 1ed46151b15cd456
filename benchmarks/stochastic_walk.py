"""Does the stochastic walk go where label noise goes, and does it pay on 10⁶ weights?

The first rows: README's network on 60 digits, walked to the limit time 5 by ordinary gradients,
beside the limiting flow, in single and double precision, for three seeds. "Landed" is the fit that
gradient flow reaches from there; "gradients a step" the time of a gradient of the walk over that
of the loss, each the fastest of some calls.

The last rows: tanh MLPs with 55,000 and 10⁶ weights on all 1,797 digits and 203 more, copies that
are moved by one pixel. After its training each walks until tr G is less than half of what it was;
gradients without the walk follow until the training loss is what it was. The control is the same
training without a walk, for as many steps. Where the environment has a folder KEPT, stages that
are done stay there.
"""

import json
import os
import pathlib
import tempfile
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

MOMENTUM = 0.9
STRENGTH = 5e-4
LARGE = {
    "width": 960, "num_examples": 2000, "batch": 250,
    "num_train": 1000, "num_leg": 150, "most_legs": 20,
}  # fmt: skip
MIDDLE = {**LARGE, "width": 200}
SMALL = {
    "width": 16, "num_examples": 40, "batch": 20, "num_train": 30, "num_leg": 5, "most_legs": 2
}  # fmt: skip


class Clock:
    """Processor and wall seconds since it was made."""

    def __init__(self) -> None:
        self.began = time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float]:
        cpu, wall = self.began
        return {"CPU s": time.process_time() - cpu, "wall s": time.perf_counter() - wall}


def against_the_limit(is_smoke: bool, dtype: Any, seed: int) -> dict[str, Any]:
    size, width, num_steps, end_time = (6, 16, 20, 0.5) if is_smoke else (60, 128, 20_000, 5.0)
    images, labels = (a.astype(dtype) for a in mf.models.digits(num_examples=size, seed=seed))
    model = eqx.nn.MLP(64, 10, width, 1, activation=jnp.tanh, key=jr.key(seed), dtype=dtype)
    loss, noise = mf.LeastSquares(images, labels), mf.LabelNoise(std=1.0, batch_size=1)
    start = mf.limit_map(loss, model, throw=False)
    clock = Clock()
    limit = mf.solve(
        mf.LimitDiffusion(mf.ZeroLossManifold(loss), noise), start, end_time=end_time, throw=False
    )
    solve = clock.read()
    rate = 0.04
    reach = rate / (1 - MOMENTUM)
    strength = float(noise.strength(loss)) * end_time / (4 * reach * num_steps)
    clock = Clock()
    run = mf.simulate(
        loss, mf.walks.StochasticWalk(strength), lambda rate: optax.sgd(rate, MOMENTUM), start,
        learning_rate=rate, num_steps=num_steps, key=jr.key(seed + 1), throw=False,
    )  # fmt: skip
    walked = jax.block_until_ready(run.final)
    walk = clock.read()
    landed = mf.limit_map(loss, walked, throw=False)
    trace = lambda point: float(loss.trace_gauss_newton(point))
    expected = trace(limit.final)
    plain = eqx.filter_jit(eqx.filter_grad(loss))
    bent = eqx.filter_jit(mf.walks.StochasticWalk(strength).gradient)
    arrays = lambda tree: jax.block_until_ready(eqx.filter(tree, eqx.is_array))
    per_gradient = _harness.fastest(lambda: arrays(plain(start)), 5)
    per_step = _harness.fastest(lambda: arrays(bent(loss, start, jr.key(0))), 5)
    return {
        "what": f"{size} digits, {jnp.dtype(dtype).name}",
        "seed": seed,
        "D": num_weights(start),
        "N": len(labels),
        "steps": num_steps,
        "gradients a step": per_step / per_gradient,
        "tr G before": trace(start),
        "tr G after": trace(walked),
        "tr G landed": trace(landed),
        "tr G of the limit": expected,
        "relative difference": trace(walked) / expected - 1,
        "landed, relative difference": trace(landed) / expected - 1,
        "loss before": float(loss(start)),
        "loss after": float(loss(walked)),
        "CPU s of solve": solve["CPU s"],
        **walk,
    }


def num_weights(model: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))


def digits(num_examples: int) -> tuple[jax.Array, jax.Array]:
    """All digits, then copies that are moved by one pixel."""
    parts = mf.models.digits(), mf.models.digits(test=True)
    images, labels = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in (0, 1))
    moved = np.roll(images.reshape(-1, 8, 8), 1, axis=2).reshape(-1, 64)
    images, labels = np.concatenate([images, moved]), np.concatenate([labels, labels])
    return jnp.asarray(images[:num_examples]), jnp.asarray(labels[:num_examples])


def largest_eigenvalue(loss: Any, model: Any) -> float:
    matrix, vector = loss.gauss_newton(model), eqx.filter(model, eqx.is_inexact_array)
    mv = eqx.filter_jit(lambda matrix, vector: matrix.mv(vector))
    size = 1.0
    for _ in range(20):
        vector = jax.tree.map(lambda leaf, size=size: leaf / size, vector)
        vector = mv(matrix, vector)
        size = float(optax.global_norm(vector))
    return size


def large(
    folder: pathlib.Path, *, width: int, num_examples: int, batch: int,
    num_train: int, num_leg: int, most_legs: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Each stage is kept on disk, so that what is cut goes on from there."""
    images, labels = digits(num_examples)
    loss = mf.LeastSquares(images, labels)
    model = eqx.nn.MLP(64, 10, width, 2, activation=jnp.tanh, key=jr.key(0))
    trace = eqx.filter_jit(loss.trace_gauss_newton)
    value = eqx.filter_jit(loss)
    told = lambda point: {"loss": float(value(point)), "trace": float(trace(point))}

    rates = optax.cosine_decay_schedule(1e-3, num_train, alpha=0.01)
    trained = mf.simulate(
        loss, mf.MinibatchNoise(batch), optax.adam, model, learning_rate=rates,
        num_steps=num_train, num_saves=3, key=jr.key(1), checkpoint=folder / "trained.npz",
    ).final  # fmt: skip
    before = told(trained)
    print("trained:", before, flush=True)
    rate = 0.5 / largest_eigenvalue(loss, trained)
    momentum: Callable[..., Any] = lambda rate: optax.sgd(rate, MOMENTUM)

    def legs(name: str, noise: Any, point: Any, is_done: Callable[[dict], bool]) -> tuple:
        """Legs of so many steps until it is done, all with the same program."""
        seen, spent = told(point), {"CPU s": 0.0, "wall s": 0.0}
        for leg in range(most_legs):
            if is_done(seen):
                return point, leg * num_leg, spent
            clock = Clock()
            point = mf.simulate(
                loss, noise, momentum, point, learning_rate=rate, num_steps=num_leg,
                key=jr.key(100 + leg), checkpoint=folder / f"{name} {leg}.npz",
            ).final  # fmt: skip
            jax.block_until_ready(eqx.filter(point, eqx.is_array))
            seconds = folder / f"{name} {leg}.json"
            if not seconds.exists():
                seconds.write_text(json.dumps(clock.read()))
            spent = {key: spent[key] + s for key, s in json.loads(seconds.read_text()).items()}
            seen = told(point)
            print(f"{name} {leg}:", seen, spent, flush=True)
        return point, most_legs * num_leg, spent

    plain = mf.MinibatchNoise(batch)
    # Below the half, as gradients without the walk take some of it back.
    walk = mf.walks.StochasticWalk(STRENGTH, batch)
    is_low = lambda seen: seen["trace"] <= 0.42 * before["trace"]
    walked, num_walk, spent_walk = legs("walk", walk, trained, is_low)
    is_back = lambda seen: seen["loss"] <= before["loss"]
    back, num_back, spent_back = legs("back", plain, walked, is_back)
    num_all = (num_walk + num_back) // num_leg
    left = iter(range(num_all + 1))
    control, _, spent_control = legs("control", plain, trained, lambda seen: next(left) == num_all)
    common = {
        "what": f"{num_examples} digits, {images.dtype.name}",
        "D": num_weights(model),
        "N": num_examples,
        "tr G before": before["trace"],
        "loss before": before["loss"],
    }

    def row(name: str, point: Any, num_steps: int, *spent: dict[str, float]) -> dict[str, Any]:
        after = told(point)
        times = {key: sum(one[key] for one in spent) for key in ("CPU s", "wall s")}
        return {
            **common,
            "stage": name,
            "steps": num_steps,
            "tr G after": after["trace"],
            "loss after": after["loss"],
            **times,
        }

    return [
        row("walked", walked, num_walk, spent_walk),
        row("walked and back", back, num_walk + num_back, spent_walk, spent_back),
        row("control: trained on", control, num_all * num_leg, spent_control),
    ]


def main() -> None:
    arguments = _harness.options(__doc__)
    rows = []
    for dtype in (jnp.float32,) if arguments.smoke else (jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            for seed in range(1 if arguments.smoke else 3):
                inputs = arguments.smoke, dtype, seed
                name = f"limit {dtype.__name__} {seed}"
                rows.append(_harness.kept(name, lambda inputs=inputs: against_the_limit(*inputs)))
                print(rows[-1], flush=True)
    first = "Does the stochastic walk go where label noise goes?"
    _harness.write("stochastic_walk_limit", first, rows, arguments)
    rows = []
    second = "Does the stochastic walk halve tr G of many weights at the same training loss?"
    for sizes in [SMALL] if arguments.smoke else [MIDDLE, LARGE]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = pathlib.Path(os.environ.get("KEPT", scratch), f"width {sizes['width']}")
            folder.mkdir(exist_ok=True)
            rows += large(folder, **sizes)
        _harness.write("stochastic_walk", second, rows, arguments)


if __name__ == "__main__":
    main()
