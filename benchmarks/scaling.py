"""What does one drift gain from many devices: measured on cores, and foreseen for TPU slices?

Measured: devices of one core each. Processes with 1, 2, 4 and 8 host devices are compiled first
and then take turns, one drift each, so that other work on the machine meets all alike. Strong
scaling keeps the problem; weak scaling doubles the examples with the devices, at the same number
of parameters. Throughput is counted in examples per second: the Gram matrix then has four times
the products, so that the gain in operations per second is larger. Processor time counts what
cores were busy with, whatever else ran on the machine; it says nothing of waiting, so that it
is the most that could be gained. "Copies" are that many drifts of one device each, at once and
without a message between them: what the machine itself has to give, as its cores share memory.

Foreseen: `plan`, compiled ahead of time for TPU slices of 1 to 256 chips (`pip install
"jax[tpu]"`; no TPU is needed, nothing is allocated). Memory, operations, traffic and messages are
those of the compiler's program, with loops counted as often as they run where they say so. The
time is a bound from below, the largest of three: operations at the peak of the matrix units
(products of float32 in full precision take six passes in bfloat16), traffic at the rate of the
memory, messages at the rate of the links of a chip. The three overlap at best.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

import _harness

# Google Cloud's documentation, "TPU v5e", "TPU v5p" and "TPU v6e": peak operations in bfloat16,
# bytes of memory, bytes per second of memory, and of all links of a chip in one direction.
CHIPS = {
    "v5e": (197e12, 16e9, 819e9, 200e9),
    "v5p": (459e12, 95e9, 2765e9, 600e9),
    "v6e": (918e12, 32e9, 1640e9, 400e9),
}
PASSES = 6
SLICES = {
    "v5e": {1: "2x2", 4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"},
    "v6e": {1: "2x2", 4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"},
    "v5p": {1: "2x2x1", 4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "8x8x4"},
}
# Width of the network, whose D is 2·width² and some more, and the nearest round D.
WIDTHS = {"1e6": 704, "1e7": 2304, "1e8": 7168, "1e9": 22528, "1e10": 70656}
NUMBERS = {"1e3": 1024, "1e4": 10240, "1e5": 102400}


# --- Measured ---------------------------------------------------------------------------


def serve(num_devices: int, width: int, num_examples: int) -> None:
    """One process: compiles, says what it counted, then runs one drift for each line it reads."""
    import contextlib

    import equinox as eqx
    import jax

    import manifoldflow as mf

    flow, model = _harness.limit_of_mlp(width, 3, num_examples)
    with mf.mesh(examples=num_devices) if num_devices > 1 else contextlib.nullcontext():
        loss = flow.manifold.loss
        spread = mf.shard_examples(loss) if num_devices > 1 else loss
        flow = mf.LimitDiffusion(mf.ZeroLossManifold(spread), flow.noise)
        drift = _harness.Compiled(lambda f, m: f.drift(m), flow, model)
        drift()
        plan = mf.plan(flow, model)
        size = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
        print(json.dumps({"D": size, "operations": plan.operations}), flush=True)
        for _ in sys.stdin:
            began, busy = time.perf_counter(), time.process_time()
            drift()
            taken = time.perf_counter() - began, time.process_time() - busy
            print(json.dumps(taken), flush=True)


class Process:
    """A server on cores from a first one on, one for each device as long as there are some."""

    def __init__(self, num_devices: int, width: int, num_examples: int, first_core: int = 0):
        self.setting = {"devices": num_devices, "width": width, "n": num_examples}
        cores = min(num_devices, os.cpu_count() or 1)
        count = f"--xla_force_host_platform_device_count={num_devices}"
        environment = os.environ | {
            "XLA_FLAGS": f"{count} --xla_cpu_multi_thread_eigen=false",
            "PJRT_NPROC": str(num_devices),
            "JAX_PLATFORMS": "cpu",
        }
        held = (
            ["taskset", "-c", ",".join(str(first_core + core) for core in range(cores))]
            if shutil.which("taskset")
            else []
        )
        call = f"import scaling; scaling.serve({num_devices}, {width}, {num_examples})"
        self._process = subprocess.Popen(
            [*held, sys.executable, "-c", call],
            cwd=_harness.HERE,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process for {self.setting} ended")
        return json.loads(line)

    def start(self) -> None:
        """One drift, whose seconds are to be read: of the clock, and of all cores together."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def measured(smoke: bool, repeats: int, most: int) -> list[dict[str, Any]]:
    """Each setting beside one device in the same turns: medians, and the spread of the ratios."""
    width, num_examples = (64, 64) if smoke else (1024, 512)
    sizes = [1, 2] if smoke else [size for size in (1, 2, 4, 8) if size <= most]
    cores = os.cpu_count() or 1
    settings = [("strong", k, num_examples) for k in sizes]
    if not smoke:  # there they would be one more of the same kind
        settings += [("weak", k, k * num_examples) for k in sizes[1:]]
    copies = sizes[:1] if smoke else sizes[1:]
    settings += [("copies", k, k * num_examples) for k in copies if k <= cores]
    groups = [
        [Process(1, width, num_examples, core) for core in range(k)]
        if kind == "copies"
        else [Process(k, width, n)]
        for kind, k, n in settings
    ]
    rows = [[process.read() for process in group][0] for group in groups]
    times: list[list[tuple[float, float]]] = [[] for _ in settings]
    for _ in range(repeats):
        for taken, group in zip(times, groups):
            for process in group:
                process.start()
            clock, busy = zip(*(process.read() for process in group))
            taken.append((max(clock), sum(busy)))
    for group in groups:
        for process in group:
            process.end()
    found = []
    base = times[0]
    one = rows[0]["operations"]
    for (kind, k, n), row, taken in zip(settings, rows, times):
        # Turn by turn, so that what slows the machine for a while slows both.
        ratios = [a[0] / b[0] * n / num_examples for a, b in zip(base, taken)]
        busy = [a[1] / b[1] * n / num_examples * min(k, cores) for a, b in zip(base, taken)]
        low, middle, high = quartiles(ratios)
        found.append(
            {
                "scaling": kind,
                "devices": k,
                "cores": min(k, cores),
                "D": row["D"],
                "n": n,
                "drift s": statistics.median(clock for clock, _ in taken),
                "examples/s ÷ one device": middle,
                "quartiles": f"{low:.2f}-{high:.2f}",
                "by processor time": statistics.median(busy),
                "operations a device ÷ one": row["operations"] / one,
            }
        )
    return found


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, statistics.median(values), high


# --- Foreseen ---------------------------------------------------------------------------


def wanted() -> list[dict[str, Any]]:
    """What is compiled: all sizes on 256 chips, and slices of every chip for one size."""
    rows: list[Any] = [("v5p", 256, d, n) for n in ("1e4", "1e3", "1e5") for d in WIDTHS]
    rows += [("v5p", k, "1e8", "1e4") for k in (64, 16, 4, 1)]
    rows += [("v5p", 1, d, "1e3") for d in ("1e6", "1e8")]
    rows += [("v5p", k, "1e9", "1e4") for k in (64, 16, 4)]
    rows += [(chip, k, "1e8", "1e4") for k in (256, 64, 16) for chip in ("v6e", "v5e")]
    # Where examples are few, more of the chips can share the parameters.
    rows += [("v5p", 256, "1e8", "1e3", 32)]
    return [
        {"chip": chip, "chips": k, "D ≈": d, "n ≈": n} | shape(chip, k, d, n, *parameters)
        for chip, k, d, n, *parameters in dict.fromkeys(rows)
    ]


def shape(chip: str, num_chips: int, size: str, number: str, parameters: int = 0) -> dict[str, Any]:
    """How the chips share: from 16 of them on parameters too, where ten whole ones take 1 GB.

    The chips are a square then, unless it is said how many share the parameters.
    """
    width, num_examples = WIDTHS[size], NUMBERS[number]
    root = {16: 4, 64: 8, 256: 16}.get(num_chips, 1)
    parameters = parameters or (root if 8 * width**2 * 10 > 1e9 else 1)
    return {
        "topology": f"{chip}:{SLICES[chip][num_chips]}",
        "examples": num_chips // parameters,
        "parameters": parameters,
        "width": width,
        "n": num_examples,
        "gram": f"DenseGram(is_distributed={num_chips > 1})",
    }


def foreseen(path: pathlib.Path, timeout: float) -> list[dict[str, Any]]:
    """All of them, each in a process of its own; what is in the file already is kept."""
    known = json.loads(path.read_text()) if path.exists() else {}
    for row in wanted():
        name = " ".join(str(value) for value in row.values())
        if name in known:
            continue
        call = [sys.executable, "_on_chips.py", json.dumps([row, int(CHIPS[row["chip"]][1])])]
        try:
            done = subprocess.run(
                call, cwd=_harness.HERE, capture_output=True, text=True, timeout=timeout
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            known[name] = json.loads(lines[-1]) if lines else row | {"failed": ending(done.stderr)}
        except subprocess.TimeoutExpired:
            known[name] = row | {"failed": f"no program after {timeout:.0f} s"}
        print(name, known[name].get("failed", known[name].get("GB a chip")), flush=True)
        path.write_text(json.dumps(known, indent=1) + "\n")
    order = lambda row: (row["chip"], row["n"], row["width"], row["chips"])
    return [with_bounds(row) for row in sorted(known.values(), key=order)]


def ending(text: str) -> str:
    lines = [line for line in text.splitlines() if "Error" in line or "RESOURCE" in line]
    return (lines or ["ended without a word"])[-1][:200]


def with_bounds(row: dict[str, Any]) -> dict[str, Any]:
    """The row of the table: how long each of the three takes at the least, and which is longest."""
    if "failed" in row:
        return {name: row.get(name, "–") for name in COLUMNS} | {"limited by": row["failed"]}
    peak, memory, bandwidth, links = CHIPS[row["chip"]]
    seconds = {
        "compute": PASSES * row["operations"] / peak,
        "memory": row["traffic"] / bandwidth,
        "network": sent(row) / links,
    }
    slowest = max(seconds, key=lambda name: seconds[name])
    fits = row["GB a chip"] <= memory / 1e9
    found = row | {f"{name} ms": 1e3 * value for name, value in seconds.items()}
    found |= {
        "Tflop a chip": row["operations"] / 1e12,
        "GB beside its share": beside_its_share(row),
        "GB received": sum(size for _, size in row["messages"].values()) / 1e9,
        "drift ms ≥": 1e3 * max(seconds.values()),
        "limited by": slowest if fits else "does not fit",
        "messages": ", ".join(f"{n} {kind}" for kind, (n, _) in row["messages"].items()) or "none",
    }
    return {name: found[name] for name in COLUMNS}


COLUMNS = (
    "chip chips examples parameters D n|GB a chip|GB beside its share|chunk|compile s|Tflop a chip"
    "|compute ms|memory ms|GB received|network ms|drift ms ≥|limited by|messages"
).split("|")
COLUMNS = COLUMNS[0].split() + COLUMNS[1:]


def beside_its_share(row: dict[str, Any]) -> float | str:
    """What docs/how-to/several_devices.md says that a chip holds where parameters are cut."""
    if row["parameters"] == 1:
        return "–"
    layer = row["width"] ** 2
    numbers = row["D"] / row["parameters"] + 2 * layer / row["parameters"]
    numbers += 3 * row["n"] / row["examples"] * row["width"]
    return 4e-9 * numbers + row["program GB"]


def sent(row: dict[str, Any]) -> float:
    """Bytes through the links of one chip: rings pass on all but a chip's own part, sums twice."""
    most = 1 - 1 / (row["examples"] * row["parameters"])
    passes = {"all-reduce": 2.0}
    messages = row["messages"].items()
    return sum(passes.get(kind, 1.0) * most * size for kind, (_, size) in messages)


def picture(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Memory and the bound on the time against the number of chips, for the size that all have."""
    import matplotlib.pyplot as plt

    from manifoldflow import plotting

    plt.style.use("manifoldflow.plotting.talk")
    colours = plotting.Colour.LIMIT, plotting.Colour.SGD, plotting.Colour.GRADIENT_FLOW
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for chip, colour in zip(CHIPS, colours):
        is_mine = lambda row: row["chip"] == chip and isinstance(row["GB a chip"], float)
        mine = [row for row in rows if is_mine(row) and row["n"] == NUMBERS["1e4"]]
        mine = [row for row in mine if 9e7 < row["D"] < 1.2e8]
        if not mine:
            continue
        mine.sort(key=lambda row: row["chips"])
        chips = [row["chips"] for row in mine]
        left.loglog(chips, [row["GB a chip"] for row in mine], "o-", color=colour, label=chip)
        left.axhline(CHIPS[chip][1] / 1e9, color=colour, linestyle=":", linewidth=1)
        bound = [row["drift ms ≥"] for row in mine]
        right.loglog(chips, bound, "o-", color=colour, label=f"{chip}, longest of three")
        for name, style in {"compute": "--", "memory": "-.", "network": ":"}.items():
            values = [row[f"{name} ms"] or float("nan") for row in mine]
            if chip == "v5p":
                grey = plotting.Colour.REFERENCE
                right.loglog(chips, values, style, color=grey, label=f"v5p, {name}")
    left.set(xlabel="chips", ylabel="memory of one chip / GB", title="Used, and there (dotted)")
    right.set(xlabel="chips", ylabel="time of one drift / ms", title="Bounds from below")
    for axes in (left, right):
        axes.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=9, loc="lower left" if axes is left else "upper right")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--only", choices=("measured", "foreseen"), help="one of the two parts")
    parser.add_argument("--devices", type=int, default=8, help="at most, that are measured")
    parser.add_argument("--timeout", type=float, default=400, help="seconds for one program")
    own, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    arguments = _harness.options(__doc__)
    question = __doc__.splitlines()[0]
    if own.only != "foreseen":
        load = os.getloadavg()[0]
        rows = measured(arguments.smoke, 1 if arguments.smoke else arguments.repeats, own.devices)
        note = f"load before the run: {load:.2f}; ratios turn by turn, their median and quartiles"
        _harness.write("scaling", question, rows, arguments, note=note)
    if own.only != "measured" and not arguments.smoke and importlib.util.find_spec("libtpu"):
        points = arguments.out / "scaling-points-tpu-aot.json"
        rows = foreseen(points, own.timeout)
        _harness.write("scaling", question, rows, arguments, target="tpu-aot")
        picture(rows, arguments.out / "scaling-tpu-aot.png")


if __name__ == "__main__":
    main()
