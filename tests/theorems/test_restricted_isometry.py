"""The restricted isometry constant: exact where all supports can be seen, attained elsewhere."""

import itertools

import jax.random as jr
import numpy as np

from checks import at_most, close, refused
from manifoldflow import theory

INPUTS = np.asarray(jr.normal(jr.key(0), (30, 12)))


def by_hand(z, sparsity):
    singular = lambda s: np.linalg.svd(z[:, s] / np.sqrt(len(z)), compute_uv=False) ** 2
    supports = itertools.combinations(range(z.shape[1]), sparsity)
    return max(np.max(np.abs(singular(list(s)) - 1)) for s in supports)


def test_enumerated():
    for sparsity in (1, 3):
        found = theory.restricted_isometry(INPUTS, sparsity)
        assert isinstance(found, theory.RestrictedIsometry)
        assert found.is_exact and len(found.support) == sparsity
        close(f"δ_{sparsity}", found.lower, by_hand(INPUTS, sparsity), 1e-12)
        gram = np.abs(INPUTS.T @ INPUTS / len(INPUTS) - np.eye(12))
        off = np.max(gram - np.diag(np.diag(gram)))
        circles = np.max(np.diag(gram)) + (sparsity - 1) * off
        close("upper", found.upper, max(found.lower, circles), 1e-12)


def test_orthogonal_columns_keep_all_norms():
    found = theory.restricted_isometry(np.eye(8) * np.sqrt(8), 3)
    at_most("δ", found.lower, 1e-12)
    at_most("upper bound", found.upper, 1e-12)


def test_a_search_finds_what_is_hidden():
    """Two columns that nearly agree, and three that nearly depend, among 200: C(200, 3) is
    too many to enumerate."""
    z = np.array(jr.normal(jr.key(1), (150, 200)))
    z[:, 77] = z[:, 31] + 0.01 * z[:, 77]
    found = theory.restricted_isometry(z, 3)
    assert not found.is_exact and {31, 77} <= set(found.support.tolist())
    part = z[:, found.support] / np.sqrt(150)
    attained = np.max(np.abs(np.linalg.eigvalsh(part.T @ part) - 1))
    close("attained on its support", found.lower, attained, 1e-12)
    assert found.lower > 1.0
    at_most("lower ≤ upper", found.lower, found.upper)


def test_more_examples_keep_norms_better():
    """δ of Gaussian inputs falls like √(κ ln d/n)."""
    z = np.asarray(jr.normal(jr.key(2), (1600, 60)))
    few, many = (theory.restricted_isometry(z[:n], 4).lower for n in (400, 1600))
    ratio = few / many
    assert 1.6 < ratio < 2.5, f"δ falls by {ratio} for four times the examples, expected about 2"


def test_bad_input():
    for sparsity in (0, 13):
        with refused(ValueError, "between 1 and d = 12"):
            theory.restricted_isometry(INPUTS, sparsity)
