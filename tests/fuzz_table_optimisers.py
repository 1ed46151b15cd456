"""The part of `fuzz_table` about limits of optimisers: valid calls, their arguments by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import manifoldflow as mf


def field(x):
    return (jnp.sum(x**2) - 1) * x


def identity(x):
    return jnp.eye(len(x))


CIRCLE = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
CURVE = {"start": 0.8, "time": 0.5, "label_std": 1.0}

SQUARES = mf.LeastSquares(
    np.array([[1.0, 0, 0.5], [0, 1.0, 0.5]]), np.array([1.0, 0.0]), predict=jnp.dot
)
FITTED = {"loss": SQUARES, "point": jnp.array([1.0, 0, 0])}

OPTIMISERS = {
    "largest_stable_learning_rate": {**FITTED, "batch_size": 1, "replacement": True},
    "diagnostics.stationary_covariance": {
        **FITTED, "noise": mf.LabelNoise(0.1), "learning_rate": 0.1
    },
    "report": {
        **FITTED, "learning_rate": 0.1, "batch_size": 1, "num_samples": 16, "num_eigenvalues": 2,
        "max_rows": 100, "memory": 10**6, "seconds": 1.0, "key": jax.random.key(0),
    },
    "plotting.plot_report": {"report": mf.diagnostics.Report({}, (), (), (), (), False)},
    "LimitClock": {"momentum": 0.5},
    "walks.StochasticWalk": {"strength": 0.1, "batch_size": 1, "relative_step": 0.1},
    "walks.hold_outputs": {
        "optimizer": optax.sgd(0.1), "manifold": CIRCLE, "like": np.ones(2), "max_change": 0.1
    },
    "GradientClock": {"momentum": 0.5},
    "SAMClock": {"radius": 0.1},
    "DecayClock": {"weight_decay": 0.1},
    "updates.SGD": {"momentum": 0.5, "weight_decay": 0.1},
    "updates.Adam": {"b1": 0.9, "averaging": 1.0, "eps": 0.1, "weight_decay": 0.1},
    "updates.ClippedSGD": {"max_norm": 1.0},
    "updates.LocalSGD": {"num_workers": 2, "gradient_time": 0.1},
    "updates.Muon": {},
    "updates.NormalizedGD": {},
    "updates.SAM": {"radius": 0.1, "per_example": True},
    "updates.SignSGD": {},
    "updates.scaling_rule": {"update": mf.updates.SGD(), "batch_factor": 2.0},
    "IterationLimit": {
        "mean_field": field, "covariance": identity, "slow_drift": field, "rank": 1,
        "manifold": CIRCLE,
    },
    "WeightDecayFlow": {"manifold": CIRCLE},
    "models.ModularAddition": {"modulus": 3, "width": 2, "train_fraction": 0.5, "seed": 0},
    "theory.scalar_factorization_adam": {
        **CURVE, "averaging_rate": 1.0, "weight_decay": 0.1, "decoupled": True
    },
    "theory.scalar_factorization_local_sgd": {**CURVE, "num_workers": 2, "gradient_time": 0.1},
    "theory.scalar_factorization_sgd": {**CURVE, "weight_decay": 0.1},
    "theory.scalar_factorization_slow_adam": {
        **CURVE, "averaging_rate": 1.0, "second_moments": np.ones(2)
    },
    "theory.scale_invariant_norm": {
        "start": 1.0, "time": 0.5, "trace": 1.0, "noise_constant": 1.0, "weight_decay": 0.1
    },
}  # fmt: skip
