"""What users read of an error: their own line, and then the sentence, at the very end."""

import os
import pathlib
import subprocess
import sys
import traceback

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_most, equal, refused

INPUTS, TARGETS = np.ones((4, 2)), np.ones(4)
POINT = jnp.array([1.0, 2.0])
ROOT = str(pathlib.Path(mf.__file__).parents[1])
SCRIPT = """
import jax.numpy as jnp
import manifoldflow as mf

circle = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
flow = mf.RiemannianGradientFlow(circle, lambda x: x[0])
{}
"""
FAILING = "mf.solve(flow, jnp.array([0.6, 0.8]), end_time=100.0, max_steps=2)"


def transposed(point, x):
    return jnp.sum(x[:, None] @ point[None] @ x[None])


def lines_of(fn):
    """What the interpreter prints of the error."""
    try:
        fn()
    except Exception as error:  # whatever it is
        return "".join(traceback.format_exception(error)).rstrip().splitlines()
    raise AssertionError("no error")


def loss_of(predict, targets=TARGETS):
    return mf.LeastSquares(INPUTS, targets, predict=predict)


CASES = {
    "a value": (lambda: mf.LabelNoise(-1.0), "ValueError: LabelNoise: std must be finite"),
    "an argument": (
        lambda: mf.MinibatchNoise(0),
        "ValueError: MinibatchNoise: batch_size must be a positive integer",
    ),
    "a shape of data": (
        lambda: mf.LeastSquares(INPUTS, TARGETS[:3]),
        "ValueError: LeastSquares needs arrays with one common",
    ),
    "an output": (
        lambda: loss_of(lambda p, x: (p * x)[None]).residual(POINT),
        "ValueError: The model's output for one example has shape (1, 2)",
    ),
    "an output, deep inside": (
        lambda: mf.ZeroLossManifold(loss_of(lambda p, x: p * x)).project(POINT),
        "ValueError: The model's output for one example has shape (2,)",
    ),
    "inside the model": (
        lambda: mf.ZeroLossManifold(loss_of(transposed)).project(POINT),
        "ValueError: The model fails on one example, f64[2]:",
    ),
    "a search": (
        lambda: mf.LevelSet(lambda x: jnp.sum(x**2) + 1).project(POINT),
        "EquinoxRuntimeError: No point of the manifold was found",
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
def test_the_last_line_is_the_sentence(case):
    fn, sentence = CASES[case]
    lines = lines_of(fn)
    equal("last line", lines[-1][: len(sentence)], sentence)
    hidden = [line for line in lines if "manifoldflow/" in line and "/tests/" not in line]
    equal("frames of the package", hidden, [])
    at_most("lines", len(lines), 32)


def test_an_error_in_the_model_shows_its_line():
    text = "\n".join(lines_of(CASES["inside the model"][0]))
    assert "in transposed" in text and "one example at a time" in text
    equal("frames of JAX", "jax/_src" in text, False)


def test_errors_of_the_model_about_other_things_are_its_own():
    def broken(point, x):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine"):
        loss_of(broken).residual(POINT)

    def concrete(point, x):
        return 1.0 if point[0] > 0 else 0.0

    with pytest.raises(jax.errors.TracerBoolConversionError):
        loss_of(concrete).residual(POINT)


def test_all_frames_are_there_for_those_who_ask():
    jax.config.update("jax_traceback_filtering", "off")
    try:
        lines = lines_of(CASES["an output, deep inside"][0])
    finally:
        jax.config.update("jax_traceback_filtering", "auto")
    assert any("manifoldflow/losses/_predict.py" in line for line in lines)


def test_what_equinox_writes_around_an_error_inside_a_program_goes():
    """As where values inside of jit are looked at: of an own program there is the sentence."""
    loss = loss_of(checked_inside)
    lines = lines_of(lambda: loss.residual(jnp.array([-1.0, 2.0])))
    equal("last line", lines[-1], "EquinoxRuntimeError: negative!")


def checked_inside(point, x):
    return eqx.error_if(point, point[0] < 0, "negative!") @ x


def run(*lines):
    script = SCRIPT.format("\n".join(lines))
    environment = os.environ | {"PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    equal("code", done.returncode, 1)
    return done.stderr.rstrip().splitlines()


def test_a_script_ends_with_the_sentence():
    last = run(FAILING)[-3:]
    assert last[-1].startswith("EquinoxRuntimeError: The step limit was reached"), last
    assert "manifoldflow/" not in "\n".join(last), last


def test_in_a_program_of_the_users_own_the_sentence_has_a_line():
    """There Equinox has the last word, and it says how to look into the program."""
    lines = run("import equinox as eqx", f"eqx.filter_jit(lambda: {FAILING})()")
    wanted = "equinox.EquinoxRuntimeError: The step limit was reached"
    assert any(line.startswith(wanted) for line in lines), lines


def test_a_model_without_forward_mode_is_told_where_it_is_met():
    words = "no forward mode", "jax.custom_jvp", "diffrax.DirectAdjoint()"
    squared = jax.custom_vjp(lambda x: x**2)
    squared.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
    loss = loss_of(lambda p, x: squared(p @ x))
    with refused(ValueError, *words):
        jax.jvp(loss.residual, (POINT,), (POINT,))
