"""Derivatives that a solve does not have are refused by a sentence that names what has them."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest

import manifoldflow as mf
from checks import close, refused
from manifoldflow._modes import backwards_only, forwards_only

X = jnp.array([0.5, 1.0, 2.0])
CIRCLE = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
FLOW = mf.RiemannianGradientFlow(CIRCLE, lambda x: x[0] + x[1] ** 2)


def once(x):
    return jnp.sum(backwards_only(x, forwards="forwards!", twice="twice!") ** 3)


def ahead(x):
    return jnp.sum(forwards_only(x**3, backwards="backwards!"))


def solved(x, adjoint=None):
    return mf.solve(FLOW, x, end_time=0.2, adjoint=adjoint).final[0]


def forwards(fn):
    return {
        "jvp": lambda x: jax.jvp(fn, (x,), (x,)),
        "under jit": lambda x: jax.jit(lambda x: jax.jvp(fn, (x,), (x,)))(x),
        "of jit": lambda x: jax.jvp(jax.jit(fn), (x,), (x,)),
        "jacfwd": jax.jacfwd(fn),
        "hessian": jax.hessian(fn),
        "hessian under jit": jax.jit(jax.hessian(fn)),
    }


def twice(fn):
    first = jax.grad(fn)
    return {
        "grad of grad": jax.grad(lambda x: jnp.sum(first(x))),
        "under jit": jax.jit(jax.grad(lambda x: jnp.sum(first(x)))),
        "of jit": jax.grad(lambda x: jnp.sum(jax.jit(first)(x))),
        "jacrev": jax.jacrev(first),
    }


def backwards(fn):
    return {
        "grad": jax.grad(fn),
        "under jit": jax.jit(jax.grad(fn)),
        "of jit": jax.grad(jax.jit(fn)),
        "jacrev": jax.jacrev(fn),
    }


def test_what_is_marked_is_what_it_was_the_way_it_may_go():
    for gradient in (jax.grad(once), jax.jit(jax.grad(once)), jax.grad(jax.checkpoint(once))):
        close("grad", gradient(X), 3 * X**2, 1e-12)
    pair = jnp.stack([X, 2 * X])
    close("vmap", jax.vmap(jax.grad(once))(pair), 3 * pair**2, 1e-12)
    close("value", once(X), jnp.sum(X**3), 1e-12)
    close("forwards", jax.jit(jax.jacfwd(ahead))(X), 3 * X**2, 1e-12)
    close("twice", jax.jacfwd(jax.jacfwd(ahead))(X), jnp.diag(6 * X), 1e-12)
    close("vmap", jax.vmap(jax.jacfwd(ahead))(pair), 3 * pair**2, 1e-12)


@pytest.mark.quick
@pytest.mark.parametrize("way", forwards(once))
def test_marked_arrays_refuse_forward_mode(way):
    with refused(ValueError, "twice!" if way == "hessian under jit" else "forwards!"):
        forwards(once)[way](X)


@pytest.mark.parametrize("way", twice(once))
def test_marked_arrays_refuse_reverse_mode_twice(way):
    with refused(ValueError, "twice!"):
        twice(once)[way](X)


@pytest.mark.parametrize("way", backwards(ahead))
def test_marked_arrays_refuse_reverse_mode(way):
    with refused(ValueError, "backwards!"):
        backwards(ahead)[way](X)


@pytest.mark.parametrize("way", forwards(solved))
def test_a_solve_refuses_forward_mode_by_default(way):
    words = "adjoint=diffrax.ForwardMode()", "adjoint=diffrax.DirectAdjoint()"
    if way == "hessian under jit":  # JAX itself is faster; the boundary translates it
        words = "mf.solve itself", "adjoint=diffrax.DirectAdjoint()"
    with refused(ValueError, *words):
        forwards(solved)[way](X)


@pytest.mark.parametrize("way", twice(solved))
def test_a_solve_refuses_reverse_mode_twice_by_default(way):
    words = "first derivatives", "adjoint=diffrax.DirectAdjoint()", "adjoint=diffrax.ForwardMode()"
    with refused(ValueError, *words):
        twice(solved)[way](X)


@pytest.mark.parametrize("way", backwards(solved))
def test_a_solve_forwards_refuses_reverse_mode(way):
    with refused(ValueError, "forwards only", "`adjoint`", "adjoint=diffrax.DirectAdjoint()"):
        backwards(lambda x: solved(x, dfx.ForwardMode()))[way](X)


def test_derivatives_in_what_a_flow_holds_are_refused_alike():
    def of_data(weight):
        flow = mf.RiemannianGradientFlow(CIRCLE, jax.tree_util.Partial(jnp.dot, weight))
        return mf.solve(flow, X, end_time=0.2).final[0]

    with refused(ValueError, "adjoint=diffrax.ForwardMode()"):
        jax.jvp(of_data, (X,), (X,))
    with refused(ValueError, "adjoint=diffrax.ForwardMode()"):
        jax.jvp(lambda t: mf.solve(FLOW, X, end_time=t).final[0], (0.2,), (1.0,))


def test_what_the_sentences_name_has_these_derivatives():
    backward = jax.jit(jax.grad(solved))(X)

    def first(x):
        slope = jax.jacfwd(lambda x: solved(x, dfx.ForwardMode()))(x)
        return slope, slope

    # Both derivatives from one program.
    bend, forward = jax.jit(jax.jacfwd(first, has_aux=True))(X)
    close("first", forward, backward, 1e-6)
    few = lambda x: mf.solve(
        FLOW, x, end_time=0.2, adjoint=dfx.DirectAdjoint(), max_steps=16
    ).final[0]
    second = jax.jit(jax.jacrev(jax.grad(few)))(X)
    close("second", bend, second, 1e-6)
