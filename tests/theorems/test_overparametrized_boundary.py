"""f = ⟨z, u² − v²⟩ where u or v vanish: the drift there, and how fast label noise gets there."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, equal, refused
from manifoldflow import models, theory

C = 1.7


@functools.cache
def recovery():
    """A truth of two non-zeros, 5 examples, 9 features: the rank of J falls from 5 to 2."""
    inputs, targets, truth = models.sparse_regression(jr.key(3), 5, 9, 2, design="gaussian")
    return models.OverparametrizedLinear(inputs, targets), truth


@functools.cache
def regular():
    """No sparse truth: the limit has as many non-zeros as there are examples."""
    inputs = models.sparse_regression(jr.key(1), 3, 6, 1, design="gaussian")[0]
    return models.OverparametrizedLinear(inputs, np.random.default_rng(0).normal(size=3))


def closed_form(model, start, times, constant=C):
    """The points of the flow by theory alone, up to signs that do not change."""
    weights = model.flow(start, times, constant)
    charges = theory.overparametrized_linear_charges(
        model.inputs, start["u"], start["v"], time=times, noise_constant=constant
    )
    return jax.vmap(model.lift)(jnp.asarray(weights), jnp.asarray(charges))


def oracle_drift(model, point):
    """−(c/4)(∇R + Σλᵢ∇fᵢ), the λ for which it is shortest: what extends −(c/4)P∇R [Lemma D.12]."""
    z, u, v = (np.asarray(x) for x in (model.inputs, point["u"], point["v"]))
    sizes = 4 * np.mean(z**2, axis=0)
    slope = 2 * np.r_[sizes * u, sizes * v]
    rows = 2 * np.hstack([z * u, -z * v])
    multipliers = np.linalg.lstsq(rows.T, slope, rcond=1e-10)[0]
    drift = -C / 4 * (slope - rows.T @ multipliers)
    return {"u": drift[: len(u)], "v": drift[len(u) :]}


def flow_of(model):
    return mf.LimitDiffusion(model.manifold, mf.LabelNoise(np.sqrt(C), batch_size=1))


# --- the point with these weights and charges -------------------------------------------------


def test_lift_inverts_weights_and_charges():
    model, _ = recovery()
    rng = np.random.default_rng(2)
    weights, charges = rng.normal(size=(2, 9))
    charges[:3], weights[2:5] = 0.0, 0.0
    charges[5:7] *= 1e-12  # the smaller one must not be a difference of two large ones
    point = model.lift(weights, charges)
    close("w", model.weights(point), weights, 1e-15)
    relative = np.max(
        np.abs(np.asarray(model.charges(point)) - charges) / (np.abs(charges) + 1e-300)
    )
    at_most("every charge, relative", relative, 1e-14)
    at_least("u", np.min(point["u"]), 0.0)
    signed = {"u": jnp.abs(point["u"]), "v": point["v"]}
    again = model.lift(model.weights(signed), model.charges(signed))
    close("the point from its own weights and charges", again, signed, 1e-14)
    equal("both vanish where w and q do", (float(point["u"][2]), float(point["v"][2])), (0.0, 0.0))
    slopes = jax.jacobian(model.lift, (0, 1))(jnp.asarray(weights), jnp.asarray(charges))
    at_most("derivatives are finite", float(jnp.max(jnp.abs(slopes["u"][0]))), 1e12)


# --- the drift on the boundary ----------------------------------------------------------------


def test_the_drift_where_coordinates_vanish():
    """Finite, right, and 0 where u or v is; also where J has lost rank."""
    model, truth = recovery()
    flow = flow_of(model)
    drift = flow.drift
    weights = np.asarray(model.flow(model.random(jr.key(4)), 0.3))
    charges = 0.3 * np.random.default_rng(5).normal(size=9)
    charges[[0, 3, 6]] = 0.0
    edge = model.lift(weights, charges)  # u or v is 0 at three places
    equal("rank", int(model.manifold.rank(edge)), 5)
    # At the truth only four coordinates do not vanish, with two columns of z: rank 2 of 5.
    corner = model.lift(truth, jnp.where(truth != 0, 0.2, 0.0))
    equal("rank at the corner", int(model.manifold.rank(corner)), 2)
    for point in (edge, corner):
        found = drift(point)
        close("drift", found, oracle_drift(model, point), 1e-9)
        places, moves = (np.stack([np.asarray(x[k]) for k in "uv"]) for x in (point, found))
        at_least("coordinates that vanish", np.sum(places == 0), 3)
        equal("and their drift", float(np.abs(moves[places == 0]).max()), 0.0)
    # It is what the drift tends to from within, to first order in the distance.
    inner = [model.lift(truth, jnp.where(truth != 0, 0.2, size)) for size in (1e-2, 1e-4)]
    gaps = [float(np.abs(np.r_[drift(p)["u"] - drift(corner)["u"]]).max()) for p in inner]
    at_most("from within", gaps[1], 0.2)
    at_most("the gap falls", gaps[1] / gaps[0], 0.2)


def test_corners_are_stationary_and_only_the_best_is_stable():
    """A vertex of the linear program stays put; with another one |u| or |v| would grow."""
    model, flow = regular(), flow_of(regular())
    z, sizes = np.asarray(model.inputs), np.asarray(model.decay_rates)
    best = np.flatnonzero(np.abs(model.limit()) > 1e-9)
    for support, is_best in ((best, True), ([0, 3, 5], False)):
        weights = np.zeros(6)
        weights[support] = np.linalg.solve(z[:, support], np.asarray(model.targets))
        corner = model.lift(weights, np.zeros(6))
        drift = flow.drift(corner)
        at_most("drift at a corner", max(float(jnp.abs(x).max()) for x in drift.values()), 1e-9)
        multipliers = np.linalg.solve(z[:, support].T, (sizes * np.sign(weights))[support])
        rates = C / 2 * (sizes - np.abs(z.T @ multipliers))
        assert (rates.min() > -1e-9) == is_best, f"slowest rate {rates.min():.3f} at {support}"
        # The same rates by the package: off the corner a coordinate moves by −rate times it.
        size = 1e-6 * (np.abs(weights) < 1e-12)
        moved = flow.drift(jax.tree.map(lambda x: x + jnp.asarray(size), corner))
        measured = -np.asarray([moved[k] for k in "uv"]) / np.where(size > 0, size, np.inf)
        expected = C / 2 * np.stack([sizes - z.T @ multipliers, sizes + z.T @ multipliers])
        close("rates at the corner", measured, np.where(size > 0, expected, 0), 1e-4)


def solved(model, start):
    """From where gradient flow lands; one program for all starts."""
    landed = mf.limit_map(model.loss, start)
    times = jnp.array([1.5, 2.0])
    return mf.solve(flow_of(model), landed, end_time=2.0, save_times=times, rtol=1e-8)


def test_what_vanishes_stays_zero():
    model = regular()
    start = model.random(jr.key(6))
    start = {"u": start["u"].at[jnp.array([1, 4])].set(0), "v": start["v"].at[3].set(0)}
    end = solved(model, start).final
    zeros = [float(end["u"][1]), float(end["u"][4]), float(end["v"][3])]
    equal("coordinates that started at 0", zeros, [0.0, 0.0, 0.0])
    close("the others", model.weights(end), model.flow(start, 2.0, C), 1e-5)


# --- the rates of late times ------------------------------------------------------------------


def slopes(model, start, first, last, constant=C):
    """−d ln|u|/dt and −d ln|v|/dt between two times of the closed form."""
    points = closed_form(model, start, np.array([first, last]), constant)
    logs = jnp.log(jnp.abs(jnp.stack([points["u"], points["v"]])))
    return -np.asarray(logs[:, 1] - logs[:, 0]) / (last - first)


def test_rates_at_a_vertex():
    """n non-zeros: exact up to exponentially small terms; what stays has rate 0."""
    model = regular()
    rates = np.stack(list(model.limit_rates(C).values()))
    close("rates", slopes(model, model.random(jr.key(9), 0.5), 3.0, 4.0), rates, 1e-3)
    gap = np.abs(model.flow(model.random(jr.key(9), 0.5), np.array([6.0, 7.0]), C) - model.limit())
    slowest = np.where(rates.min(0) > 1e-9, rates.min(0), rates.max(0)).min()
    close("the weights", np.log(gap[0].max() / gap[1].max()), 2 * slowest, 2e-2)
    both = C / 2 * np.asarray(model.decay_rates) * 2
    close("u and v together have c·s", rates.sum(0), both, 1e-9)
    equal("rates of what stays", int(np.sum(rates < 1e-9)), 3)
    close(
        "and in proportion to c",
        np.stack(list(model.limit_rates(2 * C).values())),
        2 * rates,
        1e-12,
    )


@pytest.mark.parametrize("design", ["gaussian", "boolean"])
def test_rates_of_a_recovery(design):
    """Fewer non-zeros: of all duals the flow takes the one whose slowest rate is the fastest."""
    seed = {"gaussian": 0, "boolean": 2}[design]
    inputs, targets, _ = models.sparse_regression(jr.key(seed), 4, 8, 1, design=design)
    model = models.OverparametrizedLinear(inputs, targets)
    rates = np.stack(list(model.limit_rates(1.0).values()))
    start = model.random(jr.key(9), 0.5)
    # At later times those of Boolean inputs are below the rounding of the closed form.
    spans = {"gaussian": [(6.0, 7.0), (12.0, 13.0)], "boolean": [(2.0, 3.0), (5.0, 6.0)]}[design]
    early, late = (np.abs(slopes(model, start, *span, 1.0) - rates).max() for span in spans)
    at_most(f"rates, {design}, within", late, 0.1)
    at_most("and closer at later times", late / early, 0.6)
    # Another dual, of least length, is rejected.
    s = np.asarray(model.decay_rates)
    on = np.abs(np.asarray(model.limit())) > 1e-9
    xi = np.linalg.lstsq(np.asarray(inputs).T[on], (s * np.sign(model.limit()))[on], rcond=None)[0]
    other = np.stack([s - np.asarray(inputs).T @ xi, s + np.asarray(inputs).T @ xi]) / 2
    at_least("another dual is off", np.abs(other - rates).max(), 3 * late)


def test_the_solved_flow_has_these_rates():
    model = regular()
    path = solved(model, model.random(jr.key(9), 0.5))
    sizes = np.abs(np.stack([path.points["u"], path.points["v"]]))
    measured = np.log(sizes[:, 1] / sizes[:, 2]) / 0.5
    rates = np.stack(list(model.limit_rates(C).values()))
    seen = sizes[:, 2] > 1e-4  # above the tolerance of the solve
    at_least("coordinates that can be seen", seen.sum(), 7)
    close("rates", measured[seen], rates[seen], 2e-3)


def test_data_that_have_no_rates():
    with refused(RuntimeError, "not solved", "range of the inputs"):
        theory.overparametrized_linear_rates(np.ones((2, 3)), np.array([1.0, 2.0]))
    z = np.array([[1.0, 0.0, 2.0]])
    u, v = theory.overparametrized_linear_rates(z, np.array([1.0]))
    equal("an unused column", (u[1], v[1]), (0.0, 0.0))
    u, v = theory.overparametrized_linear_rates(z, np.array([0.0]))
    close("nothing to fit: all fall alike", np.stack([u, v]), np.stack([2 * z[0] ** 2] * 2), 1e-9)
