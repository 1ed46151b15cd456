"""Continuous symmetries of losses: conserved charges, and where SGD's noise moves them."""

from manifoldflow.symmetry._balance import (
    Balance as Balance,
    balance as balance,
    balance_with_info as balance_with_info,
)
from manifoldflow.symmetry._charge import (
    Charge as Charge,
    check_charge as check_charge,
)
from manifoldflow.symmetry._check import (
    check_symmetry as check_symmetry,
    SymmetryCheck as SymmetryCheck,
)
from manifoldflow.symmetry._constructors import (
    double_rotation as double_rotation,
    low_rank as low_rank,
    mlp_rescaling as mlp_rescaling,
    query_key_rotation as query_key_rotation,
    rescaling as rescaling,
    scaling as scaling,
)
from manifoldflow.symmetry._drift import (
    charge_drift as charge_drift,
    discrete_noether_drift as discrete_noether_drift,
    noether_drift as noether_drift,
    orbit_velocity as orbit_velocity,
)
from manifoldflow.symmetry._equilibrium import (
    noise_equilibrium as noise_equilibrium,
    noise_equilibrium_with_info as noise_equilibrium_with_info,
)
from manifoldflow.symmetry._find import (
    find_rescalings as find_rescalings,
    Rescaling as Rescaling,
)
from manifoldflow.symmetry._find_products import find_products as find_products
from manifoldflow.symmetry._find_scalings import find_scalings as find_scalings, Scaling as Scaling
from manifoldflow.symmetry._gradients import examples_of as examples_of
from manifoldflow.symmetry._product_equilibrium import product_drift as product_drift
from manifoldflow.symmetry._products import (
    attention_products as attention_products,
    product_symmetry as product_symmetry,
    ProductSymmetry as ProductSymmetry,
)
from manifoldflow.symmetry._sgd_noise import SGDNoise as SGDNoise
from manifoldflow.symmetry._symmetry import (
    act_together as act_together,
    ExponentialSymmetry as ExponentialSymmetry,
    noether_charge as noether_charge,
    symmetries_of as symmetries_of,
)
