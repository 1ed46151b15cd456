"""Checkpoints are whole or refused, written by one run at a time, and disks may fail."""

import errno
import io
import os
import re
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import manifoldflow as mf
from checks import equal, refused
from manifoldflow._journal import _files
from sgd_runs import short

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS))
SPHERE = mf.LevelSet(lambda p: jnp.sum(p**2) - 1)
FLOW = mf.RiemannianGradientFlow(SPHERE, lambda p: p[0])


def run(**options):
    return short(num_steps=6, num_saves=3, **options)


def followed(file, **options):
    return mf.solve(FLOW, jnp.ones(3), end_time=0.4, num_saves=4, checkpoint=file, **options)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of a checkpoint."""
    file = tmp_path_factory.mktemp("whole") / "run.npz"
    run(checkpoint=file)
    return file.read_bytes()


def repacked(content, change):
    """The archive written anew by NumPy, with other arrays."""
    with np.load(io.BytesIO(content)) as stored:
        arrays = {name: stored[name] for name in stored.files}
    change(arrays)
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def with_old_end(content, change):
    """The same with the end of the file that it was made of."""
    end = content[-_files._NUM_END :]
    return repacked(content, change)[:-2] + len(end).to_bytes(2, "little") + end


def pickled(arrays):
    arrays["point_0"] = np.array([{"a": 1}, None], dtype=object)


def swapped(arrays):
    arrays["point_0"], arrays["times"] = arrays["times"], arrays["point_0"]


def old_solve(arrays):
    point = arrays["point_0"]
    arrays.clear()
    arrays.update(times=np.arange(4.0), velocity=np.zeros(3), point_0=point)


def old_simulate(arrays):
    arrays.pop("about")
    arrays["fingerprint"] = np.zeros((3, 2))


CHANGES = {
    "nothing": lambda arrays: None,
    "one array less": lambda arrays: arrays.pop("steps"),
    "one array more": lambda arrays: arrays.update(point_1=np.zeros(4)),
    "NaN column": lambda arrays: arrays.update(point_0=np.full((4, 3), np.nan)),
    "shorter column": lambda arrays: arrays.update(point_0=arrays["point_0"][:2]),
    "longer column": lambda arrays: arrays.update(times=np.arange(9.0)),
    "another type": lambda arrays: arrays.update(point_0=arrays["point_0"].astype("f4")),
    "another shape": lambda arrays: arrays.update(point_0=arrays["point_0"].T),
    "one bit": lambda arrays: arrays["point_0"].view(np.uint8).__setitem__((2, 3), 1),
    "step beyond": lambda arrays: arrays.update(step=np.asarray(4)),
    "no text": lambda arrays: arrays.update(about=np.zeros(0, np.uint8)),
    "another text": lambda arrays: arrays.update(about=np.frombuffer(b'{"format": 2}', np.uint8)),
    "pickles": pickled,
    "swapped": swapped,
}


def broken(content):
    """Name → what is in the file in the place of `content`."""
    num = len(content)
    rng = np.random.default_rng(0)
    files = {
        f"cut at {at}": content[:at]
        for at in (0, 1, 2, 4, 30, num // 4, num // 2, num - 200, num - 84, num - 40, num - 1)
    }
    for at in (0, 5, 12, *rng.integers(30, num, 8), num - 100, num - 60, num - 1):
        files[f"byte {at}"] = content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]
    files["zeros"] = bytes(num)
    files["a block of zeros"] = content[: num // 2] + bytes(512) + content[num // 2 + 512 :]
    files["one byte more"] = content + b"\0"
    files["something before"] = b"#!" + content
    files["twice"] = content + content
    files["text"] = b"not a checkpoint\n" * 40
    files["only the mark"] = _files._MARK + b"0" * 64
    for name, change in CHANGES.items():
        files[f"rewritten: {name}"] = repacked(content, change)
        if change is not CHANGES["nothing"]:
            files[f"old end: {name}"] = with_old_end(content, change)
    return files


def one_sentence(error):
    """Whether the message names the file, what is wrong with it, and what to do."""
    message = str(error)
    return (
        type(error) in (ValueError, OSError)
        and "\n" not in message
        and ".npz" in message
        and re.search(r"Delete it|[Gg]ive (this \w+ )?another|Make room|make room", message)
    )


@pytest.mark.quick
def test_broken_files_are_refused(tmp_path, content):
    file = tmp_path / "run.npz"
    file.write_bytes(content)
    equal("the whole one", mf.load_checkpoint(file, jnp.ones(3))[1].shape, (3,))
    num_tried, wrong = 0, []
    reads = {
        "load_checkpoint": lambda: mf.load_checkpoint(file, jnp.ones(3)),
        "resume": lambda: run(resume=file),
        "checkpoint": lambda: run(checkpoint=file),
    }
    for number, (name, broken_content) in enumerate(broken(content).items()):
        file.write_bytes(broken_content)
        # All by the one reader that they share, every third by each of its users.
        for how in reads if number % 6 == 0 else ["load_checkpoint"]:
            num_tried += 1
            try:
                reads[how]()
                wrong.append(f"{how} took a file broken by: {name}")
            except Exception as error:
                if not one_sentence(error):
                    wrong.append(f"{name}, {how}: {type(error).__name__}: {error}")
        assert file.read_bytes() == broken_content, f"{name}: the file was touched"
    assert not wrong, "\n".join(wrong)
    assert num_tried > 70, num_tried


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (old_solve, "an older version"),
        (old_simulate, "an older version"),
        (lambda arrays: None, "something else has rewritten"),
        (
            lambda arrays: arrays.pop("about"),
            "not a checkpoint of `solve`, `simulate` or `minimize`",
        ),
    ],
)
def test_what_a_file_is_instead(tmp_path, content, change, words):
    (tmp_path / "run.npz").write_bytes(repacked(content, change))
    with refused(ValueError, words):
        mf.load_checkpoint(tmp_path / "run", jnp.ones(3))


def test_folders_names_and_other_kinds(tmp_path, content):
    (tmp_path / "folder.npz").mkdir()
    for call in (
        lambda: run(checkpoint=tmp_path / "folder"),
        lambda: run(resume=tmp_path / "folder.npz"),
        lambda: mf.load_checkpoint(tmp_path / "folder", jnp.ones(3)),
        lambda: followed(tmp_path / "folder"),
        lambda: mf.load_checkpoint(tmp_path / "nothing", jnp.ones(3)),
    ):
        with refused(OSError, ".npz", "nother"):
            call()
    (tmp_path / "file").write_bytes(content)
    with refused(OSError, "cannot be written", "another path"):
        run(checkpoint=tmp_path / "file" / "run")
    for name in ("", "folder/", "a\0b"):
        with refused(ValueError, "name of a file"):
            run(checkpoint=name)
    (tmp_path / "run.npz").write_bytes(content)
    with refused(ValueError, "checkpoint of `simulate`, not a checkpoint of `solve`"):
        followed(tmp_path / "run")


def failing(monkeypatch, name, error, after=0):
    """A function of `os` that raises from its call number `after` on."""
    real, num_calls = getattr(os, name), 0

    def fail(*args, **options):
        nonlocal num_calls
        num_calls += 1
        if num_calls > after:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize(
    ("name", "error", "why"),
    [
        ("open", READ_ONLY, "Read-only file system"),
        ("fsync", FULL, "No space left on device"),
        ("makedirs", PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
def test_a_disk_that_fails_is_found_before_the_run(tmp_path, monkeypatch, name, error, why):
    failing(monkeypatch, name, error)
    begun = []
    with refused(OSError, why, "cannot be written", "another path"):
        followed(tmp_path / "run", progress=begun.append)
    monkeypatch.undo()
    equal("saves", begun, [])
    equal("left behind", os.listdir(tmp_path), [])


def test_too_little_space_is_found_before_the_run(tmp_path, monkeypatch):
    space = _files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(_files.shutil, "disk_usage", lambda path: space._replace(free=10_000))
    with refused(OSError, "0.01 MB are free", "Make room"):
        run(checkpoint=tmp_path / "run")
    equal("left behind", os.listdir(tmp_path), [])


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_is_full_later_leaves_the_last_whole_file(tmp_path, monkeypatch, name):
    file = tmp_path / "run"
    shown = []

    def fill_up(row):
        shown.append(float(row["time"]))
        if len(shown) == 3:
            failing(monkeypatch, name, FULL)

    with refused(OSError, "No space left on device", "make room", "go on"):
        followed(file, progress=fill_up)
    monkeypatch.undo()
    equal("files", os.listdir(tmp_path), ["run.npz"])
    equal("time of the last save", float(mf.load_checkpoint(file, jnp.ones(3))[0]), shown[2])
    whole = followed(tmp_path / "other")
    equal("the rest", followed(file).points.tobytes(), whole.points.tobytes())


def test_one_run_at_a_time(tmp_path):
    file = tmp_path / "run"
    (tmp_path / "run.npz.lock").write_text("process 1 on a machine that is gone")
    (tmp_path / "run.npz.0123.partial").write_bytes(b"left by a run that was killed")
    messages = []

    def begin_again(row):
        try:
            followed(file)
        except OSError as error:
            messages.append(str(error))

    followed(file, progress=begin_again)
    equal("refused", len(messages), 5)
    me = f"in use by process {os.getpid()} on .* since 20.*give this run another file"
    assert re.search(me, messages[0]), messages[0]
    equal("left behind", os.listdir(tmp_path), ["run.npz"])
    followed(file)  # which is free again


WRITER = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("files", {module!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
for number in range(150):
    files.write_whole({file!r}, {{"a": np.full(2000, int(sys.argv[1])), "b": np.asarray(number)}})
    arrays = files.read_whole({file!r}, "`solve`")
    assert len(set(arrays["a"].tolist())) == 1
"""


def test_two_writers_never_spoil_a_file(tmp_path):
    """Even without the lock, as on a file system that has none."""
    file = os.fspath(tmp_path / "run.npz")
    script = WRITER.format(module=_files.__file__, file=file)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(number)], stderr=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    for writer in writers:
        error = writer.communicate(timeout=200)[1]
        equal(f"exit {error[-500:]}", writer.returncode, 0)
    equal("files", os.listdir(tmp_path), ["run.npz"])


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path):
    file = os.fspath(tmp_path / "run.npz")
    script = WRITER.replace("range(150)", "range(10**9)").format(module=_files.__file__, file=file)
    for number in range(5):
        with subprocess.Popen([sys.executable, "-c", script, str(number)]) as writer:
            while not os.path.exists(file) or _files.read_whole(file, "")["a"][0] != number:
                assert writer.poll() is None, "the writer failed"
            writer.send_signal(signal.SIGKILL)
        equal("what is there", set(_files.read_whole(file, "")["a"].tolist()), {number})
    _files.remove_leftovers(file)
    equal("files", os.listdir(tmp_path), ["run.npz"])
