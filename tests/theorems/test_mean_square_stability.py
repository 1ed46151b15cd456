"""When SGD leaves a minimum in the mean square, and how far it strays when it does not.

Against all batches: E[x ⊗ x] of θ − θ* after a step is a D²×D² matrix, the mean over them.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import (
    at_least,
    at_most,
    central_difference,
    close,
    equal,
    flat,
    in_window,
    refused,
)
from manifoldflow import diagnostics
from manifoldflow.diagnostics._mean_square import Batches, eigenvector, Moments
from quick import long_jit
from stability_laws import (
    covariance_matrix,
    example_hessians,
    fitted,
    N,
    network,
    one_step,
    outputs_of,
    point_of,
    radius,
    root_matrix,
)

CASES = [(1, False), (2, False), (N, False), (1, True), (2, True), (N, True), (7, True)]


@pytest.mark.parametrize("scale", [0.3, 2.0])
@pytest.mark.parametrize(("batch_size", "replacement"), CASES)
def test_the_spectral_radius_over_all_batches_is_one(batch_size, replacement, scale):
    loss, point = fitted(scale=scale)
    rate = mf.largest_stable_learning_rate(loss, point, batch_size, replacement=replacement)
    close("radius", radius(loss, point, batch_size, replacement, float(rate)), 1.0, 1e-9)
    below, above = (radius(loss, point, batch_size, replacement, f * rate) for f in (0.999, 1.001))
    assert below < 1 - 1e-6 and above > 1 + 1e-6, (below, above)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_more_residuals_than_coordinates(batch_size):
    """K has a null space: nothing there counts."""
    loss, point = fitted(num=8, outputs=3, width=2)
    equal("singular", loss.num_residuals > 12, True)
    rate = mf.largest_stable_learning_rate(loss, point, batch_size)
    close("radius", radius(loss, point, batch_size, False, float(rate)), 1.0, 1e-9)


def test_full_batches_are_those_of_gradient_descent():
    loss, point = fitted()
    largest = np.linalg.eigvalsh(example_hessians(loss, point).mean(0))[-1]
    for rate in (
        mf.largest_stable_learning_rate(loss, point),
        mf.largest_stable_learning_rate(loss, point, N),
    ):
        close("2/λ₁", rate, 2 / largest, 1e-12)
    lone = mf.LeastSquares(loss.inputs[:1], loss.targets[:1], predict=network)
    largest = np.linalg.eigvalsh(example_hessians(lone, point).mean(0))[-1]
    close("one example", mf.largest_stable_learning_rate(lone, point, 1), 2 / largest, 1e-12)


def smooth_labels(outputs=3):
    return jax.nn.softmax(jr.normal(jr.key(7), (N, outputs)))


def cross_entropy(output, target):
    return -jnp.sum(target * jax.nn.log_softmax(output))


def classifier():
    point = point_of(3, outputs=3)
    inputs = jr.normal(jr.key(4), (N, 3))
    return mf.PerExampleLoss(inputs, smooth_labels(), cross_entropy, predict=network), point


@pytest.mark.parametrize(("batch_size", "replacement"), [(1, False), (2, False), (2, True)])
def test_cross_entropy_with_its_own_output_hessians(batch_size, replacement):
    loss, point = classifier()
    rate = mf.largest_stable_learning_rate(loss, point, batch_size, replacement=replacement)
    close("radius", radius(loss, point, batch_size, replacement, float(rate)), 1.0, 1e-9)


def test_the_linear_model_of_a_step_is_that_of_the_loss():
    """(1 − ηH_B) is what a step on the batch does to first order."""
    loss, point = fitted()
    hessians = example_hessians(loss, point)
    indices = np.array([1, 4])
    step = eqx.filter_jit(lambda p: loss.select(indices).hessian(p).as_matrix())(point)
    close("H_B", step, hessians[indices].mean(0), 1e-12)


@pytest.mark.parametrize("num", [60, 160])
def test_second_moments_shrink_below_it_and_grow_above(num):
    """At sizes without enumeration: by propagating E[uuᵀ], until it is its own direction."""
    loss, point = fitted(num=num, outputs=1, width=8, scale=1 / num)
    gram = np.asarray(loss.gauss_newton_root(point).gram())
    batch_size = 4
    rate = float(mf.largest_stable_learning_rate(loss, point, batch_size))
    together = num * (batch_size - 1) / (batch_size * (num - 1))
    same = num / batch_size
    values, vectors = np.linalg.eigh(gram)
    inside = vectors[:, values > 1e-10 * values[-1]]
    equal("singular", inside.shape[1] < num, True)

    def growth(rate):
        # Rounding outside the range would stay where it is, while all else shrinks.
        moments = inside @ inside.T
        for _ in range(600):
            spread = together * moments + np.diag((same - together) * np.diag(moments))
            linear = gram @ moments
            new = moments - rate * (linear + linear.T) + rate**2 * gram @ spread @ gram
            new = inside @ (inside.T @ new @ inside) @ inside.T
            factor = np.trace(new) / np.trace(moments)
            moments = (new + new.T) / np.trace(new) / 2
        return factor

    low, high = growth(0.99 * rate), growth(1.01 * rate)
    assert low < 1 < high, (low, high)


def test_a_step_at_the_threshold_leaves_the_worst_moments_as_they_are():
    """At sizes where nothing can be iterated to its end: of the eigenvector, in one step."""
    num, batch_size = 200, 8
    # 300 weights, so that the 400×400 matrix K is singular.
    loss, point = fitted(num=num, outputs=2, width=60, scale=1e-3)
    rate = float(mf.largest_stable_learning_rate(loss, point, batch_size))

    @jax.jit
    def gram_and_worst(point):
        gram = loss.gauss_newton_root(point).gram()
        moments = Moments.of(gram, Batches.of(num, 2, batch_size, False))
        return gram, moments.turned_back(moments.root * eigenvector(moments))

    gram, worst = map(np.asarray, gram_and_worst(point))
    worst = worst * np.sign(np.trace(worst))
    at_least("positive", np.linalg.eigvalsh(worst)[0] / np.trace(worst), -1e-9)
    blocks = np.kron(np.eye(num), np.ones((2, 2)))
    together = num * (batch_size - 1) / (batch_size * (num - 1))
    spread = worst * (together + (num / batch_size - together) * blocks)
    linear = gram @ worst

    def stepped(rate):
        return worst - rate * (linear + linear.T) + rate**2 * gram @ spread @ gram

    close("the same", stepped(rate), worst, 1e-8)
    assert np.trace(stepped(0.999 * rate)) < np.trace(worst) < np.trace(stepped(1.001 * rate))


@pytest.mark.parametrize(("batch_size", "replacement"), [(1, False), (2, True), (None, False)])
def test_its_derivatives_are_those_of_differences(batch_size, replacement):
    for loss, point in (fitted(), fitted(num=8, outputs=3, width=2)):

        def rate(point):
            return mf.largest_stable_learning_rate(loss, point, batch_size, replacement=replacement)

        direction = jax.tree.map(lambda leaf: jr.normal(jr.key(leaf.size), leaf.shape), point)
        along = lambda t: rate(jax.tree.map(lambda x, v: x + t * v, point, direction))
        expected = central_difference(along, 1e-3)
        # In one program, which has what both share once.
        both = jax.jit(lambda p: (jax.jvp(rate, (p,), (direction,))[1], jax.grad(rate)(p)))
        found, gradient = both(point)
        close("forwards", found, expected, 1e-7)
        close("backwards", jnp.vdot(flat(gradient), flat(direction)), expected, 1e-7)


def test_under_jit_and_over_points_and_in_single_precision():
    loss, _ = fitted()
    points = [point_of(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)
    one = lambda point: mf.largest_stable_learning_rate(loss, point, 2)
    expected = jnp.stack([one(point) for point in points])
    close("vmap", jax.vmap(one)(stacked), expected, 1e-9)
    close("jit", jax.jit(one)(points[0]), expected[0], 1e-9)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), points[0])
    found = one(single)
    equal("dtype", found.dtype, jnp.float32)
    close("float32", found, expected[0], 1e-5)


def test_what_it_refuses():
    loss, point = fitted()
    for size in (0, N + 1, 2.0):
        with refused(ValueError, "batch_size", f"{size}"):
            mf.largest_stable_learning_rate(loss, point, size)
    with refused(ValueError, "from 1 to 6", "replacement=True"):
        mf.largest_stable_learning_rate(loss, point, N + 1)
    with refused(ValueError, "loss of examples", "FunctionLoss"):
        mf.largest_stable_learning_rate(mf.FunctionLoss(lambda x: jnp.sum(x**2)), point, 1)
    flat_point = jax.tree.map(jnp.zeros_like, point)
    with refused(eqx.EquinoxRuntimeError, "every learning rate is stable"):
        mf.largest_stable_learning_rate(loss, flat_point, 1)
    equal(
        "NaN",
        bool(jnp.isnan(mf.largest_stable_learning_rate(loss, flat_point, 1, throw=False))),
        True,
    )
    lost = jax.tree.map(lambda x: x * jnp.nan, point)
    with refused(eqx.EquinoxRuntimeError, "NaN"):
        mf.largest_stable_learning_rate(loss, lost, 1)


def exact_covariance(loss, point, batch_size, replacement, rate, added):
    """E[xxᵀ] = mean (1 − ηH_B) E[xxᵀ] (1 − ηH_B) + η²Σ, by enumeration."""
    matrix, inside = one_step(loss, point, batch_size, replacement, rate)
    added = (inside.T @ added @ inside).reshape(-1)
    found = np.linalg.solve(np.eye(len(matrix)) - matrix, rate**2 * added)
    return inside @ found.reshape(inside.shape[1], -1) @ inside.T


NOISES = [
    mf.LabelNoise(0.2, batch_size=1),
    mf.LabelNoise(0.2, batch_size=3),
    mf.LabelNoise(0.2),
    mf.IsotropicNoise(0.1),
]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_the_stationary_covariance_against_all_batches(noise, share):
    loss, point = fitted()
    size = getattr(noise, "batch_size", None) or N
    rate = share * float(mf.largest_stable_learning_rate(loss, point, size))
    added = np.asarray(covariance_matrix(noise, loss, point))
    expected = exact_covariance(loss, point, size, False, rate, added)
    found = diagnostics.stationary_covariance(loss, point, noise, rate)
    close("covariance", found.covariance.as_matrix(), expected, 1e-8)
    jacobian = np.asarray(root_matrix(loss, point))
    close("residuals", found.residuals, jacobian @ expected @ jacobian.T, 1e-8)
    close("excess loss", found.excess_loss, np.trace(jacobian @ expected @ jacobian.T) / 2, 1e-8)
    close("η*", found.largest_stable, rate / share, 1e-12)


def test_where_the_examples_are_not_fitted_their_spread_is_noise():
    """A line through points that are on none: curvature is exact, batches disagree at θ*."""
    inputs, key = jr.normal(jr.key(0), (N, 2)), jr.key(1)
    targets = jr.normal(key, (N,))
    loss = mf.LeastSquares(inputs, targets, predict=jnp.dot)
    point = jnp.linalg.lstsq(inputs, targets)[0]
    for replacement in (False, True):
        noise = mf.MinibatchNoise(2, replacement)
        rate = 0.5 * float(mf.largest_stable_learning_rate(loss, point, 2, replacement=replacement))
        added = np.asarray(covariance_matrix(noise, loss, point))
        expected = exact_covariance(loss, point, 2, replacement, rate, added)
        found = diagnostics.stationary_covariance(loss, point, noise, rate)
        close("covariance", found.covariance.as_matrix(), expected, 1e-8)


def test_a_classifier_with_resampled_labels():
    loss, _ = classifier()
    point = point_of(3, outputs=3)
    targets = jax.nn.softmax(outputs_of(point, loss.inputs))
    loss = mf.PerExampleLoss(loss.inputs, targets, cross_entropy, predict=network)
    noise = mf.ResampledLabels(2)
    rate = 0.5 * float(mf.largest_stable_learning_rate(loss, point, 2))
    added = np.asarray(covariance_matrix(noise, loss, point))
    expected = exact_covariance(loss, point, 2, False, rate, added)
    found = diagnostics.stationary_covariance(loss, point, noise, rate)
    close("covariance", found.covariance.as_matrix(), expected, 1e-8)
    small = diagnostics.stationary_covariance(loss, point, noise, rate / 1000)
    theirs = rate / 1000 * loss.trace_gauss_newton(point) / 2 / 4  # c = 1/B
    close("ηc/4·tr", small.excess_loss, theirs, 1e-3)


def test_small_learning_rates_lose_a_quarter_of_the_trace():
    loss, point = fitted()
    for noise in NOISES[:3]:
        rate = 1e-5
        found = diagnostics.stationary_covariance(loss, point, noise, rate)
        expected = rate * noise.strength(loss) * loss.trace_gauss_newton(point) / 4
        close("ηc/4·tr", found.excess_loss, expected, 1e-3)


def test_a_long_simulation_has_this_covariance():
    """Of a model that is linear, at a learning rate that is far from small, by SGD itself."""
    inputs = jr.normal(jr.key(2), (N, 4)) / 2
    point = jnp.array([1.0, -1.0, 0.5, 2.0])
    loss = mf.LeastSquares(inputs, inputs @ point, predict=jnp.dot, scale=1.0)
    noise = mf.LabelNoise(0.3, batch_size=2)
    rate = 0.4 * float(mf.largest_stable_learning_rate(loss, point, 2))
    found = diagnostics.stationary_covariance(loss, point, noise, rate)
    num_chains, num_steps = 400, 1500

    def chain(key):
        def step(x, key):
            x = x - rate * noise.gradient(loss, x, key)
            return x, loss(x)

        return jax.lax.scan(step, point, jr.split(key, num_steps))[1][200:].mean()

    means = long_jit(jax.vmap(chain))(jr.split(jr.key(3, impl="unsafe_rbg"), num_chains))
    error = float(jnp.std(means)) / num_chains**0.5
    in_window("standard errors", (float(means.mean()) - float(found.excess_loss)) / error, -4, 4)
    at_most("precision", error / float(found.excess_loss), 0.01)
    slow = rate * float(noise.strength(loss) * loss.trace_gauss_newton(point)) / 4
    at_least("not that of small learning rates", float(means.mean()) / slow, 1.2)


def test_the_stationary_covariance_under_jit_vmap_and_grad():
    loss, point = fitted()
    noise = mf.LabelNoise(0.2, batch_size=2)

    def excess(rate):
        return diagnostics.stationary_covariance(loss, point, noise, rate).excess_loss

    rates = jnp.array([0.01, 0.03])
    expected = jnp.stack([excess(rate) for rate in rates])
    close("vmap", jax.vmap(excess)(rates), expected, 1e-9)
    slope = central_difference(lambda t: excess(0.03 + t), 1e-4)
    close("grad", jax.jit(jax.grad(excess))(0.03), slope, 1e-6)


def test_what_the_stationary_covariance_refuses():
    loss, point = fitted()
    noise = mf.LabelNoise(0.2, batch_size=2)
    largest = mf.largest_stable_learning_rate(loss, point, 2)
    with refused(eqx.EquinoxRuntimeError, "leaves the minimum", "largest_stable_learning_rate"):
        diagnostics.stationary_covariance(loss, point, noise, 1.01 * largest)
    found = diagnostics.stationary_covariance(loss, point, noise, 1.01 * largest, throw=False)
    equal("unstable", bool(found.result == mf.RESULTS.unstable), True)
    equal("fails", bool(found.is_successful), False)
    equal("NaN", bool(jnp.isnan(found.excess_loss)), True)
    with refused(ValueError, "learning_rate must be positive"):
        diagnostics.stationary_covariance(loss, point, noise, 0.0)
    with refused(ValueError, "exceeds the 6 examples"):
        diagnostics.stationary_covariance(loss, point, mf.LabelNoise(0.2, batch_size=7), 0.01)
    with refused(ValueError, "needs a noise", wrong_type=True):
        diagnostics.stationary_covariance(loss, point, 0.2, 0.01)
    with refused(ValueError, "loss of examples"):
        diagnostics.stationary_covariance(
            mf.FunctionLoss(lambda x: jnp.sum(x**2)), jnp.ones(2), noise, 0.01
        )
