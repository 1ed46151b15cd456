"""Grokking: a network that fits learns to add by weight decay, at zero training loss."""

import argparse
import math
import time
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import tree
from jaxtyping import Array

import manifoldflow as mf
from manifoldflow import _tree
from manifoldflow._command._landed import checkpoint_of, Landed
from manifoldflow._command._sizes import check_sizes
from manifoldflow._command._solved import solved
from manifoldflow._command._spectrum import concentration
from manifoldflow._command._table import WalkTable
from manifoldflow._command._waiting import Waiting

# Loose: what is shown changes by less than a pixel, and the loss is zero at every step anyway.
LANDING_RTOL = 1e-4
RTOL, ATOL = 1e-3, 1e-5


def run(options: argparse.Namespace) -> None:
    """Land, walk by weight decay, and save what came out."""
    began = time.perf_counter()
    model = _model(options)
    p, loss, initial = model.modulus, model.loss, model.initial(jr.key(options.seed))
    print(
        f"a + b mod {p}: {len(model.train)} of {p * p} pairs to train on, the other "
        f"{len(model.test)} to test with\nnetwork V (W x)² with {model.width} units: "
        f"{_tree.size(initial)} weights, {loss.num_residuals} residuals",
        flush=True,
    )
    start = _start(options, loss, initial)
    walk = _walked(options, model, start)
    num_pairs = _save(options, model, walk, start)
    checkpoint_of(options.out).unlink()  # the walk is whole and saved: nothing to go on from
    _say_what_happened(model, walk, start)
    print(f"{time.perf_counter() - began:.0f} s; {num_pairs} in {options.out}/")


def _model(options: argparse.Namespace) -> mf.models.ModularAddition:
    if not 0 < options.train_fraction < 1:
        raise ValueError(f"--train-fraction must be between 0 and 1; got {options.train_fraction}.")
    p, width = options.modulus, options.width
    fraction = options.train_fraction
    num_residuals = max(1, int(fraction * p * p)) * p

    def fewer(most: int) -> str:
        # fraction·p³ residuals, 3·p·width weights
        return f"--modulus {max(2, int(min((most / fraction) ** (1 / 3), _widest(options))))}"

    check_sizes(
        num_residuals,
        3 * p * width,
        4 if options.float32 else 8,
        fewer=fewer,
        wider=f"--width {num_residuals // (3 * p) + 1} or more",
    )
    return mf.models.ModularAddition(p, width, options.train_fraction, seed=options.seed)


def _widest(options: argparse.Namespace) -> float:
    """The largest modulus for which a network of this width has more weights than residuals."""
    return math.sqrt(3 * options.width / options.train_fraction)


def _start(options: argparse.Namespace, loss: mf.LeastSquares, initial: Any) -> Any:
    landed = Landed(options.out, loss, initial, LANDING_RTOL)
    start = landed.found(initial)
    if start is not None:
        print(f"landed by an earlier call: {landed.path}\n")
        return start
    with Waiting("compiling the gradient flow, and training by it to zero loss"):
        start, info = mf.limit_map_with_info(loss, initial, rtol=LANDING_RTOL)
        is_there = bool(info.is_successful)
    if not is_there:
        raise ValueError(
            "training did not fit: gradient flow from the initial weights finds no network that "
            "fits all training pairs. Use a wider model (--width), or another --seed."
        )
    landed.keep(start)
    print(f"trained by gradient flow: loss {float(loss(start)):.1e}\n")
    return start


def _half_square(point: Any) -> Array:
    """½‖θ‖², which weight decay lowers."""
    return sum((jnp.sum(leaf**2) for leaf in tree.leaves(point)), jnp.zeros(())) / 2


def _walked(
    options: argparse.Namespace, model: mf.models.ModularAddition, start: Any
) -> mf.Solution:
    loss = model.loss
    with Waiting("compiling the walk, and walking") as waiting:
        columns = {
            "time": ("limit time", ".3g"),
            "loss": ("training loss", ".1e"),
            "half_square": ("½‖θ‖²", ".2f"),
            "sharpness": ("tr∇²L", ".3f"),
            "train": ("training accuracy", ".3f"),
            "test": ("test accuracy", ".3f"),
        }
        table = mf.LiveTable(columns, end_time=options.end_time)
        return solved(
            mf.WeightDecayFlow(model.manifold),
            start,
            end_time=options.end_time,
            num_saves=options.saves,
            rtol=RTOL,
            atol=ATOL,
            observe={
                "loss": loss,
                "half_square": _half_square,
                "sharpness": loss.trace_gauss_newton,
                "train": model.train_accuracy,
                "test": model.test_accuracy,
            },
            progress=WalkTable(table, waiting),
            checkpoint=checkpoint_of(options.out),
        )


def _say_what_happened(model: mf.models.ModularAddition, walk: mf.Solution, start: Any) -> None:
    test, loss = walk.observables["test"], walk.observables["loss"]
    before, after = (concentration(model.modulus, point) for point in (start, walk.final))
    print(
        f"\ntest accuracy {float(test[0]):.2f} → {float(test[-1]):.2f}, while the training loss "
        f"stayed below {float(jnp.max(loss)) * 1.05:.0e}; of a unit's weights, {before:.0%} → "
        f"{after:.0%} are waves of one frequency"
    )


def _save(
    options: argparse.Namespace, model: mf.models.ModularAddition, walk: mf.Solution, start: Any
) -> str:
    """The path as .npz, the picture as .png; returns what was saved."""
    weights = {name: leaf for name, leaf in walk.points.items()}
    np.savez(options.out / "walk.npz", times=walk.times, **weights, **walk.observables)
    try:
        from manifoldflow._command._picture import plot_grokking
    except ImportError:
        print("no picture: python -m pip install 'manifoldflow[plot]'")
        return "the path is"
    figure = plot_grokking(model, walk, start)
    figure.savefig(options.out / "grokking.png", dpi=160)
    return "picture and path are"
