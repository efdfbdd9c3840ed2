"""The release check: tables of recorded runs that are not drawn anew as they are committed are found, others pass."""
import json
import subprocess

import nbformat
import pytest
from nbformat import v4

import lib
from lib import integrity, provenance, release, runs
from lib.__main__ import main


def table(*lines, head=("", "recorded", "this build")):
    cells = lambda kind, line: "".join(f"<{kind}>{cell}</{kind}>" for cell in line)   # noqa: E731
    rows = "".join(f"<tr>{cells('td', line)}</tr>\n" for line in lines)
    return f"<table id='r{id(lines)}'><thead><tr>{cells('th', head)}</tr></thead>\n <tbody>{rows}</tbody></table>"


def cell(name, source, *pages, kind="text/html"):
    outputs = [v4.new_output("display_data", data={kind: page}) for page in pages]
    return v4.new_code_cell(source, id=name, outputs=outputs, execution_count=1)


def write(folder, name, *cells):
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=list(cells)), folder / f"{name}.ipynb")


def parameters():
    return v4.new_code_cell("steps: int = 3  # how far", id="parameters", metadata={"tags": ["parameters"]})


RECORDED = 'recorded = runs.records("toy")\nruns.table(recorded)'


def book(folder, number="1.5", fresh="2.5", glued="3.5", page="4.5", link="a.html"):
    """An experiment's notebook with a table of records, one of records and the run at hand, one of the run; a page."""
    write(folder, "toy", parameters(),
          cell("records", RECORDED, table(["score", number, fresh])),
          cell("claims", "toy.claims(recorded)", table(["claim", number], head=["", "holds"])),
          cell("own", "runs.metrics_table(run.metrics)", table(["score", fresh], head=["metric", "value"])))
    write(folder, "board", v4.new_markdown_cell("text"),
          cell("all", "HTML(page)", f"<a href='{link}'>link</a>" + table(["score", page])),
          cell("glue", "glue('x', HTML(page))", table(["x", glued]), kind="application/papermill.record/text/html"))


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A checkout whose committed notebooks are the book's."""
    for module in (runs, release, provenance):
        monkeypatch.setattr(module, "root", lambda: tmp_path)
    book(tmp_path / "notebooks")
    (tmp_path / "book" / "results").mkdir(parents=True)
    return tmp_path


def released(capsys, *words):
    """(exit code, the last line, what is wrong) of `python -m lib release`."""
    code = main(["release", *words])
    out, err = capsys.readouterr()
    return code, out.splitlines()[-1], err.splitlines()


def built(house, **changes):
    book(house / "built" / "notebooks", **changes)
    return house / "built"


# ------------------------------------------------------------------------------------------------ tables
def test_equal_tables_pass_whatever_the_run_at_hand_gives(house, capsys):
    code, said, wrong = released(capsys, "--built", str(built(house, fresh="99")))
    assert (code, said, wrong) == (0, "4 tables of recorded runs are equal, 0 are not", [])


@pytest.mark.parametrize(("changes", "equal", "wrong"), [
    ({"number": "1.6"}, 2, ["toy, cell records, table 1: '1.5' is committed, '1.6' is drawn",
                            "toy, cell claims, table 1: '1.5' is committed, '1.6' is drawn"]),
    ({"glued": "3.6"}, 3, ["board, cell glue, table 1: '3.5' is committed, '3.6' is drawn"]),
    ({"page": "4.6"}, 3, ["board, cell all, table 1: '4.5' is committed, '4.6' is drawn"]),
    ({"link": "b.html"}, 3, ["board, cell all, table 1: 'a.html' is committed, 'b.html' is drawn"])])
def test_a_changed_number_is_found(house, capsys, changes, equal, wrong):
    found = released(capsys, "--built", str(built(house, **changes)))
    assert found[0] == 1 and found[1] == f"{equal} tables of recorded runs are equal, {len(wrong)} are not"
    assert sorted(found[2]) == sorted(f"refused: {line}" for line in wrong)


def test_tables_that_are_missing_on_either_side_are_found(house, capsys):
    folder = built(house)
    write(folder / "notebooks", "board", cell("all", "HTML(page)"))
    write(folder / "notebooks", "toy", parameters(), cell("records", RECORDED, table(["score", "1.5", "2.5"]),
                                                          table(["more", "1", "2"])))
    wrong = released(capsys, "--built", str(folder))[2]
    assert [line.removeprefix("refused: ") for line in wrong] == [
        "board, cell all, table 1: not drawn", "board, cell glue, table 1: not drawn",
        "toy, cell records, table 2: not among the committed ones", "toy, cell claims, table 1: not drawn"]
    (folder / "notebooks" / "toy.ipynb").unlink()
    assert any("toy: not in " in line for line in released(capsys, "--built", str(folder))[2])


def test_a_table_that_was_never_committed_is_an_error(house, capsys):
    folder = built(house)
    write(house / "notebooks", "board", cell("all", "HTML(page)"), cell("glue", "glue('x', HTML(page))"))
    code, _, wrong = released(capsys, "--built", str(folder))
    assert code == 1 and [line.removeprefix("refused: ") for line in wrong] == [
        "board, cell all: no table is committed (make refresh)",
        "board, cell glue: no table is committed (make refresh)"]


def test_nothing_to_compare_is_no_success(house, capsys):
    for path in (house / "notebooks").glob("*"):
        path.unlink()
    assert released(capsys, "--built", str(house))[:2] == (1, "0 tables of recorded runs are equal, 0 are not")


def test_a_column_of_the_run_at_hand_is_left_out_and_nothing_beside_it():
    old, new = table(["a", "1", "2"], ["b", "3", "4"]), table(["a", "1", "9"], ["b", "3", "9"])
    assert release.difference(old, new) == ""
    assert release.difference(old, table(["a", "9", "2"], ["b", "3", "4"])) == "'1' is committed, '9' is drawn"
    assert release.difference(old + table(["a", "1", "2"], head=["", "x", "y"]),
                              old + table(["a", "1", "9"], head=["", "x", "y"])) == "'2' is committed, '9' is drawn"
    assert release.difference(old, old.replace("<tbody>", "<tbody>  ")) == ""
    assert release.difference(old, table(["a", "1", "2"])) == "'b' is committed, nothing is drawn"


def test_the_books_own_tables_are_found_and_every_recorded_table_is_among_them():
    """So that no notebook draws records where the check does not look."""
    for path in (lib.root() / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        chosen = {cell.id for cell in release.of_records(notebook)}
        for cell_ in notebook.cells:
            if cell_.cell_type == "code" and ("records(" in cell_.source or "recorded" in cell_.source):
                assert cell_.id in chosen or not release.tables(cell_), (path.name, cell_.id)


# ------------------------------------------------------------------------------------------------ the clone
def git(folder, *words):
    person = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "-C", folder, *person, *words], check=True, capture_output=True)


REPORT = '''
import os, pathlib, shutil, sys
import lib
assert sys.argv[1:] == ["report"] and "VAEBOOK_DATA" not in os.environ
assert pathlib.Path(lib.__file__).parent.parent == pathlib.Path.cwd() and not pathlib.Path("runs").exists()
if pathlib.Path("fail").exists():
    sys.exit(3)
shutil.copytree("drawn", "build/book/notebooks")
'''


def test_a_fresh_clone_of_head_is_reported_on_alone(house, capfd, monkeypatch):
    monkeypatch.setenv("VAEBOOK_DATA", "/nowhere")
    book(house / "drawn")
    files = {"lib/__init__.py": "", "lib/__main__.py": REPORT, "runs/mine": "", ".gitignore": "runs/\nbuilt/\n"}
    for name, text in files.items():
        (house / name).parent.mkdir(exist_ok=True)
        (house / name).write_text(text)
    assert main(["release"]) == 1 and "there are changes that are not committed" in capfd.readouterr().err
    git(house, "init", "-q")
    git(house, "add", ".")
    git(house, "commit", "-qm", "all")
    assert released(capfd) == (0, "4 tables of recorded runs are equal, 0 are not", [])
    book(house / "drawn", page="4.6")
    assert main(["release"]) == 1 and "commit them, then check the release" in capfd.readouterr().err
    git(house, "commit", "-qam", "other")
    assert released(capfd)[2] == ["refused: board, cell all, table 1: '4.5' is committed, '4.6' is drawn"]
    (house / "fail").write_text("")
    git(house, "add", ".")
    git(house, "commit", "-qm", "fail")
    assert main(["release"]) == 1 and "the report of a fresh clone of HEAD fails" in capfd.readouterr().err


def test_a_tampered_record_ends_the_check(house, capsys):
    path = integrity.results() / "toy" / "paper" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({}))
    assert main(["release", "--built", str(built(house))]) == 1
    assert "book/results/toy/paper/results.json has no line in book/results/SHA256SUMS" in capsys.readouterr().err
