"""Gram solves and functions of singular matrices, against NumPy and finite differences."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from checks import at_least, at_most, central_difference, close, equal, flat, norm, refused
from manifoldflow import linalg


def matrix_with_spectrum(singular_values, num_columns, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    n = len(singular_values)
    left = np.linalg.qr(rng.normal(size=(n, n)))[0]
    right = np.linalg.qr(rng.normal(size=(num_columns, n)))[0]
    return jnp.asarray(left * np.asarray(singular_values) @ right.T, dtype)


def duplicated_rows():
    full = matrix_with_spectrum([3.0, 2.0, 1.0], 9)
    return jnp.concatenate([full, full[:2]])


JACOBIANS = {
    "full rank": (matrix_with_spectrum([3.0, 2.0, 1.0, 0.5, 0.1], 9), 5),
    "repeated singular values": (matrix_with_spectrum([2.0, 2.0, 2.0, 1.0, 1.0], 9), 5),
    "rank 3 of 5": (matrix_with_spectrum([3.0, 2.0, 1.0, 0.0, 0.0], 9), 3),
    "duplicated rows": (duplicated_rows(), 3),
}
every_jacobian = pytest.mark.parametrize("name", JACOBIANS)


def prepared(matrix):
    jacobian = linalg.DenseJacobian(matrix)
    return jacobian, linalg.DenseGram()(jacobian)


@jax.jit
def normal_component(matrix, vector):
    return linalg.normal_component(*prepared(matrix), vector)


@jax.jit
def pseudo_inverse_mv(matrix, vector):
    return linalg.pseudo_inverse_mv(*prepared(matrix), vector)


@every_jacobian
def test_gram_products(name):
    matrix, rank = JACOBIANS[name]
    jacobian, gram = prepared(matrix)
    w, v = jr.normal(jr.key(1), (5,)), jr.normal(jr.key(2), (9,))
    close("K", jacobian.gram(), matrix @ matrix.T, 1e-12)
    close(
        "cross Gram",
        jacobian.cross_gram(linalg.DenseJacobian(2 * matrix)),
        2 * matrix @ matrix.T,
        1e-12,
    )
    equal("numerical rank", int(linalg.numerical_rank(gram.eigenvalues())), rank)
    expected = np.linalg.svd(matrix)[1][:rank]
    condition = float(linalg.condition_number(gram.eigenvalues()))
    close("condition number", condition, (expected[0] / expected[-1]) ** 2, 1e-8)
    dense = np.asarray(matrix @ matrix.T)
    damped = np.linalg.solve(dense + 0.3 * np.diag(np.diag(dense)), w)
    close("damped solve", gram.damped(jnp.asarray(0.3)).solve(w), damped, 1e-10)
    if rank == 5:
        close("solve", gram.solve(w), np.linalg.solve(np.asarray(matrix @ matrix.T), w), 1e-10)
    inverse = np.linalg.pinv(matrix, rcond=1e-10)
    in_range = matrix @ v
    close(
        "J†w, w in the range",
        pseudo_inverse_mv(matrix, in_range),
        inverse @ np.asarray(in_range),
        1e-10,
    )
    projector = inverse @ np.asarray(matrix)
    close("P⊥v", normal_component(matrix, v), projector @ np.asarray(v), 1e-10)


@every_jacobian
def test_gram_derivatives(name):
    """Along a path of matrices of constant rank; dJ mixes and turns the rows."""
    matrix, _ = JACOBIANS[name]
    mix, turn = 0.3 * jr.normal(jr.key(3), (5, 5)), 0.3 * jr.normal(jr.key(4), (9, 9))
    v, out = jr.normal(jr.key(5), (9,)), jr.normal(jr.key(6), (9,))

    def path(t):
        return (jnp.eye(5) + t * mix) @ matrix @ (jnp.eye(9) + t * turn)

    speed = mix @ matrix + matrix @ turn
    value, tangent = jax.jvp(lambda m: normal_component(m, v), (matrix,), (speed,))
    finite = central_difference(lambda t: normal_component(path(t), v), 1e-3)
    close("∂P⊥v against differences, seed 3", tangent, finite, 1e-7)
    (cotangent,) = jax.vjp(lambda m: normal_component(m, v), matrix)[1](out)
    at_most("jvp against vjp", abs(float(jnp.sum(cotangent * speed) - tangent @ out)), 1e-9)


def test_gram_under_vmap():
    matrices = jnp.stack([matrix for matrix, _ in JACOBIANS.values()])
    vectors = jr.normal(jr.key(7), (len(matrices), 9))
    batched = jax.jit(jax.vmap(normal_component))(matrices, vectors)
    for i, name in enumerate(JACOBIANS):
        close(
            f"{name}: vmap against loop",
            batched[i],
            normal_component(matrices[i], vectors[i]),
            1e-10,
        )


def test_rows_in_other_units():
    """Solves, ranks and scales do not know what a row is measured in."""
    matrix, units = JACOBIANS["full rank"][0], jnp.asarray([1e6, 1.0, 1e-8, 1.0, 1e4])
    w = jr.normal(jr.key(12), (5,))
    jacobian, gram = prepared(units[:, None] * matrix)
    norms = jnp.linalg.norm(matrix, axis=1)
    close("scales", linalg.row_scale(gram.row_norms_squared()), 1 / (units * norms), 1e-12)
    found = linalg.refined_solve(jacobian, gram, units * w)
    close("K⁻¹w", units * found, jnp.linalg.solve(matrix @ matrix.T, w), 1e-10)
    damping = jnp.asarray(0.3)
    damped = linalg.refined_solve(jacobian, gram.damped(damping), units * w, damping)
    marquardt = matrix @ matrix.T + 0.3 * jnp.diag(norms**2)
    close("(K + 0.3 diag K)⁻¹w", units * damped, jnp.linalg.solve(marquardt, w), 1e-10)
    equal("rank", int(linalg.numerical_rank(linalg.equilibrated_eigenvalues(jacobian))), 5)


def test_a_jacobian_of_zeros_has_no_normal_space():
    v = jr.normal(jr.key(8), (9,))
    at_most("P⊥v", jnp.max(jnp.abs(normal_component(jnp.zeros((5, 9)), v))), 0.0)
    at_most("J†w", jnp.max(jnp.abs(pseudo_inverse_mv(jnp.zeros((5, 9)), v[:5]))), 0.0)


@pytest.mark.parametrize(
    ("dtype", "condition", "bound"),
    [
        (np.float32, 1e2, 1e-6),
        (np.float32, 1e4, 1e-5),
        (np.float64, 1e4, 1e-10),
        (np.float64, 1e8, 1e-10),
    ],
)
def test_tangency_of_ill_conditioned_jacobians(dtype, condition, bound):
    """‖J P v‖ ≤ bound·‖J‖‖v‖ and P² = P, at this condition number of the Gram matrix."""
    for seed in range(3):
        spectrum = np.logspace(0, -0.5 * np.log10(condition), 40)
        matrix = matrix_with_spectrum(spectrum, 400, seed, dtype)
        v = jr.normal(jr.key(seed), (400,), dtype)
        tangent = v - normal_component(matrix, v)
        assert tangent.dtype == dtype, tangent.dtype
        exact = np.asarray(matrix, np.float64) @ np.asarray(tangent, np.float64)
        size = float(jnp.linalg.norm(v))
        at_most(f"‖JPv‖/(‖J‖‖v‖), seed {seed}", np.linalg.norm(exact) / size, bound)
        close(f"P² = P, seed {seed}", tangent - normal_component(matrix, tangent), tangent, bound)


@pytest.mark.parametrize("condition", [1e5, 1e6, 1e7])
def test_float32_projections_at_high_condition(condition):
    """Right to 1e-3 where a float32 Cholesky factorisation has no correct digit left."""
    for seed in range(3):
        spectrum = np.logspace(0, -0.5 * np.log10(condition), 40)
        matrix = matrix_with_spectrum(spectrum, 400, seed, np.float32)
        jacobian = linalg.DenseJacobian(matrix)
        v = jr.normal(jr.key(seed), (400,), jnp.float32)
        normal = linalg.normal_component(jacobian, linalg.DenseGram()(jacobian), v)
        exact = np.asarray(matrix, np.float64)
        expected = np.linalg.pinv(exact) @ (exact @ np.asarray(v, np.float64))
        error = np.linalg.norm(normal - expected) / np.linalg.norm(v)
        at_most(f"‖P⊥v − exact‖/‖v‖, condition {condition:.0e}, seed {seed}", error, 1e-3)


def test_operators():
    matrix, _ = JACOBIANS["full rank"]
    jacobian, v = linalg.DenseJacobian(matrix), jr.normal(jr.key(9), (9,))
    close(
        "Gauss-Newton",
        linalg.gauss_newton(jacobian, 0.5).mv(v),
        0.5 * matrix.T @ (matrix @ v),
        1e-12,
    )
    close("Gram operator", linalg.gram(jacobian).mv(v[:5]), matrix @ (matrix.T @ v[:5]), 1e-12)
    close("transposed", jacobian.T.mv(v[:5]), matrix.T @ v[:5], 1e-12)
    close("transposed twice", jacobian.T.T.mv(v), matrix @ v, 1e-12)


# --- singular symmetric matrices -----------------------------------------------------------------

RANK = 4


def singular_path(t):
    """Rank 4 of 6 at every t; at t = 0 the eigenvalues are 0, 0, 1, 2, 2, 2."""
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0][:, :RANK]
    turn = jnp.eye(6) + t * rng.normal(size=(6, 6))
    middle = np.diag([1.0, 2.0, 2.0, 2.0]) + t * (bend := rng.normal(size=(RANK, RANK))) @ bend.T
    return turn @ basis @ middle @ basis.T @ turn.T


H = singular_path(0.0)
RHS = jnp.asarray((lambda m: m + m.T)(np.random.default_rng(2).normal(size=(6, 6))))

FUNCTIONS = {
    "pseudo_inverse": lambda m: linalg.pseudo_inverse(m, RANK),
    "range_projection": lambda m: linalg.range_projection(m, RANK),
    "log_pseudo_determinant": lambda m: linalg.log_pseudo_determinant(m, RANK),
    "lyapunov_solve": lambda m: linalg.lyapunov_solve(m, RHS, RANK),
}


@pytest.mark.quick
def test_values_on_the_range():
    inverse = np.linalg.pinv(H, rcond=1e-10)
    projector = inverse @ np.asarray(H)
    for rank in (RANK, None, 1e-8):
        close(f"H†, rank={rank}", linalg.pseudo_inverse(H, rank), inverse, 1e-12)
        close(f"projector, rank={rank}", linalg.range_projection(H, rank), projector, 1e-12)
        at_most(
            f"ln|H|₊, rank={rank}", abs(linalg.log_pseudo_determinant(H, rank) - np.log(8.0)), 1e-12
        )
        solution = linalg.lyapunov_solve(H, RHS, rank)
        inside = projector @ np.asarray(RHS) @ projector
        close("H S + S H = Π rhs Π", linalg.lyapunov_operator(H).mv(solution), inside, 1e-11)
        close("S = Π S Π", projector @ np.asarray(solution) @ projector, solution, 1e-11)
    values, _, inside = linalg.range_spectrum(H, RANK)
    equal("which eigenvalues make the range", inside.tolist(), [False] * 2 + [True] * RANK)
    close("eigenvalues", values[2:], jnp.array([1.0, 2.0, 2.0, 2.0]), 1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_at_repeated_eigenvalues(name):
    fn = jax.jit(FUNCTIONS[name])
    speed = jax.jvp(singular_path, (0.0,), (1.0,))[1]
    value, tangent = jax.jvp(fn, (H,), (speed,))
    finite = central_difference(lambda t: fn(singular_path(t)), 1e-3)
    close("jvp against differences", tangent, finite, 1e-7)
    out = jr.normal(jr.key(3), value.shape)
    (cotangent,) = jax.vjp(fn, H)[1](out)
    gap = abs(float(jnp.sum(cotangent * speed) - jnp.sum(tangent * out)))
    at_most("jvp against vjp", gap, 1e-9)
    if name == "log_pseudo_determinant":
        expected = float(jnp.trace(jnp.asarray(np.linalg.pinv(H, rcond=1e-10)) @ speed))
        at_most("tr(H†dH)", abs(float(tangent) - expected), 1e-10)


def test_derivative_of_the_lyapunov_solution_in_its_right_side():
    speed = jnp.asarray(np.eye(6) + np.ones((6, 6)))
    _, tangent = jax.jvp(lambda r: linalg.lyapunov_solve(H, r, RANK), (RHS,), (speed,))
    close("linear in the right side", tangent, linalg.lyapunov_solve(H, speed, RANK), 1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jit_and_vmap(name):
    fn = FUNCTIONS[name]
    matrices = jnp.stack([singular_path(t) for t in (0.0, 0.1, 0.2)])
    batched = jax.jit(jax.vmap(fn))(matrices)
    for i in range(3):
        close(f"vmap against loop, member {i}", flat(batched[i]), flat(fn(matrices[i])), 1e-11)


SYMMETRIC = jnp.asarray(np.asarray(matrix_with_spectrum([3.0, 2.0, 1.0, 0.5], 4)))
SYMMETRIC = SYMMETRIC @ SYMMETRIC.T + jnp.eye(4)


@pytest.mark.quick
def test_eigh_is_a_decomposition():
    """A = V diag(λ) Vᵀ with orthonormal V and ascending λ, alone and for each of a batch."""
    batch = jnp.stack([SYMMETRIC, SYMMETRIC - 3 * jnp.eye(4), jnp.diag(jnp.arange(4.0))])
    values, vectors = jax.jit(jax.vmap(linalg.eigh))(batch)
    close("V diag(λ) Vᵀ", vectors * values[:, None] @ vectors.mT, batch, 1e-14)
    close("VᵀV", vectors.mT @ vectors, jnp.stack([jnp.eye(4)] * 3), 1e-14)
    close("λ", values, np.linalg.eigvalsh(np.asarray(batch)), 1e-14)
    at_least("steps of λ", jnp.min(jnp.diff(values, axis=1)), 0.0)
    alone = linalg.eigh(batch[0])[0]
    close("vmap against one", values[0], alone, 1e-15)
    for wrong in (np.ones((2, 3)), np.ones(3), np.ones((2, 2), complex)):
        with refused(ValueError, "eigh: matrix must be an array", wrong_type=True):
            linalg.eigh(wrong)


TANGENT = {"x": jnp.array([1.0, -2.0]), "y": jnp.array([[0.5], [3.0]], jnp.float32)}


def shifted_gram(scale):
    """v ↦ scale·S v on the four numbers of TANGENT, in the dtypes of its leaves."""

    def mv(v):
        assert [str(leaf.dtype) for leaf in jax.tree.leaves(v)] == ["float64", "float32"]
        flat_v = jnp.concatenate([leaf.reshape(-1).astype(float) for leaf in jax.tree.leaves(v)])
        product = scale * SYMMETRIC @ flat_v
        return {"x": product[:2], "y": product[2:].reshape(2, 1).astype(jnp.float32)}

    return mv


def test_tangent_solve_of_mixed_precision():
    """Against a dense solve; its derivatives are those of the equation, in both modes."""

    def solved(scale, factor):
        right = jax.tree.map(lambda x: x * factor.astype(x.dtype), TANGENT)
        found = linalg.tangent_solve(shifted_gram(scale), right, rtol=1e-7)
        assert [str(leaf.dtype) for leaf in jax.tree.leaves(found)] == ["float64", "float32"]
        return flat(jax.tree.map(lambda x: x.astype(float), found))

    at = jnp.asarray(2.0), jnp.asarray(3.0)
    b = jnp.array([1.0, -2.0, 0.5, 3.0])
    expected = jnp.linalg.solve(SYMMETRIC, b)
    value, speed = jax.jvp(solved, at, (jnp.asarray(1.0), jnp.asarray(0.5)))
    close("w = (3/2) S⁻¹b", value, 1.5 * expected, 3e-6)
    # d(factor/scale) = 0.5/2 − 3/4.
    close("dw", speed, (0.25 - 0.75) * expected, 3e-6)
    gradient = jax.grad(lambda *a: jnp.sum(solved(*a)), argnums=(0, 1))(*at)
    sums = jnp.array([-0.75, 0.5]) * jnp.sum(expected)
    close("reverse mode", jnp.stack(gradient), sums, 3e-6)
    few = linalg.tangent_solve(shifted_gram(1.0), TANGENT, rtol=1e-7, max_steps=1)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(few)), few
    at_least("after one step", norm(flat(few) - expected), 1e-3)
    with refused(ValueError, "tangent_solve: right must be a PyTree of real"):
        linalg.tangent_solve(shifted_gram(1.0), {"x": jnp.arange(3)}, rtol=1e-7)
    with refused(ValueError, "tangent_solve: mv must give tangents like right"):
        linalg.tangent_solve(lambda v: {"x": v["x"]}, TANGENT, rtol=1e-7)
