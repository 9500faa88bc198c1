"""An evaluation as text."""

from __future__ import annotations

from collections.abc import Sequence

from bitbrush.evaluation.result import Evaluation, PairedTest, Value

FLOOR = "noise floor"


class Table(str):
    """Text that shows as it is, also where a prompt or a notebook shows the value of a line."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def text(evaluation: Evaluation) -> Table:
    """Numbers, tests, what is missing, and notes, in lines."""
    columns, rows = numbers(evaluation)
    parts = [_lines(columns, rows, turned=len(columns) > len(rows) + 1)]
    found = differences(evaluation)
    if found:
        parts.append("Do they differ? (p after Holm's correction; below 0.05 they do)\n" + _lines(*found))
    parts += [f"not computed: {m.key}: {m.what}" for m in evaluation.missing]
    parts += [*warnings(evaluation), *evaluation.notes]
    return Table("\n\n".join(visible(part) for part in parts))


def numbers(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Head and rows: an arm a row, a metric a column, the noise floor last."""
    keys: dict[str, Value] = {}
    for arm in [*evaluation.candidates, evaluation.reference]:
        for value in evaluation.values.get(arm, []):
            keys.setdefault(value.key, value)
    rows = [[arm, *(_cell(evaluation.value(arm, key)) for key in keys)] for arm in evaluation.arms]
    floors = {key: _floor(evaluation, key) for key in keys}
    if any(floor is not None for floor in floors.values()):
        shown = ("-" if floor is None else f"{floor:.{keys[key].digits}f}" for key, floor in floors.items())
        rows.append([FLOOR, *shown])
    return ["", *(value.label for value in keys.values())], rows


def warnings(evaluation: Evaluation) -> list[str]:
    """What has to stand beside single figures, each once; what a note says of all is left to the note."""
    values = [value for arm in evaluation.arms for value in evaluation.values.get(arm, [])]
    found = [value.warning for value in values if value.warning and value.warning not in evaluation.notes]
    return list(dict.fromkeys(found))


def differences(evaluation: Evaluation) -> tuple[list[str], list[list[str]]] | None:
    """Head and rows of the tests; None without."""
    if not evaluation.tests:
        return None
    rows = [[*_who(test), f"{test.difference.value:.3g}", f"{test.adjusted:.4f}", _said(test)]
            for test in evaluation.tests]
    return ["", "by", "difference", "p", ""], rows


def _who(test: PairedTest) -> tuple[str, str]:
    network = test.detail.get("features")
    by = f"features ({network})" if network else test.key
    return f"{test.first} / {test.second}", by


def _said(test: PairedTest) -> str:
    control = " (control)" if test.detail.get("control") else ""
    return ("differ" if test.significant else "no difference found") + control


def _floor(evaluation: Evaluation, key: str) -> float | None:
    found = (evaluation.value(arm, key) for arm in evaluation.arms)
    return next((value.floor for value in found if value is not None and value.floor is not None), None)


def _cell(value: Value | None) -> str:
    if value is None:
        return "-"
    shown = f"{value.value:.{value.digits}f}"
    if value.low is not None and value.high is not None:
        return f"{shown} [{value.low:.{value.digits}f}, {value.high:.{value.digits}f}]"
    return f"{shown} ± {value.spread:.{value.digits}f}" if value.spread is not None else shown


def _lines(columns: Sequence[str], rows: Sequence[Sequence[str]], *, turned: bool = False) -> str:
    """Columns under their heads; turned: a metric a line."""
    grid = [list(columns), *map(list, rows)]
    if turned:
        grid = [list(line) for line in zip(*grid, strict=True)]
    widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in grid)


def visible(line: str) -> str:
    """Text from outside with its control and direction characters shown as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in line)


