"""Laws of ∂²Φ and of the limiting diffusion, and problems with an independent answer.

The oracle is gradient flow itself, followed by Dopri8 to 1e-13, and differences of where it
ends. It knows nothing of the package but the value of the loss.
"""

import functools
import itertools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

import lawbook
import manifoldflow as mf
import zoo
from checks import at_least, at_most, close, norm

SIZE = 6


_RNG = np.random.default_rng(21)
LINEAR, SQUARE, INSIDE = _RNG.normal(size=(3, 2, SIZE))
PAIR = _RNG.normal(size=(2, SIZE, SIZE)) / SIZE


def two_functions(x, xp=jnp):
    """A nonlinear map from R⁶ to R² with a well-conditioned Jacobian."""
    bent = 0.2 * SQUARE @ x**2 + 0.3 * xp.sin(INSIDE @ x)
    return LINEAR @ x / 2 + bent + (PAIR @ x) @ x / 4


def example_output(x, index):
    """Two examples with one output each; the index is a float."""
    return jnp.where(index > 0.5, *two_functions(x)[::-1])


def three_outputs(x, index, xp=jnp):
    del index
    return xp.concatenate([two_functions(x, xp), xp.sin(x[:1]) * x[1:2]])


TARGETS = np.array([0.3, -0.2])
LABELS = np.array([0.3, 0.9])
CLASSES = np.array([0.5, 0.2, 0.3])


def least_squares():
    targets = jnp.asarray(TARGETS)
    return mf.LeastSquares(jnp.arange(2.0), targets, predict=example_output, scale=1.7)


def logistic():
    """Weights p(1 − p) that differ from example to example, and a third derivative."""
    loss = lambda f, p: jnp.logaddexp(0, f) - p * f
    inputs, targets = jnp.arange(2.0), jnp.asarray(LABELS)
    return mf.PerExampleLoss(
        inputs, targets, loss, predict=example_output, minimizer_fn=jax.scipy.special.logit
    )


def softmax():
    """One example with three logits: the output Hessian has rank two."""
    targets = jnp.asarray(CLASSES)[None]
    return mf.PerExampleLoss(
        jnp.zeros(1), targets, zoo.softmax, predict=three_outputs, minimizer_fn=jnp.log
    )


def wells(x):
    """Minimal where both functions vanish, with a Hessian that depends on the point."""
    f = two_functions(x)
    weights = jnp.array([1.5, 1.0]) + 0.4 * jnp.sin(x[2:4] + x[0])
    return weights @ (jnp.cosh(f) - 1 + 0.2 * f**3) + 0.3 * jnp.cos(x[4]) * f[0] * f[1]


MANIFOLDS = {
    "least squares": lambda: mf.ZeroLossManifold(least_squares()),
    "per example": lambda: mf.ZeroLossManifold(logistic()),
    "softmax": lambda: mf.ZeroLossManifold(softmax()),
    "function": lambda: mf.MinimizerManifold(mf.FunctionLoss(wells), 2),
}


# What vanishes on each of them, for NumPy.
EQUATIONS = {
    "least squares": lambda x: two_functions(x, np) - TARGETS,
    "per example": lambda x: two_functions(x, np) - np.log(LABELS / (1 - LABELS)),
    "softmax": lambda x: np.diff(three_outputs(x, 0, np) - np.log(CLASSES)),
    "function": lambda x: two_functions(x, np),
}


def root(equation):
    """A zero by Gauss-Newton steps, the Jacobian by complex differences."""
    x = 0.5 * np.random.default_rng(22).normal(size=SIZE)
    for _ in range(30):
        jacobian = np.stack([equation(x + 1e-30j * e).imag / 1e-30 for e in np.eye(SIZE)], axis=1)
        x = x - np.linalg.pinv(jacobian) @ equation(x)
    assert np.max(np.abs(equation(x))) < 1e-14, "the point is not on the manifold"
    return jnp.asarray(x)


@functools.cache
def manifold(name):
    return MANIFOLDS[name]()


# Forty times the longest relaxation time, 1/λ_min over the range of the Hessian.
TIMES = {"least squares": 12.3, "per example": 1050.0, "softmax": 254.0, "function": 36.0}


def flow_ends(name, starts):
    """Where gradient flow is at a late time, for many starts."""
    losses = tuple(manifold(n).loss for n in TIMES)
    return _flow_ends(losses, jnp.asarray(list(TIMES).index(name)), starts, TIMES[name])


@eqx.filter_jit
def _flow_ends(losses, which, starts, time):
    # One program for all losses: compiling it takes longer than running it.
    descents = [lambda x, loss=loss: -jax.grad(loss)(x) for loss in losses]

    def follow(start):
        solution = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, x, args: jax.lax.switch(which, descents, x)),
            dfx.Dopri8(),
            0.0, time, 0.01, start,
            stepsize_controller=dfx.PIDController(rtol=1e-13, atol=1e-14),
            max_steps=100_000,
        )  # fmt: skip
        return solution.ys[0]

    return jax.vmap(follow)(starts)


class Problem:
    """A manifold of codimension 2 in R⁶, a point on it, and a random factor of noise."""

    def __init__(self, name):
        self.name, self.manifold = name, manifold(name)
        self.point = root(EQUATIONS[name])
        self.factor = jnp.asarray(np.random.default_rng(23).normal(size=(SIZE, 3)))

    @property
    def loss(self):
        return self.manifold.loss

    @functools.cached_property
    def second_derivative(self):
        """∂²Φ[F Fᵀ] = Σᵣ ∂²Φ[Fᵣ, Fᵣ] by sixth-order differences of the flow's end."""
        step, weights = 0.005, np.array([3 / 2, -3 / 20, 1 / 90])
        offsets = step * np.concatenate([[0.0], np.arange(1, 4), -np.arange(1, 4)])
        weights = np.concatenate([[-49 / 18], weights, weights]) / step**2
        starts = self.point + offsets[:, None, None] * np.asarray(self.factor.T)
        ends = flow_ends(self.name, jnp.asarray(starts.reshape(-1, SIZE)))
        return np.einsum("o,orx->x", weights, np.asarray(ends).reshape(starts.shape))


@functools.cache
def problem(name):
    return Problem(name)


def general(here, covariance):
    """∂²Φ[Σ] by the package's general formula, for a dense Σ."""
    operator = lx.MatrixLinearOperator(jnp.asarray(covariance), lx.symmetric_tag)
    return mf.limit_map_second_derivative(here.manifold, here.point, operator)


def second_derivative_law(second_derivative, name, bound=1e-6):
    """∂²Φ[Σ] is the second difference of where gradient flow ends."""
    here = problem(name)
    found = second_derivative(here, here.factor @ here.factor.T)
    close(f"∂²Φ[Σ], {name}", found, here.second_derivative, bound)


def covariance_matrix(noise, here):
    """Σ as the noise states it, dense."""
    matrix = eqx.filter_jit(lambda loss, x: noise.covariance(loss, x).as_matrix())
    return matrix(here.loss, here.point)


def short_form_law(flow, here, bound=1e-9):
    """The drift is ½∂²Φ[Σ] by the general formula, with Σ as the noise states it."""
    expected = general(here, covariance_matrix(flow.noise, here)) / 2
    at_least("the size of the drift", norm(expected), 1e-3)
    close("drift in short form", flow.drift(here.point), expected, bound)


# --- the noise of batches, by all of them ---------------------------------------------------


class Examples:
    """Four examples under a small nonlinear model, away from its zero-loss manifold."""

    inputs = np.random.default_rng(31).normal(size=(4, 3))
    point = jnp.asarray(np.random.default_rng(32).normal(size=(2, 3)))

    @staticmethod
    def predict(point, x):
        return jnp.tanh(point @ x)

    @functools.cached_property
    def outputs(self):
        return np.tanh(self.inputs @ np.asarray(self.point).T)

    @functools.cached_property
    def slopes(self):
        """∂f for every example, (4, 2, 6)."""
        inner = (1 - self.outputs**2)[:, :, None] * self.inputs[:, None]
        return np.einsum("noi,op->nopi", inner, np.eye(2)).reshape(4, 2, 6)

    def gradients(self, output_gradients):
        """∇ℓᵢ from ∂ℓᵢ/∂fᵢ, (4, 6)."""
        return np.einsum("no,nod->nd", output_gradients, self.slopes)


EXAMPLES = Examples()


def all_batches(num_examples, batch_size, replacement):
    indices = range(num_examples)
    if replacement:
        return list(itertools.product(indices, repeat=batch_size))
    return list(itertools.combinations(indices, batch_size))


def outcome_law(noise, loss, point, outcomes, probabilities, seed, num_samples=1500):
    """Samples are among the outcomes, as often as they should be; Σ is their covariance."""
    outcomes, probabilities = np.asarray(outcomes), np.asarray(probabilities)
    mean = probabilities @ outcomes
    gradient = eqx.filter_jit(lambda loss, x: loss.gradient(x))(loss, point)
    close("mean of the outcomes = ∇L", gradient, mean, 1e-12)
    spread = (outcomes - mean) * np.sqrt(probabilities)[:, None]
    stated = eqx.filter_jit(lambda loss, x: noise.covariance(loss, x).as_matrix())(loss, point)
    close("Σ of the outcomes", stated, spread.T @ spread, 1e-12)
    drawn = lawbook.sampled_gradients(noise, loss, point, seed, num_samples)
    gaps = np.linalg.norm(drawn[:, None] - outcomes[None], axis=-1)
    at_most(f"samples off the outcomes, seed {seed}", gaps.min(axis=1).max(), 1e-12)
    seen = np.mean(gaps < 1e-9, axis=0)
    chance = np.array(
        [probabilities[np.linalg.norm(outcomes - o, axis=1) < 1e-9].sum() for o in outcomes]
    )
    errors = np.abs(seen - chance) / np.sqrt(chance * (1 - chance) / num_samples)
    at_most(f"frequencies off, in standard errors, seed {seed}", errors.max(), 4.0)


def minibatch_law(noise, loss, gradients, batch_size, *, replacement=False, seed=1):
    batches = all_batches(len(gradients), batch_size, replacement)
    outcomes = [gradients[list(batch)].mean(axis=0) for batch in batches]
    equally = np.full(len(batches), 1 / len(batches))
    outcome_law(noise, loss, EXAMPLES.point, outcomes, equally, seed)
