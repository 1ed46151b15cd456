"""What Diffrax steps with: terms, first step and step-size controller of a solve."""

import diffrax as dfx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from manifoldflow._types import Point, Scalar
from manifoldflow.flows._base import AbstractDiffusion, AbstractFlow
from manifoldflow.flows._options import NoiseOptions, Options
from manifoldflow.manifolds._forms import form_of
from manifoldflow.manifolds._on_saves import AdaptiveStepsOnSaves, StepsOnSaves


def terms_of(
    flow: AbstractFlow, point: Point, times: Array, end_time: Scalar, options: Options
) -> dfx.AbstractTerm:
    noise = options.noise
    if noise is None:
        return flow.terms(point)
    assert isinstance(flow, AbstractDiffusion) and options.solver is not None
    smallest = smallest_step(noise, times, end_time)
    if options.whole is not None and options.whole.smallest_step is not None:
        smallest = options.whole.smallest_step
    # One path for the whole time, so that a solve that goes on sees the same noise. Far
    # below the steps, since the tree is only right down to its tolerance.
    path = dfx.VirtualBrownianTree(
        jnp.zeros_like(end_time),
        _whole_time(options, end_time),
        smallest / 4,
        flow.diffusion(point).in_structure(),
        noise.key,
        getattr(options.solver, "minimal_levy_area", dfx.BrownianIncrement),
    )
    return flow.terms(point, path, form=form_of(options.solver))


def _whole_time(options: Options, end_time: Scalar) -> Scalar:
    return end_time if options.whole is None else options.whole.end_time


def smallest_step(noise: NoiseOptions, times: Array, end_time: Scalar) -> Scalar:
    if noise.is_adaptive:
        return end_time / 2**14
    return jnp.min(jnp.diff(noise.legs(times, end_time))) / noise.num_steps


def first_step(times: Array, end_time: Scalar, options: Options) -> Scalar | None:
    """A thousandth of the way to the first save: adaptive steps soon find their size from there.

    A better guess would need the drift, which is most of what has to be compiled. Later saves
    have no say, so that a solve that was asked for fewer can go on to them.
    """
    if options.noise is not None:
        return _whole_time(options, end_time) / 1000 if options.noise.is_adaptive else None
    if options.step_size is not None:
        return options.step_size
    step = (times[1] - times[0]) / 1000
    # The first save may be at the start.
    step = jnp.where(step > 0, step, end_time / 1000)
    if options.whole is not None:
        step = jnp.where(options.whole.first_step > 0, options.whole.first_step, step)
    return jax.lax.stop_gradient(jnp.minimum(step, end_time))


def controller_of(
    options: Options, times: Array, end_time: Scalar, has_manifold: bool
) -> dfx.AbstractStepSizeController:
    noise = options.noise
    if noise is not None and not noise.is_adaptive:
        return dfx.StepTo(ts=noise.step_times(times, end_time))
    ends = jnp.append(times, end_time)
    if options.step_size is not None:
        return StepsOnSaves(ends) if has_manifold else dfx.ConstantStepSize()
    if noise is None:
        smallest = jnp.finfo(end_time.dtype).eps * end_time
        controller = dfx.PIDController(
            options.rtol, options.atol, dtmin=smallest, force_dtmin=False
        )
        # In the whole space saves are interpolated.
        return AdaptiveStepsOnSaves(controller, ends) if has_manifold else controller
    # Steps end on the saves: between them the path is rough. Rejected steps are revisited,
    # without which adaptive steps would bias the law of the noise.
    whole = _whole_time(options, end_time)
    smallest = whole / 2**12
    controller = dfx.PIDController(
        options.rtol, options.atol, pcoeff=0.1, icoeff=0.3, dtmin=smallest, dtmax=whole / 10
    )
    return dfx.ClipStepSizeController(controller, step_ts=times, store_rejected_steps=100)


def max_steps_of(options: Options, times: Array) -> int:
    if options.noise is None or options.noise.is_adaptive:
        return options.max_steps
    return options.noise.num_steps * len(times) + 1
