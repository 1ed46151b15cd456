"""Networks moved along their rescalings to the balance of noise or norms."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize

import manifoldflow as mf
from checks import at_least, close, equal, refused
from manifoldflow import symmetry

INPUTS, TARGETS = jr.normal(jr.key(0), (6, 2)), jr.normal(jr.key(1), (6, 2))
LOSS = mf.LeastSquares(INPUTS, TARGETS)
EXAMPLES = symmetry.examples_of(LOSS)


def mlp(activation=jax.nn.leaky_relu, depth=2, seed=0, **options):
    return eqx.nn.MLP(2, 2, 4, depth, activation=activation, key=jr.key(seed), **options)


NETWORK = mlp()
FOUND = symmetry.find_rescalings(NETWORK, *EXAMPLES)
BY_HAND = tuple(symmetry.mlp_rescaling(NETWORK, layer) for layer in (0, 1))


def outputs(network):
    return jax.vmap(network)(INPUTS)


def unbalanced(network, parameters=(1.5, -2.0)):
    return symmetry.act_together(BY_HAND, network, parameters)


def squared_norms(network):
    """Of the layers with their biases, but the last; of the weights, but the first."""
    weights = np.array([jnp.sum(layer.weight**2) for layer in network.layers])
    biases = np.array([jnp.sum(layer.bias**2) for layer in network.layers])
    return weights[:-1] + biases[:-1], weights[1:]


KINDS = {
    "noise": {},
    "decaying noise": {"noise_scale": 0.1, "weight_decay": 0.02},
    "norm": {"kind": "norm"},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_the_function_stays_and_the_balance_is_one(options):
    far = unbalanced(NETWORK)
    balanced, info = symmetry.balance_with_info(far, LOSS, **options)
    equal("type", type(balanced), eqx.nn.MLP)
    assert isinstance(info, symmetry.Balance) and bool(info.info.is_successful), info
    equal("names", info.names, (".layers[0] against .layers[1]", ".layers[1] against .layers[2]"))
    assert ".layers[0] against .layers[1]: λ = " in str(info)
    close("function", outputs(balanced), outputs(NETWORK), 1e-10)
    # Every point of an orbit has the same balance, and that is where it stays.
    at_least("way", np.max(np.abs(info.parameters)), 1.0)
    same = symmetry.balance(NETWORK, LOSS, symmetries=FOUND, **options)
    close("from elsewhere", mf.split(balanced)[0], mf.split(same)[0], 1e-9)
    again = symmetry.balance(balanced, LOSS, symmetries=BY_HAND, **options)
    close("again", mf.split(again)[0], mf.split(balanced)[0], 1e-9)


def test_it_is_where_decay_and_noise_are_least():
    """∇(γ‖θ‖² + ½σ² tr Σ) along the orbit, by gradients of the examples and another search."""
    sigma, gamma = 0.1, 0.02
    one, other = (symmetry.mlp_rescaling(NETWORK, layer) for layer in (0, 1))

    @jax.jit
    @jax.value_and_grad
    def potential(parameters):
        moved = one.act(other.act(NETWORK, parameters[1]), parameters[0])
        flat, unravel = ravel_pytree(mf.split(moved)[0])
        rebuilt = lambda x: eqx.combine(unravel(x), mf.split(moved)[1])
        example = lambda x, z: jnp.mean((rebuilt(x)(z[0]) - z[1]) ** 2) / 2
        rows = jax.vmap(lambda z: jax.grad(example)(flat, z))((INPUTS, TARGETS))
        return gamma * flat @ flat + sigma / 2 * jnp.sum(jnp.var(rows, axis=0))

    best = minimize(potential, np.zeros(2), jac=True, method="BFGS", tol=1e-10).x
    options = {"noise_scale": sigma, "weight_decay": gamma, "symmetries": FOUND}
    _, info = symmetry.balance_with_info(NETWORK, LOSS, **options)
    close("λ", info.parameters, best, 1e-6)
    _, norms = symmetry.balance_with_info(NETWORK, LOSS, kind="norm", symmetries=FOUND)
    at_least("norms have another one", np.max(np.abs(norms.parameters - best)), 1e-2)


def test_norms_are_equal():
    balanced = symmetry.balance(NETWORK, EXAMPLES, kind="norm", symmetries=FOUND)
    close("norms of consecutive layers", *squared_norms(balanced), 1e-10)
    size = lambda network: sum(jnp.sum(x**2) for x in jax.tree.leaves(mf.split(network)[0]))
    for direction in (unbalanced(balanced, (0.01, 0.02)), unbalanced(balanced, (0.01, -0.01))):
        at_least("norm beside it", size(direction) - size(balanced), 1e-5)


def test_norms_about_an_activation_of_degree_two():
    """‖W₀‖² = 2‖W₁‖² = 4‖W₂‖², and ‖W₀‖⁴‖W₁‖²‖W₂‖ is what it was."""
    network = mlp(lambda z: jax.nn.relu(z) ** 2, use_bias=False, use_final_bias=False)
    sizes = lambda network: np.array([jnp.linalg.norm(x.weight) for x in network.layers])
    last = (np.prod(sizes(network) ** [4, 2, 1]) / 32) ** (1 / 7)
    balanced = symmetry.balance(network, LOSS, kind="norm")
    close("norms", sizes(balanced), last * np.array([2, 2**0.5, 1]), 1e-10)
    close("function", outputs(balanced), outputs(network), 1e-10)


def test_under_label_noise_the_balance_is_the_flattest_point():
    """With errors ±e_k on the labels of a perfect fit Σ ∝ ∇²L: tr Σ is least where tr∇²L is."""
    network = mlp(depth=1)
    rescaling = symmetry.mlp_rescaling(network)
    signs = jnp.concatenate([jnp.eye(2), -jnp.eye(2)])
    noisy = mf.LeastSquares(
        jnp.repeat(INPUTS, 4, axis=0),
        jnp.repeat(outputs(network), 4, axis=0) + jnp.tile(signs, (6, 1)),
    )
    _, info = symmetry.balance_with_info(network, noisy, symmetries=[rescaling])
    perfect = mf.LeastSquares(INPUTS, outputs(network))
    sharpness = jax.jit(lambda c: perfect.trace_gauss_newton(rescaling.act(network, c)))
    # It is a + b e^{2λ} + c e^{−2λ}; three values give its minimum.
    grow = np.exp(2.0)
    rows = [[1, 1, 1], [1, grow, 1 / grow], [1, 1 / grow, grow]]
    _, b, c = np.linalg.solve(rows, [sharpness(x) for x in (0.0, 1.0, -1.0)])
    close("λ", info.parameters[0], np.log(c / b) / 4, 1e-9)


def test_inside_jit_and_vmap_and_in_single_precision():
    members = [NETWORK, unbalanced(NETWORK), mlp(seed=1)]
    small = lambda x: x.astype("float32") if eqx.is_array(x) else x
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0],
        *(jax.tree.map(small, member) for member in members),
    )
    balanced = lambda network: symmetry.balance(network, LOSS, symmetries=FOUND, throw=False)
    together = eqx.filter_jit(eqx.filter_vmap(balanced))(stacked)
    equal("dtype", together.layers[0].weight.dtype, np.dtype("float32"))
    for index, member in enumerate(members):
        found = jax.tree.map(lambda leaf: leaf[index] if eqx.is_array(leaf) else leaf, together)
        close("member", mf.split(found)[0], mf.split(balanced(member))[0], 1e-4)
        close("function", outputs(found), outputs(member), 1e-5)
    with refused(ValueError, "inside jit", "symmetries=find_rescalings"):
        eqx.filter_jit(lambda network: symmetry.balance(network, LOSS))(NETWORK)


def one_sided():
    """A neuron for which ∂ℓ/∂U is the same in all examples: only W's gradient is noisy."""
    network = eqx.nn.MLP(2, "scalar", 1, 1, use_bias=False, use_final_bias=False, key=jr.key(0))
    where = lambda m: (m.layers[0].weight, m.layers[1].weight)
    network = eqx.tree_at(where, network, (jnp.array([[1.0, 0.0]]), jnp.array([[1.0]])))
    inputs = jnp.array([[1.0, 0.3], [2.0, -1.0], [4.0, 2.0], [8.0, 1.0]])
    hidden = inputs[:, 0]
    return network, mf.LeastSquares(inputs, hidden - 1 / hidden)


def test_a_balance_at_infinity_is_refused():
    network, loss = one_sided()
    words = ".layers[0] against .layers[1], λ = +inf", "weight_decay > 0", "kind='norm'"
    with refused(eqx.EquinoxRuntimeError, *words):
        symmetry.balance(network, loss)
    given = symmetry.find_rescalings(network, *symmetry.examples_of(loss))
    lost, info = symmetry.balance_with_info(network, loss, symmetries=given)
    assert bool(info.info.result == mf.RESULTS.no_equilibrium)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(mf.split(lost)[0]))
    # What the message says to do does help.
    for mended in (
        symmetry.balance(network, loss, noise_scale=0.1, weight_decay=1e-4, symmetries=given),
        symmetry.balance(network, loss, kind="norm", symmetries=given),
    ):
        close("function", jax.vmap(mended)(loss.inputs), jax.vmap(network)(loss.inputs), 1e-10)


def test_weights_of_any_scale_have_no_least_norm():
    direction = lambda w, x: (w @ x) ** 2 / (w @ w)
    weights = jnp.array([1.0, 2.0])
    grows = [symmetry.scaling(weights)]
    for kind, value in (("norm", "-inf"), ("noise", "+inf")):
        with refused(eqx.EquinoxRuntimeError, f"symmetries[0], λ = {value}"):
            symmetry.balance(weights, (direction, INPUTS), kind=kind, symmetries=grows)
    inside = jax.jit(lambda w: symmetry.balance(w, (direction, INPUTS), symmetries=grows))
    with refused(RuntimeError, "weight_decay > 0", "leave that symmetry out"):
        jax.block_until_ready(inside(weights))


def test_what_is_refused():
    with refused(ValueError, "no rescaling", "homogeneous"):
        symmetry.balance(mlp(jnp.tanh), LOSS)
    with refused(ValueError, "'noise', 'norm'", "'flat'"):
        symmetry.balance(NETWORK, LOSS, kind="flat")
    with refused(ValueError, "give noise_scale as well"):
        symmetry.balance(NETWORK, LOSS, weight_decay=0.1)
    with refused(ValueError, "kind='norm' takes neither"):
        symmetry.balance(NETWORK, LOSS, kind="norm", noise_scale=0.1)
