"""First calls look for garbage more rarely, and leave Python's collector as they found it."""

import gc

import jax.numpy as jnp
import pytest

import manifoldflow as mf

pytestmark = pytest.mark.quick


@pytest.fixture(params=[(0, 10, 10), (700, 10, 10), (100_000, 5, 5)], ids=str)
def thresholds(request):
    before = gc.get_threshold()
    gc.set_threshold(*request.param)
    yield request.param
    gc.set_threshold(*before)


def test_collections_are_rare_within_a_call_and_as_before_after_it(thresholds):
    seen = []

    def fn(point):
        seen.append(gc.get_threshold())
        return jnp.sum(point**2) - 1

    mf.LevelSet(fn).project(jnp.array([0.6, 0.9]))
    first, *others = thresholds
    expected = (first and max(first, 50_000), *others)
    assert seen and all(during == expected for during in seen), f"{seen} with {thresholds}"
    assert gc.get_threshold() == thresholds


def test_they_are_as_before_after_an_error():
    before = gc.get_threshold()
    with pytest.raises(ValueError, match="infinite"):
        mf.FunctionLoss(_refused).gradient(jnp.ones(2))
    assert gc.get_threshold() == before


def _refused(point):
    raise ValueError("infinite")
