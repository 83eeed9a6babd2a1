"""
A sphinx directive for tables of figures, which come from the JSON lines that the scripts print and are never typed.

``.. results:: NAME`` shows ``results/NAME.json``, an object ``{"command", "machine", "date", "result"}`` that
``python examples/gallery.py --keep NAME COMMAND`` writes; ``result`` is the script's last line. ``:rows:`` names the entry of it
that holds the rows (a dict by row name, or a list of dicts), ``:columns:`` chooses and orders the columns.
"""

import json
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive, directives

RESULTS = Path(__file__).parent / "results"
LONGEST = 120  # characters of a cell


class Results(Directive):
    required_arguments = 1
    option_spec = {"rows": directives.unchanged, "columns": directives.unchanged, "name": directives.unchanged}

    def run(self):
        path = RESULTS / f"{self.arguments[0]}.json"
        self.state.document.settings.record_dependencies.add(str(path))
        kept = json.loads(path.read_text())
        found = kept["result"]
        for part in filter(None, self.options.get("rows", "").split(".")):
            found = found[part]
        rows = _rows(found)
        wanted = self.options.get("columns")
        columns = [c.strip() for c in wanted.split(",")] if wanted else list(dict.fromkeys(c for r in rows for c in r))
        said = f"``{kept['command']}``, {kept['machine']}, {kept['date']}."
        caption, messages = self.state.inline_text(said, self.lineno)
        return [_table(columns, rows), nodes.paragraph("", "", *caption), *messages]


def _rows(found) -> list[dict]:
    if isinstance(found, list):
        return found
    if all(isinstance(value, dict) for value in found.values()):
        return [{"": name, **value} for name, value in found.items()]
    return [{"": name, "value": value} for name, value in found.items()]


def _table(columns: list[str], rows: list[dict]) -> nodes.table:
    group = nodes.tgroup(cols=len(columns))
    group += [nodes.colspec(colwidth=1) for _ in columns]
    group += nodes.thead("", _line(columns))
    group += nodes.tbody("", *[_line([_said(row.get(column)) for column in columns]) for row in rows])
    return nodes.table("", group)


def _line(cells: list[str]) -> nodes.row:
    return nodes.row("", *[nodes.entry("", nodes.paragraph(text=cell)) for cell in cells])


def _said(value) -> str:
    if value is None:
        return ""
    said = f"{value:.4g}" if isinstance(value, float) else str(value)
    return said if len(said) <= LONGEST else said[: LONGEST - 3] + "..."


def setup(app):
    app.add_directive("results", Results)
    return {"parallel_read_safe": True}
