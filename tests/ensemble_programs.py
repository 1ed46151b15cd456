"""What test_ensembles runs in processes of their own, as the number of devices is set at start.

devices: one ensemble of SGD runs over meshes of 1, 2 and 8 devices and chunks of all sizes.
process i port: one of two processes that share the ensemble.
"""

import functools
import json
import re
import sys

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.experimental import multihost_utils

import manifoldflow as mf

DATA = np.random.default_rng(0).normal(size=(30, 4))
START = {"w": np.ones((4, 3)), "v": np.ones(3)}


def sgd(key, start, data, num_steps=60):
    """SGD with momentum on a small network; every step draws from a key of its own."""
    optimizer = optax.sgd(0.05, momentum=0.5)
    start = jax.tree.map(jnp.asarray, start)

    def loss(point, batch):
        return jnp.mean((jnp.tanh(batch @ point["w"]) @ point["v"] - batch[:, 0]) ** 2)

    def step(carry, k):
        point, state = carry
        batch = data[jr.bits(jr.fold_in(key, k), (4,)) % len(data)]
        height, slope = jax.value_and_grad(loss)(point, batch)
        update, state = optimizer.update(slope, state)
        return (optax.apply_updates(point, update), state), height

    (point, _), losses = jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(num_steps))
    return {"point": point, "losses": losses, "key": key}


def ensemble_of_sgd(keys, **options):
    return mf.ensemble(sgd, keys, START, DATA, **options)


def one_by_one(keys):
    alone = jax.jit(sgd)
    results = [numbers(alone(key, START, jnp.asarray(DATA))) for key in keys]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *results)


def numbers(tree):
    """The arrays of NumPy, of keys their data."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: np.asarray(jr.key_data(x) if is_key(x) else x), tree)


def gap(results, expected):
    """The largest difference in any leaf, keys too; inf if the shapes differ."""
    worst = 0.0
    pairs = zip(*(jax.tree.leaves(numbers(tree)) for tree in (results, expected)), strict=True)
    for a, b in ((a.astype(float), b.astype(float)) for a, b in pairs):
        worst = max(worst, np.max(np.abs(a - b)) if a.shape == b.shape else np.inf)
    return float(worst)


def collectives(text):
    names = (
        "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    )
    return sorted(set(re.findall(names, text)))


def compiled(fn, keys, **options):
    return jax.jit(functools.partial(fn, **options)).lower(keys).compile().as_text()


def devices():
    report = {"devices": jax.device_count(), "gaps": {}}
    keys = mf.member_keys(jr.key(1), 19)
    expected = one_by_one(keys)
    for num_devices, chunk_sizes in ((1, (1, 4)), (2, (2,)), (8, (1, 2, None)), (None, (5,))):
        for chunk_size in chunk_sizes:
            found = ensemble_of_sgd(keys, chunk_size=chunk_size, mesh=mesh_of(num_devices))
            name = f"{num_devices} devices, chunks of {chunk_size}"
            report["gaps"][name] = gap(found, expected)
    report["collectives"] = {
        f"compiled, {n} devices": collectives(compiled(ensemble_of_sgd, keys[:16], mesh=mesh_of(n)))
        for n in (2, None)
    }
    # 19 members on 8 devices: cutting the superfluous ones off comes after the devices' part.
    report["collectives"]["jaxpr"] = collectives(str(jax.make_jaxpr(ensemble_of_sgd)(keys)))
    # The control: what a sum over the members is made of.
    total = lambda keys: jnp.sum(mf.ensemble(draw, keys))
    report["control"] = collectives(compiled(total, keys[:16]))
    report["others"] = others(keys)
    print(json.dumps(report))


def mesh_of(num_devices):
    """Made as users make it, with axes of the default type; None for the default mesh."""
    if num_devices is None:
        return None
    return jax.make_mesh((num_devices,), ("x",), devices=jax.devices()[:num_devices])


def draw(key, scale=1.0):
    return scale * jr.normal(key, (2,))


def others(keys):
    """Derivatives, progress, ensembles of ensembles, keys and data that live elsewhere."""
    on_one = lambda scale: mf.ensemble(draw, keys, scale, mesh=mesh_of(1), chunk_size=4)
    on_all = lambda scale: mf.ensemble(draw, keys, scale, chunk_size=2)
    square = lambda fn: lambda scale: jnp.sum(fn(scale) ** 2)
    scale, reports = jnp.asarray(1.5), []
    calls = {"chunk_size": 1, "progress": reports.append}
    mf.ensemble(draw, keys, scale, **calls)
    mf.ensemble(draw, keys, scale, chunk_size=2, progress=True)
    jax.effects_barrier()
    inner = lambda key: mf.ensemble(draw, mf.member_keys(key, 3), scale)
    nested = mf.ensemble(inner, keys)
    one = jax.jit(draw)
    alone = np.array([[one(key, scale) for key in mf.member_keys(q, 3)] for q in keys])
    third = jax.devices()[3]
    moved = mf.ensemble(draw, jax.device_put(keys, third), jax.device_put(scale, third))
    sharded = mf.ensemble(lambda key, rows: draw(key, rows[0, 0]), keys[:16], on_all(scale))
    first = np.asarray(one(keys[0], scale))[0]
    return {
        "gradient": gap(jax.grad(square(on_all))(scale), jax.grad(square(on_one))(scale)),
        "vmap": gap(jax.vmap(on_all)(jnp.arange(2.0)), jax.vmap(on_one)(jnp.arange(2.0))),
        "ensemble of ensembles": gap(nested, alone),
        "arguments on another device": gap(moved, on_one(scale)),
        "arguments from another ensemble": gap(sharded, on_one(first)[:16]),
        "reports": reports,
    }


def process(index, port):
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=2, process_id=index, initialization_timeout=30
    )
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    # Two processes with two devices each; 6 members leave two devices with a member too many.
    keys, gaps = mf.member_keys(jr.key(1), 8), {}
    expected = one_by_one(keys)
    for num_members in (8, 6):
        results = mf.ensemble(
            sgd, keys[:num_members], START, jnp.asarray(DATA), chunk_size=1, mesh=mesh
        )
        results["key"] = jr.key_data(results["key"])
        together = multihost_utils.process_allgather(results, tiled=True)
        some = jax.tree.map(lambda leaf, n=num_members: leaf[:n], expected)
        gaps[f"{num_members} members"] = gap(together, some)
    # Without a mesh, each process has an ensemble of its own.
    gaps["local"] = gap(mf.ensemble(sgd, keys, START, DATA), expected)
    jax.distributed.shutdown()
    print(json.dumps({"devices": len(mesh.devices), "gaps": gaps}))


if __name__ == "__main__":
    if sys.argv[1] == "devices":
        devices()
    else:
        process(int(sys.argv[2]), int(sys.argv[3]))
