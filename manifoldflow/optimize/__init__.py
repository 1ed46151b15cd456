"""Minimising a function over a manifold: trust regions, gradient descent, Optax's methods."""

from manifoldflow.optimize._base import (
    AbstractMethod as AbstractMethod,
    Attempt as Attempt,
    Iterate as Iterate,
    Problem as Problem,
    Work as Work,
)
from manifoldflow.optimize._gradient_descent import (
    RiemannianGradientDescent as RiemannianGradientDescent,
)
from manifoldflow.optimize._minimize import minimize as minimize
from manifoldflow.optimize._optax import RiemannianOptax as RiemannianOptax
from manifoldflow.optimize._trust_region import RiemannianTrustRegion as RiemannianTrustRegion
