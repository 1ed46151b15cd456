"""How large are the programs that users wait for, and how long do they take to be made?

Instructions before optimisation, in the text and with every call counted, and the seconds of
tracing, lowering, compilation and two runs: of the hot functions over numbers of examples,
layers, saves and kinds of noise, next to value_and_grad, a hand-written loop of SGD with label
noise, and a bare `diffeqsolve` of gradient flow. The size must not grow with the number of
saves, and at most linearly with the number of layers.
"""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import _harness
import _programs
import manifoldflow as mf

NOISES = {
    "label": mf.LabelNoise(std=1.0, batch_size=1),
    "isotropic": mf.IsotropicNoise(0.1),
    "minibatch": mf.MinibatchNoise(batch_size=1),
}


def problem(num_examples: int, layers: int, width: int) -> tuple[mf.LeastSquares, Any]:
    """A tanh network from 64 to 10 numbers, with as many weight matrices as layers."""
    model = eqx.nn.MLP(64, 10, width, layers - 1, activation=jnp.tanh, key=jr.key(0))
    inputs = jr.normal(jr.key(1), (num_examples, 64))
    return mf.LeastSquares(inputs, jr.normal(jr.key(2), (num_examples, 10))), model


def by_hand(loss: mf.LeastSquares, num_steps: int) -> Callable[[Any], Any]:
    """SGD with label noise, as anyone would write it."""

    def run(model: Any) -> Any:
        arrays, rest = eqx.partition(model, eqx.is_inexact_array)

        def step(arrays: Any, key: Any) -> tuple[Any, None]:
            noise = jr.normal(key, loss.targets.shape)
            noisy = eqx.tree_at(lambda of: of.targets, loss, loss.targets + noise)
            gradient = jax.grad(lambda a: noisy(eqx.combine(a, rest)))(arrays)
            return jax.tree.map(lambda x, g: x - 0.1 * g, arrays, gradient), None

        return jax.lax.scan(step, arrays, jr.split(jr.key(3), num_steps))[0]

    return run


def bare_solve(loss: mf.LeastSquares) -> Callable[[Any], Any]:
    """Gradient flow by Diffrax alone, saved at its end."""

    def run(model: Any) -> Any:
        arrays, rest = eqx.partition(model, eqx.is_inexact_array)
        gradient = eqx.filter_grad(lambda arrays: loss(eqx.combine(arrays, rest)))
        field = lambda t, y, args: jax.tree.map(jnp.negative, gradient(y))
        controller = dfx.PIDController(rtol=1e-4, atol=1e-6)
        term = dfx.ODETerm(field)
        return dfx.diffeqsolve(
            term, dfx.Tsit5(), 0.0, 1.0, 0.01, arrays, stepsize_controller=controller
        ).ys

    return run


def functions(loss: mf.LeastSquares, noise: str, saves: int) -> dict[str, Callable[[Any], Any]]:
    """What is measured, by name: each a function of the model."""
    manifold = mf.ZeroLossManifold(loss)
    flow = mf.LimitDiffusion(manifold, NOISES[noise])
    key = jr.key(4) if flow.is_stochastic else None
    steps = {"step_size": 1e-3} if flow.is_stochastic else {}
    solve = lambda m: mf.solve(
        flow, m, end_time=0.01, num_saves=saves, key=key, throw=False, **steps
    )
    return {
        "value_and_grad": eqx.filter_value_and_grad(loss),
        "SGD loop by hand": by_hand(loss, 100),
        "bare diffeqsolve": bare_solve(loss),
        "drift": flow.drift,
        "project": lambda m: manifold.project(m, throw=False),
        "limit_map": lambda m: mf.limit_map(loss, m, throw=False),
        "solve": solve,
        "minimize": lambda m: mf.minimize(
            manifold, loss.trace_gauss_newton, m, max_steps=3, throw=False
        ),
    }


def measure(
    num_examples: int, layers: int, width: int, noise: str, saves: int, names: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    loss, model = problem(num_examples, layers, width)
    rows = []
    for name, fn in functions(loss, noise, saves).items():
        if names and name not in names:
            continue
        setting = {"n": num_examples, "layers": layers, "noise": noise, "saves": saves}
        rows.append({"function": name, **setting, **_programs.measured(fn, model)})
    return rows


def main() -> None:
    arguments = _harness.options(__doc__)
    if arguments.smoke:
        rows = measure(4, 2, 16, "label", 1) + measure(4, 3, 16, "label", 2, ("drift",))
    else:
        rows = measure(60, 2, 128, "label", 1)
        hot = ("drift", "limit_map", "solve")
        for num_examples in (10, 120):
            rows += measure(num_examples, 2, 128, "label", 1, ("value_and_grad", *hot))
        for layers in (3, 6, 12):
            rows += measure(60, layers, 128, "label", 1, ("value_and_grad", *hot))
        for saves in (10, 100):
            rows += measure(60, 2, 128, "label", saves, ("solve",))
        for noise in ("isotropic", "minibatch"):
            rows += measure(4, 2, 32, noise, 1, ("drift", "solve"))
    _harness.write("compile_time", __doc__.splitlines()[0], rows, arguments)


if __name__ == "__main__":
    main()
