"""Sweeps: many runs from one name. `sweep(i) -> Configuration` is a pure function; the state of a run is on the disk.

    sweep = sweeps.load("celeba", "paper")     # `sweeps:` of notebooks/presets.yml says what is in it
    print(len(sweep), sweep(1).command, sweep(1).needs)

A preset is named as by `python -m lib run`; `smoke` is the notebooks' defaults. lib/sweeping.py runs what is to do.
"""
import ast
import contextlib
import datetime
import functools
import itertools
import json
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lib import launch, root, runs

SMOKE = "smoke"                                       # the notebooks' defaults, on the embedded data
KEYS = {"run", "set", "grid", "after", "seeds"}       # of a part of a sweep


@dataclass(frozen=True)
class Configuration:
    """One run of a sweep. changes: what differs from its preset; values: all parameters; needs: indices of the runs
    whose folders it starts from, all of them smaller than its own index."""
    index: int
    experiment: str
    preset: str                                       # "" is smoke
    changes: dict
    values: dict
    name: str
    needs: tuple[int, ...] = ()

    @property
    def folder(self) -> str:
        """The run's folder, from the checkout's top."""
        return f"runs/{self.experiment}/{self.name}"

    @property
    def command(self) -> str:
        """The command line that makes this run."""
        return runs.command_of(self.experiment, self.preset, self.values)

    @property
    def words(self) -> list[str]:
        """What comes after `python -m lib` in the command line."""
        return shlex.split(self.command)[3:]


@dataclass(frozen=True)
class Sweep:
    """A named sweep at a preset: sweep(i) is its configuration i, of len(sweep)."""
    name: str
    preset: str                                       # smoke, cpu, ...
    configurations: tuple[Configuration, ...] = field(repr=False)

    def __call__(self, i: int) -> Configuration:
        """Configuration i. RunError if there is none."""
        if not 0 <= i < len(self):
            raise runs.RunError(f"sweep {self.name} at {self.preset} has configurations 0 to {len(self) - 1}, not {i}")
        return self.configurations[i]

    def __len__(self) -> int:
        return len(self.configurations)

    def __iter__(self):
        return iter(self.configurations)


# ------------------------------------------------------------------------------------------------ from presets.yml
def definitions() -> dict[str, dict]:
    """The `sweeps:` of notebooks/presets.yml: {name: {"seeds": n, "runs": [part, ...]}}. RunError if it is not so."""
    try:
        known = runs.presets_file().get("sweeps") or {}
        found = {name: {"seeds": sweep.get("seeds", 1), "runs": [dict(part) for part in sweep["runs"]]}
                 for name, sweep in known.items()}
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise runs.RunError("notebooks/presets.yml: each of `sweeps` needs `runs`, a list of parts "
                            f"({type(error).__name__}: {' '.join(str(error).split())})") from None
    for name, sweep in found.items():
        if not sweep["runs"] or not _is_number(sweep["seeds"]):
            raise runs.RunError(f"notebooks/presets.yml: sweep {name} needs `runs`, and `seeds` from 1 if it has any")
    return found


def _is_number(seeds) -> bool:
    return type(seeds) is int and seeds >= 1


def load(name: str, preset: str = SMOKE, seeds: int | None = None) -> Sweep:
    """The sweep of that name with every run at a preset; seeds: 1 to n in place of what the sweep says.

    Raises RunError: an unknown sweep, preset or parameter, a value of the wrong type, a part that is not as
    notebooks/presets.yml describes it, an `after` that names no earlier part.
    """
    known = definitions()
    if name not in known:
        raise runs.RunError(f"no sweep {name!r}{runs.nearest(name, known)}")
    if seeds is not None and seeds < 1:
        raise runs.RunError(f"--seeds must be at least 1, got {seeds}")
    configurations, points = {}, {}                   # folder -> configuration; notebook -> [(point, index)]
    try:
        for part in known[name]["runs"]:
            _check(part, points)
            n = seeds or part.get("seeds") or (1 if preset == SMOKE else known[name]["seeds"])
            _add(part, "" if preset == SMOKE else preset, n, configurations, points)
    except runs.RunError as error:
        raise runs.RunError(f"sweep {name}: {error}") from None
    return Sweep(name, preset, tuple(configurations.values()))


def _check(part: dict, points: dict) -> None:
    """RunError if a part of a sweep is not well formed, or starts from what does not come before it."""
    if "run" not in part:
        raise runs.RunError(f"a part has no `run`, the notebook: {part}")
    for key in part:
        if key not in KEYS:
            raise runs.RunError(f"the part of {part['run']} has {key!r}{runs.nearest(str(key), KEYS)}")
    for key in ("set", "grid", "after"):
        if not isinstance(part.get(key, {}), dict):
            raise runs.RunError(f"`{key}` of {part['run']} must name parameters, got {part[key]!r}")
        for name in part.get(key, {}):
            if name in runs.HOUSEKEEPING:
                raise runs.RunError(f"`{key}` of {part['run']} has {name}, which tells no runs apart: leave it out")
    for name, values in part.get("grid", {}).items():
        if not isinstance(values, list) or not values:
            raise runs.RunError(f"`grid` of {part['run']}: {name} needs a list of values, got {values!r}")
    for notebook in part.get("after", {}).values():
        if not isinstance(notebook, str) or notebook not in points:
            raise runs.RunError(f"{part['run']} is after {notebook!r}, which is no earlier part: put it before "
                                f"{part['run']}")
    if not _is_number(part.get("seeds", 1)):
        raise runs.RunError(f"`seeds` of {part['run']} must be a whole number from 1, got {part['seeds']!r}")


def _add(part: dict, preset: str, seeds: int, configurations: dict, points: dict) -> None:
    """Append a part's runs to `configurations`, and to `points` where each stands in the sweep (seed and grid)."""
    experiment, base = part["run"], launch.values_of(part["run"], preset, {})
    grid = ({"seed": list(range(1, seeds + 1))} if "seed" in base else {}) | part.get("grid", {})
    common = dict(part.get("set", {}))
    if not preset:
        grid.pop("dataset", None), common.pop("dataset", None)
    for own in itertools.product(*grid.values()):             # the first changes slowest: all settings, then a new seed
        for point, starts in _starts(experiment, dict(zip(grid, own, strict=True)), part.get("after", {}), points):
            given = {key: value for key, value in zip(grid, own, strict=True) if value is not None}
            folders = {key: list(configurations.values())[i].folder for key, i in starts.items()}
            values = launch.values_of(experiment, preset, common | given | folders)
            changes = {key: value for key, value in values.items() if value != base[key]}
            new = Configuration(len(configurations), experiment, preset, changes, values,
                                runs.name_of(experiment, preset, values), tuple(sorted(set(starts.values()))))
            old = configurations.setdefault(new.folder, new)
            if old.values != values:
                raise runs.RunError(f"{new.folder} would be the folder of two runs, {old.command} and {new.command}")
            points.setdefault(experiment, []).append((point, old.index))


def _starts(experiment: str, point: dict, after: dict, points: dict) -> list[tuple[dict, dict]]:
    """[(the point with what it inherits, parameter -> index)]: the earlier runs that a run at this point starts from.

    An earlier run fits if it agrees in the seed and every value of the grid that both have; several that fit make
    several runs.
    """
    found = [(point, {})]
    for parameter, notebook in after.items():
        found = [(full | other, starts | {parameter: index}) for full, starts in found
                 for other, index in points[notebook] if all(full.get(key, other[key]) == other[key] for key in other)]
    if not found:
        raise runs.RunError(f"{experiment} with {point} has no run of {' or '.join(after.values())} to start from: "
                            "give both the same seeds and values")
    return found


# ------------------------------------------------------------------------------------------------ what is on the disk
@dataclass(frozen=True)
class State:
    """Of a configuration's run: `done`; `other code` (done, stays, but the code is another now); `to do`; or `changed`
    (to be set aside and run again); and why."""
    kind: str
    why: str = ""

    @property
    def stays(self) -> bool:
        """Whether the run is complete and as it should be."""
        return self.kind in ("done", "other code")


def states(sweep: Sweep, again: bool = False) -> list[State]:
    """The state of every run of a sweep; again: one made by other code counts as changed.

    A run is changed if it has other parameters than now, whether it is complete or only has a checkpoint, or if it is
    older than a run that it starts from or that one is to be run again.
    """
    found: list[State] = []
    code = Code()
    for one in sweep:
        found.append(_state(one, [sweep(i) for i in one.needs], found, code, again))
    return found


def _state(one: Configuration, needs: list[Configuration], found: list[State], code: "Code", again: bool) -> State:
    trace = _trace(root() / one.folder)
    if trace is None:
        return State("to do")
    if unlike := _unlike(one.values, trace["parameters"]):
        return State("changed", unlike)
    for need in needs:
        if not found[need.index].stays:
            return State("changed", f"starts from {need.index}, which is to be run")
        if trace["date"] and trace["date"] < _trace(root() / need.folder)["date"]:
            return State("changed", f"older than {need.index}, from which it starts")
    other = code.differs(one.experiment, trace["git"]) if trace["git"] else ""
    if not trace["complete"] and not (other and again):
        return State("to do", "goes on from its checkpoint" + (f", which is of other code: {other}" if other else ""))
    return State("changed" if again else "other code", other) if other else State("done")


def _trace(folder: Path) -> dict | None:
    """{"parameters", "date" of its start, "git", "complete"} of the run in a folder; None: nothing to go on from.

    git of an interrupted run is that of the process that trained last; None: the checkpoint does not say.
    """
    if (folder / "results.json").is_file():
        try:
            record = runs.read(folder / "results.json")
        except runs.RunError:
            return {"parameters": None, "date": "", "complete": True}
        return {name: record[name] for name in ("parameters", "date", "git")} | {"complete": True}
    if not any(folder.rglob("latest.safetensors")):
        return None
    told = {}
    with contextlib.suppress(OSError, ValueError, KeyError):           # papermill writes it at the run's start
        told = json.loads((folder / "notebook.ipynb").read_text())["metadata"]["papermill"]
    from lib import checkpoint  # imports torch: slow

    made_by = checkpoint.made_by(folder)
    return {"parameters": told.get("parameters") or {}, "date": told.get("start_time", "")[:19],
            "git": made_by[-1] if made_by else None, "complete": False}


def _unlike(values: dict, had: dict | None) -> str:
    """Which parameters a run had that are others now, e.g. "steps 300, now 400"; an interrupted one may not know."""
    if had is None:
        return "its results.json cannot be read"
    return "; ".join(f"{name} {had.get(name)!r}, now {value!r}" for name, value in values.items() if had
                     and name not in runs.HOUSEKEEPING and had.get(name) != value)


class Code:
    """Tells whether the code that an experiment's numbers come from is another now than when a run was made."""

    def __init__(self):
        self.files, self.changes = functools.cache(_files), functools.cache(_changes)

    def differs(self, experiment: str, git: dict) -> str:
        """Files that differ between a run's commit and now, e.g. "lib/gmm.py, lib/train.py"; "": none does."""
        if git["commit"] == "unknown" or (changes := self.changes(git["commit"])) is None:
            return "of a commit that is not known here"
        notebook = f"notebooks/{experiment}.ipynb"
        names = sorted(self.files(experiment) & changes)
        if notebook in changes and _cells(_git("show", f"{git['commit']}:{notebook}")) != _cells(_notebook(experiment)):
            names.append(notebook)
        names = names[:3] + ([f"{len(names) - 3} more"] if len(names) > 3 else [])
        return ", ".join([*names, *(["uncommitted changes"] if git["dirty"] else [])])


def _files(experiment: str) -> set[str]:
    """The files of lib that a notebook imports, and those that they import."""
    found, todo = {"lib/__init__.py"}, _imports("\n".join(_cells(_notebook(experiment))))
    while todo:
        file = f"lib/{todo.pop()}.py"
        if file not in found and (root() / file).is_file():
            found.add(file)
            todo |= _imports((root() / file).read_text())
    return found


def _imports(source: str) -> set[str]:
    """Names of the modules of lib that a source imports."""
    source = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "lib":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib."):
            found.add(node.module.split(".")[1])
    return found


def _notebook(experiment: str) -> str:
    return runs.notebook_path(experiment).read_text()


def _cells(notebook: str) -> list[str]:
    """The sources of a notebook's code cells: its outputs may be renewed."""
    return ["".join(cell["source"]) for cell in json.loads(notebook or '{"cells": []}')["cells"]
            if cell["cell_type"] == "code"]


def _changes(commit: str) -> set[str] | None:
    """Files of lib and notebooks that differ between a commit and the working tree; None: no such commit."""
    told = _git("diff", "--name-only", commit, "--", "lib", "notebooks")
    return None if told is None else set(told.splitlines())


def _git(*words: str) -> str | None:
    try:
        return subprocess.run(["git", "-C", str(root()), *words], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def set_aside(one: Configuration) -> str:
    """Move the folder of a run that is to be made again, where no reader of runs looks; returns where it is now.

    Nothing is deleted. Raises RunError if a process runs in it.
    """
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H%M%S.%fZ")
    target = root() / "runs" / ".set-aside" / one.experiment / f"{one.name}.{when}"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        launch.move(root() / one.folder, target)
    except launch.BusyError:
        raise runs.RunError(f"{one.folder} is to be set aside, but a process runs in it: wait for it, or end it") \
            from None
    return str(target.relative_to(root()))
