"""Gram matrices of many layers: on TPUs a program that does not grow with their number."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import manifoldflow as mf
from checks import close, equal
from manifoldflow.linalg.jacobian import _layers, _tiles

LOSS = mf.LeastSquares(jr.normal(jr.key(1), (512, 3)), jnp.zeros(512))


def network(depth):
    return eqx.nn.MLP(3, "scalar", 8, depth, activation=jnp.tanh, key=jr.key(0))


def num_products(depth, platform):
    """Of the Gram matrix alone; what the passes through the model take does not count."""
    arrays, rest = eqx.partition(network(depth), eqx.is_array)

    def counted(fn):
        traced = jax.jit(lambda arrays: fn(LOSS.jacobian(eqx.combine(arrays, rest)))).trace(arrays)
        return traced.lower(lowering_platforms=(platform,)).as_text().count("dot_general")

    of_rows = lambda jacobian: [block for blocks in jacobian.blocks for block in blocks]
    return counted(lambda jacobian: (of_rows(jacobian), jacobian.cross_gram(jacobian))) - counted(
        of_rows
    )


def test_on_tpus_layers_of_one_shape_take_one_program():
    equal("products for three more layers on TPUs", num_products(6, "tpu"), num_products(3, "tpu"))
    more = num_products(6, "cpu") - num_products(3, "cpu")
    equal("more on CPUs: δ·δ and a·a of each, and δ·δ of its bias", more, 9)


def test_the_loop_adds_what_is_added_in_turn():
    jacobian = LOSS.jacobian(network(3))
    weights = [blocks for blocks in jacobian.blocks if blocks[0].rows().shape[2:] == (8, 8)]
    layers = [list(zip(blocks, blocks, strict=True)) for blocks in weights]
    equal("hidden weights", len(layers), 2)
    total = jr.normal(jr.key(2), (512, 512))
    expected = _layers._in_turn(total, layers)
    close("the loop", _layers._in_loop(total, layers), expected, 1e-14)


def test_large_layers_and_others_are_not_copied(monkeypatch):
    jacobian = LOSS.jacobian(network(3))
    layers = [list(zip(blocks, blocks, strict=True)) for blocks in jacobian.blocks]
    sizes = sorted(len(group) for group in _layers._alike(layers))
    equal("weights and biases of two hidden layers, in groups", sizes[-1] >= 2, True)
    monkeypatch.setattr(_layers, "_STACKED", 0)
    equal("each by itself", [len(group) for group in _layers._alike(layers)], [1] * len(layers))


def test_tiles_are_made_from_a_size_on():
    def has_tiles(num_examples, num_rows, *axes):
        auto = (jax.sharding.AxisType.Auto,) * len(axes)
        mesh = jax.sharding.AbstractMesh((2,) * len(axes), axes, axis_types=auto)
        with jax.sharding.use_abstract_mesh(mesh):
            return _tiles.has_tiles(num_examples, num_rows)

    equal("128 rows a strip", has_tiles(512, 512, "examples"), True)
    equal("of two outputs", has_tiles(256, 512, "examples"), True)
    equal("fewer", has_tiles(508, 508, "examples"), False)
    equal("strips that differ", has_tiles(1022, 1022, "examples"), False)
    equal("with parameters cut", has_tiles(512, 512, "examples", "parameters"), False)
