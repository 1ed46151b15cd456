"""Bad arguments end in the library's own sentences: none is accepted, none fails in the depths."""

import inspect
import json
import pathlib
from collections import Counter

import fuzz
import processes
from fuzz_exempt import ELSEWHERE, RESULT_CLASSES
from fuzz_table import CALLS
from test_architecture import public_names

HERE = pathlib.Path(__file__).parent
NUM_CASES = 400


def callables() -> dict[str, object]:
    """What can be called of all public names, each by its shortest one."""
    found: dict[int, str] = {}
    names = public_names()
    for name in sorted(names, key=lambda name: (name.count("."), name)):
        found.setdefault(id(names[name]), name.removeprefix("manifoldflow."))
    objects = {short: names[f"manifoldflow.{short}"] for short in found.values()}
    return {short: thing for short, thing in objects.items() if callable(thing)}


def test_every_public_callable_is_tried():
    abstract = {name for name in callables() if name.rpartition(".")[2].startswith("Abstract")}
    missing = set(callables()) - set(CALLS) - RESULT_CLASSES - ELSEWHERE - abstract
    assert not missing, f"give fuzz_table a valid call of {sorted(missing)}"
    gone = (set(CALLS) | RESULT_CLASSES | ELSEWHERE) - set(callables())
    assert not gone, f"no longer public: {sorted(gone)}"


def test_every_argument_of_the_table_is_one():
    wrong = [
        f"{name}({argument})"
        for name, arguments in CALLS.items()
        for argument in arguments
        if argument not in inspect.signature(fuzz.callable_of(name)).parameters
        or not fuzz.KINDS[fuzz.kind_of(name, argument)]
    ]
    assert not wrong, wrong


def test_bad_arguments_are_refused():
    """In a process without the tests' type checker, as users have it."""
    words = HERE / "fuzz.py", 0, NUM_CASES
    run = processes.Running(words, environment={"JAX_TRACEBACK_FILTERING": "off"}).finished(1200)
    assert run.returncode == 0, run.stderr[-2000:]
    outcomes = dict(json.loads(line) for line in run.stdout.splitlines())
    assert len(outcomes) == NUM_CASES, Counter(outcomes.values())
    wrong = {case: what for case, what in outcomes.items() if what not in ("own", "nan")}
    assert not wrong, "\n".join(f"{case}: {what}" for case, what in wrong.items())


def test_the_judge_knows_what_is_raw():
    """An error of Python or JAX inside the library is none of its own, nor is a plain result."""
    case = fuzz.Case("linalg.numerical_rank", "eigenvalues", "a string")
    fuzz.jax.config.update("jax_traceback_filtering", "off")  # as in the process above
    try:
        assert fuzz.outcome(case) == "own"
    finally:
        fuzz.jax.config.update("jax_traceback_filtering", "auto")
    for raise_raw in (lambda: fuzz.jnp.ones(3) @ fuzz.jnp.ones(2), lambda: {}["x"]):
        try:
            raise_raw()
        except Exception as error:
            assert not fuzz.is_own(error), error
    assert not fuzz.has_nan(fuzz.jnp.ones(2)) and fuzz.has_nan({"x": fuzz.jnp.array(fuzz.NAN)})
