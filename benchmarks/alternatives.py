"""What else could one do for tr∇²L, its gradient and the whole drift, and at what price?

One network, one set of data and one run for all: manifoldflow; plain JAX by `vmap(grad)`,
by a scan of chunks and by `jax.hessian`; Hutchinson, Hutch++ and XTrace by traceax and
matfree; PyTorch by torch.func and by BackPACK. Costs are ratios to one jitted full-batch
`value_and_grad`, timed next to each. Errors are against float64: of the value, of the
*projected* gradient (only that is the same for all ways on the manifold), of the drift; for
estimators the root mean square over some keys. The libraries are the `bench` extra.
"""

import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import _harness
import _plain
import _rivals_jax
import _rivals_torch
import manifoldflow as mf
from _rivals_jax import DRIFT, Problem, QUESTIONS, VALUE, Way

# (inputs, width, examples): D = 817, 20,865 and 201,745; for more examples see drift.py.
SIZES = [(7, 24, 64), (32, 128, 64), (32, 432, 64)]
NUM_KEYS = 4
CHUNK = 32


def problem_of(in_size: int, width: int, num_examples: int) -> Problem:
    model = eqx.nn.MLP(in_size, 1, width, 2, activation=jnp.tanh, key=jr.key(0))
    inputs = jr.normal(jr.key(1), (num_examples, in_size))
    # Its own outputs as targets: the loss is zero, where tr∇²L is the Gauss-Newton trace.
    loss = mf.LeastSquares(inputs, jax.vmap(model)(inputs))
    noise = mf.LabelNoise(std=1.0, batch_size=1)
    return Problem(loss, mf.LimitDiffusion(mf.ZeroLossManifold(loss), noise), model)


class Reference:
    """The right answers in float64: by explicit rows where they are few, else structured."""

    def __init__(self, problem: Problem):
        with jax.enable_x64(True):
            double = lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x
            loss, flow, model = jax.tree.map(double, tuple(problem))
            self.size = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
            self.is_explicit = self.size * loss.num_residuals <= 3e7
            self._problem = Problem(loss, flow, model)
            inputs, scale, factor = loss.inputs, problem.scale, problem.factor
            if self.is_explicit:
                rows = eqx.filter_jit(_plain.rows)(model, inputs)
                self.value = float(scale * _plain.squared_norm(rows))
                project = eqx.filter_jit(_plain.projection)
                self._project = lambda v: project(rows, v)
                drift = eqx.filter_jit(lambda m: _plain.drift(m, inputs, factor * scale))(model)
            else:
                self.value = float(eqx.filter_jit(loss.trace_gauss_newton)(model))
                manifold = flow.manifold
                self._project = lambda v: manifold.tangent_projection(model, v)
                drift = flow.drift(model)
            self.drift = [np.asarray(leaf) for leaf in jax.tree.leaves(drift)]

    def error(self, question: str, leaves: list[np.ndarray]) -> float:
        if question == VALUE:
            return abs(float(leaves[0]) - self.value) / self.value
        if question != DRIFT:
            leaves = self._projected(leaves)
        return _plain.relative_error(leaves, self.drift)

    def _projected(self, leaves: list[np.ndarray]) -> list[np.ndarray]:
        """The drift that follows from a gradient."""
        with jax.enable_x64(True):
            params = eqx.filter(self._problem.model, eqx.is_inexact_array)
            factor = self._problem.factor
            scaled = [jnp.asarray(factor * np.asarray(leaf, np.float64)) for leaf in leaves]
            vector = jax.tree.unflatten(jax.tree.structure(params), scaled)
            return [np.asarray(leaf) for leaf in jax.tree.leaves(self._project(vector))]


def memory_limit() -> float:
    """MB that one way may take."""
    statistics = jax.devices()[0].memory_stats()
    if statistics is not None and "bytes_limit" in statistics:
        return 0.9 * statistics["bytes_limit"] / 2**20
    return 0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20


def version_of(package: str) -> str | None:
    name = {"backpack": "backpack-for-pytorch"}.get(package, package)
    try:
        return f"{package} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return None


class NotFeasible(Exception):
    """A way needs more memory than there is."""

    def __init__(self, megabytes: float):
        super().__init__(f"not feasible: would need {megabytes / 1024:.3g} GB")


def prepare(way: Way, num_rows: int, size: int) -> tuple[Any, Callable[[], Iterator[Any]]]:
    """What to time, and the results (one for each key) as lists of leaves."""
    if way.package in ("torch", "backpack"):
        if way.question == DRIFT:  # rows, their square and its gradient
            check_memory(3 * 4 * num_rows * size / 2**20)
        timed = way.function()
        return timed, lambda: iter([timed.numpy()])
    keys = [(key,) for key in jr.split(jr.key(7), NUM_KEYS)] if way.is_random else [()]
    compiled = _harness.Compiled(way.function, *way.arguments, *keys[0])
    check_memory(compiled.temporary_mb)
    results = (jax.tree.leaves(compiled(*way.arguments, *key)) for key in keys)
    return compiled, lambda: results


def check_memory(megabytes: float) -> None:
    if megabytes > memory_limit():
        raise NotFeasible(megabytes)


def measure(
    way: Way, unit: _harness.Compiled, reference: Reference, num_rows: int, repeats: int
) -> dict[str, Any]:
    timed, results = prepare(way, num_rows, reference.size)
    errors = [
        reference.error(way.question, [np.asarray(leaf) for leaf in leaves]) for leaves in results()
    ]
    began = time.perf_counter()
    timed()
    is_slow = time.perf_counter() - began > 5
    unit_seconds = unit.seconds(repeats)
    return {
        "units": timed.seconds(1 if is_slow else repeats) / unit_seconds,
        "MB": timed.temporary_mb,
        "compile s": timed.compile_seconds,
        "relative error": float(np.sqrt(np.mean(np.square(errors)))),
    }


def compare(size: tuple[int, int, int], repeats: int) -> list[dict[str, Any]]:
    problem = problem_of(*size)
    reference = Reference(problem)
    unit = _harness.Compiled(
        lambda l, m: eqx.filter_value_and_grad(l)(m), problem.loss, problem.model
    )
    ways = _rivals_jax.ours(problem) + _rivals_jax.plain(problem, CHUNK)
    ways += _rivals_jax.estimators(problem) + _rivals_torch.ways(problem)
    empty = {"units": "–", "MB": "–", "compile s": "–", "relative error": "–", "note": ""}
    rows = []
    for way in sorted(ways, key=lambda way: QUESTIONS.index(way.question)):
        library = version_of(way.package)
        row = {
            "D": reference.size,
            "n": size[2],
            "what": way.question,
            "way": way.name,
            "library": library or way.package,
            **empty,
        }
        if library is None:
            row["note"] = "not installed"
        else:
            try:
                row |= measure(way, unit, reference, size[2], repeats)
            except NotFeasible as error:
                row["note"] = str(error)
        rows.append(row)
        print(_harness.table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def main() -> None:
    arguments = _harness.options(__doc__)
    sizes = [(3, 8, CHUNK)] if arguments.smoke else SIZES
    rows = [row for size in sizes for row in compare(size, arguments.repeats)]
    _harness.write("alternatives", __doc__.splitlines()[0], rows, arguments)


if __name__ == "__main__":
    main()
