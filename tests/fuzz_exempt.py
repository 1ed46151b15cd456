"""Public names that the table of calls does not try, and why not."""

# What users read and never build, or build by the functions above.
RESULT_CLASSES = {
    "Info", "Solution", "RESULTS", "diagnostics.Certificate", "diagnostics.Certificates",
    "diagnostics.ConvexityCheck",
    "diagnostics.DimensionCheck", "diagnostics.Explanation", "diagnostics.GeodesicCheck",
    "diagnostics.LeafTrace", "diagnostics.LeftOut", "diagnostics.Message",
    "diagnostics.Plan", "diagnostics.Quantity",
    "diagnostics.Report", "diagnostics.SlopeCheck", "diagnostics.StationaryCovariance",
    "diagnostics.GradientFlowCheck",
    "ensembles.Estimate", "ensembles.Statistics",
    "ensembles.WeakError", "flows.DriftEstimate", "linalg.Eigenvalues", "linalg.Estimate",
    "linalg.ChunkedJacobian", "linalg.DenseJacobian", "linalg.StructuredJacobian",
    "linalg.ResidualFactor", "linalg.TangentProjector", "flows.IterationCheck",
    "linalg.Equation", "linalg.LeafView",
    "limits.SecondDerivative", "manifolds.GramGeometry", "manifolds.HessianGeometry",
    "noise.LocalHessian", "noise.Batch", "updates.ScalingRule", "updates.Setting",
    "manifolds.GramNormalSpace", "manifolds.HessianNormalSpace", "optimize.Attempt",
    "optimize.Iterate", "optimize.Problem", "optimize.Work", "symmetry.Balance",
    "symmetry.ProductSymmetry", "symmetry.Scaling",
    "symmetry.Rescaling", "symmetry.SymmetryCheck", "theory.ActivationConstants",
    "theory.RestrictedIsometry", "theory.RecoveryCertificate", "diagnostics.KernelChange",
    "theory.RecoveryStages", "theory.OrnsteinUhlenbeckLaw",
    "theory.MarginKKT", "walks.BeforeAfter", "walks.HeldOutputs",
}  # fmt: skip
# Their arguments are files and pictures, or values of any kind, or they give functions; they have
# tests of their own.
ELSEWHERE = {
    "load_checkpoint", "plotting.plot_walk", "plotting.Colour", "plotting.draw_curve",
    "plotting.draw_surface", "plotting.light_png", "plotting.surface_axes",
    "noise.checked_noise", "linalg.positive_solver",
    "walks.before_after", "LiveTable", "plotting.plot_before_after", "plotting.plot_convergence",
    "plotting.plot_ensemble", "plotting.plot_spectrum",
}  # fmt: skip
