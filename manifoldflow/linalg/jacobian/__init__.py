"""The Jacobian of a model over its examples; `_use_….py` each know one use of a leaf."""

from manifoldflow.linalg.jacobian._block import (
    AbstractBlock as AbstractBlock,
    LeafView as LeafView,
)
from manifoldflow.linalg.jacobian._chunked import (
    chunked_jacobian as chunked_jacobian,
    ChunkedJacobian as ChunkedJacobian,
)
from manifoldflow.linalg.jacobian._dense import (
    dense_jacobian as dense_jacobian,
    DenseJacobian as DenseJacobian,
)
from manifoldflow.linalg.jacobian._displacement import displacement as displacement
from manifoldflow.linalg.jacobian._jacobian import jacobian as jacobian
from manifoldflow.linalg.jacobian._operator import (
    AbstractJacobian as AbstractJacobian,
    gauss_newton as gauss_newton,
    gram as gram,
)
from manifoldflow.linalg.jacobian._structured import (
    structured_jacobian as structured_jacobian,
    StructuredJacobian as StructuredJacobian,
)
from manifoldflow.linalg.jacobian._use import (
    AbstractUse as AbstractUse,
    Equation as Equation,
    Recognised as Recognised,
    register_use as register_use,
)
from manifoldflow.linalg.jacobian._use_pairs import AbstractPairUse as AbstractPairUse
