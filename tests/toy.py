"""Not a test: a checkout with a toy notebook, for the tests of runs."""
import shutil

import nbformat
from nbformat import v4

import lib


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
