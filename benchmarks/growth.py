"""How do the cost and the memory of the exact drift grow with the examples n and the parameters D?

Slopes in log-log scale with their standard errors, fitted to the larger half of the sizes,
where fixed costs no longer count: structured, and with explicit rows by `vmap(grad)`. The
measured points, compile times among them, are in a file of their own.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

import _harness
import _plain
import manifoldflow as mf

WIDTH, NUM_EXAMPLES = 432, 256
WIDTHS = (64, 128, 256, 512, 1024, 2048)
NUMBERS = (64, 128, 256, 512, 1024, 2048)
EXPLICIT_LIMIT = 2**28
"""Numbers in J beyond which explicit rows are not tried."""


def ways(flow: mf.LimitDiffusion, model: eqx.nn.MLP) -> dict[tuple[str, str], tuple[Any, ...]]:
    loss = flow.manifold.loss
    scale = 1 / loss.num_residuals
    gradient: Callable[..., Any] = lambda l, m: eqx.filter_grad(l.trace_gauss_newton)(m)
    explicit = {
        "∇tr∇²L": lambda m, xs: _plain.trace_gradient(m, xs, scale),
        "drift": lambda m, xs: _plain.drift(m, xs, -scale / 4),
    }
    found: dict[tuple[str, str], tuple[Any, ...]] = {
        ("one value_and_grad", "–"): (lambda l, m: eqx.filter_value_and_grad(l)(m), loss, model),
        ("∇tr∇²L", "structured"): (gradient, loss, model),
        ("drift", "structured"): (lambda f, m: f.drift(m), flow, model),
    }
    if loss.num_residuals * num_parameters(model) <= EXPLICIT_LIMIT:
        for what, function in explicit.items():
            found[what, "vmap(grad)"] = (function, model, loss.inputs)
    return found


def num_parameters(model: eqx.nn.MLP) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))


def measure(
    varied: str, width: int, num_examples: int, repeats: int, most_ways: int | None = None
) -> list[dict[str, Any]]:
    flow, model = _harness.limit_of_mlp(width, 2, num_examples)
    rows = []
    for (what, way), (function, *arguments) in list(ways(flow, model).items())[:most_ways]:
        compiled = _harness.Compiled(function, *arguments)
        rows.append(
            {
                "varied": varied,
                "D": num_parameters(model),
                "n": num_examples,
                "what": what,
                "way": way,
                "seconds": compiled.seconds(repeats),
                "temporary MB": compiled.temporary_mb,
                "compile s": compiled.compile_seconds,
            }
        )
        print(_harness.table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """d ln y/d ln x by least squares, and its standard error."""
    if len(x) < 3 or not np.all(y > 0):
        return math.nan, math.nan
    x, y = np.log(x), np.log(y)
    x = x - x.mean()
    value = float(x @ y / (x @ x))
    residual = y - y.mean() - value * x
    return value, float(np.sqrt(residual @ residual / (len(x) - 2) / (x @ x)))


def slopes(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for varied in ("n", "D"):
        mine = [point for point in points if point["varied"] == varied]
        for what, way in dict.fromkeys((point["what"], point["way"]) for point in mine):
            line = [point for point in mine if (point["what"], point["way"]) == (what, way)]
            line = line[-max(3, math.ceil(len(line) / 2)) :]
            x = np.array([point[varied] for point in line], float)
            row: dict[str, Any] = {"what": what, "way": way, "grows with": varied}
            row["from"], row["to"] = int(x[0]), int(x[-1])
            for name in ("seconds", "temporary MB"):
                fitted = slope(x, np.array([point[name] for point in line], float))
                row[f"slope of {name}"], row[f"± ({name})"] = fitted
            row["largest compile s"] = max(point["compile s"] for point in line)
            rows.append(row)
    return rows


def main() -> None:
    arguments = _harness.options(__doc__)
    width, num_examples = (32, 64) if arguments.smoke else (WIDTH, NUM_EXAMPLES)
    numbers = (64, 96, 128) if arguments.smoke else NUMBERS
    widths = () if arguments.smoke else WIDTHS
    sizes = [("n", width, n) for n in numbers] + [("D", w, num_examples) for w in widths]
    # In a smoke run all ways at one size, and a slope of the first.
    most = [None, 1, 1] if arguments.smoke else [None] * len(sizes)
    points = [
        row for size, some in zip(sizes, most) for row in measure(*size, arguments.repeats, some)
    ]
    question = __doc__.splitlines()[0]
    _harness.write("growth-points", question, points, arguments)
    _harness.write("growth", question, slopes(points), arguments)


if __name__ == "__main__":
    main()
