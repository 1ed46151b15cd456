"""Updates that lower a function of the Hessian's eigenvalues, by dense matrices; and refusals.

[WenMaLi2023; AroraLiPanigrahi2022; GuLyuHuangArora2023].
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import manifoldflow as mf
from checks import flat, refused
from manifoldflow import updates
from update_problems import law, problem, rejected, SHAPES, STD

# --- potentials ------------------------------------------------------------------------------


def along(here, fn):
    """P∇fn by dense matrices."""
    slope, rows = jax.grad(fn)(here.flat), here.rows(here.flat)
    return slope - rows.T @ jnp.linalg.solve(rows @ rows.T, rows @ slope)


def gauss_newton(here, x):
    """The D×D Hessian on the manifold."""
    return here.loss.scale * here.rows(x).T @ here.rows(x)


CLEAN = {"one": mf.MinibatchNoise(1), "all": mf.MinibatchNoise(3)}


def test_sharpness_aware_minimisation():
    here = problem()
    trace = lambda x: jnp.trace(gauss_newton(here, x))
    largest = lambda x: jnp.linalg.eigvalsh(gauss_newton(here, x))[-1]
    one = here.found(updates.SAM(0.1), CLEAN["one"]).drift(here.point)
    law("SAM by example", one, -along(here, trace) / 2)
    whole = here.found(updates.SAM(0.1, per_example=False), CLEAN["all"]).drift(here.point)
    law("SAM of all", whole, -along(here, largest) / 2)
    with rejected:
        law("one for the other", one, -along(here, largest) / 2, 1e-2)


def test_normalised_gradients():
    here = problem()
    largest = lambda x: jnp.log(jnp.linalg.eigvalsh(gauss_newton(here, x))[-1])
    found = here.found(updates.NormalizedGD(), CLEAN["all"]).drift(here.point)
    law("normalised GD", found, -along(here, largest) / 4)
    with rejected:
        law("of λ₁", found, -along(here, lambda x: jnp.exp(largest(x))) / 4, 1e-2)


def averaged(here, num_workers, alpha):
    """The limit of local SGD with nothing but two-time covariances: −½P∂²(∇L)[the mean of

    K⁻¹ of the stationary covariance M of one worker, and (1 − K⁻¹) of what its own noise has
    made since the last average, M − e^{−Hτ}M e^{−Hτ}, over τ from 0 to α]. M = (c/2)P⊥.
    """
    hessian = gauss_newton(here, here.flat)
    values, vectors = jnp.linalg.eigh(hessian)
    c = float(mf.LabelNoise(STD, batch_size=1).strength(here.loss))
    times, weights = np.polynomial.legendre.leggauss(60)
    times, weights = alpha * (times + 1) / 2, weights / 2
    rates = values[:, None] + values
    normal = (values > 1e-9 * values[-1]).astype(float)
    own = sum(w * (1 - jnp.exp(-rates * t)) for t, w in zip(times, weights))
    shares = 1 / num_workers + (1 - 1 / num_workers) * own
    covariance = c / 2 * (vectors * normal) @ (shares * jnp.eye(len(values))) @ (vectors * normal).T
    loss = lambda x: here.loss(here.unravel(x))
    third = lambda x: jnp.sum(jax.hessian(loss)(x) * covariance)
    return -along(here, third) / 2


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("num_workers, alpha", [(3, 0.7), (2, 40.0), (5, 1e-3)])
def test_local_sgd(name, num_workers, alpha):
    here = problem(name)
    update = updates.LocalSGD(num_workers, alpha)
    expected = averaged(here, num_workers, alpha)
    law("local SGD", here.found(update).drift(here.point), expected, 1e-8)


def test_local_sgd_between_its_ends():
    here = problem()
    sgd = flat(here.found(updates.SGD()).drift(here.point))
    ends = {a: here.found(updates.LocalSGD(4, a)).drift(here.point) for a in (0.0, 1e-9, 1e9)}
    law("α = 0", ends[0.0], sgd / 4)
    law("α → 0", ends[1e-9], sgd / 4, 1e-7)
    law("α → ∞", ends[1e9], sgd, 1e-6)
    law("one worker", here.found(updates.LocalSGD(1, 0.5)).drift(here.point), sgd)
    with rejected:
        law("in between", here.found(updates.LocalSGD(4, 0.5)).drift(here.point), sgd, 1e-2)


# --- which of them is known where -------------------------------------------------------------

LABELS, ONE = mf.LabelNoise(STD), mf.LabelNoise(STD, batch_size=1)


@pytest.mark.parametrize(
    "update, noise, words",
    [
        (updates.Adam(), mf.IsotropicNoise(), "covariance c∇²L"),
        (updates.Adam(), CLEAN["one"], "covariance c∇²L"),
        (updates.LocalSGD(2, 0.1), mf.IsotropicNoise(), "covariance c∇²L"),
        (updates.ClippedSGD(1.0), LABELS, "batch_size=1"),
        (updates.ClippedSGD(1.0), CLEAN["one"], "LabelNoise(std, batch_size=1)"),
        (updates.Muon(), LABELS, "batch_size=1"),
        (updates.SignSGD(), mf.IsotropicNoise(), "batch_size=1"),
        (updates.SAM(0.1), CLEAN["all"], "MinibatchNoise(1)"),
        (updates.SAM(0.1), ONE, "MinibatchNoise(1)"),
        (updates.SAM(0.1, per_example=False), CLEAN["one"], "MinibatchNoise(N)"),
        (updates.NormalizedGD(), mf.MinibatchNoise(3, replacement=True), "MinibatchNoise(N)"),
    ],
)
def test_other_noises_are_refused(update, noise, words):
    with refused(ValueError, f"updates.{type(update).__name__}", words, "IterationLimit"):
        mf.LimitDiffusion(problem().manifold, noise, update)


def test_several_outputs_and_other_manifolds():
    targets = np.zeros((2, 2))
    loss = mf.LeastSquares(np.ones((2, 2)), targets, predict=lambda p, x: p["W"] @ x)
    pairs = mf.ZeroLossManifold(loss)
    for update, noise in ((updates.Muon(), ONE), (updates.SAM(0.1), CLEAN["one"])):
        with refused(ValueError, "one output for each example"):
            mf.LimitDiffusion(pairs, noise, update)
    dense = mf.MinimizerManifold(problem().loss, 3)
    for update in (updates.Adam(), updates.ClippedSGD(1.0)):
        with refused(ValueError, "MinimizerManifold", "IterationLimit"):
            mf.LimitDiffusion(dense, ONE, update)


def test_an_update_that_does_not_lead_back():
    """Two examples with one gradient: no rows make up for that."""
    loss = mf.LeastSquares(
        np.ones((2, 1)), np.ones(2), predict=lambda p, x: p[0] * p[1] * x[0] + 0 * p[2]
    )
    flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), ONE, updates.Muon())
    with refused(ValueError, "no drift at this point", "two examples with one gradient"):
        flow.drift(jnp.array([2.0, 0.5, 1.0]))
