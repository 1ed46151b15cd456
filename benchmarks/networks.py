"""For which networks is the structured Jacobian right, and how much faster is it than vmap(grad)?

∇tr(JᵀJ), the Gram matrix and the whole drift of an MLP, a convolutional network, a
transformer block and a recurrent network: structured, against plain JAX with `vmap(grad)`
in chunks of 8, 32 or 128 examples, whichever is fastest. Relative errors in float32 are
against explicit rows in float64.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import _harness
import _plain
import manifoldflow as mf


class LeNet(eqx.Module):
    """Two convolutions with average pooling, three dense layers; one number."""

    convolutions: tuple[eqx.nn.Conv2d, eqx.nn.Conv2d]
    pool: eqx.nn.AvgPool2d
    head: eqx.nn.MLP

    def __init__(self, side: int, channels: int, width: int, key: jax.Array):
        keys = jr.split(key, 3)
        self.convolutions = (
            eqx.nn.Conv2d(1, channels, 5, padding=2, key=keys[0]),
            eqx.nn.Conv2d(channels, 2 * channels, 5, padding=2, key=keys[1]),
        )
        self.pool = eqx.nn.AvgPool2d(2, 2)
        self.head = eqx.nn.MLP(
            2 * channels * (side // 4) ** 2, "scalar", width, 2, jnp.tanh, key=keys[2]
        )

    def __call__(self, image: jax.Array) -> jax.Array:
        for convolution in self.convolutions:
            image = self.pool(jnp.tanh(convolution(image)))
        return self.head(image.reshape(-1))


class TransformerBlock(eqx.Module):
    """Attention and a two-layer perceptron with LayerNorm; the table reads and scores tokens.

    The outputs are the scores of the first `num_outputs` tokens as the next one.
    """

    table: jax.Array
    places: jax.Array
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm, eqx.nn.LayerNorm]
    attention: eqx.nn.MultiheadAttention
    perceptron: eqx.nn.MLP
    num_outputs: int = eqx.field(static=True)

    def __init__(self, vocabulary: int, length: int, width: int, num_outputs: int, key: jax.Array):
        keys = jr.split(key, 4)
        self.table = jr.normal(keys[0], (vocabulary, width)) / width**0.5
        self.places = jr.normal(keys[1], (length, width)) / width**0.5
        self.norms = (eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width))
        self.attention = eqx.nn.MultiheadAttention(4, width, inference=True, key=keys[2])
        self.perceptron = eqx.nn.MLP(width, width, 4 * width, 1, jax.nn.gelu, key=keys[3])
        self.num_outputs = num_outputs

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.table[tokens] + self.places
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
        x = x + jax.vmap(self.perceptron)(jax.vmap(self.norms[1])(x))
        return (self.table @ self.norms[2](x[-1]))[: self.num_outputs]


class Elman(eqx.Module):
    """h ← tanh(W x + U h + b) along a sequence, and a linear read-out at its end."""

    from_input: eqx.nn.Linear
    from_state: eqx.nn.Linear
    read_out: eqx.nn.Linear

    def __init__(self, in_size: int, width: int, key: jax.Array):
        keys = jr.split(key, 3)
        self.from_input = eqx.nn.Linear(in_size, width, key=keys[0])
        self.from_state = eqx.nn.Linear(width, width, use_bias=False, key=keys[1])
        self.read_out = eqx.nn.Linear(width, "scalar", key=keys[2])

    def __call__(self, sequence: jax.Array) -> jax.Array:
        def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(self.from_input(x) + self.from_state(state)), None

        start = jnp.zeros(self.from_state.out_features, sequence.dtype)
        return self.read_out(jax.lax.scan(step, start, sequence)[0])


class Problem(NamedTuple):
    name: str
    model: Any
    inputs: Any


def problems() -> list[Problem]:
    """Some 10⁴-10⁵ parameters each, and 256 to 1024 residuals."""
    normal = lambda *shape: jr.normal(jr.key(1), shape)
    tokens = lambda *shape, below: jr.randint(jr.key(1), shape, 0, below)
    key = jr.key(0)
    return [
        Problem("MLP", eqx.nn.MLP(32, "scalar", 432, 2, jnp.tanh, key=key), normal(1024, 32)),
        Problem("LeNet", LeNet(28, 8, 64, key), normal(256, 1, 28, 28)),
        Problem(
            "transformer, 8 scores",
            TransformerBlock(16, 8, 256, 8, key),
            tokens(32, 8, below=16),
        ),
        Problem(
            "transformer, one score",
            TransformerBlock(64, 16, 64, 1, key),
            tokens(256, 16, below=64),
        ),
        Problem("Elman", Elman(8, 64, key), normal(256, 32, 8)),
    ]


def tiny_problems() -> list[Problem]:
    """Just large enough to be kept by structure, and quick to compile."""
    normal = lambda *shape: jr.normal(jr.key(1), shape)
    key = jr.key(0)
    return [
        Problem("MLP", eqx.nn.MLP(32, "scalar", 32, 2, jnp.tanh, key=key), normal(32, 32)),
        Problem("LeNet", LeNet(8, 4, 16, key), normal(64, 1, 8, 8)),
        Problem("Elman", Elman(8, 48, key), normal(32, 4, 8)),
    ]


QUESTIONS = ("∇tr(JᵀJ)", "Gram matrix", "drift")
CHUNKS = (8, 32, 128)


def loss_of(problem: Problem) -> mf.LeastSquares:
    outputs = eqx.filter_eval_shape(lambda m, xs: jax.vmap(m)(xs), problem.model, problem.inputs)
    return mf.LeastSquares(problem.inputs, jnp.zeros(outputs.shape))


def tasks(problem: Problem) -> dict[str, tuple[tuple, Callable[[int], tuple]]]:
    """For every question the structured computation and the plain one, by chunk size."""
    _, model, inputs = problem
    loss = loss_of(problem)
    flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), mf.LabelNoise(std=1.0, batch_size=1))
    scale = 1 / loss.num_residuals
    factor = float(-flow.noise.strength(loss) / 4)
    rows = _plain.rows_in_chunks
    return {
        QUESTIONS[0]: (
            (lambda l, m: eqx.filter_grad(l.trace_gauss_newton)(m), loss, model),
            lambda c: (
                lambda m, xs: _plain.trace_gradient_in_chunks(m, xs, scale, c),
                model,
                inputs,
            ),
        ),
        QUESTIONS[1]: (
            (lambda l, m: l.jacobian(m).gram(), loss, model),
            lambda c: (lambda m, xs: _plain.gram(rows(m, xs, c)), model, inputs),
        ),
        QUESTIONS[2]: (
            (lambda f, m: f.drift(m), flow, model),
            lambda c: (lambda m, xs: _plain.drift(m, xs, factor * scale, c), model, inputs),
        ),
    }


def reference(problem: Problem, what: str, chunk: int) -> Any:
    """Explicit rows in float64."""
    with jax.enable_x64(True):
        double = lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x
        problem = problem._replace(
            model=jax.tree.map(double, problem.model), inputs=double(problem.inputs)
        )
        function, *arguments = tasks(problem)[what][1](chunk)
        return eqx.filter_jit(function)(*arguments)


def measure(
    problem: Problem, questions: Sequence[str], chunks: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    _, model, inputs = problem
    sizes = [leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))]
    chunks = [chunk for chunk in chunks if len(inputs) % chunk == 0]
    loss = loss_of(problem)
    unit = _harness.Compiled(lambda l, m: eqx.filter_value_and_grad(l)(m), loss, model)
    rows = []
    for what in questions:
        (function, *arguments), plain = tasks(problem)[what]
        compiled = _harness.Compiled(function, *arguments)
        unit_seconds, seconds = unit.seconds(repeats), compiled.seconds(repeats)
        timed = []
        for chunk in chunks:
            function, *arguments = plain(chunk)
            rival = _harness.Compiled(function, *arguments)
            timed.append((rival.seconds(repeats), chunk, rival.temporary_mb))
        plain_seconds, chunk, plain_mb = min(timed)
        error = _plain.relative_error(compiled(), reference(problem, what, chunks[0]))
        rows.append(
            {
                "network": problem.name,
                "D": sum(sizes),
                "rows": loss.num_residuals,
                "what": what,
                "structured (units)": seconds / unit_seconds,
                "structured MB": compiled.temporary_mb,
                "plain (units)": plain_seconds / unit_seconds,
                "plain MB": plain_mb,
                "best chunk": chunk,
                "times faster": plain_seconds / seconds,
                "relative error": error,
                "compile s": compiled.compile_seconds,
            }
        )
        print(_harness.table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def main() -> None:
    arguments = _harness.options(__doc__)
    if arguments.smoke:
        # The others compile for longer than a smoke test should take.
        found, questions, chunks = tiny_problems()[1:2], QUESTIONS[:1], CHUNKS[:1]
    else:
        found, questions, chunks = problems(), QUESTIONS, CHUNKS
    rows = []
    for problem in found:
        rows += measure(problem, questions, chunks, arguments.repeats)
    _harness.write("networks", __doc__.splitlines()[0], rows, arguments)


if __name__ == "__main__":
    main()
