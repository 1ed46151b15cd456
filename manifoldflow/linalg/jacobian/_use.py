"""The uses of a leaf, and their registration for a primitive or a jitted function."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from manifoldflow._errors import described
from manifoldflow._signatures import shown
from manifoldflow.linalg.jacobian._block import AbstractBlock, LeafView
from manifoldflow.linalg.jacobian._interpreter import Interpreter, Rule, times, Value
from manifoldflow.linalg.jacobian._views import is_selection, View


class Equation(NamedTuple):
    """One equation of a model's program, with the values of one example, for `recognise`.

    Args:
        name: the primitive, such as `dot_general`, or the function under `jax.jit`.
        params: the parameters of the primitive. Their names are JAX's, and change with it.
        operands: the arrays that enter.
        output: the array z that leaves.
        is_leaf: for every operand, True if it is a leaf (rearranged or scaled).
        evaluate: maps other operands of the same shapes to their output.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> operands = jnp.ones(2), jnp.arange(2.0)
        >>> equation = linalg.Equation(
        ...     "mul", {}, operands, operands[1], (True, False), jnp.multiply
        ... )
        >>> print(equation.name, equation.is_leaf)
        mul (True, False)
    """

    name: str
    params: dict[str, Any]
    operands: tuple[Array, ...]
    output: Array
    is_leaf: tuple[bool, ...]
    evaluate: Callable[..., Array]


class Recognised(eqx.Module):
    """A use of one operand of an equation, with the values to be kept of each example.

    Args:
        use: the use; all that it holds is static.
        factor: PyTree of arrays, the ingredients of the row beside δ.
        steps: the rearrangement of the operand, if the use does one (see `LeafView`).
        scale: a number by which the rows are multiplied; None for 1.

    Raises:
        ValueError: `use` is not an `AbstractUse`.

    Examples:
        >>> import equinox as eqx
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> class Product(linalg.AbstractPairUse):
        ...     @classmethod
        ...     def recognise(cls, equation, index):
        ...         return linalg.Recognised(cls(), factor=equation.operands[1 - index])
        ...
        ...     def apply(self, weight, factor):
        ...         return weight * factor
        ...
        ...     def inner(self, delta, factor, other_delta, other_factor):
        ...         return jnp.sum(delta * factor * other_delta * other_factor)
        >>> print(linalg.Recognised(Product(), factor=jnp.ones(2)).factor)
        [1. 1.]
    """

    use: "AbstractUse"
    factor: PyTree[Any] = None
    steps: View = ()
    scale: Any = None

    def __check_init__(self):
        if not isinstance(self.use, AbstractUse):
            raise ValueError(
                f"Recognised: use must be an AbstractUse; got {described(self.use)}. In "
                "`recognise(cls, …)`, give cls()."
            )


class AbstractUse(eqx.Module):
    """One way in which a model uses a leaf w: z = U(w; a), whose rows are Uᵀδ.

    Here δ = ∂f/∂z is found by the library and the factor a is named by the use. A subclass holds
    static fields only (`equinox.field(static=True)`), so that equal uses compile once.
    `AbstractPairUse` asks for less: the map U and the inner product of two rows.

    Examples:
        >>> from manifoldflow import linalg
        >>> print(issubclass(linalg.AbstractPairUse, linalg.AbstractUse))
        True
    """

    @classmethod
    @abc.abstractmethod
    def recognise(cls, equation: Equation, index: int) -> Recognised:
        """The use that an equation makes of its operand `index`, which is a leaf.

        Raises:
            NotImplementedError: if the equation is of another form. Explicit rows are then
                kept for this leaf.
        """

    @abc.abstractmethod
    def block(
        self, delta: Float[Array, "n k ..."], factor: PyTree[Array], leaf: LeafView
    ) -> AbstractBlock:
        """The block of n examples.

        Args:
            delta: ∂f/∂z for each of k outputs.
            factor: what `recognise` named, with a leading axis of examples.
            leaf: from the leaf to the operand that was recognised, and back.
        """


class AbstractElementwise(AbstractUse):
    """Rows in the shape of the leaf, which add up whatever entries of the leaf they share."""


class AbstractMatrixUse(AbstractUse):
    """Rows δ ⊗ a of the leaf as (B, F, C): B independent weights, each from C to F numbers."""


Use = TypeVar("Use", bound=type[AbstractUse])

RULES: dict[str, Rule] = {}
"""By primitive: how an equation is evaluated when a leaf enters it."""

# A list, the last one first: functions of one name, as in two files, do not displace each other.
FUNCTIONS: dict[str, list[tuple[Callable[..., Any], type[AbstractUse]]]] = {}
"""By name: functions under `jax.jit` and the use that they make of their arguments."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how primitives pass a leaf on: for what is no use of it."""

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


@shown
def register_use(operation: str | Callable[..., Any]) -> Callable[[Use], Use]:
    """The class decorator that tells how an operation uses a leaf, to spare its explicit rows.

    From then on `structured_jacobian` keeps δ and a for every leaf (or rearranged leaf) that enters
    this operation and is recognised. Several decorators may stand above one class. Register before
    the first Jacobian: programs that were compiled stay as they are. The last use that was
    registered for an operation is the one that counts.

    Args:
        operation: the name of a primitive, as `"reduce_sum"`, or a function of arrays under
            `jax.jit`. A function is known by its name and by its program: under `vmap`, or with
            static arguments, it is not recognised, and what is inside is looked at.

    Returns:
        A decorator for a final subclass of `AbstractUse`, which it gives back as it is.

    Raises:
        ValueError: if the operation is neither, or the class is no `AbstractUse`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> @jax.jit
        ... def stretched(w, a):
        ...     return w * a
        >>> @linalg.register_use(stretched)
        ... class Stretch(linalg.AbstractPairUse):
        ...     @classmethod
        ...     def recognise(cls, equation, index):
        ...         return linalg.Recognised(cls(), factor=equation.operands[1 - index])
        ...
        ...     def apply(self, weight, factor):
        ...         return weight * factor
        ...
        ...     def inner(self, delta, factor, other_delta, other_factor):
        ...         return jnp.sum(delta * factor * other_delta * other_factor)
        >>> jacobian = linalg.structured_jacobian(stretched, jnp.zeros(3), jnp.ones((2, 3)))
        >>> print(jacobian.treatments)
        {'': 'Stretch, summed'}
    """
    is_jitted = hasattr(operation, "lower") and hasattr(operation, "__name__")
    if not isinstance(operation, str) and not is_jitted:
        raise ValueError(
            "register_use: operation must be the name of a primitive or a function under jax.jit; "
            f"got {described(operation)}. Decorate the function with jax.jit."
        )

    def register(kind: Use) -> Use:
        if not (isinstance(kind, type) and issubclass(kind, AbstractUse)):
            raise ValueError(
                "register_use: what is decorated must be a subclass of AbstractUse; got "
                f"{described(kind)}. Derive the class from linalg.AbstractPairUse."
            )
        if isinstance(operation, str):
            RULES[operation] = lambda interpreter, eqn, inputs: met(interpreter, eqn, inputs, kind)
        else:
            FUNCTIONS.setdefault(operation.__name__, []).insert(0, (operation, kind))
        return kind

    return register


def met(
    interpreter: Interpreter,
    eqn: Any,
    inputs: list[Value],
    kind: type[AbstractUse],
    name: str | None = None,
) -> list[Value] | None:
    """Evaluate an equation, with a tap for every leaf that enters and is recognised."""
    outputs = interpreter.plain(eqn, inputs)
    if len(outputs) != 1 or not jnp.issubdtype(jnp.result_type(outputs[0].array), jnp.floating):
        return None  # taps are real
    z = outputs[0].array
    equation = Equation(
        eqn.primitive.name if name is None else name,
        eqn.params,
        tuple(value.array for value in inputs),
        z,
        tuple(value.alias is not None for value in inputs),
        lambda *operands: interpreter.plain(eqn, [Value(x) for x in operands])[0].array,
    )
    for index, value in enumerate(inputs):
        if value.alias is not None:
            z = _tapped(interpreter, z, equation, index, value, kind)
    return [Value(z)]


def _tapped(
    interpreter: Interpreter,
    z: Array,
    equation: Equation,
    index: int,
    value: Value,
    kind: type[AbstractUse],
) -> Array:
    """The output with a tap; without one, and with explicit rows, where a use is not known.

    While uses are listed, an error costs this leaf alone. With taps the interpreter must meet
    what was listed, so that an error ends it.
    """
    try:
        found = _recognised(equation, index, value, kind, interpreter.taps is None)
    except Exception as error:
        if interpreter.taps is not None:
            raise
        text = f"{kind.__name__}: {type(error).__name__}: {error}".splitlines()[0]
        interpreter.give_up([value], None if isinstance(error, NotImplementedError) else text)
        return z
    alias = value.alias._replace(scale=times(value.alias.scale, found.scale))
    return interpreter.tap(z, alias, found.use, found.factor, alias.view + found.steps)


def _recognised(
    equation: Equation, index: int, value: Value, kind: type[AbstractUse], is_listing: bool
) -> Recognised:
    # Rows of a broadcast leaf are sums over the copies, which only rows of its size can show.
    if not issubclass(kind, AbstractElementwise) and not is_selection(value.alias.view):
        raise NotImplementedError(f"{kind.__name__} of a leaf that is repeated")
    found: Any = kind.recognise(equation, index)
    if not isinstance(found, Recognised):
        raise TypeError(f"recognise gave {described(found)}, and no Recognised")
    if is_listing and not kind.__module__.startswith("manifoldflow."):
        _check_products(found, equation, index)
    return found


def _check_products(found: Recognised, equation: Equation, index: int) -> None:
    """The shapes of a foreign block's products, for two examples with two outputs each."""
    operand, z = equation.operands[index], equation.output
    leaf = LeafView(found.steps, jnp.shape(operand))
    weights = jnp.zeros((2, 2), operand.dtype)

    def products(delta: Array) -> dict[str, Array]:
        both = lambda x: jnp.broadcast_to(x, (2, *jnp.shape(x)))
        block = found.use.block(delta, jax.tree.map(both, found.factor), leaf)
        return {
            "mv": block.mv(jnp.zeros(leaf.shape, operand.dtype)),
            "transpose_mv": block.transpose_mv(weights),
            "rows": block.rows(),
            "cross_gram": block.cross_gram(block),
            "norms": block.norms(),
        }

    delta = jax.ShapeDtypeStruct((2, 2, *z.shape), operand.dtype)
    got = {name: x.shape for name, x in jax.eval_shape(products, delta).items()}
    expected = {
        "mv": (2, 2),
        "transpose_mv": leaf.shape,
        "rows": (2, 2, *leaf.shape),
        "cross_gram": (2, 2, 2, 2),
        "norms": (2, 2),
    }
    wrong = [f"{n} of shape {got[n]}, expected {expected[n]}" for n in got if got[n] != expected[n]]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}, for two examples with two outputs each")


def function_use(eqn: Any) -> type[AbstractUse] | None:
    """The use registered for a jitted function, if this call runs that function's program."""
    registered = FUNCTIONS.get(eqn.params.get("name"), [])
    return next((kind for fn, kind in registered if is_call_of(fn, eqn)), None)


def is_call_of(fn: Callable[..., Any], eqn: Any) -> bool:
    """True where an equation runs the program that a jitted function has for these arguments."""
    if eqn.params.get("name") != fn.__name__:
        return False
    try:
        (call,) = jax.make_jaxpr(fn)(*(var.aval for var in eqn.invars)).eqns
        # Two files may have functions of one name, so that the name alone does not tell. Print
        # shows all of a program but its constants: with these only the same object is the same.
        mine, theirs = call.params["jaxpr"], eqn.params["jaxpr"]
        is_same = mine is theirs or (
            not mine.consts and not theirs.consts and str(mine) == str(theirs)
        )
        return bool(is_same and len(call.invars) == len(eqn.invars))
    except Exception:
        return False  # of these arguments it makes no program
