"""SGD for a given time or number of steps, with the same `Solution` as the flows."""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _tree
from manifoldflow._boundary import checked_but
from manifoldflow._clock import AbstractClock, LimitClock, num_steps_for
from manifoldflow._errors import checked_count, is_traced
from manifoldflow._journal import Place
from manifoldflow._results import delivered_solution, Observables, RESULTS, Solution
from manifoldflow._run import checked_observables, meter_of, row_reports, Stationary
from manifoldflow._types import Key, Point
from manifoldflow.losses import AbstractLoss
from manifoldflow.noise import AbstractDataNoise, AbstractStochasticGradient
from manifoldflow.sgd._loop import Problem, steps_of_saves, whole_run
from manifoldflow.sgd._optimizer import checked_optimizer
from manifoldflow.sgd._resume import resumable_run
from manifoldflow.sgd._sam import SAMGradient
from manifoldflow.updates import AbstractUpdate


@checked_but("loss", "noise", "optimizer", "key")
def simulate(
    loss: AbstractLoss,
    noise: AbstractStochasticGradient,
    optimizer: AbstractUpdate | Callable[..., Any],
    point: Point,
    *,
    learning_rate: Any,
    num_steps: int | None = None,
    end_time: Any = None,
    num_saves: int = 1,
    momentum: Any = None,
    observe: Observables | None = None,
    until: Callable[[Point], Any] | Stationary | None = None,
    key: Key,
    progress: bool | dfx.AbstractProgressMeter | Callable[[dict[str, Any]], None] = False,
    checkpoint: Place | None = None,
    resume: Place | None = None,
    throw: bool = True,
) -> Solution:
    """A run of SGD: θₖ₊₁ = θₖ + update of the optimiser for ∇L(θₖ) + noise.

    Step k draws its batch and labels from `jax.random.fold_in(key, k)` alone, so that the result of
    a run does not depend on its saves, on interruptions, or on the runs beside it. It works
    under jit, vmap and grad; repeated calls on new data, rates, keys and points of the same
    shapes do not retrace (another number of steps does).

    `Solution.times` are on the clock of the update, as those of `solve(LimitDiffusion(…, update))`,
    so that both draw into one picture: for SGD on Ση²/(1−β)². Where a bare optimiser has another
    clock or none, they are just that sum: for SAM of radius ρ the clock is kηρ², `times`·ρ²/η at
    constant η.

    Args:
        loss: the loss that SGD lowers.
        noise: draws the stochastic gradients: a noise, or `SAMGradient`.
        optimizer: an update such as `updates.SGD(momentum, weight_decay)`, `updates.Adam()` or
            `updates.SAM(radius)` (all but `updates.LocalSGD`, whose workers need a gradient each;
            Muon, signs and clipping are meant for batches of one example), or a function
            learning rate or schedule ↦ Optax transform: `optax.sgd`, `optax.adam`,
            `lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True)`. Transforms that ask
            for them get `grad_fn`, at this step's batch and labels
            (`lambda rate: optax.contrib.sam(optax.sgd(rate), optax.chain(
            optax.contrib.normalize(), optax.sgd(radius)), opaque_mode=True)`, which divides
            by zero where the gradient vanishes, unlike `SAMGradient`), and `value`,
            `value_fn`, `grad`, where the value is that of the whole loss.
        point: the start.
        learning_rate: η > 0, or an Optax schedule step ↦ η.
        num_steps: the number of steps. Either this or `end_time`.
        end_time: a time on the clock of the update; the run ends with the first step that reaches
            it. With bare optimisers, only for SGD with or without momentum.
        num_saves: saves besides the start, at most `num_steps`; number i comes after
            ⌊i·num_steps/num_saves⌋ steps.
        momentum: the β in [0, 1) of a bare optimiser, heavy-ball or Nesterov. It only tells the
            clock, which then runs (1−β)⁻² faster.
        observe: name → function of a point, evaluated at every save.
        until: a condition to stop early: a predicate of the point, or `Stationary(tolerance)`,
            asked
            after every step. The remaining saves then repeat the final point, and have the time of
            the step that ended the run: in a run until it leaves a set, `times[-1]` is the exit
            time.
        key: one key; `jax.vmap` over many.
        progress: True prints percentages, a Diffrax progress meter shows itself, a
            function is called at every save with a dict: time, coordinates, observables.
        checkpoint: an .npz file, or an `orbax.checkpoint.CheckpointManager`, for the saves so
            far and all that is needed to go on; rewritten after a save, unless that would
            take more than a tenth of the time. If it belongs to this run already, the run
            goes on from there.
        resume: the checkpoint of an earlier run to go on from, which must be there. That run
            may have had fewer steps. The result is that of a run that was never interrupted,
            to the last bit.
        throw: raise when SGD diverges. With `throw=False` look at `solution.result`; what
            was not reached is NaN.

    Returns:
        A `Solution` with `num_saves` + 1 saves. In its `stats`, `num_steps` counts the steps to
        the end or to where `until` has stopped the run, `num_gradients` the draws of
        `noise.gradient`, and `diverged_at` is the step, counted from 0, that led to a coordinate
        that is not finite or 10⁸ times larger than any at the start and than 1; −1 if none did.
        From then on nothing moves.

    Raises:
        ValueError: wrong options, structure or shapes; a noise that does not fit the loss;
            `end_time` for an optimiser whose clock is not known.
        EquinoxRuntimeError: SGD diverged; says at which step, unless inside jit.

    References:
        [LiWangArora2022, Theorem 4.6].

    Examples:
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> import optax
        >>> loss, noise = mf.FunctionLoss(lambda x: jnp.sum(x**2) / 2), mf.IsotropicNoise(std=0.0)
        >>> options = dict(learning_rate=0.1, num_steps=2, num_saves=2, key=jr.key(0))
        >>> run = mf.simulate(loss, noise, optax.sgd, jnp.array([1.0]), **options)
        >>> print(run.points[:, 0].round(3), run.times.round(3), run.clock)
        [1.   0.9  0.81] [0.   0.01 0.02] Ση²/(1−β)²
    """
    _check_kinds(loss, noise)
    coordinates, remainder = loss.split(point)
    dtype = _tree.dtype_of(coordinates)
    beta, clock = 0.0 if momentum is None else momentum, _clock(optimizer, momentum)
    has_end_time = _checked_ends(noise, num_steps, end_time)
    num_steps = (
        num_steps_for(learning_rate, end_time, clock=clock, advice=_EARLIER)
        if has_end_time
        else checked_count("num_steps", num_steps)
    )
    num_saves = checked_count("num_saves", num_saves)
    if num_saves > num_steps:
        raise ValueError(
            f"num_saves={num_saves} exceeds the {num_steps} steps of this run; ask for fewer saves."
        )
    # In double precision on the host: running sums in float32 lose steps after some 10⁵.
    step_times = clock.times(learning_rate, num_steps)
    is_bare = not isinstance(optimizer, AbstractUpdate)
    problem = Problem(
        loss=loss,
        noise=noise,
        optimizer=checked_optimizer(optimizer if is_bare else optimizer.transform),
        learning_rate=_tree.as_pytree_callable(learning_rate)
        if callable(learning_rate)
        else jnp.asarray(learning_rate, dtype),
        remainder=remainder,
        key=_checked_key(key),
        observe=checked_observables(observe),
        meter=meter_of(progress),
        reports=row_reports(progress),
        until=_tree.as_pytree_callable(until) if callable(until) else until,
        # Only an end time needs the clock to be right; an update knows its own.
        clock_gain=1 / (1 - float(beta)) if has_end_time and is_bare else None,
        clock=clock.formula,
    )
    # In float16 the times of neighbouring steps are one number after some 10³ of them.
    time_dtype = jnp.result_type(dtype, jnp.float32)
    times = _at(steps_of_saves(num_steps, num_saves), step_times).astype(time_dtype)
    if checkpoint is None and resume is None:
        solution = whole_run(problem, coordinates, times, num_steps)
    else:
        solution = resumable_run(problem, coordinates, times, num_steps, beta, checkpoint, resume)
    if until is not None:
        solution = _ended(solution, step_times.astype(time_dtype))
    where = lambda: f" It was step {solution.stats['diverged_at']}, counted from 0."
    return delivered_solution(solution, throw, where)


_EARLIER = "Raise the learning rate, ask for an earlier end, or give num_steps instead"


def _check_kinds(loss: Any, noise: Any) -> None:
    if not isinstance(loss, AbstractLoss):
        raise ValueError(
            f"simulate lowers a loss, e.g. LeastSquares(inputs, targets); got a "
            f"{type(loss).__name__}."
        )
    if not isinstance(noise, AbstractStochasticGradient):
        raise ValueError(
            "simulate draws its gradients from a noise, e.g. LabelNoise(std, batch_size), or "
            f"from SAMGradient; got a {type(noise).__name__}. IsotropicNoise(0.0) gives full "
            "gradients."
        )
    if isinstance(noise, AbstractDataNoise):
        # The values of labels: they are not known where gradients are drawn, inside jit.
        noise.checked(loss)


def _checked_ends(noise: Any, num_steps: Any, end_time: Any) -> bool:
    """True where the run ends at a time, False where it ends after a number of steps."""
    if (num_steps is None) == (end_time is None):
        raise ValueError(
            f"simulate needs either num_steps or end_time; got num_steps={num_steps} and "
            f"end_time={end_time}."
        )
    if end_time is not None and isinstance(noise, SAMGradient):
        raise ValueError(
            "SAM runs on the clock kηρ², not on end_time's. Give num_steps instead, "
            "or draw by MinibatchNoise and hand over updates.SAM, which knows that clock."
        )
    return end_time is not None


def _checked_key(key: Any) -> Key:
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if is_typed and shape == ():
        return key
    if dtype == jnp.uint32 and shape is not None and len(shape) == 1:
        return jr.wrap_key_data(key)
    got = "a " + type(key).__name__ if shape is None else f"shape {shape} of {dtype}"
    raise ValueError(
        f"simulate needs one random key, key=jax.random.key(seed); got {got}. For many keys, "
        "vmap over them."
    )


def _clock(optimizer: Any, momentum: Any) -> AbstractClock:
    """The clock of an update, or of SGD with the given momentum."""
    if not isinstance(optimizer, AbstractUpdate):
        return LimitClock(0.0 if momentum is None else momentum)
    if momentum is not None:
        raise ValueError(
            f"simulate takes momentum only beside a bare Optax optimizer; got {momentum!r} beside "
            f"updates.{type(optimizer).__name__}, which knows its own: updates.SGD(momentum=β)."
        )
    return optimizer.clock


def _at(steps: np.ndarray, times: Float[Array, " k"]) -> Float[Array, " saves"]:
    return times[steps] if is_traced(times) else jnp.asarray(np.asarray(times)[steps])


@jax.jit
def _ended(solution: Solution, step_times: Float[Array, " k"]) -> Solution:
    """The solution with the time of the last step at all saves after it, if that was early."""
    last = step_times[solution.stats["num_steps"]]
    is_early = solution.result == RESULTS.stopped_early
    times = jnp.where(is_early, jnp.minimum(solution.times, last), solution.times)
    return eqx.tree_at(lambda s: s.times, solution, times)
