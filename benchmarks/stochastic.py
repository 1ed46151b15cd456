"""What does `solve` add to a hand-written scan of the same stochastic steps, and Diffrax to it?

Brownian motion on a sphere over many seeds: projected Euler-Maruyama by `solve` (the default),
by a `lax.scan` written out by hand with the same drift, projection and keys, and by `solve` with
`diffrax.Euler()` on a virtual Brownian tree. Ratios to the hand-written scan.
"""

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr

import _harness
import manifoldflow as mf


def by_hand(flow: mf.BrownianMotion, start: jax.Array, num_steps: int):
    """One seed, as a user would write it with the pieces of the library."""
    size = jnp.asarray(1 / num_steps, start.dtype)

    def end(key: jax.Array) -> jax.Array:
        def step(point: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            drawn = jr.normal(jr.split(jr.fold_in(key, index), 1)[0], point.shape, point.dtype)
            kick = flow.diffusion(point).mv(drawn)
            moved = point + size * flow.drift(point) + jnp.sqrt(size) * kick
            return flow.manifold.newton_correct(moved)[0], None

        return jax.lax.scan(step, start, jnp.arange(num_steps))[0]

    return end


def measure(dimension: int, num_steps: int, num_seeds: int, repeats: int) -> list[dict]:
    flow = mf.BrownianMotion(mf.LevelSet(lambda p: jnp.sum(p**2) - 1))
    start = jnp.zeros(dimension).at[0].set(1.0)
    keys = jr.split(jr.key(0), num_seeds)

    def by_solve(solver: dfx.AbstractSolver | None):
        options = {"end_time": 1.0, "step_size": 1 / num_steps, "solver": solver, "throw": False}
        return lambda key: mf.solve(flow, start, key=key, **options).final

    ways = {
        "scan by hand": by_hand(flow, start, num_steps),
        "solve": by_solve(None),
        "solve, diffrax.Euler": by_solve(dfx.Euler()),
    }
    compiled = {name: _harness.Compiled(jax.vmap(fn), keys) for name, fn in ways.items()}
    times = {name: float("inf") for name in ways}
    for _ in range(3):  # taking turns, so that a busy machine is busy for all
        for name, program in compiled.items():
            times[name] = min(times[name], program.seconds(repeats))
    ends = {name: program() for name, program in compiled.items()}
    gap = float(jnp.max(jnp.abs(ends["solve"] - ends["scan by hand"])))
    print(f"largest difference between solve and the scan by hand: {gap:.1e}")
    return [
        {
            "sphere in": f"R^{dimension}",
            "steps": num_steps,
            "seeds": num_seeds,
            "way": name,
            "seconds": times[name],
            "ratio": times[name] / times["scan by hand"],
            "compile s": compiled[name].compile_seconds,
        }
        for name in ways
    ]


def main() -> None:
    arguments = _harness.options(__doc__)
    sizes = [(3, 8, 8)] if arguments.smoke else [(3, 100, 2000), (16, 100, 1000)]
    rows = [row for size in sizes for row in measure(*size, arguments.repeats)]
    _harness.write("stochastic", __doc__.splitlines()[0], rows, arguments)


if __name__ == "__main__":
    main()
