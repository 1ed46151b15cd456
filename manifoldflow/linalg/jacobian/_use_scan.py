"""Leaves that every step of a scan uses: each step is one more position of the same use.

The taps of all steps ride along as inputs of the scan, and the factors as outputs, so that the
rows Σ_t Uᵀδ_t are sums over the steps t. A leaf that is carried, or scanned over, changes from
step to step: explicit rows.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from manifoldflow.linalg.jacobian._interpreter import body_of, Interpreter, Site, Value
from manifoldflow.linalg.jacobian._use import rule


@rule("scan")
def _scan(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> list[Value] | None:
    """Interpreter through the body once to list its uses, and scan it with their taps."""
    # All is read before the sites are listed: a name that is not there then costs no other leaf.
    body, length, reverse = (eqn.params[name] for name in ("jaxpr", "length", "reverse"))
    unroll = eqn.params.get("unroll", 1)  # a matter of speed alone
    num_consts, num_carry = _scan_counts(eqn, body_of(body))
    interpreter.give_up(inputs[num_consts:])
    consts = inputs[:num_consts]
    plain = [value.array for value in inputs[num_consts:]]
    carry, xs = plain[:num_carry], plain[num_carry:]

    def step(inner: Interpreter, carry: Any, xs: Any) -> Any:
        values = inner.run(body, consts + [Value(x) for x in (*carry, *xs)])
        inner.give_up(values)
        arrays = [value.array for value in values]
        return arrays[:num_carry], (arrays[num_carry:], inner.records)

    listing = interpreter.within()
    first = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
    jax.eval_shape(lambda c, x: step(listing, c, x), carry, first)
    interpreter.opaque |= listing.opaque
    interpreter.reasons |= listing.reasons
    taps = interpreter.register([_stacked(site, length) for site in listing.sites])
    # Listing only: the plain scan gives the shapes, and no derivative is taken yet.
    if interpreter.taps is None:
        interpreter.records += [None] * len(taps)
        return interpreter.plain(eqn, inputs)

    def tapped(carry: Any, xs_taps: Any) -> Any:
        return step(interpreter.within(xs_taps[1]), carry, xs_taps[0])

    carry, (ys, records) = lax.scan(tapped, carry, (xs, taps), length, reverse, unroll)
    interpreter.records += records
    return [Value(x) for x in (*carry, *ys)]


def _scan_counts(eqn: Any, body: Any) -> tuple[int, int]:
    """The number of inputs of a scan that are constants, and of those that are carried.

    Read from the ranks, since the parameters that tell are others in other versions of JAX: what is
    scanned over, or stacked, has one axis more outside than inside.
    """

    def num_stacked(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        stacked = [out.aval.ndim > val.aval.ndim for out, val in pairs]
        if stacked != sorted(stacked):
            raise ValueError(f"a scan's stacked values must come last, got {stacked}")
        return sum(stacked)

    num_carry = len(eqn.outvars) - num_stacked(eqn.outvars, body.outvars)
    num_scanned = num_stacked(eqn.invars, body.invars)
    return len(eqn.invars) - num_scanned - num_carry, num_carry


def _stacked(site: Site, length: int) -> Site:
    tap = jax.ShapeDtypeStruct((length, *site.tap.shape), site.tap.dtype)
    return site._replace(tap=tap, steps=(length, *site.steps))
