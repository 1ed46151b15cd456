"""One call that says what is known about a trained network."""

import math
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np

from manifoldflow import _tree
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_count, checked_positive, is_traced
from manifoldflow._types import Key, Point
from manifoldflow.diagnostics._entries import LeafTrace, LeftOut, mean_of, Quantity
from manifoldflow.diagnostics._passes import (
    curvature_samples,
    gradient_of,
    top_eigenvalues,
    trace_samples,
)
from manifoldflow.diagnostics._rows import bytes_of_rows, rate_of_fall, Rows, rows_of
from manifoldflow.diagnostics._stability import threshold_of
from manifoldflow.losses import AbstractExampleLoss, AbstractLoss, AbstractResidualLoss
from manifoldflow.symmetry import balance

# Samples are made so many at a time, until there are enough or the time is over; at least so many.
_DRAWS, _LEAST = 8, 16
# Shares of the time: samples of traces; products for eigenvalues.
_SAMPLING, _PRODUCTS = 0.25, 0.4
# Lanczos' method takes about so many products for a few eigenvalues.
_NUM_PRODUCTS = 60
# A point that is nearer than this to a zero-loss manifold, relative to its length, is on it.
_NEAR = 1e-2


class Report(eqx.Module):
    """What is known about a trained network; prints as a table.

    Attributes:
        quantities: by name, in the order of the table. G is the Gauss-Newton matrix.
        leaves: the parts of tr G of all leaves of the model.
        left_out: what is not there, and why.
        eigenvalues: of G; all that are not zero if `is_whole`, else a few of the largest.
        is_whole: whether all eigenvalues are known.
    """

    quantities: dict[str, Quantity] = eqx.field(static=True)
    leaves: tuple[LeafTrace, ...] = eqx.field(static=True)
    left_out: tuple[LeftOut, ...] = eqx.field(static=True)
    eigenvalues: tuple[float, ...] = eqx.field(static=True)
    is_whole: bool = eqx.field(static=True)

    def __getitem__(self, name: str) -> Quantity:
        if name in self.quantities:
            return self.quantities[name]
        for one in self.left_out:
            if one.name == name:
                raise KeyError(f"The report leaves out {name!r}: {one.reason}")
        raise KeyError(f"The report has no {name!r}; it has {', '.join(self.quantities)}.")

    def __str__(self) -> str:
        lines = [*self.quantities.values(), *self.left_out]
        if self.leaves:
            lines += ["tr G by leaf:", *self.leaves]
        return "\n".join(str(line).rstrip() for line in lines)


@checked_but("loss")
def report(
    loss: AbstractLoss,
    point: Point,
    *,
    learning_rate: Any = None,
    batch_size: int = 1,
    num_samples: int = 64,
    num_eigenvalues: int = 2,
    max_rows: int = 2000,
    memory: int = 2**30,
    seconds: Any = 10.0,
    key: Key | None = None,
) -> Report:
    """What is known about a trained network: flatness, its noise, and whether η suits it.

    Any loss and any architecture. Every number has its uncertainty. G = JᵀWJ is the
    Gauss-Newton matrix of the mean over examples, J = ∂f the derivative of the outputs and
    W = ∂²ℓ/∂f² at the present ones; for cross-entropies of logits W is the Fisher matrix. Where G
    has at most `max_rows` rows, all of its spectrum is computed, exactly. Else traces are means
    over samples, one backward pass each, and a few eigenvalues come from products.

    Args:
        loss: `LeastSquares`, `PerExampleLoss` with any labels; others have less to say.
        point: the model.
        learning_rate: η of SGD, to be judged; None for no judgement.
        batch_size: B of SGD.
        num_samples: of traces, at most.
        num_eigenvalues: of the largest, where not all are computed.
        max_rows: examples × outputs up to which the spectrum is computed exactly.
        memory: bytes that rows and their Gram matrix may take.
        seconds: about the time that sampling and products may take, compilation aside. What takes
            longer is done on fewer examples, or left out.
        key: of the samples; None for one that is always the same.

    Returns:
        A `Report`. `print(report)` shows it, `plotting.plot_report` draws it,
        `report["trace of G"].value` is one of its numbers.

    Raises:
        ValueError: wrong options; a call inside jit or vmap.

    Example:
        >>> loss = mf.PerExampleLoss(
        ...     images, labels, optax.softmax_cross_entropy_with_integer_labels
        ... )
        >>> print(mf.report(loss, model, learning_rate=0.1, batch_size=32))

    References:
        [LiWangArora2022; MulayoffMichaeli2024].
    """
    if not isinstance(loss, AbstractLoss):
        raise ValueError(
            f"report needs a loss, e.g. PerExampleLoss(inputs, labels, loss_fn); got "
            f"{type(loss).__name__}."
        )
    if is_traced((loss, point)):
        raise ValueError("report writes a table from numbers: call it outside jit and vmap.")
    rate = learning_rate
    if rate is not None:
        rate = float(checked_positive("report: learning_rate", learning_rate))
    options = _Options(
        rate,
        checked_count("report: batch_size", batch_size),
        checked_count("report: num_samples", num_samples),
        checked_count("report: num_eigenvalues", num_eigenvalues),
        checked_count("report: max_rows", max_rows),
        checked_count("report: memory", memory),
        float(checked_positive("report: seconds", seconds)),
        jr.key(0) if key is None else key,
    )
    if isinstance(loss, AbstractExampleLoss) and options.batch_size > loss.num_examples:
        raise ValueError(
            f"report: batch_size must be from 1 to {loss.num_examples}, the number of examples; "
            f"got {batch_size}."
        )
    writer = _Writer(loss, point, options)
    writer.write()
    return Report(
        dict((q.name, q) for q in writer.quantities),
        tuple(writer.leaves),
        tuple(writer.left_out),
        tuple(writer.eigenvalues),
        writer.rows is not None,
    )


class _Options(eqx.Module):
    learning_rate: float | None
    batch_size: int
    num_samples: int
    num_eigenvalues: int
    max_rows: int
    memory: int
    seconds: float
    key: Key


class _Writer:
    """Collects the lines of a report, one section after the other."""

    def __init__(self, loss: AbstractLoss, point: Point, options: _Options):
        self.loss, self.point, self.options = loss, point, options
        self.quantities: list[Quantity] = []
        self.leaves: list[LeafTrace] = []
        self.left_out: list[LeftOut] = []
        self.eigenvalues: list[float] = []
        self.rows: Rows | None = None
        self.seconds_of_gradient = 0.0
        self.data_gradient = math.nan
        self.reason = ""  # why there are no rows

    def write(self) -> None:
        coordinates, _ = self.loss.split(self.point)
        self.add("coordinates", _tree.size(coordinates), None, "D, numbers that may move")
        if isinstance(self.loss, AbstractExampleLoss):
            self._rows(self.loss)
            self._gradient(self.loss)
            self._traces(self.loss)
        else:
            self._plain()
        self._curvature()
        self._eigenvalues()
        if isinstance(self.loss, AbstractExampleLoss):
            self._stability(self.loss)
            self._limit(self.loss)
            self._balanced(self.loss)

    def add(self, name: str, value: Any, error: Any, how: str) -> None:
        error = None if error is None else float(error)
        self.quantities.append(Quantity(name, float(value), error, how))

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out.append(LeftOut(name, reason))

    def value(self, name: str) -> float:
        return next((q.value for q in self.quantities if q.name == name), math.nan)

    def _rows(self, loss: AbstractExampleLoss) -> None:
        """The whole spectrum, where there is room for it."""
        outputs = eqx.filter_eval_shape(lambda loss, point: loss.outputs(point), loss, self.point)
        count, most = math.prod(outputs.shape), self.options.max_rows
        if count > most:
            self.reason = f"{count} examples × outputs, more than max_rows={most}"
            return
        needed = bytes_of_rows(loss, self.point)
        if needed > self.options.memory:
            self.reason = f"rows of {needed} bytes, more than memory={self.options.memory}"
            return
        self.rows = rows_of(loss, self.point)

    def _gradient(self, loss: AbstractExampleLoss) -> None:
        found = jax.block_until_ready(gradient_of(loss, self.point))
        began = time.perf_counter()
        jax.block_until_ready(gradient_of(loss, self.point))
        self.seconds_of_gradient = time.perf_counter() - began
        self.data_gradient = float(found.of_data)
        self.add("loss", found.loss, None, "")
        self.add("gradient", math.sqrt(float(found.norm_squared)), None, "‖∇L‖")

    def _traces(self, loss: AbstractExampleLoss) -> None:
        part = self._affordable(loss, _SAMPLING * self.options.seconds / _LEAST)
        samples = self._sampled(lambda keys: trace_samples(loss, self.point, keys, part))
        squares = np.concatenate([np.asarray(s.squares, float) for s in samples])
        spread = np.concatenate([np.asarray(s.spread, float) for s in samples])
        count, size = loss.num_examples, self.options.batch_size
        of = "" if part == count else f" on {part} of {count} examples each"
        how = f"{len(squares)} passes with random labels{of}"
        trace, error = mean_of(squares.sum(axis=1))
        if self.rows is not None:
            trace, error, how = np.sum(np.asarray(self.rows.eigenvalues, float)), None, "exact"
        self.add("trace of G", trace, error, f"tr JᵀWJ; {how}")
        means, errors = mean_of(squares)
        coordinates, _ = loss.split(self.point)
        named = jax.tree_util.tree_leaves_with_path(coordinates)
        for (path, leaf), mean, wrong in zip(named, means, errors, strict=True):
            name = jax.tree_util.keystr(path) or "the point"
            self.leaves.append(LeafTrace(name, leaf.size, float(mean), float(wrong)))
        mean, error = mean_of(spread)
        # From the spread of single gradients to that of means of B without replacement.
        factor = (count - size) / (size * max(count - 1, 1))
        how = f"tr Σ of batches of {size}; {len(spread)} passes with random signs{of}"
        self.add(
            "gradient noise", max(factor * (mean - self.data_gradient), 0), factor * error, how
        )

    def _sampled(self, draw: Callable[[Any], Any]) -> list[Any]:
        """At least two calls; then until there are enough samples or the time is over."""
        keys = jr.split(self.options.key, max(2 * _DRAWS, self.options.num_samples))
        chunks = keys[: len(keys) // _DRAWS * _DRAWS].reshape(-1, _DRAWS)
        samples, end = [jax.block_until_ready(draw(chunks[0]))], math.inf
        for chunk in chunks[1:]:
            began = time.perf_counter()
            samples.append(jax.block_until_ready(draw(chunk)))
            took = time.perf_counter() - began
            end = min(end, began + _SAMPLING * self.options.seconds)
            if time.perf_counter() + took > end:
                break
        return samples

    def _affordable(self, loss: AbstractExampleLoss, seconds: float) -> int:
        """The number of examples whose gradient takes no longer than that."""
        share = min(1.0, seconds / max(self.seconds_of_gradient, 1e-9))
        return min(loss.num_examples, max(16, int(share * loss.num_examples)))

    def _plain(self) -> None:
        value, gradient = eqx.filter_jit(lambda l, p: (l(p), l.gradient(p)))(self.loss, self.point)
        self.add("loss", value, None, "")
        self.add("gradient", _tree.norm(gradient), None, "‖∇L‖")
        for name in ("trace of G", "gradient noise", "largest stable learning rate"):
            self.leave_out(name, f"{type(self.loss).__name__} has no examples")

    def _curvature(self) -> None:
        name, loss, part = "trace of the Hessian", self.loss, 0
        if isinstance(loss, AbstractExampleLoss):
            part = self._affordable(loss, _SAMPLING * self.options.seconds / _LEAST / 2)
        try:
            found = self._sampled(lambda keys: curvature_samples(loss, self.point, keys, part))
        except (TypeError, NotImplementedError) as error:
            self.leave_out(name, f"no derivatives forwards: {str(error).splitlines()[0]}")
            return
        samples = np.concatenate([np.asarray(s, float) for s in found])
        mean, error = mean_of(samples)
        if not isinstance(loss, AbstractExampleLoss):
            self.add(name, mean, error, f"tr ∇²L; {len(samples)} random directions")
            return
        trace = next(q for q in self.quantities if q.name == "trace of G")
        decay = 0 if loss.weight_decay is None else float(loss.weight_decay)
        total = trace.value + mean + decay * self.value("coordinates")
        of = "" if part == loss.num_examples else f" on {part} examples each"
        how = f"tr ∇²L: tr G and the curvature of f along {len(samples)} random directions{of}"
        self.add(name, total, math.hypot(trace.standard_error or 0.0, error), how)

    def _eigenvalues(self) -> None:
        name, count = "largest eigenvalue", self.options.num_eigenvalues
        if self.rows is not None:
            values = np.asarray(self.rows.eigenvalues, float)[::-1]
            rounding = float(np.finfo(self.rows.eigenvalues.dtype).eps) * values[0]
            rank = int(self.rows.rank)
            self.eigenvalues = values[:rank].tolist()
            self.add(name, values[0], rounding, "λ₁ of G; exact")
            dimension = int(self.value("coordinates")) - rank
            self.add(
                "rank", rank, None, f"of G, of {len(values)} rows; dimension {dimension} is flat"
            )
            if rank:
                how = "of G, that is not zero; exact"
                self.add("smallest eigenvalue", values[rank - 1], len(values) * rounding, how)
            return
        loss, of, how = self.loss, "∇²L", ""
        if isinstance(loss, AbstractExampleLoss):
            loss, how = self._fewer(loss)
            of = "G"
            for left_out in ("rank", "smallest eigenvalue"):
                self.leave_out(left_out, self.reason)
        found = top_eigenvalues(loss, self.point, min(count, self._most_eigenvalues()))
        self.eigenvalues = np.asarray(found.values, float).tolist()
        residual = float(found.residuals[0])
        if not bool(found.is_successful):
            self.leave_out(name, f"not found to tolerance: residual {residual:.2g}")
            return
        self.add(
            name, found.values[0], residual, f"λ₁ of {of}; {int(found.num_steps)} products{how}"
        )

    def _most_eigenvalues(self) -> int:
        size = int(self.value("coordinates"))
        return size if size <= 64 else max(1, size // 5 - 1)

    def _fewer(self, loss: AbstractExampleLoss) -> tuple[AbstractExampleLoss, str]:
        """As many examples as the time is enough for."""
        count = self._affordable(loss, _PRODUCTS * self.options.seconds / _NUM_PRODUCTS)
        if count == loss.num_examples:
            return loss, ""
        chosen = jr.permutation(jr.fold_in(self.options.key, 2), loss.num_examples)[:count]
        return loss.select(chosen), f", on {count} of {loss.num_examples} examples"

    def _stability(self, loss: AbstractExampleLoss) -> None:
        name, size = "largest stable learning rate", self.options.batch_size
        rate, top = self.options.learning_rate, self.value("largest eigenvalue")
        if self.rows is not None:
            found, result = threshold_of(self.rows.gram, loss.num_examples, size)
            threshold = float(found)
            if math.isnan(threshold):
                self.leave_out(name, str(type(result)[result]))
                return
            self.add(name, threshold, None, f"η* of SGD with batches of {size}, in the mean square")
        else:
            threshold = 2 / top
            self.add(name, threshold, None, "2/λ₁: of full batches; smaller ones have less")
        if rate is None:
            return
        how = f"η/η*: {'stable' if rate < threshold else 'NOT STABLE'} at η = {rate:g}"
        self.add("learning rate", rate / threshold, None, how)
        least = self.value("smallest eigenvalue")
        if not math.isnan(least):
            self.add("steps to arrive", 1 / (rate * least), None, "1/(ηλ_min), of phase one")

    def _limit(self, loss: AbstractExampleLoss) -> None:
        name = "rate of the limit"
        if not isinstance(loss, AbstractResidualLoss):
            reason = "no zero-loss manifold of this loss; see OutputManifold for its level sets"
            self.leave_out(name, reason)
            return
        if self.rows is None:
            self.leave_out(name, self.reason)
            return
        distance, length = float(self.rows.distance), float(_tree.norm(loss.split(self.point)[0]))
        self.add("distance", distance, None, "to the zero-loss manifold, to first order")
        if not distance <= _NEAR * length:
            self.leave_out(
                name, f"the model is not near the zero-loss manifold: {distance:.2g} away"
            )
            return
        fall, strength = (float(x) for x in rate_of_fall(loss, self.point))
        how = "−d tr∇²L/dt = c/4·‖P∇tr∇²L‖², t = kη², for label noise of deviation 1, B = 1"
        self.add(name, fall, None, how)
        trace = self.value("trace of G")
        if fall > 0:
            self.add("end time", trace / fall, None, "to walk: at this rate tr∇²L would be gone")
        rate = self.options.learning_rate
        if rate is not None:
            how = "ηc/4·tr∇²L, above the minimum under that noise"
            self.add("excess loss", rate * strength / 4 * trace, None, how)

    def _balanced(self, loss: AbstractExampleLoss) -> None:
        """The same again in the gauge of least norm: sharpness alone depends on it."""
        name = "balanced trace of G"
        try:
            balanced = balance(self.point, loss, kind="norm")
        except (ValueError, eqx.EquinoxRuntimeError) as error:
            self.leave_out(name, str(error).splitlines()[0])
            return
        other = _Writer(loss, balanced, self.options)
        other.rows = None if self.rows is None else rows_of(loss, balanced)
        other.reason = self.reason
        other.add("coordinates", self.value("coordinates"), None, "")
        other._gradient(loss)
        other._traces(loss)
        other._eigenvalues()
        for quantity in ("trace of G", "largest eigenvalue", "gradient noise"):
            found = [q for q in other.quantities if q.name == quantity]
            for q in found:
                how = f"with layers balanced to the least norm; {q.how}"
                self.add(f"balanced {q.name}", q.value, q.standard_error, how)
