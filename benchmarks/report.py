"""How long does a report on a network take, and how much memory beside one gradient's?

Hard-label cross-entropy on networks of five libraries, with some 10⁶ weights and 2,000
examples: seconds and processor seconds of `diagnostics.report` in a process that has compiled
nothing, and again; and the temporary memory of the largest program that it runs, the basis of
Lanczos' method aside, which the report states. Flax and Haiku have to be there.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import _harness
import manifoldflow as mf
from manifoldflow.diagnostics import _chunks, _passes

CLASSES = 10


class GroupNormNet(eqx.Module):
    """Two convolutions with GroupNorm and ReLU, two dense layers."""

    convolutions: tuple[eqx.nn.Conv2d, eqx.nn.Conv2d]
    norms: tuple[eqx.nn.GroupNorm, eqx.nn.GroupNorm]
    head: eqx.nn.MLP

    def __init__(self, channels: int, width: int, key: jax.Array):
        keys = jr.split(key, 3)
        self.convolutions = (
            eqx.nn.Conv2d(3, channels, 3, stride=2, padding=1, key=keys[0]),
            eqx.nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, key=keys[1]),
        )
        self.norms = eqx.nn.GroupNorm(4, channels), eqx.nn.GroupNorm(4, 2 * channels)
        self.head = eqx.nn.MLP(2 * channels * 16, CLASSES, width, 1, jax.nn.relu, key=keys[2])

    def __call__(self, image: jax.Array) -> jax.Array:
        for convolution, norm in zip(self.convolutions, self.norms):
            image = jax.nn.relu(norm(convolution(image)))
        return self.head(image.reshape(-1))


def equinox_cnn(size: int) -> tuple[Any, Any, Any]:
    return GroupNormNet(8 * size, 240 * size, jr.key(0)), None, (3, 16, 16)


def linen_cnn(size: int) -> tuple[Any, Any, Any]:
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for channels in (8 * size, 16 * size):
                x = nn.Conv(channels, (3, 3), strides=(2, 2))(x)
                x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = nn.relu(nn.Dense(240 * size)(x.reshape(-1)))
            return nn.Dense(CLASSES)(x)

    net = Net()
    return net.init(jr.key(0), jnp.zeros((16, 16, 3))), net.apply, (16, 16, 3)


def nnx_transformer(size: int) -> tuple[Any, Any, Any]:
    """Two blocks on sequences of eight vectors."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, width: int, rngs: nnx.Rngs):
            self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
            self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
            self.up = nnx.Linear(width, 4 * width, rngs=rngs)
            self.down = nnx.Linear(4 * width, width, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = x + self.attention(self.norms[0](x))
            return x + self.down(nnx.gelu(self.up(self.norms[1](x))))

    class Net(nnx.Module):
        def __init__(self, width: int, rngs: nnx.Rngs):
            self.embed = nnx.Linear(16, width, rngs=rngs)
            self.blocks = nnx.List([Block(width, rngs) for _ in range(2)])
            self.out = nnx.Linear(width, CLASSES, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.out(x.mean(axis=-2))

    return Net(48 * size, nnx.Rngs(0)), None, (8, 16)


def haiku_mlp(size: int) -> tuple[Any, Any, Any]:
    import haiku as hk

    net = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP([188 * size, 188 * size, CLASSES])(x))
    )
    return net.init(jr.key(0), jnp.zeros(512)), net.apply, (512,)


def plain_dict(size: int) -> tuple[Any, Any, Any]:
    widths = [512, 188 * size, 188 * size, CLASSES]
    pairs = list(zip(jr.split(jr.key(0), 3), widths, widths[1:]))
    weights = {f"w{i}": jr.normal(k, (n, m)) * (2 / m) ** 0.5 for i, (k, m, n) in enumerate(pairs)}

    def predict(w: Any, x: jax.Array) -> jax.Array:
        x = jax.nn.gelu(w["w1"] @ jax.nn.gelu(w["w0"] @ x))
        return w["w2"] @ x

    return weights, predict, (512,)


MODELS: dict[str, Callable[[int], tuple[Any, Any, Any]]] = {
    "Equinox CNN, GroupNorm, ReLU": equinox_cnn,
    "Linen CNN, BatchNorm, ReLU": linen_cnn,
    "NNX transformer, GELU": nnx_transformer,
    "Haiku MLP, ReLU": haiku_mlp,
    "dict, GELU": plain_dict,
}


def problem(name: str, size: int, num_examples: int) -> tuple[mf.PerExampleLoss, Any]:
    point, predict, shape = MODELS[name](size)
    inputs = jr.normal(jr.key(1), (num_examples, *shape))
    labels = jr.randint(jr.key(2), (num_examples,), 0, CLASSES)
    loss_fn = optax.softmax_cross_entropy_with_integer_labels
    return mf.PerExampleLoss(inputs, labels, loss_fn, predict=predict), point


def programs(loss: mf.PerExampleLoss, point: Any) -> dict[str, _harness.Compiled]:
    """What a report runs that grows with the network, on a part of the examples."""
    outputs = _passes.outputs_at(loss, point)
    vector = _passes.pulled(loss, point, outputs.slopes)
    return {
        "outputs": _harness.Compiled(_passes.outputs_at, loss, point),
        "Jᵀw": _harness.Compiled(_passes.pulled, loss, point, outputs.slopes),
        "WJv": _harness.Compiled(_passes.pushed, loss, point, outputs.roots, vector),
        "curvature": _harness.Compiled(
            _passes.curvature_along, loss, point, outputs.slopes, vector
        ),
    }


def measure(name: str, size: int, num_examples: int) -> dict[str, Any]:
    """Both calls of a report, the first of which compiles, and its largest program."""
    loss, point = problem(name, size, num_examples)
    call = lambda: mf.report(loss, point, learning_rate=0.01, batch_size=32)
    numbers: dict[str, float] = {}
    for which in ("first", "again"):
        began, processor = time.perf_counter(), time.process_time()
        found = call()
        numbers[f"{which} s"] = time.perf_counter() - began
        numbers[f"{which} processor s"] = time.process_time() - processor
    gradient = _harness.Compiled(lambda l, p: (l(p), l.gradient(p)), loss, point)
    part = _chunks.Chunks(loss, point, np.random.default_rng(0))[0]
    largest = max(program.temporary_mb for program in programs(part, point).values())
    trace, top = found["trace of G"], found.quantities.get("largest eigenvalue")
    return {
        "network": name,
        "D": int(found["coordinates"].value),
        "n": num_examples,
        **numbers,
        "one gradient MB": gradient.temporary_mb,
        "largest program MB": largest,
        "tr G": trace.value,
        "±": trace.standard_error or 0.0,
        "λ₁": "left out" if top is None else top.how,
        "notes": len(found.notes),
    }


def main() -> None:
    # Every model in a process of its own would be the same: no program is of two of them.
    jax.config.update("jax_enable_compilation_cache", False)
    arguments = _harness.options(__doc__)
    size, num_examples = (1, 256) if arguments.smoke else (4, 2000)
    rows = []
    # A smoke run reports on two; of the others it only makes the networks.
    measured = list(MODELS)[1::3] if arguments.smoke else list(MODELS)
    for name in MODELS:
        if name not in measured:
            problem(name, size, 2)
            continue
        rows.append(measure(name, size, num_examples))
        print(_harness.table(rows[-1:]).splitlines()[-1], flush=True)
    _harness.write("report", __doc__.splitlines()[0], rows, arguments)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # which leaves of Flax stay as they are
    main()
