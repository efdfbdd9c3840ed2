"""Not a test: a checkout with a toy notebook and a record of it, for the tests of runs."""
import shutil

import nbformat
from nbformat import v4

import lib
from lib import launch, runs


def toy_checkout(folder, sources, presets, without=()):
    """lib and a notebook `toy` (its first cell holds the parameters) as a checkout of their own, below `folder`."""
    shutil.copytree(lib.root() / "lib", folder / "lib", ignore=shutil.ignore_patterns(*without))
    (folder / "notebooks").mkdir()
    cells = [v4.new_code_cell(source) for source in sources]
    cells[0].metadata.tags = ["parameters"]
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(v4.new_notebook(cells=cells, metadata=metadata), folder / "notebooks" / "toy.ipynb")
    (folder / "notebooks" / "presets.yml").write_text(presets)
    return folder


def taken_for_checkout(folder, monkeypatch):
    """The folder, which this process and its kernels then take for the checkout."""
    for module in (runs, launch):
        monkeypatch.setattr(module, "root", lambda: folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    for name in ("VAEBOOK_RUN", "VAEBOOK_PRESET"):
        monkeypatch.delenv(name, raising=False)
    return folder


def toy_record(**changes):
    """A results.json of the toy, of committed code, as lib/results.schema.json wants it."""
    return {
        "schema": 1, "experiment": "toy", "run": "paper-seed=2", "preset": "paper", "parameters": {"seed": 2},
        "reduced": [], "metrics": {"score": {"value": 1.5, "se": None, "n": 1, "unit": "points"}}, "seed": 2,
        "dataset": None, "command": "python -m lib run toy --preset paper --seed 2",
        "git": {"commit": "a" * 40, "dirty": False}, "made_by": [], "versions": {"python": "3.11.0"},
        "device": {"kind": "cpu", "name": "toy", "threads": 1}, "wall_time_s": 1.0, "peak_memory_mb": 1.0,
        "figures": [], "date": "2026-01-01T00:00:00Z", "history": {}} | changes
