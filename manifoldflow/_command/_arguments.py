"""What can be asked for, and its refusals in one sentence."""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from manifoldflow._command import _grok, _walk
from manifoldflow._command._builtin import BUILTIN

WALK_ONLY = "--data", "--examples", "--init-scale"
ABOUT = """\
Where training goes after the loss is zero.

python -m manifoldflow        addition modulo p: a network that fits its training pairs learns to
                              add by weight decay alone, while its training loss stays zero
python -m manifoldflow walk   the same question for data of your own: a small network is trained to
                              zero loss and follows the limit of SGD from there
"""
EXAMPLES = """\
examples:
  python -m manifoldflow
  python -m manifoldflow --seed 1 --out another
  python -m manifoldflow walk --data digits
  python -m manifoldflow walk --data table.csv --target price
  python -m manifoldflow walk --data arrays.npz --noise none        weight decay alone
  python -m manifoldflow walk --help
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise ValueError(f"{message}; `{self.prog} --help` lists what there is.")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with `run` in them: what to do with them."""
    names = [argument.partition("=")[0] for argument in arguments]
    if arguments and arguments[0] == "walk":
        options = _walk_parser().parse_args(arguments[1:])
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
    for name, least in (("examples", 1), ("width", 1), ("steps", 1), ("saves", 1), ("modulus", 2)):
        value = getattr(options, name, None)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}; got {value}.")
    for name in ("end_time", "init_scale"):
        value = getattr(options, name, None)
        if value is not None and not 0 < value < float("inf"):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be positive and finite; got {value}.")
    decay = getattr(options, "weight_decay", None)
    if decay is not None and not 0 <= decay < float("inf"):
        raise ValueError(f"--weight-decay must be finite and not negative; got {decay}.")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to 2^32 − 1; got {options.seed}.")


def _parser(name: str, about: str, examples: str, folder: str, saves: int) -> _Parser:
    parser = _Parser(
        prog=name,
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    out = f"folder for the picture, the path and what to go on from (default: {folder}/)"
    add("--out", type=pathlib.Path, default=pathlib.Path(folder), metavar="FOLDER", help=out)
    add("--seed", type=int, default=0, metavar="K", help="of all that is drawn (default: 0)")
    rows = f"rows of the table, beside the start (default: {saves})"
    add("--saves", type=int, default=saves, metavar="K", help=rows)
    add("--float32", action="store_true", help="single precision (default: double)")
    return parser


def _grok_parser() -> _Parser:
    parser = _parser("manifoldflow", ABOUT, EXAMPLES, "grokking", 20)
    parser.set_defaults(run=lambda options: _grok.run(options))
    walk = "data of your own: see `python -m manifoldflow walk --help`"
    parser.add_argument("command", nargs="?", choices=["walk"], help=walk)
    add = parser.add_argument_group("addition modulo p").add_argument
    add("--modulus", type=int, default=11, metavar="P", help="p of a + b mod p (default: 11)")
    add("--width", type=int, default=96, metavar="M", help="hidden units (default: 96)")
    add("--train-fraction", type=float, default=0.8, metavar="F",
        help="part of the p² pairs to train on (default: 0.8)")  # fmt: skip
    add("--end-time", type=float, default=6.0, metavar="T",
        help="steps × learning rate × weight decay to walk for (default: 6)")  # fmt: skip
    return parser


def _walk_parser() -> _Parser:
    parser = _parser("manifoldflow walk", ABOUT_WALK, EXAMPLES_WALK, "walk", 25)
    parser.set_defaults(run=lambda options: _walk.run(options))
    _add_data(parser.add_argument_group("the data"))
    _add_network(parser.add_argument_group("the network"))
    _add_limit(parser.add_argument_group("the walk"))
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--data", default="digits", metavar="FILE",
        help=f"a .csv or .npz file, or one of {', '.join(BUILTIN)}, which come with scikit-learn "
        "(default: digits). In .csv the last column is the target; .npz has arrays inputs and "
        "targets, X and y, data and target, or features and labels")  # fmt: skip
    add("--target", metavar="NAME", help="another column (its name, or number from 1) or array")
    add("--drop", action="append", default=[], metavar="NAME",
        help="leave out an input column; may be repeated")  # fmt: skip
    add("--task", choices=["regression", "classification"],
        help="what the targets are (default: guessed, and said)")  # fmt: skip
    add("--examples", type=int, metavar="N",
        help="examples to train on; the others test (default: four fifths of all, at most "
        "50)")  # fmt: skip
    add("--no-standardise", action="store_true",
        help="take inputs and regression targets as they are (default: mean 0 and standard "
        "deviation 1 on the training examples)")  # fmt: skip


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
