"""A part of the table of calls: two-layer networks, and how long they take."""

import jax.numpy as jnp
import numpy as np

START = {"loss": 1.0, "coherence": 1.0, "slope": 1.0}
FLATTENING = {
    "flatness": 1.0, "accuracy": 0.1, "coherence": 1.0, "normality": 1.0, "slope": 1.0,
    "third_derivative": 1.0, "least_flatness": 0.5, "halved": True,
}  # fmt: skip
STEPS = {"time": 1.0, "learning_rate": 0.1, "landing_time": 1.0}

TWO_LAYER = {
    "theory.label_noise_num_steps": {**STEPS, "label_variance": 0.1, "batch_fraction": 0.5},
    "theory.landed_flatness_bound": {
        **START,
        "features": np.ones((2, 3)),
        "activation": jnp.sinh,
    },
    "theory.landing_distance_bound": {**START, "time": 0.1, "width": 2},
    "theory.landing_time_bound": {**START, "accuracy": 0.1, "width": 2},
    "theory.sharpness_aware_num_steps": {**STEPS, "radius": 0.1},
    "theory.simplicity_time_bound": FLATTENING,
    "theory.stationarity_time_bound": FLATTENING,
}
