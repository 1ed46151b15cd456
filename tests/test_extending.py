"""Each room can be extended by one small class, as the README says: here is one of each."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx

import checks
import manifoldflow as mf
from manifoldflow import diagnostics, flows, linalg, losses, manifolds, noise
from test_structured_jacobian import equations


class DoubleWell(mf.AbstractLoss):
    """¼(x² + y² − 1)² on points {"x": …, "y": …}."""

    trainable = None

    def __call__(self, point):
        return (point["x"] ** 2 + point["y"] ** 2 - 1) ** 2 / 4


class Circle(mf.AbstractManifold):
    """The unit circle, with a normal space by hand."""

    loss: losses.AbstractLoss = DoubleWell()

    def codimension(self, point):
        return 1

    def constraint(self, point):
        return (point["x"] ** 2 + point["y"] ** 2 - 1)[None]

    def normal_space(self, point):
        rows = {name: 2 * value[None] for name, value in point.items()}
        jacobian = linalg.DenseJacobian(rows)
        return manifolds.GramNormalSpace(jacobian, linalg.DenseGram()(jacobian))


class Interpolants(mf.AbstractManifold):
    """The zero-loss manifold of a residual loss, written anew."""

    loss: losses.AbstractResidualLoss

    def codimension(self, point):
        return self.loss.residual(point).size

    def constraint(self, point):
        return self.loss.residual(point)

    def normal_space(self, point):
        jacobian = self.loss.jacobian(point)
        return manifolds.GramNormalSpace(jacobian, linalg.DenseGram()(jacobian))


class Rotation(mf.AbstractFlow):
    """Unit speed round the circle."""

    manifold: manifolds.AbstractManifold

    def split(self, point):
        return self.manifold.split(point)

    def drift(self, point):
        return {"x": -point["y"], "y": point["x"]}


class DiagonalNoise(mf.AbstractNoise):
    """Independent noise with standard deviation `weights` on each coordinate."""

    weights: jax.Array

    def gradient(self, loss, point, key):
        return loss.gradient(point) + self.weights * jr.normal(key, point.shape)

    def factor(self, loss, point):
        return lx.DiagonalLinearOperator(self.weights)


class HessianSquaredNoise(noise.AbstractShortNoise):
    """Noise with the covariance (∇²L)², by a symmetric factor, for losses with residuals.

    𝓛_H⁻¹(H²) = H/2, so that its limit is Y' = −⅛ P∇tr(∇²L)².
    """

    def gradient(self, loss, point, key):
        factor = self.factor(loss, point)
        drawn = jr.normal(key, factor.in_structure().shape)
        return jax.tree.map(jnp.add, loss.gradient(point), factor.mv(drawn))

    def factor(self, loss, point):
        jacobian = loss.jacobian(point)
        root = jnp.linalg.cholesky(jacobian.gram())
        return linalg.ResidualFactor(jacobian, lx.MatrixLinearOperator(loss.scale * root))

    def short_limit(self, loss):
        squares = lambda local: jnp.sum(local.hessian_eigenvalues() ** 2)
        return noise.ShortLimit(squares, jnp.asarray(1 / 8), is_ode=True, at_zero_loss=True)


class EigenSolve(linalg.AbstractGramSolve):
    matrix: jax.Array

    @property
    def row_scale(self):
        return linalg.row_scale(self.row_norms_squared())

    def row_norms_squared(self):
        return jnp.diagonal(self.matrix)

    def solve(self, vector):
        return linalg.pseudo_inverse(self.matrix) @ vector

    def damped(self, damping):
        return EigenSolve(self.matrix + damping * jnp.diag(jnp.diagonal(self.matrix)))

    def eigenvalues(self):
        return jnp.linalg.eigvalsh(self.matrix)


class EigenGram(linalg.AbstractGram):
    def __call__(self, jacobian):
        assert isinstance(jacobian, linalg.AbstractJacobian)
        return EigenSolve(jacobian.gram())


class Cubes(mf.AbstractResidualLoss):
    """Residuals θ³·x − 1 on one number for each example."""

    data: jax.Array
    trainable = None

    @property
    def scale(self):
        return jnp.asarray(1.0)

    def example_residual(self, point, example):
        return (point**3 * example - 1).reshape(-1)

    def __call__(self, point):
        return 0.5 * jnp.sum(self.residual(point) ** 2)

    def gauss_newton_root(self, point):
        return self.jacobian(point)


START = {"x": jnp.asarray(1.2), "y": jnp.asarray(0.5)}


def test_a_new_manifold_and_flow():
    circle = Circle()
    point = circle.project(START)
    assert isinstance(circle.normal_space(point), manifolds.AbstractNormalSpace)
    checks.equal("dimension", circle.dimension(point), 1)
    walk = mf.solve(Rotation(circle), point, end_time=jnp.pi / 2)
    assert isinstance(walk, mf.Solution)
    checks.close("a quarter turn, x", walk.final["x"], -point["y"], 1e-5)
    checks.close("a quarter turn, y", walk.final["y"], point["x"], 1e-5)
    limit, info = mf.limit_map_with_info(circle, START)
    assert isinstance(info, mf.Info)
    radius = jnp.hypot(START["x"], START["y"])
    checks.close("gradient flow is radial", limit["x"], START["x"] / radius, 1e-6)


def network(width):
    """A network with two inputs and four examples that it fits."""
    model = eqx.nn.MLP(2, 1, width, 1, activation=jnp.tanh, key=jr.key(1))
    inputs = jr.normal(jr.key(2), (4, 2))
    return model, mf.LeastSquares(inputs, jax.vmap(model)(inputs))


def test_a_new_manifold_has_the_short_limit_of_label_noise():
    """An ordinary differential equation, by the kind of its loss, and nothing of D×D numbers."""
    model, loss = network(60)
    labels = mf.LabelNoise(0.5, batch_size=1)
    flow = mf.LimitDiffusion(Interpolants(loss), labels)
    assert not flow.is_stochastic
    expected = mf.LimitDiffusion(mf.ZeroLossManifold(loss), labels).drift(model)
    for found, known in zip(jax.tree.leaves(flow.drift(model)), jax.tree.leaves(expected)):
        checks.close("drift", found, known, 1e-12)
    size = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    text = eqx.filter_jit(flow.drift).lower(model).as_text()
    assert f"{size}x{size}" not in text, f"a matrix of D×D numbers, D = {size}"
    dense = mf.LimitDiffusion(mf.MinimizerManifold(loss, 4), labels)
    assert f"{size}x{size}" in eqx.filter_jit(dense.drift).lower(model).as_text(), "none is seen"
    walk = mf.solve(flow, model, end_time=0.1)
    checks.at_most("the defect after a walk", walk.stats["max_defect"], 1e-8)


def test_a_new_noise_with_a_short_limit():
    """Against the general formula for the same covariance."""
    model, loss = network(5)
    manifold, new = mf.ZeroLossManifold(loss), HessianSquaredNoise()
    flow = mf.LimitDiffusion(manifold, new)
    assert not flow.is_stochastic
    general = mf.LimitDiffusion(manifold, mf.CustomNoise(lambda p: new.factor(loss, p)))
    assert general.is_stochastic
    drifts = [jax.tree.leaves(each.drift(model)) for each in (flow, general)]
    for found, known in zip(*drifts):
        checks.close("drift", found, known, 1e-10)
    twice = mf.LimitDiffusion(mf.MinimizerManifold(loss, 4), new)
    assert twice.is_stochastic, "it holds at zero loss only"


class Langevin(flows.AbstractDiffusion):
    """dX = −X dt + √2 dW, whose stationary law is standard normal."""

    manifold = None
    is_stochastic = True

    def split(self, point):
        return mf.split(point)

    def drift(self, point):
        return -point

    def diffusion(self, point):
        return jnp.sqrt(2.0) * lx.IdentityLinearOperator(jax.eval_shape(lambda: point))


def test_a_new_stochastic_flow():
    run = {"end_time": 5.0, "step_size": 0.05, "key": jr.key(0)}
    end = mf.solve(Langevin(), jnp.zeros(2000), **run).final
    # Euler steps of size h have the stationary variance 1/(1 − h/2).
    variance = float(jnp.var(end)) * (1 - 0.025)
    checks.at_most("|variance − 1|, in standard errors", abs(variance - 1) * 1000**0.5, 4.0)


def test_riemannian_gradient_on_a_circle():
    point = Circle().project(START)
    gradient = mf.riemannian_gradient(Circle(), lambda p: p["x"], point)
    checks.close("P e_x = y·(y, −x)", gradient["x"], point["y"] ** 2, 1e-12)
    checks.close("P e_x = y·(y, −x)", gradient["y"], -point["x"] * point["y"], 1e-12)


def test_a_new_noise():
    weights = jnp.array([1.0, 2.0, 3.0])
    loss = mf.FunctionLoss(lambda x: 0.5 * jnp.sum(x**2))
    noise, point = DiagonalNoise(weights), jnp.zeros(3)
    covariance = noise.covariance(loss, point).as_matrix()
    checks.close("F Fᵀ", covariance, jnp.diag(weights**2), 1e-14)
    keys = jr.split(jr.key(0), 4000)
    drawn = jax.vmap(lambda key: noise.gradient(loss, point, key))(keys)
    # A sample variance has relative standard error √(2/4000) = 2.2 %: four of them.
    checks.at_most("variance", jnp.max(jnp.abs(jnp.var(drawn, axis=0) / weights**2 - 1)), 0.09)


def test_a_new_loss_and_gram_solver():
    loss = Cubes(jnp.array([2.0]))
    point = jnp.array([0.9, 1.1])[:1]
    expected = 0.5 ** (1 / 3)
    manifold = mf.ZeroLossManifold(loss, gram=EigenGram())
    checks.close("θ³·2 = 1", manifold.project(point), jnp.array([expected]), 1e-12)
    checks.close("tr H = (3θ²·2)²", loss.trace_gauss_newton(point), 36 * point[0] ** 4, 1e-12)


def test_a_norm_as_a_loss():
    loss = losses.SquaredNorm(lambda p: {"a": p["x"] - 1, "b": p["y"] * 2})
    checks.close("½‖f‖²", loss(START), 0.5 * (0.2**2 + 1.0), 1e-12)
    space = mf.MinimizerManifold(DoubleWell(), 1).normal_space(START)
    assert isinstance(space, manifolds.HessianNormalSpace)


def test_large_problems_are_structured():
    model = eqx.nn.MLP(20, 1, 64, 1, activation=jnp.tanh, key=jr.key(0))
    loss = mf.LeastSquares(jr.normal(jr.key(1), (60, 20)), jnp.zeros((60, 1)))
    assert isinstance(loss.jacobian(model), linalg.StructuredJacobian)
    assert isinstance(mf.explain(loss, model), diagnostics.Explanation)
    assert isinstance(loss.select(jnp.arange(5)).jacobian(model), linalg.DenseJacobian)


@jax.jit
def circulant(weight, signal):
    """z_f = Σ_c W_fc ⊛ x_c, convolutions on a circle by fast Fourier transforms."""
    waves = jnp.einsum("fcm,cm->fm", jnp.fft.rfft(weight), jnp.fft.rfft(signal))
    return jnp.fft.irfft(waves, weight.shape[-1])


@linalg.register_use(circulant)
class Circulant(linalg.AbstractPairUse):
    """Rows δ_f ⋆ a_c for all f and c, whose products are those of summed correlations."""

    @classmethod
    def recognise(cls, equation, index):
        if index != 0:
            raise NotImplementedError("a leaf as the signal")
        return linalg.Recognised(cls(), equation.operands[1])

    def apply(self, weight, factor):
        return circulant(weight, factor)

    def inner(self, delta, factor, other_delta, other_factor):
        return correlation(delta, other_delta) @ correlation(factor, other_factor)


def of_the_same_name():
    """Another function that is called `circulant`, registered later."""

    @jax.jit
    def circulant(weight, signal):
        return weight * signal

    @linalg.register_use(circulant)
    class Product(Circulant):
        pass


def correlation(x, y):
    """Σ_f of the correlations of x_f and y_f on the circle."""
    waves = jnp.einsum("fw,fw->w", jnp.conj(jnp.fft.rfft(x)), jnp.fft.rfft(y))
    return jnp.fft.irfft(waves, x.shape[-1])


def test_a_new_use_of_a_leaf():
    """Fourier layers are not known: without `Circulant` each has n×D numbers of rows."""
    params = {"w": jr.normal(jr.key(0), (6, 5, 7)), "v": jr.normal(jr.key(1), (6, 3, 7))}
    signals = jr.normal(jr.key(2), (9, 5, 7))

    def fn(p, x):
        hidden = jnp.tanh(circulant(p["w"], x))
        return jnp.sin(circulant(jnp.swapaxes(p["v"], 0, 1), hidden)).sum((0, 1))

    of_the_same_name()
    structured = linalg.structured_jacobian(fn, params, signals)
    checks.equal("uses", structured.treatments, {"['v']": "Circulant", "['w']": "Circulant"})
    dense, weights = linalg.dense_jacobian(fn, params, signals), jr.normal(jr.key(3), (9,))
    for name, product in {
        "J v": lambda jac: jac.mv(params),
        "Jᵀw": lambda jac: jac.transpose_mv(weights),
        "K": lambda jac: jac.gram(),
        "norms": lambda jac: jac.row_norms_squared(),
        "rows": lambda jac: jac.rows(),
    }.items():
        checks.close(name, product(structured), product(dense), 1e-14)

    def gram(params):
        jac = linalg.structured_jacobian(fn, params, signals)
        return jac.gram(), jac.transpose_mv(jac.mv(params))

    sizes = [var.aval.size for eqn in equations(gram, params) for var in eqn.outvars]
    checks.at_most("numbers of the largest array", max(sizes), 9 * 6 * 3 * 7 - 1)
