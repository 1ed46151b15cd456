"""The report on a network that a user has trained."""

import argparse
import pathlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import manifoldflow as mf
from manifoldflow._command._lookup import failed, looked_up
from manifoldflow._command._loss import CROSS_ENTROPY, how_well, loss_of, Network, SQUARES
from manifoldflow._command._trained_on import trained_on
from manifoldflow._command._waiting import Waiting
from manifoldflow._command._weights import with_weights

FORMATS = ".png", ".pdf", ".svg"


def run(options: argparse.Namespace) -> None:
    """Build the network, read its weights and its data, measure, and print the table."""
    _check(options)
    network = _built(options.model)
    if options.file is not None:
        network = network._replace(point=with_weights(options.file, network.point, options.model))
    own = looked_up("--loss", options.loss) if ":" in (options.loss or "") else None
    data = trained_on(options)
    loss = loss_of(options, network, data, own)
    if options.batch_size > loss.num_examples:
        raise ValueError(
            f"--batch-size must be at most {loss.num_examples}, the number of examples; got "
            f"{options.batch_size}."
        )
    if own is None:
        print(how_well(loss, network.point, data))
    with Waiting("compiling and measuring"):
        found = mf.report(
            loss,
            network.point,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
            seconds=options.seconds,
            key=jr.key(options.seed),
        )
    print(f"\n{found}")
    if options.save is not None:
        _draw(found, options.save)


def _check(options: argparse.Namespace) -> None:
    """Refuses what can be refused before anything is imported."""
    if options.model is None:
        raise ValueError(
            "a report needs --model MODULE:FUNCTION, what builds the network, e.g. --model "
            "train:build for `build` in train.py."
        )
    if options.data is None:
        raise ValueError(
            "a report needs --data, what the network was trained on: a .csv or a .npz file, or "
            "digits."
        )
    if options.loss not in (None, SQUARES, CROSS_ENTROPY) and ":" not in options.loss:
        raise ValueError(
            f"--loss must be {SQUARES}, {CROSS_ENTROPY}, or MODULE:FUNCTION of your own; got "
            f"{options.loss}."
        )
    save: pathlib.Path | None = options.save
    if save is not None and save.suffix.lower() not in FORMATS:
        raise ValueError(f"--save must end in {', '.join(FORMATS)}; got {save}.")
    if save is not None and not save.parent.is_dir():
        raise ValueError(f"--save {save}: there is no folder {save.parent}.")


def _built(place: str) -> Network:
    build = looked_up("--model", place)
    try:
        made = build()
    except Exception as error:
        raise failed(f"--model {place}, called without arguments,", error) from error
    point, predict = made, None
    if isinstance(made, tuple) and len(made) == 2 and callable(made[1]):
        point, predict = made
    elif not callable(made):
        raise ValueError(
            f"--model {place} returned a {type(made).__name__}, which cannot be called; return a "
            "model such as equinox.nn.MLP, or a pair: the weights, and predict(weights, x)."
        )
    if not any(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(point)):
        raise ValueError(f"--model {place} returned a {type(point).__name__} without weights.")
    return Network(jax.tree.map(_in_default_precision, point), predict)


def _in_default_precision(leaf: Any) -> Any:
    """Leaves of several precisions would leave the rounding of the least one in the numbers."""
    is_wide = eqx.is_inexact_array(leaf) and leaf.dtype in (jnp.float32, jnp.float64)
    return leaf.astype(jnp.result_type(float)) if is_wide else leaf


def _draw(found: mf.diagnostics.Report, path: pathlib.Path) -> None:
    try:
        from manifoldflow import plotting
    except ImportError:
        print("no picture: python -m pip install 'manifoldflow[plot]'")
        return
    plotting.plot_report(found).savefig(path, dpi=150)
    print(f"picture in {path}")
