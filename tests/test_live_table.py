"""The live table shows whatever is observed."""

import io

import jax
import jax.numpy as jnp
import optax
import pytest

import manifoldflow as mf
from checks import close, equal, refused

CIRCLE = mf.LevelSet(lambda p: jnp.sum(p**2) - 1)
START = jnp.array([0.6, 0.8])
OBSERVE = {"height": lambda p: p[1], "both": lambda p: p}


def test_it_shows_what_is_observed():
    """Single numbers of every kind of run; arrays and coordinates have no place in a table."""
    file = io.StringIO()
    table = mf.LiveTable(end_time=1.0, file=file)
    flow = mf.RiemannianGradientFlow(CIRCLE, lambda p: p[1])
    run = mf.solve(flow, START, end_time=1.0, num_saves=2, observe=OBSERVE, progress=table)
    close("rows", jnp.array([row["height"] for row in table.rows]), run.observables["height"], 1e-9)
    lines = file.getvalue().splitlines()
    equal("titles", lines[0].split(), ["time", "height"])
    equal("bars", [line.split()[0].count("█") for line in lines[1:]], [0, 5, 10])


@pytest.mark.parametrize("run", ["minimize", "simulate"])
def test_of_other_runs(run):
    file = io.StringIO()
    options = {"observe": OBSERVE, "progress": mf.LiveTable({"height": ("h", ".1f")}, file=file)}
    if run == "minimize":
        mf.minimize(CIRCLE, lambda p: p[1], START, **options)
    else:
        loss = mf.LeastSquares(jnp.ones((1, 2)), jnp.ones(1), predict=lambda w, x: w @ x)
        noise = mf.LabelNoise(std=0.1)
        mf.simulate(
            loss,
            noise,
            optax.sgd,
            START,
            learning_rate=0.1,
            num_steps=3,
            key=jax.random.key(0),
            **options,
        )
    lines = file.getvalue().splitlines()
    equal("title", lines[0].split(), ["time", "h"])
    equal("first row", lines[1].split(), ["0", "0.8"])


def test_bad_input():
    with refused(ValueError, "LiveTable", "end_time", "-1"):
        mf.LiveTable(end_time=-1.0)
    with refused(ValueError, "LiveTable", "columns", "title"):
        mf.LiveTable({"height": ".3f"})
    with refused(ValueError, "LiveTable", "columns"):
        mf.LiveTable(["height"])
    table = mf.LiveTable({"depth": ("d", ".3f")})
    with refused(ValueError, "LiveTable", "depth", "height"):
        table({"time": 0.0, "height": 1.0})
