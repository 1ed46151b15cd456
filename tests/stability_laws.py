"""Second moments of SGD by enumeration of all batches, and problems to try it on."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import manifoldflow as mf

N = 6


def network(point, x):
    return point["out"] @ jnp.tanh(point["in"] @ x)


outputs_of = jax.jit(jax.vmap(network, (None, 0)))


def point_of(seed, width=3, outputs=2):
    first, second = jr.split(jr.key(seed))
    return {"in": jr.normal(first, (width, 3)), "out": jr.normal(second, (outputs, width))}


def fitted(seed=0, num=N, outputs=2, scale=0.3, width=3):
    """A network, and the loss on targets that are its own outputs."""
    point = point_of(seed, width, outputs)
    inputs = jr.normal(jr.key(seed + 100), (num, 3))
    targets = outputs_of(point, inputs)
    return mf.LeastSquares(inputs, targets, predict=network, scale=scale), point


@eqx.filter_jit
def root_matrix(loss, point):
    """A of the Gauss-Newton matrix AᵀA."""
    return loss.gauss_newton_root(point).as_matrix()


@eqx.filter_jit
def covariance_matrix(noise, loss, point):
    return noise.covariance(loss, point).as_matrix()


def example_hessians(loss, point):
    """N·AᵢᵀAᵢ: the Gauss-Newton matrix of the loss on example i alone."""
    rows = np.asarray(root_matrix(loss, point))
    rows = rows.reshape(loss.num_examples, -1, rows.shape[1])
    return loss.num_examples * np.einsum("nki,nkj->nij", rows, rows)


def batches(num_examples, batch_size, replacement):
    """All batches, each as likely as any other."""
    if replacement:
        return list(itertools.product(range(num_examples), repeat=batch_size))
    return list(itertools.combinations(range(num_examples), batch_size))


def basis(hessians):
    """Of the directions that change outputs, D×r."""
    values, vectors = np.linalg.eigh(hessians.mean(0))
    return vectors[:, values > 1e-10 * values[-1]]


def one_step(loss, point, batch_size, replacement, rate):
    """The mean of (1 − ηH_B) ⊗ (1 − ηH_B) over all batches, in the range; by counting them."""
    hessians = example_hessians(loss, point)
    inside = basis(hessians)
    hessians = inside.T @ hessians @ inside
    size = inside.shape[1]
    total, drawn = np.zeros((size**2, size**2)), {}
    # With replacement many are the same but for their order.
    for batch in batches(loss.num_examples, batch_size, replacement):
        key = tuple(sorted(batch))
        drawn[key] = drawn.get(key, 0) + 1
    for batch, count in drawn.items():
        matrix = np.eye(size) - rate * hessians[list(batch)].mean(0)
        total += count * np.kron(matrix, matrix)
    return total / sum(drawn.values()), inside


def radius(loss, point, batch_size, replacement, rate):
    return np.max(
        np.abs(np.linalg.eigvals(one_step(loss, point, batch_size, replacement, rate)[0]))
    )
