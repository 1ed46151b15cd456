"""The limit that a walk follows: noise, optimiser, weight decay."""

import argparse
import inspect
from typing import Any

from manifoldflow import _tree, updates
from manifoldflow._command._examples import some
from manifoldflow.flows import AbstractFlow, LimitDiffusion, WeightDecayFlow
from manifoldflow.manifolds import ZeroLossManifold
from manifoldflow.noise import IsotropicNoise, LabelNoise

END_TIMES = {"label": 200.0, "none": 4.0}


def check_limit(options: argparse.Namespace) -> None:
    """Refuse names and numbers before anything is computed."""
    if options.noise == "none":
        if options.update != "sgd" or options.weight_decay is not None:
            raise ValueError(
                "--noise none is the limit of weight decay alone, whatever its size; leave out "
                "--update and --weight-decay, or take --noise label."
            )
        return
    update_of(options)


def flow_of(options: argparse.Namespace, manifold: ZeroLossManifold) -> AbstractFlow:
    """The limit that was asked for."""
    if options.noise == "none":
        return WeightDecayFlow(manifold)
    noise = LabelNoise(std=1.0, batch_size=1) if options.noise == "label" else IsotropicNoise(1.0)
    return LimitDiffusion(manifold, noise, update_of(options))


def end_time_of(options: argparse.Namespace, manifold: ZeroLossManifold, start: Any) -> float:
    """The length of the walk, in the time of the limit."""
    if options.end_time is not None:
        return options.end_time
    if options.noise in END_TIMES:
        return END_TIMES[options.noise]
    # |Y(t) − Y(0)|² is about t times the dimension.
    coordinates, _ = manifold.split(start)
    return float(_tree.norm(coordinates)) ** 2 / (4 * manifold.dimension(start))


def update_of(options: argparse.Namespace) -> updates.AbstractUpdate:
    """`sgd:momentum=0.9` is `updates.SGD(momentum=0.9)`, and so for all others there."""
    name, _, rest = options.update.partition(":")
    known = known_updates()
    if name.lower() not in known:
        raise ValueError(f"--update must be one of {some(sorted(known))}; got {name}.")
    cls = known[name.lower()]
    values = dict(_value(name, part) for part in rest.split(",") if part)
    if options.weight_decay is not None:
        values["weight_decay"] = options.weight_decay
    parameters = inspect.signature(cls).parameters
    for value in values:
        if value not in parameters:
            option = "--weight-decay" if value == "weight_decay" else f"option {value}"
            raise ValueError(
                f"--update {name} has no {option}; it has {some(list(parameters)) or 'none'}."
            )
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in values]
    if missing:
        raise ValueError(
            f"--update {name} needs {some(missing)}; write --update {name}:{missing[0]}=NUMBER."
        )
    return cls(**values)


def known_updates() -> dict[str, Any]:
    """The optimisers in `manifoldflow.updates`, by their names in small letters."""
    found = {name: cls for name, cls in vars(updates).items() if isinstance(cls, type)}
    return {
        name.lower(): cls
        for name, cls in found.items()
        if issubclass(cls, updates.AbstractUpdate) and not inspect.isabstract(cls)
    }


def _value(name: str, part: str) -> tuple[str, Any]:
    option, _, text = part.partition("=")
    known: dict[str, Any] = {"true": True, "false": False}
    if text.lower() in known:
        return option, known[text.lower()]
    try:
        number = float(text)
    except ValueError:
        return option, _word(name, part, text)
    return option, int(number) if text.isdecimal() else number


def _word(name: str, part: str, text: str) -> str:
    if not text.isidentifier():
        raise ValueError(
            f"--update {name}: options are written as NAME=VALUE, joined by commas; got {part}."
        )
    return text
