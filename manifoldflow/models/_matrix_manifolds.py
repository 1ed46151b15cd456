"""Level sets of matrices with closed forms: orthonormal columns, rotations, factorisations.

All carry the metric of the space of matrices around them, ⟨A, B⟩ = tr AᵀB. The mean
curvature is tr II, not divided by the dimension, and the formulas hold for tangents at
points of the manifold.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _precision
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count, checked_floats, is_traced
from manifoldflow._types import Key, Scalar
from manifoldflow.manifolds import LevelSet

Matrix = Float[Array, "n k"]
Factors = dict[str, Float[Array, "_ _"]]


class Stiefel(eqx.Module):
    """The Stiefel manifold {X ∈ R^{n×k} : XᵀX = I} of matrices with orthonormal columns.

    The constraints are the upper triangle of XᵀX − I, which are independent. In this metric
    II(u, v) = −½X(uᵀv + vᵀu); for 1 < k < n it is not the canonical metric, that of the
    quotient of rotation groups.

    Args:
        num_rows: n.
        num_columns: k ≤ n; for k = n both components of O(n).

    Raises:
        ValueError: sizes below 1, or k > n.

    References:
        A. Edelman, T. Arias, S. Smith, The geometry of algorithms with orthogonality
        constraints, SIAM J. Matrix Anal. Appl. 20 (1998), section 2.2.

    Examples:
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> frames = mf.models.Stiefel(num_rows=3, num_columns=2)
        >>> point = frames.point(jr.key(0))
        >>> print(jnp.abs(point.T @ point).round(3), frames.dimension)
        [[1. 0.]
         [0. 1.]] 3
    """

    num_rows: int = eqx.field(static=True)
    num_columns: int = eqx.field(static=True)

    @checked
    def __init__(self, num_rows: int, num_columns: int):
        self.num_rows = checked_count("Stiefel: num_rows", num_rows)
        self.num_columns = checked_count("Stiefel: num_columns", num_columns)
        if self.num_columns > self.num_rows:
            raise ValueError(
                f"Stiefel needs at most as many columns as rows; got {num_columns} columns and "
                f"{num_rows} rows."
            )

    @property
    def dimension(self) -> int:
        """The dimension nk − k(k + 1)/2."""
        return self.num_columns * (2 * self.num_rows - self.num_columns - 1) // 2

    @property
    def manifold(self) -> LevelSet:
        return LevelSet(_Orthonormal())

    def point(self, key: Key) -> Matrix:
        """A uniform random point: no rotation of the rows changes its law."""
        return _orthonormal(jr.normal(key, (self.num_rows, self.num_columns)))

    def second_fundamental_form(self, point: Matrix, u: Matrix, v: Matrix) -> Matrix:
        """The second fundamental form −½X(uᵀv + vᵀu)."""
        return -point @ (u.T @ v + v.T @ u) / 2

    def sectional_curvature(self, point: Matrix, u: Matrix, v: Matrix) -> Scalar:
        """The sectional curvature (tr uᵀu vᵀv − ¼|uᵀv + vᵀu|²)/(|u|²|v|² − ⟨u, v⟩²)."""
        bends = jnp.sum((u.T @ u) * (v.T @ v)) - jnp.sum((u.T @ v + v.T @ u) ** 2) / 4
        return bends / (jnp.sum(u**2) * jnp.sum(v**2) - jnp.sum(u * v) ** 2)

    def ricci_curvature(self, point: Matrix, u: Matrix) -> Scalar:
        """The Ricci curvature (n − (3k + 2)/4)|A|² + (n − k − 1)|B|², A = Xᵀu, |B|² = |u|² − |A|².

        From Ric(u, u) = (n − (k + 1)/2)|u|² − Σ|II(u, eᵢ)|², where the sum is k|A|²/4 over
        e = XA′ and (k + 1)|B|²/2 over the e whose columns are orthogonal to those of X.
        """
        n, k = self.num_rows, self.num_columns
        inside = jnp.sum((point.T @ u) ** 2)
        return (n - (3 * k + 2) / 4) * inside + (n - k - 1) * (jnp.sum(u**2) - inside)

    def scalar_curvature(self, point: Matrix) -> Scalar:
        """The scalar curvature (n − (3k + 2)/4) k(k − 1)/2 + (n − k − 1)(n − k)k: tr Ric."""
        n, k = self.num_rows, self.num_columns
        value = (n - (3 * k + 2) / 4) * k * (k - 1) / 2 + (n - k - 1) * (n - k) * k
        return jnp.asarray(value, point.dtype)

    def mean_curvature(self, point: Matrix) -> Matrix:
        """The mean curvature vector −(n − (k + 1)/2)X.

        The coordinates are eigenfunctions of Laplace-Beltrami.
        """
        return -(self.num_rows - (self.num_columns + 1) / 2) * point

    def exponential(self, point: Matrix, vector: Matrix) -> Matrix:
        """The exponential map [X, v] exp([[A, −vᵀv], [I, A]]) [I; 0] exp(−A), with A = Xᵀv.

        References:
            Edelman, Arias, Smith, section 2.2.2.
        """
        size = self.num_columns
        turn, eye = point.T @ vector, jnp.eye(size, dtype=point.dtype)
        flow = jsl.expm(jnp.block([[turn, -vector.T @ vector], [eye, turn]]))
        return jnp.concatenate([point, vector], axis=1) @ flow[:, :size] @ jsl.expm(-turn)


class SpecialOrthogonal(eqx.Module):
    """The rotations SO(n) = {X ∈ R^{n×n} : XᵀX = I, det X = 1}.

    The level set of the upper triangle of XᵀX − I is O(n); points are on its component of
    determinant 1. The metric is bi-invariant: with A = Xᵀu and B = Xᵀv,
    K = ¼|[A, B]|²/(|A|²|B|² − ⟨A, B⟩²).

    Args:
        size: n ≥ 2.

    Raises:
        ValueError: n below 2.

    References:
        J. Milnor, Curvatures of left invariant metrics on Lie groups, Adv. Math. 21 (1976),
        section 7; with ⟨A, B⟩ = tr AᵀB the Killing form is −(n − 2)⟨A, B⟩.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> rotations = mf.models.SpecialOrthogonal(3)
        >>> half_turn = jnp.diag(jnp.array([1.0, -1.0, -1.0]))
        >>> print(rotations.dimension, f"{rotations.distance(jnp.eye(3), half_turn):.3f}")  # √2·π
        3 4.443
    """

    size: int = eqx.field(static=True)

    @checked
    def __init__(self, size: int):
        self.size = checked_count("SpecialOrthogonal: size", size)
        if self.size < 2:
            raise ValueError(f"SpecialOrthogonal needs a size of at least 2; got {size}.")

    @property
    def dimension(self) -> int:
        """The dimension n(n − 1)/2."""
        return self.size * (self.size - 1) // 2

    @property
    def manifold(self) -> LevelSet:
        return LevelSet(_Orthonormal())

    def point(self, key: Key) -> Matrix:
        """A uniform random rotation, by the law of Haar."""
        found = _orthonormal(jr.normal(key, (self.size, self.size)))
        # A reflection of one column takes the component det = −1 to that of det = 1, and Haar to
        # Haar.
        return found.at[:, 0].multiply(jnp.sign(jnp.linalg.det(found)))

    def sectional_curvature(self, point: Matrix, u: Matrix, v: Matrix) -> Scalar:
        """The sectional curvature ¼|[A, B]|²/(|A|²|B|² − ⟨A, B⟩²)."""
        a, b = point.T @ u, point.T @ v
        area = jnp.sum(a**2) * jnp.sum(b**2) - jnp.sum(a * b) ** 2
        return jnp.sum((a @ b - b @ a) ** 2) / (4 * area)

    def ricci_curvature(self, point: Matrix, u: Matrix) -> Scalar:
        """The Ricci curvature Ric(u, u) = (n − 2)|u|²/4."""
        return (self.size - 2) * jnp.sum(u**2) / 4

    def scalar_curvature(self, point: Matrix) -> Scalar:
        """The scalar curvature n(n − 1)(n − 2)/8."""
        return jnp.asarray(self.size * (self.size - 1) * (self.size - 2) / 8, point.dtype)

    def mean_curvature(self, point: Matrix) -> Matrix:
        """The mean curvature vector −½(n − 1)X."""
        return -(self.size - 1) * point / 2

    def exponential(self, point: Matrix, vector: Matrix) -> Matrix:
        """The exponential map X exp(Xᵀv)."""
        return point @ jsl.expm(point.T @ vector)

    def distance(self, point: Matrix, other: Matrix) -> Scalar:
        """The distance (Σ αᵢ²)^½, over the angles of the eigenvalues e^{±iα} of XᵀY.

        |sin ½α| and |cos ½α| are the singular values of ½(Y − X) and ½(Y + X). Not
        differentiable at Y = X; infinite where no rotation leads from X to Y.
        """
        values = lambda x: jnp.linalg.svd(x, compute_uv=False)
        halves = jnp.arctan2(values(other - point), values(other + point)[::-1])
        is_joined = jnp.linalg.det(point) * jnp.linalg.det(other) > 0
        return jnp.where(is_joined, 2 * jnp.linalg.norm(halves), jnp.inf)


class FixedProduct(eqx.Module):
    """The factorisations {(U, V) : UV = T} of a matrix of rank r into m×r and r×n.

    They are the zero-loss manifold of a linear network with one hidden layer of r units. It is one
    orbit (UG, G⁻¹V) of GL(r), of dimension r². The mn equations UV = T have a derivative of
    rank r(m + n − r) only: in the singular bases of T, the block of UV outside its column
    and row space vanishes to second order wherever its neighbours do. The constraint leaves
    this block out, has full rank, and the same zero set.

    Points are {"left": U, "right": V}.

    Args:
        target: T, (m, n); not to be differentiated in.
        rank: r, the rank of T.

    Raises:
        ValueError: T is no matrix, is not finite, or its rank is another.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> factors = mf.models.FixedProduct(jnp.array([[4.0, 0.0], [0.0, 0.0]]), rank=1)
        >>> point = factors.balanced_point()
        >>> print((point["left"] @ point["right"]).round(3) + 0.0, factors.dimension)
        [[4. 0.]
         [0. 0.]] 1
    """

    target: Float[Array, "m n"]
    rank: int = eqx.field(static=True)

    @checked
    def __init__(self, target: Any, rank: int):
        self.rank = checked_count("FixedProduct: rank", rank)
        array = checked_floats("FixedProduct: target", target)
        if array.ndim != 2 or array.size == 0:
            raise ValueError(f"FixedProduct: target must be a matrix; got shape {array.shape}.")
        self.target = array
        if not is_traced(self.target):
            found = int(np.linalg.matrix_rank(np.asarray(self.target)))
            if found != self.rank:
                raise ValueError(
                    f"FixedProduct needs the rank of its target; got rank={rank} for a matrix of "
                    f"rank {found}. With another the factorisations are not one orbit."
                )

    @property
    def dimension(self) -> int:
        """The dimension r²."""
        return self.rank**2

    @property
    def manifold(self) -> LevelSet:
        left, values, right = self._svd()
        return LevelSet(_Product(left, values[: self.rank], right))

    def balanced_point(self) -> Factors:
        """The balanced factors U = A√Σ, V = √ΣBᵀ of the singular value decomposition T = AΣBᵀ.

        With UᵀU = VVᵀ, which makes |U|² + |V|² as small as it can be: twice the nuclear norm.

        References:
            N. Srebro, J. Rennie, T. Jaakkola, Maximum-margin matrix factorization, NIPS 2004.
        """
        left, values, right = self._svd()
        roots = jnp.sqrt(values[: self.rank])
        return {
            "left": left[:, : self.rank] * roots,
            "right": roots[:, None] * right[: self.rank],
        }

    def point(self, key: Key) -> Factors:
        """A random point (UG, G⁻¹V), from the balanced one.

        G = Q exp(½z)Q′ with uniform orthogonal Q, Q′ and standard normal z: well conditioned, and
        all of the component of det G > 0 and of the other.
        """
        first, second, third = jr.split(key, 3)
        shape = (self.rank, self.rank)
        q, r = (_orthonormal(jr.normal(k, shape)) for k in (first, second))
        stretch = jnp.exp(jr.normal(third, (self.rank,)) / 2)
        start = self.balanced_point()
        return {
            "left": start["left"] @ (q * stretch) @ r.T,
            "right": (r / stretch) @ q.T @ start["right"],
        }

    def tangent(self, point: Factors, generator: Float[Array, "r r"]) -> Factors:
        """The velocity (UX, −XV) of (Ue^{tX}, e^{−tX}V); every tangent is one of these."""
        return {
            "left": point["left"] @ generator,
            "right": -generator @ point["right"],
        }

    def balance(self, point: Factors) -> Float[Array, "r r"]:
        """The matrix UᵀU − VVᵀ, conserved by the gradient flow of any loss of UV.

        It is 0 where |U|² + |V|² is stationary.

        References:
            S. Arora, N. Cohen, E. Hazan, On the optimization of deep networks, ICML 2018.
        """
        return point["left"].T @ point["left"] - point["right"] @ point["right"].T

    def normal_part(self, point: Factors, vector: Factors) -> Factors:
        """The normal part (A, B) − (UX, −XV) with UᵀU X + X VVᵀ = UᵀA − BVᵀ."""
        left, right = point["left"], point["right"]
        (a, p), (b, q) = jnp.linalg.eigh(left.T @ left), jnp.linalg.eigh(right @ right.T)
        moment = left.T @ vector["left"] - vector["right"] @ right.T
        generator = p @ ((p.T @ moment @ q) / (a[:, None] + b)) @ q.T
        along = self.tangent(point, generator)
        return jax.tree.map(jnp.subtract, vector, along)

    def second_fundamental_form(
        self, point: Factors, u: Float[Array, "r r"], v: Float[Array, "r r"]
    ) -> Factors:
        """The normal part of ½(U(XY + YX), (XY + YX)V), for the tangents of generators X, Y.

        The acceleration of (Ue^{tX}, e^{−tX}V) is (UX², X²V).
        """
        both = (u @ v + v @ u) / 2
        bend = {"left": point["left"] @ both, "right": both @ point["right"]}
        return self.normal_part(point, bend)

    def _svd(self) -> tuple[Array, Array, Array]:
        # Singular vectors of equal singular values, the zeros here, have no derivative.
        left, values, right = jnp.linalg.svd(jax.lax.stop_gradient(self.target))
        return left, values, right


class _Orthonormal(eqx.Module):
    def __call__(self, point: Matrix) -> Float[Array, " constraints"]:
        size = point.shape[1]
        gram = _precision.matmul(point.T, point)
        return (gram - jnp.eye(size, dtype=point.dtype))[jnp.triu_indices(size)]


class _Product(eqx.Module):
    """The blocks of AᵀUVB − Σ that meet the column space or the row space of the target."""

    left: Float[Array, "m m"]
    values: Float[Array, " r"]
    right: Float[Array, "n n"]

    def __call__(self, point: Factors) -> Float[Array, " constraints"]:
        rank, dtype = self.values.size, point["left"].dtype
        product = lambda x, y: _precision.matmul(x, y)
        left = product(self.left.T.astype(dtype), point["left"])
        right = product(point["right"], self.right.T.astype(dtype))
        across = product(left[:rank], right) - jnp.eye(rank, right.shape[1], dtype=dtype) * (
            self.values[:, None].astype(dtype)
        )
        below = product(left[rank:], right[:, :rank])
        return jnp.concatenate([across.ravel(), below.ravel()])


def _orthonormal(matrix: Matrix) -> Matrix:
    """The orthogonal factor of QR with a positive diagonal of R: uniform for normal entries.

    References:
        F. Mezzadri, How to generate random matrices from the classical compact groups,
        Notices of the AMS 54 (2007).
    """
    found, triangle = jnp.linalg.qr(matrix)
    # QR alone is not uniform: its signs are a convention of LAPACK.
    return found * jnp.sign(jnp.diagonal(triangle))
