"""The report: run the notebooks, refuse what is not sound, build the HTML.

    python -m lib report            # into build/book/_build/html
    python -m lib refresh           # renew the outputs that are committed with the notebooks

The builder never executes anything: papermill does, and `gate` reads what it left, for a failed notebook
would still build green.
"""
import base64
import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from lib import BookError, offline, root, write_atomic
from lib import execute as execution

LIMIT = 900         # seconds a notebook may take; it needs about twenty, on a busy machine far more


# --- executing ---

def execute(source: Path, target: Path, limit: float = LIMIT):
    """Run a notebook at its defaults from its own folder; return it with its outputs, as `target` holds it too.

    A cell that raises ends the run and stays in the outputs for `gate` to find. Raises ExecutionError when the kernel
    dies twice or `limit` seconds pass.
    """
    import nbformat
    from papermill import PapermillExecutionError

    threads = os.environ.get("OMP_NUM_THREADS", "1")    # as the tests run it; enough for the smoke size
    try:
        return execution.execute(source, target, {}, limit, {"OMP_NUM_THREADS": threads})
    except PapermillExecutionError:
        return nbformat.read(target, as_version=4)


def _code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def _pictures(cell) -> list[str]:
    """The sha256 of every picture among a cell's outputs; the builder names its image files so."""
    pngs = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [hashlib.sha256(base64.b64decode(png)).hexdigest() for png in pngs]


def gate(notebook, stored=None) -> list[str]:
    """What is wrong with an executed notebook, one line each; an empty list lets it into the book.

    Refused are cells that raised, were not executed or show a traceback on stderr, and, cell by cell (by id),
    fewer pictures than `stored` holds, the committed copy of the same notebook.
    """
    expected = {cell.get("id"): len(_pictures(cell)) for cell in _code_cells(stored)} if stored else {}
    problems, silent = [], []
    for number, cell in enumerate(_code_cells(notebook), 1):
        failed = [output for output in cell.outputs if output.output_type == "error"]
        for error in failed:
            problems.append(f"code cell {number} raised {error.ename}: {error.evalue.partition(chr(10))[0]}")
        printed = "".join(output.text for output in cell.outputs if output.get("name") == "stderr")
        if "Traceback (most recent call last)" in printed:
            problems.append(f"code cell {number} printed a traceback")
        drawn, due = len(_pictures(cell)), expected.get(cell.get("id"), 0)
        if cell.execution_count is None:
            silent.append(str(number))
        elif drawn < due and not failed:
            problems.append(f"code cell {number} drew {drawn} of the {due} pictures in its committed copy "
                            "(if that is meant: make refresh)")
    if silent:
        problems.append(f"code cells not executed: {', '.join(silent)}")
    return problems


# --- the book ---

def notebooks() -> list[Path]:
    """The notebooks that _toc.yml names, in its order, the scoreboard last because it sums up the others."""
    def files(entry):
        if isinstance(entry, list):
            for value in entry:
                yield from files(value)
        elif isinstance(entry, dict):
            yield from (entry[key] for key in ("root", "file") if key in entry)
            yield from files(list(entry.values()))

    names = files(yaml.safe_load((root() / "_toc.yml").read_text()))
    paths = [root() / f"{name}.ipynb" for name in names if name.startswith("notebooks/")]
    return sorted(paths, key=lambda path: path.stem == "scoreboard")


def stage() -> Path:
    """Lay out build/book afresh: table of contents, prose, assets, an empty notebooks folder."""
    folder = root() / "build" / "book"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "notebooks").mkdir(parents=True)
    config = yaml.safe_load((root() / "_config.yml").read_text())
    if offline.widgets(offline.mathjax()):
        config["sphinx"]["config"]["nb_ipywidgets_js"] = offline.WIDGET_SCRIPTS
    (folder / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    shutil.copy(root() / "_toc.yml", folder)
    for part in ("book", "assets"):
        shutil.copytree(root() / part, folder / part)
    return folder


def lost_pictures(html: Path, executed: dict) -> list[str]:
    """Which built pages lack pictures of their executed notebooks (name -> notebook), one line each."""
    problems = []
    for name, notebook in executed.items():
        page = html / "notebooks" / f"{name}.html"
        text = page.read_text() if page.exists() else ""
        drawn = [picture for cell in _code_cells(notebook) for picture in _pictures(cell)]
        shown = sum(picture in text for picture in drawn)
        if not text or shown < len(drawn):
            problems.append(f"notebooks/{name}.html shows {shown} of {len(drawn)} pictures")
    return problems


def _html(folder: Path, executed: dict) -> list[str]:
    """Build the staged book with warnings as errors; return what is wrong with it."""
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()",
               "build", "--all", "-n", "-W", "--keep-going", "-q", "."]
    builder = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)    # warnings: on stderr
    if builder.returncode:
        print(builder.stdout)
        return [f"jupyter-book ended with {builder.returncode}, its messages are above"]
    html = folder / "_build" / "html"
    return lost_pictures(html, executed) + offline.check(html)


def build() -> int:
    """Execute every notebook of the book, gate them, build the HTML and check it; return the exit code.

    Prints the time each phase took, and where to open the book or, one per line, why there is none.
    """
    import nbformat

    begin, problems, executed = time.monotonic(), [], {}
    with _phase("staged build/book"):
        folder = stage()
    for source in notebooks():
        name = f"notebooks/{source.name}"
        with _phase(f"executed {name}"):
            try:
                target = folder / "notebooks" / source.name
                executed[source.stem] = notebook = execute(source, target)
                found = gate(notebook, stored=nbformat.read(source, as_version=4))
                target.write_text(clean(notebook))      # readers can download it: no path of this machine
            except (BookError, OSError) as error:
                found = [str(error)]
        problems += [f"{name}: {problem}" for problem in found]
    if not problems:
        with _phase("built the HTML"):
            problems = _html(folder, executed)
    if problems:
        return _refuse(problems)
    print(f"{time.monotonic() - begin:7.1f} s  in all")
    print(f"Open {(folder / '_build' / 'html' / 'index.html').as_uri()}")
    return 0


@contextlib.contextmanager
def _phase(what: str):
    begin = time.monotonic()
    yield
    print(f"{time.monotonic() - begin:7.1f} s  {what}", flush=True)


def _refuse(problems: list[str]) -> int:
    for problem in problems:
        print(f"refused: {problem}", file=sys.stderr)
    return 1


# --- the committed outputs ---

def clean(notebook) -> str:
    """An executed notebook as text without times, versions and random widget ids, to be committed."""
    import nbformat

    for key in set(notebook.metadata) - {"widgets"}:
        del notebook.metadata[key]
    notebook.metadata["kernelspec"] = {"display_name": "Python 3 (ipykernel)", "language": "python",
                                       "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]           # papermill adds an empty list
    widgets = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    text = json.dumps(notebook)
    for number, name in enumerate(widgets.get("state", {}), 1):     # random names, in the order of creation
        text = text.replace(name, f"{number:032x}")
    buffer = io.StringIO()
    nbformat.write(nbformat.reads(text, as_version=4), buffer)
    return buffer.getvalue()


def _renew(source: Path) -> list[str]:
    """Replace a notebook by its cleaned execution, or say what is wrong with that and leave it as it was."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            notebook = execute(source, Path(scratch) / source.name)
    except (BookError, OSError) as error:
        return [str(error)]
    problems, text = gate(notebook), clean(notebook)
    problems += [f"its outputs name {path}" for path in {str(root()), str(Path.home())} if path in text]
    if not problems and text != source.read_text():
        write_atomic(source, text.encode())
    return problems


def refresh(names: list[str] | None = None) -> int:
    """Execute notebooks (default: the book's) at their defaults and keep the outputs; return the exit code.

    A notebook that the gate refuses, or whose outputs name a folder of this machine, is left as it was.
    """
    problems = []
    for source in [root() / "notebooks" / f"{name}.ipynb" for name in names] if names else notebooks():
        name = f"notebooks/{source.name}"
        with _phase(f"executed {name}"):
            problems += [f"{name}: {problem}" for problem in _renew(source)]
    return _refuse(problems) if problems else 0
