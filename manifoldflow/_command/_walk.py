"""The walk of a network that fits examples, along the manifold of perfect fits."""

import argparse
import time
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

import manifoldflow as mf
from manifoldflow import _tree
from manifoldflow._command._landed import checkpoint_of, Landed
from manifoldflow._command._limit import check_limit, end_time_of, flow_of
from manifoldflow._command._network import landed_network, network, NUM_STEPS, performance
from manifoldflow._command._problem import Problem, problem_of
from manifoldflow._command._sizes import check_sizes
from manifoldflow._command._solved import solved
from manifoldflow._command._table import WalkTable
from manifoldflow._command._waiting import Waiting


def run(options: argparse.Namespace) -> None:
    """Train, land, walk, and save what came out."""
    began = time.perf_counter()
    check_limit(options)
    problem = problem_of(options)
    model = network(*problem.train, options)
    loss = mf.LeastSquares(*problem.train)
    coordinates, _ = loss.split(model)
    _check_sizes(options, problem, _tree.size(coordinates), _tree.dtype_of(coordinates).itemsize)
    manifold = mf.ZeroLossManifold(loss)
    with Waiting("compiling, and measuring the manifold"):
        dimension = manifold.dimension(model)
    print(
        f"{len(loss.targets)} examples, {loss.num_residuals} residuals, "
        f"{_tree.size(coordinates)} parameters, manifold of dimension {dimension}"
    )
    flow = flow_of(options, manifold)
    if isinstance(flow, mf.LimitDiffusion):
        print(flow.equation)
    start = _start(options, loss, model)
    walk = _walked(options, problem, flow, start)
    _save(options, problem, loss, walk, start)
    checkpoint_of(options.out).unlink()  # the walk is whole and saved: nothing to go on from
    _say_what_happened(problem, walk)
    print(f"{time.perf_counter() - began:.0f} s; picture, network and path are in {options.out}/")


def _check_sizes(
    options: argparse.Namespace, problem: Problem, num_coordinates: int, itemsize: int
) -> None:
    inputs, targets = problem.train
    num_outputs = targets.shape[1]

    def fewer(most: int) -> str:
        count = most // num_outputs
        return f"--examples {count}" if count else f"fewer than {num_outputs} outputs"

    per_unit = inputs.shape[1] + 1 + num_outputs
    enough = max(0, targets.size - num_outputs) // per_unit + 1
    check_sizes(
        targets.size, num_coordinates, itemsize, fewer=fewer, wider=f"--width {enough} or more"
    )


def _start(options: argparse.Namespace, loss: mf.LeastSquares, model: eqx.nn.MLP) -> eqx.nn.MLP:
    """The start of the walk: from an earlier call of the same command, or trained."""
    landed = Landed(options.out, loss, model, NUM_STEPS)
    start = landed.found(model)
    if start is not None:
        print(f"landed by an earlier call: {landed.path}\n")
        return start
    start = landed_network(loss, model, options.no_standardise)
    landed.keep(start)
    print(f"landed on the manifold: loss {float(loss(start)):.1e}\n")
    return start


def _walked(
    options: argparse.Namespace, problem: Problem, flow: mf.AbstractFlow, start: eqx.nn.MLP
) -> mf.Solution:
    manifold: Any = flow.manifold
    loss, end_time = manifold.loss, end_time_of(options, manifold, start)
    is_stochastic = getattr(flow, "is_stochastic", False)
    with Waiting("compiling the walk, and walking") as waiting:
        columns = {
            "time": ("limit time", ".3g"),
            "loss": ("loss", ".1e"),
            "sharpness": ("tr∇²L", ".3f"),
            "gradient_norm": ("‖P∇tr‖", ".3f"),
            "walked": ("walked", ".3f"),
            "test": (problem.measure, ".3f"),
        }
        table = mf.LiveTable(columns, end_time=end_time)
        return solved(
            flow,
            start,
            end_time=end_time,
            num_saves=options.saves,
            step_size=end_time / options.steps if is_stochastic else None,
            key=jr.key(options.seed) if is_stochastic else None,
            observe={
                "loss": loss,
                "sharpness": loss.trace_gauss_newton,
                "gradient_norm": _GradientNorm(manifold),
                "test": performance(*problem.test, problem.is_classes),
            },
            progress=WalkTable(table, waiting),
            checkpoint=checkpoint_of(options.out),
        )


class _GradientNorm(eqx.Module):
    """‖P∇tr∇²L‖: zero where the walk of label noise ends."""

    manifold: mf.ZeroLossManifold

    def __call__(self, point: Any) -> Array:
        sharpness = self.manifold.loss.trace_gauss_newton
        return _tree.norm(mf.riemannian_gradient(self.manifold, sharpness, point))


def _say_what_happened(problem: Problem, walk: mf.Solution) -> None:
    sharpness, test = walk.observables["sharpness"], walk.observables["test"]
    best = int(jnp.argmax(test) if problem.is_classes else jnp.argmin(test))
    print(
        f"\ntr∇²L {float(sharpness[0]):.2f} → {float(sharpness[-1]):.2f}; {problem.measure} "
        f"{float(test[0]):.3f} → {float(test[-1]):.3f} (best {float(test[best]):.3f} at limit "
        f"time {float(walk.times[best]):.3g}); largest defect {float(walk.stats['max_defect']):.0e}"
    )


def _save(
    options: argparse.Namespace,
    problem: Problem,
    loss: mf.LeastSquares,
    walk: mf.Solution,
    start: eqx.nn.MLP,
) -> None:
    """The network as .eqx, the path as .npz, the picture as .png."""
    eqx.tree_serialise_leaves(options.out / "network.eqx", walk.final)
    spectra = [
        np.linalg.eigvalsh(np.asarray(loss.scale * loss.jacobian(model).gram()))
        for model in (start, walk.final)
    ]
    np.savez(
        options.out / "walk.npz",
        times=walk.times,
        spectrum_before=spectra[0],
        spectrum_after=spectra[1],
        **walk.observables,
    )
    try:
        from manifoldflow.plotting import plot_walk
    except ImportError:
        print("no picture: python -m pip install 'manifoldflow[plot]'")
        return
    figure = plot_walk(
        walk,
        test="test",
        test_label=problem.measure,
        spectra=(spectra[0], spectra[1]),
        caption=_caption(options, problem, loss),
    )
    sharpness = walk.observables["sharpness"]
    legend: Any = figure.axes[0].get_legend()
    if sharpness[-1] > sharpness[0]:  # the legend stands where it rises to
        legend.set_loc("lower right")
    if options.noise == "none":
        figure.axes[0].set_xlabel("time  Σ ηλ  (steps × learning rate × weight decay)")
    figure.savefig(options.out / "walk.png", dpi=150)


def _caption(options: argparse.Namespace, problem: Problem, loss: mf.LeastSquares) -> str:
    movers = {
        "label": f"the small-step limit of label noise in {options.update}",
        "isotropic": f"the small-step limit of isotropic noise in {options.update}",
        "none": "weight decay alone",
    }
    return (
        f"An MLP with {options.width} tanh units that fits {len(loss.targets)} examples exactly, "
        f"moved by {movers[options.noise]}. Left: the sharpness along the way, while the training "
        f"loss stays zero; the {problem.measure} is measured on examples never trained on. Right: "
        "the curvature before and after, eigenvalue by eigenvalue."
    )
