"""Both faces of a noise agree: the covariance it states is the covariance of its samples."""

import functools

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest

import lawbook
import manifoldflow as mf
import zoo
from checks import at_least, at_most, close, flat

SCALES = {"default": None, "sum": 2.0}


def scalar_place():
    inputs, targets = zoo.data(num_outputs=1)
    point = zoo.network_point(jr.key(5), num_outputs=1)
    manifold = mf.ZeroLossManifold(mf.LeastSquares(inputs, targets, predict=zoo.network))
    return zoo.Place(manifold, manifold.project(point), 4)


@functools.cache
def place(outputs):
    return zoo.place("dict net") if outputs == "vector" else scalar_place()


@pytest.mark.parametrize("batch_size", [None, 1, 3])
@pytest.mark.parametrize("outputs", ["scalar", "vector"])
def test_label_noise_on_the_manifold(outputs, batch_size):
    here = place(outputs)
    noise = mf.LabelNoise(0.7, batch_size=batch_size)
    lawbook.noise_moments_law(noise, here.manifold.loss, here.point, seed=1)


@pytest.mark.parametrize("outputs", ["scalar", "vector"])
def test_label_noise_of_full_batches_off_the_manifold(outputs):
    here = place(outputs)
    off = zoo.moved(here.point, here.random_vector(9), 0.3)
    lawbook.noise_moments_law(mf.LabelNoise(0.7), here.manifold.loss, off, seed=2)


def test_small_batches_stay_unbiased_off_the_manifold():
    here = place("vector")
    loss, noise = here.manifold.loss, mf.LabelNoise(0.1, batch_size=1)
    off = zoo.moved(here.point, here.random_vector(9), 0.3)
    samples = lawbook.sampled_gradients(noise, loss, off, seed=3)
    errors = samples.std(axis=0) / np.sqrt(len(samples))
    standardised = np.abs(samples.mean(axis=0) - np.asarray(flat(loss.gradient(off)))) / errors
    at_most("largest mean error in standard errors, seed 3", standardised.max(), 4.5)


@eqx.filter_jit
def hessian_and_covariance(loss, noise, point, v):
    return loss.hessian(point).mv(v), noise.covariance(loss, point).mv(v)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_label_noise_is_a_multiple_of_the_hessian(batch_size, scale):
    """Σ = c·H on the manifold, c = scale·std²·N/B."""
    here = place("vector")
    loss = mf.LeastSquares(*zoo.data(), predict=zoo.network, scale=scale)
    noise = mf.LabelNoise(0.7, batch_size=batch_size)
    v = here.random_vector(4)
    hessian, sigma = hessian_and_covariance(loss, noise, here.point, v)
    c = (1 / 8 if scale is None else scale) * 0.7**2 * 4 / (batch_size or 4)
    close("Σ v, seed 4", sigma, jax.tree.map(lambda leaf: c * leaf, hessian), 1e-8)
    close("strength", noise.strength(loss), c, 1e-12)


def test_isotropic_noise():
    here = place("vector")
    loss, noise = here.manifold.loss, mf.IsotropicNoise(0.3)
    off = zoo.moved(here.point, here.random_vector(9), 0.3)
    lawbook.noise_moments_law(noise, loss, off, seed=5)
    v = here.random_vector(6)
    sigma = eqx.filter_jit(lambda noise, off: noise.covariance(loss, off).mv(v))(noise, off)
    close("Σ v", sigma, 0.09 * flat(v), 1e-12)


@eqx.filter_jit
def by_covariance_and_factor(noise, loss, point, v):
    factor = noise.factor(loss, point)
    return noise.covariance(loss, point).mv(v), factor.mv(factor.T.mv(v))


def test_covariance_is_the_square_of_its_factor():
    here = place("vector")
    v = here.random_vector(7)
    for noise in (mf.LabelNoise(0.7, batch_size=3), mf.IsotropicNoise(0.3)):
        found, expected = by_covariance_and_factor(noise, here.manifold.loss, here.point, v)
        close("F Fᵀ v", found, expected, 1e-12)


@pytest.mark.quick
def test_equal_keys_give_equal_noise():
    here = place("scalar")
    noise = mf.LabelNoise(1.0, batch_size=1)
    gradient = jax.jit(lambda key: flat(noise.gradient(here.manifold.loss, here.point, key)))
    a, b, c = (np.asarray(gradient(jr.key(k))) for k in (0, 0, 1))
    close("same key", a, b, 1e-15)
    at_least("another key", np.linalg.norm(a - c), 1e-3)
