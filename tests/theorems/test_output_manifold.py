"""Level sets of outputs: walks along them move no output, whatever the network was trained for."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import manifoldflow as mf
import zoo
from checks import at_least, at_most, close, equal, flat, refused
from manifoldflow import manifolds

INPUTS, _ = zoo.data(num_examples=5)
LABELS = jnp.array([2, 0, 1, 1, 0])
POINT = zoo.network_point(jr.key(5), num_outputs=3)


def cross_entropy(f, y):
    return jax.nn.logsumexp(f) - f[y]


def gelu_net(point, x):
    return point["out"] @ jax.nn.gelu(point["weight"] @ x + point["bias"])


def outputs(point, predict=gelu_net):
    return jax.vmap(lambda x: predict(point, x))(INPUTS)


def trained():
    """Hard labels fitted to a loss of about 0.1, which goes on falling without end."""
    loss = mf.PerExampleLoss(INPUTS, LABELS, cross_entropy, predict=gelu_net)

    @jax.jit
    def descend(point):
        step = lambda p, _: (jax.tree.map(lambda x, g: x - 0.5 * g, p, loss.gradient(p)), None)
        return jax.lax.scan(step, point, length=150)[0]

    return loss, descend(POINT)


def test_walk_of_a_cross_entropy_network():
    """−∇tr G along the level set: outputs, loss and the slopes in the outputs stay, tr G falls."""
    loss, point = trained()
    at_most("the loss after training", loss(point), 0.3)
    at_least("and still going down", jnp.linalg.norm(flat(loss.gradient(point))), 1e-2)
    manifold = mf.OutputManifold(gelu_net, INPUTS, like=point)
    flow = mf.RiemannianGradientFlow(manifold, loss.trace_gauss_newton)
    walk = mf.solve(flow, point, end_time=2.0, num_saves=8, observe={"tr": loss.trace_gauss_newton})
    end = jax.tree.map(lambda leaf: leaf[-1], walk.points)
    traces = np.asarray(walk.observables["tr"])
    at_most("outputs moved", jnp.max(jnp.abs(outputs(end) - outputs(point))), 1e-5)
    at_most("the loss moved", abs(loss(end) - loss(point)), 1e-5)
    assert np.all(np.diff(traces) < 0), traces
    at_most("share of tr G that is left", traces[-1] / loss.trace_gauss_newton(point), 0.9)
    at_least("weights moved", jnp.linalg.norm(flat(end) - flat(point)), 0.1)


def test_dense_normal_space():
    """Against the Jacobian of the outputs, in forward mode; the loss is half the mean square."""
    manifold = mf.OutputManifold(gelu_net, INPUTS, like=POINT)
    x, unravel = ravel_pytree(POINT)
    jacobian = jax.jacfwd(lambda x: outputs(unravel(x)).reshape(-1))(x)
    v = zoo.normal_like(POINT, 1)
    projected = flat(manifold.tangent_projection(POINT, v))
    close("Pv, seed 1", projected, flat(v) - jnp.linalg.pinv(jacobian) @ (jacobian @ flat(v)), 1e-9)
    moved = zoo.moved(POINT, v, 0.1)
    gap = outputs(moved) - outputs(POINT)
    close("constraint", manifold.constraint(moved), gap, 1e-12)
    close("loss", manifold.loss(moved), jnp.mean(gap**2) / 2, 1e-12)
    equal("codimension", manifold.codimension(POINT), 15)
    equal("dimension", manifold.dimension(POINT), x.size - 15)
    assert bool(manifold.is_on(POINT)) and not bool(manifold.is_on(moved))
    assert manifold.residual_loss is manifold.loss
    assert isinstance(manifold.local(POINT), manifolds.GramGeometry)


def product(point, x):
    return point["u"] * point["v"] * x


def test_more_outputs_than_coordinates():
    """f = uvx on five inputs: a hyperbola, walked to u = v where u² + v² is least."""
    inputs, start = (
        jnp.array([1.0, -2.0, 0.5, 3.0, 0.0]),
        {"u": jnp.array(3.0), "v": jnp.array(0.5)},
    )
    manifold = mf.OutputManifold(product, inputs, like=start)
    equal("codimension", manifold.codimension(start), 1)
    equal("dimension", manifold.dimension(start), 1)
    loss = mf.PerExampleLoss(inputs, inputs > 0, lambda f, y: jnp.logaddexp(0, f) - y * f,
                             predict=product)  # fmt: skip
    flow = mf.RiemannianGradientFlow(manifold, loss.trace_gauss_newton)
    end = mf.solve(flow, start, end_time=60.0).points
    found = flat(jax.tree.map(lambda leaf: leaf[-1], end))
    close("u and v at the end", found, jnp.full(2, np.sqrt(1.5)), 1e-4)


def test_everything_of_a_manifold_works_on_it():
    manifold = mf.OutputManifold(None, INPUTS[:3], like=zoo.mlp(jr.key(8), 3))
    point = zoo.mlp(jr.key(8), 3)
    u, v = (manifold.random_tangent(point, jr.key(i)) for i in (1, 2))
    of = lambda p: jax.vmap(p)(INPUTS[:3])
    ended = {
        "geodesic": mf.exponential_map(manifold, point, u),
        "retraction": manifold.retract(point, jax.tree.map(lambda x: 0.1 * x, u)),
        "limit of gradient flow": mf.limit_map(manifold, zoo.moved(point, u, 0.1)),
        "closest point": mf.closest_point(manifold, zoo.moved(point, u, 0.05)),
    }
    for name, end in ended.items():
        at_most(f"{name}: outputs moved", jnp.max(jnp.abs(of(end) - of(point))), 1e-5)
    form = mf.second_fundamental_form(manifold, point, u, v)
    rebuild, x = zoo.unraveller(manifold, point)
    jacobian = jax.jacfwd(lambda x: of(rebuild(x)).reshape(-1))(x)
    bend = jax.jvp(lambda x: jax.jvp(lambda x: of(rebuild(x)).reshape(-1), (x,), (flat(u),))[1],
                   (x,), (flat(v),))[1]  # fmt: skip
    close("II(u, v)", flat(form), -jnp.linalg.pinv(jacobian) @ bend, 1e-8)
    noisy = mf.LimitDiffusion(manifold, mf.LabelNoise(1.0))
    trace = mf.riemannian_gradient(manifold, manifold.loss.trace_gauss_newton, point)
    strength = mf.LabelNoise(1.0).strength(manifold.loss)
    close(
        "label noise on its own loss", flat(noisy.drift(point)), -strength / 4 * flat(trace), 1e-9
    )


def test_inside_transformations():
    """Built inside jit, and differentiated in the model that it is like."""
    v = zoo.normal_like(POINT, 1)

    @jax.jit
    def landed(like, start):
        manifold = mf.OutputManifold(gelu_net, INPUTS, like=like)
        return outputs(manifold.project(start))

    start = zoo.moved(POINT, v, 0.02)
    close("lands on its outputs", landed(POINT, start), outputs(POINT), 1e-8)
    push = lambda like: jax.jvp(lambda p: landed(p, start), (like,), (v,))[1]
    expected = jax.jvp(outputs, (POINT,), (v,))[1]
    close("which move with the model", push(POINT), expected, 1e-6)


def test_frozen_leaves_whole_number_inputs_and_single_precision():
    frozen = mf.OutputManifold(
        gelu_net, INPUTS, like=POINT, trainable={"weight": True, "bias": False, "out": True}
    )
    assert frozen.random_tangent(POINT, jr.key(0))["bias"] is None
    table = {"embed": jr.normal(jr.key(0), (7, 4)), "out": jr.normal(jr.key(1), (2, 4))}
    table = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), table)
    tokens = mf.OutputManifold(
        lambda p, i: p["out"] @ jnp.tanh(p["embed"][i]), jnp.array([0, 3, 6]), like=table
    )
    equal("dtype", tokens.constraint(table).dtype, jnp.dtype("float32"))
    equal("codimension", tokens.codimension(table), 6)


def test_structured():
    width, count = 100, 30
    inputs, point = jr.normal(jr.key(0), (count, 20)), zoo.network_point(jr.key(1), 20, width, 10)
    manifold = mf.OutputManifold(gelu_net, inputs, like=point)
    v = zoo.normal_like(point, 1)
    sizes = zoo.array_sizes(jax.make_jaxpr(manifold.tangent_projection)(point, v))
    num_rows = 10 * count
    at_most("largest array", max(sizes), num_rows * max(num_rows, flat(point).size / 4))


def test_messages():
    with refused(ValueError, "predict(point, x)", "None for point(x)", "got 3", wrong_type=True):
        mf.OutputManifold(3, INPUTS, like=POINT)
    with refused(ValueError, "OutputManifold needs arrays", "non-empty leading example axis"):
        mf.OutputManifold(gelu_net, {}, like=POINT)
    with refused(ValueError, "OutputManifold", "leading example axis", "Stack"):
        mf.OutputManifold(gelu_net, (INPUTS, INPUTS[:2]), like=POINT)
    with refused(ValueError, "finite outputs", "5 of the 5 inputs", "number 0"):
        mf.OutputManifold(gelu_net, INPUTS, like=POINT | {"out": jnp.full((3, 6), jnp.nan)})
    with refused(ValueError, "one array", "tuple"):
        mf.OutputManifold(lambda p, x: (gelu_net(p, x), None), INPUTS, like=POINT)
    with refused(ValueError, "not callable", "predict=lambda"):
        mf.OutputManifold(None, INPUTS, like=POINT)
    model = eqx.nn.Sequential([eqx.nn.Linear(3, 2, key=jr.key(0)), eqx.nn.Dropout(0.5)])
    with refused(ValueError, "Dropout in training mode", "inference_mode"):
        mf.OutputManifold(None, INPUTS, like=model)


@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_outputs_of_any_shape(shape):
    predict = lambda p, x: gelu_net(p, x)[0] + jnp.zeros(shape) * x[0]
    manifold = mf.OutputManifold(predict, INPUTS, like=POINT)
    equal("rank", int(manifold.rank(POINT)), 5)
