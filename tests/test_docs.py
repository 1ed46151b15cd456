"""The pages of docs/: their examples run, their links lead somewhere, and nothing is left out."""

import re
import sys

import numpy as np
import pytest

import manifoldflow as mf
import pages
from test_architecture import public_names

DOCS = pages.ROOT / "docs"
sys.path.append(str(DOCS))
import hooks

PAGES = sorted(DOCS.rglob("*.md"))
PROGRAMS = [program for page in PAGES for program in pages.programs(page)]
TEXTS = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}


@pytest.mark.every_case
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_example_runs(program, tmp_path):
    """Each stands alone, needs less than a minute, and prints what the page shows."""
    pages.run(program, tmp_path)


@pytest.mark.parametrize("code", ["print('1 failed')", "print('4 passed'); 1 / 0", "import gone"])
def test_a_bad_example_is_seen(code, tmp_path):
    with pytest.raises(AssertionError, match="bad"):
        pages.run(pages.Program("bad", {"block.py": code}, "4 passed"), tmp_path)


def test_links_lead_somewhere():
    missing = {page.name: pages.dead_links(page) for page in PAGES}
    assert not any(missing.values()), missing


def test_every_public_name_is_on_a_page():
    """By the pages of the packages, as they are written into the site."""
    shown = {package: hooks.package_page(package) for package in hooks.packages()}
    missing = [
        name
        for name in public_names()
        for package, _, last in [name.rpartition(".")]
        if not re.search(rf"^::: {re.escape(name)}$", shown[package], re.MULTILINE)
        and f"[`{last}`]" not in shown[package]
    ]
    assert not missing, f"public names that are on no page: {missing}"


def test_every_name_of_another_package_is_linked_to_its_page():
    """What a package shows by a link is written out on the page that the link leads to."""
    for package in hooks.packages():
        for home in re.findall(r"\]\[([\w.]+)\]", hooks.package_page(package)):
            page = hooks.package_page(home.rpartition(".")[0])
            assert f"::: {home}\n" in page, f"{package} links to {home}, which is not there"


def test_every_result_is_explained():
    """`When things fail` has a section for each member of RESULTS, with its first sentence."""
    text = " ".join(TEXTS["failures.md"].split())
    for name in result_names():
        assert f"### `{name}`" in text, f"failures.md has no section on RESULTS.{name}"
        sentence = re.split(r"(?<=[.?!]) ", mf.RESULTS[getattr(mf.RESULTS, name)])[0]
        assert " ".join(sentence.split()) in text, f"failures.md does not have: {sentence}"


def result_names():
    """All members, by the enumeration itself."""
    return list(mf.RESULTS._name_to_item)


def test_results_are_found():
    assert {"successful", "diverged", "unstable"} <= set(result_names())


def test_gallery_has_every_notebook():
    for notebook in hooks.notebooks():
        found = re.search(rf"{notebook.name}#picture-(\d+)\)$", TEXTS["gallery.md"], re.MULTILINE)
        assert found, f"gallery.md shows no picture of {notebook.name}"
        pictures = [name for name in hooks.notebook_pages(notebook) if not name.endswith(".md")]
        assert int(found[1]) <= len(pictures), f"{notebook.name} has {len(pictures)} pictures"


def test_every_citation_has_its_reference():
    """Keys as LiWangArora2022, wherever they are cited."""
    key = re.compile(r"\[([A-Z]\w+[a-z](?:19|20)\d\d)[\],;]")
    folders = "manifoldflow", "tests", "docs", "notebooks"
    files = [path for folder in folders for path in (pages.ROOT / folder).rglob("*.*")]
    texts = [p.read_text(encoding="utf-8") for p in files if p.suffix in (".py", ".md", ".ipynb")]
    cited = {found for text in texts for found in key.findall(text)}
    listed = set(re.findall(r"^- \*\*(\w+)\*\*", TEXTS["references.md"], re.MULTILINE))
    assert {"LiWangArora2022", "Ziyin2024"} <= cited
    assert cited <= listed, f"cited, and not in references.md: {sorted(cited - listed)}"


def test_citation_file_has_every_reference():
    """CITATION.cff has as many papers as references.md, with the same years."""
    listed = re.findall(r"^- \*\*[A-Za-z]+(\d{4})\*\*", TEXTS["references.md"], re.MULTILINE)
    citation = (pages.ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^    year: (\d{4})$", citation, re.MULTILINE)) == sorted(listed)


def test_bounds_on_slices_are_those_of_the_file():
    """Every number of the table of several devices, and the memory of four chips in the text."""
    text = TEXTS["how-to/several_devices.md"]
    (table,) = [table for table in pages.tables(text) if "GB a chip" in table[0]]
    kept = pages.results("scaling-tpu-aot")

    def is_same(value, shown):
        return shown == value if isinstance(value, str) else pages.rounds(value, shown)

    def found(row):
        """The row of the file with this chip, as many of them alike, and these sizes."""
        names = ("chip", "chips", "parameters", "D", "n")
        (one,) = [each for each in kept if all(is_same(each[name], row[name]) for name in names)]
        return one

    for row in table:
        for name, shown in row.items():
            value = found(row)[name]
            assert is_same(value, shown), f"{row}: {name} is shown as {shown}; kept is {value}"
    four = [row for row in table if (row["chip"], row["chips"], row["n"]) == ("v5p", "4", "10,240")]
    (shown,) = re.findall(r"with the Gram matrix spread ([\d.]+) GB", " ".join(text.split()))
    assert pages.rounds(found(four[0])["GB a chip"], shown), f"{shown} GB with four chips"


def test_sums_in_the_text_of_several_devices_are_those_of_the_files():
    """The memory of one chip and of 256, what bounds the latter, and the gain of two cores."""
    text = " ".join(TEXTS["how-to/several_devices.md"].split())
    kept, cores = pages.results("scaling-tpu-aot"), pages.results("scaling-cpu")

    def kept_of(number, chips, parameters, name="GB a chip"):
        names, values = ("chip", "chips", "parameters", "n"), ("v5p", chips, parameters, number)
        rows = [row for row in kept if tuple(row[name] for name in names) == values]
        (one,) = [row for row in rows if pages.rounds(row["D"], "1.0e8")]
        return one[name]

    def sums(number, parameters=16):
        share = 1.3 / 256 * kept_of(number, 1, 1)
        beside = kept_of(number, 256, parameters, "GB beside its share")
        return share, beside, share + beside

    share, beside, bound = sums(10_240)
    weak, copies = (
        row for row in cores if row["scaling"] in ("weak", "copies") and row["devices"] == 2
    )
    low, high = weak["quartiles"].split("-")
    many = {
        (row["scaling"], row["devices"]): row["examples/s ÷ one device"]
        for row in pages.results("scaling_many-cpu")
    }
    for sentence in (
        f"takes {kept_of(10_240, 1, 1):.2f} GB on one v5p chip and "
        f"{kept_of(10_240, 256, 16):.3f} GB on",
        f"1.3 shares of the former, {share:.3f} GB, and the items with the",
        f"program, {beside:.3f} GB, make {bound:.3f}.",
        f"n = 1,024 the two are {kept_of(1_024, 256, 16):.3f} and {sums(1_024)[2]:.3f}:",
        f"8×32 take {kept_of(1_024, 256, 32):.3f} GB, and their bound is {sums(1_024, 32)[2]:.3f}.",
        f"do {weak['examples/s ÷ one device']:.2f} times the examples per second of one",
        f"(quartiles {low} to {high};",
        f"and {weak['by processor time']:.2f} times by processor time.",
        f"no message between them, do {copies['examples/s ÷ one device']:.2f} times:",
        f"runs at {many['strong', 4]:.2f} and {many['strong', 8]:.2f} times the rate of one device",
        f"two devices did {many['weak', 2]:.2f} times, and two drifts without messages "
        f"{many['copies', 2]:.2f} times",
    ):
        assert sentence in text, f"several_devices.md does not say: {sentence}"


METHODS = {
    "15 steps of `walk` on `Rounding(4)`": "walk",
    "SAM, 13,000 gradients": "SAM",
    "mean of the weights of 13,000 more gradients": "weights' mean",
    "layers balanced by `symmetry.balance`": "balanced",
}


def test_what_survives_rounding_is_that_of_the_file():
    """Means over seeds of the loss against that of the network as trained, ± standard errors."""
    text, rows = TEXTS["how-to/walk.md"], pages.results("rounding-cpu")
    (table,) = [table for table in pages.tables(text) if "convolutional" in table[0]]
    assert [row[""] for row in table] == list(METHODS)

    def kept(network, method, name):
        rows_of = [r for r in rows if r["network"].lower() == network and r["method"] == method]
        return np.array([r[name] for r in sorted(rows_of, key=lambda r: r["seed"])])

    for row in table:
        for network in ("convolutional", "transformer"):
            name, where = "int4 per row: train loss", f"{row['']}, {network}: {row[network]}"
            losses = kept(network, METHODS[row[""]], name)
            if row[network] == "there is no rescaling":
                assert not len(losses), where
                continue
            shares = losses / kept(network, "as trained", name)
            assert len(shares) == 5, where
            error = shares.std(ddof=1) / len(shares) ** 0.5
            for shown, value in zip(row[network].split(" ± "), (shares.mean(), error), strict=True):
                assert pages.rounds(value, shown), f"{where}; kept is {value}"
    mean = lambda *key: f"{kept(*key).mean():.2f}"
    four, plain, both = (
        "int4 per row: test accuracy",
        "test accuracy",
        ("convolutional", "transformer"),
    )
    first, second = (f"{mean(n, 'as trained', four)} to {mean(n, 'walk', four)}" for n in both)
    walked, trained = (
        " and ".join(mean(n, method, plain) for n in both) for method in ("walk", "as trained")
    )
    five = " and ".join(mean(n, "as trained", "int5 per row: test accuracy") for n in both)
    for sentence in (
        f"with 4 bits rose from {first} and from {second};",
        f"which has {walked} without rounding, where it had {trained}.",
        f"With 5 bits the accuracy as trained is {five} already.",
    ):
        assert sentence in " ".join(text.split()), f"walk.md does not say: {sentence}"


@pytest.mark.parametrize(
    ("shown", "value", "agree"),
    [
        ("1.4", 1.3998, True), ("1.4", 1.46, False), ("1.0e8", 103018497, True),
        ("10,240", 10240, True), ("0.035", 0.0346, True), ("0.035", 0.0344, False),
    ],
)  # fmt: skip
def test_shown_numbers_are_rounded(shown, value, agree):
    assert pages.rounds(value, shown) == agree


@pytest.mark.parametrize(
    ("shown", "printed", "agree"),
    [
        ("tr 31.2 of 1e-07", "tr 31.0 of 8e-06", True),
        ("tr 31.2", "tr 26.0", False),
        ("4 passed", "4 passed in 3.2s", True),
        ("holds: True", "holds: False", False),
        ("η = 0.1: 5", "η = 0.1", False),
    ],
)
def test_shown_lines_are_compared(shown, printed, agree):
    assert pages.agree(shown, printed) == agree
