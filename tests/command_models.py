"""A user's module that builds networks, weights and data beside it, and the command on them."""

import os
import pathlib
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import manifoldflow as mf
from checks import equal
from command_files import arrays, iris_like, NUM_INPUTS, NUM_ROWS
from manifoldflow.__main__ import main

MODULE = """
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

WEIGHTS = {"W": jnp.zeros((2, 5)), "b": jnp.zeros(2)}


def classifier(width=4, dtype=None):
    return eqx.nn.MLP(5, 3, width, 1, activation=jnp.tanh, dtype=dtype, key=jr.key(0))


def single():
    return classifier(dtype=jnp.float32)


def wide():
    return classifier(width=6)


def deep():
    return eqx.nn.MLP(5, 3, 4, 2, activation=jnp.tanh, key=jr.key(0))


def number():
    return eqx.nn.MLP(5, 1, 8, 1, activation=jnp.tanh, key=jr.key(0))


def scalar():
    return eqx.nn.MLP(5, "scalar", 8, 1, activation=jnp.tanh, key=jr.key(0))


class Images(eqx.Module):
    inner: eqx.nn.Conv2d

    def __init__(self):
        self.inner = eqx.nn.Conv2d(1, 3, (2, 3), key=jr.key(0))

    def __call__(self, x):
        return self.inner(x)[:, 0, 0]


def pair():
    return WEIGHTS, lambda w, x: w["W"] @ x + w["b"]


def weights():
    return WEIGHTS


def empty():
    return abs


def wrong():
    raise KeyError("depth")


def fails(model):
    return model


class Bug(eqx.Module):
    w: jax.Array

    def __init__(self):
        self.w = jnp.ones(3)

    def __call__(self, x):
        return x.undefined


def poisson(output, count):
    return jnp.exp(output[0]) - count * output[0]


def squares_of_labels(output, label):
    return jnp.sum((output - label) ** 2)


def vector(output, target):
    return output


def bug(output, target):
    return output.undefined
"""
QUICK = ["--seconds", "0.1"]
DATA = ["--data", "labels.npz"]


def folder(monkeypatch, tmp_path):
    """A folder with a user's module, of a name that no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "trained_here", raising=False)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    pathlib.Path("trained_here.py").write_text(MODULE, encoding="utf-8")
    iris_like(pathlib.Path("iris.csv"))
    arrays(pathlib.Path("arrays.npz"))
    inputs = np.random.default_rng(0).normal(size=(NUM_ROWS, NUM_INPUTS))
    np.savez("labels.npz", X=inputs, y=np.arange(NUM_ROWS) % 3)
    yield
    jax.config.update("jax_enable_x64", True)
    sys.modules.pop("trained_here", None)


def command(*options, model="classifier"):
    return ["report", *QUICK, *map(str, options), "--model", f"trained_here:{model}"]


def said(capsys, *options, model="classifier"):
    """The output of a command that ends well, and its table: values by their names."""
    assert main(command(*options, model=model)) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    rows = {line[:34].strip(): line[34:].split() for line in out.splitlines() if len(line) > 34}
    return out, {name: float(row[0]) for name, row in rows.items() if _is_number(row)}


def _is_number(row):
    try:
        return bool(row) and float(row[0]) is not None
    except ValueError:
        return False


def refusal(capsys, *options, model="classifier"):
    """The one sentence of a command that does not."""
    assert main(command(*options, model=model)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" …")]
    equal("lines of the message", len(lines), 1)
    return lines[0]


def classifier(width=4, outputs=3, key=1):
    return eqx.nn.MLP(5, outputs, width, 1, activation=jnp.tanh, key=jr.key(key))


def labels_loss():
    with np.load("labels.npz") as stored:
        inputs, labels = stored["X"], stored["y"]
    return mf.PerExampleLoss(inputs, labels, optax.softmax_cross_entropy_with_integer_labels)


def as_eqx(path, model):
    eqx.tree_serialise_leaves(path, model)


def as_npz_by_name(path, model):
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(model, eqx.is_array))
    named = {jax.tree_util.keystr(name): leaf for name, leaf in leaves}
    np.savez(path, **dict(reversed(named.items())))
