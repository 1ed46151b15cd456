"""Symmetries of networks: built, found and checked."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, equal, refused
from manifoldflow import symmetry
from symmetric_problems import B, DATA, example_loss, first, POINT, SYMMETRIES, TURN

OPTIONS = dict(noise_scale=0.05, weight_decay=0.3)


def network_loss(model, example):
    return jnp.sum((model(example[0]) - example[1]) ** 2)


def mlp(activation, depth=2):
    return eqx.nn.MLP(2, 2, 4, depth, activation=activation, key=jr.key(0))


@pytest.mark.parametrize("degree", [1, 2])
def test_rescalings_are_found(degree):
    model = mlp(lambda z: jax.nn.relu(z) ** degree)
    found = symmetry.find_rescalings(model, network_loss, DATA)
    equal("degrees", [r.degree for r in found], [degree, degree])
    equal("layers", [(r.first, r.second) for r in found],
          [(".layers[0]", ".layers[1]"), (".layers[1]", ".layers[2]")])  # fmt: skip
    assert "degree" in str(found[0]) and "holds" in str(found[0])
    for layer, rescaling in enumerate(found):
        assert isinstance(rescaling, symmetry.Rescaling)
        by_hand = symmetry.mlp_rescaling(model, layer, degree=degree)
        close(
            "C", *(symmetry.noether_charge(s, model) for s in (rescaling.symmetry, by_hand)), 1e-12
        )


def test_rescalings_of_neurons_add_up():
    model = mlp(jax.nn.leaky_relu, depth=1)
    found = symmetry.find_rescalings(model, network_loss, DATA, per_neuron=True)
    equal("neurons", [r.neuron for r in found], [0, 1, 2, 3])
    charges = [symmetry.noether_charge(r.symmetry, model) for r in found]
    whole = symmetry.noether_charge(symmetry.mlp_rescaling(model), model)
    close("Σ C of the neurons", sum(charges), whole, 1e-12)
    one = symmetry.mlp_rescaling(model, 0, neuron=2)
    close("one by hand", symmetry.noether_charge(one, model), charges[2], 1e-12)


def test_no_rescaling_where_there_is_none():
    equal("tanh", symmetry.find_rescalings(mlp(jnp.tanh), network_loss, DATA), [])


def test_any_network_of_linear_layers():
    keys = jr.split(jr.key(1), 2)
    layers = [eqx.nn.Linear(2, 4, key=keys[0]), eqx.nn.Lambda(jax.nn.relu),
              eqx.nn.Linear(4, 2, use_bias=False, key=keys[1])]  # fmt: skip
    found = symmetry.find_rescalings(eqx.nn.Sequential(layers), network_loss, DATA)
    equal("found", [(r.first, r.second) for r in found], [(".layers[0]", ".layers[2]")])


class Attention(eqx.Module):
    attention: eqx.nn.MultiheadAttention

    def __call__(self, x):
        return self.attention(x, x, x)


def test_queries_and_keys():
    layer = eqx.nn.MultiheadAttention(
        2, 4, qk_size=3, use_query_bias=True, use_key_bias=True, key=jr.key(0)
    )
    model = Attention(layer)
    data = jr.normal(jr.key(1), (5, 3, 4))
    loss = lambda m, x: jnp.sum(m(x)[0] ** 2)
    where = lambda m: m.attention
    one = symmetry.query_key_rotation(model, where, B, head=1)
    assert symmetry.check_symmetry(one, loss, model, data)
    wrong = symmetry.double_rotation(
        model,
        lambda m: m.attention.query_proj.weight,
        lambda m: m.attention.key_proj.weight,
        jnp.kron(jnp.ones((2, 2)), B),  # mixes the heads
        axes=(0, 0),
    )
    assert not symmetry.check_symmetry(wrong, loss, model, data)
    with refused(ValueError, "2 heads", "head=2"):
        symmetry.query_key_rotation(model, where, B, head=2)


def test_scaling_before_a_layer_norm_holds_up_to_its_epsilon():
    weights = {"a": jr.normal(jr.key(0), (4, 2)), "b": jr.normal(jr.key(1), (4,))}
    norm = eqx.nn.LayerNorm(4, use_weight=False, use_bias=False)

    def loss(p, example):
        return jnp.sum(p["b"] * norm(p["a"] @ example[0])) ** 2

    one = symmetry.scaling(weights, lambda p: p["a"])
    assert not symmetry.check_symmetry(one, loss, weights, DATA)
    check = symmetry.check_symmetry(one, loss, weights, DATA, tolerance=1e-3)
    assert check and 1e-9 < check.defect < 1e-3, check
    found = symmetry.noise_equilibrium(one, loss, weights, DATA, **OPTIONS)
    left = symmetry.noether_drift(one, loss, one.act(weights, found), DATA, **OPTIONS)
    at_most("drift there", abs(left), 1e-2 * abs(symmetry.noether_drift(one, loss, weights, DATA,
                                                                        **OPTIONS)))  # fmt: skip


def test_the_check_says_what_is_wrong():
    check = symmetry.check_symmetry(SYMMETRIES["rotation"], example_loss, POINT, DATA)
    assert isinstance(check, symmetry.SymmetryCheck) and check and "holds" in str(check)
    wrong = symmetry.check_symmetry(symmetry.scaling(POINT, first), example_loss, POINT, DATA)
    assert not wrong and "FAILS" in str(wrong)
    at_least("defect", wrong.defect, 0.1)
    turning = symmetry.ExponentialSymmetry(lambda p: {"U": p["U"] @ TURN, "W": -TURN @ p["W"]})
    check = symmetry.check_symmetry(turning, example_loss, POINT, DATA)
    at_most("defect of a rotation, which is a symmetry", check.defect, 1e-12)
    at_least("asymmetry", check.asymmetry, 1e-2)
    assert not check
    # At a minimum all gradients vanish; the change of ℓ still tells.
    circle = lambda p, radius: (jnp.sum(p**2) - radius) ** 2
    grows = symmetry.ExponentialSymmetry(jnp.ones(2))
    still = symmetry.check_symmetry(grows, circle, jnp.ones(2), jnp.array([2.0]))
    assert still.defect == 0.0 and not still


def test_losses_as_examples():
    predict = lambda p, x: p["U"] @ (p["W"] @ x)
    loss = mf.LeastSquares(*DATA, predict=predict, scale=2 / 6)
    one = SYMMETRIES["rotation"]
    of_loss, numbers = symmetry.examples_of(loss)
    found = symmetry.noether_drift(one, of_loss, POINT, numbers, **OPTIONS)
    close("G", found, symmetry.noether_drift(one, example_loss, POINT, DATA, **OPTIONS), 1e-12)
    with refused(ValueError, "loss over examples", "FunctionLoss", wrong_type=True):
        symmetry.examples_of(mf.FunctionLoss(lambda p: jnp.sum(p["U"])))
