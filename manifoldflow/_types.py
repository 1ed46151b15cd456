"""Names for the types that run through the whole package."""

from typing import Any, TypeAlias

from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

Point: TypeAlias = PyTree[Any]
"""Any PyTree. Its inexact-array leaves are the coordinates; the rest rides along."""

Coordinates: TypeAlias = PyTree[Any]
"""A point with `None` at every leaf that is not a coordinate."""

Tangent: TypeAlias = PyTree[Any]
"""A vector at a point: the structure, shapes and dtype of its coordinates."""

Example: TypeAlias = PyTree[Any]
"""One example of a data set: the data without their leading axis."""

Scalar: TypeAlias = Float[Array, ""]
Flag: TypeAlias = Bool[Array, ""]
Key: TypeAlias = PRNGKeyArray
Constraint = PyTree[Array]
