"""Wrong implementations, each of which the laws must reject."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import lawbook
import manifoldflow as mf
import zoo
from checks import flat

rejected = pytest.raises(
    AssertionError, match="above the bound|outside the window|is missed|successful"
)


class WrongNormal(mf.LevelSet):
    """A level set whose P⊥ is a given matrix function of J."""

    normal_matrix: object = eqx.field(static=True)

    def __init__(self, fn, normal_matrix):
        super().__init__(fn)
        self.normal_matrix = normal_matrix

    def _matrix(self, point):
        fn, x = zoo.constraint_of(self, point)
        return self.normal_matrix(jax.jacfwd(fn)(x))

    def tangent_projection(self, point, vector):
        return vector - self._matrix(point) @ vector

    def normal_projection(self, point, vector):
        return self._matrix(point) @ vector


STRETCH = jnp.diag(jnp.linspace(1.0, 3.0, 8))

PROJECTORS = {
    "right": lambda j: j.T @ jnp.linalg.solve(j @ j.T, j),
    "Jᵀ J, the Gram matrix forgotten": lambda j: j.T @ j,
    "Jᵀ K J, the Gram matrix not inverted": lambda j: j.T @ (j @ j.T) @ j,
    "oblique": lambda j: STRETCH @ j.T @ jnp.linalg.solve(j @ STRETCH @ j.T, j),
    "oblique, transposed": lambda j: (STRETCH @ j.T @ jnp.linalg.solve(j @ STRETCH @ j.T, j)).T,
    "reflection": lambda j: 2 * j.T @ jnp.linalg.solve(j @ j.T, j),
}


def place_with(name):
    place = zoo.place("codimension 3")
    manifold = WrongNormal(zoo.three_equations, PROJECTORS[name])
    return zoo.Place(manifold, place.point, place.codimension)


def test_the_laws_accept_the_right_projector_written_by_hand():
    lawbook.tangent_projection_law(place_with("right"))


@pytest.mark.parametrize("name", [name for name in PROJECTORS if name != "right"])
def test_projectors(name):
    with rejected:
        lawbook.tangent_projection_law(place_with(name))


class Retracts(mf.LevelSet):
    """A level set with another retraction."""

    move: object = eqx.field(static=True)

    def __init__(self, fn, move):
        super().__init__(fn)
        self.move = move

    def retract(self, point, vector, *, throw=True):
        return self.move(self, point, vector)


def retracting(move):
    place = zoo.place("codimension 3")
    return zoo.Place(Retracts(zoo.three_equations, move), place.point, place.codimension)


def curved(manifold, point, v):
    """Lands on the manifold after a tangent detour of second order."""
    detour = manifold.tangent_projection(point, jnp.dot(v, v) * jnp.ones_like(v))
    return manifold.project(point + manifold.tangent_projection(point, v) + detour)


def test_retractions():
    with rejected:  # never returns to the manifold
        lawbook.retraction_law(retracting(lambda m, x, v: x + m.tangent_projection(x, v)))
    with rejected:  # takes normal parts along
        lawbook.retraction_law(retracting(lambda m, x, v: m.project(x + v)))
    with rejected:  # first order only: the point lies on the manifold all the same
        lawbook.retraction_order_law(retracting(curved))


class RawDefect(mf.LevelSet):
    def defect(self, point):
        return jnp.linalg.norm(flat(self.constraint(point)))


def test_a_defect_that_depends_on_the_scaling_of_the_constraint():
    matrix = jnp.array([[100.0, 1.0, 0.0], [0.0, 1.0, -2.0], [3.0, 0.0, 0.1]])
    mixed = RawDefect(lambda x: matrix @ flat(zoo.three_equations(x)))
    with rejected:
        lawbook.defect_law(RawDefect(zoo.three_equations), mixed, zoo.place("codimension 3").point)


class NoBatchFactor(mf.LabelNoise):
    """c = scale·std², the N/B forgotten."""

    def strength(self, loss):
        return loss.scale * self.std**2


class HalfStrength(mf.LabelNoise):
    """½c: the samples of a full batch have twice that."""

    def strength(self, loss):
        return super().strength(loss) / 2


class Biased(mf.IsotropicNoise):
    def gradient(self, loss, point, key):
        return jax.tree.map(lambda leaf: leaf + 0.1 * self.std, super().gradient(loss, point, key))


@pytest.mark.parametrize(
    "noise",
    [
        NoBatchFactor(0.7, batch_size=1),
        NoBatchFactor(0.7, batch_size=3),
        HalfStrength(0.7),
        Biased(0.3),
    ],
    ids=["c without N/B, B=1", "c without N/B, B=3", "c/2", "biased"],
)
def test_noises(noise):
    place = zoo.place("dict net")
    with rejected:
        lawbook.noise_moments_law(noise, place.manifold.loss, place.point, seed=1)


class WrongDrift(mf.LimitDiffusion):
    """The drift times a factor."""

    factor: float = eqx.field(static=True)

    def __init__(self, manifold, noise, factor):
        super().__init__(manifold, noise)
        self.factor = factor

    def drift(self, point):
        return jax.tree.map(lambda leaf: self.factor * leaf, super().drift(point))


class FullTrace(mf.LimitDiffusion):
    """The gradient of the trace without P: leaves the manifold."""

    def drift(self, point):
        gradient = jax.grad(self.manifold.loss.trace_gauss_newton)(point)
        c = self.noise.strength(self.manifold.loss)
        return jax.tree.map(lambda leaf: -c / 4 * leaf, gradient)


def test_drifts():
    place = zoo.place("dict net")
    noise, c = mf.LabelNoise(0.7, batch_size=2), (1 / 8) * 0.7**2 * 2
    lawbook.label_noise_drift_law(WrongDrift(place.manifold, noise, 1.0), place.point, c)
    for factor in (2.0, -1.0, 0.5):  # −(c/2), the wrong sign, −(c/8)
        with rejected:
            lawbook.label_noise_drift_law(WrongDrift(place.manifold, noise, factor), place.point, c)
    with rejected:
        lawbook.label_noise_drift_law(FullTrace(place.manifold, noise), place.point, c)


def test_a_projection_in_place_of_the_limit_map():
    model = zoo.prescribed_gram(1e2, alpha=1.0)
    with rejected:
        lawbook.limit_map_law(
            lambda loss, start: mf.ZeroLossManifold(loss).project_with_info(start),
            "project for Φ", *model, 80,
        )  # fmt: skip


def test_a_derivative_that_is_not_the_derivative():
    @jax.custom_jvp
    def square(x):
        return x**2

    square.defjvp(lambda primals, tangents: (primals[0] ** 2, primals[0] * tangents[0]))
    with rejected:
        lawbook.derivative_law("square", square, jr.normal(jr.key(0), (3,)), 1)
