"""The facts about noise and loss from which an update tells the limit that it has."""

from typing import NamedTuple

from manifoldflow._types import Scalar


class Setting(NamedTuple):
    """The noise of one step as it is at the minimisers: facts about it, and not its type.

    Attributes:
        hessian_multiple: c where its covariance is c·∇²L and normal to the manifold, else None.
        label_std: δ where a step sees one example of one output, with the gradient
            slope·(rᵢ + ε)∇rᵢ and ε from N(0, δ²); else None.
        slope: examples times the scale of the loss, 1 for the default scale and one output.
        batch_size: B where a batch has its labels as they are, so that the noise vanishes where
            all examples are fitted; else None.
        is_full_batch: True where such a batch has all examples.
        num_outputs: residuals per example, 0 where the manifold is not that of zero residuals
            of examples.
        has_residuals: True where it is that of zero residuals.

    Examples:
        >>> import manifoldflow as mf
        >>> eight = mf.updates.Setting(None, None, None, 8, False, 1, True)  # batches of 8
        >>> sam = mf.updates.SAM(radius=0.1)
        >>> sam.fits(eight), sam.fits(eight._replace(batch_size=1))
        (False, True)
    """

    hessian_multiple: Scalar | None
    label_std: Scalar | None
    slope: Scalar | None
    batch_size: int | None
    is_full_batch: bool
    num_outputs: int
    has_residuals: bool
