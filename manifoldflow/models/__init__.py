"""Worked problems: data and models on which the theory can be tried."""

from manifoldflow.models._digits import digits as digits
from manifoldflow.models._linear_data import (
    FiniteData as FiniteData,
    LinearStream as LinearStream,
)
from manifoldflow.models._linear_networks import (
    DeepLinear as DeepLinear,
    MatrixFactorization as MatrixFactorization,
)
from manifoldflow.models._matrix_manifolds import (
    FixedProduct as FixedProduct,
    SpecialOrthogonal as SpecialOrthogonal,
    Stiefel as Stiefel,
)
from manifoldflow.models._modular_addition import ModularAddition as ModularAddition
from manifoldflow.models._motor import KPhaseMotor as KPhaseMotor
from manifoldflow.models._quadratic import (
    OverparametrizedLinear as OverparametrizedLinear,
    QuadraticallyParametrized as QuadraticallyParametrized,
    sparse_regression as sparse_regression,
)
from manifoldflow.models._regression import LinearRegression as LinearRegression
from manifoldflow.models._separable import (
    separable_data as separable_data,
    SeparableClassification as SeparableClassification,
)
from manifoldflow.models._surfaces import (
    Ellipsoid as Ellipsoid,
    Hyperboloid as Hyperboloid,
    Sphere as Sphere,
)
from manifoldflow.models._symmetric_networks import (
    NonlinearFactorization as NonlinearFactorization,
    ScaleInvariantNet as ScaleInvariantNet,
)
from manifoldflow.models._tori import FlatTorus as FlatTorus, Torus as Torus
from manifoldflow.models._two_layer_net import TwoLayerNet as TwoLayerNet
