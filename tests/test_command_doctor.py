"""First aid on the command line: what is wrong is found, with its remedy; what is sound passes."""

import getpass
import os
import pathlib
import re
from importlib import metadata
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import manifoldflow as mf
from checks import at_most, equal
from manifoldflow.__main__ import main
from manifoldflow._command import _doctor, _machine, _trials
from manifoldflow._command._finding import Finding
from manifoldflow._command._versions import is_within, of_package, of_version, versions


def only(findings):
    """The one finding that is wrong, or has a remedy."""
    (found,) = [finding for finding in findings if finding.remedy]
    return found


def test_a_sound_installation(capsys):
    """All of it, on this machine; no setting of JAX is changed."""
    names = "jax_enable_x64", "jax_compilation_cache_dir"
    before = [getattr(jax.config, name) for name in names]
    status = main(["doctor"])
    out = capsys.readouterr().out
    assert status == 0 and "**WRONG**" not in out, out
    equal("settings", [getattr(jax.config, name) for name in names], before)
    assert out.startswith("### manifoldflow doctor: nothing is wrong\n"), out
    for heading in _doctor.SECTIONS:
        assert f"\n**{heading}**\n\n- " in out, out
    for name in ("python", "jax", "jaxlib", "numpy", "equinox", "diffrax", "optax", "lineax"):
        assert re.search(rf"^- {name} \d+\.\d+.* \(supported: .+\)$", out, re.MULTILINE), name
    assert f"\n- optimistix {metadata.version('optimistix')} (supported" in out, out
    assert "- the library's batched factorisations end" in out, out
    found = re.search(r"off by (\S+); first call (\S+) s, second (\S+) ms", out)
    assert found, out
    error, first, second = map(float, found.groups())
    at_most("error of the walk", error, 1e-5)
    assert second < 1e3 * first, "the second call compiles again"
    assert str(pathlib.Path.home()) + os.sep not in out, out


def test_it_is_listed(capsys):
    for command, words in (
        (["--help"], "python -m manifoldflow doctor"),
        (["doctor", "--help"], "exit"),
    ):
        with pytest.raises(SystemExit):
            main(command)
        assert words in capsys.readouterr().out
    assert main(["doctor", "--seed", "1"]) == 2
    assert "`manifoldflow doctor --help` lists" in capsys.readouterr().err


@pytest.mark.quick
def test_the_exit_status_says_whether_something_is_wrong(capsys, monkeypatch):
    sections = {
        "One": lambda: [Finding("sound"), Finding("slow", "Do this")],
        "Two": lambda: [Finding("broken", "Do that", is_wrong=True)],
    }
    monkeypatch.setattr(_doctor, "SECTIONS", sections)
    assert main(["doctor"]) == 1
    expected = (
        "### manifoldflow doctor: 1 wrong\n\n**One**\n\n- sound\n- note: slow. Do this\n\n"
        "**Two**\n\n- **WRONG**: broken. Do that\n"
    )
    equal("report", capsys.readouterr().out, expected)
    sections.pop("Two")
    assert main(["doctor"]) == 0, "a note is no fault"


def test_no_names_of_users():
    home, user = str(pathlib.Path.home()), getpass.getuser()
    text = f"{home}/cache in {home}, {home}2, a/{user}/b and {user}s"
    equal("line", str(Finding(text)), f"- ~/cache in ~, {home}2, a/USER/b and {user}s")
    equal("remedy", str(Finding("x", f"see {home}/y")), "- note: x. see ~/y")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("version", "bounds", "expected"),
    [
        ("0.10.0", ">=0.10", True),
        ("0.10", ">=0.10.0", True),
        ("0.9.9", ">=0.10", False),
        ("0.8.0", "<0.8,>=0.7.2", False),
        ("0.7.10", "<0.8,>=0.7.2", True),
        ("0.7.1", "<0.8, >=0.7.2", False),
        ("1.2.3.dev4+local", ">1.2.2", True),
        ("2.0", "==2.0.0", True),
        ("2.0.1", "!=2.0.1", False),
        ("2.0.1", "<=2.0", False),
        ("3.13.0", "", True),
    ],
)
def test_ranges_of_versions(version, bounds, expected):
    equal(f"{version} in {bounds}", is_within(version, bounds), expected)


def test_versions_outside_the_range():
    old = of_version("equinox", "0.13.6", ">=0.13.7")
    assert old.is_wrong and '`python -m pip install "equinox>=0.13.7"`' in old.remedy
    assert of_package("no-such-package", ">=1", "").is_wrong
    assert not of_package("no-such-package", ">=1", "plot").remedy, "extras may be absent"
    assert of_version("python", "3.10.4", ">=3.11").is_wrong


def test_versions_without_an_installation(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert "pip install -e" in only(versions()).remedy


def test_no_device(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'tpu'\nmore")

    monkeypatch.setattr(jax, "devices", devices)
    found = only(_machine.devices())
    assert found.is_wrong and "JAX_PLATFORMS=cpu" in found.remedy and "more" not in found.text


def test_a_gpu_that_is_not_seen(monkeypatch):
    monkeypatch.setattr(
        jax, "devices", lambda: [SimpleNamespace(platform="cpu", device_kind="cpu")]
    )
    monkeypatch.setattr(_machine.shutil, "which", lambda name: name)
    found = only(_machine.devices())
    assert "pip install" in found.remedy and not found.is_wrong
    monkeypatch.setattr(_machine.shutil, "which", lambda name: None)
    assert not any(finding.remedy for finding in _machine.devices())


def test_precision(monkeypatch):
    assert not any(finding.remedy for finding in _machine.precision()), "float64 is on"
    with monkeypatch.context() as context:
        context.setattr(jax.numpy, "matmul", lambda x, y: jnp.dot(x, y) * (1 + 2.0**-11))
        assert "MATMUL_PRECISION=highest" in only(_machine.precision()).remedy
    with jax.enable_x64(False):
        found = only(_machine.precision())
    assert "JAX_ENABLE_X64=1" in found.remedy and "rtol 1e-4" in found.text


def test_threads(monkeypatch):
    monkeypatch.setattr(_machine, "num_cores", lambda: 2)
    assert "OPENBLAS_NUM_THREADS" in only(_machine.threads({})).text
    environment = {"OPENBLAS_NUM_THREADS": "1", "PJRT_NPROC": "8", "PATH": "x", "XLA_FLAGS": "--a"}
    lines = [str(finding) for finding in _machine.threads(environment)]
    equal("threads", lines[0], "- 2 cores; XLA has 8 threads for its work")
    equal("settings", lines[1], "- settings: `OPENBLAS_NUM_THREADS=1 PJRT_NPROC=8 XLA_FLAGS=--a`")
    monkeypatch.setattr(_machine, "num_cores", lambda: 64)
    assert not any(finding.remedy for finding in _machine.threads({}))


@pytest.mark.quick
def test_compiled_programs(monkeypatch, tmp_path):
    least = "jax_persistent_cache_min_compile_time_secs"
    settings = {"jax_compilation_cache_dir": None, least: 0.0}
    monkeypatch.setattr(_machine, "setting", settings.__getitem__)

    def looked(folder):
        settings["jax_compilation_cache_dir"] = folder and str(folder)
        (found,) = _machine.programs()
        return found

    assert "JAX_COMPILATION_CACHE_DIR" in looked(None).remedy
    (tmp_path / "a").write_bytes(b"0" * 3_000_000)
    (tmp_path / "b").write_bytes(b"0" * 4_000_000)
    assert "7 MB in 2 files" in looked(tmp_path).text and not looked(tmp_path).remedy
    assert not looked(tmp_path / "new" / "folder").remedy
    assert not (tmp_path / "new").exists(), "looking makes nothing"
    wrong = looked(tmp_path / "a" / "folder")
    assert wrong.is_wrong and "Name another" in wrong.remedy
    assert not looked("gs://bucket/programs").remedy
    settings[least] = 1.0
    assert f"{least.upper()}=0" in looked(tmp_path).remedy


@pytest.mark.parametrize(
    ("program", "words", "is_wrong"),
    [
        ("print('library jaxlib')", [], False),
        ("import os; print('library', flush=1); os._exit(3)", ["jaxlib's own", "NPROC=8"], False),
        ("import os; os._exit(3)", ["the library's batched", "PJRT_NPROC=8"], True),
        ("raise RuntimeError('no LAPACK')", ["RuntimeError: no LAPACK"], True),
    ],
)  # fmt: skip
def test_factorisations_that_do_not_end(program, words, is_wrong):
    found = _trials.factorisations(program)
    assert all(word in "\n".join(map(str, found)) for word in words), found
    equal("wrong", any(finding.is_wrong for finding in found), is_wrong)
    equal("remedies", sum(bool(finding.remedy) for finding in found), int(bool(words)))


def test_a_process_that_does_not_start(monkeypatch):
    monkeypatch.setattr(_trials, "START", 0.2)
    assert only(_trials.factorisations("import time; time.sleep(60)")).is_wrong


def test_the_self_test_can_fail(monkeypatch):
    solve = mf.solve
    with monkeypatch.context() as context:
        context.setattr(mf, "solve", lambda *a, end_time: solve(*a, end_time=1.001 * end_time))
        found = only(_trials.self_test())
        assert found.is_wrong and "report this" in found.remedy

    def broken(*arguments, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such thing\nmore")

    monkeypatch.setattr(mf, "solve", broken)
    found = only(_trials.self_test())
    assert found.is_wrong and found.text.endswith("INTERNAL: no such thing"), found
