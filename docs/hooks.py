"""What MkDocs finds in the repository besides docs/: README, packages, notebooks, linked files.

A link is written as GitHub reads it, relative to the file that has it, and may lead anywhere in
the repository. README.md becomes the home page, a notebook a page with its figures, a file of
code a page that shows it. None of them is kept twice.
"""

import ast
import base64
import functools
import json
import pathlib
import posixpath
import re
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "manifoldflow"
# A block of code, in which nothing is a link; else a link and its place on the page.
BLOCK = re.compile(r"^(```+).*?^\1$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")
# A paragraph that is one link to a picture of a notebook, as the gallery has them.
PICTURE = re.compile(r"^\[([^\]]*)\]\(([^)#\s]+)\.ipynb#picture-(\d+)\)$", re.MULTILINE)
OUTPUT = re.compile(r"notebooks/\w+-\d+\.(?:png|svg)")  # what `notebook_pages` takes out of them
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".yml": "yaml", ".sh": "bash"}
PICTURES = {"image/png": "png", "image/svg+xml": "svg"}

# --- Packages ---------------------------------------------------------------------------


@functools.cache
def packages() -> list[str]:
    """The dotted names of all public packages."""
    folders = (path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py"))
    names = (".".join(folder.parts) for folder in folders)
    return sorted(name for name in names if "._" not in name)


@functools.cache
def exports(package: str) -> dict[str, str]:
    """Name → the module that a public package takes it from, in alphabetical order."""
    path = ROOT.joinpath(*package.split("."), "__init__.py")
    found = {
        alias.asname: str(node.module)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    return dict(sorted(found.items(), key=lambda item: (item[0].lower(), item[0])))


def home_of(name: str, source: str) -> str | None:
    """The public package whose page has a name that another one shows as well."""
    return source if source in packages() and name in exports(source) else None


def package_page(package: str) -> str:
    """The page of a public package: its own names, and links to those of other packages."""
    own, others = [], {}
    for name, source in exports(package).items():
        if f"{package}.{name}" in packages():
            others.setdefault("packages", []).append(f"[`{name}`]({package}.{name}.md)")
        elif home := home_of(name, source):
            others.setdefault(home, []).append(f"[`{name}`][{home}.{name}]")
        else:
            own.append(f"::: {package}.{name}")
    head = f"# {package}\n\n::: {package}\n    options:\n        members: false\n"
    head += "        show_root_heading: false\n        show_root_toc_entry: false\n"
    lines = [f"**{home}**: {', '.join(links)}." for home, links in sorted(others.items())]
    return "\n\n".join([head, *lines, *own]) + "\n"


# --- Notebooks --------------------------------------------------------------------------


def text_of(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def fenced(text: str, language: str) -> str:
    ticks = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, ticks + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def outputs(cell: dict[str, Any]) -> Iterator[tuple[str, str | bytes]]:
    """("text", …) and ("png" or "svg", …), as the cell printed and drew them."""
    for output in cell["outputs"]:
        data = output.get("data", {})
        for kind, suffix in PICTURES.items():
            if kind in data:
                value = text_of(data[kind])
                yield suffix, base64.b64decode(value) if suffix == "png" else value
                break
        else:
            yield "text", text_of(output.get("text") or data.get("text/plain", ""))


@functools.cache
def notebook_pages(path: pathlib.Path) -> dict[str, str | bytes]:
    """A notebook as files of the site: its page, and its pictures."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts, files = [], {}
    for cell in notebook["cells"]:
        source = text_of(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(fenced(source, "python"))
        for kind, value in outputs(cell):
            if kind == "text":
                parts.append(fenced(str(value), "text"))
            else:
                number = len(files) + 1
                name = f"{path.stem}-{number}.{kind}"
                files[f"notebooks/{name}"] = value
                parts.append(f"![Picture {number}]({name}){{#picture-{number}}}")
    return {f"notebooks/{path.stem}.md": "\n\n".join(parts) + "\n", **files}


def notebooks() -> list[pathlib.Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


# --- Links ------------------------------------------------------------------------------


def outside_blocks(text: str, change: Callable[[str], str]) -> str:
    """The text with `change` applied to what is no block of code."""
    parts, end = [], 0
    for block in BLOCK.finditer(text):
        parts += [change(text[end : block.start()]), block.group()]
        end = block.end()
    return "".join([*parts, change(text[end:])])


def links(text: str) -> list[str]:
    return LINK.findall(BLOCK.sub("", text))


def source_of(uri: str) -> str:
    """The path in the repository of what the site has at `uri`."""
    if uri == "index.md":
        return "README.md"
    if uri.startswith("notebooks/"):
        return uri.removesuffix(".md") + ".ipynb"
    if uri.startswith("source/"):
        return uri.removeprefix("source/").removesuffix(".md")
    return f"docs/{uri}"


def uri_of(path: str) -> str:
    """Where the site has what is at `path` in the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(".ipynb"):
        return path.removesuffix(".ipynb") + ".md"
    if path.endswith((".png", ".svg")):
        return path
    return f"source/{path}.md"


def target(source: str, link: str) -> str | None:
    """The path in the repository that a link of the file `source` leads to, if there is such."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if (ROOT / path).is_file() or OUTPUT.fullmatch(path) else None


def shown(match: re.Match[str]) -> str:
    """The picture that a paragraph links to, above the paragraph."""
    text, notebook, number = match.groups()
    (picture,) = (
        name
        for name in notebook_pages(ROOT / "notebooks" / f"{posixpath.basename(notebook)}.ipynb")
        if pathlib.PurePosixPath(name).stem == f"{posixpath.basename(notebook)}-{number}"
    )
    name = posixpath.join(posixpath.dirname(notebook), posixpath.basename(picture))
    link = f"{notebook}.ipynb#picture-{number}"
    return f"[![{text}]({name})]({link})\n\n{match.group()}"


def rewritten(text: str, uri: str) -> str:
    """The text of a page, with pictures, and with links to what the site has."""

    def replaced(match: re.Match[str]) -> str:
        path = target(source_of(uri), match.group(1))
        if path is None:
            return match.group()
        return "](" + posixpath.relpath(uri_of(path), posixpath.dirname(uri) or ".")

    return outside_blocks(text, lambda part: LINK.sub(replaced, PICTURE.sub(shown, part)))


def linked_file(path: str) -> str | bytes:
    """The page of a file of the repository that no other page has, or a picture."""
    if path.endswith((".png", ".svg")):
        return (ROOT / path).read_bytes()
    text = (ROOT / path).read_text(encoding="utf-8")
    language = LANGUAGES.get(posixpath.splitext(path)[1], "text")
    head = "---\nsearch:\n  exclude: true\n---\n"
    return text if path.endswith(".md") else f"{head}# {path}\n\n{fenced(text, language)}\n"


# --- The site ---------------------------------------------------------------------------


def added_pages() -> dict[str, str | bytes]:
    """Where on the site → what, for all pages that are not in docs/."""
    pages: dict[str, str | bytes] = {"index.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    pages |= {f"api/{package}.md": package_page(package) for package in packages()}
    for path in notebooks():
        pages |= notebook_pages(path)
    texts = {path.relative_to(ROOT / "docs").as_posix(): path for path in markdown_files()}
    texts = {uri: path.read_text(encoding="utf-8") for uri, path in texts.items()}
    texts |= {uri: text for uri, text in pages.items() if isinstance(text, str)}
    while texts:  # what is linked may have links itself
        uri, text = texts.popitem()
        for link in links(text) if uri.endswith(".md") else ():
            path = target(source_of(uri), link)
            if path and not path.startswith("docs/") and uri_of(path) not in pages:
                pages[uri_of(path)] = texts[uri_of(path)] = linked_file(path)
    return pages


def markdown_files() -> list[pathlib.Path]:
    return sorted((ROOT / "docs").rglob("*.md"))


def on_config(config: Any) -> Any:
    (how_to,) = (part["How to"] for part in config.nav if "How to" in part)
    pages = sorted(path.name for path in (ROOT / "docs" / "how-to").glob("*.md"))
    how_to += [page for name in pages if (page := f"how-to/{name}") not in how_to]
    config.nav += [
        {"Notebooks": [f"notebooks/{path.stem}.md" for path in notebooks()]},
        {"Packages": [{name: f"api/{name}.md"} for name in packages()]},
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File, InclusionLevel

    for uri, content in added_pages().items():
        hidden = uri.startswith("source/")
        inclusion = InclusionLevel.NOT_IN_NAV if hidden else InclusionLevel.UNDEFINED
        files.append(File.generated(config, uri, content=content, inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    del config, files
    return rewritten(markdown, page.file.src_uri)
