"""Iterations whose mean field is no gradient, and where their flow ends, found independently.

The oracle is θ' = −F(θ) itself, followed by Dopri8 to 1e-13, and differences of where it ends.
"""

import dataclasses
import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

from checks import at_least, close, norm

CASES = {"six by two": (6, 2, 1), "seven by three": (7, 3, 3)}  # D, n, seed


@dataclasses.dataclass(frozen=True, eq=False)
class Iteration:
    """F = B(θ)ᵀ R(θ) ρ(r(θ)) with rows B that are not those of ∂r, and a noise.

    Laws differentiate these functions many times: they are traced once.
    """

    size: int
    rank: int
    seed: int

    @functools.cached_property
    def constants(self):
        rng = np.random.default_rng(self.seed)
        d, n = self.size, self.rank
        frame = np.linalg.qr(rng.normal(size=(d, d)))[0]
        return {
            "rows": frame[:n], "skew": 0.6 * rng.normal(size=(n, d)), "inside": frame[n : 2 * n],
            "turn": 0.3 * rng.normal(size=(n, n)), "bend": rng.normal(size=(n, d, d)) / d,
        }  # fmt: skip

    @functools.cached_property
    def residual(self):
        return jax.jit(self._residual)

    def _residual(self, x):
        c = self.constants
        bent = jnp.einsum("nab,a,b->n", c["bend"], x, x)
        return c["rows"] @ x + 0.4 * bent + 0.3 * jnp.sin(c["inside"] @ x + 0.5) - 0.2

    @functools.cached_property
    def rows(self):
        return jax.jit(self._rows)

    def _rows(self, x):
        """B(θ), (n, D)."""
        c = self.constants
        return jax.jacfwd(self.residual)(x) + c["skew"] * jnp.cos(x)

    def gains(self, x):
        """R(θ), (n, n), not symmetric."""
        return jnp.eye(self.rank) + self.constants["turn"] * jnp.cos(x[0] - x[1])

    @functools.cached_property
    def field(self):
        return jax.jit(self._field)

    def _field(self, x):
        r = self.residual(x)
        return self.rows(x).T @ self.gains(x) @ (jnp.sinh(r) + 0.3 * r**2)

    @functools.cached_property
    def factor(self):
        """Of Σ, which is neither tangent nor normal."""
        columns = np.random.default_rng(self.seed + 100).normal(size=(self.size, 3))
        return columns / 2  # of NumPy: kept from inside jit, JAX's would be tracers

    def covariance(self, x):
        return jnp.asarray(self.factor @ self.factor.T)

    def slow(self, x):
        return jnp.sin(2 * x) + 0.3

    @functools.cached_property
    def point(self):
        """A zero of F, by Gauss-Newton steps."""
        x = 0.3 * np.random.default_rng(self.seed + 200).normal(size=self.size)
        residual, jacobian = self.residual, jax.jit(jax.jacfwd(self.residual))
        for _ in range(20):
            x = x - np.linalg.pinv(jacobian(x)) @ residual(x)
        return jnp.asarray(x)

    @functools.cached_property
    def ends(self):
        """Φ of many starts: where θ' = −F(θ) is after forty of the longest relaxation times."""
        matrix = np.asarray(jax.jit(jax.jacfwd(self.field))(self.point))
        rates = np.sort(np.linalg.eigvals(matrix).real)[-self.rank :]
        at_least("slowest rate", rates[0], 0.1)

        def follow(start):
            return dfx.diffeqsolve(
                dfx.ODETerm(lambda t, x, args: -self.field(x)),
                dfx.Dopri8(), 0.0, 40 / rates[0], 0.01, start,
                stepsize_controller=dfx.PIDController(rtol=1e-13, atol=1e-14),
                max_steps=100_000,
            ).ys[0]  # fmt: skip

        return jax.jit(jax.vmap(follow))

    @functools.cached_property
    def expected(self):
        """½∂²Φ[Σ] + ∂Φ G, by differences of order six."""
        weights = np.array([1 / 90, -3 / 20, 3 / 2, -49 / 18, 3 / 2, -3 / 20, 1 / 90])
        slopes = np.array([-1 / 60, 3 / 20, -3 / 4, 0, 3 / 4, -3 / 20, 1 / 60])
        h, stencil = 0.01, np.arange(-3, 4)
        slow = np.asarray(self.slow(self.point))
        ways = np.concatenate([self.factor.T, slow[None]])
        starts = self.point + h * stencil[:, None, None] * ways
        found = np.asarray(self.ends(starts.reshape(-1, self.size))).reshape(starts.shape)
        half = np.einsum("s,skd->d", weights, found[:, :-1]) / (2 * h**2)
        return half + slopes @ found[:, -1] / h


@functools.cache
def iteration(name):
    return Iteration(*CASES[name])


def drift_law(drift_fn, name, bound=1e-6):
    """A drift against differences of an integrated mean field."""
    here = iteration(name)
    expected = here.expected
    at_least("the drift", norm(expected), 0.3)
    close(f"drift of {name}", drift_fn(here), expected, bound)
