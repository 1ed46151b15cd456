"""Gradient flow on separable data maximises the margin [Soudry2018; Ma2022, section 9.4]."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, central_difference, close, in_window, refused

INPUTS, LABELS, NORMAL = mf.models.separable_data(jr.key(0), 12, 3, margin=0.3)


@pytest.mark.parametrize("kind, threshold", [("exponential", 1.0), ("logistic", np.log(2))])
def test_the_margin_grows_at_the_known_rate(kind, threshold):
    """Once L < ℓ(0) the smooth margin increases; it is within ψ/|w| of γ̄, which falls like 1/ln t.

    γ̄ ≥ margin ≥ smooth margin ≥ γ̄ − ψ/|w(t)| from w = 0, ψ = ln n (or ln(2ⁿ − 1), logistic), and
    |w(t)| ≥ ln(1/n + γ̄²t)/γ̄ for the exponential loss.
    """
    model = mf.models.SeparableClassification(INPUTS, LABELS, kind)
    largest, n = model.max_margin, len(LABELS)
    psi = np.log(n) if kind == "exponential" else np.log(2**n - 1)
    times = np.geomspace(0.1, 1e8, 46)
    seen = {"smooth": model.smooth_margin, "hard": model.margin, "loss": model.loss}
    path = mf.solve(
        mf.GradientFlow(model.loss), model.initial(),
        end_time=times[-1], save_times=times, observe=seen, rtol=1e-8, atol=1e-10,
    )  # fmt: skip
    smooth, hard, loss = (np.asarray(path.observables[name])[1:] for name in seen)
    lengths = np.linalg.norm(path.points[1:], axis=1)
    late = loss < threshold
    assert 20 < np.sum(late) < 46, "both phases are seen"
    at_least("increase of the smooth margin", np.min(np.diff(smooth[late])), 1e-6)
    at_most("order of the margins", np.max(np.r_[smooth - hard, hard - largest]), 1e-9)
    at_least("smooth margin over γ̄ − ψ/|w|", np.min(smooth - (largest - psi / lengths)), -1e-9)
    bound = model.margin_bound(times)
    assert np.any(bound > 0), "the bound says something"
    at_least("smooth margin over its bound in t", np.min(smooth - bound), 0.0)
    steady = (largest - smooth) * np.log(times)
    in_window("gap·ln t at 10⁸ over that at 10⁴", steady[-1] / steady[25], 0.8, 1.2)
    direction = path.final / lengths[-1]
    at_least("cosine with the direction", direction @ model.max_margin_direction(), 0.99)
    if kind == "exponential":
        reached = np.log(1 / n + largest**2 * times)
        at_least("|w| over ln(1/n + γ̄²t)/γ̄", np.min(lengths - reached / largest), 0.0)


def flowed(model, start, times):
    flow = mf.GradientFlow(model.loss)
    return mf.solve(flow, start, end_time=times[-1], save_times=times, rtol=1e-9, atol=1e-12)


def test_the_margin_bound_is_met_where_all_examples_are_one():
    """Of n copies L' = −γ̄²L²; for the logistic loss its own p' = γ̄²/(1 + e^p) is checked."""
    n = len(LABELS)
    copies = np.tile([[0.6, 0.0, 0.8]], (n, 1))
    model = mf.models.SeparableClassification(copies, np.ones(n), "exponential")
    close("γ̄", model.max_margin, 1.0, 1e-12)
    times = np.array([2.0, 50.0])
    path = flowed(model, model.initial(), times)
    reached = -np.log(n) / (model.margin_bound(times) - 1)
    losses = [float(model.loss(path.point(i))) for i in (1, 2)]
    close("−ln L", reached, -np.log(losses), 1e-6)
    logistic = mf.models.SeparableClassification(copies, np.ones(n))
    height = lambda time: -np.log(2**n - 1) / (logistic.margin_bound(time) - 1)
    slope = central_difference(lambda t: height(90.0 + t), 1e-2)
    close("p'", slope, 1 / (1 + np.exp(height(90.0))), 1e-6)
    assert np.isneginf(logistic.margin_bound(1.0)), "too early to say anything"


def test_the_printed_bound_needs_a_start_at_zero():
    """−ln L(T) ≥ −ln L(0) + γ̄|w(T) − w(0)|; |w(T)| as printed holds from w(0) = 0 only."""
    model = mf.models.SeparableClassification(INPUTS, LABELS, "exponential")
    start = jnp.asarray(3 * model.max_margin_direction())
    final = flowed(model, start, np.array([2.0, 5.0])).final
    gained = jnp.log(model.loss(start)) - jnp.log(model.loss(final))
    at_least("with w(0)", gained - model.max_margin * jnp.linalg.norm(final - start), 0.0)
    at_most("as printed", gained - model.max_margin * jnp.linalg.norm(final), -0.1)


def test_the_smooth_margin_does_not_underflow():
    """Nor does its slope, for weights at which every exponential is 0; and float32 agrees."""
    for kind in ("exponential", "logistic"):
        model = mf.models.SeparableClassification(INPUTS, LABELS, kind)
        far = jnp.asarray(1e5 * model.max_margin_direction())
        close(f"{kind}, far out", model.smooth_margin(far), model.max_margin, 1e-3)
        assert np.all(np.isfinite(jax.grad(model.smooth_margin)(far)))
        near = model.random(jr.key(1))
        narrow = model.smooth_margin(near.astype(jnp.float32))
        assert narrow.dtype == jnp.float32
        close(f"{kind}, float32", narrow, model.smooth_margin(near), 1e-4)
    products = LABELS * (INPUTS @ near)
    exact = -np.log(np.expm1(np.sum(np.log1p(np.exp(-products))))) / np.linalg.norm(near)
    close("ℓ⁻¹(L)/|w|", model.smooth_margin(near), exact, 1e-12)


@pytest.mark.quick
def test_separable_data():
    at_least("margin of the plane", np.min(LABELS * (INPUTS @ NORMAL)), 0.3 - 1e-12)
    assert set(np.asarray(LABELS)) == {-1.0, 1.0}
    model = mf.models.SeparableClassification(INPUTS, LABELS)
    assert np.isneginf(model.margin(model.initial()))
    assert np.isneginf(model.smooth_margin(model.initial()))
    for words, arguments in {
        "inputs must be (n, d)": (INPUTS[0], LABELS),
        "-1 or 1": (INPUTS, LABELS + 1),
        "kind must be one of": (INPUTS, LABELS, "hinge"),
    }.items():
        with refused(ValueError, words):
            mf.models.SeparableClassification(*arguments)
