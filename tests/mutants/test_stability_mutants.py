"""Wrong formulas of mean-square stability, each of which all batches, counted, must reject."""

import dataclasses

import jax.numpy as jnp
import pytest

from checks import at_least, close
from manifoldflow.diagnostics._mean_square import Batches, largest_eigenvalue, Moments
from stability_laws import fitted, N, radius

rejected = pytest.raises(AssertionError, match="above the bound|below the bound")
SINGULAR = {"num": 8, "outputs": 3, "width": 2}


def law(batches_of, moments_of=Moments.of, batch_size=2, replacement=False, **options):
    """The spectral radius at 1/λ is one."""
    loss, point = fitted(**options)
    gram = loss.gauss_newton_root(point).gram()
    rows = len(gram) // loss.num_examples
    batches = batches_of(loss.num_examples, rows, batch_size, replacement)
    value = float(largest_eigenvalue(moments_of(gram, batches)).value)
    at_least("eigenvalue", value, 1e-6)
    close("radius", radius(loss, point, batch_size, replacement, 1 / value), 1.0, 1e-6)


def swapped(*arguments):
    right = Batches.of(*arguments)
    return Batches(right.own, right.whole, right.rows)


def one_less(num, rows, batch_size, replacement):
    return Batches.of(num, rows, batch_size - 1, replacement)


def other_replacement(num, rows, batch_size, replacement):
    return Batches.of(num, rows, batch_size, not replacement)


def population(num, rows, batch_size, replacement):
    """N/(N − 1) forgotten."""
    return Batches((batch_size - 1) / batch_size, (num - batch_size) / batch_size, rows)


def of_single_outputs(num, rows, batch_size, replacement):
    return dataclasses.replace(Batches.of(num, rows, batch_size, replacement), rows=1)


MUTANTS = [swapped, one_less, other_replacement, population, of_single_outputs]


def everywhere(gram, batches):
    """The range forgotten: what rounding makes of the null space counts, of either sign."""
    values, vectors = jnp.linalg.eigh(gram)
    return Moments(values, vectors, batches)


@pytest.mark.parametrize("replacement", [False, True])
def test_the_law_accepts_what_is_right(replacement):
    law(Batches.of, replacement=replacement)
    law(Batches.of, batch_size=1, replacement=replacement, **SINGULAR)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_law_rejects(mutant):
    with rejected:
        law(mutant)


def test_the_law_rejects_the_range_forgotten():
    with rejected:
        law(Batches.of, everywhere, **SINGULAR)


def test_the_law_rejects_other_batches_than_full_ones():
    with rejected:
        law(lambda *arguments: Batches.of(*arguments[:2], N - 1, False), batch_size=N)
