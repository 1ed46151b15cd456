"""The loss of a network that a user has trained, on the data that were read."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import manifoldflow as mf
from manifoldflow._command._lookup import failed
from manifoldflow._command._trained_on import TrainedOn
from manifoldflow.losses import AbstractExampleLoss

SQUARES, CROSS_ENTROPY = "squares", "cross-entropy"

LossFn = Callable[[Any, Any], Any]


class Network(NamedTuple):
    """The network that `--model` builds.

    Attributes:
        point: the model, or its weights.
        predict: `predict(point, x)`; None for `point(x)`.
    """

    point: Any
    predict: Callable[[Any, Any], Any] | None


def loss_of(
    options: argparse.Namespace, network: Network, data: TrainedOn, own: LossFn | None
) -> AbstractExampleLoss:
    """The loss that `--loss` names, or one that suits the targets; says which.

    Raises:
        ValueError: outputs, targets and loss that do not fit, in one sentence.
    """
    shape = _output_shape(options, network, data.inputs)
    if own is not None:
        return _of_ones_own(options, network, data, own)
    kind = options.loss or (CROSS_ENTROPY if data.is_classes else SQUARES)
    if data.is_classes:
        _check_outputs(options, data.targets, shape)
    elif kind == CROSS_ENTROPY:
        raise ValueError(
            f"--loss {CROSS_ENTROPY} needs classes; the targets are numbers. Use --loss {SQUARES}, "
            "or --task classification if they are labels."
        )
    if kind == CROSS_ENTROPY:
        print(f"loss: {CROSS_ENTROPY} of {shape[0]} outputs, the mean over examples")
        softmax: Any = optax.softmax_cross_entropy_with_integer_labels  # types differ by version
        return mf.PerExampleLoss(data.inputs, data.targets, softmax, predict=network.predict)
    targets, what = data.targets, ""
    if data.is_classes:
        targets, what = jax.nn.one_hot(targets, shape[0]), ", labels as one-hot targets"
    elif targets[0].size != np.prod(shape):
        raise ValueError(
            f"the network has outputs of shape {shape}, and {options.data} has {targets[0].size} "
            "target(s) for each. Build the network that was trained on them, or choose other "
            "targets (--target, --task)."
        )
    print(f"loss: half the mean square{what}")
    return mf.LeastSquares(data.inputs, targets.reshape(-1, *shape), predict=network.predict)


def how_well(loss: AbstractExampleLoss, point: Any, data: TrainedOn) -> str:
    """The numbers that show whether these are the data, and the units, that the network knows."""
    outputs = np.asarray(loss.outputs(point), float).reshape(len(data.targets), -1)
    targets = np.asarray(data.targets)
    if data.is_classes:
        right = np.mean(np.argmax(outputs, axis=1) == targets)
        return f"{right:.1%} of the labels right; the commonest one is {_commonest(targets):.1%}"
    spread = np.mean(np.var(targets, axis=0))
    error = np.mean((outputs - targets) ** 2)
    return f"mean square error {error:.3g}; that of guessing the mean is {spread:.3g}"


def _commonest(labels: np.ndarray) -> float:
    return np.unique(labels, return_counts=True)[1].max() / len(labels)


def _output_shape(options: argparse.Namespace, network: Network, inputs: Array) -> tuple[int, ...]:
    """The output shape of one example, by a loss without targets."""
    probe = mf.PerExampleLoss(inputs, jnp.zeros(len(inputs)), _nothing, predict=network.predict)
    try:
        outputs = eqx.filter_eval_shape(lambda loss, point: loss.outputs(point), probe, network[0])
    except ValueError as error:
        raise ValueError(f"{options.model} on {options.data}: {error}") from error
    except Exception as error:
        raise failed(f"the network on an example of {options.data}", error) from error
    return outputs.shape[1:]


def _nothing(output: Any, target: Any) -> Any:
    return 0.0 * target


def _of_ones_own(
    options: argparse.Namespace, network: Network, data: TrainedOn, own: LossFn
) -> AbstractExampleLoss:
    targets = data.targets
    if not data.is_classes and targets.shape[1] == 1:
        targets = targets[:, 0]
    loss = mf.PerExampleLoss(data.inputs, targets, own, predict=network.predict)
    try:
        eqx.filter_eval_shape(lambda loss, point: loss(point), loss, network.point)
    except ValueError as error:
        raise ValueError(f"--loss {options.loss}: {error}") from error
    except Exception as error:
        raise failed(f"--loss {options.loss}", error) from error
    print(f"loss: {options.loss}, the mean over examples")
    return loss


def _check_outputs(options: argparse.Namespace, labels: Array, shape: tuple[int, ...]) -> None:
    """Refuses a network without an output for every label."""
    least, most = int(jnp.min(labels)), int(jnp.max(labels))
    if len(shape) != 1 or shape == (1,):
        raise ValueError(
            f"labels need a network with an output for each class, of shape ({most + 1},); it has "
            f"{shape}. Use --task regression if it fits the labels as numbers, or --loss "
            "MODULE:FUNCTION of your own."
        )
    if 0 <= least and most < shape[0]:
        return
    from_one = least == 1 and most == shape[0]
    raise ValueError(
        f"{options.data}: labels from {least} to {most} are out of range for {shape[0]} outputs, "
        f"which are labels 0 to {shape[0] - 1}. "
        + ("Count them from 0." if from_one else "Build the network that was trained on them, or ")
        + ("" if from_one else "choose other targets (--target, --task regression).")
    )
