"""Every number of a report against an independent computation."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, equal, flat
from manifoldflow import symmetry
from manifoldflow.diagnostics import Quantity, report
from manifoldflow.diagnostics._chunks import Chunks, GaussNewton
from manifoldflow.diagnostics._gauge import least_norm
from manifoldflow.diagnostics._krylov import top_eigenvalues
from manifoldflow.diagnostics._passes import draw_signs, outputs_at, trace_pair

INPUTS = jr.normal(jr.key(1), (12, 4))
CLASSES = jr.randint(jr.key(2), (12,), 0, 3)
COUNTS = jr.poisson(jr.key(3), 2.0, (12, 3)).astype(float)


def network(activation=jnp.tanh, depth=1, outputs=3, width=7):
    return eqx.nn.MLP(4, outputs, width, depth, activation=activation, key=jr.key(0))


def cross_entropy(f, y):
    return jax.nn.logsumexp(f) - f[y]


def poisson(f, y):
    return jnp.sum(jnp.exp(f) - y * f)


LOSSES = {
    "squares": mf.LeastSquares(INPUTS, COUNTS),
    "cross-entropy": mf.PerExampleLoss(INPUTS, CLASSES, cross_entropy),
    "Poisson": mf.PerExampleLoss(INPUTS, COUNTS, poisson, weight_decay=0.3),
}


def dense(loss, point):
    """G by hand: JᵀWJ with explicit Jacobians and second derivatives."""
    coordinates, unravel = jax.flatten_util.ravel_pytree(loss.split(point)[0])
    _, rest = loss.split(point)
    outputs = lambda x: jax.vmap(eqx.combine(unravel(x), rest))(loss.inputs).reshape(-1)

    def mean(f):
        shaped = f.reshape(len(INPUTS), -1)
        if isinstance(loss, mf.LeastSquares):
            return loss.scale / 2 * jnp.sum((shaped - loss.targets) ** 2)
        return jnp.mean(jax.vmap(loss.loss_fn)(shaped, loss.targets))

    def product(x):
        rows = jax.jacobian(outputs)(x)
        return rows.T @ jax.hessian(mean)(outputs(x)) @ rows

    return np.asarray(jax.jit(product)(coordinates))


def within(quantity, exact, errors=4.0):
    gap = abs(quantity.value - float(exact))
    at_most(quantity.name, gap, errors * quantity.standard_error + 1e-12 * abs(float(exact)))


@pytest.mark.parametrize("name", LOSSES)
def test_all_numbers_of_a_report(name):
    loss, point = LOSSES[name], network()
    matrix = dense(loss, point)
    values = np.linalg.eigvalsh(matrix)[::-1]
    sampled = report(loss, point, max_rows=1, num_eigenvalues=3, batch_size=3)
    exact = report(loss, point, batch_size=3)
    within(sampled["trace of G"], np.trace(matrix))
    equal("an error bar", sampled["trace of G"].standard_error > 0, True)
    close("tr G", exact["trace of G"].value, np.trace(matrix), 1e-10)
    equal("exact", exact["trace of G"].standard_error, None)
    for found in (sampled, exact):
        within(found["trace of the Hessian"], loss.trace_hessian(point))
        close("L", found["loss"].value, loss(point), 1e-12)
        close("‖∇L‖", found["gradient"].value, jnp.linalg.norm(flat(loss.gradient(point))), 1e-12)
        for quantity, value in zip(found.eigenvalues, values):
            close(quantity.name, quantity.value, value, 1e-4)
            low, high = quantity.interval
            assert low <= value <= high, (quantity, value)
    assert not sampled.is_whole and exact.is_whole
    rank = int(np.sum(values > 1e-12 * values[0]))
    equal("rank", exact["rank"].value, rank)
    close("smallest", exact["smallest eigenvalue"].value, values[rank - 1], 1e-6)
    full = 2 / values[0]
    close("2/λ₁", sampled["largest stable learning rate"].value, full, 1e-4)
    threshold = mf.largest_stable_learning_rate(loss, point, 3)
    close("η*", exact["largest stable learning rate"].value, threshold, 1e-6)
    per_leaf = [np.trace(m) for m in _blocks(matrix, loss.split(point)[0])]
    for leaf, part in zip(sampled.leaves, per_leaf, strict=True):
        at_most(leaf.leaf, abs(leaf.trace - part), 4 * leaf.standard_error)


def _blocks(matrix, coordinates):
    ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(coordinates)])
    starts = np.concatenate([[0], ends[:-1]])
    return [matrix[a:b, a:b] for a, b in zip(starts, ends)]


@pytest.mark.parametrize("name", LOSSES)
def test_nineteen_in_twenty_intervals_hold_the_trace(name):
    """Two hundred runs of the fewest samples that a report takes."""
    loss, point = LOSSES[name], network()
    exact, random = np.trace(dense(loss, point)), np.random.default_rng(5)
    outputs, runs, count = outputs_at(loss, point), 200, 16
    slopes = outputs.slopes
    signs = draw_signs(random, (runs, count, *slopes.shape), slopes.dtype)
    draw = lambda signs: jnp.vdot(*trace_pair(loss, point, outputs, signs))
    samples = np.asarray(jax.jit(jax.vmap(jax.vmap(draw)))(signs))
    held = 0
    for run in samples:
        error = run.std(ddof=1) / np.sqrt(count)
        low, high = Quantity("trace", run.mean(), error, "", count).interval
        held += low <= exact <= high
    at_least("coverage", held / runs, 0.9)
    at_most("coverage", held / runs, 0.99)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_gradient_noise_by_enumeration(size):
    loss = mf.PerExampleLoss(INPUTS[:6], CLASSES[:6], cross_entropy, weight_decay=0.1)
    point = network()
    every = list(itertools.combinations(range(6), size))
    mean = flat(loss.gradient(point))
    of = lambda batch: flat(loss.select(np.array(batch)).gradient(point))
    exact = np.mean([float(jnp.sum((of(batch) - mean) ** 2)) for batch in every])
    within(report(loss, point, batch_size=size)["gradient noise"], exact)


def test_parts_of_the_examples():
    """Of 193, three parts of 64 and a rest: loss and gradient are of all, with the decay once."""
    inputs, labels = jr.normal(jr.key(7), (193, 4)), jr.randint(jr.key(8), (193,), 0, 3)
    loss, point = mf.PerExampleLoss(inputs, labels, cross_entropy, weight_decay=0.5), network()
    chunks = Chunks(loss, point, np.random.default_rng(0))
    equal("parts", (chunks.size, chunks.number), (64, 3))
    seen = np.concatenate([part.inputs for part, _ in chunks.all()])
    close("all of them", np.sort(seen, axis=0), jnp.sort(inputs, axis=0), 1e-15)
    found = chunks.gradient()
    gradient = flat(loss.gradient(point))
    close("L", found.loss, loss(point), 1e-12)
    close("‖∇L‖", found.norm, jnp.linalg.norm(gradient), 1e-12)
    of_data = gradient - 0.5 * flat(loss.split(point)[0])
    close("‖∇L‖² of the data", found.of_data, jnp.sum(of_data**2), 1e-12)
    some = loss.select(np.array(chunks._order[:192]))
    vector, unravel = jax.flatten_util.ravel_pytree(loss.split(point)[0])
    product = eqx.filter_jit(lambda some, vector: some.gauss_newton(point).mv(unravel(vector)))
    expected = product(some, vector)
    close("G v of three parts", GaussNewton(chunks, 3)(vector), flat(expected), 1e-12)
    table = report(loss, point, max_rows=1)
    within(table["trace of G"], loss.trace_gauss_newton(point))
    assert "on 64 of 193 examples" in table["trace of G"].how
    equal(
        "without a rest", Chunks(loss.select(slice(150)), point, np.random.default_rng(0)).size, 50
    )


def test_many_outputs():
    """With more than 64 an example, G is probed in the coordinates and W stays an operator."""
    loss = mf.PerExampleLoss(INPUTS, CLASSES, cross_entropy)
    point = network(outputs=70, width=3)
    matrix = dense(loss, point)
    equal("no roots", outputs_at(loss, point).roots, None)
    found = report(loss, point, max_rows=1)
    within(found["trace of G"], np.trace(matrix))
    close("λ₁", found["largest eigenvalue"].value, np.linalg.eigvalsh(matrix)[-1], 1e-4)


SPECTRA = {
    "simple": np.linspace(-1, 1, 300) ** 3,
    "fivefold": np.concatenate([np.full(5, 2.0), np.linspace(-1, 1, 200)]),
    "rank three": np.concatenate([[3.0, 2.0, 1.0], np.zeros(200)]),
    "zero": np.zeros(90),
    "one number": np.array([-2.0]),
    "close": np.concatenate([1 - np.arange(4) * 1e-4, np.linspace(0, 0.999, 500)]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_eigenvalues_and_their_bounds(name, dtype):
    spectrum = SPECTRA[name]
    turned, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(len(spectrum),) * 2))
    matrix = jnp.asarray((turned * spectrum) @ turned.T, dtype)
    num = min(3, len(spectrum))
    found = top_eigenvalues(lambda v: matrix @ v, jnp.zeros(len(spectrum), dtype), num, 60.0)
    assert found.is_found, found
    expected = np.sort(spectrum)[::-1][:num]
    at_most("error", np.max(np.abs(found.values - expected)), 1e-4 * max(abs(expected[0]), 1e-9))
    for value, bound in zip(found.values, found.bounds):
        at_most("bound", np.min(np.abs(spectrum - value)), bound + 1e-12)


def test_no_time_for_eigenvalues():
    matrix = jnp.diag(jnp.linspace(0, 1, 4000) ** 0.25)
    found = top_eigenvalues(lambda v: matrix @ v, jnp.zeros(4000), 1, 1e-9)
    assert not found.is_found
    at_least("what it says of its error", found.bounds[0], 1e-4)
    lost = top_eigenvalues(lambda v: v * jnp.nan, jnp.zeros(40), 1, 60.0)
    assert not lost.is_found


# --- The gauge -----------------------------------------------------------------------------


def rescaled(net, seed, by_neuron):
    """The same function: each layer, or each neuron, times a factor, the next one divided."""
    layers, random = list(net.layers), np.random.default_rng(seed)
    for i in range(len(layers) - 1):
        size = layers[i].weight.shape[0]
        factors = np.exp(random.normal(size=size if by_neuron else 1)) * np.ones(size)
        where = lambda m: (m.weight, m.bias)
        new = layers[i].weight * factors[:, None], layers[i].bias * factors
        layers[i] = eqx.tree_at(where, layers[i], new)
        layers[i + 1] = eqx.tree_at(
            lambda m: m.weight, layers[i + 1], layers[i + 1].weight / factors
        )
    return eqx.tree_at(lambda m: m.layers, net, tuple(layers))


@pytest.mark.parametrize("by_neuron", [False, True])
def test_rescaled_copies_of_a_network_have_one_gauge(by_neuron):
    loss = mf.PerExampleLoss(INPUTS, CLASSES, cross_entropy)
    net = network(jax.nn.relu, depth=2)
    names = "balanced trace of G", "balanced largest eigenvalue"
    tables = [report(loss, rescaled(net, seed, by_neuron), num_samples=16) for seed in range(5)]
    for name in names:
        values = [table[name].value for table in tables]
        at_most(name, np.ptp(values), 0.01 * min(values))
    before = [table["trace of G"].value for table in tables]
    at_least("without the gauge", max(before) / min(before), 1.5)
    noises = [table["balanced gradient noise"] for table in tables]
    middle = np.mean([q.value for q in noises])
    for q in noises:
        within(q, middle, 5)


def test_least_norm_against_newton():
    """`symmetry.balance` along all rescalings of neurons comes to the same weights."""
    loss, net = LOSSES["cross-entropy"], rescaled(network(jax.nn.relu, width=4), 3, True)
    found, what = least_norm(loss, net, np.random.default_rng(0))
    equal("what", what, "neurons")
    rescalings = symmetry.find_rescalings(net, *symmetry.examples_of(loss), per_neuron=True)
    expected = symmetry.balance(net, loss, kind="norm", symmetries=rescalings)
    equal("neurons", len(rescalings), 4)
    close("weights", eqx.filter(found, eqx.is_array), eqx.filter(expected, eqx.is_array), 1e-6)
    close("outputs", jax.vmap(found)(INPUTS), jax.vmap(net)(INPUTS), 1e-10)
    squared = network(lambda z: jax.nn.relu(z) ** 2, depth=1)
    found, _ = least_norm(loss, squared, np.random.default_rng(0))
    close("degree two", jax.vmap(found)(INPUTS), jax.vmap(squared)(INPUTS), 1e-10)
    first, second = found.layers
    norms = jnp.sum(first.weight**2, axis=1) + first.bias**2, jnp.sum(second.weight**2, axis=0)
    close("‖before‖² = p·‖after‖²", norms[0], 2 * norms[1], 1e-6)
    with pytest.raises(ValueError, match="no rescaling was found: between these equinox.nn.Linear"):
        least_norm(loss, network(), np.random.default_rng(0))


def test_layers_are_balanced_where_neurons_cannot_be():
    """Each neuron's activation looks at all of them: only the layer as a whole can be rescaled."""

    class Mixed(eqx.Module):
        first: eqx.nn.Linear
        second: eqx.nn.Linear

        def __call__(self, x):
            z = self.first(x)
            return self.second(jax.nn.relu(z) + 0.3 * jnp.roll(jax.nn.relu(z), 1))

    net = Mixed(eqx.nn.Linear(4, 7, key=jr.key(0)), eqx.nn.Linear(7, 3, key=jr.key(1)))
    loss = LOSSES["cross-entropy"]
    found, what = least_norm(loss, net, np.random.default_rng(0))
    equal("what", what, "layers")
    expected = symmetry.balance(net, loss, kind="norm")
    close("weights", flat(eqx.filter(found, eqx.is_array)), flat(expected), 1e-6)
