"""How many examples does label noise need to recover a sparse truth, and how long are its flows?

A truth with κ = 5 entries ±1 in d dimensions, inputs ±1, the model ⟨u² − v², x⟩ from u = v = ½
(0.2 for d = 1,600, where SGD from ½ would need a learning rate below 0.005).
For each d, n and seed the squared error |w − w*|², which for inputs ±1 is the population loss:
of the limiting flow of label noise, solved to t = 5; of SGD with label noise at the same time; of
gradient flow alone, from a large start (the kernel regime) and from a tiny one; of the linear
program. Theory: label noise needs O(κ ln d) examples, while in the kernel regime the error is at
least (1 − n/d)|w*|² on average [LiWangArora2022, Theorems 6.1 and 6.7].
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import _harness
import manifoldflow as mf

jax.config.update("jax_enable_x64", True)

SPARSITY = 5
END_TIME = 5.0
LEARNING_RATE = 0.02
LARGE, TINY = 30.0, 1e-6


def predict(point: dict[str, Any], x: Any) -> Any:
    return x @ (point["u"] ** 2 - point["v"] ** 2)


def problem(key: Any, n: Any, largest: int, d: int) -> tuple:
    """The first n of the examples; the others are zeros, so that one program serves all n."""
    inputs, targets, truth = mf.models.sparse_regression(key, largest, d, SPARSITY)
    used = jnp.arange(largest) < n
    inputs, targets = jnp.where(used[:, None], inputs, 0), jnp.where(used, targets, 0)
    loss = mf.LeastSquares(inputs, targets, predict=predict, scale=1 / n)
    # Full batches, with c = 1 in Σ = c·∇²L.
    return loss, mf.LabelNoise(jnp.sqrt(n)), truth


def start(d: int) -> dict[str, Any]:
    return {name: jnp.full(d, 0.5 if d <= 400 else 0.2) for name in ("u", "v")}


def error_of(point: dict[str, Any], truth: Any) -> Any:
    return jnp.sum((point["u"] ** 2 - point["v"] ** 2 - truth) ** 2)


def limiting_flow(key: Any, n: Any, *, largest: int, d: int) -> Any:
    loss, noise, truth = problem(key, n, largest, d)
    landed = mf.limit_map(loss, start(d), throw=False)
    flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), noise)
    end = mf.solve(flow, landed, end_time=END_TIME, rtol=1e-4, throw=False)
    return error_of(end.final, truth)


def sgd(key: Any, n: Any, *, largest: int, d: int) -> Any:
    """Where SGD is at the end, brought to the manifold: without its fluctuations across."""
    loss, noise, truth = problem(key, n, largest, d)
    end = mf.simulate(
        loss, noise, optax.sgd, start(d), learning_rate=LEARNING_RATE, end_time=END_TIME,
        key=jr.fold_in(key, 1), throw=False,
    )  # fmt: skip
    return error_of(mf.limit_map(loss, end.final, throw=False), truth)


def closed_forms(key: Any, n: int, largest: int, d: int) -> list[float]:
    """Errors of the flow, of gradient flow from far and near, and of the linear program."""
    loss, _, truth = problem(key, n, largest, d)
    inputs, targets = np.asarray(loss.inputs[:n]), np.asarray(loss.targets[:n])
    point = start(d)["u"]
    found = (
        mf.theory.overparametrized_linear_flow(inputs, targets, point, point, time=END_TIME),
        mf.theory.kernel_rich_interpolant(inputs, targets, scale=LARGE),
        mf.theory.kernel_rich_interpolant(inputs, targets, scale=TINY),
        mf.theory.weighted_l1_interpolant(inputs, targets),
    )
    return [float(np.sum((w - np.asarray(truth)) ** 2)) for w in found]


def measure(d: int, sizes: list[int], num_seeds: int) -> list[dict]:
    keys = mf.member_keys(jr.key(d), num_seeds)
    largest = max(sizes)

    def over(fn: Any) -> tuple[np.ndarray, float]:
        """Errors by n and seed, all in one compiled program, and the seconds with compiling."""
        began = time.perf_counter()
        grid = jnp.repeat(jnp.asarray(sizes, float), num_seeds)
        members = jnp.tile(keys, len(sizes))
        one = lambda pair: fn(pair[0], pair[1], largest=largest, d=d)
        # One after the other on a CPU; at once where there are threads for all.
        mapped = jax.lax.map if jax.default_backend() == "cpu" else lambda f, x: jax.vmap(f)(x)
        found = jax.block_until_ready(jax.jit(lambda x: mapped(one, x))((members, grid)))
        return np.asarray(found).reshape(len(sizes), num_seeds), time.perf_counter() - began

    flow, seconds = over(limiting_flow)
    print(f"d = {d}: {flow.size} limiting flows in {seconds:.1f} s", flush=True)
    noisy, seconds_of_sgd = over(sgd)
    print(f"d = {d}: as many runs of SGD in {seconds_of_sgd:.1f} s", flush=True)
    exact = np.array([[closed_forms(k, n, largest, d) for k in keys] for n in sizes])
    columns = {
        "limiting flow": flow,
        "SGD": noisy,
        "closed form": exact[..., 0],
        "kernel regime": exact[..., 1],
        "rich regime": exact[..., 2],
        "linear program": exact[..., 3],
    }
    rows = []
    for i, n in enumerate(sizes):
        row: dict[str, Any] = {"d": d, "n": n, "n/(κ ln d)": n / (SPARSITY * np.log(d))}
        for name, errors in columns.items():
            row[name] = float(np.mean(errors[i]))
            row[f"± {name}"] = float(np.std(errors[i], ddof=1) / np.sqrt(num_seeds))
        row["recovered"] = float(np.mean(flow[i] < 0.01 * SPARSITY))
        row["(1 − n/d)κ"] = (1 - n / d) * SPARSITY
        row["s, all flows of this d"], row["s, all SGD"] = seconds, seconds_of_sgd
        rows.append(row)
    return rows


def main() -> None:
    arguments = _harness.options(__doc__)
    if arguments.smoke:
        rows = measure(40, [10, 20], 2)
    else:
        rows = []
        for d in (100, 400, 1600):
            sizes = [round(f * SPARSITY * np.log(d)) for f in np.linspace(0.4, 3.15, 12)]
            rows += measure(d, sizes, 20)
    _harness.write("sample_complexity", __doc__.splitlines()[0], rows, arguments)


if __name__ == "__main__":
    main()
