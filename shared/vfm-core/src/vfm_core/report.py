"""Reports: one self-contained HTML file that reads well on a phone, and the same content as Markdown.

Everything is inlined (figures as data URIs, a few lines of script for sorting and zooming), and a content-security
policy forbids the page any request, so a report can be mailed, archived and opened years later.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vfm_core.files import atomic_write
from vfm_core.pictures import Picture, encode_picture, house_style
from vfm_core.tables import Table, as_rows, sort_value

__all__ = ["Report", "house_style"]

Best = Literal["max", "min"]


@dataclass
class _Block:
    kind: Literal["heading", "text", "table", "figure", "gallery"]
    text: str = ""
    level: int = 2
    anchor: str = ""
    table: Table | None = None
    pictures: list[tuple[Picture, str]] = field(default_factory=list)

    @property
    def wide(self) -> bool:
        """Whether a gallery holds plots or panels, which need room, rather than single images."""
        return any(p.size is None or p.size[0] > 1.7 * p.size[1] for p, _ in self.pictures)


class Report:
    """A report built top to bottom; every method returns the report, so calls chain.

    Parameters
    ----------
    title, subtitle
        Plain text.

    Examples
    --------
    >>> import tempfile
    >>> report = Report("Sweep", "tiny:cnn on birds").heading("Numbers")
    >>> report = report.table([{"gamma": 0.0, "energy": 0.066}, {"gamma": 0.6, "energy": 0.073}], highlight="energy")
    >>> report.write(tempfile.mkdtemp() + "/report.html").name
    'report.html'
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._blocks: list[_Block] = []
        self._anchors: set[str] = set()

    def heading(self, text: str, level: int = 2) -> Report:
        """Start a section (level 2, listed in the contents) or a subsection (level 3)."""
        if level not in (2, 3):
            raise ValueError(f"heading level must be 2 or 3, got {level}")
        stem = re.sub(r"\W+", "-", unicodedata.normalize("NFKC", text).lower()).strip("-") or "section"
        anchor, number = stem, 1
        while anchor in self._anchors:
            number += 1
            anchor = f"{stem}-{number}"
        self._anchors.add(anchor)
        self._blocks.append(_Block("heading", text=text, level=level, anchor=anchor))
        return self

    def text(self, markdown: str) -> Report:
        """Add prose in Markdown (CommonMark with tables; raw HTML is shown as text, of images only the words)."""
        self._blocks.append(_Block("text", text=markdown.strip()))
        return self

    def table(
        self,
        rows: Sequence[Mapping[str, Any]] | Sequence[Sequence[Any]],
        columns: Sequence[str] | None = None,
        caption: str = "",
        highlight: Mapping[str, Best] | str | Sequence[str] | None = None,
    ) -> Report:
        """Add a sortable table.

        Parameters
        ----------
        rows
            Dicts (columns in order of first appearance unless given), or sequences with ``columns``.
            A triple of numbers is shown as ``value [low, high]`` and sorted by the value.
        highlight
            Columns whose best value is set bold: ``{"accuracy": "max", "error": "min"}``; a name or a list of names
            means ``"max"``.

        Raises
        ------
        ValueError
            If ``columns`` are missing for plain rows, a row has another length, or ``highlight`` names no column.
        """
        names, body = as_rows(rows, columns)
        if highlight is None:
            wanted: dict[str, Best] = {}
        elif isinstance(highlight, str):
            wanted = {highlight: "max"}
        elif isinstance(highlight, Mapping):
            wanted = dict(highlight)
        else:
            wanted = dict.fromkeys(highlight, "max")
        best: set[tuple[int, int]] = set()
        for name, which in wanted.items():
            if name not in names:
                raise ValueError(f"highlight names no column: {name!r}; columns are {names}")
            j = names.index(name)
            values = {i: v for i, row in enumerate(body) if (v := sort_value(row[j])) is not None}
            if values:
                top = (max if which == "max" else min)(values.values())
                best |= {(i, j) for i, v in values.items() if v == top}
        self._blocks.append(_Block("table", table=Table(names, body, caption, frozenset(best))))
        return self

    def figure(self, obj: Any, caption: str = "", alt: str = "") -> Report:
        """Add one picture: matplotlib figure, PIL image, array, path or SVG text (`pictures.encode_picture`)."""
        self._blocks.append(_Block("figure", pictures=[(encode_picture(obj, alt or caption), caption)]))
        return self

    def gallery(self, items: Iterable[tuple[Any, str]], caption: str = "") -> Report:
        """Add a grid of pictures with captions; each opens large on a click."""
        pictures = [(encode_picture(obj, text), text) for obj, text in items]
        self._blocks.append(_Block("gallery", text=caption, pictures=pictures))
        return self

    def html(self) -> str:
        """The whole report as one HTML document."""
        from jinja2 import Environment, PackageLoader

        environment = Environment(
            loader=PackageLoader("vfm_core"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        template = environment.get_template("report.html.j2")
        contents = [block for block in self._blocks if block.kind == "heading" and block.level == 2]
        return template.render(report=self, blocks=self._blocks, contents=contents, render_markdown=_markdown_to_html)

    def write(self, path: str | Path, markdown: bool = False) -> Path:
        """Write the HTML file (atomically) and, on request, the Markdown twin beside it.

        The twin is ``path`` with the suffix ``.md``; its pictures lie in ``<stem>_files/``.

        Returns
        -------
        Path
            Of the HTML file.
        """
        path = Path(path)
        with atomic_write(path) as temporary:
            temporary.write_text(self.html(), encoding="utf-8")
        if markdown:
            self._write_markdown(path.with_suffix(".md"))
        return path

    def _write_markdown(self, path: Path) -> None:
        lines = [f"# {self.title}"] + ([self.subtitle] if self.subtitle else [])
        number = 0
        for block in self._blocks:
            if block.kind == "heading":
                lines.append("#" * block.level + " " + block.text)
            elif block.kind == "text":
                lines.append(block.text)
            elif block.table is not None:
                lines += [_markdown_table(block.table)] + ([f"*{block.table.caption}*"] if block.table.caption else [])
            for picture, caption in block.pictures:
                number += 1
                name = f"{path.stem}_files/{number:03d}.{picture.extension}"
                with atomic_write(path.parent / name) as temporary:
                    temporary.write_bytes(picture.data)
                alt = picture.alt.replace("\n", " ").replace("[", "(").replace("]", ")")
                lines += [f"![{alt}]({name.replace(' ', '%20')})"] + ([f"*{caption}*"] if caption else [])
            if block.kind == "gallery" and block.text:
                lines.append(f"*{block.text}*")
        with atomic_write(path) as temporary:
            temporary.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def _markdown_to_html(text: str) -> str:
    from markdown_it import MarkdownIt

    # No raw HTML (names come from files), and an image's words instead of the request that it would be.
    converter = MarkdownIt("commonmark", {"html": False}).enable("table")
    converter.add_render_rule("image", lambda self, tokens, i, options, env: html.escape(tokens[i].content))
    return converter.render(text)


def _markdown_table(table: Table) -> str:
    def row(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = ["---:" if numeric else "---" for numeric in table.numeric()]
    lines = [row(html.escape(name, quote=False) for name in table.columns), row(rule)]
    for cells in table.cells():
        texts = (html.escape(cell["text"], quote=False) for cell in cells)
        lines.append(row(f"**{text}**" if cell["best"] else text for cell, text in zip(cells, texts)))
    return "\n".join(lines)
