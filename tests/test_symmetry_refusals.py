"""Networks and axes that symmetries cannot be told of are refused, and large weights are not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import manifoldflow as mf
from checks import at_most, close, refused
from manifoldflow import symmetry

INPUTS, TARGETS = jr.normal(jr.key(1), (20, 3)), jr.normal(jr.key(2), (20,))
LOSS = mf.LeastSquares(INPUTS, TARGETS)
FINDERS = {
    "find_rescalings": symmetry.find_rescalings,
    "find_products": symmetry.find_products,
    "find_scalings": symmetry.find_scalings,
}


def network(scale, dtype=jnp.float32):
    """Two hidden layers of ReLUs, with weights of about this size."""
    net = eqx.nn.MLP(3, "scalar", 8, 2, activation=jax.nn.relu, key=jr.key(0), dtype=dtype)
    return jax.tree.map(lambda leaf: scale * leaf if eqx.is_array(leaf) else leaf, net)


@pytest.mark.parametrize("name", FINDERS)
def test_a_network_with_nan_is_refused(name):
    """Nothing is found in NaN, which is no statement about symmetries."""
    where = lambda net: net.layers[1].weight
    broken = eqx.tree_at(where, network(1.0), replace_fn=lambda w: w.at[0, 0].set(jnp.nan))
    with refused(ValueError, f"{name} needs a model of finite numbers", ".layers[1].weight"):
        FINDERS[name](broken, *symmetry.examples_of(LOSS))
    with refused(ValueError, f"{name} needs a loss that is finite", "double precision"):
        FINDERS[name](network(1e15), *symmetry.examples_of(LOSS))


def test_balance_names_the_leaves_with_nan():
    broken = eqx.tree_at(lambda net: net.layers[0].bias, network(1.0), jnp.full(8, jnp.inf))
    with refused(ValueError, "needs a model of finite numbers", ".layers[0].bias"):
        symmetry.balance(broken, LOSS)


@pytest.mark.parametrize("kind", ["norm", "noise"])
def test_large_weights_in_single_precision(kind):
    """Squares of gradients overflow there, the equilibrium does not."""
    single = network(1e6)
    pairs = symmetry.find_rescalings(single, *symmetry.examples_of(LOSS))
    balanced = symmetry.balance(single, LOSS, kind=kind, symmetries=pairs)
    double = jax.tree.map(lambda x: x.astype(float) if eqx.is_array(x) else x, single)
    exact = symmetry.balance(double, LOSS, kind=kind, symmetries=pairs)
    for layer, wanted in zip(balanced.layers, exact.layers):
        close(f"{kind}: a weight", layer.weight, wanted.weight, 1e-4)
    at_most("the loss changes by", abs(LOSS(balanced) / LOSS(single) - 1), 1e-4)


def test_large_products_in_single_precision():
    u, w = (3e6 * jr.normal(jr.key(seed), (4, 4), jnp.float32) for seed in (0, 1))
    point, data = {"U": u, "W": w}, jr.normal(jr.key(2), (30, 4))
    loss = lambda p, x: jnp.sum((p["U"] @ (p["W"] @ x) - 1) ** 2)
    product = symmetry.product_symmetry(point, lambda p: p["U"], lambda p: p["W"])
    balance = lambda p: symmetry.balance(p, (loss, data), kind="norm", symmetries=[product])
    balanced, exact = balance(point), balance(jax.tree.map(lambda x: x.astype(float), point))
    close("UᵀU", balanced["U"].T @ balanced["U"], exact["U"].T @ exact["U"], 1e-4)


@pytest.mark.parametrize("axes", [(5, 0), (1, 2), (-3, 0)])
def test_axes_that_a_leaf_lacks_are_refused(axes):
    """Counted modulo the number of axes, 5 would be 1."""
    point = {"U": jnp.ones((2, 3)), "W": jnp.ones((3, 4))}
    pick = lambda name: lambda p: p[name]
    with refused(ValueError, "axes: got", "of 2 axes, expected an integer from -2 to 1"):
        symmetry.product_symmetry(point, pick("U"), pick("W"), axes=axes)
    with refused(ValueError, "axes: got", "of 2 axes, expected an integer from -2 to 1"):
        symmetry.double_rotation(point, pick("U"), pick("W"), jnp.eye(3), axes=axes)
    backwards = symmetry.product_symmetry(point, pick("U"), pick("W"), axes=(-1, -2))
    assert backwards.size(point) == 3


def test_noise_and_decay_meet_at_large_weights_in_single_precision():
    """The potential is taken in units of the loss: noise over u², decay over u² as well."""
    loss = lambda p, x: (p["w"] * (p["u"] @ x) - 1) ** 2
    pair = symmetry.ExponentialSymmetry({"u": 1.0, "w": -1.0})

    def where(dtype, decay):
        point = {"u": jnp.asarray([0, 4e5], dtype), "w": jnp.asarray(1e5, dtype)}
        data = jnp.array([[30.0, 1.0], [30.0, 2.0]], dtype)
        options = {"noise_scale": 0.5, "weight_decay": decay}
        return symmetry.noise_equilibrium(pair, loss, point, data, **options)

    # Between noise alone and decay alone, ln(1/4)/2 for equal norms.
    exact = [where(jnp.float64, decay) for decay in (0.0, 1e22, 1e23)]
    assert exact[0] > exact[1] + 0.3 > exact[2] + 0.6 > -jnp.log(2) + 0.6, exact
    for decay, wanted in zip((0.0, 1e22, 1e23), exact):
        close(f"decay {decay:g}", where(jnp.float32, decay), wanted, 1e-4)
