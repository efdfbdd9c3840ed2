"""A run's parameters, its results.json and many runs as a table; each fault is one clear line."""
import errno
import json
import math
import os
import re
import shlex
import subprocess
import sys
import types

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from nbformat import v4
from toy import toy_record

import lib
from lib import evaluate, integrity, provenance, runs
from lib.__main__ import _parser

CELL = '''steps: int = 300  # gradient steps
lr: float = 0.001  # learning # rate
flag: bool = False
model: str = "a # b"  # which one
sizes: list = [8, 16]  # widths
seed: int = 1  # of everything
device: str = "auto"
resume: str = ""  # go on from
'''
DEFAULTS = {"steps": 300, "lr": 0.001, "flag": False, "model": "a # b", "sizes": [8, 16], "seed": 1, "device": "auto",
            "resume": ""}
PRESETS = '''
toy:
  paper: {steps: 1000, lr: 0.1}
  cpu: {steps: 500}
  full: {steps: 1000, lr: 0.1, model: other}
other: {}
'''


def notebook(path, source):
    """A notebook whose only cell is a parameters cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell(source, metadata={"tags": ["parameters"]})]), path)


@pytest.fixture(autouse=True)
def house(tmp_path, monkeypatch):
    """A checkout of its own with one notebook, `toy`, and its presets; no run is under way."""
    for name in ("VAEBOOK_RUN", "VAEBOOK_PRESET"):
        monkeypatch.delenv(name, raising=False)
    notebook(tmp_path / "notebooks" / "toy.ipynb", CELL)
    (tmp_path / "notebooks" / "presets.yml").write_text(PRESETS)
    for module in (runs, provenance):
        monkeypatch.setattr(module, "root", lambda: tmp_path)
    return tmp_path


def complaint(call, *arguments, **named):
    with pytest.raises(runs.RunError) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------ parameters
def test_parameters_are_read_with_type_default_and_help():
    found = runs.parameters("toy")
    assert {p.name: p.default for p in found.values()} == DEFAULTS and list(found) == list(DEFAULTS)
    assert [p.type for p in found.values()] == ["int", "float", "bool", "str", "list", "int", "str", "str"]
    assert [p.help for p in found.values()][:5] == ["gradient steps", "learning # rate", "", "which one", "widths"]
    assert runs.presets("toy")["cpu"] == {"steps": 500} and runs.presets("other") == {} == runs.presets("nowhere")


@pytest.mark.parametrize(("line", "number"), [
    ("x = 3", 2), ("x: int", 2), ("x: float32 = 3.0", 2), ("x: int = 2 ** 3", 2), ("x: list = [n for n in 'ab']", 2),
    ("import os", 2), ("a.b: int = 3", 2), ("steps: int = 4", 2), ("x: int = ", 2), ("print(steps)", 2),
    ("'''unfinished", 2), ("x: 'int' = 3", 2), ("\n\nx = 3", 4)])
def test_a_parameters_cell_holds_annotated_literals_alone(house, line, number):
    notebook(house / "notebooks" / "toy.ipynb", f"steps: int = 300\n{line}\n")
    said = complaint(runs.parameters, "toy")
    assert f"toy, parameters cell, line {number}: write once `name: type = value  # help`" in said


def test_a_default_of_another_type_is_refused(house):
    notebook(house / "notebooks" / "toy.ipynb", "steps: int = 3.0")
    assert "steps must be int, got 3.0 (float)" in complaint(runs.check, "toy", {})


def test_notebooks_are_those_with_a_parameters_cell(house):
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell("x: int = 3")]), house / "notebooks" / "page.ipynb")
    assert runs.notebooks() == ["toy"]
    assert "'page' has no cell tagged 'parameters'" in complaint(runs.parameters, "page")
    assert complaint(runs.parameters, "tyo") == "no notebook 'tyo': did you mean 'toy'?"
    assert complaint(runs.parameters, "zzz") == "no notebook 'zzz'; it has toy"
    (house / "notebooks" / "broken.ipynb").write_text('{"cells": [')
    assert "broken.ipynb is not a notebook" in complaint(runs.parameters, "broken")


def test_checked_values_are_complete_and_typed():
    assert runs.check("toy", {}) == DEFAULTS
    found = runs.check("toy", {"lr": 1, "flag": True, "sizes": []})
    assert found == DEFAULTS | {"lr": 1.0, "flag": True, "sizes": []} and type(found["lr"]) is float
    assert list(found) == list(DEFAULTS)


@pytest.mark.parametrize(("values", "said"), [
    ({"stesp": 3}, "toy has no parameter 'stesp': did you mean 'steps'?"),
    ({"zzz": 3}, "toy has no parameter 'zzz'; it has steps, lr, flag, model, sizes, seed, device, resume"),
    ({"steps": True}, "steps must be int, got True (bool)"), ({"steps": 3.0}, "steps must be int, got 3.0 (float)"),
    ({"steps": "3"}, "steps must be int, got '3' (str)"), ({"steps": None}, "steps must be int, got None (NoneType)"),
    ({"flag": "false"}, "flag must be bool, got 'false' (str); with papermill pass it as YAML: -y 'flag: false'"),
    ({"flag": 0}, "flag must be bool, got 0 (int)"), ({"model": 3}, "model must be str, got 3 (int)"),
    ({"lr": "1e-3"}, "lr must be float, got '1e-3' (str); with papermill pass it as YAML: -y 'lr: 0.001'"),
    ({"lr": True}, "lr must be float, got True (bool)"), ({"lr": math.nan}, "lr must be float, got nan"),
    ({"lr": -math.inf}, "lr must be float, got -inf"), ({"sizes": (8,)}, "sizes must be list, got (8,) (tuple)")])
def test_unknown_names_and_wrong_types_are_refused(values, said):
    assert said in complaint(runs.check, "toy", values)


@pytest.mark.parametrize(("name", "text", "value"), [
    ("steps", "12", 12), ("steps", "-1", -1), ("lr", "3", 3.0), ("lr", "1e-3", 0.001), ("flag", "true", True),
    ("flag", "False", False), ("model", "false", "false"), ("model", "", ""), ("model", "a=b", "a=b"),
    ("sizes", "[1, 2]", [1, 2]), ("sizes", "[]", [])])
def test_set_is_parsed_by_the_declared_type(name, text, value):
    found = runs.parse("toy", name, text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("name", "text", "kind"), [
    ("steps", "3.5", "int"), ("steps", "", "int"), ("steps", "ten", "int"), ("steps", "true", "int"),
    ("lr", "nan", "float"), ("lr", "inf", "float"), ("lr", "fast", "float"), ("flag", "1", "bool"),
    ("flag", "yes", "bool"), ("sizes", "3", "list"), ("sizes", "[1,", "list"), ("sizes", "{}", "list")])
def test_set_of_another_type_is_refused(name, text, kind):
    assert complaint(runs.parse, "toy", name, text) == f"parameter {name} of toy must be {kind}, got {text!r}"


def test_set_of_an_unknown_name_is_refused():
    assert complaint(runs.parse, "toy", "sead", "3") == "toy has no parameter 'sead': did you mean 'seed'?"


# ------------------------------------------------------------------------------------------------ names and commands
CHANGES = [("", {}), ("", {"seed": 2}), ("cpu", {}), ("cpu", {"steps": 7, "flag": True, "lr": 1e-5}),
           ("paper", {"lr": 0.001}), ("full", {"model": "it's; $HOME *"}), ("", {"sizes": [1, 2]}), ("", {"model": ""}),
           ("", {"seed": -3}), ("cpu", {"seed": 0}), ("", {"model": "--preset=cpu"})]


@pytest.mark.parametrize(("preset", "changes"), CHANGES)
def test_the_command_of_a_run_makes_the_same_parameters(preset, changes):
    values = runs.check("toy", runs.presets("toy").get(preset, {}) | changes)
    words = shlex.split(runs.command_of("toy", preset, values | {"device": "cpu", "resume": "latest"}))
    assert words[:4] == ["python", "-m", "lib", "run"]
    options = _parser().parse_args(words[3:])
    pairs = [word.partition("=")[::2] for word in options.set] + ([("seed", options.seed)] if options.seed else [])
    parsed = {name: runs.parse("toy", name, text) for name, text in pairs}
    assert (options.notebook, options.preset, parsed) == ("toy", preset, changes)
    assert runs.check("toy", runs.presets("toy").get(preset, {}) | parsed) == values


def test_commands_read_as_one_would_write_them():
    values = runs.check("toy", {"steps": 500, "seed": 2, "flag": True, "model": "vae"})
    command = "python -m lib run toy --preset cpu --set flag=true --set model=vae --seed 2"
    assert runs.command_of("toy", "cpu", values) == command
    assert runs.command_of("toy", "", DEFAULTS) == "python -m lib run toy"


def test_a_name_is_the_preset_and_what_differs():
    def name(preset="", **changes):
        return runs.name_of("toy", preset, runs.check("toy", runs.presets("toy").get(preset, {}) | changes))
    assert name() == "default" and name("cpu") == "cpu"
    assert name("cpu", seed=2, flag=True) == "cpu-flag=True-seed=2" and name(steps=500) == "steps=500"
    assert name("cpu", device="cpu", resume="latest") == "cpu"
    assert name(model="../../etc/passwd") == "model=.._.._etc_passwd"
    long = [name(model=letter * 300) for letter in "ab"]
    assert long[0] != long[1] and all(len(each) <= 120 for each in long)
    every = [name(preset, **changes) for preset, changes in CHANGES]
    assert len(set(every)) == len(every) and not any("/" in each or " " in each for each in every)


def test_reduced_says_what_differs_from_the_published_size():
    assert runs.reduced("toy", DEFAULTS) == ["steps 300 instead of 1000", "lr 0.001 instead of 0.1"]
    assert runs.reduced("toy", DEFAULTS | {"steps": 1000, "lr": 0.1, "seed": 5}) == []
    assert runs.reduced("other", DEFAULTS) == []


@pytest.mark.parametrize("name", [path.stem for path in (lib.root() / "notebooks").glob("*.ipynb")])
def test_the_books_own_notebooks_and_presets_are_valid(name, monkeypatch):
    monkeypatch.setattr(runs, "root", lib.root)
    if name not in runs.notebooks():
        return
    assert all(p.help for p in runs.parameters(name).values()), "every parameter has its help"
    for preset, values in [("", {}), *runs.presets(name).items()]:
        complete = runs.check(name, values)
        assert runs.name_of(name, preset, complete) == (preset or "default")
    if "paper" in runs.presets(name):
        assert runs.reduced(name, runs.check(name, runs.presets(name)["paper"])) == []


def test_every_preset_belongs_to_a_notebook(monkeypatch):
    monkeypatch.setattr(runs, "root", lib.root)
    import yaml
    assert set(yaml.safe_load((lib.root() / "notebooks" / "presets.yml").read_text())) <= {*runs.notebooks(), "sweeps"}


# ------------------------------------------------------------------------------------------------ one run
def begin(**values):
    return runs.start("toy", DEFAULTS | values | {"unrelated": object()})


GOOD = {"nelbo": evaluate.exact(3.25, "nats"), "acc": evaluate.estimate(torch.tensor([0.0, 1.0]), "fraction")}


def strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} in strict JSON")
    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_saved_run_has_every_key_of_the_schema(house, monkeypatch):
    monkeypatch.setenv("VAEBOOK_PRESET", "cpu")
    run = begin(steps=500, seed=2)
    assert run.folder == house / "runs" / "toy" / "cpu-seed=2" and list(run.folder.iterdir()) == []
    figure = plt.figure()
    run.save_figure(figure, "latent")
    run.save_figure(figure, "latent")
    plt.close(figure)
    returned = run.save(GOOD, types.SimpleNamespace(name="digits", sha256="ab" * 32), {"step": [50], "loss": [0.5]})
    record = strict(run.folder / "results.json")
    assert record == json.loads(json.dumps(returned)) == runs.read(run.folder / "results.json")
    assert set(record) == {"schema", "experiment", "run", "preset", "parameters", "metrics", "history", "seed", "git",
                           "dataset", "versions", "device", "wall_time_s", "peak_memory_mb", "date", "command",
                           "figures", "reduced", "made_by"}
    assert [record[key] for key in ("schema", "experiment", "run", "preset")] == [1, "toy", "cpu-seed=2", "cpu"]
    assert record["parameters"] == DEFAULTS | {"steps": 500, "seed": 2} and record["seed"] == 2
    assert record["metrics"] == GOOD and record["history"] == {"step": [50], "loss": [0.5]}
    assert record["dataset"] == {"name": "digits", "sha256": "ab" * 32} and record["figures"] == ["latent.png"]
    assert record["reduced"] == ["steps 500 instead of 1000", "lr 0.001 instead of 0.1"]
    assert record["command"] == "python -m lib run toy --preset cpu --seed 2"
    assert set(record["git"]) == {"commit", "dirty"} and {"python", "torch", "numpy"} <= set(record["versions"])
    assert record["device"]["kind"] in ("cpu", "cuda") and record["device"]["name"] and record["device"]["threads"] >= 1
    assert 0 <= record["wall_time_s"] < 60 and record["peak_memory_mb"] > 10
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["date"])
    assert sorted(p.name for p in run.folder.iterdir()) == ["latent.png", "results.json"]


def test_under_the_launcher_the_result_waits_to_be_renamed(house, monkeypatch):
    monkeypatch.setenv("VAEBOOK_RUN", str(house / "elsewhere"))
    begin().save(GOOD)
    assert [p.name for p in (house / "elsewhere").iterdir()] == ["results.json.pending"]


@pytest.mark.parametrize("metric", [
    evaluate.exact(math.nan, "nats"), evaluate.exact(math.inf, "nats"), 3.0, None, {"value": 1.0, "se": None, "n": 3},
    {"value": 1.0, "se": math.nan, "n": 3, "unit": "nats"},
    {"value": torch.tensor(1.0), "se": None, "n": 3, "unit": ""}])
def test_a_metric_that_is_no_finite_number_is_refused_and_the_old_results_stay(metric):
    run = begin()
    run.save(GOOD)
    before = (run.folder / "results.json").read_bytes()
    assert "finite" in complaint(run.save, {"nelbo": metric})
    assert "finite" in complaint(run.save, GOOD, history={"loss": [1.0, math.nan]})
    assert (run.folder / "results.json").read_bytes() == before and len(list(run.folder.iterdir())) == 1


def test_plain_lists_take_one_line_and_no_value_changes():
    record = {"a": "open [ bracket\n  next", "b": [1, 2.5, "x]\n y"], "c": {"d": [[1, 2], [3]], "e": []},
              "f": "close ]"}
    text = runs.as_text(record)
    assert json.loads(text) == record and text.endswith("}\n") and '"f"' in text.splitlines()[-2]
    assert len(runs.as_text({"history": {"step": list(range(500)), "loss": [0.5] * 500}}).splitlines()) == 6


def full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_results_whole(monkeypatch):
    run = begin()
    run.save(GOOD)
    before = (run.folder / "results.json").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    said = complaint(run.save, GOOD | {"more": GOOD["acc"]})
    assert said == f"cannot write {run.folder}/results.json: No space left on device"
    assert (run.folder / "results.json").read_bytes() == before
    assert [p.name for p in run.folder.iterdir()] == ["results.json"]


def test_a_notebook_begun_again_by_hand_is_not_complete_until_it_saves(monkeypatch):
    run = begin()
    run.save(GOOD)
    monkeypatch.setenv("VAEBOOK_RUN", str(run.folder))              # the launcher sees to this itself
    assert (begin().folder / "results.json").exists()
    monkeypatch.delenv("VAEBOOK_RUN")
    assert not (begin().folder / "results.json").exists()


def test_results_appear_whole_or_not_at_all(monkeypatch):
    run = begin()
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append((strict(a), b.exists())), replace(a, b)))
    run.save(GOOD)
    (content, existed), = seen
    assert content["metrics"] == GOOD and not existed


def test_a_run_folder_that_cannot_be_written_is_refused_at_the_start(house, monkeypatch):
    (house / "runs").write_text("a file")
    folder = f"{house}/runs/toy/default"
    assert complaint(begin) == f"cannot write to the run folder {folder}: Not a directory; --out chooses another"
    (house / "runs").unlink()
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in complaint(begin)


def test_a_folder_that_vanishes_is_a_clear_line_too(house):
    run = begin()
    run.folder.rmdir()
    run.folder.write_text("")
    assert "cannot write" in complaint(run.save, GOOD)


# ------------------------------------------------------------------------------------------------ in a notebook
def test_a_notebooks_values_are_checked():
    assert "steps must be int, got '5' (str)" in complaint(begin, steps="5")
    assert begin(lr=2).parameters["lr"] == 2.0
    assert runs.start("toy", {"steps": 4}).parameters == DEFAULTS | {"steps": 4}


def test_a_misspelt_parameter_injected_by_papermill_is_found():
    cell = '# Parameters\nstesp = 7\nlr = 0.5\npapermill_environment_variables = {}\n'
    values = {"In": ["", CELL, cell, "x = 1"], "stesp": 7, "lr": 0.5, "papermill_environment_variables": {}}
    assert complaint(begin, **values) == "toy has no parameter 'stesp': did you mean 'steps'?"
    del values["stesp"]
    assert begin(**values).parameters == DEFAULTS | {"lr": 0.5}


@pytest.mark.parametrize("cell", [
    "# Parameters\n%matplotlib inline", "# Parameters\na.b = c[0] = 3", "# Parameters\nx, y = 1, 2", "# Parameters\n",
    "stesp = 3", "x = '''\n# Parameters\nstesp = 3'''"])
def test_a_persons_own_cells_are_left_alone(cell):
    assert begin(In=["", CELL, cell], stesp=3, x=1, y=2).parameters == DEFAULTS


def git(folder, *words):
    person = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "-C", folder, *person, *words], check=True, capture_output=True)


def test_provenance_tells_committed_code_from_other(house):
    assert runs.git_state() == {"commit": "unknown", "dirty": True}
    (house / "requirements.txt").write_text("torch")
    git(house, "init", "-q")
    git(house, "add", ".")
    git(house, "commit", "-qm", "all")
    clean = runs.git_state()
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (house / "notes.txt").write_text("mine")
    assert runs.git_state() == clean
    (house / "lib").mkdir()
    (house / "lib" / "new.py").write_text("x = 1")
    assert runs.git_state() == clean | {"dirty": True}
    (house / "lib" / "new.py").unlink()
    for changed in (house / "notebooks" / "presets.yml", house / "requirements.txt"):
        changed.write_text("other")
        assert runs.git_state() == clean | {"dirty": True}
        git(house, "checkout", "-q", ".")
    assert runs.git_state() == clean


# ------------------------------------------------------------------------------------------------ many runs
def recorded(folder, experiment="toy", name="cpu", **changes):
    path = folder / experiment / name / "results.json"
    path.parent.mkdir(parents=True)
    record = toy_record(experiment=experiment, run=name, parameters=DEFAULTS, metrics=GOOD)
    path.write_text(json.dumps(record | changes))
    return path


@pytest.mark.parametrize("content", ["", '{"schema": 1, "experi', "[]", "3", "null", "{}", '{"schema": 1}', "\x00\xff"])
def test_what_is_no_results_file_is_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content.encode("latin1"))
    assert str(path) in complaint(runs.read, path)


def test_missing_and_foreign_results_are_refused(tmp_path):
    said = complaint(runs.read, tmp_path / "results.json")
    assert said == f"{tmp_path}/results.json is missing: the run did not finish"
    assert "cannot be read" in complaint(runs.read, tmp_path)
    path = recorded(tmp_path, schema=2)
    assert f"{path} is not a results.json of schema 1: schema must be" in complaint(runs.read, path)


def test_records_are_every_recorded_run_with_its_path(house):
    assert runs.records() == []
    folder = house / "book" / "results"
    for experiment, name in (("toy", "b"), ("toy", "a"), ("other", "c")):
        recorded(folder, experiment, name)
    integrity.renew(folder)
    (folder / "toy" / "unfinished").mkdir()
    assert [r["path"] for r in runs.records()] == ["other/c", "toy/a", "toy/b"]
    assert [r["run"] for r in runs.records("toy")] == ["a", "b"] and runs.records("nothing") == []
    assert [r["path"] for r in runs.records(folder=folder / "..")] == []
    (folder / "toy" / "a" / "results.json").write_text("{")
    integrity.renew(folder)
    assert "toy/a/results.json cannot be read" in complaint(runs.records)


def test_the_launcher_starts_without_slow_imports():
    code = "import sys; from lib import launch, __main__; print({'torch', 'pandas', 'papermill'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
