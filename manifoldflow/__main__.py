"""The command line: train a network to zero loss, then walk to its flattest perfect fit.

python -m manifoldflow --examples 50 --width 64 --end-time 200
"""

import argparse
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array

import manifoldflow as mf
from manifoldflow import _tree

NUM_SAVES = 25


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `manifoldflow`; returns the exit status."""
    options = _parser().parse_args(arguments)
    if not options.float32:
        jax.config.update("jax_enable_x64", True)
    _keep_programs()
    try:
        _run(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"manifoldflow: {error}", file=sys.stderr)
        return 2
    except eqx.EquinoxRuntimeError as error:
        sentence = re.search(r"EquinoxRuntimeError: (.*)", str(error))
        print(f"manifoldflow: {sentence[1] if sentence else error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"manifoldflow: {_how_to_go_on(_checkpoint(options))}", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _keep_programs() -> None:
    """Compiled programs go to the user's cache folder, or where JAX has been told to keep them."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        import platformdirs
    except ImportError:
        return
    folder = platformdirs.user_cache_path("manifoldflow", appauthor=False) / "programs"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class _Waiting:
    """Says on stderr what is being done, and in a terminal for how long so far."""

    def __init__(self, what: str):
        self._what = what
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> "_Waiting":
        if sys.stderr.isatty():
            self._thread.start()
        else:
            print(f"{self._what} …", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()

    def clear(self) -> None:
        """Make place for a line of the output."""
        if self._thread.is_alive():
            print(f"\r{' ' * (len(self._what) + 10)}\r", end="", file=sys.stderr, flush=True)

    def _show(self) -> None:
        began = time.perf_counter()
        while not self._is_over.wait(0.5):
            line = f"\r{self._what} … {time.perf_counter() - began:.0f} s"
            print(line, end="", file=sys.stderr, flush=True)
        self.clear()


def _checkpoint(options: argparse.Namespace) -> pathlib.Path:
    return options.out / "checkpoint.npz"


def _how_to_go_on(checkpoint: pathlib.Path) -> str:
    if checkpoint.exists():
        return f"stopped; the same command goes on from the last save, in {checkpoint}."
    return "stopped before the first save; the same command begins anew."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="manifoldflow",
        description="Trains an MLP on handwritten digits to zero loss and walks it along the "
        "manifold of perfect fits, as label-noise SGD does in the limit of small steps.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--examples", type=int, default=50, help="training examples")
    parser.add_argument("--width", type=int, default=64, help="hidden tanh units")
    parser.add_argument("--init-scale", type=float, default=1.0, help="factor on initial weights")
    parser.add_argument("--end-time", type=float, default=200.0, help="limit time to walk")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and shuffling")
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        help="your own data: .npz with arrays `inputs` and `targets`, or .csv whose last "
        "column is the target; integer targets are classes. Default: scikit-learn's digits",
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("walk"), help="folder")
    parser.add_argument("--float32", action="store_true", help="single precision")
    return parser


def _run(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    (inputs, targets), (test_inputs, test_targets), is_classes = _data(options)
    model = _network(inputs, targets, options)
    loss = mf.LeastSquares(inputs, targets)
    manifold = mf.ZeroLossManifold(loss)
    print(
        f"{len(inputs)} examples, {loss.num_residuals} residuals, "
        f"{_tree.size(loss.split(model)[0])} parameters, manifold of dimension "
        f"{manifold.dimension(model)}"
    )
    with _Waiting("compiling the training, and training"):
        trained = _train(loss, model)
        reached = float(loss(trained))
    print(f"trained by Adam:      loss {reached:.1e}")
    with _Waiting("compiling the gradient flow, and landing on the manifold"):
        start = mf.limit_map(loss, trained)
    print(f"landed on the manifold: loss {float(loss(start)):.1e}\n")

    performance = _performance(test_inputs, test_targets, is_classes)
    test_name = "test accuracy" if is_classes else "test error"
    flow = mf.LimitDiffusion(manifold, mf.LabelNoise(std=1.0, batch_size=1))
    with _Waiting("compiling the walk, and walking") as waiting:
        walk = mf.solve(
            flow,
            start,
            end_time=options.end_time,
            num_saves=NUM_SAVES,
            observe={
                "loss": loss,
                "sharpness": loss.trace_gauss_newton,
                "gradient_norm": _GradientNorm(manifold),
                "test": performance,
            },
            progress=_Table(options.end_time, test_name, waiting),
            checkpoint=_checkpoint(options),
        )
    jax.effects_barrier()
    _save(options.out, loss, walk, start, test_name, options)
    _checkpoint(options).unlink()  # the walk is whole and saved: nothing to go on from
    sharpness, test = walk.observables["sharpness"], walk.observables["test"]
    best = int(jnp.argmax(test) if is_classes else jnp.argmin(test))
    print(
        f"\ntr∇²L {float(sharpness[0]):.2f} → {float(sharpness[-1]):.2f}; {test_name} "
        f"{float(test[0]):.3f} → {float(test[-1]):.3f} (best {float(test[best]):.3f} at limit "
        f"time {float(walk.times[best]):.0f}); largest defect {float(walk.stats['max_defect']):.0e}"
    )
    print(f"{time.perf_counter() - began:.0f} s; picture, network and path are in {options.out}/")


def _data(options: argparse.Namespace) -> tuple[tuple, tuple, bool]:
    """`(training pair, test pair, are the targets classes?)`."""
    for name in ("examples", "width"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1; got {getattr(options, name)}.")
    if not 0 < options.end_time < float("inf"):
        raise ValueError(f"--end-time must be positive and finite; got {options.end_time}.")
    if options.data is None:
        train = mf.models.digits(options.examples, seed=options.seed)
        return train, mf.models.digits(test=True, seed=options.seed), True
    inputs, targets = _read(options.data)
    if len(inputs) != len(targets):
        raise ValueError(f"{options.data}: {len(inputs)} inputs, but {len(targets)} targets.")
    for name, array in (("inputs", inputs), ("targets", targets)):
        bad = np.argwhere(~np.isfinite(np.asarray(array, float)))
        if len(bad):
            raise ValueError(f"{options.data}: {name} are not finite at index {bad[0].tolist()}.")
    if len(inputs) <= options.examples:
        raise ValueError(
            f"{options.data} has {len(inputs)} examples; --examples {options.examples} must leave "
            "some of them for testing."
        )
    is_classes = targets.ndim == 1 and not np.issubdtype(targets.dtype, np.inexact)
    if is_classes:
        classes, indices = np.unique(targets, return_inverse=True)
        targets = np.eye(len(classes))[indices]
    print(f"{options.data}: " + (f"{len(classes)} classes" if is_classes else "real targets"))
    order = np.random.default_rng(options.seed).permutation(len(inputs))
    chosen, rest = order[: options.examples], order[options.examples :]
    targets = targets.reshape(len(targets), -1).astype(float)
    inputs = inputs.reshape(len(inputs), -1).astype(float)
    pairs = [(jnp.asarray(inputs[i]), jnp.asarray(targets[i])) for i in (chosen, rest)]
    return pairs[0], pairs[1], bool(is_classes)


def _read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            if not {"inputs", "targets"} <= set(arrays.files):
                raise ValueError(f"{path} needs arrays `inputs` and `targets`; has {arrays.files}.")
            return arrays["inputs"], arrays["targets"]
    if path.suffix == ".csv":
        table = np.genfromtxt(path, delimiter=",")
        if table.ndim == 2 and np.isnan(table[0]).all():
            table = table[1:]  # a header line
        if table.ndim != 2 or table.shape[1] < 2:
            raise ValueError(f"{path} needs at least two columns of numbers.")
        targets = table[:, -1]
        is_whole = np.all(targets == np.round(targets))
        return table[:, :-1], targets.astype(int) if is_whole else targets
    raise ValueError(f"--data takes a .npz or a .csv file; got {path}.")


def _network(inputs: Array, targets: Array, options: argparse.Namespace) -> eqx.nn.MLP:
    model = eqx.nn.MLP(
        inputs.shape[1],
        targets.shape[1],
        options.width,
        1,
        activation=jnp.tanh,
        key=jr.key(options.seed),
    )
    return jax.tree.map(
        lambda leaf: options.init_scale * leaf if eqx.is_inexact_array(leaf) else leaf, model
    )


@eqx.filter_jit
def _train(loss: mf.LeastSquares, model: eqx.nn.MLP, num_steps: int = 1500) -> eqx.nn.MLP:
    """Full-batch Adam, to a small loss; the limit map does the rest exactly."""
    coordinates, remainder = loss.split(model)
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))

    def step(carry: tuple, _: None) -> tuple:
        x, state = carry
        updates, state = optimiser.update(loss.gradient(_tree.join(x, remainder)), state)
        return (optax.apply_updates(x, updates), state), None

    carry = (coordinates, optimiser.init(coordinates))
    (coordinates, _), _ = jax.lax.scan(step, carry, length=num_steps)
    return _tree.join(coordinates, remainder)


def _performance(inputs: Array, targets: Array, is_classes: bool) -> Callable[[Any], Array]:
    def accuracy(model: Callable[[Array], Array]) -> Array:
        guesses = jnp.argmax(jax.vmap(model)(inputs), axis=1)
        return jnp.mean(guesses == jnp.argmax(targets, axis=1))

    def error(model: Callable[[Array], Array]) -> Array:
        return jnp.mean((jax.vmap(model)(inputs) - targets) ** 2)

    return accuracy if is_classes else error


class _GradientNorm(eqx.Module):
    """‖P∇tr∇²L‖: zero where the walk ends."""

    manifold: mf.ZeroLossManifold

    def __call__(self, point: Any) -> Array:
        sharpness = self.manifold.loss.trace_gauss_newton
        return _tree.norm(mf.riemannian_gradient(self.manifold, sharpness, point))


class _Table:
    """Prints one row for each save, with a bar of the time that is done."""

    def __init__(self, end_time: float, test_name: str, waiting: _Waiting):
        self._end_time, self._before, self._walked = end_time, None, 0.0
        self._waiting, self._num_rows = waiting, 0
        print(
            f"{'':12} {'limit time':>10} {'loss':>9} {'tr∇²L':>8} {'‖P∇tr‖':>9} "
            f"{'walked':>8} {test_name:>13}"
        )

    def __call__(self, row: dict[str, Any]) -> None:
        self._num_rows += 1
        self._waiting.clear()
        if self._num_rows == 2:
            self._waiting.__exit__()  # the start comes before what compiles for long
        here = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(row["coordinates"])])
        if self._before is not None:
            self._walked += float(np.linalg.norm(here - self._before))
        self._before = here
        done = round(10 * float(row["time"]) / self._end_time)
        print(
            f"[{'█' * done}{'·' * (10 - done)}] {float(row['time']):>9.1f} "
            f"{float(row['loss']):>9.1e} {float(row['sharpness']):>8.3f} "
            f"{float(row['gradient_norm']):>9.3f} {self._walked:>8.3f} {float(row['test']):>13.3f}",
            flush=True,
        )


def _save(
    out: pathlib.Path,
    loss: mf.LeastSquares,
    walk: mf.Solution,
    start: eqx.nn.MLP,
    test_name: str,
    options: argparse.Namespace,
) -> None:
    """The network as .eqx, the path as .npz, the picture as .png."""
    eqx.tree_serialise_leaves(out / "network.eqx", walk.final)
    spectra = [
        np.linalg.eigvalsh(np.asarray(loss.scale * loss.jacobian(model).gram()))
        for model in (start, walk.final)
    ]
    np.savez(
        out / "walk.npz",
        times=walk.times,
        spectrum_before=spectra[0],
        spectrum_after=spectra[1],
        **walk.observables,
    )
    try:
        from manifoldflow.plotting import plot_walk
    except ImportError:
        print("no picture: python -m pip install 'manifoldflow[plot]'")
        return
    figure = plot_walk(
        walk,
        test="test",
        test_label=test_name,
        spectra=(spectra[0], spectra[1]),
        caption=f"An MLP with {options.width} tanh units that fits {options.examples} examples "
        "exactly, moved by the small-step limit of label-noise SGD. Left: the sharpness falls "
        f"while the training loss stays zero; the {test_name} is measured on examples never "
        "trained on. Right: the curvature that is lost, eigenvalue by eigenvalue.",
    )
    figure.savefig(out / "walk.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
