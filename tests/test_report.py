"""The gate refuses what is unsound, nbval sees a changed output, committed notebooks keep the house rules."""
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from lib import BookError, offline, report, root

RECORDS = ("scoreboard", "claims", "known-faults", "recorded-runs", "performance")      # drawn from records alone
COMMITTED = sorted((root() / "notebooks").glob("*.ipynb"))
KINDS = ("text/plain", "text/html")
PLOT = "import matplotlib.pyplot as plt\nplt.figure(figsize=(1, 1)).gca().plot([0, 1]);"


def notebook(path, *cells):
    """Write a notebook of code cells, given as source or (source, tag); ids are c0, c1, ..."""
    book = nbformat.v4.new_notebook()
    for number, cell in enumerate(cells):
        source, *tags = (cell,) if isinstance(cell, str) else cell
        book.cells.append(nbformat.v4.new_code_cell(source, id=f"c{number}", metadata={"tags": tags}))
    nbformat.write(book, path)
    return path


def change(path, edit):
    """Apply a function to a stored notebook."""
    book = nbformat.read(path, as_version=4)
    edit(book)
    nbformat.write(book, path)
    return book


def nbval(path):
    """The exit code of nbval over one notebook; 0 when its stored outputs hold."""
    options = ["-q", "-p", "no:cacheprovider", "-c", str(root() / "pyproject.toml")]
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", *options, str(path)]
    return subprocess.run(command, cwd=path.parent, capture_output=True, timeout=120).returncode


# --- the gate ---

def test_a_sound_notebook_passes_also_under_a_backend_without_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    executed = report.execute(notebook(tmp_path / "sound.ipynb", PLOT, "1 + 1"), tmp_path / "out.ipynb")
    assert "image/png" in executed.cells[0].outputs[0].data
    assert report.gate(executed, stored=executed) == []


def test_a_notebook_with_fewer_figures_than_its_committed_copy_is_refused(tmp_path):
    stored = report.execute(notebook(tmp_path / "drawn.ipynb", PLOT, PLOT), tmp_path / "out.ipynb")
    executed = copy.deepcopy(stored)
    executed.cells[1].outputs = []
    (problem,) = report.gate(executed, stored)
    assert problem.startswith("code cell 2 drew 0 of the 1 pictures")


def test_a_notebook_that_raises_is_refused_and_its_unexecuted_rest_too(tmp_path):
    source = notebook(tmp_path / "raises.ipynb", "1", "raise ValueError('no such thing\\nmore')", "2", "3")
    executed = report.execute(source, tmp_path / "out.ipynb")
    assert report.gate(executed) == ["code cell 2 raised ValueError: no such thing",
                                     "code cells not executed: 3, 4"]


def test_a_notebook_that_was_never_executed_is_refused(tmp_path):
    stored = nbformat.read(notebook(tmp_path / "fresh.ipynb", "1", "", "2"), as_version=4)
    assert report.gate(stored) == ["code cells not executed: 1, 2"]        # an empty cell is not asked for


def test_a_traceback_on_stderr_is_refused(tmp_path):
    source = "import sys, traceback\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    traceback.print_exc()"
    executed = report.execute(notebook(tmp_path / "prints.ipynb", source), tmp_path / "out.ipynb")
    assert report.gate(executed) == ["code cell 1 printed a traceback"]


def test_a_notebook_that_takes_too_long_is_stopped(tmp_path):
    source, start = notebook(tmp_path / "sleeps.ipynb", "import time\ntime.sleep(300)"), time.monotonic()
    with pytest.raises(BookError, match="took more than 3 s"):
        report.execute(source, tmp_path / "out.ipynb", limit=3)
    assert time.monotonic() - start < 60
    assert not psutil.Process().children(), "its kernel is still there"


def test_a_kernel_that_dies_gets_one_more_try(tmp_path):
    dies = "import os\nif not os.path.exists('seen'):\n    open('seen', 'w').close()\n    os._exit(1)"
    executed = report.execute(notebook(tmp_path / "once.ipynb", dies), tmp_path / "out.ipynb")
    assert report.gate(executed) == []
    with pytest.raises(BookError, match="died twice"):
        report.execute(notebook(tmp_path / "always.ipynb", "import os\nos._exit(1)"), tmp_path / "out.ipynb")


# --- the whole report ---

@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book of one page and one notebook, in a folder of its own."""
    for name in ("book", "notebooks"):
        (tmp_path / name).mkdir()
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/page\nchapters:\n- file: notebooks/one\n")
    (tmp_path / "_config.yml").write_text((root() / "_config.yml").read_text())
    (tmp_path / "book" / "page.md").write_text("# Page\n\n$x^2$ and {cite:p}`a`.\n\n```{bibliography}\n```\n")
    (tmp_path / "book" / "references.bib").write_text("@misc{a, title={T}, author={A. B.}, year={2020}}\n")
    for module in (report, offline):
        monkeypatch.setattr(module, "root", lambda: tmp_path)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))         # no npm, hence no network
    source = notebook(tmp_path / "notebooks" / "one.ipynb", PLOT)
    change(source, lambda it: it.cells.insert(0, nbformat.v4.new_markdown_cell("# One", id="title")))
    return tmp_path


def test_the_report_is_built_or_refused_with_its_reason(book, capfd):
    source = book / "notebooks" / "one.ipynb"
    assert report.refresh() == 0 and report.build() == 0
    assert f"Open {(book / 'build/book/_build/html/index.html').as_uri()}" in capfd.readouterr().out
    html = book / "build" / "book" / "_build" / "html"
    executed = nbformat.read(book / "build" / "book" / "notebooks" / "one.ipynb", as_version=4)
    assert report.lost_pictures(html, {"one": executed}) == [] == offline.check(html)

    (picture,) = (html / "_images").iterdir()
    page = html / "notebooks" / "one.html"
    picture.unlink()
    assert offline.check(html) == [f"notebooks/one.html: ../_images/{picture.name} is missing"]
    page.write_text(page.read_text().replace(f"../_images/{picture.name}", "https://example.org/a.png"))
    assert offline.check(html) == ["notebooks/one.html: https://example.org/a.png is on another host"]
    page.write_text(page.read_text().replace(picture.stem, ""))
    assert report.lost_pictures(html, {"one": executed}) == ["notebooks/one.html shows 0 of 1 pictures"]

    (book / "book" / "page.md").write_text("# Page\n\n{doc}`nowhere`\n")
    assert report.build() == 1
    assert "refused: jupyter-book ended with 1" in capfd.readouterr().err

    change(source, lambda it: it.cells[1].update(source="1 / 0"))
    assert report.build() == 1
    assert "refused: notebooks/one.ipynb: code cell 1 raised ZeroDivisionError" in capfd.readouterr().err
    assert not html.exists()


def test_refresh_keeps_outputs_and_nothing_of_the_machine(book, capfd):
    source = book / "notebooks" / "one.ipynb"
    assert report.refresh() == 0
    text = source.read_text()
    assert "image/png" in text and '"execution_count": 1' in text
    for trace in ("papermill", "iopub", "pygments_lexer", str(book), '"version"'):
        assert trace not in text
    assert report.refresh(["one"]) == 0 and source.read_text() == text
    change(source, lambda it: it.cells[1].update(source=f"print({str(book)!r})"))
    before = source.read_text()
    assert report.refresh() == 1 and source.read_text() == before
    assert f"refused: notebooks/one.ipynb: its outputs name {book}" in capfd.readouterr().err


def test_notebooks_come_in_the_order_of_the_contents_with_the_scoreboard_last():
    names = [path.stem for path in report.notebooks()]
    assert names[-1] == "scoreboard" and {"gmm", "autoencoders", "explore"} < set(names)
    assert names.index("autoencoders") < names.index("explore")
    assert set(names) == {path.stem for path in COMMITTED}


# --- stored outputs ---

def test_nbval_sees_a_stored_output_that_was_changed_by_hand(tmp_path):
    source = notebook(tmp_path / "checked.ipynb", ("print('sum', 1 + 1)", "nbval-check-output"))
    report.execute(source, source)
    assert nbval(source) == 0
    change(source, lambda it: it.cells[0].outputs[0].update(text="sum 3\n"))
    assert nbval(source) == 1


def tagged(cells, tag):
    return [cell for cell in cells if tag in cell.metadata.get("tags", [])]


def test_nbval_sees_a_committed_output_that_was_changed_by_hand(tmp_path):
    source = shutil.copy(root() / "notebooks" / "scoreboard.ipynb", tmp_path)
    assert nbval(Path(source)) == 0
    change(source, lambda it: tagged(it.cells, "nbval-check-output")[0].outputs[0].update(text="0 published numbers\n"))
    assert nbval(Path(source)) == 1


def words(book):
    """All text of a notebook, without its pictures."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}).get(kind, "") for output in outputs for kind in KINDS]
    printed = [output.get("text", "") for output in outputs]
    return "\n".join([cell.source for cell in book.cells] + shown + printed + [json.dumps(book.metadata)])


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebooks_hold_the_outputs_of_one_clean_run(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert report.gate(book) == []
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "make refresh"
    if path.stem != "known-faults":                         # tables only
        assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    for cell in tagged(cells, "nbval-check-output"):        # nbval passes silently over one without an output
        shown = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.outputs]
        assert "".join(shown).strip(), cell.source
    assert not re.search(r"(?<![\w.])/(home|root|tmp|Users|work|private)/", words(book))
    assert set(book.metadata) <= {"kernelspec", "language_info", "widgets"}, "make refresh"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebooks_are_thin(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    lines = [line for cell in cells for line in cell.source.splitlines() if re.match(r"\s*[^\s#]", line)]
    own = len(lines) - sum(len(cell.source.splitlines()) for cell in tagged(cells, "parameters"))
    assert own <= 60, f"{own} code lines beside the parameters"
    assert not [line for line in lines if re.match(r"\s*(async def|def|class)\b", line)]
    if path.stem not in RECORDS:                             # these have nothing to set
        assert len(tagged(cells, "parameters")) == 1
    assert len(tagged(cells, "nbval-check-output")) == 1, "one cell's output is compared"
    assert not tagged(cells, "raises-exception") and not tagged(cells, "nbval-skip")
