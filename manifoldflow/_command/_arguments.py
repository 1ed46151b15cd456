"""The options of the command line, and their refusals in one sentence."""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from manifoldflow._command import _doctor, _grok, _report, _walk
from manifoldflow._command._builtin import BUILTIN

WALK_ONLY = "--data", "--examples", "--init-scale"
LEAST = (
    ("examples", 1), ("width", 1), ("steps", 1), ("saves", 1), ("modulus", 2), ("batch_size", 1),
)  # fmt: skip
ABOUT = """\
Where training goes after the loss is zero.

python -m manifoldflow        addition modulo p: a network that fits its training pairs learns to
                              add by weight decay alone, while its training loss stays zero
python -m manifoldflow walk   the same question for data of your own: a small network is trained to
                              zero loss and follows the limit of SGD from there
python -m manifoldflow report what is known about a network that you have trained: flatness, noise,
                              and whether a learning rate suits it
python -m manifoldflow doctor first aid: versions, devices, precision, threads, compiled programs
                              and a self-test, with what is wrong and how to mend it
"""
EXAMPLES = """\
examples:
  python -m manifoldflow
  python -m manifoldflow --seed 1 --out another
  python -m manifoldflow walk --data digits
  python -m manifoldflow walk --data table.csv --target price
  python -m manifoldflow walk --data arrays.npz --noise none        weight decay alone
  python -m manifoldflow walk --help
  python -m manifoldflow report --help
  python -m manifoldflow doctor
"""
ABOUT_WALK = """\
Trains an MLP with one hidden layer of tanh units on some of your examples, to zero loss, and walks
it along the manifold of perfect fits as SGD does in the limit of small steps. What the walk does to
it is measured on the other examples.
"""
EXAMPLES_WALK = """\
examples:
  python -m manifoldflow walk --data digits
  python -m manifoldflow walk --data table.csv --target price --drop id
  python -m manifoldflow walk --data arrays.npz --examples 100 --width 128
  python -m manifoldflow walk --data iris --update sgd:momentum=0.9 --weight-decay 0.1
  python -m manifoldflow walk --data diabetes --noise isotropic
"""
ABOUT_REPORT = """\
What is known about a trained network, in one table: loss, sharpness, gradient noise, the largest
stable learning rate, and what SGD does to it from there. The data are given to it as they are.
"""
EXAMPLES_REPORT = """\
examples, with a function `build` in train.py that builds the network:
  python -m manifoldflow report net.eqx --model train:build --data digits
  python -m manifoldflow report net.eqx --model train:build --data table.csv --target price
  python -m manifoldflow report leaves.npz --model train:build --data digits --learning-rate 0.1
  python -m manifoldflow report --model train:build --data digits --save report.png
  python -m manifoldflow report net.eqx --model train:build --data counts.csv --loss train:poisson

train.py is imported, so what trains in it should stand below `if __name__ == "__main__":`.
"""
ABOUT_DOCTOR = """\
Examines this installation: versions, devices, precision, threads, the folder of compiled programs,
factorisations that can hang, and a small walk whose result is known. Prints what a report of a bug
should have, without names of users and home folders. The exit status is 1 if something is wrong.
"""
EXAMPLES_DOCTOR = """\
examples:
  python -m manifoldflow doctor
  JAX_ENABLE_X64=1 python -m manifoldflow doctor                    with these settings
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise ValueError(f"{message}; `{self.prog} --help` lists what there is.")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with `run` in them: what to do with them."""
    names = [argument.partition("=")[0] for argument in arguments]
    if arguments and arguments[0] == "walk":
        options = _walk_parser().parse_args(arguments[1:])
    elif arguments and arguments[0] == "report":
        options = _report_parser().parse_args(arguments[1:])
    elif arguments and arguments[0] == "doctor":
        options = _doctor_parser().parse_args(arguments[1:])
    elif any(name in WALK_ONLY for name in names):
        print(
            "manifoldflow: these are options of `walk`, which is done; type "
            f"`python -m manifoldflow walk {' '.join(arguments)}` from now on.",
            file=sys.stderr,
        )
        options = _walk_parser().parse_args(arguments)
    else:
        options = _grok_parser().parse_args(arguments)
        if options.command:
            raise ValueError(f"{options.command} must come first: manifoldflow {options.command} …")
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    for name, least in LEAST:
        value = getattr(options, name, None)
        if value is not None and value < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least {least}; got {value}.")
    for name in ("end_time", "init_scale", "learning_rate", "seconds"):
        value = getattr(options, name, None)
        if value is not None and not 0 < value < float("inf"):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be positive and finite; got {value}.")
    decay = getattr(options, "weight_decay", None)
    if decay is not None and not 0 <= decay < float("inf"):
        raise ValueError(f"--weight-decay must be finite and not negative; got {decay}.")
    if "seed" in options and not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to 2^32 − 1; got {options.seed}.")


def _bare_parser(name: str, about: str, examples: str) -> _Parser:
    return _Parser(
        prog=name,
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _parser(name: str, about: str, examples: str) -> _Parser:
    parser = _bare_parser(name, about, examples)
    add = parser.add_argument
    add("--seed", type=int, default=0, metavar="K", help="of all that is drawn (default: 0)")
    add("--float32", action="store_true", help="single precision (default: double)")
    return parser


def _add_saves(parser: _Parser, folder: str, saves: int) -> None:
    add = parser.add_argument
    out = f"folder for the picture, the path and what to go on from (default: {folder}/)"
    add("--out", type=pathlib.Path, default=pathlib.Path(folder), metavar="FOLDER", help=out)
    rows = f"rows of the table, beside the start (default: {saves})"
    add("--saves", type=int, default=saves, metavar="K", help=rows)


def _grok_parser() -> _Parser:
    parser = _parser("manifoldflow", ABOUT, EXAMPLES)
    _add_saves(parser, "grokking", 20)
    parser.set_defaults(run=lambda options: _grok.run(options))
    other = "see `python -m manifoldflow walk --help`, and so on"
    parser.add_argument("command", nargs="?", choices=["walk", "report", "doctor"], help=other)
    add = parser.add_argument_group("addition modulo p").add_argument
    add("--modulus", type=int, default=11, metavar="P", help="p of a + b mod p (default: 11)")
    add("--width", type=int, default=96, metavar="M", help="hidden units (default: 96)")
    add("--train-fraction", type=float, default=0.8, metavar="F",
        help="part of the p² pairs to train on (default: 0.8)")  # fmt: skip
    add("--end-time", type=float, default=6.0, metavar="T",
        help="steps × learning rate × weight decay to walk for (default: 6)")  # fmt: skip
    return parser


def _walk_parser() -> _Parser:
    parser = _parser("manifoldflow walk", ABOUT_WALK, EXAMPLES_WALK)
    _add_saves(parser, "walk", 25)
    parser.set_defaults(run=lambda options: _walk.run(options))
    _add_data(parser.add_argument_group("the data"))
    _add_network(parser.add_argument_group("the network"))
    _add_limit(parser.add_argument_group("the walk"))
    return parser


def _report_parser() -> _Parser:
    parser = _parser("manifoldflow report", ABOUT_REPORT, EXAMPLES_REPORT)
    parser.set_defaults(run=lambda options: _report.run(options))
    _add_model(parser.add_argument_group("the network"))
    data = parser.add_argument_group("the data that it was trained on")
    _add_columns(data, None)
    data.add_argument("--examples", type=int, metavar="N",
        help="so many of the rows, the same as `walk` trains on with this --seed (default: all; of "
        "digits, the 1000 of `models.digits`)")  # fmt: skip
    data.add_argument("--standardise", dest="no_standardise", action="store_false",
        help="inputs and regression targets to mean 0 and standard deviation 1, as `walk` does "
        "(default: as they are)")  # fmt: skip
    _add_judged(parser.add_argument_group("what is asked"))
    return parser


def _doctor_parser() -> _Parser:
    parser = _bare_parser("manifoldflow doctor", ABOUT_DOCTOR, EXAMPLES_DOCTOR)
    parser.set_defaults(run=lambda options: _doctor.run(options))
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("file", nargs="?", type=pathlib.Path, metavar="MODEL",
        help="its weights: .eqx of equinox.tree_serialise_leaves, or .npz of arrays, in the order "
        "of the leaves or named as they are (default: the network as it is built)")  # fmt: skip
    add("--model", metavar="MODULE:FUNCTION",
        help="what builds it, called without arguments; the module may lie in this folder. A "
        "network that cannot be called comes as a pair: its weights, and predict(weights, "
        "x)")  # fmt: skip


def _add_judged(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--loss", metavar="NAME",
        help="squares, cross-entropy, or MODULE:FUNCTION of the output and the target of one "
        "example (default: cross-entropy of classes, squares of numbers)")  # fmt: skip
    add("--learning-rate", type=float, metavar="η", help="of SGD, to be judged")
    add("--batch-size", type=int, default=1, metavar="B", help="of SGD (default: 1)")
    add("--seconds", type=float, default=10.0, metavar="s",
        help="about the time that sampling may take, compilation aside (default: 10)")  # fmt: skip
    add("--save", type=pathlib.Path, metavar="FIGURE.png", help="draw the report as well")


def _add_data(group: argparse._ArgumentGroup) -> None:
    _add_columns(group, "digits")
    add = group.add_argument
    add("--examples", type=int, metavar="N",
        help="examples to train on; the others test (default: four fifths of all, at most "
        "50)")  # fmt: skip
    add("--no-standardise", action="store_true",
        help="take inputs and regression targets as they are (default: mean 0 and standard "
        "deviation 1 on the training examples)")  # fmt: skip


def _add_columns(group: argparse._ArgumentGroup, default: str | None) -> None:
    add = group.add_argument
    shown = f" (default: {default})" if default else ""
    add("--data", default=default, metavar="FILE",
        help=f"a .csv or .npz file, or one of {', '.join(BUILTIN)}, which come with scikit-learn"
        f"{shown}. In .csv the last column is the target; .npz has arrays inputs and "
        "targets, X and y, data and target, or features and labels")  # fmt: skip
    add("--target", metavar="NAME", help="another column (its name, or number from 1) or array")
    add("--drop", action="append", default=[], metavar="NAME",
        help="leave out an input column; may be repeated")  # fmt: skip
    add("--task", choices=["regression", "classification"],
        help="what the targets are (default: guessed, and said)")  # fmt: skip


def _add_network(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--width", type=int, default=64, metavar="M", help="hidden tanh units (default: 64)")
    add("--init-scale", type=float, default=1.0, metavar="S",
        help="factor on the initial weights (default: 1)")  # fmt: skip


def _add_limit(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--noise", choices=["label", "isotropic", "none"], default="label",
        help="of the gradient: noise in the labels, the same in all weights, or none, which leaves "
        "weight decay alone (default: label)")  # fmt: skip
    add("--update", default="sgd", metavar="NAME[:OPTION=VALUE,…]",
        help="the optimiser, of manifoldflow.updates (default: sgd)")  # fmt: skip
    add("--weight-decay", type=float, metavar="W",
        help="decoupled, over the learning rate (default: 0)")  # fmt: skip
    add("--end-time", type=float, metavar="T",
        help="on the clock of the limit (default: 200; without noise 4; with isotropic noise as "
        "long as it takes to go half the length of the weights)")  # fmt: skip
    add("--steps", type=int, default=200, metavar="K",
        help="of walks with isotropic noise, from start to end (default: 200)")  # fmt: skip
