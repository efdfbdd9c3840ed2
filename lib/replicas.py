"""Several seeds of one run, trained together: where each lies and which of them are left to do.

In a notebook with the parameters `seed` and `replicas`, `run.replicas(replicas)` gives a Run for each seed, whose
models `train.fit_together` trains. Each Run is saved for itself, with the numbers and the command of a run of its seed
alone; its wall time is that of all, and its parameter `replicas` says how many there were.
"""
import dataclasses
import os
from pathlib import Path

from lib import runs


def seeds(experiment: str, preset: str, values: dict, folder: Path) -> list[tuple[dict, Path]]:
    """(parameters, folder) of a run and of those that its parameter `replicas` adds: the next seeds, beside it.

    An added run has the name, so the folder's name, that it would have alone. Raises RunError: fewer than one replica,
    or several without a parameter `seed`.
    """
    n, seed = values.get("replicas", 1), values.get("seed")
    if n < 1 or (n > 1 and seed is None):
        raise runs.RunError(f"replicas must be at least 1 and need a parameter `seed`, got {n} for {experiment}")
    more = [values | {"seed": seed + i} for i in range(1, n)]
    return [(values, folder), *((other, folder.parent / runs.name_of(experiment, preset, other)) for other in more)]


def complete(folder: Path, experiment: str, values: dict) -> bool:
    """Whether the folder holds this run, ended. RunError if it holds another one (--out, or defaults changed since)."""
    if not (folder / "results.json").is_file():
        return False
    found = runs.read(folder / "results.json")
    other = [f"{name} {found['parameters'].get(name)!r}, now {value!r}" for name, value in values.items()
             if name not in runs.HOUSEKEEPING and found["parameters"].get(name) != value]
    if found["experiment"] != experiment:
        other = [f"experiment {found['experiment']!r}, now {experiment!r}"]
    if other:
        shown = os.path.relpath(folder, runs.root()) if folder.is_relative_to(runs.root()) else folder
        raise runs.RunError(f"{shown} holds a complete run with {'; '.join(other)}: choose another --out, or replace "
                            "it with --again")
    return True


def added(run: runs.Run, n: int) -> list[runs.Run]:
    """The runs of the n - 1 seeds after the run's own, their folders made.

    A seed that is complete in its folder is left out, and said to be: nothing complete is repeated or overwritten
    without --again. Raises RunError: see `seeds` and `complete`; a folder that cannot be written.
    """
    found = []
    for values, folder in seeds(run.experiment, run.preset, run.parameters | {"replicas": n}, run.folder)[1:]:
        if complete(folder, run.experiment, values):
            print(f"seed {values['seed']} is left out: {folder.name} is complete")
            continue
        runs.make_folder(folder)
        own = {"name": folder.name, "parameters": values, "folder": folder, "figures": []}
        found.append(dataclasses.replace(run, **own, added=True))
    return found
