"""Linear algebra of Jacobians, Gram matrices and singular Hessians. Operators in, operators out."""

from manifoldflow.linalg._contractions import (
    column as column,
    columns as columns,
    contract_hessians as contract_hessians,
    hessian_product_sum as hessian_product_sum,
    second_derivative_sum as second_derivative_sum,
    sum_terms as sum_terms,
)
from manifoldflow.linalg._eigenvalues import (
    effective_rank as effective_rank,
    Eigenvalues as Eigenvalues,
    largest_eigenvalues as largest_eigenvalues,
    smallest_eigenvalues as smallest_eigenvalues,
)
from manifoldflow.linalg._estimate import (
    Estimate as Estimate,
    estimate as estimate,
    estimate_trace as estimate_trace,
)
from manifoldflow.linalg._factors import (
    factor_operator as factor_operator,
    ResidualFactor as ResidualFactor,
)
from manifoldflow.linalg._gram import (
    AbstractGram as AbstractGram,
    AbstractGramSolve as AbstractGramSolve,
    condition_number as condition_number,
    DenseGram as DenseGram,
    equilibrated_eigenvalues as equilibrated_eigenvalues,
    numerical_rank as numerical_rank,
    row_scale as row_scale,
)
from manifoldflow.linalg._iterative import (
    AutoGram as AutoGram,
    inverse_gram as inverse_gram,
    IterativeGram as IterativeGram,
)
from manifoldflow.linalg._lapack import (
    eigh as eigh,
    one_by_one as one_by_one,
)
from manifoldflow.linalg._memory import device_memory as device_memory
from manifoldflow.linalg._positive import positive_solver as positive_solver
from manifoldflow.linalg._projection import (
    normal_component as normal_component,
    pseudo_inverse_mv as pseudo_inverse_mv,
    refined_solve as refined_solve,
    tangent_component as tangent_component,
)
from manifoldflow.linalg._range import (
    log_pseudo_determinant as log_pseudo_determinant,
    lyapunov_operator as lyapunov_operator,
    lyapunov_solve as lyapunov_solve,
    pseudo_inverse as pseudo_inverse,
    range_projection as range_projection,
    range_spectrum as range_spectrum,
    square_root as square_root,
)
from manifoldflow.linalg._sigma import (
    AbstractSigma as AbstractSigma,
    as_sigma as as_sigma,
    Covariance as Covariance,
    Factor as Factor,
    NormalFactor as NormalFactor,
)
from manifoldflow.linalg._spectrum import (
    gram_largest_eigenvalue as gram_largest_eigenvalue,
    gram_largest_eigenvalue_with_info as gram_largest_eigenvalue_with_info,
    gram_log_determinant as gram_log_determinant,
    gram_top_eigenvector as gram_top_eigenvector,
)
from manifoldflow.linalg._tangent_projector import (
    tangent_projector as tangent_projector,
    TangentProjector as TangentProjector,
)
from manifoldflow.linalg._tangent_solve import tangent_solve as tangent_solve
from manifoldflow.linalg.jacobian import (
    AbstractBlock as AbstractBlock,
    AbstractJacobian as AbstractJacobian,
    AbstractPairUse as AbstractPairUse,
    AbstractUse as AbstractUse,
    chunked_jacobian as chunked_jacobian,
    ChunkedJacobian as ChunkedJacobian,
    dense_jacobian as dense_jacobian,
    DenseJacobian as DenseJacobian,
    displacement as displacement,
    Equation as Equation,
    gauss_newton as gauss_newton,
    gram as gram,
    jacobian as jacobian,
    LeafView as LeafView,
    Recognised as Recognised,
    register_use as register_use,
    structured_jacobian as structured_jacobian,
    StructuredJacobian as StructuredJacobian,
)
