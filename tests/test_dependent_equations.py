"""Equations that depend on each other, that nearly do, or whose units differ."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import manifoldflow as mf
from checks import at_most, close, equal

START = jnp.asarray([0.9, 0.3, 0.2, 0.6])


def three_equations(x):
    return jnp.stack([jnp.sum(x**2) - 1, x[0] * x[1] - 0.2, x[2] - 0.3 * x[3]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_units_of_single_equations_do_not_matter(dtype):
    """A row times 10^±8 changes nothing: not the projection, not the rank, not where it lands."""
    vector = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    plain = mf.LevelSet(three_equations)
    landed = plain.project(START)
    expected = plain.tangent_projection(landed, vector)

    @jax.jit
    def asked(units):
        manifold = mf.LevelSet(lambda x: units * three_equations(x))
        found, info = manifold.project_with_info(START.astype(dtype))
        there = landed.astype(dtype)
        tangent = manifold.tangent_projection(there, vector.astype(dtype))
        return found, info.is_successful, tangent, manifold.rank(there)

    bound = {"float32": 2e-6, "float64": 1e-13}[dtype]
    for row in range(3):
        for unit in (1e-8, 1e8):
            found, is_there, tangent, rank = asked(jnp.ones(3, dtype).at[row].set(unit))
            what = f"row {row} times {unit:.0e}, {dtype}"
            assert is_there, what
            close(f"project, {what}", found, landed, bound)
            close(f"P v, {what}", tangent, expected, bound)
            equal(f"rank, {what}", int(rank), 3)


def test_rotations_by_ten_equations():
    """RᵀR = 1 and det R = 1: ten equations for nine coordinates, of rank six."""
    rotations = mf.LevelSet(
        lambda r: {"orthogonal": r.T @ r - jnp.eye(3), "proper": jnp.linalg.det(r) - 1}
    )
    start = jnp.eye(3) + 0.02 * jnp.arange(9.0).reshape(3, 3)
    landed = rotations.project(start)
    at_most("RᵀR − 1", jnp.max(jnp.abs(landed.T @ landed - jnp.eye(3))), 1e-14)
    assert rotations.is_on(landed)
    equal("dimension", rotations.dimension(landed), 3)
    equal("codimension", rotations.codimension(landed), 6)
    tangent = rotations.random_tangent(landed, jr.key(0))
    skew = landed.T @ tangent
    at_most("RᵀV + VᵀR", jnp.max(jnp.abs(skew + skew.T)), 1e-13)


def test_projectors_by_their_equations():
    """P² = P = Pᵀ: 18 equations for nine coordinates; planes in R³ have dimension two."""
    planes = mf.LevelSet(lambda p: {"idempotent": p @ p - p, "symmetric": p - p.T})
    on = jnp.diag(jnp.asarray([1.0, 1.0, 0.0]))
    equal("dimension", planes.dimension(on), 2)
    landed = planes.project(on + 0.006 * jnp.arange(9.0).reshape(3, 3))
    at_most("P² − P", jnp.max(jnp.abs(landed @ landed - landed)), 1e-14)
    equal("dimension", planes.dimension(landed), 2)


def test_brownian_motion_on_nine_equations():
    """RᵀR = 1 as nine equations, three of them twice: not a set of dimension 0."""
    orthogonal = mf.LevelSet(lambda r: r.T @ r - jnp.eye(3))
    walk = mf.solve(
        mf.BrownianMotion(orthogonal), jnp.eye(3), end_time=0.1, step_size=0.05, key=jr.key(0)
    )
    at_most("RᵀR − 1", jnp.max(jnp.abs(walk.final.T @ walk.final - jnp.eye(3))), 1e-13)
    assert jnp.linalg.norm(walk.final - jnp.eye(3)) > 0.05


@pytest.mark.parametrize("distance", [1e-3, 1e-4, 1e-5, 1e-6])
def test_nearly_proportional_examples(distance):
    """Two examples that are nearly one have a normal space, and are no double zero."""
    rows = jnp.asarray([[1.0, 2.0, 3.0], [1.0, 2.0, 3.3]], jnp.float32)
    inputs = jnp.stack([rows[0], rows[0] + distance * rows[1]])
    targets = jnp.asarray([1.0, 1.0 + 1.5 * distance], jnp.float32)
    manifold = mf.LevelSet(lambda w: jnp.tanh(inputs @ w[:3]) + (inputs @ w[3:]) ** 2 - targets)
    start = jnp.asarray([0.3, 0.1, 0.2, 0.5, -0.2, 0.1], jnp.float32)
    landed, info = manifold.project_with_info(start)
    assert info.is_successful, info.result
    again, info = manifold.project_with_info(landed)
    assert info.is_successful, info.result


DOUBLE = {
    "a square": lambda x: (jnp.sum(x**2) - 1) ** 2,
    "expanded": lambda x: x[0] ** 2 - 2 * x[0] + 1,
    "one of two": lambda x: jnp.stack([jnp.sum(x**2) - 1, (x[0] - 0.3) ** 2]),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", DOUBLE)
def test_double_zeros_are_told_by_their_convergence(name, dtype):
    _, info = mf.LevelSet(DOUBLE[name]).project_with_info(jnp.asarray([2.0, 0.4, 0.7], dtype))
    assert info.result == mf.RESULTS.rank_zero, info.result


def test_far_away_a_sphere_looks_like_a_double_zero():
    """Newton's method halves the distance to a distant sphere as it does to a double zero."""
    for start in (jnp.asarray([1e4, 2.0, 3.0]), jnp.asarray([1e-4, 0.0, 0.0])):
        landed, info = mf.LevelSet(lambda x: jnp.sum(x**2) - 1).project_with_info(start)
        assert info.is_successful, info.result
        at_most("|x| − 1", abs(float(jnp.linalg.norm(landed)) - 1), 1e-14)


def test_max_steps():
    sphere = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
    far = jnp.asarray([1e3, 1.0, 1.0])
    _, info = sphere.project_with_info(far, max_steps=3)
    assert info.result == mf.RESULTS.max_steps_reached
    assert sphere.project_with_info(far, max_steps=50)[1].is_successful
    with pytest.raises(ValueError, match="max_steps"):
        sphere.project(far, max_steps=0)


def test_reverse_mode_is_enough_to_land():
    """A custom_vjp has no forward mode; project, retract and limit_map need none."""

    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (square(x), x), lambda x, bar: (2 * x * bar,))
    sphere = mf.LevelSet(lambda x: jnp.sum(square(x)) - 1)
    landed = sphere.project(jnp.asarray([1.0, 0.4, 0.7]))
    at_most("|x| − 1", abs(float(jnp.linalg.norm(landed)) - 1), 1e-14)
    moved = sphere.retract(landed, sphere.random_tangent(landed, jr.key(0)) / 10)
    at_most("|y| − 1", abs(float(jnp.linalg.norm(moved)) - 1), 1e-14)
