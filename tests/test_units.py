"""The units of function, point, constraint and time do not matter, in float32 and float64.

Everything that searches is asked the same question in units 10⁻⁸ and 10⁸ times as large.
"""

import jax
import jax.numpy as jnp
import pytest

import manifoldflow as mf
from checks import at_most, close

X64 = jnp.asarray([1.2, 0.7, 0.3])
ON = jnp.asarray([0.6, 0.0, 0.8])
FACTORS = (1e-8, 1.0, 1e8)
DTYPES = ("float32", "float64")


def sphere(radius, factor):
    """Of this radius, its equation multiplied by a factor."""
    return mf.LevelSet(
        jax.tree_util.Partial(
            lambda radius, factor, x: factor * (jnp.sum(x**2) - radius**2), radius, factor
        )
    )


def tilt(weight, x):
    return weight * (x[2] + 0.3 * x[0])


def answers(radius, factor, weight, time):
    """What everything that searches finds on a sphere, divided by its units."""
    dtype = radius.dtype
    manifold = sphere(radius, factor)
    slope = jax.tree_util.Partial(tilt, weight)
    start, on = radius * X64.astype(dtype), radius * ON.astype(dtype)
    along = radius * jnp.asarray([0.0, 0.3, 0.0], dtype)
    landed, info = manifold.project_with_info(start)
    there, moved = manifold.retract_with_info(on, along)
    lowest = mf.minimize(manifold, slope, on, throw=False)
    # θ' = −P∇F: with F in units of weight·radius a time radius/weight moves by one radius.
    flow = mf.RiemannianGradientFlow(manifold, jax.tree_util.Partial(tilt, 1 / time))
    went = mf.solve(flow, on, end_time=radius * time, throw=False)
    limit = mf.limit_map(manifold, start, throw=False)
    return {
        "project": landed / radius,
        "retract": there / radius,
        "closest point": mf.closest_point(manifold, start, throw=False) / radius,
        "limit map": limit / radius,
        "minimize": lowest.final / radius,
        "solve": went.final / radius,
        "geodesic": mf.exponential_map(manifold, on, along) / radius,
        "is on": jnp.asarray(manifold.is_on(landed) & manifold.is_on(there), dtype),
        "is off": jnp.asarray(~manifold.is_on(1.01 * landed), dtype),
        "successful": jnp.asarray(info.is_successful & moved.is_successful, dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_units_do_not_matter(dtype):
    asked = jax.jit(answers)
    unit = lambda values: tuple(jnp.asarray(value, dtype) for value in values)
    expected = asked(*unit((1.0, 1.0, 1.0, 1.0)))
    for name in ("is on", "is off", "successful"):
        assert expected[name] == 1, name
    bound = {"float32": 2e-4, "float64": 1e-6}[dtype]
    for place, what in enumerate(("point", "constraint", "function", "time")):
        for factor in (1e-8, 1e8):
            values = [1.0, 1.0, 1.0, 1.0]
            values[place] = factor
            found = asked(*unit(values))
            for name, value in found.items():
                close(f"{name}, {what} times {factor:.0e}, {dtype}", value, expected[name], bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logarithms_in_any_units(dtype):
    measure = jax.jit(
        lambda radius: (
            mf.distance(
                sphere(radius, jnp.ones_like(radius)),
                radius * ON.astype(dtype),
                radius * jnp.asarray([0.0, 1.0, 0.0], dtype),
                throw=False,
            )
            / radius
        )
    )
    for radius in FACTORS:
        angle = measure(jnp.asarray(radius, dtype))
        close(f"radius {radius:.0e}, {dtype}", angle, jnp.pi / 2, 2e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_short_tangents(dtype):
    """Squares of 1e-23 are zero in float32: no quotient of them may decide."""
    manifold, on = sphere(jnp.ones((), dtype), jnp.ones((), dtype)), ON.astype(dtype)
    vector = jnp.asarray([1.0, 2.0, 3.0], dtype)
    expected = manifold.tangent_projection(on, vector)
    for size in (1e-30, 1e-17, 1e-12, 1e12):
        found = manifold.tangent_projection(on, jnp.asarray(size, dtype) * vector)
        close(f"P v, |v| = {size}", found / jnp.asarray(size, dtype), expected, 1e-6)
        assert manifold.is_tangent(on, found)
        assert not manifold.is_tangent(on, jnp.asarray(size, dtype) * vector)


def test_retractions_of_half_a_float():
    """⟨r, K⁻¹r⟩ underflowed here while r was not zero."""
    manifold = sphere(jnp.float32(1), jnp.float32(1))
    landed = manifold.retract(ON.astype("float32"), jnp.asarray([0.0, 0.3, 0.0], jnp.float32))
    at_most("|y| − 1", abs(float(jnp.linalg.norm(landed)) - 1), 2e-7)
