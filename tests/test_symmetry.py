"""Symmetries: how generators are given, what they cost, derivatives, what goes wrong."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import manifoldflow as mf
import zoo
from checks import at_least, at_most, central_difference, close, flat, refused
from manifoldflow import symmetry
from manifoldflow.symmetry import _gradients
from symmetric_problems import (
    B,
    DATA,
    data_of,
    dense_generator,
    example_loss,
    first,
    MATRICES,
    POINT,
    rotation_of,
    second,
    SIZE,
    SYMMETRIES,
    TURN,
)

OPTIONS = dict(noise_scale=0.05, weight_decay=0.3)


def equilibrium(one, point=POINT, data=DATA, **options):
    return symmetry.noise_equilibrium(one, example_loss, point, data, **(OPTIONS | options))


# --- Generators --------------------------------------------------------------------------------


def low_rank_forms():
    values, vectors = np.linalg.eigh(MATRICES["rotation"])
    unravel = jax.flatten_util.ravel_pytree(POINT)[1]
    mixed = vectors @ np.triu(np.ones((SIZE, SIZE)))  # columns that are not orthogonal
    inverse = np.linalg.inv(np.triu(np.ones((SIZE, SIZE))))
    diagonal, turn = np.linalg.eigh(inverse @ np.diag(values) @ inverse.T)
    directions = jax.vmap(unravel, in_axes=1, out_axes=-1)(jnp.asarray(mixed @ turn))
    return directions, diagonal


@functools.cache
def forms():
    matrix = jnp.asarray(MATRICES["rotation"])
    structure = jax.eval_shape(lambda: POINT)
    unravel = jax.flatten_util.ravel_pytree(POINT)[1]
    operator = lx.FunctionLinearOperator(lambda v: unravel(matrix @ flat(v)), structure)
    return {
        "lineax matrix": symmetry.ExponentialSymmetry(lx.MatrixLinearOperator(matrix)),
        "lineax operator": symmetry.ExponentialSymmetry(operator),
        "low rank": symmetry.low_rank(POINT, *low_rank_forms()),
        "function": SYMMETRIES["function"],
    }


@pytest.mark.quick
@pytest.mark.parametrize("name", ["lineax matrix", "lineax operator", "low rank", "function"])
def test_the_same_generator_in_many_forms(name):
    one, reference = forms()[name], SYMMETRIES["rotation"]
    close("Aθ", one.velocity(POINT), reference.velocity(POINT), 1e-11)
    close("e^{λA}θ", one.act(POINT, -1.3), reference.act(POINT, -1.3), 1e-10)
    close("C", *(symmetry.noether_charge(s, POINT) for s in (one, reference)), 1e-10)
    if name == "low rank":  # the others are of its kind, or functions
        close("λ*", equilibrium(one), equilibrium(reference), 1e-8)


def test_generators_of_vectors():
    """A bare array is weights or a matrix, by its shape."""
    theta = jnp.array([1.0, 2.0, 3.0])
    matrix = jnp.diag(jnp.array([1.0, 2.0, -3.0]))
    for generator in (jnp.diag(matrix), matrix, np.asarray(matrix), lambda v: matrix @ v):
        one = symmetry.ExponentialSymmetry(generator)
        close("Aθ", one.velocity(theta), matrix @ theta, 1e-14)
        close("e^{λA}θ", one.act(theta, 0.5), jnp.exp(0.5 * jnp.diag(matrix)) * theta, 1e-13)


def test_a_function_acts_right_up_to_its_bound():
    one = symmetry.ExponentialSymmetry(lambda v: jnp.array([1.0, -1.0, 0.0]) * v)
    theta = jnp.array([1.0, 1.0, 1.0])
    moved = one.act(theta, 36.0)
    close("grown", moved[0], np.exp(36.0), 1e-12)
    at_most("shrunk", abs(moved[1]), 1e-10)
    close("kept", moved[2], 1.0, 1e-14)


def test_points_keep_what_rides_along():
    point = POINT | {"name": "kept", "count": jnp.arange(3)}
    moved = symmetry.rescaling(point, first, second).act(point, jnp.log(2.0))
    assert moved["name"] == "kept" and jnp.array_equal(moved["count"], jnp.arange(3))
    close("U", moved["U"], 2 * POINT["U"], 1e-14)
    close("W", moved["W"], POINT["W"] / 2, 1e-14)


def test_single_precision_stays_single():
    single = jax.tree.map(lambda x: x.astype(jnp.float32), POINT)
    one = SYMMETRIES["rotation"]
    found = equilibrium(one, single)
    assert found.dtype == jnp.float32
    close("λ*", found, equilibrium(one), 1e-3)


# --- Cost --------------------------------------------------------------------------------------


def test_chunks_of_examples_change_nothing(monkeypatch):
    """Also far from a minimum, where the mean gradient dwarfs its spread."""
    inputs, targets = data_of(3, 23)
    data = inputs, targets + 1e4

    def found():
        jax.clear_caches()
        one = SYMMETRIES["rotation"]
        return symmetry.noether_drift(one, example_loss, POINT, data, **OPTIONS)

    whole = found()
    monkeypatch.setattr(_gradients, "_TOGETHER", 5 * SIZE)
    close("in chunks of 5", found(), whole, 1e-12)


def test_structure_in_place_of_gradients_changes_nothing(monkeypatch):
    """For weights that are one number for each leaf, in chunks too, with derivatives."""
    model = eqx.nn.MLP(2, 2, 8, 1, activation=jax.nn.leaky_relu, key=jr.key(0))
    data, one = data_of(3, 23), symmetry.mlp_rescaling(model)
    loss = lambda m, e: jnp.sum((m(e[0]) - e[1]) ** 2)

    def found():
        jax.clear_caches()

        def drift(factor):
            moved = eqx.tree_at(lambda m: m.layers[0].weight, model, factor * start)
            return symmetry.noether_drift(one, loss, moved, data, **OPTIONS)

        start = model.layers[0].weight
        equilibrium = symmetry.noise_equilibrium(one, loss, model, data, **OPTIONS)
        return jnp.stack([equilibrium, *jax.value_and_grad(drift)(1.0)])

    plain = found()
    monkeypatch.setattr(_gradients, "_SMALL", 0)
    monkeypatch.setattr(_gradients, "_TOGETHER", 30)
    close("structured", found(), plain, 1e-10)


def test_no_square_of_the_number_of_coordinates_is_held():
    size, count = 700, 40
    point = {"U": jnp.ones((size, 1)), "W": jnp.ones((1, size))}
    data = jnp.ones((count, size)), jnp.ones((count, size))
    symmetries = (
        symmetry.rescaling(point, first, second),
        symmetry.double_rotation(point, first, second, jnp.ones((1, 1))),
        symmetry.ExponentialSymmetry(lambda p: {"U": p["U"], "W": -p["W"]}),
    )
    for one in symmetries:

        def found(p, one=one):
            return symmetry.noise_equilibrium(one, example_loss, p, data, throw=False, **OPTIONS)

        largest = max(zoo.array_sizes(jax.make_jaxpr(found)(point)))
        at_most("largest array over N·D", largest / (count * 2 * size), 1.0)


# --- Transformations ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rotation", "function"])
def test_derivatives_of_the_equilibrium(name):
    """In the point, the data and σ², by both modes, against differences."""
    one = SYMMETRIES[name]

    def found(vector):
        point = rebuild(vector[:SIZE])
        inputs = DATA[0] + vector[SIZE] * DATA[1]
        return symmetry.noise_equilibrium(
            one, example_loss, point, (inputs, DATA[1]), noise_scale=0.05 + vector[-1],
            weight_decay=0.3, throw=False,
        )  # fmt: skip

    rebuild = jax.flatten_util.ravel_pytree(POINT)[1]
    start = jnp.append(flat(POINT), jnp.zeros(2))
    direction = jr.normal(jr.key(4), start.shape).at[-1].set(0.01)
    found = jax.jit(found)
    finite = central_difference(lambda t: found(start + t * direction), 1e-3)
    close("jvp", jax.jvp(found, (start,), (direction,))[1], finite, 1e-6)
    close("vjp", jax.grad(found)(start) @ direction, finite, 1e-6)


def test_no_derivative_at_infinity():
    loss = lambda p, e: example_loss(jax.tree.map(lambda x: x / jnp.linalg.norm(x), p), e)
    norm = symmetry.scaling(POINT, first)
    found, slope = jax.value_and_grad(
        lambda p: symmetry.noise_equilibrium(norm, loss, p, DATA, noise_scale=0.1)
    )(POINT)
    assert found == jnp.inf
    assert np.all(flat(slope) == 0)


def test_one_failure_leaves_the_rest_of_a_batch():
    """A NaN among the data, a loss without the symmetry: NaN for that member only."""
    one = SYMMETRIES["rotation"]

    @jax.jit
    @jax.vmap
    def batch(point, broken, shift):
        def loss(p, e):
            return example_loss(p, e) + broken * jnp.sum(p["U"] ** 3)

        return symmetry.noise_equilibrium_with_info(
            one, loss, point, (DATA[0] + shift, DATA[1]), **OPTIONS
        )

    points = jax.tree.map(lambda x: jnp.stack([x, x, x]), POINT)
    found, info = batch(points, jnp.array([0.0, 1.0, 0.0]), jnp.array([0.0, 0.0, jnp.nan]))
    close("the first", found[0], equilibrium(one), 1e-10)
    assert np.all(np.isnan(found[1:]))
    kinds = [mf.RESULTS.successful, mf.RESULTS.not_a_symmetry, mf.RESULTS.nonfinite]
    for index, kind in enumerate(kinds):
        assert jax.tree.map(lambda x, i=index: x[i], info.result) == kind, index
    at_least("defect", info.defect[1], 1e-2)


# --- What goes wrong ---------------------------------------------------------------------------


def test_losses_without_the_symmetry_are_refused():
    wrong = symmetry.scaling(POINT, first)
    with refused(eqx.EquinoxRuntimeError, "does not have this symmetry", "check_symmetry"):
        equilibrium(wrong)
    with refused(eqx.EquinoxRuntimeError, "do not commute"):
        equilibrium([SYMMETRIES["rotation"], rotation_of(jnp.diag(jnp.array([1.0, 2.0, 3.0])))])


@pytest.mark.quick
def test_bad_generators():
    with refused(ValueError, "symmetric", "antisymmetric"):
        rotation_of(TURN)
    with refused(ValueError, "axes of length 2", "axes (1, 0)"):
        rotation_of(jnp.eye(2))
    with refused(ValueError, "square matrix", "(2, 3)"):
        rotation_of(jnp.ones((2, 3)))
    with refused(ValueError, "like the point", "f64[2,3]"):
        symmetry.noether_charge(symmetry.ExponentialSymmetry({"U": jnp.ones(5), "W": 0.0}), POINT)
    with refused(ValueError, "like the point"):
        symmetry.noether_charge(symmetry.ExponentialSymmetry({"V": 1.0}), POINT)
    with refused(ValueError, "value of the generator"):
        symmetry.noether_charge(symmetry.ExponentialSymmetry(lambda p: p["U"]), POINT)
    with refused(ValueError, "Wrap the generator", wrong_type=True):
        symmetry.noether_charge([{"U": 1.0, "W": -1.0}], POINT)
    with refused(ValueError, "4 coordinates"):
        one = symmetry.ExponentialSymmetry(lx.MatrixLinearOperator(jnp.eye(3)))
        symmetry.noether_charge(one, jnp.ones(4))
    with refused(ValueError, "trailing axis", "(3,)"):
        symmetry.low_rank(POINT, jax.tree.map(lambda x: x[..., None], POINT), jnp.ones(3))
    mlp = eqx.nn.MLP(2, 2, 4, 1, key=jr.key(0))
    with refused(ValueError, "layer 0 to 0", "layer=1"):
        symmetry.mlp_rescaling(mlp, 1)
    with refused(ValueError, "4 neurons", "neuron=4"):
        symmetry.mlp_rescaling(mlp, neuron=4)


def test_bad_numbers_and_data():
    one = SYMMETRIES["weights"]
    drift = lambda **options: symmetry.noether_drift(
        one, example_loss, POINT, DATA, **(OPTIONS | options)
    )
    with refused(ValueError, "noise_scale", "η/(2S)", "-1"):
        drift(noise_scale=-1.0)
    with refused(ValueError, "weight_decay", "γ‖θ‖²"):
        drift(weight_decay=-1.0)
    with refused(ValueError, "data", "leading example axis"):
        symmetry.noether_drift(one, example_loss, POINT, (DATA[0], DATA[1][:2]), **OPTIONS)
    with refused(ValueError, "data", "NaN or infinite"):
        equilibrium(one, data=(DATA[0] * jnp.nan, DATA[1]))
    with refused(ValueError, "one real number", "(2,)"):
        vector_loss = lambda p, e: p["U"] @ (p["W"] @ e[0])
        symmetry.noether_drift(one, vector_loss, POINT, DATA, **OPTIONS)
    with refused(ValueError, "batch_size=7", "6 examples", "replacement=True"):
        symmetry.discrete_noether_drift(
            one, example_loss, POINT, DATA, learning_rate=0.1, batch_size=7
        )
    with refused(ValueError, "Expected an ExponentialSymmetry", wrong_type=True):
        symmetry.check_symmetry({"U": 1.0}, example_loss, POINT, DATA)


# --- Mutants -----------------------------------------------------------------------------------


def drift_law(drift):
    """Of C = ½θᵀAθ with decay, by a dense Σ; and G must vanish at λ* and nowhere near."""
    rows = np.asarray(jax.vmap(lambda e: flat(jax.grad(example_loss)(POINT, e)))(DATA))
    sigma = np.cov(rows.T, bias=True)
    matrix, theta = np.asarray(dense_generator(B)), np.asarray(flat(POINT))
    expected = 0.05 * np.trace(sigma @ matrix) - 4 * 0.3 * theta @ matrix @ theta / 2
    close("G", drift(POINT), expected, 1e-10)


def moments(point):
    rows = jax.vmap(lambda e: flat(jax.grad(example_loss)(point, e)))(DATA)
    matrix, theta = dense_generator(B), flat(point)
    raw = jnp.einsum("ni,ij,nj->", rows, matrix, rows) / len(rows)
    mean = jnp.mean(rows, axis=0)
    return raw, mean @ matrix @ mean, theta @ matrix @ theta / 2


MUTANTS = {
    "uncentred": lambda raw, mean, charge: 0.05 * raw - 4 * 0.3 * charge,
    "unbiased, N − 1": lambda raw, mean, charge: 0.05 * 6 / 5 * (raw - mean) - 4 * 0.3 * charge,
    "σ²/2": lambda raw, mean, charge: 0.025 * (raw - mean) - 4 * 0.3 * charge,
    "−2γC": lambda raw, mean, charge: 0.05 * (raw - mean) - 2 * 0.3 * charge,
    "wrong sign": lambda raw, mean, charge: -0.05 * (raw - mean) - 4 * 0.3 * charge,
}


def test_the_law_accepts_the_drift():
    one = SYMMETRIES["rotation"]
    drift_law(lambda p: symmetry.noether_drift(one, example_loss, p, DATA, **OPTIONS))


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_drifts_are_rejected(name):
    with pytest.raises(AssertionError, match="above the bound"):
        drift_law(lambda p: MUTANTS[name](*moments(p)))
