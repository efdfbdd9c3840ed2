"""The prose: pages are there, references resolve, and the recipe of `add-an-experiment` works as printed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from sphinx.util.matching import Matcher

from lib import root, scoreboard

PAGES = sorted((root() / "book").glob("*.md"))


def _files(entry):
    if isinstance(entry, list):
        return [file for item in entry for file in _files(item)]
    if isinstance(entry, dict):
        return ([entry["file"]] if "file" in entry else []) + _files(list(entry.values()))
    return []


def _contents():
    toc = yaml.safe_load((root() / "_toc.yml").read_text())
    return [toc["root"], *_files(toc)]


def _texts():
    """Name -> markdown of every page and notebook."""
    texts = {page.name: page.read_text() for page in PAGES}
    for path in (root() / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        words = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        texts[path.name] = "\n".join(words)
    return texts


@pytest.mark.parametrize("folder", [".venv", "workflow/.venv", "runs/toy/default", "build/book"])
def test_what_is_made_beside_the_pages_is_no_page(folder):
    """Environments hold licences in Markdown: `jupyter-book build .` would warn of each."""
    excluded = Matcher(yaml.safe_load((root() / "_config.yml").read_text())["exclude_patterns"])
    assert any(map(excluded, [folder, *map(str, Path(folder).parents)])) and not excluded("book/methods.md")


def test_table_of_contents_and_pages_agree():
    contents = _contents()
    files = [
        str(path.relative_to(root()).with_suffix(""))
        for folder in ("book", "notebooks")
        for path in (root() / folder).iterdir()
        if path.suffix in (".md", ".ipynb")
    ]
    assert set(contents) == set(files)
    assert len(contents) == len(set(contents))


def test_every_citation_is_in_the_bibliography_and_the_reverse():
    keys = re.findall(r"^@\w+\{([^,]+),", (root() / "book" / "references.bib").read_text(), re.M)
    roles = [role for text in _texts().values() for role in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text)]
    cited = {key.strip() for role in roles for key in role.split(",")}
    assert len(keys) == len(set(keys))
    assert cited == set(keys)


def test_every_section_is_shown_in_its_chapter():
    """Each section of published.yml is shown in the chapter of its work, by the scoreboard's table."""
    published = scoreboard.load()
    block = r"```\{glue\} (\S+)\n:doc: ../notebooks/scoreboard.ipynb"
    glued = {page.stem: re.findall(block, page.read_text()) for page in PAGES}
    for section, content in published.items():
        if "compare" in content:
            assert section in glued[content["work"]], f"{section} is not shown in {content['work']}.md"
    known = {*(section for section, content in published.items() if "compare" in content), "summary"}
    assert {key for keys in glued.values() for key in keys} == known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_of_a_page_exist(page):
    for target in re.findall(r"^```\{figure\} (\S+)", page.read_text(), re.M):
        assert (page.parent / target).is_file(), target


@pytest.mark.parametrize(("name", "text"), _texts().items(), ids=list(_texts()))
def test_relative_links_lead_somewhere(name, text):
    folder = root() / ("book" if name.endswith(".md") else "notebooks")
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for target in re.findall(r"\]\(([^)#:\s]+\.(?:md|ipynb))", prose):
        assert (folder / target).is_file(), target


def _recipe():
    """The python blocks of the recipe: the module, then the notebook's cells."""
    text = (root() / "book" / "add-an-experiment.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_the_recipe_works_as_printed(tmp_path):
    module, parameters, *cells = _recipe()
    checkout = tmp_path / "checkout"
    shutil.copytree(root() / "lib", checkout / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "lib" / "linear.py").write_text(module)
    (checkout / "notebooks").mkdir()
    (checkout / "notebooks" / "presets.yml").write_text("{}")
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, [parameters, *cells])])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, checkout / "notebooks" / "linear.ipynb")
    environment = {**os.environ, "PYTHONPATH": str(checkout), "VAEBOOK_DATA": ""}
    command = [sys.executable, "-m", "lib", "run", "linear", "--set", "steps=40", "--set", "z_dim=2"]
    ran = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    (results,) = (checkout / "runs" / "linear").glob("*/results.json")
    record = json.loads(results.read_text())
    assert record["parameters"]["z_dim"] == 2
    assert record["metrics"]["elbo"]["n"] == 360
    assert record["history"]["step"] == [40]
    assert record["figures"] == ["training.png"]


def test_the_recipes_published_numbers_are_understood():
    text = (root() / "book" / "add-an-experiment.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)]
    (published,) = (block for block in blocks if isinstance(block, dict) and "compare" in block["linear"])
    rows = scoreboard.flatten(published)
    assert [row["where"] for row in rows] == [{"z_dim": "4"}, {"z_dim": "8"}]
    assert set(scoreboard.score(rows, [])["verdict"]) == {"not run"}
