"""Checks of the arguments of public functions against their annotations.

Type checkers are for those who run them. Everyone else gets a sentence from here instead of an
error from the depths of JAX: the function, the argument, what it must be and what came. Values are
checked where they are used; here only kinds, ranks and lengths that must agree.
"""

import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import AbstractArray, PyTree

from manifoldflow._errors import checked_point, described, is_traced, numbers, of_jax, shapes_of
from manifoldflow._garbage import rare_collections
from manifoldflow._signatures import readable
from manifoldflow._tracebacks import shortened, with_few_frames

Function = TypeVar("Function", bound=Callable[..., Any])

_HOW = {
    "AbstractManifold": "Build one, as LevelSet(fn) or ZeroLossManifold(loss).",
    "LeastSquares": "Build one, as LeastSquares(inputs, targets).",
    "AbstractLoss": "Build one, as LeastSquares(inputs, targets) or FunctionLoss(fn).",
    "AbstractResidualLoss": "Build one, as LeastSquares(inputs, targets).",
    "AbstractExampleLoss": "Build one, as LeastSquares(inputs, targets).",
    "AbstractNoise": "Build one, as LabelNoise(std) or IsotropicNoise().",
    "AbstractFlow": "Build one, as LimitDiffusion(manifold, noise) or GradientFlow(loss).",
    "AbstractRetraction": "Build one, as ProjectionRetraction().",
    "AbstractMethod": "Build one, as RiemannianTrustRegion().",
    "AbstractJacobian": "Take that of a loss, loss.jacobian(point).",
    "AbstractLinearData": "Build one, as models.FiniteData(inputs, targets).",
    "ExponentialSymmetry": "Wrap the generator: ExponentialSymmetry(A).",
    "AbstractSolver": "Build one, as diffrax.Tsit5().",
    "AbstractLinearOperator": "Wrap a matrix: lineax.MatrixLinearOperator(matrix).",
    "Mesh": "Make one, as jax.make_mesh((jax.device_count(),), ('examples',)).",
}


class _Unfit(Exception):
    """The value does not fit its annotation."""


def checked_but(*arguments: str, is_concrete: bool = False) -> Callable[[Function], Function]:
    """`checked`, or `checked_concrete`, for all arguments but these."""
    return lambda fn: _checked_function(fn, arguments, is_concrete)


def checked(fn: Function) -> Function:
    """Refuse arguments that are not what the annotations of `fn` say.

    Arrays of NumPy and lists of numbers become JAX arrays where those are asked for. Where a
    function says better itself what it needs of an argument, `checked_but` leaves it to it.

    Raises:
        ValueError: on a call, for the first argument that does not fit.
    """
    return _checked_function(fn, ())


def checked_concrete(fn: Function) -> Function:
    """`checked` for functions that compute with NumPy or branch on values.

    Raises:
        ValueError: on a call with arrays that are being traced. Otherwise the first conversion to
            NumPy, somewhere within, would end in a `TracerArrayConversionError`.
    """
    return _checked_function(fn, (), is_concrete=True)


def _checked_function(
    fn: Function, left_out: tuple[str, ...], is_concrete: bool = False
) -> Function:
    signature = inspect.signature(fn)
    # Before the annotations are put in short words, for `help` alone.
    wanted = {name: p.annotation for name, p in signature.parameters.items()}
    signature = readable(signature)
    name = fn.__qualname__.removesuffix(".__init__")
    starred = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    plain = [n for n, p in signature.parameters.items() if p.kind not in starred]
    plain = [n for n in plain if n != "self" and n not in left_out]

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return fn(*args, **kwargs)  # Python itself says best which argument is missing.
        if is_concrete:
            _refuse_tracing(name, (args, kwargs))
        sizes: dict[str, int] = {}
        try:
            for argument in plain:
                if argument in bound.arguments:
                    value = bound.arguments[argument]
                    value = _checked(name, argument, wanted[argument], value, sizes)
                    _check_role(name, argument, wanted[argument], value)
                    bound.arguments[argument] = value
            # As usual within the library, though its user may want to be strict.
            with jax.numpy_dtype_promotion("standard"), rare_collections():
                return fn(*bound.args, **bound.kwargs)
        except Exception as error:
            sentence = of_jax(error)
            if sentence is not None:
                raise ValueError(sentence) from with_few_frames(error)
            short = shortened(error)
            if short is error:
                raise
            raise short from None

    call.__signature__ = signature  # type: ignore[attr-defined]
    return typing.cast(Function, call)


def _refuse_tracing(name: str, arguments: Any) -> None:
    # Inside jit JAX traces operations on constants as well: an addition tells.
    if is_traced(arguments) or is_traced(jnp.add(0, 0)):
        raise ValueError(
            f"{name} needs concrete numbers; got a call within jit, vmap or grad. Call it outside, "
            "with arrays that are not traced."
        )


def checked_fields(module: Any) -> None:
    """Checks the fields of a module without an `__init__`, as `checked` does arguments."""
    sizes: dict[str, int] = {}
    for field in module.__dataclass_fields__.values():
        value = getattr(module, field.name)
        _checked(type(module).__name__, field.name, field.type, value, sizes)


def _checked(name: str, argument: str, wanted: Any, value: Any, sizes: dict[str, int]) -> Any:
    try:
        return _fitted(wanted, value, sizes)
    except _Unfit:
        how = next((f" {_HOW[n]}" for n in _class_names(wanted) if n in _HOW), "")
        raise ValueError(
            f"{name}: {argument} must be {_sentence(wanted, sizes)}; got {described(value)}.{how}"
        ) from None


_COUNTS = {"batch_size", "chunk_size", "width", "size", "dimension", "count"}


def _check_role(name: str, argument: str, wanted: Any, value: Any) -> None:
    """Checks what an argument's name says of it: names mean the same all over the library."""
    if argument.startswith(("num_", "max_")) or argument in _COUNTS:
        if _is_integer(value) and value < 1:
            raise ValueError(f"{name}: {argument} must be a positive integer; got {value!r}.")
    if argument in ("point", "network", "other") and _is_tree(wanted):
        checked_point(value)
    if argument == "data" and _is_tree(wanted):
        _check_examples(name, value)
    if argument in ("coordinates", "params"):
        leaves = jax.tree.leaves(value)
        if not leaves or not all(_is_coordinate(leaf) for leaf in leaves):
            raise ValueError(
                f"{name}: {argument} must be a PyTree of real floating-point arrays; got "
                f"{shapes_of(value)}. manifoldflow.split(point)[0] is one."
            )


def _is_tree(wanted: Any) -> bool:
    return isinstance(wanted, type) and issubclass(wanted, PyTree)


def _check_examples(name: str, data: Any) -> None:
    arrays = [numbers(f"{name}: data", leaf) for leaf in jax.tree.leaves(data)]
    lengths = {array.shape[0] if array.ndim else None for array in arrays}
    if len(lengths) != 1 or lengths & {None, 0}:
        raise ValueError(
            f"{name}: data must be arrays with one common, non-empty leading example axis; "
            f"got {shapes_of(data)}. Stack the examples along axis 0."
        )


def _is_coordinate(leaf: Any) -> bool:
    is_array = _is_kept_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
    return is_array and jnp.issubdtype(leaf.dtype, jnp.floating)


def _fitted(wanted: Any, value: Any, sizes: dict[str, int]) -> Any:
    """The value in the form that its annotation wants."""
    if wanted is Any or wanted is inspect.Parameter.empty or isinstance(wanted, str):
        return value
    if isinstance(wanted, TypeVar):
        return _fitted(Any if wanted.__bound__ is None else wanted.__bound__, value, sizes)
    origin = typing.get_origin(wanted) or wanted
    if origin in (typing.Union, types.UnionType):
        return _first_fit(typing.get_args(wanted), value, sizes)
    if origin is typing.Literal:
        return _kept(value, isinstance(value, str) and value in typing.get_args(wanted))
    if wanted is None or wanted is type(None):
        return _kept(value, value is None)
    if isinstance(origin, type) and issubclass(origin, AbstractArray):
        return _array(origin, value, sizes)
    if wanted is jax.Array:
        return value if isinstance(value, jax.Array) else _numbers(value)
    if isinstance(origin, type) and issubclass(origin, PyTree):
        return _tree_of(getattr(wanted, "leaftype", Any), value, sizes)
    if origin is Callable or origin is typing.get_origin(Callable[..., Any]):
        return _kept(value, callable(value))
    return _plain(origin, value)


def _kept(value: Any, is_fit: Any) -> Any:
    if not is_fit:
        raise _Unfit
    return value


def _first_fit(members: tuple[Any, ...], value: Any, sizes: dict[str, int]) -> Any:
    if Any in members:
        return value
    # Where NumPy's arrays are welcome as well, they keep their precision.
    is_kept = any(getattr(member, "array_type", None) is np.ndarray for member in members)
    for member in members:
        try:
            fitted = _fitted(member, value, sizes)
        except _Unfit:
            continue
        return value if is_kept else fitted
    raise _Unfit


def _plain(wanted: Any, value: Any) -> Any:
    """The value itself if it is the flag, the number or the instance that is wanted."""
    if wanted is bool:
        return _kept(value, isinstance(value, bool | np.bool_))
    if wanted is int:
        return _kept(value, _is_integer(value))
    if wanted in (float, complex, np.number):
        return _kept(value, _is_number(value))
    if not isinstance(wanted, type):
        return value
    if getattr(wanted, "_is_protocol", False):
        return _kept(value, not isinstance(value, type) and isinstance(value, wanted))
    return _kept(value, isinstance(value, wanted))


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool | np.bool_)


def _is_number(value: Any) -> bool:
    """True for one real number, of any type but that of flags."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return isinstance(value, int | float) and not isinstance(value, bool)
    is_real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    return bool(is_real) and jnp.shape(value) == ()


def _numbers(value: Any) -> jax.Array:
    """An array of JAX from one of NumPy, or from numbers in lists."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise _Unfit from None


def _array(wanted: Any, value: Any, sizes: dict[str, int]) -> Any:
    if "prng_key" in _dtypes(wanted) or wanted.dtypes == ("uint32",):
        return _kept(value, _is_kept_array(value) and isinstance(value, wanted))
    array = value if _is_kept_array(value) else _numbers(value)
    if array.dtype == bool and "bool" not in _dtypes(wanted):
        raise _Unfit
    is_complex = jnp.issubdtype(array.dtype, jnp.complexfloating)
    is_number = is_complex or jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool
    if not is_number or (is_complex and "complex64" not in _dtypes(wanted)):
        raise _Unfit
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    if not is_float and "int32" not in _dtypes(wanted) and "bool" not in _dtypes(wanted):
        array = array.astype(jnp.result_type(float))  # 1 where 1.0 is meant
    if is_float and "float32" not in _dtypes(wanted):
        raise _Unfit
    _check_sizes(wanted.dim_str.split(), array.shape, sizes)
    return jnp.asarray(array)


def _dtypes(wanted: Any) -> tuple[str, ...]:
    every = ("bool", "int32", "float32", "complex64")
    return tuple(wanted.dtypes) if isinstance(wanted.dtypes, tuple | list) else every


def _is_kept_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def _check_sizes(dims: list[str], shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Checks that a shape has the named lengths, each the same wherever its name occurs."""
    if any(d.startswith(("...", "*")) for d in dims):
        if len(shape) < len(dims) - 1:
            raise _Unfit
        dims = dims[: next(i for i, d in enumerate(dims) if d.startswith(("...", "*")))]
    elif len(dims) != len(shape):
        raise _Unfit
    found = dict(sizes)  # a copy: a member of a union that does not fit leaves no sizes behind
    for dim, length in zip(dims, shape):
        is_name = dim.isidentifier() and dim != "_"
        known = int(dim) if dim.isdigit() else found.setdefault(dim, length) if is_name else length
        if known != length:
            raise _Unfit
    sizes.update(found)


def _tree_of(leaf_type: Any, value: Any, sizes: dict[str, int]) -> Any:
    if leaf_type is Any or leaf_type is None:
        return _kept(value, not any(_is_text(leaf) for leaf in jax.tree.leaves(value)))
    return jax.tree.map(lambda leaf: _fitted(leaf_type, leaf, sizes), value)


def _is_text(leaf: Any) -> bool:
    """An array of NumPy that is none for JAX."""
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "USOMm"


def _class_names(wanted: Any) -> list[str]:
    return [getattr(typing.get_origin(m) or m, "__name__", str(m)) for m in _members(wanted)]


def _members(wanted: Any) -> tuple[Any, ...]:
    """The members of a union, with the bounds of type variables in their place."""
    if isinstance(wanted, TypeVar):
        return _members(wanted.__bound__)
    return sum(map(_members, typing.get_args(wanted)), ()) if _is_union(wanted) else (wanted,)


def _is_union(wanted: Any) -> bool:
    return typing.get_origin(wanted) in (typing.Union, types.UnionType)


_WORDS = {
    "bool": "True or False", "int": "an integer", "float": "a real number", "str": "a string",
    "NoneType": "None", "Callable": "a function", "Array": "an array",
}  # fmt: skip


def _sentence(wanted: Any, sizes: dict[str, int]) -> str:
    """The annotation in words."""
    words = [_word(member) for member in _members(wanted)]
    words = list(dict.fromkeys(words))
    lengths = [f"{n} = {size}" for n, size in sizes.items() if any(n in w for w in words)]
    text = " or ".join(words)
    return f"{text} with {', '.join(lengths)}" if lengths else text


def _word(wanted: Any) -> str:
    origin = typing.get_origin(wanted) or wanted
    if isinstance(origin, type) and issubclass(origin, AbstractArray):
        if "prng_key" in _dtypes(origin) or origin.dtypes == ("uint32",):
            return "one random key, as jax.random.key(0)"
        dims = origin.dim_str.split()
        if "..." in origin.dim_str:
            return "an array of real numbers"
        return f"an array ({', '.join(dims)}) of real numbers" if dims else "one real number"
    if origin is typing.Literal:
        return " or ".join(map(repr, typing.get_args(wanted)))
    if isinstance(origin, type) and issubclass(origin, PyTree):
        return "a PyTree of arrays"
    name = _class_names(wanted)[0]
    if name in _WORDS:
        return _WORDS[name]
    article = "an" if name[0] in "AEIOU" else "a"
    return f"{article} {name}"
