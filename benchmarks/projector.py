"""How tangent are projected gradients of 10⁷ weights and 10⁴ examples, and at what cost?

A tanh MLP with three hidden layers in single precision, in a fresh process. The gradient is that
of other examples; what is projected away is all of it that would change, to first order, one of
the 10⁴ outputs. The certificate is ‖Ĵv‖/‖v‖, with Ĵ the Jacobian whose rows have length one. The
memory is the peak of the whole process, interpreter and compiler included.
"""

import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import _harness
import manifoldflow as mf
from manifoldflow import linalg
from scale import memory

SIZES = {"width": 2_230, "num_examples": 10_000, "batch_size": 2_000}
SMOKE = {"width": 64, "num_examples": 128, "batch_size": 32}


def loss_of(num_examples: int, key: jax.Array) -> mf.LeastSquares:
    inputs = jr.normal(key, (num_examples, 32))
    return mf.LeastSquares(inputs, jnp.sin(inputs[:, 0]))


def measure(smoke: bool) -> dict[str, Any]:
    """To be called in a fresh process: peaks never go back."""
    sizes = SMOKE if smoke else SIZES
    model = eqx.nn.MLP(32, "scalar", sizes["width"], 3, activation=jnp.tanh, key=jr.key(0))
    loss = loss_of(sizes["num_examples"], jr.key(1))
    gradient = loss_of(64, jr.key(2)).gradient(model)

    began = time.perf_counter()
    projector = linalg.tangent_projector(loss, model, batch_size=sizes["batch_size"])
    jax.block_until_ready(eqx.filter(projector, eqx.is_array))
    prepared = time.perf_counter()
    tangent, certificate = jax.block_until_ready(projector.project(gradient))
    first = time.perf_counter()
    jax.block_until_ready(projector.project(gradient))
    again = time.perf_counter()
    peak = memory("VmHWM", "peak_bytes_in_use")
    norm = lambda tree: float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))))
    values = projector.jacobian.mv(tangent)
    frobenius = jnp.sqrt(jnp.sum(projector.gram.row_norms_squared()))
    return {
        "D": num_weights(gradient),
        "n": sizes["num_examples"],
        "batch": sizes["batch_size"],
        "certificate": float(certificate),
        "of the gradient": float(projector.certificate(gradient)),
        "‖Jv‖/‖v‖": norm(values) / norm(tangent),
        "‖Jv‖/(‖J‖‖v‖)": norm(values) / (norm(tangent) * float(frobenius)),
        "‖v‖/‖gradient‖": norm(tangent) / norm(gradient),
        "prepare s": prepared - began,
        "first s": first - prepared,
        "project s": again - first,
        "process GiB": peak / 2**30,
        "n×D Jacobian GiB": 4 * sizes["num_examples"] * num_weights(gradient) / 2**30,
    }


def num_weights(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def main() -> None:
    arguments = _harness.options(__doc__)
    rows = [_harness.apart("projector", arguments.smoke)]
    _harness.write("projector", __doc__.splitlines()[0], rows, arguments)


if __name__ == "__main__":
    main()
