"""[LiWangArora2022] Lemma 4.5, Theorem 4.6, Corollaries 5.1 and 5.2, Appendix C.4.

∂²Φ against gradient flow that knows nothing of it, and the limiting diffusion of SGD.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import lawbook
import manifoldflow as mf
import zoo
from checks import at_least, at_most, close, equal, flat, norm
from limit_laws import (
    covariance_matrix,
    example_output,
    general,
    problem,
    second_derivative_law,
    short_form_law,
    TARGETS,
)
from manifoldflow import limits, linalg

CASES = ["least squares", "per example", "softmax", "function"]


# --- Lemma 4.5 -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_second_derivative_against_gradient_flow(name):
    second_derivative_law(general, name)


def test_residuals_and_dense_hessians_agree():
    """Two formulas for one manifold, by residuals and by D×D matrices.

    One example comes twice, so that the Jacobian of the residuals has rank two of three.
    """
    here = problem("least squares")
    indices, targets = jnp.array([0.0, 1.0, 1.0]), jnp.asarray(TARGETS)[jnp.array([0, 1, 1])]
    loss = mf.LeastSquares(indices, targets, predict=example_output, scale=1.7)
    manifold, dense = mf.ZeroLossManifold(loss), mf.MinimizerManifold(loss, 2)
    covariance = lx.MatrixLinearOperator(here.factor @ here.factor.T, lx.symmetric_tag)
    found = mf.limit_map_second_derivative(manifold, here.point, covariance)
    expected = mf.limit_map_second_derivative(dense, here.point, covariance)
    close("∂²Φ[Σ]", found, expected, 1e-9)


def test_ways_of_giving_the_covariance():
    here = problem("least squares")
    factor, point = here.factor, here.point
    expected = general(here, factor @ factor.T)
    second = mf.limit_map_second_derivative
    found = second(here.manifold, point, factor)
    close("a factor as an array (D, r)", found, expected, 1e-9)
    skewed = factor @ factor.T + jnp.triu(jnp.ones((6, 6))) - jnp.tril(jnp.ones((6, 6)))
    found = second(here.manifold, point, lx.MatrixLinearOperator(skewed))
    close("only the symmetric part counts", found, expected, 1e-9)


def test_first_derivative_is_the_projection():
    here = problem("least squares")
    place = zoo.Place(here.manifold, here.point, 2)
    v = place.random_vector(1)
    found = mf.limit_map_derivative(here.manifold, here.point, v)
    close("∂Φ[v] = Pv", found, place.projector @ v, 1e-10)


# --- Theorem 4.6 ---------------------------------------------------------------------------


@functools.cache
def custom_flow(here):
    return mf.LimitDiffusion(here.manifold, mf.CustomNoise(lambda x: here.factor))


def test_the_parts_of_the_drift():
    here = problem("least squares")
    flow, point = custom_flow(here), here.point

    @jax.jit
    def parts(x):
        three = flow.tangent_noise_compensation, flow.mixed_regularisation
        return [part(x) for part in (*three, flow.normal_regularisation)]

    compensation, mixed, normal = parts(point)
    drift = flow.drift(point)
    close("drift = ½∂²Φ[Σ]", drift, general(here, here.factor @ here.factor.T) / 2, 1e-9)
    close("sum of the parts", compensation + mixed + normal, drift, 1e-12)
    for name, part in (("mixed", mixed), ("normal", normal)):
        at_least(f"{name} part", norm(part), 0.1)
        at_most(f"P⊥ of the {name} part", norm(here.manifold.normal_projection(point, part)), 1e-12)
    place = zoo.Place(here.manifold, point, 2)
    tangent = place.projector @ np.asarray(here.factor)
    hessians = np.asarray(jax.jit(jax.hessian(here.loss.residual))(point))
    bend = -place.pseudo_inverse @ np.einsum("iab,ar,br->i", hessians, tangent, tangent)
    close("compensation = ½ Σ II(PFᵣ, PFᵣ)", compensation, bend / 2, 1e-10)


def test_the_diffusion_is_the_tangent_part_of_the_factor():
    here = problem("least squares")
    place = zoo.Place(here.manifold, here.point, 2)
    flow, v = custom_flow(here), here.factor[:, 0]

    @jax.jit
    def products(x):
        diffusion = flow.diffusion(x)
        equal("noise dimension", diffusion.in_structure().shape, (3,))
        return diffusion.as_matrix(), diffusion.T.mv(v)

    matrix, transposed = products(here.point)
    close("PF", matrix, place.projector @ np.asarray(here.factor), 1e-10)
    close("(PF)ᵀv", transposed, here.factor.T @ (place.projector @ np.asarray(v)), 1e-10)


@eqx.filter_jit
def diffusion_matrix(flow, point):
    return flow.diffusion(point).as_matrix()


def test_noise_that_vanishes_on_the_manifold_moves_nothing():
    here = problem("least squares")
    flow = mf.LimitDiffusion(here.manifold, mf.MinibatchNoise(1))
    assert flow.is_stochastic
    at_most("drift", norm(flow.drift(here.point)), 1e-20)
    at_most("diffusion", norm(diffusion_matrix(flow, here.point)), 1e-12)


def test_derivatives_of_the_drift():
    here = problem("least squares")
    lawbook.derivative_law("drift", custom_flow(here).drift, here.point, 3, bound=1e-7, step=1e-3)


# --- Corollary 5.1: isotropic noise --------------------------------------------------------


@pytest.mark.parametrize("name", ["least squares", "function"])
def test_isotropic_noise(name):
    """Brownian motion and −¼P∇ln|H|₊, against the general formula."""
    here = problem(name)
    flow = mf.LimitDiffusion(here.manifold, mf.IsotropicNoise(0.7))
    assert flow.is_stochastic
    short_form_law(flow, here)
    at_most("mixed part", norm(flow.mixed_regularisation(here.point)), 0.0)


# --- Corollary 5.2: label noise ------------------------------------------------------------


def test_label_noise_is_an_ordinary_differential_equation():
    here = problem("least squares")
    for std in (0.8, 0.0):  # by type: a value makes no difference
        flow = mf.LimitDiffusion(here.manifold, mf.LabelNoise(std, batch_size=1))
        assert not flow.is_stochastic
    flow = mf.LimitDiffusion(here.manifold, mf.LabelNoise(0.8, batch_size=1))
    short_form_law(flow, here)
    for part in (flow.tangent_noise_compensation, flow.mixed_regularisation):
        at_most("other parts", norm(part(here.point)), 0.0)
    residual_factor = (
        0.8
        * 1.7
        * np.sqrt(2)
        * lx.IdentityLinearOperator(jax.ShapeDtypeStruct((2,), jnp.dtype("float64")))
    )

    @jax.jit
    def through_residuals(x):
        parts = limits.normal_second_derivative_parts(here.manifold, x, residual_factor)
        assert isinstance(parts, limits.SecondDerivative)
        return parts.total()

    close("by n×n matrices", through_residuals(here.point) / 2, flow.drift(here.point), 1e-9)
    at_most("diffusion", norm(diffusion_matrix(flow, here.point)), 1e-12)


def test_labels_drawn_from_a_likelihood():
    """Σ = H/B for softmax: −(1/4B) P∇tr H, against the general formula and by outcomes."""
    here = problem("softmax")
    flow = mf.LimitDiffusion(here.manifold, mf.ResampledLabels())
    assert not flow.is_stochastic
    short_form_law(flow, here)
    general_flow = mf.LimitDiffusion(here.manifold, mf.ResampledLabels(is_likelihood=False))
    assert general_flow.is_stochastic
    close("by outcomes", general_flow.drift(here.point), flow.drift(here.point), 1e-9)


def test_label_noise_on_another_loss_is_the_general_diffusion():
    """Gaussian noise on a target of the logistic loss: Σ is no multiple of the Hessian."""
    here = problem("per example")
    noise = mf.LabelNoise(0.8, batch_size=1)
    flow = mf.LimitDiffusion(here.manifold, noise)
    assert flow.is_stochastic
    short_form_law(flow, here)
    weights = [p * (1 - p) for p in (0.3, 0.9)]
    place = zoo.Place(here.manifold, here.point, 2)  # rows √wᵢ ∇fᵢ
    slopes = place.jacobian / np.sqrt(weights)[:, None]
    covariance = 0.8**2 * 2 / 2**2 * slopes.T @ slopes  # (N/B)(std/N)² Σ ∇fᵢ∇fᵢᵀ
    close("Σ", covariance_matrix(noise, here), covariance, 1e-10)


def exponential_problem(probabilities):
    """Two examples under p·e^(−f) + (1−p)·e^f, on the circle-like set of its minima."""
    loss = mf.PerExampleLoss(
        jnp.arange(2.0),
        jnp.asarray(probabilities),
        lambda f, p: p * jnp.exp(-f) + (1 - p) * jnp.exp(f),
        predict=lambda x, index: jnp.sum(x**2 * jnp.array([1.0, 2.0, 0.5]) ** index) + x[0] - 1,
        minimizer_fn=lambda p: jnp.log(p / (1 - p)) / 2,
    )
    manifold = mf.ZeroLossManifold(loss)
    return manifold, manifold.project(jnp.array([0.5, 0.4, 0.8]))


def test_exponential_loss_with_flips():
    """c = 1/(2B√(p(1 − p))) where all labels are flipped with one probability."""
    p = 0.8
    manifold, point = exponential_problem([p, p])
    flow = mf.LimitDiffusion(manifold, mf.ResampledLabels(1, is_likelihood=False))
    c = 1 / (2 * np.sqrt(p * (1 - p)))

    @jax.jit
    def gradient(x):
        return mf.riemannian_gradient(manifold, manifold.loss.trace_gauss_newton, x)

    close("−(c/4) P∇tr H", flow.drift(point), -c / 4 * gradient(point), 1e-9)


# --- Appendix C.4: a diffusion that minimises nothing ---------------------------------------


@pytest.mark.parametrize("num_phases", [3, 4, 5, 6])
def test_motor(num_phases):
    motor = mf.models.KPhaseMotor(num_phases)
    flow = mf.LimitDiffusion(motor.manifold, motor.noise)
    speed = (num_phases + 2 - 2) / 8
    equal("angular speed", motor.angular_speed, speed)
    for angle in (0.0, 1.3, -2.0):
        point = motor.point(angle)
        at_most("the angle of the point", abs(motor.angle(point) - angle), 1e-14)
        turn = jnp.zeros(motor.dimension).at[:2].set(jnp.array([-point[1], point[0]]))
        error = norm(flow.drift(point) - speed * turn)
        at_most(f"drift off (D−2)/8 times the turn, k = {num_phases}, at {angle}", error, 1e-9)
    matrix = motor.noise.factor(motor.loss, point).as_matrix()
    at_most("tangent noise", norm(turn @ matrix), 0.0)
    at_least("normal noise", norm(matrix), 1.0)


# --- networks ------------------------------------------------------------------------------


class Structured(mf.LeastSquares):
    """Least squares whose Jacobian is structured, however small."""

    def jacobian(self, point):
        fn = lambda p, example: self.example_residual(p, example)
        return linalg.structured_jacobian(fn, point, self.data)


def test_structured_and_dense_jacobians_give_one_drift():
    place = zoo.place("dict net")
    structured = mf.ZeroLossManifold(Structured(*zoo.data(), predict=zoo.network))
    columns = jax.tree.map(
        lambda leaf: jr.normal(jr.key(leaf.size), (*leaf.shape, 2)), place.coordinates
    )
    dense = mf.limit_map_second_derivative(place.manifold, place.point, columns)
    found = mf.limit_map_second_derivative(structured, place.point, columns)
    close("∂²Φ[Σ]", found, dense, 1e-9)


def test_no_array_has_a_tangent_for_each_residual():
    num_examples, width = 40, 256
    model = eqx.nn.MLP(20, 1, width, 2, activation=jnp.tanh, key=jr.key(0))
    inputs = jr.normal(jr.key(1), (num_examples, 20))
    loss = mf.LeastSquares(inputs, jnp.zeros((num_examples, 1)))
    manifold = mf.ZeroLossManifold(loss)
    coordinates, remainder = manifold.split(model)
    whole = num_examples * flat(coordinates).size
    at_least("n·D is what to avoid", whole, 2**20)
    columns = jax.tree.map(lambda leaf: jnp.ones((*leaf.shape, 2)), coordinates)

    def drift(x):
        parts = limits.limit_map_second_derivative_parts(
            manifold, eqx.combine(x, remainder), columns
        )
        return parts.total()

    largest = max(zoo.array_sizes(jax.make_jaxpr(drift)(coordinates)))
    at_most("largest array in units of n·D", largest / whole, 0.25)


def test_a_subsampled_drift_of_resampled_labels():
    """Of all examples it is the whole drift, whatever noise has it."""
    here = problem("per example")
    flow = mf.LimitDiffusion(here.manifold, mf.ResampledLabels(1))
    found = mf.subsampled_drift(flow, here.point, jr.key(0), num_examples=2, num_groups=2)
    close("drift", found.drift, flow.drift(here.point), 1e-10)
    close("its standard error", found.standard_error, 0.0, 1e-12)
