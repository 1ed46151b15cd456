"""What every update obeys, what a new one has to write, and which hyperparameters go together."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import manifoldflow as mf
from checks import at_least, at_most, central_difference, close, equal, flat, norm, refused
from manifoldflow import noise, theory, updates


def network(point, x):
    return jnp.dot(point["v"], jnp.tanh(point["W"] @ x))


RNG = np.random.default_rng(3)
LOSS = mf.LeastSquares(RNG.normal(size=(2, 2)), RNG.normal(size=2) / 2, predict=network)
GAMMA = mf.ZeroLossManifold(LOSS)
POINT = GAMMA.project({"W": jnp.asarray(RNG.normal(size=(3, 2))), "v": jnp.array([0.5, -0.9, 1.1])})
ONE = mf.LabelNoise(0.6, batch_size=1)
# Those that move, with a noise that they know.
CASES = {
    "Adam": (updates.Adam(weight_decay=0.2), ONE),
    "Adam, lagging": (updates.Adam(averaging=1.3, eps=0.1), ONE),
    "ClippedSGD": (updates.ClippedSGD(0.5), ONE),
    "LocalSGD": (updates.LocalSGD(3, 0.8), ONE),
    "Muon": (updates.Muon(), ONE),
    "NormalizedGD": (updates.NormalizedGD(), mf.MinibatchNoise(2)),
    "SAM": (updates.SAM(0.1), mf.MinibatchNoise(1)),
    "SAM of all": (updates.SAM(0.1, per_example=False), mf.MinibatchNoise(2)),
}


def flow_of(name, loss=LOSS):
    update, noise = CASES[name]
    return mf.LimitDiffusion(mf.ZeroLossManifold(loss), noise, update)


@pytest.mark.parametrize("name", CASES)
def test_drifts_are_tangent_and_differentiable(name):
    flow = flow_of(name)
    assert not flow.is_stochastic
    drift = flow.drift(POINT)
    at_least("the drift", norm(drift), 1e-2)
    at_most("along the normal space", norm(LOSS.jacobian(POINT).mv(drift)) / norm(drift), 1e-11)
    parts = flat(flow.normal_regularisation(POINT)) + flat(flow.slow_drift(POINT))
    close("its parts", parts, flat(drift), 1e-12)
    for part in (flow.mixed_regularisation, flow.tangent_noise_compensation):
        at_most("no other part", norm(part(POINT)), 0.0)
    along = GAMMA.random_tangent(POINT, jax.random.key(0))
    weights = jax.tree.map(jnp.cos, POINT)
    value = lambda p: sum(map(jnp.vdot, *map(jax.tree.leaves, (weights, flow.drift(p)))))
    moved = lambda t: value(jax.tree.map(lambda p, v: p + t * v, POINT, along))
    expected = central_difference(moved, 1e-3)

    @jax.jit
    def inside(p, v):
        """In one program, which has what they share once."""
        return flow.drift(p), jax.jvp(value, (p,), (v,))[1], jax.grad(value)(p)

    within, forward, slope = inside(POINT, along)
    close("jit", within, drift, 1e-12)
    backward = sum(jnp.vdot(slope[k], along[k]) for k in slope)
    close("forward mode", forward, expected, 1e-6)
    close("reverse mode", backward, expected, 1e-6)


@pytest.mark.parametrize("name", ["Adam", "Muon", "SAM of all"])
def test_solves_stay_on_the_manifold(name):
    walk = mf.solve(flow_of(name), POINT, end_time=0.2)
    at_most("distance", GAMMA.defect(walk.final), 1e-10)
    at_least("way", norm(jax.tree.map(jnp.subtract, walk.final, POINT)), 1e-3)


@pytest.mark.parametrize("name", CASES)
def test_single_precision(name):
    """The dtype of the point, and its digits."""
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), POINT)
    found = flow_of(name).drift(single)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    close("float32", found, flow_of(name).drift(POINT), 1e-3)


@pytest.mark.parametrize("name", CASES)
def test_frozen_leaves_do_not_move(name):
    part = mf.LeastSquares(
        LOSS.inputs, LOSS.targets, predict=network, trainable={"W": True, "v": False}
    )
    found = flow_of(name, part).drift(POINT)
    assert found["v"] is None
    wide = mf.LeastSquares(
        LOSS.inputs, LOSS.targets, predict=lambda w, x: network({"W": w, "v": POINT["v"]}, x)
    )
    close("alone", found["W"], flow_of(name, wide).drift(POINT["W"]), 1e-9)


# --- against closed forms on f = xy ------------------------------------------------------------


def product(p, x):
    return p[0] * p[1] * x


VALLEY = mf.ZeroLossManifold(mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=product, scale=1.0))


@pytest.mark.parametrize(
    "update, oracle, options",
    [
        (updates.Adam(weight_decay=0.4), "adam", {"weight_decay": 0.4}),
        (updates.Adam(averaging=2.6), "adam", {"averaging_rate": 2.6}),
        (updates.LocalSGD(4, 0.35), "local_sgd", {"num_workers": 4, "gradient_time": 0.35}),
        (updates.SGD(weight_decay=0.4), "sgd", {"weight_decay": 0.4}),
    ],
)
def test_curves_on_the_smallest_model(update, oracle, options):
    start, time, std = -0.9, 0.7, 0.8
    flow = mf.LimitDiffusion(VALLEY, mf.LabelNoise(std), update)
    point = jnp.exp(start * jnp.array([1.0, -1.0]))
    walk = mf.solve(flow, point, end_time=time, rtol=1e-10, atol=1e-12)
    curve = getattr(theory, f"scalar_factorization_{oracle}")
    close("s", jnp.log(walk.final[0]), curve(start, time, label_std=std, **options), 1e-8)


def test_one_example_needs_no_clipping_to_be_slow():
    """One residual: κ/2κ of the clipped second moment, a multiple of SGD's drift."""
    point, std, most = jnp.array([2.0, 0.5]), 0.8, 1.1
    height = most / jnp.linalg.norm(point)
    e = np.linspace(-9, 9, 2_000_001)
    density = np.exp(-(e**2) / (2 * std**2)) / np.sqrt(2 * np.pi) / std
    share = np.trapezoid(np.minimum(e**2, height**2) * density, e) / std**2
    noise = mf.LabelNoise(std, batch_size=1)
    clipped = mf.LimitDiffusion(VALLEY, noise, updates.ClippedSGD(most)).drift(point)
    close("clipped", clipped, share * mf.LimitDiffusion(VALLEY, noise).drift(point), 1e-8)


# --- new updates -----------------------------------------------------------------------------


class Cubic(updates.AbstractPreconditionedUpdate):
    """θ ← θ − η·v·g, a preconditioner of one's own in one class."""

    averaging_rate = None
    needs = "noise of covariance c∇²L"
    failure = "The second moments are not finite."
    clock = mf.LimitClock()

    def fits(self, setting: updates.Setting) -> bool:
        return setting.hessian_multiple is not None

    def preconditioner(self, second_moments):
        return second_moments

    def transform(self, learning_rate):
        return optax.sgd(learning_rate)

    def slow_drift(self, coordinates):
        return None


class Halved(updates.AbstractRowsUpdate):
    """Half of the gradient of one example: SGD at half the rate, by rows."""

    keeps_gradients: ClassVar[bool] = False
    needs = "label noise of single examples"
    clock = mf.LimitClock()

    def fits(self, setting):
        return setting.label_std is not None

    def row(self, gradient):
        return jax.tree.map(lambda g: g / 2, gradient)

    def response(self, lengths, setting):
        ones = jnp.ones_like(lengths)
        return setting.slope * ones, (setting.slope * setting.label_std) ** 2 * ones

    def transform(self, learning_rate):
        return optax.sgd(learning_rate)

    def slow_drift(self, coordinates):
        return None


class Steep(updates.AbstractPotentialUpdate):
    """−P∇ of the sum of squared eigenvalues."""

    needs = "anything"
    clock = mf.LimitClock()

    def fits(self, setting):
        return True

    def potential(self, local):
        return jnp.sum(local.hessian_eigenvalues() ** 2)

    def rate(self, setting):
        return jnp.asarray(1.0)

    def transform(self, learning_rate):
        return optax.sgd(learning_rate)

    def slow_drift(self, coordinates):
        return None


def test_a_new_update_is_one_class():
    """w' = s/2 with s = v: −½G_S∇Σ vⱼ²/4, at S = Diag v."""
    flow = mf.LimitDiffusion(VALLEY, mf.LabelNoise(0.8), Cubic())
    x, y = 2.0, 0.5
    v, row = 0.64 * np.array([y**2, x**2]), np.array([y, x])  # of (x, y)
    moments = lambda p: 0.64 * p[::-1] ** 2
    slope = jax.grad(lambda p: jnp.sum(moments(p) ** 2) / 4)(jnp.array([x, y]))
    matrix = np.diag(v) - np.outer(v * row, v * row) / (row @ (v * row))
    close("v", flow.drift(jnp.array([x, y])), -matrix @ slope / 2, 1e-10)
    half = mf.LimitDiffusion(GAMMA, ONE, Halved()).drift(POINT)
    close("η/2", half, jax.tree.map(lambda d: d / 4, mf.LimitDiffusion(GAMMA, ONE).drift(POINT)),
          1e-9)  # fmt: skip
    steep = mf.LimitDiffusion(GAMMA, mf.IsotropicNoise(), Steep())
    along = mf.riemannian_gradient(
        GAMMA, lambda p: LOSS.scale**2 * jnp.sum(LOSS.jacobian(p).gram() ** 2), POINT
    )
    close("Σλ²", steep.drift(POINT), jax.tree.map(jnp.negative, along), 1e-9)
    for kind in (updates.AbstractLimitedUpdate, updates.AbstractUpdate):
        assert isinstance(Cubic(), kind)


def test_what_a_batch_is():
    for given, expected in (
        (mf.LabelNoise(0.3), (2, True)), (mf.LabelNoise(0.3, batch_size=1), (1, False)),
        (mf.MinibatchNoise(2), (2, True)), (mf.MinibatchNoise(2, replacement=True), (2, False)),
    ):  # fmt: skip
        assert isinstance(given, noise.AbstractBatchNoise)
        batch = given.batch(LOSS)
        assert isinstance(batch, noise.Batch)
        equal("size, is_full", (batch.size, batch.is_full), expected)
        is_label = isinstance(given, mf.LabelNoise)
        equal("label_std", batch.label_std is None, not is_label)
    other = mf.PerExampleLoss(LOSS.inputs, LOSS.targets, lambda f, y: (f - y) ** 2, predict=network)
    assert mf.LabelNoise(0.3).batch(other) is None


def test_subsampled_drifts_are_those_of_sgd():
    for name in ("Adam", "LocalSGD", "Muon"):
        with refused(ValueError, "subsampled_drift", f"updates.{name}"):
            mf.flows.subsampled_drift(
                flow_of(name), POINT, jax.random.key(0), num_examples=2, num_groups=2
            )


# --- scaling rules ---------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [4.0, 0.3])
@pytest.mark.parametrize(
    "update",
    [
        updates.SGD(0.5, weight_decay=0.7), updates.LocalSGD(3, 0.8), updates.Adam(eps=0.2),
        updates.Adam(0.5, averaging=1.7, eps=0.05, weight_decay=0.3),
    ],
)  # fmt: skip
def test_scaled_runs_have_one_limit(update, factor):
    """The noise of κ times the batch has 1/κ of the covariance; an epoch drifts the same way."""
    rule = updates.scaling_rule(update, factor)
    assert isinstance(rule, updates.ScalingRule) and isinstance(
        update, updates.AbstractScalableUpdate
    )
    per_epoch = float(rule.learning_rate) ** 2 / factor  # of the clock kη², in 1/κ of the steps
    before = mf.LimitDiffusion(GAMMA, mf.LabelNoise(0.6), update).drift(POINT)
    quieter = mf.LabelNoise(0.6 / np.sqrt(factor))
    after = mf.LimitDiffusion(GAMMA, quieter, rule.update).drift(POINT)
    close("an epoch", per_epoch * flat(after), flat(before), 1e-9)
    kept = mf.LimitDiffusion(GAMMA, quieter, update).drift(POINT)
    if not isinstance(update, updates.Adam):
        return
    with pytest.raises(AssertionError, match="above the bound"):
        close("η → κη for Adam", factor * flat(kept), flat(before), 1e-2)


def test_the_factors_of_a_rule():
    """They are those of the hyperparameters that the larger run is given."""
    rule = updates.scaling_rule(updates.Adam(averaging=2.0, weight_decay=0.3, eps=0.1), 9.0)
    equal("printed", str(rule), "B → 9·B: η → 3·η, λ → 3·λ, (1 − β₂) → 9·(1 − β₂), ε → 0.3333·ε")
    close("1 − β₂ = bη", rule.update.averaging_rate / 2 * rule.learning_rate, rule.averaging, 1e-12)
    close("λ = wη", rule.update.weight_decay / 0.3 * rule.learning_rate, rule.weight_decay, 1e-12)
    rule = updates.scaling_rule(updates.SGD(weight_decay=0.3), 4)
    equal("printed", str(rule), "B → 4·B: η → 4·η, λ → λ")
    close("λ = wη", rule.update.weight_decay / 0.3 * rule.learning_rate, 1.0, 1e-12)
    rule = updates.scaling_rule(updates.LocalSGD(2, 0.5), 2)
    equal("printed", str(rule), "B → 2·B: η → 2·η, H → 0.5·H")
    equal("α = ηH", float(rule.learning_rate * rule.local_steps), 1.0)
    for update in (updates.Muon(), updates.SAM(0.1)):
        with refused(ValueError, "a limit for batches of any size", type(update).__name__):
            updates.scaling_rule(update, 2.0)
    with refused(ValueError, "batch_factor must be positive"):
        updates.scaling_rule(updates.SGD(), 0.0)


def test_bad_options():
    for options, words in (
        ({"averaging": "slow"}, "averaging must be a rate"), ({"averaging": 0.0}, "averaging"),
        ({"b1": 1.0}, "[0, 1)"), ({"eps": -1.0}, "eps"), ({"weight_decay": -1.0}, "weight_decay"),
    ):  # fmt: skip
        with refused(ValueError, words):
            updates.Adam(**options)
    with refused(ValueError, "ClippedSGD: max_norm must be positive"):
        updates.ClippedSGD(0.0)
    with refused(ValueError, "radius must be positive"):
        updates.SAM(-1.0)
    with refused(ValueError, "num_workers must be a positive integer"):
        updates.LocalSGD(0, 0.1)
    with refused(ValueError, "gradient_time"):
        updates.LocalSGD(2, -0.1)
