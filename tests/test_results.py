"""How Diffrax's words for the end of a solve become ours, and what `or_nan` does."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest

import manifoldflow as mf
from checks import equal, refused
from manifoldflow._results import from_diffrax, Info, or_nan

pytestmark = pytest.mark.quick

OURS = {
    "successful": "successful",
    "event_occurred": "stopped_early",
    "max_steps_reached": "max_steps_reached",
    "dt_min_reached": "step_too_small",
}


def word(name):
    return getattr(mf.RESULTS, name)


@pytest.mark.parametrize("theirs", sorted(dfx.RESULTS._name_to_item))
def test_every_word_of_diffrax_has_one_of_ours(theirs):
    expected = OURS.get(theirs, "nonfinite")
    given = getattr(dfx.RESULTS, theirs)
    for reached, wanted in (
        (jnp.ones(2), expected),
        # It never looks at what it has reached.
        (jnp.array([1.0, jnp.nan]), {"successful": "nonfinite", "stopped_early": "nonfinite"}),
    ):
        name = wanted if isinstance(wanted, str) else wanted.get(expected, expected)
        found = jax.jit(lambda x: from_diffrax(given, x))(reached)
        assert bool(found == word(name)), f"{theirs} at {reached}: {found}, expected {name}"


class Tired(mf.AbstractRetraction):
    """A retraction that never gets anywhere."""

    @property
    def order(self):
        return 1

    def with_info(self, manifold, point, vector, *, space=None):
        return point, Info(word("max_steps_reached"), jnp.ones(()), *[jnp.asarray(7)] * 2)

    def inverse_with_info(self, manifold, point, other):
        return self.with_info(manifold, point, other)


def test_retractions_have_no_max_steps_to_be_raised():
    sphere, x = mf.LevelSet(lambda p: jnp.sum(p**2) - 1), jnp.array([0.6, 0.8])
    for call in (
        lambda: Tired()(sphere, x, x),
        lambda: mf.inverse_retract(Tired(), sphere, x, x),
    ):
        with refused(RuntimeError, "within its fixed number of steps"):
            call()


def test_all_that_was_used_has_no_derivative():
    """In both modes, in what the value never came to depend on as well; counts are counts."""
    tree = {"x": jnp.array([1.0, -2.0]), "n": jnp.array([3, 4])}

    def value(x, unused, is_there, ties):
        of = (x, {"unused": unused, "name": "text"}) if ties else None
        found = or_nan({"x": 2 * x, "n": tree["n"], "still": jnp.ones(1)}, is_there, of=of)
        return found["x"], found["still"], found["n"]

    for is_there in map(jnp.asarray, (True, False)):
        floats = lambda x, unused, is_there=is_there: value(x, unused, is_there, True)[:2]
        _, forward = jax.jvp(floats, (tree["x"], 1.0), (jnp.zeros(2), 1.0))
        pulled = jax.vjp(floats, tree["x"], 1.0)[1]
        backward = pulled((jnp.ones(2), jnp.zeros(1))) + pulled((jnp.zeros(2), jnp.ones(1)))
        wanted = (jnp.full(2, 2.0), 0.0, jnp.zeros(2), 0.0) if is_there else (jnp.nan,) * 4
        for found, expected in zip(backward, wanted):
            assert jnp.array_equal(found, jnp.broadcast_to(expected, jnp.shape(found)), True), found
        for leaf in forward:
            expected = jnp.full_like(leaf, 0.0 if is_there else jnp.nan)
            assert jnp.array_equal(leaf, expected, True), leaf
        counts = value(tree["x"], 1.0, is_there, True)[2].tolist()
        equal("counts", counts, [3, 4] if is_there else [0, 0])
    untied = jax.grad(
        lambda unused: jnp.sum(value(tree["x"], unused, jnp.asarray(False), False)[0])
    )(1.0)
    equal("without being told, the derivative of what was not used", float(untied), 0.0)
