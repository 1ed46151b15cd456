"""What `limit_map` shows on its way, and that showing changes nothing."""

import re

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, equal, refused
from sgd_runs import same_bits

INPUTS, TARGETS = jnp.array([[1.0, 0.5, -0.3], [0.2, -1.0, 0.7]]), jnp.array([1.0, -0.5])
LOSS = mf.LeastSquares(INPUTS, TARGETS, predict=lambda p, z: jnp.dot(z, p**3))
BOWL = mf.FunctionLoss(lambda p: 0.5 * jnp.sum((INPUTS @ p**3 - TARGETS) ** 2) / 2)
START = jnp.array([0.9, 0.7, -0.8])


def rows_of(loss, point=START, **options):
    rows = []
    limit, info = mf.limit_map_with_info(loss, point, progress=rows.append, **options)
    jax.effects_barrier()
    return limit, info, rows


def remaining_at(p):
    """‖A†∇L‖ by NumPy, for the Gauss-Newton matrix A."""
    jacobian = np.asarray(INPUTS) * 3 * np.asarray(p) ** 2
    residual = np.asarray(INPUTS) @ np.asarray(p) ** 3 - np.asarray(TARGETS)
    gauss_newton, gradient = jacobian.T @ jacobian / 2, jacobian.T @ residual / 2
    return np.linalg.norm(np.linalg.pinv(gauss_newton, rcond=1e-12) @ gradient)


def test_a_function_is_told_of_every_step():
    limit, info, rows = rows_of(LOSS)
    equal("times", [int(row["time"]) for row in rows], list(range(int(info.num_steps) + 1)))
    at_least("rows", len(rows), 4)
    same_bits("the first point", rows[0]["coordinates"], START)
    for row in rows:
        at_most(
            "distance of what remains from that by NumPy",
            abs(float(row["remaining"]) - remaining_at(row["coordinates"])),
            1e-9 * (1 + float(row["remaining"])),
        )
    wanted = 1e-6 * jnp.linalg.norm(rows[-1]["coordinates"])
    at_most("what remains at the end", rows[-1]["remaining"], wanted)
    at_least("what remains before", rows[-2]["remaining"], wanted)
    close("the end", limit, rows[-1]["coordinates"], 2e-6)
    _, _, rows = rows_of(BOWL)
    at_least("rows by the Hessian", len(rows), 4)


def test_showing_changes_nothing():
    whole = mf.limit_map(LOSS, START)
    for progress in (True, lambda row: None, dfx.TextProgressMeter()):
        same_bits(f"{progress}", mf.limit_map(LOSS, START, progress=progress), whole)
    slope = lambda **options: jax.grad(lambda x: mf.limit_map(LOSS, x, **options)[0])(START)
    close("its derivative", slope(progress=lambda row: None), slope(), 1e-14)
    texts = [
        jax.jit(lambda x: mf.limit_map(LOSS, x, throw=False, **options)).lower(START).as_text()
        for options in ({}, {"progress": False}, {"progress": print})
    ]
    equal("the program without", texts[1], texts[0])
    equal("callbacks without", texts[0].count("callback"), 0)
    at_least("callbacks with a function", texts[2].count("callback"), 1)


def test_lines_and_percentages(capsys):
    info = mf.limit_map_with_info(LOSS, START, progress=True)[1]
    jax.effects_barrier()
    lines = capsys.readouterr().out.strip().split("\n")
    equal("lines", len(lines), int(info.num_steps) + 1)
    pattern = r"limit_map: after (\d+) steps ([\d.e+-]+) remain"
    found = [re.fullmatch(pattern, line) for line in lines]
    assert all(found), lines
    equal("steps", [int(match[1]) for match in found if match], list(range(len(lines))))
    mf.limit_map(LOSS, START, progress=dfx.TextProgressMeter(minimum_increase=0.01))
    jax.effects_barrier()
    shares = [float(x) for x in re.findall(r"([\d.]+)%", capsys.readouterr().out)]
    equal("shares in order", shares, sorted(shares))
    equal("ends", (shares[0], shares[-1]), (0.0, 100.0))
    at_least("shares", len(shares), 4)


def fail(row):
    raise ArithmeticError(f"stop here, at {row['time']}")


def test_members_and_refusals():
    rows = []
    starts = jnp.stack([START, 2 * START])
    both = jax.vmap(lambda x: mf.limit_map(LOSS, x, progress=rows.append))(starts)
    jax.effects_barrier()
    close("one of two", both[0], mf.limit_map(LOSS, START), 1e-12)
    at_least("rows of both", len(rows), 8)
    with refused(ValueError, "progress must be True or False or an AbstractProgressMeter", "got 3"):
        mf.limit_map(LOSS, START, progress=3)
    with pytest.raises(Exception, match="stop here"):
        mf.limit_map(LOSS, START, progress=fail)
        jax.effects_barrier()
