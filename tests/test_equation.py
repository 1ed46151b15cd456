"""A limit in one line, with the numbers that say how fast it is."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import manifoldflow as mf
from checks import close, equal, flat, refused
from manifoldflow import updates

pytestmark = pytest.mark.quick

INPUTS = jr.normal(jr.key(0), (4, 2))
POINT = jnp.array([[1.0, 0.5], [-0.5, 1.0], [0.3, 0.2]])


def predict(w, x):
    return jnp.sum(jnp.sinh(w @ x))


LOSS = mf.LeastSquares(INPUTS, jax.vmap(lambda x: predict(POINT, x))(INPUTS), predict=predict)
ZERO = mf.ZeroLossManifold(LOSS)
CLOCK = "t = Ση²/(1−β)²"
EQUATIONS = {
    f"Y' = −0.25·P∇tr∇²L, c = 1 in batches of 1 of 4 examples, {CLOCK}": mf.LabelNoise(1.0, 1),
    f"Y' = −0.0625·P∇tr∇²L, c = 0.25 in batches of 4 of 4 examples, {CLOCK}": mf.LabelNoise(1.0),
    f"dY = PF dW + ½ tr II dt − 0.0225·P∇ln|∇²L|₊ dt, {CLOCK}": mf.IsotropicNoise(0.3),
    f"the general limit of SGD under MinibatchNoise, batches of 2 of 4 examples, {CLOCK}": (
        mf.MinibatchNoise(2)
    ),
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_limit_says_its_rate_and_its_batches(equation):
    flow = mf.LimitDiffusion(ZERO, EQUATIONS[equation])
    equal("equation", flow.equation, equation)
    text = repr(flow)
    equal("repr", text.endswith(f")  # {equation}") and text.startswith("LimitDiffusion("), True)


def test_the_update_is_in_it():
    noise = mf.LabelNoise(1.0, 1)
    decayed = mf.LimitDiffusion(ZERO, noise, updates.SGD(weight_decay=0.1)).equation
    equal("decay", "P∇tr∇²L + PG, c = 1" in decayed, True)
    adam = mf.LimitDiffusion(ZERO, noise, updates.Adam()).equation
    equal("Adam", adam.startswith("the general limit of Adam under LabelNoise, c = 1 in"), True)


def test_the_rate_in_it_is_that_of_the_drift():
    flow = mf.LimitDiffusion(ZERO, mf.LabelNoise(1.0, 1))
    slope = mf.geometry.riemannian_gradient(ZERO, LOSS.trace_gauss_newton, POINT)
    close("−¼P∇tr", flow.drift(POINT), -0.25 * slope, 1e-9)


def test_under_a_trace_it_does_without_numbers():
    said = []

    def drift(std):
        flow = mf.LimitDiffusion(ZERO, mf.LabelNoise(std, 1))
        said.append(repr(flow))
        return flow.drift(POINT)

    jax.vmap(drift)(jnp.array([1.0, 2.0]))
    equal("traced", "c = (traced) in batches of 1 of 4 examples" in said[0], True)


def test_batch_sizes_are_varied_by_the_deviation():
    """A traced batch size is refused, and what its sentence says instead is the same limit."""
    with refused(ValueError, "batch_size", "vmap over std/√B", "batch_size=1"):
        jax.vmap(lambda size: mf.LabelNoise(1.0, size).std)(jnp.array([1, 2]))
    with refused(ValueError, "batch_size"):
        mf.LabelNoise(1.0, 1.5)

    def drift(std):
        return mf.LimitDiffusion(ZERO, mf.LabelNoise(std, 1)).drift(POINT)

    sizes = jnp.array([1.0, 2.0, 4.0])
    found = jax.vmap(drift)(1.0 / jnp.sqrt(sizes))
    for drifted, size in zip(found, sizes):
        wanted = mf.LimitDiffusion(ZERO, mf.LabelNoise(1.0, int(size))).drift(POINT)
        close("drift", flat(drifted), flat(wanted), 1e-12)
