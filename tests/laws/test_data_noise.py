"""Noise of the data: the stated covariance against all batches and all labels there are."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

import manifoldflow as mf
import zoo
from checks import close, equal
from limit_laws import (
    all_batches,
    covariance_matrix,
    EXAMPLES,
    minibatch_law,
    outcome_law,
    problem,
)
from manifoldflow import linalg, losses, noise

TARGETS = np.random.default_rng(33).uniform(0.1, 0.9, size=(4, 2))
CLASSES = np.stack([TARGETS[:, 0], 1 - TARGETS[:, 0]], axis=1)


class Here:
    """What `covariance_matrix` needs: a loss and a point off its manifold."""

    def __init__(self, loss):
        self.loss, self.point = loss, EXAMPLES.point


def least_squares(scale=None):
    return mf.LeastSquares(EXAMPLES.inputs, TARGETS, predict=EXAMPLES.predict, scale=scale)


def cross_entropy():
    """Two independent logistic outputs for each example."""
    loss = lambda f, p: jnp.sum(jnp.logaddexp(0, f) - p * f)
    logit = jax.scipy.special.logit
    return mf.PerExampleLoss(
        EXAMPLES.inputs, TARGETS, loss, predict=EXAMPLES.predict, minimizer_fn=logit
    )


def softmax():
    return mf.PerExampleLoss(
        EXAMPLES.inputs, CLASSES, zoo.softmax, predict=EXAMPLES.predict, minimizer_fn=jnp.log
    )


def logistic():
    """The first output alone, with targets without axes."""
    return mf.PerExampleLoss(
        EXAMPLES.inputs,
        TARGETS[:, 0],
        lambda f, p: jnp.logaddexp(0, f) - p * f,
        predict=lambda point, x: EXAMPLES.predict(point, x)[0],
        minimizer_fn=jax.scipy.special.logit,
    )


# ∇ℓᵢ of every example, with L the mean of the ℓᵢ.
GRADIENTS = {
    "squares": lambda: EXAMPLES.gradients(4 * 0.7 * (EXAMPLES.outputs - TARGETS)),
    "softmax": lambda: EXAMPLES.gradients(
        np.exp(EXAMPLES.outputs) / np.exp(EXAMPLES.outputs).sum(1, keepdims=True) - CLASSES
    ),
}
LOSSES = {"squares": lambda: least_squares(0.7), "softmax": softmax}


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_minibatches(kind, replacement):
    batches = mf.MinibatchNoise(2, replacement=replacement)
    minibatch_law(batches, LOSSES[kind](), GRADIENTS[kind](), 2, replacement=replacement)


def test_full_batches_have_no_noise():
    here = Here(least_squares())
    close("Σ", covariance_matrix(mf.MinibatchNoise(4), here), np.zeros((6, 6)), 1e-15, scale=1.0)
    single = Here(here.loss.select(np.array([2])))
    close("N = 1", covariance_matrix(mf.MinibatchNoise(1), single), np.zeros((6, 6)), 0, scale=1.0)
    exact = mf.MinibatchNoise(4).gradient(here.loss, here.point, jax.random.key(0))
    close("gradient", exact, here.loss.gradient(here.point), 1e-14)


def test_batches_larger_than_the_data_with_replacement():
    gradients = GRADIENTS["squares"]()
    covariance = np.cov(gradients.T, bias=True) / 9
    found = covariance_matrix(mf.MinibatchNoise(9, replacement=True), Here(least_squares(0.7)))
    close("Σ", found, covariance, 1e-12)


def batch_covariance(gradients, batch_size):
    batches = all_batches(len(gradients), batch_size, False)
    return np.cov(np.stack([gradients[list(b)].mean(0) for b in batches]).T, bias=True)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_label_noise_off_the_manifold(batch_size):
    """The noise of the labels and that of the batch: both are in the covariance."""
    size, std = batch_size or 4, 0.6
    slopes = EXAMPLES.slopes.reshape(8, 6)
    loss = least_squares(0.7)
    expected = 0.7**2 * std**2 * 4 / size * slopes.T @ slopes
    expected += batch_covariance(GRADIENTS["squares"](), size)
    found = covariance_matrix(mf.LabelNoise(std, batch_size=batch_size), Here(loss))
    close("Σ for squares", found, expected, 1e-12)
    gradients = EXAMPLES.gradients(expit(EXAMPLES.outputs) - TARGETS)
    expected = std**2 / (4 * size) * slopes.T @ slopes + batch_covariance(gradients, size)
    found = covariance_matrix(mf.LabelNoise(std, batch_size=batch_size), Here(cross_entropy()))
    close("Σ for cross-entropy", found, expected, 1e-12)


def label_outcomes(slopes_of, labels_and_chances, batch_size):
    """Every batch with every assignment of labels: gradients and their probabilities."""
    batches = all_batches(4, batch_size, False)
    outcomes, chances = [], []
    for batch in batches:
        for assigned in itertools.product(*(labels_and_chances[i] for i in batch)):
            weights = np.zeros((4, 2))
            for i, (label, _) in zip(batch, assigned):
                weights[i] = slopes_of(i, label) / batch_size
            outcomes.append(EXAMPLES.gradients(weights).sum(axis=0))
            chances.append(np.prod([chance for _, chance in assigned]) / len(batches))
    return np.stack(outcomes), np.asarray(chances)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_labels_of_two_kinds(batch_size):
    probabilities = TARGETS[:, 0]
    slopes = lambda i, label: np.array([expit(EXAMPLES.outputs[i, 0]) - label, 0.0])
    labels = [[(0.0, 1 - p), (1.0, p)] for p in probabilities]
    outcomes = label_outcomes(slopes, labels, batch_size)
    outcome_law(mf.ResampledLabels(batch_size), logistic(), EXAMPLES.point, *outcomes, seed=2)


def test_labels_of_several_classes():
    shares = np.exp(EXAMPLES.outputs) / np.exp(EXAMPLES.outputs).sum(1, keepdims=True)
    slopes = lambda i, label: shares[i] - label
    labels = [list(zip(np.eye(2), p)) for p in CLASSES]
    outcomes = label_outcomes(slopes, labels, 1)
    outcome_law(mf.ResampledLabels(1), softmax(), EXAMPLES.point, *outcomes, seed=3)


class Halves(noise.AbstractDataNoise):
    """The first or the second half of the examples: a noise that the package does not have."""

    def checked(self, loss):
        assert isinstance(loss, losses.AbstractExampleLoss)
        return loss

    def hessian_multiple(self, loss):
        return None

    def gradient(self, loss, point, key):
        start = 2 * jax.random.bernoulli(key).astype(int)
        return self.checked(loss).select(start + jnp.arange(2)).gradient(point)

    def factor(self, loss, point):
        halves = [loss.select(np.arange(2) + start).gradient(point) for start in (0, 2)]
        return linalg.factor_operator(point, ((halves[0] - halves[1]) / 2)[..., None])


def test_a_new_noise_of_data():
    gradients = GRADIENTS["squares"]()
    outcomes = np.stack([gradients[:2].mean(0), gradients[2:].mean(0)])
    outcome_law(Halves(), least_squares(0.7), EXAMPLES.point, outcomes, [0.5, 0.5], seed=5)


def test_strength_of_a_likelihood():
    """Σ = H/B on the manifold, by type; the limit's tests see that it is so."""
    here = problem("softmax")
    for batch_size, c in ((None, 1.0), (1, 1.0)):
        labels = mf.ResampledLabels(batch_size)
        close("c", labels.hessian_multiple(here.loss), c, 1e-12)
    assert mf.ResampledLabels(is_likelihood=False).hessian_multiple(here.loss) is None
    assert mf.MinibatchNoise(1).hessian_multiple(here.loss) is None
    assert mf.LabelNoise(1.0).hessian_multiple(here.loss) is None


def test_factors_act_through_the_residuals_where_these_say_it_all():
    """Then the limit needs n×n matrices only; a softmax says less than its logits."""
    for loss, kind, is_small in (
        (least_squares(), mf.MinibatchNoise(2), True),
        (losses.ResidualForm(cross_entropy()), mf.LabelNoise(1.0), True),
        (losses.ResidualForm(softmax()), mf.ResampledLabels(), False),
        (cross_entropy(), mf.LabelNoise(1.0), False),  # it may have no residuals
    ):
        factor = eqx.filter_eval_shape(kind.factor, loss, EXAMPLES.point)
        name = f"{type(kind).__name__} on {type(loss).__name__}"
        equal(name, isinstance(factor, linalg.ResidualFactor), is_small)


def test_selected_examples_estimate_the_whole():
    for loss in (least_squares(), softmax()):
        parts = [loss.select(np.array([i]))(EXAMPLES.point) for i in range(4)]
        close(type(loss).__name__, np.mean(parts), loss(EXAMPLES.point), 1e-12)
        equal("examples", loss.num_examples, 4)


def test_precision_follows_the_point():
    """Traced only: noises and drifts in float32 on data in float64."""
    point = EXAMPLES.point.astype(jnp.float32)
    loss, columns = logistic(), np.ones((2, 3, 2))
    manifold, dtypes = (
        mf.ZeroLossManifold(loss),
        lambda tree: {x.dtype for x in jax.tree.leaves(tree)},
    )
    for kind in (
        mf.MinibatchNoise(1),
        mf.LabelNoise(0.5, batch_size=1),
        mf.ResampledLabels(1, is_likelihood=False),
        mf.CustomNoise(lambda x: columns),
        mf.IsotropicNoise(0.5),
    ):
        flow = mf.LimitDiffusion(manifold, kind)
        key = jax.random.key(0)
        found = {
            "gradient": jax.eval_shape(lambda x, n=kind: n.gradient(loss, x, key), point),
            "factor": jax.eval_shape(lambda x, f=flow: f.diffusion(x).as_matrix(), point),
            "drift": jax.eval_shape(lambda x, f=flow: f.drift(x), point),
        }
        for name, value in found.items():
            equal(f"{name} of {type(kind).__name__}", dtypes(value), {jnp.dtype("float32")})
