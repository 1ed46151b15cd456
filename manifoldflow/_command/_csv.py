"""Tables as .csv: with or without a header, separated by commas, semicolons or tabs."""

import csv
import pathlib

import numpy as np

from manifoldflow._command._examples import Examples, some

MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}


def read_csv(path: pathlib.Path, target: str | None, dropped: list[str]) -> Examples:
    """Columns of numbers as inputs, one column of numbers or texts as the target.

    Raises:
        ValueError: says in which column and line something is not what it must be.
    """
    header, lines, rows = _rows(path)
    names = header or [str(i + 1) for i in range(len(rows[0]))]
    columns = {i: [row[i] for row in rows] for i in range(len(names))}
    chosen = len(names) - 1 if target is None else _index(path, names, target, "--target")
    left_out = {_index(path, names, name, "--drop") for name in dropped}
    if chosen in left_out:
        raise ValueError(f"{path}: --drop leaves out the target, {names[chosen]}; choose another.")
    inputs: dict[str, np.ndarray] = {}
    for i, cells in columns.items():
        if i == chosen or i in left_out:
            continue
        values = _numbers(path, _called(names, i, header), cells, lines)
        if header and _is_row_number(header[i], values):
            print(f"{path}: the first column numbers the rows and is left out")
            continue
        inputs[_called(names, i, header)] = values
    if not inputs:
        raise ValueError(
            f"{path} needs at least two columns, inputs and a target; got {some(names)}."
        )
    targets = _targets(path, _called(names, chosen, header), columns[chosen], lines)
    return Examples(np.column_stack(list(inputs.values())), targets, list(inputs))


def _rows(path: pathlib.Path) -> tuple[list[str] | None, list[int], list[list[str]]]:
    """The header if there is one, and all other rows with their line numbers."""
    try:
        # Spreadsheets put a mark before UTF-8, which would be part of the first name.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8 ({error.reason}); save it as such."
        ) from None
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    separator = max(",;\t", key=first.count)
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; it is no .csv file.") from None
    rows = [(number, row) for number, row in rows if any(row)]
    header = None
    if rows and not any(_is_number(cell) for cell in rows[0][1]):
        header = rows.pop(0)[1]
    if not rows:
        raise ValueError(f"{path} has no rows of numbers.")
    width = len(rows[0][1]) if header is None else len(header)
    for number, row in rows:
        if len(row) != width:
            raise ValueError(f"{path}, line {number}: {len(row)} cells, where {width} are due.")
    return header, [number for number, _ in rows], [row for _, row in rows]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return cell.lower() not in MISSING


def _called(names: list[str], index: int, header: list[str] | None) -> str:
    if header and names[index]:
        return f"{index + 1}, {names[index]!r}"
    return str(index + 1)


def _index(path: pathlib.Path, names: list[str], wanted: str, option: str) -> int:
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and 1 <= int(wanted) <= len(names):
        return int(wanted) - 1
    raise ValueError(f"{option} {wanted}: {path} has no such column; it has {some(names)}.")


def _is_row_number(name: str, values: np.ndarray) -> bool:
    return not name and any(np.array_equal(values, np.arange(k, k + len(values))) for k in (0, 1))


def _numbers(path: pathlib.Path, name: str, cells: list[str], lines: list[int]) -> np.ndarray:
    wrong = [i for i, cell in enumerate(cells) if not _is_number(cell)]
    texts = [i for i in wrong if cells[i].lower() not in MISSING]
    if texts:
        raise ValueError(
            f"{path}: column {name} holds text, {cells[texts[0]]!r} in line {lines[texts[0]]}; "
            "inputs must be numbers. Write a column of 0 and 1 for each of its values, or leave "
            f"it out: --drop {_short(name)}"
        )
    if wrong:
        raise _no_number(path, name, lines, wrong)
    values = np.asarray(cells, float)
    infinite = np.flatnonzero(~np.isfinite(values)).tolist()
    if infinite:
        raise _no_number(path, name, lines, infinite)
    return values


def _no_number(path: pathlib.Path, name: str, lines: list[int], wrong: list[int]) -> ValueError:
    return ValueError(
        f"{path}: column {name} has no finite number in line {lines[wrong[0]]}"
        + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
        + "; every row needs all of them. Fill or delete these rows, or leave the column out: "
        f"--drop {_short(name)}"
    )


def _short(name: str) -> str:
    """The name to type: `'age'` of `3, 'age'`."""
    return name.partition(", ")[2] or name


def _targets(path: pathlib.Path, name: str, cells: list[str], lines: list[int]) -> np.ndarray:
    is_text = [not _is_number(cell) and cell.lower() not in MISSING for cell in cells]
    if sum(is_text) == 0:
        missing = [i for i, cell in enumerate(cells) if not _is_number(cell)]
        if missing:
            raise _no_target(path, name, lines[missing[0]], cells[missing[0]])
        values = np.asarray(cells, float)
        infinite = np.flatnonzero(~np.isfinite(values))
        if len(infinite):
            raise _no_target(path, name, lines[infinite[0]], cells[infinite[0]])
        return values
    if sum(is_text) < len(cells) / 2 and sum(map(_is_number, cells)) > len(cells) / 2:
        first = is_text.index(True)
        raise _no_target(path, name, lines[first], cells[first])
    if "" in cells:
        raise _no_target(path, name, lines[cells.index("")], "")
    return np.asarray(cells)


def _no_target(path: pathlib.Path, name: str, line: int, cell: str) -> ValueError:
    return ValueError(
        f"{path}: the target, column {name}, is {cell!r} in line {line}; it must be a number there "
        "too, or a text everywhere. Mend or delete such rows, or choose another with --target."
    )
