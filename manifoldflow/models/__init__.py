"""Worked problems: data and models on which the theory can be tried."""

from manifoldflow.models._digits import digits as digits
from manifoldflow.models._matrix_manifolds import (
    FixedProduct as FixedProduct,
    SpecialOrthogonal as SpecialOrthogonal,
    Stiefel as Stiefel,
)
from manifoldflow.models._motor import KPhaseMotor as KPhaseMotor
from manifoldflow.models._quadratic import (
    OverparametrizedLinear as OverparametrizedLinear,
    QuadraticallyParametrized as QuadraticallyParametrized,
    sparse_regression as sparse_regression,
)
from manifoldflow.models._surfaces import (
    Ellipsoid as Ellipsoid,
    FlatTorus as FlatTorus,
    Hyperboloid as Hyperboloid,
    Sphere as Sphere,
    Torus as Torus,
)
from manifoldflow.models._two_layer_net import TwoLayerNet as TwoLayerNet
