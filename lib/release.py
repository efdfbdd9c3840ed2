"""The release check: what is committed, and nothing else, gives the tables that are committed.

    python -m lib release                       # in a fresh clone of HEAD: as long as `python -m lib report` takes
    python -m lib release --built build/book    # compare what is built already with the notebooks of this checkout

Compared are the HTML tables that are drawn from the recorded runs alone, cell by cell, word by word: all of a notebook
without a parameters cell, which runs no experiment, and in the others those of the cells that name `records` or
`recorded`, without the columns headed "this build". The clone has neither runs/ nor data/, and no $VAEBOOK_DATA.
"""
import ast
import os
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from itertools import zip_longest
from pathlib import Path

from lib import BookError, integrity, root, runs

FRESH = "this build"                                             # heads a column of numbers of the run at hand
SPOILING = ("VAEBOOK_DATA", "VAEBOOK_RUN", "VAEBOOK_PRESET", "MPLBACKEND", "PYTHONDONTWRITEBYTECODE")


class ReleaseError(BookError):
    """The release check cannot be made; the message says why."""


def check(built: str | None = None) -> int:
    """Compare the tables of a report of HEAD, or of the folder `built`, with the committed ones; the exit code.

    Raises ReleaseError if there are changes that are not committed or the clone's report fails, and RunError if a
    recorded file is not what was recorded.
    """
    for folder in (integrity.results(), integrity.smoke()):
        integrity.check(folder)
        print(f"{len(integrity.lines(folder))} files of {folder.relative_to(root())} are what was recorded", flush=True)
    if built:
        return _compare(root() / "notebooks", Path(built) / "notebooks")
    if runs.git_state()["dirty"]:
        raise ReleaseError("there are changes that are not committed: commit them, then check the release")
    with tempfile.TemporaryDirectory(prefix="release-") as scratch:
        clone = Path(scratch) / "clone"
        _report(clone)
        return _compare(clone / "notebooks", clone / "build" / "book" / "notebooks")


def _report(clone: Path) -> None:
    """Clone HEAD and build its report with this Python and the clone's own lib."""
    made = subprocess.run(["git", "clone", "-q", str(root()), str(clone)], capture_output=True, text=True)
    if made.returncode:
        raise ReleaseError(f"HEAD cannot be cloned: {made.stderr.strip().splitlines()[-1]}")
    environment = {name: value for name, value in os.environ.items() if name not in SPOILING}
    command = [sys.executable, "-m", "lib", "report"]
    if subprocess.run(command, cwd=clone, env=environment | {"PYTHONPATH": str(clone)}).returncode:
        raise ReleaseError("the report of a fresh clone of HEAD fails, its messages are above")


def _compare(committed: Path, built: Path) -> int:
    """Print how many tables are equal and where the others differ; the exit code."""
    equal, problems = compare(committed, built)
    for problem in problems:
        print(f"refused: {problem}", file=sys.stderr)
    print(f"{equal} tables of recorded runs are equal, {len(problems)} are not")
    return 1 if problems or not equal else 0


def compare(committed: Path, built: Path) -> tuple[int, list[str]]:
    """(number of equal tables, a line about each that is not) of the notebooks in two folders."""
    import nbformat
    equal, problems = 0, []
    for path in sorted(committed.glob("*.ipynb")):
        before = nbformat.read(path, as_version=4)
        if not (built / path.name).is_file():
            problems.append(f"{path.stem}: not in {built}")
            continue
        after = {cell.get("id"): cell for cell in nbformat.read(built / path.name, as_version=4).cells}
        for cell in of_records(before):
            name = f"{path.stem}, cell {cell.get('id')}"
            old, new = tables(cell), tables(after.get(cell.get("id"), {}))
            if not old and new:
                problems.append(f"{name}: no table is committed (make refresh)")
            for number, pair in enumerate(zip_longest(old, new), 1):
                same = old and difference(*pair)
                equal += same == ""
                problems += [f"{name}, table {number}: {same}"] if same else []
    return equal, problems


# ------------------------------------------------------------------------------------------------ tables in notebooks
def of_records(notebook) -> list:
    """The cells of a notebook that draw from recorded runs, tables or not."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    if any("parameters" in cell.metadata.get("tags", []) for cell in cells):
        return [cell for cell in cells if names(cell.source) & {"records", "recorded"}]
    return cells


def names(source: str) -> set[str]:
    """The names and attributes that a cell uses."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:                                                              # a magic command
        return set()
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)}


def tables(cell) -> list[str]:
    """The HTML tables that a cell shows, or keeps for other pages (glue)."""
    kept = (output.get("data", {}) for output in cell.get("outputs", []))
    pages = [text for data in kept for kind, text in data.items() if kind.endswith("text/html")]
    return [page for page in pages if "<table" in page]


class _Words(HTMLParser):
    """The texts of a page in order, scripts included; those of a table's cells with their columns' numbers."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.column, self.fresh, self.head = [], None, set(), False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.fresh = set()
        elif tag in ("thead", "tbody"):
            self.head = tag == "thead"
        elif tag == "tr":
            self.column = -1
        elif tag in ("td", "th") and self.column is not None:
            self.column += 1
        self.found += [value for name, value in attributes if name in ("href", "data-v")]

    def handle_endtag(self, tag):
        if tag == "table":
            self.column = None

    def handle_data(self, text):
        if self.head and text.strip() == FRESH:
            self.fresh.add(self.column)
        if text.strip() and self.column not in self.fresh:
            self.found.append(" ".join(text.split()))


def difference(old: str | None, new: str | None) -> str:
    """"" if two tables say the same, else the first text that differs."""
    if not old or not new:
        return "not drawn" if old else "not among the committed ones"
    for before, after in zip_longest(_Words(old).found, _Words(new).found):
        if before != after:
            return f"{_short(before)} is committed, {_short(after)} is drawn"
    return ""


def _short(text: str | None) -> str:
    return "nothing" if text is None else repr(text if len(text) <= 80 else f"{text[:80]}…")
