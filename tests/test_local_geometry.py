"""The local geometry of a manifold: two classes, one mathematics; and who asks it what."""

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import optax
import pytest

import manifoldflow as mf
from checks import at_most, close, equal, refused
from limit_laws import problem
from manifoldflow import linalg, manifolds, noise

HERE = problem("least squares")
PAIR = {
    "gram": HERE.manifold.local(HERE.point),
    "hessian": mf.MinimizerManifold(HERE.loss, 2).local(HERE.point),
}


def test_which_geometry_by_the_type_of_the_loss():
    assert isinstance(PAIR["gram"], manifolds.GramGeometry)
    assert isinstance(PAIR["hessian"], manifolds.HessianGeometry)
    assert isinstance(PAIR["hessian"], manifolds.AbstractLocalGeometry)
    assert HERE.manifold.residual_loss is HERE.loss
    well = mf.MinimizerManifold(HERE.loss, 2)
    assert well.residual_loss is None
    assert isinstance(well, manifolds.AbstractStationaryManifold)
    sphere = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
    assert isinstance(sphere.local(jnp.array([0.6, 0.8])), manifolds.GramGeometry)


def test_both_see_the_same_hessian():
    gram, hessian = PAIR["gram"], PAIR["hessian"]
    expected = jnp.linalg.eigvalsh(jax.hessian(HERE.loss)(HERE.point))
    for local in (gram, hessian):
        close("tr", local.hessian_trace(), jnp.sum(expected), 1e-10)
        close("λ", local.hessian_eigenvalues()[-2:], expected[-2:], 1e-10)
    # The logarithm is known up to a constant, that of the scale of the loss.
    other = HERE.manifold.project(HERE.point + 0.01)
    falls = [
        manifold.local(other).log_determinant() - local.log_determinant()
        for manifold, local in (
            (HERE.manifold, gram),
            (mf.MinimizerManifold(HERE.loss, 2), hessian),
        )
    ]
    close("Δ ln|H|₊", falls[0], falls[1], 1e-8)


SIGMAS = {
    "factor": (linalg.Factor, lambda: linalg.as_sigma(HERE.point, HERE.factor)),
    "covariance": (
        linalg.Covariance,
        lambda: linalg.as_sigma(
            HERE.point, lx.MatrixLinearOperator(jnp.asarray(HERE.factor @ HERE.factor.T))
        ),
    ),
}


@pytest.mark.parametrize("name", SIGMAS)
@pytest.mark.parametrize("part", ["tangent_part", "mixed_part", "normal_part"])
def test_both_have_the_same_second_derivative(name, part):
    kind, make = SIGMAS[name]
    sigma = make()
    assert isinstance(sigma, kind) and isinstance(sigma, linalg.AbstractSigma)
    parts = [getattr(local, part)(sigma) for local in PAIR.values()]
    again = [getattr(local.prepared(), part)(sigma) for local in PAIR.values()]
    close(part, parts[0], parts[1], 1e-9)
    close("prepared", again, parts, 1e-12)


def test_noise_through_the_residuals_has_a_normal_part_only():
    """As the whole factor JᵀG has, by n×n matrices."""
    small = lx.MatrixLinearOperator(jr.normal(jr.key(0), (2, 3)))
    sigma = linalg.NormalFactor(small)
    local = PAIR["gram"]
    whole = linalg.as_sigma(HERE.point, HERE.loss.jacobian(HERE.point).T @ small)
    close("normal", local.normal_part(sigma), local.normal_part(whole), 1e-9)
    for part in (local.tangent_part, local.mixed_part):
        at_most("others", jnp.max(jnp.abs(part(sigma))), 0.0)
        at_most("of the whole factor", jnp.max(jnp.abs(part(whole))), 1e-9)


def test_short_limits_by_type():
    loss = HERE.loss
    label = noise.short_limit(mf.LabelNoise(0.5, batch_size=1), loss)
    assert label is not None and label.is_ode and label.at_zero_loss
    assert isinstance(label, noise.ShortLimit) and label.potential is noise.hessian_trace
    close("c/4", label.rate, mf.LabelNoise(0.5, batch_size=1).strength(loss) / 4, 1e-14)
    isotropic = noise.short_limit(mf.IsotropicNoise(0.3), loss)
    assert isotropic is not None and not isotropic.is_ode and not isotropic.at_zero_loss
    assert isotropic.potential is noise.log_determinant
    close("std²/4", isotropic.rate, 0.09 / 4, 1e-14)
    assert isinstance(PAIR["gram"], noise.LocalHessian)
    for other in (mf.MinibatchNoise(1), mf.CustomNoise(lambda x: x[:, None])):
        assert noise.short_limit(other, loss) is None
    assert isinstance(mf.MinibatchNoise(1), noise.AbstractShortNoise)


class Doubtful(noise.AbstractStochasticGradient):
    """A gradient that is halved every other time: known by samples only."""

    def gradient(self, loss, point, key):
        factor = 0.5 + jr.bernoulli(key)
        return jax.tree.map(lambda leaf: factor * leaf, loss.gradient(point))


def test_a_sampler_runs_in_simulate_and_not_in_flows():
    run = {"learning_rate": 0.1, "num_steps": 50, "key": jr.key(0)}
    end = mf.simulate(HERE.loss, Doubtful(), optax.sgd, HERE.point + 0.1, **run)
    equal("steps", int(end.stats["num_steps"]), 50)
    at_most("loss", HERE.loss(end.final), 0.1 * float(HERE.loss(HERE.point + 0.1)))
    with refused(ValueError, "Doubtful has no covariance, which LimitDiffusion needs"):
        noise.checked_noise("LimitDiffusion", Doubtful())
    with refused(ValueError, "SGDDiffusion needs a noise, e.g. LabelNoise"):
        noise.checked_noise("SGDDiffusion", "label")
