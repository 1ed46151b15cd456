"""Noises and covariances that do not fit: the message says what is wrong and how to mend it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
import pytest

import manifoldflow as mf
import zoo
from checks import close, refused
from manifoldflow import linalg

POINT = jnp.array([0.8, 0.6, 0.0])
SPHERE = mf.FunctionLoss(lambda x: (jnp.sum(x**2) - 1) ** 2 / 8)
SPHERE_SET = mf.LevelSet(zoo.sphere)
KEY = jr.key(0)


def squares(targets=None):
    targets = jnp.array([1.0, 0.5]) if targets is None else targets
    return mf.LeastSquares(jnp.eye(3)[:2], targets, predict=lambda p, x: jnp.dot(p**2, x))


def cross_entropy(targets, loss_fn=None):
    loss_fn = (lambda f, p: jnp.logaddexp(0, f) - p * f) if loss_fn is None else loss_fn
    return mf.PerExampleLoss(
        jnp.eye(3)[:2], targets, loss_fn, predict=lambda p, x: jnp.dot(p, x),
        minimizer_fn=lambda p: jax.scipy.special.logit(p),
    )  # fmt: skip


@pytest.mark.parametrize(
    "noise", [mf.LabelNoise(1.0), mf.MinibatchNoise(1), mf.ResampledLabels(1)], ids=repr
)
def test_noise_of_data_needs_examples(noise):
    name = type(noise).__name__
    for use in (
        lambda: noise.factor(SPHERE, POINT),
        lambda: noise.gradient(SPHERE, POINT, KEY),
        lambda: mf.LimitDiffusion(mf.MinimizerManifold(SPHERE, 1), noise),
    ):
        with refused(ValueError, name, "FunctionLoss"):
            use()


def test_batches():
    for noise in (mf.MinibatchNoise, mf.ResampledLabels):
        with refused(ValueError, "batch_size", "0", "positive integer"):
            noise(0)
    for noise, loss in (
        (mf.MinibatchNoise(3), squares()),
        (mf.LabelNoise(1.0, batch_size=3), squares()),
        (mf.ResampledLabels(3), cross_entropy(jnp.array([0.2, 0.7]))),
    ):
        with refused(ValueError, type(noise).__name__, "batch_size=3", "2 examples"):
            mf.LimitDiffusion(mf.ZeroLossManifold(loss), noise)
    repeated = mf.MinibatchNoise(3, replacement=True)
    assert mf.LimitDiffusion(mf.ZeroLossManifold(squares()), repeated).is_stochastic


def test_labels():
    integers = mf.PerExampleLoss(
        jnp.eye(3)[:2], jnp.array([0, 1]),
        lambda f, y: jnp.cosh(f - y), predict=lambda p, x: jnp.dot(p, x), minimizer_fn=lambda y: y,
    )  # fmt: skip
    with refused(ValueError, "LabelNoise", "floating-point", "ResampledLabels"):
        mf.LabelNoise(1.0).factor(integers, POINT)
    with refused(ValueError, "ResampledLabels", "LeastSquares", "LabelNoise(std)"):
        mf.ResampledLabels().factor(squares(), POINT)
    with refused(ValueError, "LabelNoise", "PerExampleLoss", "multiple of the Hessian"):
        mf.LabelNoise(1.0).strength(integers)


def test_labels_that_are_no_probabilities():
    squared = lambda f, y: jnp.squeeze(f - y) ** 2
    wide = mf.PerExampleLoss(
        jnp.eye(3)[:2], jnp.array([2.0, -1.0]), squared, predict=lambda p, x: jnp.dot(p, x)
    )
    with refused(ValueError, "probabilities", "-1 to 2"):
        mf.ResampledLabels().factor(wide, POINT)


def test_losses_that_are_no_likelihood():
    def limit(loss, **options):
        return mf.LimitDiffusion(mf.ZeroLossManifold(loss), mf.ResampledLabels(**options))

    probabilities = jnp.array([0.2, 0.7])
    doubled = cross_entropy(probabilities, lambda f, p: 2 * (jnp.logaddexp(0, f) - p * f))
    with refused(ValueError, "not a negative log-likelihood", "is_likelihood=False"):
        limit(doubled)
    assert limit(doubled, is_likelihood=False).is_stochastic
    bent = mf.PerExampleLoss(
        jnp.eye(3)[:2], probabilities, lambda f, p: (f - p**2) ** 2,
        predict=lambda p, x: jnp.dot(p, x), minimizer_fn=lambda p: p**2,
    )  # fmt: skip
    with refused(ValueError, "linear in the probabilities"):
        limit(bent, is_likelihood=False)


def custom(factor):
    return mf.CustomNoise(lambda x: factor)


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (np.ones(3), "leading axes differ"),
        (np.ones((2, 3)), "leading axes differ"),
        (np.ones((3, 0)), "trailing axes"),
        ({"x": np.ones((3, 1))}, "structure differs"),
    ],
)
def test_shapes_of_factors(factor, words):
    for use in (
        lambda: custom(factor).factor(SPHERE, POINT),
        lambda: custom(factor).gradient(SPHERE, POINT, KEY),
        lambda: mf.limit_map_second_derivative(SPHERE_SET, POINT, factor),
    ):
        with refused(ValueError, "noise factor", "trailing axis", words):
            use()


def test_factors_of_several_leaves_have_one_length():
    point = {"a": POINT, "b": POINT[:2]}
    loss = mf.FunctionLoss(lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2))
    noise = custom({"a": np.ones((3, 2)), "b": np.ones((2, 1))})
    with refused(ValueError, "trailing axes are not of one"):
        noise.factor(loss, point)


def test_custom_noise():
    with refused(ValueError, "CustomNoise", "function", "lambda point", wrong_type=True):
        mf.CustomNoise(np.ones((3, 1)))
    with refused(ValueError, "CustomNoise", "tangents"):
        custom(lx.MatrixLinearOperator(jnp.ones((2, 4)))).factor(SPHERE, POINT)


class Arrays(mf.AbstractNoise):
    """A noise of one's own, with an array or any operator for a factor."""

    given: object

    def gradient(self, loss, point, key):
        return loss.gradient(point)

    def factor(self, loss, point):
        return self.given


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (jnp.ones((3, 1)), ("array of shape (3, 1)", "linalg.factor_operator")),
        (None, ("None", "linalg.factor_operator")),
        (lx.MatrixLinearOperator(jnp.ones((2, 3))), ("f64[3]", "f64[2]", "transpose it")),
    ],
)
def test_factors_that_are_no_operators_to_tangents(given, words):
    noise, loss = Arrays(given), squares()
    limit = mf.LimitDiffusion(mf.ZeroLossManifold(loss), noise)
    for use in (
        lambda: noise.covariance(loss, POINT),
        lambda: limit.drift(POINT),
        lambda: limit.diffusion(POINT),
        lambda: mf.SGDDiffusion(loss, noise, 0.1).diffusion(POINT),
        lambda: mf.diagnostics.stationary_covariance(loss, POINT, noise, 1e-3),
    ):
        with refused(ValueError, "Arrays.factor must return", *words):
            use()


def test_covariances():
    manifold, second = SPHERE_SET, mf.limit_map_second_derivative
    with refused(ValueError, "operator to tangents", "f64[3]"):
        second(manifold, POINT, lx.MatrixLinearOperator(jnp.eye(2)))
    with refused(ValueError, "plain square array", "MatrixLinearOperator", "is_factor=True"):
        second(manifold, POINT, jnp.eye(3))
    with refused(ValueError, "acts on tangents", "is_factor=False"):
        second(manifold, POINT, lx.MatrixLinearOperator(jnp.ones((3, 2))), is_factor=False)


def test_noises_that_fit():
    """An operator in the place of columns, an int array, a square factor, another precision."""
    expected = np.diag([1.0, 4.0, 0.0])
    columns = np.array([[1, 0], [0, 2], [0, 0]])
    for factor in (
        columns,
        lx.MatrixLinearOperator(jnp.asarray(columns, float)),
        columns @ np.eye(2),
    ):
        found = custom(factor).covariance(SPHERE, POINT).as_matrix()
        close("Σ", found, expected, 1e-14)
    square = lx.MatrixLinearOperator(jnp.diag(jnp.arange(3.0)))
    for is_factor, covariance in ((None, square.matrix), (True, square.matrix**2)):
        # Gradient flow of a function of ‖x‖ is radial: Φ(x) = x/‖x‖.
        exact = (3 * POINT @ covariance @ POINT - jnp.trace(covariance)) * POINT
        exact = exact - 2 * covariance @ POINT
        found = mf.limit_map_second_derivative(SPHERE_SET, POINT, square, is_factor=is_factor)
        close(f"∂²Φ[Σ], is_factor={is_factor}", found, exact, 1e-10)
    single = jax.eval_shape(
        lambda x: mf.limit_map_second_derivative(SPHERE_SET, x, square), POINT.astype(jnp.float32)
    )
    assert single.dtype == jnp.float32


def test_noise_on_a_point_that_is_a_module():
    place = zoo.place("mlp")
    columns = jax.tree.map(lambda leaf: jnp.ones((*leaf.shape, 2)), place.coordinates)
    noise = mf.CustomNoise(lambda model: columns)
    factor = noise.factor(place.manifold.loss, place.point)
    assert factor.in_structure().shape == (2,)
    drawn = eqx.filter_eval_shape(noise.gradient, place.manifold.loss, place.point, KEY)
    assert jax.tree.structure(drawn) == jax.tree.structure(place.coordinates)
    assert isinstance(linalg.factor_operator(place.coordinates, columns), lx.PyTreeLinearOperator)


@pytest.mark.parametrize("noise", [mf.ResampledLabels(1), mf.FlippedLabels(1)], ids=repr)
@pytest.mark.parametrize("targets", [[-1.0, 1.0], [0.5, 5.0]])
def test_simulate_looks_at_the_labels_before_it_runs(noise, targets):
    """Within the loop their values are not known: −1 would be drawn as a label 0."""
    loss = cross_entropy(jnp.array(targets))
    options = {"learning_rate": 0.1, "num_steps": 3, "key": KEY}
    with refused(ValueError, "probabilities", "in [0, 1]"):
        mf.simulate(loss, noise, optax.sgd, POINT, **options)
    fitting = mf.simulate(cross_entropy(jnp.array([0.3, 0.7])), noise, optax.sgd, POINT, **options)
    assert np.all(np.isfinite(fitting.final))
