"""Tables for people: how values are written, which columns are numbers, which value is best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def format_cell(value: Any) -> str:
    """Format a table value for a person: four significant digits, ``value [low, high]`` for a triple, – for nothing."""
    value = _plain(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 100_000 else str(value)
    if isinstance(value, float):
        if value != 0 and not 1e-4 <= abs(value) < 1e6:
            return f"{value:.3g}"
        text = f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"
        return "0" if text == "-0" else text
    if _is_interval(value):
        return f"{format_cell(value[0])} [{format_cell(value[1])}, {format_cell(value[2])}]"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(format_cell(v) for v in value)
    return str(value)


def format_column(values: Sequence[Any]) -> list[str]:
    """Format the values of one table column: like `format_cell`, but floats share their number of decimals (to 3)."""
    numbers = [x for v in values for x in (v if _is_interval(v) else (_plain(v),)) if sort_value(x) is not None]
    flat = [abs(float(x)) for x in numbers if math.isfinite(x)]
    if (
        not any(isinstance(x, float) for x in numbers)
        or not flat
        or max(flat) >= 1e5
        or any(0 < x < 1e-3 for x in flat)
    ):
        return [format_cell(v) for v in values]
    most = 3 if max(flat) < 10 else 2 if max(flat) < 100 else 1
    decimals = next((d for d in range(most) if all(abs(round(x, d) - x) < 1e-9 for x in flat)), most)

    def text(value: Any) -> str:
        if _is_interval(value):
            return f"{text(float(value[0]))} [{text(float(value[1]))}, {text(float(value[2]))}]"
        value = _plain(value)
        if sort_value(value) is not None and math.isfinite(value):
            return f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0 turns -0.0 into 0.0
        return format_cell(value)

    return [text(v) for v in values]


def _is_interval(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(isinstance(v, int | float) for v in value)


def _plain(value: Any) -> Any:
    """A zero-dimensional array or tensor as a Python number; anything else unchanged."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def sort_value(value: Any) -> float | None:
    """Number by which a cell is sorted and compared, ``None`` for text, yes/no and nothing."""
    value = value[0] if _is_interval(value) else _plain(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return None if math.isnan(value) else float(value)
    return None


@dataclass(frozen=True)
class Table:
    """Columns, rows of raw values and the positions of the best values."""

    columns: list[str]
    rows: list[list[Any]]
    caption: str
    best: frozenset[tuple[int, int]]

    def cells(self) -> list[list[dict[str, Any]]]:
        """Text, sorting number and emphasis of every cell."""
        texts = [format_column(column) for column in zip(*self.rows)]
        return [
            [{"text": texts[j][i], "sort": sort_value(v), "best": (i, j) in self.best} for j, v in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]

    def numeric(self) -> list[bool]:
        """Which columns hold numbers and nothing else but gaps (and are set flush right)."""
        columns = list(zip(*self.rows)) if self.rows else [()] * len(self.columns)
        return [
            any(sort_value(v) is not None for v in column)
            and all(sort_value(v) is not None or format_cell(v) == "–" for v in column)
            for column in columns
        ]


def as_rows(
    rows: Sequence[Mapping[str, Any]] | Sequence[Sequence[Any]], columns: Sequence[str] | None = None
) -> tuple[list[str], list[list[Any]]]:
    """Column names and row values of a list of dicts, or of a list of sequences with ``columns``."""
    names = list(columns) if columns is not None else []
    body: list[list[Any]] = []
    if columns is None:
        for row in rows:
            if not isinstance(row, Mapping):
                raise ValueError("rows that are not dicts need columns")
            names += [str(key) for key in row if str(key) not in names]
    for row in rows:
        if isinstance(row, Mapping):
            body.append([row.get(name) for name in names])
        elif len(row) == len(names):
            body.append(list(row))
        else:
            raise ValueError(f"a row has {len(row)} values for {len(names)} columns")
    return names, body
