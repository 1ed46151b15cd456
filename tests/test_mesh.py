"""Examples over several devices: the same numbers, in messages that are few and chosen."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import manifoldflow as mf
from checks import at_most, close, equal, refused
from processes import finished, start, two_reports

MOST = 40
# One for the factors, one for the Gram matrix, and for each product with J or its transpose: with
# vectors that are not whole, a factorisation sends its columns about, some 30 in all.
MOST_ALONG_EXAMPLES = {
    "drift": 6, "project": 16, "limit_map": 24, "stochastic walk": 3, "in chunks": 13
}  # fmt: skip
# Of programs with several Jacobians, where each weight and factor is sent as well.
MOST_OF = {"gram": 15, "limit_map": 110, "in chunks": 145}
KINDS = {"all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"}


def _most_along_examples(name):
    return MOST_ALONG_EXAMPLES[name.rpartition(",")[0]]


def test_meshes_change_nothing_but_the_messages():
    report, _ = finished(start("mesh_programs.py", "devices", num_devices=8))
    _, control = report.pop("control")
    assert control["all-to-all"], "rows in chunks without a mesh are sent about, and none was seen"
    for name, (gap, sent) in report.items():
        at_most(f"{name}: relative difference from one device", gap, 1e-10)
        at_most(f"{name}: messages {sent}", sum(sent.values()), _most_along_examples(name))
        assert set(sent) <= {"all-gather", "all-reduce"}, f"{name}: messages {sent}"
    equal("messages on one device", report["drift, 1 devices"][1], {})
    equal("messages on 2 and 8", report["drift, 2 devices"][1], report["drift, 8 devices"][1])


def test_each_device_makes_an_equal_part_of_one_triangle():
    report, _ = finished(start("mesh_programs.py", "tiles", num_devices=8))
    for name, (gap, sent, _, rows) in report.items():
        at_most(f"{name}: relative difference from one device", gap, 1e-10)
        equal(f"{name}: arrays of all products of a device's rows", rows, 0)
        equal(f"{name}: kinds of messages", set(sent), {"all-gather"})
    equal("messages: the factors, and the tiles", report["8 devices"][1], {"all-gather": 2})
    for count in (2, 4, 8):
        size = 64 // (2 * count)
        shape = [2 * count + 1, size, size]
        equal(f"tiles of one of {count} devices", report[f"{count} devices"][2], shape)


def test_parameters_are_spread():
    report, _ = finished(start("mesh_programs.py", "parameters", num_devices=8))
    for name, (gap, sent, _) in report.items():
        at_most(f"{name}: relative difference from one device", gap, 1e-10)
        assert set(sent) <= KINDS, f"{name}: messages {sent}"
        most = MOST_OF.get(name.split(" on ")[0], MOST)
        at_most(f"{name}: messages {sent}", sum(sent.values()), most)
    cut = ("drift", (2, 1)), ("drift", (4, 2)), ("limit_map", (2, 2)), ("gram", (4, 2))
    for name, shape in cut:
        part = report[f"{name} on {shape}"][2]
        equal(f"{name} on {shape}: the share of one device", part, 1 / math.prod(shape))
    equal("layer by layer", report["gram, layer by layer"][2], 1 / 8)


def test_two_processes():
    for report in two_reports("mesh_programs.py"):
        equal("devices", report["devices"], 4)
        at_most("relative difference from one device", report["gap"], 1e-10)
        at_most("with parameters spread as well", report["gap with parameters"], 1e-10)
        equal("the share of one device", report["part"], 1 / 4)


def test_a_loss_on_other_devices():
    report, _ = finished(start("mesh_programs.py", "elsewhere", num_devices=4))
    for name, message in report.items():
        for word in ("All arrays", "[0, 1] and [0, 1, 2, 3]", "shard_examples"):
            assert word in message, f"{name}: {message}"


def test_a_mesh_without_the_axis_changes_nothing():
    loss = mf.LeastSquares(jnp.eye(3), jnp.ones(3), predict=lambda w, x: w @ x)
    with jax.set_mesh(jax.make_mesh((1,), ("other",))):
        trace = loss.trace_gauss_newton(jnp.ones(3))
    assert trace == loss.trace_gauss_newton(jnp.ones(3))


def test_a_mesh_is_in_force_within_its_context_only():
    here = mf.mesh(examples=1)
    assert jax.sharding.get_mesh().empty
    with here as mesh:
        equal("axes", mesh.axis_names, ("examples",))
        equal("the mesh in force", jax.sharding.get_mesh().axis_names, ("examples",))
    assert jax.sharding.get_mesh().empty


@pytest.mark.quick
def test_bad_input():
    loss = mf.LeastSquares(jnp.eye(3), jnp.ones(3), predict=lambda w, x: w @ x)
    with refused(ValueError, "shard_examples", "mesh", "none"):
        mf.shard_examples(loss)
    with refused(ValueError, "mesh: examples", str(jax.device_count()), "1000"):
        mf.mesh(examples=1000)


def test_examples_are_sharded_within_jit_as_well():
    def trace(x, y):
        loss = mf.LeastSquares(x, y, predict=lambda w, x: w @ x)
        return mf.shard_examples(loss).trace_gauss_newton(jnp.ones(3))

    x, y = jnp.eye(3), jnp.ones(3)
    with mf.mesh(examples=1):
        close("tr", jax.jit(trace)(x, y), 1.0, 1e-14)
    with refused(ValueError, "shard_examples", "mesh in force", "examples"):
        jax.jit(trace)(x, y)


def test_parameters_are_placed():
    point = {"w": jnp.ones((256, 256)), "b": jnp.ones(3), "name": "net", "index": jnp.arange(3)}
    shapes = {"w": jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    with mf.mesh(examples=1, parameters=1):
        placed = mf.shard_parameters(point)
        equal("the name", placed["name"], "net")
        equal("w is cut", placed["w"].sharding.spec, P(("parameters", "examples"), None))
        equal("b is whole", placed["b"].sharding.spec, P(None))
        inside = jax.jit(lambda w: mf.shard_parameters({"w": w}))(point["w"])["w"]
        close("within jit", inside, placed["w"], 0)
        equal("shapes", mf.shard_parameters(shapes)["w"].sharding, placed["w"].sharding)
    with mf.mesh(examples=1):
        equal("without the axis", mf.shard_parameters(point)["w"].sharding.spec, P(None, None))
    with refused(ValueError, "shard_parameters", "mesh", "none"):
        mf.shard_parameters(point)
    with refused(ValueError, "mesh: examples × parameters", "1000"):
        mf.mesh(examples=1, parameters=1000)


@pytest.mark.quick
@pytest.mark.parametrize("count", [0, 1.5, "all"])
def test_bad_counts(count):
    with refused(ValueError, "mesh: examples"):
        mf.mesh(examples=count)
