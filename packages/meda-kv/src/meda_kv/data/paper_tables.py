"""The numbers of MEDA's Tables 1 to 6 (arXiv 2502.17599), for users who reproduce them.

Which numbers belong to which budget:

=====  ==========================  ==================================================================================
table  share of the cache kept     what
=====  ==========================  ==================================================================================
1      0.1                         MileBench, three models
2      0.2                         Video-ChatGPT, two models, judged 1 to 5
3      0.2                         DREAM-1K, two models
4      0.2                         WorldQA, three models
5      0.1 MileBench, 0.2 video    ablation
6      1, 0.5, 0.35, 0.2, 0.05     latency and memory on one A100
=====  ==========================  ==================================================================================

Two numbers of the abstract belong to different rows of Table 6: the memory saving of 72 % (2.42 to 0.67 GiB) is that of
ratio 0.2, where decoding is 1.78 times as fast; the speed-up of 2.82 times is that of ratio 0.05. Neither may be quoted
for the other's budget. At ratio 0.05 the cache still holds 0.37 / 2.42 = 15 %: the official code keeps all text tokens
beyond the budget.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from vfm_core.errors import UserError

__all__ = ["PAPER", "PaperTable", "paper_table"]

PAPER = "arXiv 2502.17599"
METHODS = {"full": "full", "H2O": "h2o", "SnapKV": "snapkv", "PyramidKV": "pyramidkv", "LOOK-M": "look-m"}
METHODS |= {
    "MEDA": "meda",
    "w/o allocation": "meda-no-alloc",
    "w/o merging": "meda-no-merge",
    "w/o both": "meda-no-both",
}
"""The paper's name of an arm, and ours."""

_ABLATION = ("full", "H2O", "MEDA", "w/o allocation", "w/o merging", "w/o both")
_ARMS = ("full", "H2O", "SnapKV", "PyramidKV", "LOOK-M", "MEDA")


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper, one row per number.

    Attributes
    ----------
    number : int
        1 to 6.
    title : str
    metric : str
        What the values are, with their unit and range.
    columns : tuple of str
        The paper's columns, from left to right.
    rows : tuple of dict
        ``{"model", "method", "ratio", "column", "value"}``; `method` is our name of the arm, `ratio` the share of the
        prompt's cache that was asked for, 1 for the full cache.
    note : str
        What must be said when a number is quoted.
    """

    number: int
    title: str
    metric: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    note: str = ""

    def value(self, method: str, column: str, model: str | None = None, ratio: float | None = None) -> float:
        """One number.

        Parameters
        ----------
        method : str
            Our name of the arm, such as ``"meda"``.
        column : str
            One of `columns`.
        model : str, optional
            Needed where the table holds several.
        ratio : float, optional
            Needed where the table holds several for one method.

        Raises
        ------
        UserError
            No such number, or several.
        """
        asked = {"method": method, "column": column, "model": model, "ratio": ratio}
        asked = {key: wanted for key, wanted in asked.items() if wanted is not None}
        found = [row for row in self.rows if all(row[key] == wanted for key, wanted in asked.items())]
        if len(found) != 1:
            what = "no such number" if not found else f"{len(found)} numbers"
            known = ", ".join(f"{key} {self._known(key)}" for key in ("method", "column", "model", "ratio"))
            raise UserError(what, where=f"Table {self.number} of {PAPER}", given=asked, remedy=f"the table has {known}")
        return float(found[0]["value"])

    def to_json(self) -> str:
        """The table as indented JSON."""
        return json.dumps({**self.__dict__, "source": PAPER}, indent=2, ensure_ascii=False)

    def _known(self, key: str) -> str:
        return "/".join(str(value) for value in dict.fromkeys(row[key] for row in self.rows))


def paper_table(number: int) -> PaperTable:
    """One of the paper's tables.

    Parameters
    ----------
    number : int
        1 to 6.

    Returns
    -------
    PaperTable

    Raises
    ------
    UserError
        No such table.

    Examples
    --------
    >>> paper_table(1).value("meda", "NH", model="LLaVA-NeXT-7B")
    4.8
    """
    if number not in _TABLES:
        raise UserError("no such table", where=PAPER, given=number, remedy="1 to 6")
    return _TABLES[number]


def _grid(text: str, columns: tuple[str, ...], ratio: float) -> tuple[dict[str, Any], ...]:
    """Rows of ``model: arm values | arm values ...``; a line that begins with ``|`` goes on with its model."""
    rows = []
    for line in text.replace("\n|", "|").strip().splitlines():
        model, _, cells = line.partition(":")
        for cell in cells.split("|"):
            words = cell.split()
            split = len(words) - len(columns)
            method = METHODS[" ".join(words[:split])]
            share = 1.0 if method == "full" else ratio
            rows += [
                {"model": model.strip(), "method": method, "ratio": share, "column": column, "value": float(value)}
                for column, value in zip(columns, words[split:], strict=True)
            ]
    return tuple(rows)


_GROUPS = ("T-1", "T-2", "T-3", "T-4", "S-1", "S-2", "S-3", "S-4", "S-5", "NH", "IR")
_MILEBENCH = """
LLaVA-NeXT-7B: full 45.8 51.8 38.3 44.8 61.1 39.6 18.7 29.8 66.9 5.5 7.6
| H2O 42.0 48.8 35.1 41.5 57.8 35.9 15.0 25.9 63.8 2.4 3.7
| SnapKV 42.1 48.5 35.2 41.1 57.6 36.1 15.6 26.6 63.3 1.8 3.2
| PyramidKV 42.4 48.6 35.1 41.7 57.9 36.5 15.2 26.7 63.6 2.0 3.2
| LOOK-M 44.1 50.1 36.7 43.0 59.5 37.8 17.2 28.1 65.3 3.6 5.0
| MEDA 45.4 50.9 37.6 44.1 60.2 38.9 17.8 30.1 66.9 4.8 7.4
InternVL-v1.5-7B: full 10.7 19.2 13.8 19.1 16.8 9.7 14.4 19.1 5.0 11.1 0.0
| H2O 8.4 16.8 11.5 16.7 14.6 7.3 12.1 16.8 2.7 8.9 0.0
| SnapKV 8.9 17.1 11.8 17.3 15.1 7.6 12.5 16.9 3.2 9.2 0.0
| PyramidKV 8.3 17.7 12.0 16.8 15.1 8.2 11.9 16.8 3.1 9.3 0.0
| LOOK-M 9.2 17.5 12.2 17.8 15.1 8.5 12.9 19.2 4.0 10.2 0.0
| MEDA 10.5 18.8 13.3 18.6 16.4 9.0 14.3 18.4 5.0 10.9 1.2
LLaVA-v1.5-13B: full 39.8 46.2 30.8 48.1 64.8 48.5 13.6 28.4 60.0 12.0 1.0
| H2O 37.4 43.5 28.2 45.6 61.4 45.0 11.3 25.5 57.6 9.8 0.0
| SnapKV 36.3 42.9 27.7 45.0 61.5 45.3 10.4 25.0 56.9 9.0 1.0
| PyramidKV 36.4 43.5 28.1 45.2 62.2 45.1 10.4 25.0 56.8 9.0 0.0
| LOOK-M 38.8 44.3 28.5 46.5 62.8 46.4 11.7 26.7 57.6 10.2 1.0
| MEDA 40.0 46.2 30.4 48.0 64.7 48.6 13.1 27.6 59.7 12.2 1.5
"""

_AXES = ("correctness", "detail", "context", "temporal")
_VIDEO_CHATGPT = """
LongVILA-8B: full 2.35 2.43 2.82 2.12
| H2O 1.96 2.08 2.38 1.66
| SnapKV 1.84 2.12 2.38 1.72
| PyramidKV 2.13 2.12 2.43 1.84
| LOOK-M 2.19 2.15 2.51 1.88
| MEDA 2.25 2.29 2.69 2.05
LongVA-7B: full 2.24 2.48 2.68 2.09
| H2O 1.93 2.23 2.23 1.74
| SnapKV 1.86 2.13 2.43 1.70
| PyramidKV 1.91 2.08 2.35 1.78
| LOOK-M 2.09 2.21 2.44 1.88
| MEDA 2.16 2.41 2.54 1.98
"""

_FPR = ("F1", "precision", "recall")
_DREAM = """
LLaVA-Video-7B: full 32.5 37.9 28.4
| H2O 27.7 33.9 23.4
| SnapKV 28.8 34.7 24.6
| PyramidKV 28.1 34.2 23.9
| LOOK-M 30.4 35.8 26.4
| MEDA 31.3 36.8 27.2
LLaVA-Video-32B: full 32.9 34.4 31.6
| H2O 28.1 28.8 27.5
| SnapKV 29.1 30.6 27.7
| PyramidKV 29.7 31.4 28.1
| LOOK-M 29.6 31.1 28.3
| MEDA 31.7 33.3 30.3
"""

_WORLD = {
    "LLaVA-Video-7B": (27.3, 24.3, 24.5, 23.8, 24.9, 25.8),
    "LongVA-7B": (28.9, 26.5, 26.6, 25.4, 27.0, 27.5),
    "LongVILA-8B": (29.1, 25.5, 24.4, 25.6, 26.4, 27.2),
}

# columns: the model and budget that they were measured with, and the values of _ABLATION
_PARTS = {
    "CLEVR-Change": ("LLaVA-NeXT-7B", 0.1, (19.5, 16.6, 18.9, 17.8, 18.2, 17.0)),
    "Spot-the-Diff": ("LLaVA-NeXT-7B", 0.1, (18.7, 16.2, 18.2, 17.5, 17.3, 16.5)),
    "animation": ("LLaVA-Video-7B", 0.2, (27.6, 23.8, 26.7, 25.5, 25.8, 24.5)),
    "YouTube": ("LLaVA-Video-7B", 0.2, (33.0, 27.1, 31.8, 28.2, 29.3, 27.2)),
}

_COSTS = ((1.0, 14.61, 2.42), (0.5, 11.58, 1.34), (0.35, 9.64, 1.05), (0.2, 8.23, 0.67), (0.05, 5.18, 0.37))


def _row(model: str, method: str, ratio: float, column: str, value: float) -> dict[str, Any]:
    share = 1.0 if method == "full" else ratio
    return {"model": model, "method": METHODS.get(method, method), "ratio": share, "column": column, "value": value}


_TABLES = {
    1: PaperTable(
        1,
        "MileBench, ratio 0.1",
        "mean over the tasks of a group of accuracy or ROUGE-L F, percent",
        _GROUPS,
        _grid(_MILEBENCH, _GROUPS, 0.1),
        "all compressed arms keep a tenth",
    ),
    2: PaperTable(
        2,
        "Video-ChatGPT, ratio 0.2, 32 frames",
        "score given by a language model as judge, 1 to 5",
        _AXES,
        _grid(_VIDEO_CHATGPT, _AXES, 0.2),
        "all compressed arms keep a fifth; needs an external judge",
    ),
    3: PaperTable(
        3,
        "DREAM-1K, ratio 0.2",
        "F1, precision and recall of events (AutoDQ), percent",
        _FPR,
        _grid(_DREAM, _FPR, 0.2),
        "all compressed arms keep a fifth; needs an external judge",
    ),
    4: PaperTable(
        4,
        "WorldQA, ratio 0.2",
        "score given by a language model as judge, percent",
        ("WorldQA",),
        tuple(_row(m, arm, 0.2, "WorldQA", v) for m, values in _WORLD.items() for arm, v in zip(_ARMS, values)),
        "all compressed arms keep a fifth; needs an external judge",
    ),
    5: PaperTable(
        5,
        "Ablation",
        "ROUGE-L F (CLEVR-Change, Spot-the-Diff) and F1 (DREAM-1K animation, YouTube), percent",
        tuple(_PARTS),
        tuple(
            _row(model, arm, ratio, column, value)
            for column, (model, ratio, values) in _PARTS.items()
            for arm, value in zip(_ABLATION, values)
        ),
        "ratio 0.1 for the two MileBench columns, 0.2 for the two video columns",
    ),
    6: PaperTable(
        6,
        "Latency and memory: LLaVA-Video-7B, first 20 YouTube videos of DREAM-1K, one A100",
        "decoding time in ms per token, size of the cache in GiB",
        ("ms/token", "GiB"),
        tuple(
            _row("LLaVA-Video-7B", "full" if ratio == 1 else "MEDA", ratio, column, value)
            for ratio, *values in _COSTS
            for column, value in zip(("ms/token", "GiB"), values)
        ),
        "the saving of 72 % is that of ratio 0.2 (1.78 times as fast), the speed-up of 2.82 times that of ratio 0.05",
    ),
}
