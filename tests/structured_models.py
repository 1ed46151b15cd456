"""Small models, one for each way in which parameters are used."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np


@dataclasses.dataclass
class Case:
    fn: Callable[[Any, Any], Any]
    params: Any
    inputs: Any
    treatments: tuple[str, ...]


def module_case(module: Any, inputs: Any, treatments: tuple[str, ...], call: Any = None) -> Case:
    params, static = eqx.partition(module, eqx.is_inexact_array)
    call = (lambda model, x: model(x)) if call is None else call
    return Case(lambda p, x: call(eqx.combine(p, static), x), params, inputs, treatments)


def normal(seed: int, *shape: int) -> jax.Array:
    """By NumPy: in JAX each new shape would be a program more."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def integers(seed: int, shape: tuple[int, ...], bound: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(bound, size=shape))


def drawn(make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The module `make(*arguments, **options, key=…)`, its arrays drawn by NumPy."""
    shapes = eqx.filter_eval_shape(lambda key: make(*arguments, **options, key=key), jr.key(0))
    arrays, rest = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    leaves, structure = jax.tree.flatten(arrays)
    new = [normal(i, *leaf.shape) / 2 for i, leaf in enumerate(leaves)]
    return eqx.combine(jax.tree.unflatten(structure, new), rest)


def mlp(out_size: Any, use_bias: bool = True) -> Case:
    options = {"use_bias": use_bias, "use_final_bias": use_bias}
    module = drawn(eqx.nn.MLP, 3, out_size, 4, 2, jnp.tanh, **options)
    labels = ("rank one", "elementwise") if use_bias else ("rank one",)
    return module_case(module, normal(1, 5, 3), 3 * labels)


def products_of_arrays() -> Case:
    params = {"a": normal(0, 3, 4), "b": normal(1, 5, 4), "c": normal(2, 5, 6)}

    def fn(p, x):
        hidden = jnp.tanh(p["b"] @ jnp.tanh(x["x"] @ p["a"]))
        return jnp.einsum("ij,i->j", p["c"], hidden)

    return Case(fn, params, {"x": normal(3, 4, 3)}, ("rank one",) * 3)


def normalised_weights() -> Case:
    """Scaled weights keep their structure; a normalised weight has rows of its own."""
    params = {"a": normal(0, 4, 3), "b": normal(1, 4, 4), "c": normal(2, 4)}

    def fn(p, x):
        hidden = jnp.tanh(-(p["a"] / jnp.sqrt(3.0)) @ x)
        hidden = jnp.tanh((p["b"] / jnp.linalg.norm(p["b"])) @ hidden)
        return jnp.sum(jnp.sin(p["c"]) * hidden)

    return Case(fn, params, normal(3, 5, 3), ("rank one", "dense rows", "dense rows"))


def with_custom_rules() -> Case:
    """ReLU's derivative at 0 is set by a custom rule; integer data select a branch."""
    params = {"w": normal(0, 4, 3), "b": jnp.zeros(4), "unused": normal(1, 2)}

    def fn(p, example):
        x, branch = example
        z = jax.jit(lambda w, x: w @ x)(p["w"], x) + p["b"]
        return jax.lax.cond(branch > 0, jax.nn.relu, jax.nn.silu, z)

    inputs = (normal(2, 5, 3).at[0].set(0.0), jnp.arange(5) % 2)
    return Case(fn, params, inputs, ("elementwise", "unused", "rank one"))


def tied_layers() -> Case:
    """One weight in two layers, as it is and transposed."""
    params = {"w": normal(0, 8, 8), "v": normal(1, 5, 8), "b": normal(2, 8)}

    def fn(p, x):
        x = jnp.tanh(p["w"] @ x + p["b"])
        x = jnp.tanh(p["w"] @ x + p["b"])
        return p["v"].T @ jnp.tanh(p["v"] @ x)

    return Case(fn, params, normal(3, 5, 8), ("elementwise", "positions", "positions"))


def layer_norm() -> Case:
    """Scale and shift of each of four positions, with the broadcasting of `vmap`."""
    module = eqx.nn.LayerNorm(3)
    module = eqx.tree_at(lambda m: m.weight, module, normal(0, 3))
    call = lambda model, x: jnp.sin(jax.vmap(model)(x)).sum(0)
    return module_case(module, normal(1, 5, 4, 3), ("elementwise",) * 2, call)


def attention(length: int = 5, width: int = 4, label: str = "positions, summed") -> Case:
    module = drawn(eqx.nn.MultiheadAttention, 2, width, use_output_bias=True)
    call = lambda model, x: model(x, x, x).sum(0)[:1]
    return module_case(module, normal(1, 3, length, width), (label,) * 4 + ("elementwise",), call)


def embedding() -> Case:
    """Two look-ups in one table, of several rows and of one."""
    module = drawn(eqx.nn.Embedding, 7, 3)
    call = lambda model, x: jnp.tanh(jax.vmap(model)(x)).mean(0) * model(x[0])
    inputs = integers(1, (6, 2), 7)
    return module_case(module, inputs, ("embedding",), call)


def long_look_up() -> Case:
    """More pairs of positions than rows; some indices are out of bounds."""
    params = {"table": normal(0, 4, 3), "shift": normal(1, 4)}

    def fn(p, x):
        rows = jnp.take(p["table"], x, axis=0, fill_value=0.0)
        return jnp.sin(rows).sum(0) + jnp.sum(p["shift"][x[:2] % 4]) ** 2

    return Case(fn, params, integers(2, (5, 6), 6), ("embedding",) * 2)


def tied_embedding(transposed: bool) -> Case:
    """One table to read tokens and to score them."""
    params = {"table": normal(0, 6, 9), "w": normal(1, 9, 9)}

    def fn(p, x):
        hidden = jnp.tanh(p["table"][x] @ p["w"]).sum(0)
        if transposed:
            hidden = jax.nn.softmax(hidden @ p["table"].T) @ p["table"]
        return p["table"] @ hidden

    labels = ("positions, summed", "positions")
    return Case(fn, params, integers(2, (4, 3), 6), labels)


def wrappers() -> Case:
    """What the walk looks into, and what keeps its own derivative."""
    params = {k: normal(i, 3, 3) for i, k in enumerate(("a", "b", "c", "d", "e"))}

    @jax.custom_jvp
    def half_seen(w, x):
        return w @ x

    half_seen.defjvp(lambda xs, ts: (half_seen(*xs), 0.5 * ts[0] @ xs[1] + xs[0] @ ts[1]))

    def fn(p, x):
        x = jax.jit(lambda w, x: jnp.tanh(w @ x))(p["a"], x)
        x = jax.checkpoint(lambda w, x: jnp.sin(w @ x))(p["b"], x)
        x = half_seen(p["c"], x)
        x = jax.lax.cond(x[0] > 0, lambda w: w @ x, lambda w: w.T @ x, p["d"])
        return jnp.max(x) + jax.lax.stop_gradient(p["e"]).sum() * (p["e"] > 0).sum()

    labels = ("rank one", "rank one", "dense rows", "dense rows", "unused")
    return Case(fn, params, normal(6, 4, 3), labels)


def repeated_and_complex() -> Case:
    """Both operands are the same leaf; a leaf that becomes complex is not tapped."""
    params = {k: normal(i, 3, 3) for i, k in enumerate(("b", "c", "d", "w"))}

    def fn(p, x):
        z = (p["b"] - 2 * p["b"].T) * jnp.sin(x) + p["c"] * p["c"]
        spectrum = jnp.fft.fft(p["d"] @ x) * (1 + 2j) + p["w"].astype(complex) * (x + 1j)
        return z.sum(0) + jnp.abs(spectrum).sum(0)

    labels = ("elementwise", "elementwise", "rank one", "dense rows")
    return Case(fn, params, normal(6, 4, 3), labels)


def convolution(**options: Any) -> Case:
    module = drawn(eqx.nn.Conv2d, 2, 4, 3, **options)
    call = lambda model, x: jnp.tanh(model(x)).sum((1, 2))
    labels = ("convolution, summed", "elementwise")
    return module_case(module, normal(1, 3, 2, 6, 7), labels, call)


def two_convolutions() -> Case:
    """Another layout, and an image as large as the kernel."""
    params = {"a": normal(0, 3, 4, 8), "b": normal(1, 3, 8, 2)}

    def fn(p, x):
        numbers = ("NWC", "WIO", "NWC")
        conv = lambda x, w: jax.lax.conv_general_dilated(
            x, w, (1,), "VALID", dimension_numbers=numbers
        )
        return conv(jnp.tanh(conv(x[None], p["a"])), p["b"])

    return Case(fn, params, normal(2, 3, 5, 4), ("convolution",) * 2)


def one_kernel_on_two_images() -> Case:
    """A slice of a leaf as a kernel: on a long image summed to rows, on a short one not."""
    params = {"stack": normal(0, 2, 3, 4, 8), "back": normal(1, 1, 8, 4)}

    def fn(p, x):
        numbers = ("NWC", "WIO", "NWC")
        conv = lambda x, w: jax.lax.conv_general_dilated(
            x, w, (1,), "VALID", dimension_numbers=numbers
        )
        long = jnp.sin(conv(x[None], p["stack"][1]))
        short = conv(jnp.tanh(conv(long, p["back"]))[:, :4], p["stack"][1])
        return long.sum((0, 1)) * short.sum((0, 1))

    labels = ("convolution, summed", "convolution, summed")
    return Case(fn, params, normal(2, 3, 30, 4), labels)


def recurrent() -> Case:
    """A GRU in a scan: one weight, many steps."""
    cell = drawn(eqx.nn.GRUCell, 2, 3)

    def call(model, xs):
        return jax.lax.scan(lambda h, x: (model(x, h), None), jnp.zeros(3), xs, reverse=True)[0]

    labels = ("positions, summed",) * 2 + ("elementwise",) * 2
    return module_case(cell, normal(1, 3, 4, 2), labels, call)


def nested_scans() -> Case:
    """Look-ups, products and sums within two scans; one leaf is carried, one is scanned over."""
    params = {k: normal(i, 3, 3) for i, k in enumerate(("table", "w", "carried", "scanned"))}
    params["gain"] = jnp.asarray(1.3)

    def fn(p, x):
        def inner(h, token):
            return jnp.tanh(-p["w"] @ h + p["table"][token] * p["gain"]), h.sum()

        def outer(carry, step):
            h, c = carry
            h, sums = jax.lax.scan(inner, h + c[0], step[0])
            return (h * step[1], 0.5 * c), sums

        (h, _), sums = jax.lax.scan(outer, (jnp.ones(3), p["carried"]), (x, p["scanned"]))
        return h.sum() + jnp.sin(sums).sum()

    labels = ("dense rows", "elementwise", "dense rows", "embedding", "positions, summed")
    return Case(fn, params, integers(2, (4, 3, 2), 3), labels)


def batched_weights() -> Case:
    """A weight per head, weights sliced out of one leaf, and a low-rank product."""
    params = {
        "heads": normal(0, 2, 3, 4), "qkv": normal(1, 6, 4), "stack": normal(2, 2, 4, 4),
        "down": normal(3, 4, 1), "up": normal(4, 1, 4), "overlap": normal(5, 3, 4),
    }  # fmt: skip

    def fn(p, x):
        q, k, v = jnp.split(p["qkv"], 3)
        x = jnp.tanh(x + (p["down"] @ p["up"]) @ x)
        for i in range(2):
            x = jnp.tanh(p["stack"][i] @ x)
        heads = jax.vmap(lambda w, a: w @ a)(p["heads"], jnp.stack([x, jnp.sin(x)]))
        overlap = p["overlap"][:2] @ x + p["overlap"][1:] @ x
        return (q @ x) * jnp.sin(k @ x) + v @ x + heads.sum(1) + overlap

    labels = ("dense rows", "positions", "dense rows", "rank one", "rank one", "dense rows")
    return Case(fn, params, normal(6, 3, 4), labels)


def refused_uses() -> Case:
    """What each use refuses by name keeps explicit rows, which are right all the same."""
    params = {
        "signal": normal(0, 1, 1, 8), "groups": normal(1, 2, 1, 3), "table": normal(2, 6, 4),
        "wide": normal(3, 3, 1), "flat": normal(4, 1, 4), "repeated": normal(5, 4),
    }  # fmt: skip

    def fn(p, example):
        x, row = example
        signal = jax.lax.conv_general_dilated(p["signal"], x[None, None, :3], (1,), "VALID")
        images = jnp.stack([x, jnp.sin(x)])[:, None]
        groups = jax.lax.conv_general_dilated(
            images, p["groups"], (1,), "VALID", batch_group_count=2
        )
        part = jax.lax.dynamic_slice(p["table"], (row, 0), (1, 2))
        product = (p["wide"] @ p["flat"]) @ x[:4]
        copies = jnp.broadcast_to(p["repeated"], (3, 4)) @ x[:4]
        return jnp.sin(signal).sum() + groups.sum() ** 2 + part.sum() * product + copies

    inputs = (normal(6, 4, 6), jnp.arange(4))
    return Case(fn, params, inputs, ("dense rows",) * 6)


CASES = {
    "mlp scalar": lambda: mlp("scalar"),
    "mlp ten outputs": lambda: mlp(10),
    "mlp without bias": lambda: mlp("scalar", use_bias=False),
    "mlp ten outputs without bias": lambda: mlp(10, use_bias=False),
    "products of arrays": products_of_arrays,
    "normalised weights": normalised_weights,
    "custom rules": with_custom_rules,
    "tied layers": tied_layers,
    "layer norm": layer_norm,
    "attention": attention,
    # Two positions: the Gram matrix goes over pairs of them; three: over pieces of the rows.
    "attention over pairs": lambda: attention(2, 12, "positions"),
    "attention in pieces": lambda: attention(3, 12, "positions"),
    "embedding": embedding,
    "long look up": long_look_up,
    "tied embedding": lambda: tied_embedding(False),
    "tied embedding transposed": lambda: tied_embedding(True),
    "convolution": convolution,
    "convolution strided": lambda: convolution(stride=2, padding=(1, 2), dilation=(2, 1)),
    "convolution grouped": lambda: convolution(groups=2, padding="SAME"),
    "two convolutions": two_convolutions,
    "one kernel on two images": one_kernel_on_two_images,
    "wrappers": wrappers,
    "repeated and complex": repeated_and_complex,
    "recurrent": recurrent,
    "nested scans": nested_scans,
    "batched weights": batched_weights,
    "refused uses": refused_uses,
}
