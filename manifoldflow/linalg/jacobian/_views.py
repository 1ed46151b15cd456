"""Leaves rearranged by static steps, and which of their entries are seen: without a number.

Tied tables are large, so that two views are compared by their strides alone: an axis is a
list of digits, and entry Σ digit·stride + offset of the leaf stands where the digits say.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

View = tuple[tuple[Any, ...], ...]
"""Static steps that rearrange a leaf; hashable, so that equal models compile once."""

Digits = tuple[tuple[int, int], ...]
"""(size, stride) of each digit, the most significant first; no size is one."""


def apply_view(view: View, leaf: Array) -> Array:
    """Rearrange a leaf by static steps."""
    for name, *args in view:
        leaf = _STEPS[name](leaf, *args)
    return leaf


def pull_view(view: View, shape: tuple[int, ...], value: Array) -> Array:
    """The transpose of `apply_view`: from the rearranged value back to the leaf."""
    leaf = jax.ShapeDtypeStruct(shape, value.dtype)
    # By JAX's own transpose: entries that a broadcast repeats are summed.
    return jax.linear_transpose(lambda x: apply_view(view, x), leaf)(value)[0]


def is_selection(view: View) -> bool:
    """True where the view moves entries to one place at most, so that it keeps inner products."""
    return all(name != "broadcast" for name, *_ in view)


def ints(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


class Entries(NamedTuple):
    """The entry of a leaf at every place: equal digits of all axes mean equal entries."""

    offset: int
    axes: Any  # a tuple of Digits, or None where digits cannot tell
    seen: Digits  # covers every entry in view, in no order

    def is_apart_from(self, other: "Entries") -> bool:
        """True where it is certain that the two share no entry."""
        return _are_apart((self.offset, self.seen), (other.offset, other.seen))


def entries_of(view: View, shape: tuple[int, ...]) -> Entries:
    """The entries of a leaf of this shape that a view shows."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axes = tuple(_merged([digit]) for digit in zip(shape, strides))
    entries = _NOTHING if 0 in shape else Entries(0, axes, sum(axes, ()))
    for name, *args in view:
        if entries.axes is not None:
            entries = _ENTRY_STEPS[name](entries, *args)
    return entries._replace(seen=_by_stride(entries.seen))


def _merged(digits: Any) -> Digits:
    """The one shortest list of digits that counts alike."""
    merged: list[tuple[int, int]] = []
    for size, stride in digits:
        if merged and merged[-1][1] == size * stride:
            size *= merged.pop()[0]
        if size != 1:
            merged.append((size, stride))
    return tuple(merged)


def _size(digits: Digits) -> int:
    return math.prod(size for size, _ in digits)


_NOTHING = Entries(0, None, ((0, 1),))


def _transposed(entries: Entries, permutation: tuple[int, ...]) -> Entries:
    return entries._replace(axes=tuple(entries.axes[axis] for axis in permutation))


def _broadcast(entries: Entries, shape: Any, dims: Any) -> Entries:
    axes = [_merged([(size, 0)]) for size in shape]
    for axis, digits in zip(dims, entries.axes, strict=True):
        axes[axis] = digits or axes[axis]
    return entries._replace(axes=tuple(axes))


def _reshaped(entries: Entries, shape: tuple[int, ...]) -> Entries:
    """Deal the digits out to the new axes, the last ones first."""
    rest, axes = list(_merged(sum(entries.axes, ()))), []
    for needed in reversed(shape):
        taken: list[tuple[int, int]] = []
        while needed > 1:
            if not rest:
                return entries._replace(axes=None)
            size, stride = rest.pop()
            part = math.gcd(size, needed)
            # A digit that neither fits into the axis nor is filled by it has no digits on its own.
            if part < size and part < needed:
                return entries._replace(axes=None)
            if part < size:
                rest.append((size // part, stride * part))
            taken.insert(0, (part, stride))
            needed //= part
        axes.insert(0, _merged(taken))
    return entries._replace(axes=tuple(axes))


def _sliced(entries: Entries, low: Any, high: Any, by: Any) -> Entries:
    offset, axes = entries.offset, []
    for digits, start, stop, step in zip(entries.axes, low, high, by or (1,) * len(low)):
        count = len(range(start, stop, step))
        if count == 0:
            return _NOTHING
        found = _slice_of_digits(digits, start, count, step)
        if found is None:
            return entries._replace(axes=None)
        offset += found[0]
        axes.append(found[1])
    return Entries(offset, tuple(axes), sum(axes, ()))


def _slice_of_digits(digits: Digits, start: int, count: int, step: int) -> Any:
    """(offset, digits) of `count` places from `start` on; None where digits cannot tell."""
    if count == _size(digits):
        return 0, digits
    stride, rest = digits[0][1], digits[1:]
    if not rest:
        return start * stride, _merged([(count, step * stride)])
    inner = _size(rest)
    if step == 1 and start % inner == 0 and count % inner == 0:
        return start // inner * stride, _merged([(count // inner, stride), *rest])
    if start // inner == (start + step * (count - 1)) // inner:
        found = _slice_of_digits(rest, start % inner, count, step)
        return found and (start // inner * stride + found[0], found[1])
    return None


def _by_stride(digits: Digits) -> Digits:
    """Digits that change the entry, the longest strides first: the order does not matter."""
    moving = [(size, stride) for size, stride in digits if stride != 0]
    return _merged(sorted(moving, key=lambda digit: -digit[1]))


Progression = tuple[int, Digits]


def _are_apart(first: Progression, other: Progression) -> bool:
    """True where {offset + Σ digit·stride} are certainly disjoint.

    Below a stride that divides all longer ones both sets are products of multiples of it and
    remainders, if these do not carry over: apart if the multiples are, or the remainders.
    """
    if _is_empty(first) or _is_empty(other) or _lie_apart(first, other):
        return True
    strides = sorted({stride for _, digits in (first, other) for _, stride in digits})
    # The least stride has nothing below it that could be told apart.
    for modulus in strides[1:]:
        parts = [_split(progression, modulus) for progression in (first, other)]
        if None not in parts and any(_are_apart(*pair) for pair in zip(*parts)):
            return True
    return False


def _is_empty(progression: Progression) -> bool:
    return any(size == 0 for size, _ in progression[1])


def _lie_apart(first: Progression, other: Progression) -> bool:
    """Disjoint because one ends before the other begins, or by their remainders."""
    (start, stop), (begin, end) = _range(first), _range(other)
    step = math.gcd(*(stride for _, digits in (first, other) for _, stride in digits))
    remainder = (first[0] - other[0]) % step if step else first[0] - other[0]
    return stop < begin or end < start or remainder != 0


def _range(progression: Progression) -> tuple[int, int]:
    offset, digits = progression
    return offset, offset + sum((size - 1) * stride for size, stride in digits)


def _split(progression: Progression, modulus: int) -> tuple[Progression, Progression] | None:
    """The multiples of a modulus and the remainders; None where remainders carry over."""
    offset, digits = progression
    long = tuple((size, stride) for size, stride in digits if stride >= modulus)
    short = (offset % modulus, digits[len(long) :])
    if any(stride % modulus for _, stride in long) or _range(short)[1] >= modulus:
        return None
    return (offset - offset % modulus, long), short


_STEPS: dict[str, Callable[..., Array]] = {
    "transpose": lax.transpose,
    "reshape": jnp.reshape,
    "broadcast": lax.broadcast_in_dim,
    "slice": lax.slice,
}
_ENTRY_STEPS: dict[str, Callable[..., Entries]] = {
    "transpose": _transposed,
    "reshape": _reshaped,
    "broadcast": _broadcast,
    "slice": _sliced,
}
