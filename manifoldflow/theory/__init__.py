"""Closed forms and bounds from the papers, in float64 NumPy.

They judge what the other packages compute, so they share no code with them. All of them need
concrete numbers: call them outside `jax.jit`, `jax.vmap` and `jax.grad`.
"""

from manifoldflow.theory._kernel_rich_potential import (
    kernel_rich_potential as kernel_rich_potential,
)
from manifoldflow.theory._margin import (
    margin_kkt as margin_kkt,
    MarginKKT as MarginKKT,
    max_margin_direction as max_margin_direction,
)
from manifoldflow.theory._noise_balance import (
    deep_linear_initial_sharpness as deep_linear_initial_sharpness,
    deep_linear_noise_sides as deep_linear_noise_sides,
    deep_linear_sharpness as deep_linear_sharpness,
    two_layer_noise_matrices as two_layer_noise_matrices,
)
from manifoldflow.theory._noise_equilibrium import (
    approximate_symmetry_displacement as approximate_symmetry_displacement,
    deep_linear_noise_equilibrium as deep_linear_noise_equilibrium,
    two_layer_noise_equilibrium as two_layer_noise_equilibrium,
)
from manifoldflow.theory._noise_examples import (
    deep_linear_equilibrium_of_examples as deep_linear_equilibrium_of_examples,
    deep_linear_sides_of_examples as deep_linear_sides_of_examples,
)
from manifoldflow.theory._optimisers import (
    scalar_factorization_adam as scalar_factorization_adam,
    scalar_factorization_local_sgd as scalar_factorization_local_sgd,
    scalar_factorization_sgd as scalar_factorization_sgd,
    scalar_factorization_slow_adam as scalar_factorization_slow_adam,
    scale_invariant_norm as scale_invariant_norm,
)
from manifoldflow.theory._ornstein_uhlenbeck import (
    ornstein_uhlenbeck_covariance as ornstein_uhlenbeck_covariance,
    ornstein_uhlenbeck_law as ornstein_uhlenbeck_law,
    OrnsteinUhlenbeckLaw as OrnsteinUhlenbeckLaw,
)
from manifoldflow.theory._overparametrized_linear import (
    kernel_rich_interpolant as kernel_rich_interpolant,
    min_norm_interpolant as min_norm_interpolant,
    overparametrized_linear_charges as overparametrized_linear_charges,
    overparametrized_linear_flow as overparametrized_linear_flow,
    weighted_l1_interpolant as weighted_l1_interpolant,
)
from manifoldflow.theory._overparametrized_rates import (
    overparametrized_linear_rates as overparametrized_linear_rates,
)
from manifoldflow.theory._recovery_stages import (
    quadratically_parametrized_flow as quadratically_parametrized_flow,
    recovery_stages as recovery_stages,
    RecoveryStages as RecoveryStages,
)
from manifoldflow.theory._restricted_isometry import (
    restricted_isometry as restricted_isometry,
    RestrictedIsometry as RestrictedIsometry,
)
from manifoldflow.theory._sparse_recovery import (
    kernel_regime_error_bound as kernel_regime_error_bound,
    RecoveryCertificate as RecoveryCertificate,
    sparse_recovery_certificate as sparse_recovery_certificate,
    sparse_recovery_sample_size as sparse_recovery_sample_size,
)
from manifoldflow.theory._two_layer import (
    activation_constants as activation_constants,
    ActivationConstants as ActivationConstants,
    coherence as coherence,
    two_layer_minimizer as two_layer_minimizer,
)
from manifoldflow.theory._two_layer_times import (
    label_noise_num_steps as label_noise_num_steps,
    landed_flatness_bound as landed_flatness_bound,
    landing_distance_bound as landing_distance_bound,
    landing_time_bound as landing_time_bound,
    sharpness_aware_num_steps as sharpness_aware_num_steps,
    simplicity_time_bound as simplicity_time_bound,
    stationarity_time_bound as stationarity_time_bound,
)
