"""Wrong derivatives of Φ, drifts and covariances, each of which the laws must reject."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from scipy.special import expit

import limit_laws
import manifoldflow as mf
from checks import close
from limit_laws import EQUATIONS, EXAMPLES, problem, SIZE
from manifoldflow import limits

rejected = pytest.raises(AssertionError, match="above the bound")
NAME = "least squares"


@functools.cache
def parts():
    here = problem(NAME)
    covariance = lx.MatrixLinearOperator(here.factor @ here.factor.T, lx.symmetric_tag)

    @jax.jit
    def three(x):
        found = limits.limit_map_second_derivative_parts(here.manifold, x, covariance)
        return found.tangent_part(), found.mixed_part(), found.normal_part()

    return three(here.point)


def mixed_part(here, covariance, symmetrise):
    """−P∂²(∇L)[2M], M = H†P⊥ΣP, with ∂²(∇L)[M] = 2 Σᵢ ∇²rᵢ M∇rᵢ to be read symmetrically."""
    residual = here.loss.residual
    jacobian = np.asarray(jax.jit(jax.jacobian(residual))(here.point))
    hessians = np.asarray(jax.jit(jax.hessian(residual))(here.point))
    scale = float(here.loss.scale)
    inverse = np.linalg.pinv(scale * jacobian.T @ jacobian, rcond=1e-10)
    tangent = np.eye(SIZE) - np.linalg.pinv(jacobian) @ jacobian
    mixed = inverse @ np.asarray(covariance) @ tangent
    if symmetrise:
        mixed = (mixed + mixed.T) / 2
    third = 2 * scale * np.einsum("iab,bc,ic->a", hessians, mixed, jacobian)
    return -2 * tangent @ third


def test_the_mixed_part():
    tangent, mixed, normal = parts()
    here = problem(NAME)
    law = limit_laws.second_derivative_law
    law(lambda here, covariance: tangent + mixed + normal, NAME)
    with rejected:  # without its 2
        law(lambda here, covariance: tangent + mixed / 2 + normal, NAME)
    with rejected:  # the wrong sign
        law(lambda here, covariance: tangent - mixed + normal, NAME)
    covariance = here.factor @ here.factor.T
    close("by hand", mixed_part(here, covariance, True), mixed, 1e-9)
    with rejected:  # contracted without symmetrising
        unsymmetric = mixed_part(here, covariance, False)
        law(lambda here, covariance: tangent + unsymmetric + normal, NAME)


def nearest(equation, start):
    """The closest point of {equation = 0}, by Gauss-Newton steps from the start."""
    x = start
    for _ in range(40):
        jacobian = np.stack([equation(x + 1e-30j * e).imag / 1e-30 for e in np.eye(SIZE)], axis=1)
        x = start + np.linalg.pinv(jacobian) @ (jacobian @ (x - start) - equation(x))
    return x


def test_the_nearest_point_for_the_limit_of_gradient_flow():
    def second_difference(here, covariance):
        del covariance
        point, total = np.asarray(here.point), np.zeros(SIZE)
        for column in np.asarray(here.factor).T:
            ends = [nearest(EQUATIONS[NAME], point + t * column) for t in (1e-3, -1e-3)]
            total += (sum(ends) - 2 * point) / 1e-6
        return total

    with rejected:
        limit_laws.second_derivative_law(second_difference, NAME, bound=1e-2)


class HalfForAQuarter(mf.LimitDiffusion):
    """−½P∇ln|H|₊ for isotropic noise."""

    def _short(self, limit, point):
        regularised, local = super()._short(limit, point)
        return 2 * regularised, local


class NoCompensation(mf.LimitDiffusion):
    """Isotropic noise as if the manifold were flat."""

    def _bent(self, local, point):
        return jnp.zeros_like(super()._bent(local, point))


def test_drifts_of_isotropic_noise():
    here = problem(NAME)
    for wrong in (HalfForAQuarter, NoCompensation):
        with rejected:
            limit_laws.short_form_law(wrong(here.manifold, mf.IsotropicNoise(0.7)), here)


class Uncentred(mf.MinibatchNoise):
    """E g gᵀ in place of the covariance."""

    def factor(self, loss, point):
        gradients = EXAMPLES.gradients(4 * (EXAMPLES.outputs - 0.5) / 4)
        finite = (4 - self.batch_size) / 3
        columns = gradients.T * np.sqrt(finite / (4 * self.batch_size))
        tangents = jax.ShapeDtypeStruct(point.shape, point.dtype)
        return lx.PyTreeLinearOperator(jnp.asarray(columns.reshape(2, 3, 4)), tangents)


class AsIfReplaced(mf.MinibatchNoise):
    """1/B where batches are drawn without replacement."""

    def factor(self, loss, point):
        return mf.MinibatchNoise(self.batch_size, replacement=True).factor(loss, point)


class Replaced(mf.MinibatchNoise):
    """Draws with replacement what it says it draws without."""

    def gradient(self, loss, point, key):
        return mf.MinibatchNoise(self.batch_size, replacement=True).gradient(loss, point, key)


@pytest.mark.parametrize("noise", [Uncentred(2), AsIfReplaced(2), Replaced(2)], ids=repr)
def test_minibatches(noise):
    loss = mf.LeastSquares(
        EXAMPLES.inputs, np.full((4, 2), 0.5), predict=EXAMPLES.predict, scale=1 / 4
    )
    gradients = EXAMPLES.gradients(EXAMPLES.outputs - 0.5)
    limit_laws.minibatch_law(mf.MinibatchNoise(2), loss, gradients, 2)
    with rejected:
        limit_laws.minibatch_law(noise, loss, gradients, 2)


class LabelsWithoutBatches(mf.ResampledLabels):
    """The covariance of a full batch whatever the batch."""

    def factor(self, loss, point):
        return mf.ResampledLabels().factor(loss, point)


def test_resampled_labels():
    probabilities = np.array([0.2, 0.5, 0.6, 0.9])
    loss = mf.PerExampleLoss(
        EXAMPLES.inputs,
        probabilities,
        lambda f, p: jnp.logaddexp(0, f) - p * f,
        predict=lambda point, x: EXAMPLES.predict(point, x)[0],
        minimizer_fn=jax.scipy.special.logit,
    )
    slopes = expit(EXAMPLES.outputs[:, 0])
    outcomes, chances = [], []
    for i, p in enumerate(probabilities):
        for label, chance in ((0.0, 1 - p), (1.0, p)):
            weights = np.zeros((4, 2))
            weights[i, 0] = slopes[i] - label
            outcomes.append(EXAMPLES.gradients(weights).sum(axis=0))
            chances.append(chance / 4)
    with rejected:
        noise = LabelsWithoutBatches(1)
        limit_laws.outcome_law(noise, loss, EXAMPLES.point, outcomes, chances, seed=4)


class Turned(eqx.Module):
    """The motor's noise, a quarter of a turn away."""

    factor_fn: object

    def __call__(self, point):
        turned = point.at[0].set(-point[1]).at[1].set(point[0])
        return self.factor_fn(turned)


def test_a_motor_without_its_phase():
    motor = mf.models.KPhaseMotor(3)
    point = motor.point(0.4)
    flow = mf.LimitDiffusion(motor.manifold, mf.CustomNoise(Turned(motor.noise.factor_fn)))
    turn = jnp.zeros(5).at[:2].set(jnp.array([-point[1], point[0]]))
    with rejected:
        close("drift", flow.drift(point), motor.angular_speed * turn, 1e-9)
