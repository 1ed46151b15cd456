"""Laws that every manifold obeys, over the zoo."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import lawbook
import manifoldflow as mf
import zoo
from checks import at_most, close, flat

everywhere = pytest.mark.parametrize("name", zoo.NAMES)
on_small = pytest.mark.parametrize("name", zoo.SMALL)
# Derivatives compile long; the others have the same structure as one of these.
on_kinds = pytest.mark.parametrize(
    "name", ["torus", "codimension 3", "mlp", "softmax", "minimizers"]
)


@everywhere
def test_tangent_projection(name):
    for seed in (1, 2):
        lawbook.tangent_projection_law(zoo.place(name), seed)


@everywhere
def test_dimensions_and_rank(name):
    lawbook.dimension_law(zoo.place(name))


@everywhere
def test_retract(name):
    lawbook.retraction_law(zoo.place(name))
    lawbook.retraction_order_law(zoo.place(name))


@everywhere
def test_project(name):
    for seed in (3, 4):
        lawbook.projection_law(zoo.place(name), seed)


@on_kinds
def test_derivative_of_project(name):
    lawbook.project_derivative_law(zoo.place(name))


@on_kinds
def test_derivative_of_retract(name):
    lawbook.retract_derivative_law(zoo.place(name))


@on_kinds
def test_random_tangent(name):
    lawbook.random_tangent_law(zoo.place(name))


@everywhere
def test_is_tangent(name):
    place = zoo.place(name)
    v = place.random_vector(12)
    tangent = place.manifold.tangent_projection(place.point, v)
    assert bool(place.manifold.is_tangent(place.point, tangent)), "Pv is not tangent, seed 12"
    assert not bool(place.manifold.is_tangent(place.point, v)), "any vector is tangent, seed 12"


def test_project_and_retract_know_that_data_move_the_manifold():
    """Derivatives in the targets: the manifold itself moves."""
    inputs, targets = zoo.data()
    point = zoo.place("dict net").point
    here, unravel = ravel_pytree(point)
    v = 0.1 * jr.normal(jr.key(1), here.shape)

    def manifold(t):
        loss = mf.LeastSquares(inputs, t.reshape(targets.shape), predict=zoo.network)
        return mf.ZeroLossManifold(loss)

    def project(t):
        return flat(manifold(t).project(point))

    def retract(t):
        return flat(manifold(t).retract(point, unravel(v)))

    lawbook.derivative_law("project in the targets", project, targets.reshape(-1), 21, 1e-5, 1e-4)
    lawbook.derivative_law("retract in the targets", retract, targets.reshape(-1), 22, 1e-5, 1e-4)


@on_small
def test_jit_is_eager(name):
    place = zoo.place(name)
    manifold, point, v = place.manifold, place.point, place.random_vector(31)
    start = zoo.moved(point, v, 0.02)

    def everything(point, start, v):
        landed = place.coordinates_of(manifold.project(start))
        return manifold.tangent_projection(point, v), manifold.defect(start), landed

    jitted = eqx.filter_jit(everything)(point, start, v)
    with jax.disable_jit():
        eager = everything(point, start, v)
    for what, a, b in zip(("P", "defect", "project"), jitted, eager, strict=True):
        close(f"{what}: jit against eager, seed 31", a, b, 1e-9)


@on_small
def test_vmap_is_a_loop(name):
    place = zoo.place(name)
    manifold, (rebuild, x) = place.manifold, zoo.unraveller(place.manifold, place.point)
    starts = x + 0.05 * jr.normal(jr.key(41), (3, x.size))
    vectors = jr.normal(jr.key(42), (3, x.size))

    def everything(start, vector):
        landed = manifold.project(rebuild(start))
        tangent = place.coordinates_of(rebuild(0.1 * vector))
        results = manifold.tangent_projection(landed, tangent), manifold.retract(landed, tangent)
        return [flat(place.coordinates_of(p)) for p in (landed, *results)]

    batched = jax.jit(jax.vmap(everything))(starts, vectors)
    looped = [everything(s, v) for s, v in zip(starts, vectors, strict=True)]
    for i, what in enumerate(("project", "P", "retract")):
        close(
            f"{what}: vmap against loop, seed 41",
            batched[i],
            jnp.stack([r[i] for r in looped]),
            1e-9,
        )


def test_a_tree_and_a_vector_give_the_same_numbers():
    tree, vector = zoo.place("dict net"), zoo.place("flat net")
    _, unravel = ravel_pytree(tree.point)
    close("projected points", tree.point, vector.point, 1e-10)
    v = vector.random_vector(51)
    off = zoo.moved(vector.point, v, 0.01)
    noise = mf.LabelNoise(std=0.5, batch_size=2)

    def numbers(manifold, point, v, off):
        loss = manifold.loss
        return {
            "loss": loss(off),
            "gradient": loss.gradient(off),
            "trace": loss.trace_hessian(off),
            "defect": manifold.defect(off),
            "projection": manifold.tangent_projection(point, v),
            "project": manifold.project(off),
            "retract": manifold.retract(point, v),
            "drift": mf.LimitDiffusion(manifold, noise).drift(point),
        }

    both = jax.jit(lambda: (
        numbers(tree.manifold, unravel(vector.point), unravel(0.1 * v), unravel(off)),
        numbers(vector.manifold, vector.point, 0.1 * v, off),
    ))()  # fmt: skip
    for name in both[0]:
        close(f"{name}: tree against vector, seed 51", both[0][name], both[1][name], 1e-10)


def test_defect_does_not_change_with_the_scaling_of_the_constraint():
    manifold, point = zoo.place("codimension 3").manifold, zoo.place("codimension 3").point
    matrix = jnp.array([[100.0, 1.0, 0.0], [0.0, 1.0, -2.0], [3.0, 0.0, 0.1]])
    mixed = mf.LevelSet(lambda x: matrix @ flat(zoo.three_equations(x)))
    for seed in (61, 62):
        lawbook.defect_law(manifold, mixed, point, seed)
    close("P of A·f", *(m.tangent_projection(point, point) for m in (mixed, manifold)), 1e-9)


def test_defect_is_the_distance_to_first_order():
    point = jnp.array([0.6, 0.0, 0.8])
    for distance in (1e-2, 1e-4):
        defect = float(mf.LevelSet(zoo.sphere).defect((1 + distance) * point))
        at_most(f"|defect − {distance}|", abs(defect - distance), distance**2)


@pytest.mark.quick
def test_frozen_leaves_do_not_move():
    loss = mf.LeastSquares(
        *zoo.data(), predict=zoo.network, trainable={"weight": True, "bias": False, "out": True}
    )
    manifold, start = mf.ZeroLossManifold(loss), zoo.network_point(jr.key(5))
    landed = manifold.project(start)
    assert manifold.dimension(start) == 6 * 3 + 2 * 6 - 8, manifold.dimension(start)
    assert np.array_equal(landed["bias"], start["bias"]), "a frozen leaf was moved"
    at_most("defect with a frozen leaf", manifold.defect(landed), 1e-9)
    assert manifold.random_tangent(landed, jr.key(0))["bias"] is None


@pytest.mark.quick
def test_one_failed_member_of_a_batch_does_not_spoil_the_others():
    """{x² + c = 0} is empty for c > 0."""

    def land(c):
        manifold = mf.LevelSet(lambda x: jnp.sum(x**2) + c)
        point, info = manifold.project_with_info(jnp.array([0.5, 0.7]))
        return point, info.result == mf.RESULTS.successful

    points, fine = jax.jit(jax.vmap(land))(jnp.array([-1.0, 0.5, -4.0]))
    assert fine.tolist() == [True, False, True], fine
    assert bool(jnp.all(jnp.isnan(points[1]))), points
    at_most(
        "radius of the others",
        jnp.max(jnp.abs(jnp.linalg.norm(points[::2], axis=1) - jnp.array([1.0, 2.0]))),
        1e-10,
    )
