"""The report on a trained network, in one call."""

import textwrap
from typing import Any

import equinox as eqx
import jax.random as jr

from manifoldflow._boundary import checked_concrete
from manifoldflow._errors import checked_count, checked_positive
from manifoldflow._types import Key, Point
from manifoldflow.diagnostics._entries import LeafTrace, LeftOut, Quantity
from manifoldflow.diagnostics._writer import Options, Writer
from manifoldflow.losses import AbstractExampleLoss, AbstractLoss

# Columns of the table; its last one begins here.
_WIDTH, _INDENT = 110, 59


class Report(eqx.Module):
    """The numbers known about a trained network, from `report`; prints as a table.

    Attributes:
        quantities: by name, in the order of the table. G is the Gauss-Newton matrix.
        leaves: the parts of tr G of all leaves of the model.
        left_out: the numbers that are missing, with the reasons.
        notes: remarks that hold for all of them.
        eigenvalues: of G, descending, with bounds on their errors; all that are not zero if
            `is_whole`, else a few of the largest.
        is_whole: True where all eigenvalues are known.

    Examples:
        >>> from manifoldflow import diagnostics
        >>> trace = diagnostics.Quantity("trace of G", 2.5, None, "exact")
        >>> report = diagnostics.Report({trace.name: trace}, (), (), (), (), False)
        >>> print(report["trace of G"].value)
        2.5
    """

    quantities: dict[str, Quantity] = eqx.field(static=True)
    leaves: tuple[LeafTrace, ...] = eqx.field(static=True)
    left_out: tuple[LeftOut, ...] = eqx.field(static=True)
    notes: tuple[str, ...] = eqx.field(static=True)
    eigenvalues: tuple[Quantity, ...] = eqx.field(static=True)
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
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join(_wrapped(str(line)) for line in lines)

    def __repr__(self) -> str:
        return str(self)


@checked_concrete
def report(
    loss: AbstractLoss,
    point: Point,
    *,
    learning_rate: Any = None,
    batch_size: int = 1,
    num_samples: int = 256,
    num_eigenvalues: int = 2,
    max_rows: int = 2000,
    memory: int = 2**30,
    seconds: Any = 2.0,
    key: Key | None = None,
) -> Report:
    """The numbers known about a trained network: flatness, gradient noise, and a verdict on η.

    Any loss and any architecture will do. Every number has its uncertainty. G = JᵀWJ is the
    Gauss-Newton matrix of the mean over examples, J = ∂f the derivative of the outputs and W =
    ∂²ℓ/∂f² at the present ones; for cross-entropies of logits W is the Fisher matrix. Where G has
    at most `max_rows` rows, its whole spectrum is computed exactly. Otherwise traces are means over
    samples, one backward pass each, and a few eigenvalues come from products.

    Balanced numbers are those of the same function where rescalings about homogeneous activations,
    as ReLU, have brought `equinox.nn.Linear` layers to their least norm. Other layers stay as they
    are, and a model without such layers has no balanced numbers: report on
    `symmetry.balance(model, loss, kind="norm")`, which finds rescalings of layers of any kind.

    Args:
        loss: `LeastSquares`, or `PerExampleLoss` with any labels; others have less to say.
        point: the model, of finite numbers.
        learning_rate: η > 0 of SGD, to be judged; None for no judgement.
        batch_size: B of SGD.
        num_samples: of traces, at most.
        num_eigenvalues: the number of the largest ones, where not all are computed.
        max_rows: examples × outputs up to which the spectrum is computed exactly.
        memory: bytes that rows and their Gram matrix may take.
        seconds: about the time for sampling and products, compilation aside. Parts that take longer
            are done on fewer examples, or left out.
        key: of the samples; None for the same ones each time.

    Returns:
        A `Report`. `print(report)` shows it, `plotting.plot_report` draws it, and `report["trace of
        G"].value` is one of its numbers.

    Raises:
        ValueError: wrong options; a model or a loss that is not finite; a call inside jit or vmap.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=lambda w, x: (w @ x) ** 2)
        >>> report = mf.report(loss, jnp.ones(2), learning_rate=0.1)
        >>> stable = report["largest stable learning rate"]
        >>> print(round(report["trace of G"].value, 4), round(stable.value, 4))
        4.0 0.5

    References:
        [LiWangArora2022; MulayoffMichaeli2024].
    """
    rate = learning_rate
    if rate is not None:
        rate = float(checked_positive("report: learning_rate", learning_rate))
    options = Options(
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
    writer = Writer(loss, point, options)
    writer.write()
    return Report(
        dict((q.name, q) for q in writer.quantities),
        tuple(writer.leaves),
        tuple(writer.left_out),
        tuple(writer.notes),
        tuple(writer.eigenvalues),
        writer.rows is not None,
    )


def _wrapped(line: str) -> str:
    """The line in pieces that fit, the later ones below its last column."""
    indent = 6 if line.startswith("Note") else _INDENT
    return textwrap.fill(line, _WIDTH, subsequent_indent=" " * indent)
