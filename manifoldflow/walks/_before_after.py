"""The changes of a run: every observable at its start and at its end."""

from typing import NamedTuple

import numpy as np

from manifoldflow._boundary import checked
from manifoldflow._results import RESULTS, Solution


class BeforeAfter(NamedTuple):
    """Observables before and after a run; printed, a table.

    Attributes:
        values: name → (before, after), of observables that are single numbers.
        summary: what the run took and how it ended, in a sentence or two.

    Examples:
        >>> import manifoldflow as mf
        >>> print(mf.walks.BeforeAfter({"trace of G": (4.25, 2.0)}, "9 steps. Done."))
        9 steps. Done.
                         before       after
        trace of G         4.25           2
    """

    values: dict[str, tuple[float, float]]
    summary: str

    def __str__(self) -> str:
        width = max(map(len, self.values), default=0)
        rows = [f"{name:{width}}  {a:11.4g} {b:11.4g}" for name, (a, b) in self.values.items()]
        return "\n".join([self.summary, f"{'':{width}}  {'before':>11} {'after':>11}", *rows])


@checked
def before_after(solution: Solution) -> BeforeAfter:
    """A table of what a run changed, from its observables at the first and at the last save.

    Args:
        solution: of `walk`, `solve`, `simulate` or `minimize`, not a batch of them.

    Returns:
        A value to print; `values` has the numbers.

    Raises:
        ValueError: a batch of solutions.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.LevelSet(lambda p: jnp.sum(p**2) - 1)
        >>> flow = mf.RiemannianGradientFlow(circle, lambda p: p[1])
        >>> height = {"height": lambda p: p[1]}
        >>> down = mf.solve(flow, jnp.array([0.6, 0.8]), end_time=9.0, observe=height)
        >>> print(str(mf.walks.before_after(down)).splitlines()[-1])
        height          0.8          -1
    """
    if np.ndim(solution.times) != 1:
        raise ValueError(
            f"before_after takes one solution; got a batch, {np.shape(solution.times)[:-1]}. Take "
            "one of them, jax.tree.map(lambda x: x[0], solutions)."
        )
    observed = {name: np.asarray(seen) for name, seen in solution.observables.items()}
    ends = {name: (seen[0], seen[-1]) for name, seen in observed.items() if seen.ndim == 1}
    values = {name: (float(first), float(last)) for name, (first, last) in ends.items()}
    how = RESULTS[solution.result] or "Done."
    return BeforeAfter(values, f"{int(solution.stats['num_steps'])} steps. {how}")
