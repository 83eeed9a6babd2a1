"""
Sphinx directives for tables of figures, which come from the JSON lines that the scripts print and are never typed.

``results/NAME.json`` is an object ``{"command", "machine", "date", "result"}``, which
``python examples/gallery.py --keep NAME COMMAND`` writes; ``result`` is the script's last line.

``.. kept:: NAME`` ends with that result's command, machine, date and versions; with a ``:title:`` it is a section. Where the
result is not kept there is nothing, so that the page can say what to measure before it is measured.

``.. results:: NAME`` inside is a table with one number a cell, a row for each object in the result, below the content of the
directive. Both are absent where there is no row.

- ``:rows:`` names the entry that holds the rows, by a path with dots; all of the result if not given;
- ``:levels:`` is how many keys name a row, 1 if not given, and ``:head:`` are the titles of their columns, between semicolons;
- ``:columns:`` are the entries of a row, between semicolons: a path with dots, ``seconds.*`` for all below ``seconds``, ``*`` for
  all that are left, each with ``as TITLE`` if its name is not good enough. Rows without the first of them are left out. Without
  ``:columns:``, a result that is not a table by itself has a row for each number.
"""

import json
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive, directives

RESULTS = Path(__file__).parent / "results"
LONGEST = 120  # characters of a cell
# of a result, what is no figure and stands in the line below the table
ABOUT = ("versions", "threads", "torch")


class Kept(Directive):
    required_arguments = 1
    option_spec = {"title": directives.unchanged}
    has_content = True

    def run(self) -> list[nodes.Node]:
        kept = _read(self)
        if kept is None:
            return []
        found = nodes.section() if "title" in self.options else nodes.Element()
        if "title" in self.options:
            found["names"].append(nodes.fully_normalize_name(self.options["title"]))
            found += nodes.title("", self.options["title"])
            self.state.document.note_implicit_target(found, found)
        self.state.nested_parse(self.content, self.content_offset, found)
        caption, messages = self.state.inline_text(said_of(kept), self.lineno)
        found += [nodes.paragraph("", "", *caption), *messages]
        return [found] if "title" in self.options else found.children


class Results(Directive):
    required_arguments = 1
    option_spec = dict.fromkeys(("rows", "columns", "head"), directives.unchanged) | {"levels": directives.positive_int}
    has_content = True

    def run(self) -> list[nodes.Node]:
        kept = _read(self)
        titles, lines = table(kept["result"], **self.options) if kept else ([], [])
        above = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, above)
        return [*above.children, _nodes(titles, lines)] if lines else []


def _read(directive: Directive) -> dict | None:
    path = RESULTS / f"{directive.arguments[0]}.json"
    directive.state.document.settings.record_dependencies.add(str(path))
    return json.loads(path.read_text()) if path.is_file() else None


def said_of(kept: dict) -> str:
    """The line below the tables: what made the figures, where and when, and by which versions."""
    result = kept["result"] if isinstance(kept["result"], dict) else {}
    versions = result.get("versions") or {name: result[name] for name in ABOUT if name in result}
    number = versions.get("threads")
    threads = f", {number} thread{'s' if number > 1 else ''}" if number else ""
    names = [f"{name} {version}" for name, version in versions.items() if name != "threads"]
    said = f"``{kept['command']}``, {kept['machine']}{threads}, {kept['date']}"
    return said + (f"; {', '.join(names)}." if names else ".")


def table(
    result, rows: str = "", columns: str = "", head: str = "", levels: int = 1
) -> tuple[list[str], list[list[str]]]:
    """The titles and the lines of a table."""
    for part in filter(None, rows.split(".")):
        result = result.get(part, {})
    found = _rows(result, levels)
    if not columns and isinstance(result, dict) and len(found) < len(result.keys() - set(ABOUT)):
        flat = _flat({name: value for name, value in result.items() if name not in ABOUT})
        found = [([", ".join(path)], {("value",): value}) for path, value in flat.items()]
    wanted = _columns(columns or "*", list(dict.fromkeys(path for _, row in found for path in row)))
    first = next(iter(wanted), None)
    heads = [name.strip() for name in head.split(";")] if head else [""] * levels
    heads = [] if isinstance(result, list) else heads
    lines = [[*names, *(_said(row.get(path)) for path in wanted)] for names, row in found if first in row]
    return [*heads, *wanted.values()], lines


def _rows(result, levels: int) -> list[tuple[list[str], dict[tuple, object]]]:
    """Each row with its names: the objects of a list, or those below so many keys."""
    if isinstance(result, list):
        return [([], _flat(row)) for row in result]
    below = [(name, value) for name, value in result.items() if isinstance(value, dict) and name not in ABOUT]
    if levels == 1:
        return [([name], _flat(value)) for name, value in below]
    return [([name, *names], row) for name, value in below for names, row in _rows(value, levels - 1)]


def _flat(value, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """The numbers and texts inside, each by the keys that lead there: one number a cell."""
    if not isinstance(value, dict):
        return {path: value}
    return {key: part for name, below in value.items() for key, part in _flat(below, (*path, name)).items()}


def _columns(columns: str, found: list[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The paths of the columns, in their order, with their titles."""
    wanted: dict[tuple[str, ...], str] = {}
    for column in filter(None, (part.strip() for part in columns.split(";"))):
        path, _, title = column.partition(" as ")
        if path.endswith("*"):
            above = tuple(path.split(".")[:-1])
            new = [p for p in found if p[: len(above)] == above and p not in wanted]
            wanted |= {p: ", ".join(p[len(above) :]) for p in new}
        else:
            wanted |= {p: title or path for p in found if ".".join(p) == path}
    return wanted


def _nodes(titles: list[str], lines: list[list[str]]) -> nodes.table:
    group = nodes.tgroup(cols=len(titles))
    group += [nodes.colspec(colwidth=1) for _ in titles]
    group += nodes.thead("", _line(titles))
    group += nodes.tbody("", *map(_line, lines))
    return nodes.table("", group)


def _line(cells: list[str]) -> nodes.row:
    return nodes.row("", *[nodes.entry("", nodes.paragraph(text=cell)) for cell in cells])


def _said(value) -> str:
    if value is None:
        return ""
    said = f"{value:.4g}" if isinstance(value, float) else str(value)
    return said if len(said) <= LONGEST else said[: LONGEST - 3] + "..."


def setup(app):
    app.add_directive("kept", Kept)
    app.add_directive("results", Results)
    return {"parallel_read_safe": True}
