"""One valid call of every public function and class, for `fuzz`: its arguments by name."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax

import manifoldflow as mf
from fuzz_table_equilibria import EQUILIBRIA
from fuzz_table_examples import EXAMPLES
from fuzz_table_initialisation import INITIALISATION
from fuzz_table_optimisers import OPTIMISERS
from fuzz_table_two_layer import TWO_LAYER
from fuzz_uses import USES
from manifoldflow import diagnostics, linalg, models, optimize, symmetry

KEY = jr.key(0)
X, V, W = jnp.array([1.0, 0, 0]), jnp.array([0, 0.1, 0]), jnp.array([0, 0, 0.2])
INPUTS, TARGETS = np.array([[1.0, 0, 0.5], [0, 1.0, 0.5]]), np.array([1.0, 0.0])
LABELS = np.array([1.0, -1.0])


def dot(point, x):
    return jnp.dot(point, x)


def height(x):
    return x[2] + x[1] ** 2


def field(x):
    return jnp.stack([-x[1], x[0], 0 * x[2]])


def sphere(x):
    return jnp.sum(x**2) - 1


def outputs(x, example):
    return jnp.dot(x, example)[None]


def pair_loss(point, z):
    return (point["a"] * point["b"] * z - 1) ** 2


def circle(t):
    return jnp.stack([jnp.cos(t), jnp.sin(t), 0 * t])


SPHERE = mf.LevelSet(sphere)
LOSS = mf.LeastSquares(INPUTS, TARGETS, predict=dot)
WELL = mf.FunctionLoss(lambda x: sphere(x) ** 2 / 8)
ZERO = mf.ZeroLossManifold(LOSS)
LABEL = mf.LabelNoise(0.1)
DESCENT = mf.GradientFlow(LOSS)
ALONG = mf.RiemannianGradientFlow(SPHERE, height)
LIMIT = mf.LimitDiffusion(ZERO, LABEL)
PAIR, NUMBERS = {"a": jnp.array(2.0), "b": jnp.array(0.5)}, np.array([1.0, 2.0])
SYMMETRY = symmetry.ExponentialSymmetry({"a": 1.0, "b": -1.0})
NOISY = {"symmetry": SYMMETRY, "example_loss": pair_loss, "point": PAIR, "data": NUMBERS}
OPERATOR = lx.MatrixLinearOperator(jnp.eye(3))
THIN = lx.MatrixLinearOperator(jnp.ones((3, 2)))
MATRIX = np.diag([0.0, 1.0, 2.0])
JACOBIAN = LOSS.jacobian(X)
GRAM = linalg.DenseGram()(JACOBIAN)
MLP = eqx.nn.MLP(3, 1, 4, 2, activation=jax.nn.relu, key=KEY)
ATTENTION = eqx.nn.MultiheadAttention(2, 4, key=KEY)
STREAM = models.FiniteData(INPUTS, TARGETS[:, None])
CHECK = diagnostics.SlopeCheck("R", 2.0, 2.0, (1.9, 2.1), np.ones(2), np.ones(2), True)
TALL = {"inputs": INPUTS, "targets": TARGETS}
ON = {"manifold": SPHERE, "point": X}
COVARIANCES = {"input_covariance": np.eye(2), "noise_covariance": np.eye(2)}
SGD = {"learning_rate": 0.1, "num_steps": 2, "key": KEY}
WALK = mf.GeodesicOptions(step_size=0.5)

CALLS = {
    **OPTIMISERS,
    **TWO_LAYER,
    **USES,
    **EQUILIBRIA,
    **EXAMPLES,
    **INITIALISATION,
    # The root.
    "split": {"point": X},
    "BrownianMotion": {"manifold": SPHERE},
    "CustomNoise": {"factor_fn": height, "distribution": "columns"},
    "FunctionLoss": {"fn": height},
    "GradientFlow": {"loss": LOSS},
    "IsotropicNoise": {"std": 1.0},
    "LabelNoise": {"std": 1.0, "batch_size": 1, "distribution": "rademacher"},
    "LeastSquares": {**TALL, "predict": dot, "scale": 1.0},
    "LevelSet": {"fn": sphere, "gram": linalg.DenseGram()},
    "LimitDiffusion": {"manifold": ZERO, "noise": LABEL},
    "LimitMapRetraction": {},
    "MinibatchNoise": {"batch_size": 1, "replacement": True},
    "MinimizerManifold": {"loss": WELL, "rank": 1},
    "NewtonRetraction": {},
    "NoetherFlow": {k: v for k, v in NOISY.items() if k != "point"}
    | {"noise_scale": 0.1, "weight_decay": 0.1},
    "OnlineBatch": {"sample_fn": dot, "example_loss": pair_loss, "batch_size": 1},
    "Projected": {"solver": dfx.Euler(), "manifold": SPHERE},
    "ProjectionRetraction": {},
    "ResampledLabels": {"batch_size": 1, "is_likelihood": True},
    "RiemannianGradientDescent": {"retraction": mf.ProjectionRetraction()},
    "RiemannianGradientFlow": {"manifold": SPHERE, "fn": height},
    "RiemannianOptax": {"optimizer": optax.sgd(0.1), "retraction": mf.ProjectionRetraction()},
    "RiemannianTrustRegion": {
        "retraction": mf.ProjectionRetraction(), "initial_radius": 1.0, "kappa": 0.1,
        "theta": 1.0, "max_products": 3,
    },
    "SAMGradient": {"noise": LABEL, "radius": 0.1, "num_draws": 1},
    "SGDDiffusion": {"loss": LOSS, "noise": LABEL, "learning_rate": 0.1},
    "Stationary": {"tolerance": 0.1},
    "GeodesicOptions": {
        "solver": dfx.Euler(), "step_size": 0.1, "rtol": 0.1, "atol": 0.1,
        "adjoint": dfx.DirectAdjoint(),
    },
    "ZeroLossManifold": {"loss": LOSS, "gram": linalg.DenseGram()},
    "closest_point": {**ON, "throw": False},
    "covariant_derivative": {**ON, "field": field, "vector": V},
    "covariant_hessian": {**ON, "fn": height},
    "distance": {**ON, "other": jnp.array([0.8, 0.6, 0]), "walk": WALK, "throw": False},
    "divergence": {**ON, "field": field, "key": KEY, "num_samples": 2},
    "ensemble": {"fn": lambda key: jr.normal(key), "keys": jr.split(KEY, 2), "chunk_size": 1},
    "explain": {"loss": LOSS, "point": X},
    "exponential_map": {**ON, "vector": V, "walk": WALK, "throw": False},
    "geodesic": {**ON, "velocity": V, "times": np.array([0.5]), "walk": WALK, "throw": False},
    "inverse_retract": {
        **ON, "retraction": mf.ProjectionRetraction(), "other": jnp.array([0.8, 0.6, 0]),
        "throw": False,
    },
    "laplace_beltrami": {**ON, "fn": height, "key": KEY, "num_samples": 2},
    "limit_map": {
        "loss_or_manifold": LOSS, "point": X, "rtol": 0.1, "max_steps": 9, "throw": False
    },
    "limit_map_with_info": {
        "loss_or_manifold": ZERO, "point": X, "rtol": 0.1, "max_steps": 9, "throw": False
    },
    "limit_map_derivative": {**ON, "vector": V},
    "limit_map_second_derivative": {**ON, "covariance": OPERATOR, "is_factor": False},
    "logarithm_map": {**ON, "other": jnp.array([0.8, 0.6, 0]), "walk": WALK, "throw": False},
    "mean_curvature": {**ON, "key": KEY, "num_samples": 2},
    "member_keys": {"key": KEY, "num_members": 2},
    "minimize": {
        **ON, "fn": height, "method": optimize.RiemannianGradientDescent(),
        "gradient_tolerance": 0.1, "max_steps": 3, "observe": {"h": height}, "throw": False,
    },
    "parallel_transport": {
        "manifold": SPHERE, "path": circle, "vector": V, "walk": WALK, "throw": False
    },
    "plan": {"flow": ALONG, "point": X, "limit": 10**9},
    "ricci_curvature": {**ON, "u": V, "key": KEY, "num_samples": 2},
    "riemannian_gradient": {**ON, "fn": height},
    "scalar_curvature": {**ON, "key": KEY, "num_samples": 2},
    "second_fundamental_form": {**ON, "u": V, "v": V},
    "sectional_curvature": {**ON, "u": V, "v": W},
    "shape_operator": {**ON, "normal": X},
    "shard_examples": {
        "loss": LOSS,
        "mesh": jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)),
    },
    "shard_parameters": {
        "point": X,
        "mesh": jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)),
    },
    "simulate": {
        "loss": LOSS, "noise": LABEL, "optimizer": optax.sgd, "point": X, **SGD, "num_saves": 1,
        "momentum": 0.0, "observe": {"h": height}, "until": mf.Stationary(0.1), "throw": False,
    },
    "solve": {
        "flow": DESCENT, "point": X, "end_time": 0.1, "num_saves": 1, "solver": dfx.Euler(),
        "step_size": 0.05, "rtol": 0.1, "atol": 0.1, "adjoint": dfx.DirectAdjoint(),
        "observe": {"h": height}, "key": KEY, "until": mf.Stationary(0.1), "throw": False,
        "max_steps": 9,
    },
    "subsampled_drift": {
        "flow": LIMIT, "point": X, "key": KEY, "num_examples": 2, "num_groups": 2,
        "projected": True,
    },
    "transport_along_geodesic": {
        **ON, "velocity": V, "vector": W, "time": 1.0, "walk": WALK, "throw": False
    },
    # The rooms.
    "diagnostics.certify": {"manifold": ZERO, "path": X, "noise": LABEL, "key": KEY},
    "diagnostics.check_dimension": ON,
    "diagnostics.check_geodesic": {**ON, "velocity": V, "time": 1.0, "tolerance": 1e-3},
    "diagnostics.check_geodesic_convexity": {
        **ON, "fn": height, "key": KEY, "length": 0.1, "num_directions": 1, "num_times": 1,
        "directions": V[None], "tolerance": 1e-3,
    },
    "geometry.geodesic_with_velocity": {
        **ON, "velocity": V, "times": [0.5, 1.0], "walk": WALK, "throw": False
    },
    "diagnostics.check_gradient": {**ON, "fn": height, "key": KEY, "gradient": W},
    "diagnostics.check_hessian": {**ON, "fn": height, "key": KEY, "hessian": OPERATOR},
    "diagnostics.check_retraction": {**ON, "retraction": mf.ProjectionRetraction(), "key": KEY},
    "ensembles.extrapolate": {
        "step_sizes": [0.1, 0.2, 0.4], "values": [1.0, 1.1, 1.3], "standard_errors": [0.1] * 3,
        "order": 1.0, "num_terms": 1,
    },
    "ensembles.statistics": {"values": np.ones((3, 2)), "axis": 0, "levels": [0.5]},
    "ensembles.weak_error": {
        "values": np.arange(3.0), "reference": 1.0, "reference_standard_error": 0.1, "axis": 0
    },
    "ensembles.weak_order": {
        "step_sizes": [0.1, 0.2, 0.4], "errors": [0.1, 0.2, 0.4], "standard_errors": [0.01] * 3
    },
    "linalg.AutoGram": {"memory": 10**6, "preconditioner_rank": 2},
    "linalg.DenseGram": {},
    "linalg.device_memory": {"num_bytes": 10**9},
    "linalg.IterativeGram": {"rtol": 1e-3, "max_steps": 5, "preconditioner_rank": 1},
    "linalg.eigh": {"matrix": MATRIX},
    "linalg.as_sigma": {"coordinates": X, "given": OPERATOR, "is_factor": False},
    "linalg.Covariance": {"operator": OPERATOR},
    "linalg.Factor": {"operator": OPERATOR},
    "linalg.NormalFactor": {"operator": OPERATOR},
    "linalg.chunked_jacobian": {
        "fn": outputs, "coordinates": X, "data": jnp.asarray(INPUTS), "chunk_size": 1
    },
    "linalg.column": {"operator": OPERATOR, "index": jnp.asarray(1)},
    "linalg.columns": {"operator": OPERATOR, "chunk_size": 1},
    "linalg.condition_number": {"eigenvalues": np.ones(2)},
    "linalg.contract_hessians": {
        "jacobian_fn": LOSS.jacobian, "coordinates": X, "coefficients": np.eye(2)
    },
    "linalg.dense_jacobian": {"fn": outputs, "coordinates": X, "data": jnp.asarray(INPUTS)},
    "linalg.effective_rank": {"eigenvalues": np.ones(2)},
    "linalg.equilibrated_eigenvalues": {"jacobian": JACOBIAN},
    "linalg.estimate": {"term": lambda key: jr.normal(key), "key": KEY, "num_samples": 2},
    "linalg.estimate_trace": {"operator": OPERATOR, "key": KEY, "num_samples": 2},
    "linalg.factor_operator": {"coordinates": X, "columns": np.ones((3, 2))},
    "linalg.gauss_newton": {"jacobian": JACOBIAN, "scale": 1.0},
    "linalg.gram": {"jacobian": JACOBIAN},
    "linalg.gram_largest_eigenvalue": {"jacobian": JACOBIAN},
    "linalg.gram_largest_eigenvalue_with_info": {"jacobian": JACOBIAN},
    "linalg.gram_log_determinant": {"jacobian": JACOBIAN},
    "linalg.gram_top_eigenvector": {"jacobian": JACOBIAN},
    "linalg.hessian_product_sum": {
        "fn": lambda x: jnp.stack([height(x), sphere(x)]), "coordinates": X,
        "multipliers": lx.MatrixLinearOperator(jnp.eye(2)), "tangents": THIN, "chunk_size": 1,
    },
    "linalg.inverse_gram": {"jacobian": JACOBIAN},
    "linalg.jacobian": {
        "fn": outputs, "coordinates": X, "data": jnp.asarray(INPUTS), "memory": 10**6
    },
    "linalg.largest_eigenvalues": {"operator": OPERATOR, "num": 1},
    "linalg.log_pseudo_determinant": {"matrix": MATRIX, "rank": 2},
    "linalg.lyapunov_operator": {"matrix": MATRIX},
    "linalg.lyapunov_solve": {"matrix": MATRIX, "rhs": MATRIX, "rank": 2},
    "linalg.normal_component": {"jacobian": JACOBIAN, "gram": GRAM, "vector": V},
    "linalg.tangent_component": {"jacobian": JACOBIAN, "gram": GRAM, "vector": V},
    "linalg.numerical_rank": {"eigenvalues": np.ones(2)},
    "linalg.one_by_one": {"fn": jnp.linalg.inv},
    "linalg.pseudo_inverse": {"matrix": MATRIX, "rank": 2},
    "linalg.pseudo_inverse_mv": {"jacobian": JACOBIAN, "gram": GRAM, "vector": np.ones(2)},
    "linalg.refined_solve": {"jacobian": JACOBIAN, "gram": GRAM, "vector": np.ones(2)},
    "linalg.row_scale": {"norms_squared": np.ones(2)},
    "linalg.range_projection": {"matrix": MATRIX, "rank": 2},
    "linalg.range_spectrum": {"matrix": MATRIX, "rank": 2},
    "linalg.second_derivative_sum": {
        "fn": height, "coordinates": X, "left": THIN, "right": THIN, "chunk_size": 1
    },
    "linalg.smallest_eigenvalues": {"operator": OPERATOR, "num": 1},
    "linalg.structured_jacobian": {"fn": outputs, "params": X, "inputs": jnp.asarray(INPUTS)},
    "linalg.sum_terms": {"term": lambda i: jnp.ones(2) * i, "count": 3, "chunk_size": 2},
    "losses.SquaredNorm": {"fn": sphere},
    "geometry.closest_point_with_info": ON,
    "geometry.gradient_along": {**ON, "fn": height},
    "geometry.potential_gradient": {**ON, "potential": lambda local: local.hessian_trace()},
    "limits.limit_map_second_derivative_parts": {
        **ON, "covariance": OPERATOR, "is_factor": False
    },
    "geometry.logarithm_map_with_info": {
        **ON, "other": jnp.array([0.8, 0.6, 0]), "walk": WALK, "throw": False
    },
    "limits.normal_second_derivative_parts": {
        "manifold": ZERO, "point": X, "residual_factor": lx.MatrixLinearOperator(jnp.eye(2))
    },
    "noise.ShortLimit": {
        "potential": lambda local: local.hessian_trace(), "rate": 1.0, "is_ode": True,
        "at_zero_loss": False,
    },
    "noise.hessian_trace": {"local": SPHERE.local(X)},
    "noise.log_determinant": {"local": SPHERE.local(X)},
    "noise.short_limit": {"noise": mf.IsotropicNoise(), "loss": LOSS},
    "models.DeepLinear": {"data": STREAM, "widths": [2]},
    "models.Ellipsoid": {"axes": [1.0, 2.0]},
    "models.FiniteData": {"inputs": INPUTS, "targets": TARGETS[:, None]},
    "models.FixedProduct": {"target": np.ones((2, 2)), "rank": 1},
    "models.FlatTorus": {"radii": [1.0, 2.0]},
    "models.Hyperboloid": {"dimension": 2},
    "models.KPhaseMotor": {"num_phases": 3},
    "models.LinearRegression": TALL,
    "models.LinearStream": {"target_map": np.ones((2, 2)), **COVARIANCES},
    "models.MatrixFactorization": {"data": STREAM, "width": 2},
    "models.NonlinearFactorization": {"data": STREAM, "width": 2, "activation": jnp.tanh},
    "models.OverparametrizedLinear": TALL,
    "models.QuadraticallyParametrized": TALL,
    "models.ScaleInvariantNet": {"data": STREAM, "width": 2, "kind": "A"},
    "models.SeparableClassification": {"inputs": INPUTS, "labels": LABELS, "kind": "logistic"},
    "models.SpecialOrthogonal": {"size": 2},
    "models.Sphere": {"dimension": 2, "radius": 1.0},
    "models.Stiefel": {"num_rows": 3, "num_columns": 2},
    "models.Torus": {"major": 2.0, "minor": 1.0},
    "models.TwoLayerNet": {**TALL, "width": 2, "activation": jnp.tanh, "second_layer": [1.0, -1.0]},
    "models.digits": {"num_examples": 3, "test": False, "seed": 0},
    "models.separable_data": {"key": KEY, "num_examples": 3, "num_features": 2, "margin": 0.1},
    "models.sparse_regression": {
        "key": KEY, "num_examples": 2, "num_features": 3, "sparsity": 1, "design": "boolean"
    },
    "plotting.plot_check": {"check": CHECK},
    "plotting.shades": {"colour": "#0072B2", "number": 3},
    "symmetry.ExponentialSymmetry": {"generator": {"a": 1.0, "b": -1.0}},
    "symmetry.act_together": {"symmetries": [SYMMETRY], "point": PAIR, "parameters": [0.1]},
    "symmetry.balance": {
        "network": PAIR, "loss": (pair_loss, NUMBERS), "kind": "noise", "noise_scale": 0.1,
        "weight_decay": 0.1, "symmetries": [SYMMETRY], "throw": False,
    },
    "symmetry.balance_with_info": {
        "network": PAIR, "loss": (pair_loss, NUMBERS), "kind": "noise", "noise_scale": 0.1,
        "weight_decay": 0.1, "symmetries": [SYMMETRY], "throw": False,
    },
    "symmetry.charge_drift": {
        **{k: v for k, v in NOISY.items() if k != "symmetry"},
        "charge": lambda p: p["a"] ** 2, "noise_scale": 0.1, "weight_decay": 0.1,
    },
    "symmetry.check_symmetry": {**NOISY, "tolerance": 1e-3},
    "symmetry.discrete_noether_drift": {
        **NOISY, "learning_rate": 0.1, "batch_size": 1, "weight_decay": 0.1, "replacement": True
    },
    "symmetry.double_rotation": {
        "point": {"U": jnp.ones((2, 3)), "W": jnp.ones((3, 2))}, "first": lambda p: p["U"],
        "second": lambda p: p["W"], "matrix": np.eye(3), "axes": (1, 0),
    },
    "symmetry.examples_of": {"loss": LOSS},
    "symmetry.find_rescalings": {
        "network": MLP, "example_loss": lambda p, z: jnp.sum(p(z) ** 2), "data": INPUTS,
        "per_neuron": False, "tolerance": 1e-4,
    },
    "symmetry.low_rank": {"point": X, "directions": np.ones((3, 2)), "values": [1.0, 2.0]},
    "symmetry.mlp_rescaling": {"mlp": MLP, "layer": 0, "neuron": 0, "degree": 1.0},
    "symmetry.noether_charge": {"symmetry": SYMMETRY, "point": PAIR},
    "symmetry.SGDNoise": {
        "example_loss": pair_loss, "data": NUMBERS, "noise_scale": 0.1, "weight_decay": 0.1,
        "throw": True,
    },
    "symmetry.orbit_velocity": {
        "symmetry": SYMMETRY, "point": PAIR,
        "noise": symmetry.SGDNoise(pair_loss, NUMBERS, noise_scale=0.1),
    },
    "symmetry.symmetries_of": {"symmetry": SYMMETRY},
    "symmetry.noether_drift": {**NOISY, "noise_scale": 0.1, "weight_decay": 0.1},
    "symmetry.noise_equilibrium": {
        **NOISY, "noise_scale": 0.1, "weight_decay": 0.1, "throw": False
    },
    "symmetry.noise_equilibrium_with_info": {
        **NOISY, "learning_rate": 0.1, "batch_size": 1, "replacement": True, "weight_decay": 0.1,
        "throw": False
    },
    "symmetry.query_key_rotation": {
        "point": ATTENTION, "where": lambda p: p, "matrix": np.eye(2), "head": 0
    },
    "symmetry.rescaling": {
        "point": PAIR, "first": lambda p: p["a"], "second": lambda p: p["b"], "degree": 1.0
    },
    "symmetry.scaling": {"point": PAIR, "where": lambda p: p["a"]},
    "theory.activation_constants": {"activation": jnp.sinh, "low": -1.0, "high": 1.0},
    "theory.approximate_symmetry_displacement": {
        "point": np.array([1.0, 1.0]), "generator": np.diag([1.0, -1.0]),
        "covariance": np.diag([2.0, 1.0]), "hessian": np.eye(2), "direction": np.ones(2),
        "noise_scale": 0.1, "strength": 0.1,
    },
    "theory.coherence": {"inputs": INPUTS},
    "theory.deep_linear_initial_sharpness": {
        "sizes": [2, 3, 2], "variances": [1.0, 0.5], "input_trace": 1.0
    },
    "theory.deep_linear_noise_equilibrium": {
        "target_map": np.eye(2), **COVARIANCES, "widths": [3], "key": KEY
    },
    "theory.deep_linear_noise_sides": {"weights": [np.eye(2), np.eye(2)], **COVARIANCES},
    "theory.deep_linear_sharpness": {
        "weights": [np.eye(2), np.eye(2)], "input_covariance": np.eye(2)
    },
    "theory.two_layer_minimizer": {
        "targets": TARGETS, "width": 2, "activation": jnp.sinh, "second_layer": [1.0, -1.0]
    },
    "theory.two_layer_noise_equilibrium": {
        "product": np.eye(2), "input_noise": np.eye(2), "output_noise": np.eye(2), "width": 2,
        "key": KEY,
    },
    "theory.two_layer_noise_matrices": {
        "inputs": INPUTS, "residuals": np.ones((2, 2)), "noise_scale": 0.1, "weight_decay": 0.1
    },
}  # fmt: skip
