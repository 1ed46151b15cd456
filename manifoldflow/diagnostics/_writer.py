"""The sections of a report, one after the other."""

import math
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np

from manifoldflow import _tree
from manifoldflow._errors import name_of, of_jax, refuse_nonfinite
from manifoldflow._results import RESULTS
from manifoldflow._types import Key, Point
from manifoldflow.diagnostics._chunks import Chunks, GaussNewton, Gradient
from manifoldflow.diagnostics._entries import (
    bytes_in_words,
    LeafTrace,
    LeftOut,
    mean_of,
    Quantity,
)
from manifoldflow.diagnostics._finite import refuse_infinite
from manifoldflow.diagnostics._gauge import least_norm
from manifoldflow.diagnostics._kinks import kinks_of
from manifoldflow.diagnostics._krylov import top_eigenvalues
from manifoldflow.diagnostics._passes import (
    curvature_sample,
    hessian_product,
    outputs_at,
    trace_sample,
)
from manifoldflow.diagnostics._rows import bytes_of_rows, rate_of_fall, Rows, rows_of
from manifoldflow.diagnostics._stability import threshold_of
from manifoldflow.losses import AbstractExampleLoss, AbstractLoss, AbstractResidualLoss

# The least number of samples.
_LEAST = 16
# Shares of the time: samples of traces, of the curvature, products for eigenvalues; and of the
# first and the last of these for the balanced model.
_SHARES = {"traces": 0.2, "curvature": 0.2, "eigenvalues": 0.3}
_FOR_BALANCED = 0.6
# The number of products of Lanczos' method, and the cost of one in gradients, roughly.
_GRADIENTS = 60
# A point that is nearer than this to a zero-loss manifold, relative to its length, is on it.
_NEAR = 1e-2
# The loss of a balanced model is the same to this, relative to it and to one.
_SAME = 1e-3


class Options(eqx.Module):
    """The options of `report`, checked."""

    learning_rate: float | None
    batch_size: int
    num_samples: int
    num_eigenvalues: int
    max_rows: int
    memory: int
    seconds: float
    key: Key


class Writer:
    """Collects the lines of a report."""

    gradient: Gradient  # of losses of examples

    def __init__(self, loss: AbstractLoss, point: Point, options: Options):
        self.loss, self.point, self.options = loss, point, options
        self.quantities: list[Quantity] = []
        self.leaves: list[LeafTrace] = []
        self.left_out: list[LeftOut] = []
        self.notes: list[str] = []
        self.eigenvalues: list[Quantity] = []
        self.rows: Rows | None = None
        self.num_bytes = 0  # of the rows
        # JAX would compile a program for every shape of random numbers.
        self.random = np.random.default_rng(np.asarray(jr.key_data(options.key)).ravel().tolist())
        self.chunks: Chunks | None = None
        self.number = 0  # of the parts that eigenvalues are from
        self.reason = ""  # why there are no rows

    def write(self) -> None:
        coordinates, _ = self.loss.split(self.point)
        refuse_nonfinite("report", coordinates)
        self.add("coordinates", _tree.size(coordinates), None, "D, numbers that may move")
        if not isinstance(self.loss, AbstractExampleLoss):
            self._plain()
            self._section("trace of the Hessian", lambda: self._curvature(1.0))
            self._section("largest eigenvalue", lambda: self._eigenvalues(1.0))
            self._judgement(
                2 / self.value("largest eigenvalue"), "2/λ₁ of ∇²L: of full batches", False
            )
            return
        loss = self.loss
        self._gradient(loss)
        self._section("rank", lambda: self._rows(loss))
        self._traces(loss, 1.0)
        self._section("trace of the Hessian", lambda: self._curvature(1.0))
        self._section("largest eigenvalue", lambda: self._eigenvalues(1.0))
        self._section("largest stable learning rate", lambda: self._stability(loss))
        self._section("rate of the limit", lambda: self._limit(loss))
        self._section("balanced trace of G", lambda: self._balanced(loss))
        self._section("kinks", lambda: self._kinks(loss))

    def _section(self, name: str, write: Callable[[], None]) -> None:
        """Runs one part of the report; a refusal by the library ends that part, not the report."""
        try:
            write()
        except (ValueError, eqx.EquinoxRuntimeError) as error:
            self.leave_out(name, str(error).splitlines()[0])
        except (TypeError, NotImplementedError) as error:
            # What is known is a model without second derivatives; any other error is a mistake.
            if (reason := of_jax(error)) is None:
                raise
            self.leave_out(name, reason)

    def add(
        self, name: str, value: Any, error: Any, how: str, num_samples: int | None = None
    ) -> None:
        error = None if error is None else float(error)
        self.quantities.append(Quantity(name, float(value), error, how, num_samples))

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out.append(LeftOut(name, reason))

    def value(self, name: str) -> float:
        return next((q.value for q in self.quantities if q.name == name), math.nan)

    def _gradient(self, loss: AbstractExampleLoss) -> None:
        self.chunks = Chunks(loss, self.point, self.random)
        found = self.gradient = self.chunks.gradient()
        refuse_infinite(found.loss, found.norm)
        self.add(
            "loss",
            found.loss,
            None,
            "L" + ("" if loss.weight_decay is None else ", weight decay included"),
        )
        self.add("gradient", found.norm, None, "‖∇L‖")

    def _rows(self, loss: AbstractExampleLoss) -> None:
        """The whole spectrum, where there is room for it."""
        outputs = eqx.filter_eval_shape(lambda loss, point: loss.outputs(point), loss, self.point)
        count, most = math.prod(outputs.shape), self.options.max_rows
        if count > most:
            self.reason = (
                f"{count} examples × outputs; raise max_rows={most}, or give fewer examples"
            )
            return
        self.num_bytes = bytes_of_rows(loss, self.point)
        if self.num_bytes > self.options.memory:
            needed = bytes_in_words(self.num_bytes)
            self.reason = f"rows of {needed}; raise memory={self.options.memory}"
            return
        self.rows = rows_of(loss, self.point)

    def _traces(self, loss: AbstractExampleLoss, share: float) -> None:
        def draw(part: AbstractExampleLoss) -> Any:
            return trace_sample(part, self.point, outputs_at(part, self.point), self.random)

        found, of = self._sampled(draw, "traces", share)
        squares, spread = (np.stack(parts) for parts in zip(*found))
        count, size, number = loss.num_examples, self.options.batch_size, len(found)
        how = f"{number} passes with random signs{of}"
        trace, error = mean_of(squares.sum(axis=1))
        if self.rows is None:
            self.add("trace of G", trace, error, f"tr JᵀWJ; {how}", number)
        else:
            trace = np.sum(np.asarray(self.rows.eigenvalues, float))
            self.add("trace of G", trace, None, "tr JᵀWJ; exact")
        means, errors = mean_of(squares)
        coordinates, _ = loss.split(self.point)
        named = jax.tree_util.tree_leaves_with_path(coordinates)
        for (path, leaf), mean, wrong in zip(named, means, errors, strict=True):
            self.leaves.append(LeafTrace(name_of(path), leaf.size, float(mean), float(wrong)))
        mean, error = mean_of(spread)
        # From the spread of single gradients to that of means of B without replacement.
        factor = (count - size) / (size * max(count - 1, 1))
        how = f"tr Σ of batches of {size}; {number} passes with random signs{of}"
        noise = factor * (mean - self.gradient.of_data)
        self.add("gradient noise", noise, factor * error, how, number)

    def _sampled(
        self, draw: Callable[[Any], Any], what: str, share: float
    ) -> tuple[list[Any], str]:
        """Samples until there are enough or the time is over; the first one, compiled, is free.

        From one part of the examples after the other. With words on how many these are.
        """
        chunks, loss, of = self.chunks, self.loss, ""
        if chunks is not None and chunks.words_for(1):
            of = f"{chunks.words_for(1)} each"
        part = lambda index: loss if chunks is None else chunks[index % chunks.number]
        samples = [jax.block_until_ready(draw(part(0)))]
        end = time.perf_counter() + share * _SHARES[what] * self.options.seconds
        for index in range(1, max(_LEAST, self.options.num_samples)):
            if len(samples) >= _LEAST and time.perf_counter() > end:
                break
            samples.append(jax.block_until_ready(draw(part(index))))
        return samples, of

    def _plain(self) -> None:
        value, gradient = eqx.filter_jit(lambda l, p: (l(p), l.gradient(p)))(self.loss, self.point)
        refuse_infinite(value, _tree.norm(gradient))
        self.add("loss", value, None, "L")
        self.add("gradient", _tree.norm(gradient), None, "‖∇L‖")
        for name in ("trace of G", "gradient noise"):
            self.leave_out(name, f"{type(self.loss).__name__} has no examples")

    def _curvature(self, share: float) -> None:
        name, loss = "trace of the Hessian", self.loss

        def draw(part: Any) -> Any:
            slopes = None if self.chunks is None else outputs_at(part, self.point).slopes
            return curvature_sample(part, self.point, slopes, self.random)

        found, of = self._sampled(draw, "curvature", share)
        number = len(found)
        mean, error = mean_of(np.asarray(found, float))
        if not isinstance(loss, AbstractExampleLoss):
            self.add(name, mean, error, f"tr ∇²L; {number} random directions", number)
            return
        trace = next(q for q in self.quantities if q.name == "trace of G")
        decay = 0 if loss.weight_decay is None else float(loss.weight_decay)
        total = trace.value + mean + decay * self.value("coordinates")
        how = f"tr ∇²L: tr G{' + λD' if decay else ''} + curvature of f, {number} directions{of}"
        number = min(number, trace.num_samples or number)
        self.add(name, total, math.hypot(trace.standard_error or 0.0, error), how, number)

    def _eigenvalues(self, share: float) -> None:
        name = "largest eigenvalue"
        if self.rows is not None:
            self._all_eigenvalues(self.rows)
            return
        of, how = "∇²L", ""
        flat, _ = _tree.ravel(self.loss.split(self.point)[0])
        product = lambda vector: hessian_product(self.loss, self.point, vector)
        seconds = share * _SHARES["eigenvalues"] * self.options.seconds
        if self.chunks is not None:
            of, chunks = "G", self.chunks
            for left_out in ("rank", "smallest eigenvalue"):
                self.leave_out(left_out, self.reason)
            number = self.number or int(seconds / max(_GRADIENTS * self.gradient.seconds, 1e-9))
            self.number = min(chunks.number, max(1, number))
            # One part at the least is seen to its end, if the whole time is enough for that.
            enough = 2 * _GRADIENTS * self.number * self.gradient.seconds
            seconds = max(seconds, min(self.options.seconds, enough))
            product, how = GaussNewton(chunks, self.number), chunks.words_for(self.number)
        found = top_eigenvalues(product, flat, self.options.num_eigenvalues, seconds)
        basis = f"{found.num_products} products, basis of {bytes_in_words(found.num_bytes)}"
        if not found.is_found:
            self.leave_out(
                name,
                f"{found.values[0]:.3g} to within {found.bounds[0]:.1g} after {basis}; raise "
                f"seconds={self.options.seconds:g}",
            )
            return
        pairs = zip(found.values, found.bounds, strict=True)
        for index, (value, bound) in enumerate(pairs, start=1):
            line = Quantity(f"eigenvalue {index}", float(value), float(bound), f"of {of}{how}")
            self.eigenvalues.append(line)
        self.add(name, found.values[0], found.bounds[0], f"λ₁ of {of}{how}; {basis}")

    def _all_eigenvalues(self, rows: Rows) -> None:
        values, rank = np.asarray(rows.eigenvalues, float)[::-1], int(rows.rank)
        bound = float(rows.rounding)
        floor = math.sqrt(len(values)) * bound  # below it they count as zero
        for index, value in enumerate(values[:rank], start=1):
            self.eigenvalues.append(
                Quantity(f"eigenvalue {index}", float(value), float(bound), "of G; exact")
            )
        how = f"λ₁ of G; exact, from rows of {bytes_in_words(self.num_bytes)}"
        self.add("largest eigenvalue", values[0], bound, how)
        dimension = int(self.value("coordinates")) - rank
        how = f"of G, above rounding, of {len(values)} rows; {dimension} dimensions are flat"
        self.add("rank", rank, None, how)
        if not rank:
            self.leave_out("smallest eigenvalue", "G is zero")
        elif rank < min(len(values), dimension + rank) and values[rank - 1] < 10 * floor:
            reason = f"no gap: eigenvalues go down to rounding, {floor:.1g}"
            self.leave_out("smallest eigenvalue", reason)
        else:
            how = "of G, that is not zero; exact to rounding"
            self.add("smallest eigenvalue", values[rank - 1], bound, how)

    def _stability(self, loss: AbstractExampleLoss) -> None:
        size, top = self.options.batch_size, self.value("largest eigenvalue")
        if self.rows is not None and top > 0:
            found, result = threshold_of(self.rows.gram, loss.num_examples, size)
            if math.isnan(float(found)):
                self.leave_out("largest stable learning rate", str(RESULTS[result]))
                return
            how = f"η* of SGD with batches of {size}, in the mean square"
            self._judgement(float(found), how, True)
        else:
            threshold = 2 / top if top else math.nan
            how = "2/λ₁: of full batches; smaller ones have less"
            self._judgement(threshold, how, size == loss.num_examples)

    def _judgement(self, threshold: float, how: str, is_of_batches: bool) -> None:
        """The largest stable learning rate, and what that says of the given one."""
        name, rate = "largest stable learning rate", self.options.learning_rate
        if not threshold > 0:
            is_known = not math.isnan(self.value("largest eigenvalue"))
            reason = "G is zero" if is_known else "the largest eigenvalue is not known"
            self.leave_out(name, "nothing curves upwards" if threshold < 0 else reason)
            return
        self.add(name, threshold, None, how)
        if rate is None:
            return
        stable = "stable" if is_of_batches else "stable for full batches only"
        verdict = "not stable" if rate >= threshold else stable
        how = f"η/η*: {verdict} at η = {rate:g}"
        self.add("learning rate / largest stable", rate / threshold, None, how)
        least = self.value("smallest eigenvalue")
        if not math.isnan(least):
            self.add("steps to arrive", 1 / (rate * least), None, "1/(ηλ_min), of phase one")

    def _limit(self, loss: AbstractExampleLoss) -> None:
        name = "rate of the limit"
        if not isinstance(loss, AbstractResidualLoss):
            reason = "this loss has no residuals, and no zero-loss manifold; see OutputManifold"
            self.leave_out(name, reason)
            return
        if self.rows is None:
            self.leave_out(name, self.reason)
            return
        rows, length = self.rows, float(_tree.norm(loss.split(self.point)[0]))
        if len(rows.eigenvalues) > self.value("coordinates"):
            self.leave_out(name, "more residuals than coordinates: no manifold of perfect fits")
            return
        distance, rank = float(rows.distance), int(rows.rank)
        least = float(rows.eigenvalues[-rank]) if rank else 0.0
        if not float(rows.beyond) <= _NEAR * math.sqrt(least) * length:
            self.leave_out(name, "the loss does not get to zero near here, to first order")
            return
        self.add("distance", distance, None, "to the zero-loss manifold, to first order")
        if not distance <= _NEAR * length:
            self.leave_out(
                name, f"the model is not near the zero-loss manifold: {distance:.2g} away"
            )
            return
        fall, strength = (float(x) for x in rate_of_fall(loss, self.point))
        if not math.isfinite(fall):
            self.leave_out(name, "the Jacobian loses rank here")
            return
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
        assert self.chunks is not None
        try:
            balanced, what = least_norm(self.chunks[0], self.point, self.random)
        except ValueError as error:
            self.leave_out("balanced trace of G", str(error).splitlines()[0])
            return
        other = Writer(loss, balanced, self.options)
        other.rows = None if self.rows is None else rows_of(loss, balanced)
        other.reason, other.num_bytes, other.number = self.reason, self.num_bytes, self.number
        other.add("coordinates", self.value("coordinates"), None, "")
        other._gradient(loss)
        before, after = self.gradient.data_loss, other.gradient.data_loss
        change = abs(after - before)
        if not change <= _SAME * (1 + abs(before)):
            self.leave_out("balanced trace of G", f"balancing changed the loss by {change:.1g}")
            return
        other._traces(loss, _FOR_BALANCED)
        other._eigenvalues(_FOR_BALANCED)
        for quantity in ("trace of G", "largest eigenvalue", "gradient noise"):
            for q in [q for q in other.quantities if q.name == quantity]:
                how = f"Linear {what} of least norm; {q.how}"
                place = 1 + [plain.name for plain in self.quantities].index(quantity)
                self.quantities.insert(place, q._replace(name=f"balanced {q.name}", how=how))

        self.notes.append(
            "Balanced numbers are those of the same function in other weights, where the norms of "
            "equinox.nn.Linear layers are least: to compare networks by, no improvement."
        )

    def _kinks(self, loss: AbstractExampleLoss) -> None:
        kinks = kinks_of(loss, self.point)
        if kinks:
            self.notes.append(
                f"The model has kinks among its examples ({', '.join(kinks)}): formulas of G hold "
                "between kinks, and the Hessian is the one there."
            )
