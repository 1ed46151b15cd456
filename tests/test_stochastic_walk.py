"""The stochastic walk: unbiased, three gradients a step, in any units, and where it goes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, distance, equal, flat, in_window, refused, slope
from manifoldflow.walks import StochasticWalk

INPUTS, NUMBERS = jr.normal(jr.key(1), (6, 2)), jr.normal(jr.key(2), (6, 3))
CLASSES = jnp.arange(6) % 3
MODEL = {"in": jr.normal(jr.key(3), (4, 2)), "out": jr.normal(jr.key(4), (3, 4)) / 2}
NUM_DRAWS = 4096


def predict(w, x):
    return w["out"] @ jnp.tanh(w["in"] @ x)


def first(w, x):
    return predict(w, x)[0]


def of(loss_fn, targets, predict=predict, **options):
    return mf.PerExampleLoss(INPUTS, targets, loss_fn, predict=predict, **options)


def cross_entropy(f, y):
    return jax.nn.logsumexp(f) - f[y]


def apart(f, y):
    return jnp.sum(jax.nn.softplus(f) - y * f)


def probit(f, y):
    return -jax.scipy.stats.norm.logcdf(y * f)


SQUARED = mf.LeastSquares(INPUTS, NUMBERS, predict=predict, scale=0.3)
ENTROPY = of(cross_entropy, CLASSES, weight_decay=0.1)
LOSSES = {
    "squared": (SQUARED, 4),
    "cross-entropy": (ENTROPY, 3),
    "labels apart": (of(apart, jax.nn.sigmoid(NUMBERS)), None),
    "not a canonical link": (of(probit, jnp.sign(NUMBERS[:, 0]), first), 2),
}


def trace(loss, point, outputs_at=None):
    """tr G by whole Jacobians and output Hessians; these at other outputs if it is said where."""

    def one(x, y):
        jacobian = jax.jacobian(loss.example_output)(point, x).values()
        output = loss.example_output(point if outputs_at is None else outputs_at, x)
        rows = jnp.concatenate([leaf.reshape(output.size, -1) for leaf in jacobian], axis=1)
        if isinstance(loss, mf.LeastSquares):
            return loss.num_examples * loss.scale * jnp.sum(rows**2)
        hessian = jax.hessian(loss.loss_fn)(output, y).reshape(output.size, output.size)
        return jnp.sum((hessian @ rows) * rows)

    return jnp.mean(jax.vmap(one)(loss.inputs, loss.targets))


def exact(loss, point=MODEL, outputs_at=None):
    """∇L + ∇tr G, and tr G."""
    bent = lambda x: trace(loss, x, outputs_at)
    both = lambda x: (jax.grad(lambda x: loss(x) + bent(x))(x), bent(x))
    return jax.jit(both)(point)


@eqx.filter_jit
def drawn(loss, walk, num_draws=NUM_DRAWS, point=MODEL):
    """Gradients as rows, and estimates of the trace."""

    def one(key):
        gradient, bent = walk.gradient_and_trace(loss, point, key)
        return flat(gradient), bent

    return jax.vmap(one)(jr.split(jr.key(5), num_draws))


def errors(found, expected):
    """In standard errors of the mean, the largest of all entries."""
    mean, spread = jnp.mean(found, axis=0), jnp.std(found, axis=0)
    return float(jnp.max(jnp.abs(mean - expected) / (spread / jnp.sqrt(len(found)) + 1e-12)))


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_unbiased(name):
    """And that of output Hessians that do not move with the outputs is another one."""
    loss, size = LOSSES[name]
    gradients, traces = drawn(loss, StochasticWalk(1.0, size))
    gradient, bent = exact(loss)
    at_most("gradient, in standard errors", errors(gradients, flat(gradient)), 4)
    at_most("trace, in standard errors", errors(traces, bent), 4)
    if name == "cross-entropy":
        close("the trace", bent, loss.trace_gauss_newton(MODEL), 1e-12)
        held = flat(exact(loss, outputs_at=MODEL)[0])
        at_least("held Hessians, in standard errors", errors(gradients, held), 20)


def test_smoothed_labels_change_the_loss_alone():
    soft = of(lambda f, p: jax.nn.logsumexp(f) - p @ f, jax.nn.softmax(NUMBERS), weight_decay=0.1)
    bent = [
        flat(StochasticWalk(1.0).gradient(loss, MODEL, jr.key(2))) - flat(loss.gradient(MODEL))
        for loss in (soft, ENTROPY)
    ]
    close("the part of the trace", bent[0], bent[1], 1e-9)


def test_the_bias_is_of_second_order_in_the_step():
    """In the exact mean, over the four signs of two outputs."""
    loss = mf.LeastSquares(INPUTS[:2], NUMBERS[:2, 0], predict=lambda w, x: jnp.sinh(first(w, x)))
    steps, found, expected = [0.2, 0.1, 0.05], [], flat(exact(loss)[0])
    for step in steps:
        rows, _ = drawn(loss, StochasticWalk(1.0, relative_step=step), 64)
        each = np.unique(np.asarray(rows).round(9), axis=0)
        equal("signs", len(each), 4)
        found.append(np.linalg.norm(each.mean(axis=0) - expected))
    in_window("order", slope(steps, found), 1.8, 2.2)
    at_most("relative bias at a twentieth", found[-1] / np.linalg.norm(expected), 0.01)


def flops(fn, *arguments):
    """As the program is written, with its arrays as constants."""
    return jax.jit(lambda: fn(*arguments)).lower().cost_analysis()["flops"]


@pytest.mark.parametrize("name", ["squared", "cross-entropy"])
def test_a_step_takes_less_than_three_gradients(name):
    wide = {"in": jr.normal(jr.key(0), (64, 2)), "mid": jnp.eye(64), "out": jnp.ones((3, 64))}
    deep = lambda w, x: w["out"] @ jnp.tanh(w["mid"] @ jnp.tanh(w["in"] @ x))
    inputs, numbers = jr.normal(jr.key(1), (64, 2)), jr.normal(jr.key(2), (64, 3))
    loss = mf.LeastSquares(inputs, numbers, predict=deep)
    if name == "cross-entropy":
        loss = mf.PerExampleLoss(inputs, jnp.arange(64) % 3, cross_entropy, predict=deep)
    walk = flops(StochasticWalk(1.0).gradient, loss, wide, jr.key(0))
    one = flops(jax.value_and_grad(loss), wide)
    in_window("value_and_grads in a step", walk / one, 2.0, 3.0)


def test_units_do_not_matter():
    walk, key = StochasticWalk(1.0), jr.key(7)
    expected = walk.gradient(SQUARED, MODEL, key)
    large = lambda w, x: 2.0**20 * predict(w, x)
    scaled = mf.LeastSquares(INPUTS, 2.0**20 * NUMBERS, predict=large, scale=0.3 * 2.0**-40)
    close("units of the outputs", walk.gradient(scaled, MODEL, key), expected, 1e-12)
    # Small weights with large gradients beside large ones with small: a step is small for both.
    units = {"in": 1e-4, "out": 1e4}
    other = {name: leaf * units[name] for name, leaf in MODEL.items()}
    inside = lambda w, x: predict({name: w[name] / units[name] for name in w}, x)
    scaled = mf.LeastSquares(INPUTS, NUMBERS, predict=inside, scale=0.3)
    gradients, _ = drawn(scaled, StochasticWalk(1.0, relative_step=0.01), point=other)
    at_most("units of layers", errors(gradients, flat(exact(scaled, other)[0])), 4)


def test_zeros_and_tiny_numbers_leave_no_nan():
    walk, key = StochasticWalk(1.0), jr.key(0)
    squares = mf.LeastSquares(INPUTS, NUMBERS[:, 0], predict=lambda w, x: x @ w**2)
    for name, start in {"no slope": 0.0, "tiny": 1e-25}.items():
        point = jnp.full(2, start, jnp.float32)
        assert jnp.all(jnp.isfinite(walk.gradient(squares, point, key))), name
    line = mf.LeastSquares(INPUTS, NUMBERS[:, 0], predict=lambda w, x: x @ jnp.sinh(w))
    found = walk.gradient(line, jnp.zeros(2), key)
    close("at the origin, where ∇tr G = 0", found, line.gradient(jnp.zeros(2)), 1e-3)


def mixed(w, x):
    """Weights in single precision, products in bfloat16."""
    w, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (w, x))
    return predict(w, x).astype(jnp.float32)


CASES = {  # dtype of the weights, of the numbers within, how far rounding may lead
    "single": (jnp.float32, jnp.float32, 3e-4),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16, 0.15),
    "mixed": (jnp.float32, jnp.bfloat16, 0.15),
}


@pytest.mark.parametrize("name", CASES)
def test_rounding_decides_on_the_step(name):
    """So that it costs little, in bfloat16 within a model of float32 weights as well."""
    dtype, within, bound = CASES[name]
    key, low = jr.key(3), jax.tree.map(lambda leaf: leaf.astype(dtype), MODEL)
    loss = ENTROPY
    if name == "mixed":
        loss = eqx.tree_at(lambda l: l.predict, loss, jax.tree_util.Partial(mixed))
    as_double = lambda tree: jax.tree.map(lambda leaf: leaf.astype(float), tree)
    step = float(jnp.finfo(within).eps) ** (1 / 3)
    expected = StochasticWalk(1.0, relative_step=step).gradient(ENTROPY, as_double(low), key)
    found = StochasticWalk(1.0).gradient(loss, low, key)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(found))
    at_most("error", distance(as_double(found), expected), bound)
    fine = StochasticWalk(1.0, relative_step=1e-6).gradient(loss, low, key)
    at_least("with a step for float64", distance(as_double(fine), expected), 5 * bound)


def test_a_training_loop_of_ones_own():
    """The loss is made of a batch within the jitted step; examples are PyTrees."""
    optimizer, walk = optax.sgd(0.1), StochasticWalk(0.01)
    both = lambda w, x: predict(w, jnp.stack([x["a"], x["b"]]))

    @jax.jit
    def step(params, state, batch, targets, key):
        gradient = walk.gradient(mf.LeastSquares(batch, targets, predict=both), params, key)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    batch, key = {"a": INPUTS[:, 0], "b": INPUTS[:, 1]}, jr.key(0)
    found, _ = step(MODEL, optimizer.init(MODEL), batch, NUMBERS, key)
    whole = mf.LeastSquares(INPUTS, NUMBERS, predict=predict)
    gradient = walk.gradient(whole, MODEL, key)
    close("one step", found, jax.tree.map(lambda p, g: p - 0.1 * g, MODEL, gradient), 1e-9)
    many = jax.vmap(lambda strength: StochasticWalk(strength).gradient(whole, MODEL, key))
    close("strengths in a row", many(jnp.array([0.01]))["in"][0], gradient["in"], 1e-9)


def test_simulate_runs_it_to_the_limit_at_the_time_it_states():
    """strength = ηc/4 in as many steps as label noise takes, and momentum counts as it does."""
    inputs, targets = jnp.array([[0.8, 0.6], [-0.5, 0.85]]), jnp.array([1.5, -1.0])
    predict = lambda w, x: jnp.sum(jnp.sinh(w @ x))
    loss = mf.LeastSquares(inputs, targets, predict=predict, scale=0.5)
    manifold, noise = mf.ZeroLossManifold(loss), mf.LabelNoise(std=1.0, batch_size=1)
    start = manifold.project(jr.normal(jr.key(0), (3, 2)))
    limit = mf.solve(mf.LimitDiffusion(manifold, noise), start, end_time=0.4).final
    fallen = loss.trace_gauss_newton(start) - loss.trace_gauss_newton(limit)
    c, end_time = noise.strength(loss), 0.4
    for rate, momentum in ((0.02, 0.0), (0.002, 0.9)):
        reach = rate / (1 - momentum)
        num_steps = round(end_time / reach**2)
        walk = StochasticWalk(reach * c / 4)
        close("t", 4 / c * walk.strength * reach * num_steps, end_time, 1e-2)
        run = mf.simulate(
            loss, walk, lambda rate: optax.sgd(rate, momentum), start, learning_rate=rate,
            num_steps=num_steps, key=jr.key(1),
        )  # fmt: skip
        landed = loss.trace_gauss_newton(mf.limit_map(loss, run.final))
        missing = (landed - loss.trace_gauss_newton(limit)) / fallen
        in_window(f"share of the fall, momentum {momentum}", 1 + float(missing), 0.95, 1.05)


def test_bad_input():
    with refused(ValueError, "strength", "negative"):
        StochasticWalk(-1.0)
    with refused(ValueError, "relative_step", "below 1"):
        StochasticWalk(1.0, relative_step=2.0)
    walk, key = StochasticWalk(1.0, 7), jr.key(0)
    with refused(ValueError, "batch_size=7", "6 examples"):
        walk.gradient(SQUARED, MODEL, key)
    with refused(ValueError, "LeastSquares or a PerExampleLoss", "FunctionLoss"):
        walk.gradient(mf.FunctionLoss(lambda w: jnp.sum(w["in"])), MODEL, key)
    for loss_fn in (lambda f, y: 2 * cross_entropy(f, y), lambda f, y: jnp.sum(f**2) ** 2):
        with refused(ValueError, "negative log-likelihoods", "(3,)"):
            StochasticWalk(1.0).gradient(of(loss_fn, CLASSES), MODEL, key)
