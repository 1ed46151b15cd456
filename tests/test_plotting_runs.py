"""Pictures of runs: any observables, and what each picture says."""

import io

import jax
import jax.numpy as jnp
import numpy as np

import manifoldflow as mf
from checks import close, equal, refused
from manifoldflow import plotting

CIRCLE = mf.LevelSet(lambda p: jnp.sum(p**2) - 1)
FLOW = mf.RiemannianGradientFlow(CIRCLE, lambda p: p[1])


def solution(clock=None, **observables):
    """A run of two saves with these observables."""
    saves = np.shape(next(iter(observables.values())))
    return mf.Solution(
        times=jnp.broadcast_to(jnp.arange(float(saves[-1])), saves),
        points=jnp.zeros((*saves, 2)),
        observables={name: jnp.asarray(values) for name, values in observables.items()},
        stats={"num_steps": jnp.array(7)},
        result=mf.RESULTS.successful,
        final_coordinates=jnp.zeros((*saves[:-1], 2)),
        remainder=None,
        clock=clock,
    )


def lines(axes):
    return {line.get_label(): np.asarray(line.get_ydata()) for line in axes.get_lines()}


def test_a_walk_with_the_sharpness_alone():
    """No other observable is asked for."""
    (axes,) = plotting.plot_walk(solution("Σηλ", sharpness=[3.0, 2.0])).axes
    close("line", lines(axes)["tr ∇²L"], jnp.array([3.0, 2.0]), 0)
    equal("clock", axes.get_xlabel(), "time  t = Σηλ")


def test_a_walk_with_anything_observed():
    run = solution(height=[1.0, -1.0], error=[0.5, 0.4])
    (axes,) = plotting.plot_walk(run).axes
    equal("the first", (axes.get_ylabel(), axes.get_xlabel()), ("height", "time of the run"))
    left, right = plotting.plot_walk(run, sharpness="height", test="error").axes
    equal("labels", (left.get_ylabel(), right.get_ylabel()), ("height", "error"))
    close("right", lines(right)["error"], jnp.array([0.5, 0.4]), 0)
    with refused(ValueError, "plot_walk", "error", "height", "'accuracy'"):
        plotting.plot_walk(run, test="accuracy")
    with refused(ValueError, "plot_walk", "observable"):
        plotting.plot_walk(solution(points=[[1.0, 2.0], [3.0, 4.0]]))


def test_two_spectra():
    axes = plotting.plot_spectrum([3.0, 1e-9, 5.0], jnp.array([2.0, -1.0]), max_eigenvalues=2)
    drawn = lines(axes)
    close("before", drawn["before the walk"], jnp.array([5.0, 3.0]), 0)
    equal("what is not positive is left out", np.isnan(drawn["after the walk"]).tolist(), [0, 1])
    with refused(ValueError, "plot_spectrum", "vector", "(2, 2)"):
        plotting.plot_spectrum(jnp.eye(2))


def test_an_ensemble_has_error_bars_and_its_limit():
    members = solution("Ση²", height=[[1.0, 3.0], [1.0, 5.0], [1.0, np.nan]])
    limit = solution("Ση²", height=[1.0, 4.5])
    axes = plotting.plot_ensemble(members, limit, observable="height")
    close("limit", lines(axes)["limit"], jnp.array([1.0, 4.5]), 0)
    bars = axes.containers[0]
    close("means", bars.lines[0].get_ydata(), jnp.array([1.0, 4.0]), 1e-12)
    (segments,) = [line.get_segments() for line in bars.lines[2]]
    # Two standard errors: the deviation of 3 and 5 is √2, of their mean 1.
    close("bars", segments[1][:, 1], jnp.array([2.0, 6.0]), 1e-12)
    assert "mean of 2 ± 2 standard errors, 1 failed" in bars.get_label(), bars.get_label()
    with refused(ValueError, "clock", "Σηλ"):
        plotting.plot_ensemble(members, solution("Σηλ", height=[1.0, 4.5]), observable="height")
    with refused(ValueError, "plot_ensemble", "members", "'depth'", "height"):
        plotting.plot_ensemble(members, observable="depth")
    with refused(ValueError, "plot_ensemble", "(runs, saves)", "(2,)"):
        plotting.plot_ensemble(limit, observable="height")


def test_before_and_after():
    run = solution(trace=[4.0, 1.0], zero=[0.0, 1.0], below=[-1.0, 1.0])
    (axes,) = plotting.plot_before_after(run).axes
    equal("what is positive", [t.get_text() for t in axes.get_yticklabels()], ["trace\n4 → 1"])
    close("share", lines(axes)["after"] + axes.get_lines()[1].get_xdata(), jnp.array([0.25]), 0)
    equal("title", axes.get_title(loc="left"), "7 steps. Done.")
    with refused(ValueError, "plot_before_after", "positive"):
        plotting.plot_before_after(solution(zero=[0.0, 1.0]))


def test_convergence_of_solutions_and_of_rows():
    table, start = mf.LiveTable(file=io.StringIO()), jnp.array([0.6, 0.8])
    mf.minimize(CIRCLE, lambda p: p[1], start, progress=table)
    jax.effects_barrier()
    axes = plotting.plot_convergence({"trust region": table.rows}, observable="value", reference=-1)
    found = lines(axes)["trust region"]
    close("first", found[0], 1.8, 1e-12)
    assert found[-1] < 1e-6 or np.isnan(found[-1]), found
    equal("axis", axes.get_xlabel(), "steps")
    run = mf.solve(FLOW, start, end_time=1.0, observe={"value": lambda p: p[1]})
    axes = plotting.plot_convergence({"flow": run}, observable="value", reference=-1)
    close("flow", lines(axes)["flow"], run.observables["value"] + 1, 1e-12)
    with refused(ValueError, "plot_convergence", "'flow'", "'depth'", "value"):
        plotting.plot_convergence({"flow": run}, observable="depth")
    with refused(ValueError, "plot_convergence", "rows"):
        plotting.plot_convergence({"flow": [1.0]}, observable="value")
    with refused(ValueError, "plot_convergence", "runs"):
        plotting.plot_convergence([run], observable="value")
