"""The same network in PyTorch, and its ways to tr∇²L, its gradient and the drift.

Not a benchmark itself. torch and BackPACK are imported when a way is asked for.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from _harness import fastest
from _rivals_jax import DRIFT, GRADIENT, Problem, VALUE, Way

CHUNK = 32


class Network:
    """The same weights, inputs and scale; a new one for every way, as hooks stay in a module."""

    def __init__(self, problem: Problem):
        import torch

        self.torch = torch
        has_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
        self.device = torch.device("cuda" if has_gpu else "cpu")
        tensor = lambda x: torch.tensor(np.asarray(x), device=self.device)
        layers: list[Any] = []
        for layer in problem.model.layers:
            linear = torch.nn.Linear(layer.in_features, layer.weight.shape[0], device=self.device)
            with torch.no_grad():
                linear.weight.copy_(tensor(layer.weight))
                linear.bias.copy_(tensor(layer.bias))
            layers += [linear, torch.nn.Tanh()]
        self.module = torch.nn.Sequential(*layers[:-1])
        self.inputs = tensor(problem.loss.inputs)
        self.scale, self.factor = problem.scale, problem.factor
        self.params = dict(self.module.named_parameters())

    # torch.func

    def rows(self, params: Any, inputs: Any) -> Any:
        func = self.torch.func
        output = lambda p, x: func.functional_call(self.module, p, (x,))[0]
        return func.vmap(func.grad(output), in_dims=(None, 0))(params, inputs)

    def trace_of_rows(self, params: Any, inputs: Any) -> Any:
        rows = self.rows(params, inputs)
        return self.scale * sum((leaf**2).sum() for leaf in rows.values())

    @property
    def detached(self) -> dict[str, Any]:
        return {name: leaf.detach() for name, leaf in self.params.items()}

    def value(self) -> Any:
        params = self.detached
        return sum(self.trace_of_rows(params, xs) for xs in self.inputs.split(CHUNK))

    def gradient(self) -> list[Any]:
        pieces = self.torch.func.grad(self.trace_of_rows)
        total = [self.torch.zeros_like(leaf) for leaf in self.params.values()]
        params = self.detached
        for inputs in self.inputs.split(CHUNK):
            for sum_of_leaf, piece in zip(total, pieces(params, inputs).values()):
                sum_of_leaf += piece
        return total

    def drift(self) -> list[Any]:
        rows = self.rows(self.detached, self.inputs)
        return self.project(list(rows.values()), self.gradient())

    # BackPACK, whose extensions run in the backward pass of Σᵢ fᵢ

    def extended(self) -> None:
        from backpack import extend

        # Both hold here and are dealt with: the data need no gradient, `forget` breaks cycles.
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph")
        extend(self.module)

    def norms_by_backpack(self, create_graph: bool) -> Any:
        from backpack import backpack
        from backpack.extensions import BatchL2Grad

        with backpack(BatchL2Grad()):
            self.module(self.inputs).sum().backward(
                create_graph=create_graph, inputs=list(self.params.values())
            )
        total = self.scale * sum(leaf.batch_l2.sum() for leaf in self.params.values())
        self.forget()
        return total

    def gradient_by_backpack(self) -> list[Any]:
        total = self.norms_by_backpack(True)
        # The norm of the last bias' rows is constant, and no part of the graph.
        return list(
            self.torch.autograd.grad(total, list(self.params.values()), materialize_grads=True)
        )

    def drift_by_backpack(self) -> list[Any]:
        from backpack import backpack
        from backpack.extensions import BatchGrad

        gradient = self.gradient_by_backpack()
        with backpack(BatchGrad()):
            self.module(self.inputs).sum().backward()
        rows = [leaf.grad_batch.detach() for leaf in self.params.values()]
        self.forget()
        return self.project(rows, gradient)

    def forget(self) -> None:
        for leaf in self.params.values():
            leaf.grad = None
            for name in ("batch_l2", "grad_batch"):
                if hasattr(leaf, name):
                    delattr(leaf, name)

    def project(self, rows: list[Any], vector: list[Any]) -> list[Any]:
        """factor·(v − Jᵀ(JJᵀ)⁻¹J v), three times, as often as the others in float32."""
        matrices = [leaf.flatten(1) for leaf in rows]
        cholesky = self.torch.linalg.cholesky(sum(matrix @ matrix.T for matrix in matrices))
        for _ in range(3):
            image = sum(m @ v.flatten() for m, v in zip(matrices, vector))
            weights = self.torch.cholesky_solve(image[:, None], cholesky)[:, 0]
            vector = [v - (weights @ m).view_as(v) for m, v in zip(matrices, vector)]
        return [self.factor * v for v in vector]


def ways(problem: Problem) -> list[Way]:
    """Functions without arguments that return a function to time."""

    def ready(method: Callable[[Network], Any], is_extended: bool) -> Callable[[], Any]:
        def make() -> "Timed":
            network = Network(problem)
            if is_extended:
                network.extended()
            return Timed(network, method)

        return make

    table: list[tuple[str, str, str, Callable[[Network], Any]]] = [
        (VALUE, f"torch.func, chunks of {CHUNK}", "torch", Network.value),
        (GRADIENT, f"torch.func, chunks of {CHUNK}", "torch", Network.gradient),
        (DRIFT, f"torch.func, chunks of {CHUNK}, Cholesky of JJᵀ", "torch", Network.drift),
        (VALUE, "BatchL2Grad", "backpack", lambda net: net.norms_by_backpack(False)),
        (GRADIENT, "BatchL2Grad, create_graph", "backpack", Network.gradient_by_backpack),
        (DRIFT, "BatchL2Grad, BatchGrad, Cholesky", "backpack", Network.drift_by_backpack),
    ]
    return [
        Way(question, name, package, ready(method, package == "backpack"), ())
        for question, name, package, method in table
    ]


class Timed:
    """The face of `_harness.Compiled` for PyTorch."""

    compile_seconds = 0.0

    def __init__(self, network: Network, method: Callable[[Network], Any]):
        self._network, self._method = network, method
        self.temporary_mb = self._peak() / 2**20

    def __call__(self) -> Any:
        """The value, or leaves in the order of the model's."""
        result = self._method(self._network)
        if self._network.device.type == "cuda":
            self._network.torch.cuda.synchronize()
        return result

    def numpy(self) -> list[np.ndarray]:
        result = self()
        leaves = result if isinstance(result, list) else [result]
        return [leaf.detach().cpu().numpy() for leaf in leaves]

    def seconds(self, repeats: int) -> float:
        return fastest(self, repeats)

    def _peak(self) -> int:
        """Bytes allocated at the worst moment of one call, beyond what was there before."""
        torch = self._network.torch
        if self._network.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(profile_memory=True) as profile:
            self()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
        return max(0, int(np.max(np.cumsum(sizes), initial=0)))
