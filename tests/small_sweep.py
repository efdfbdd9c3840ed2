"""Not a test: a checkout with toys that are swept, for the tests of sweeps."""
import json
import os
import shutil
import time
from pathlib import Path

from fresh_clone import git
from toy import toy_checkout, toy_record

import lib
from lib import gpus, launch, provenance, runs, sweeping, sweeps

TOY = '''\
steps: int = 3  # how far to go
base: str = ""  # run folder
seconds: float = 0.0  # how long it takes
seed: int = 1  # of nothing
resume: str = ""  # go on from
'''
BODY = '''\
import os, time
from lib import root, runs
runs._glue = lambda values: None
runs.device_info = lambda name: {"kind": "cpu", "name": "toy", "threads": 1}
run = runs.start("NAME", globals())
assert not base or (root() / base / "results.json").is_file()
if steps == 13:
    raise ValueError("thirteen")
time.sleep(seconds)
with open(root() / "made", "a") as file:
    print("NAME", seed, os.environ.get("CUDA_VISIBLE_DEVICES", ""), file=file)
run.save({"score": {"value": 2.5 * steps, "se": None, "n": 1, "unit": "points"}})
'''
PRESETS = '''\
toy:
  paper: {steps: 10}
  slow: {seconds: 5}
then:
  paper: {steps: 20}
  slow: {seconds: 1}
alone: {}
sweeps:
  pair: {seeds: 3, runs: [{run: toy}, {run: then, after: {base: toy}}]}
  grid: {runs: [{run: toy, set: {base: x}, grid: {steps: [1, 2], seed: [7, 8]}}]}
  alone: {runs: [{run: alone}]}
  fails: {runs: [{run: toy, grid: {steps: [3, 13]}}, {run: then, grid: {steps: [3, 13]}, after: {base: toy}}]}
'''


def sweep_checkout(folder, monkeypatch):
    """lib, workflow and toys in a checkout of one commit, which this process takes for its own."""
    folder = toy_checkout(folder, [TOY, BODY.replace("NAME", "toy")], PRESETS, ["__pycache__"])
    text = (folder / "notebooks" / "toy.ipynb").read_text()
    for name in ("then", "alone"):
        (folder / "notebooks" / f"{name}.ipynb").write_text(text.replace('\\"toy\\"', f'\\"{name}\\"'))
    shutil.copytree(lib.root() / "workflow", folder / "workflow", ignore=shutil.ignore_patterns(".venv"))
    (folder / ".gitignore").write_text("runs/\n.venv\n__pycache__/\nmade\n")
    git(folder, "init", "-q")
    commit(folder)
    for module in (runs, launch, provenance, sweeps, sweeping):
        monkeypatch.setattr(module, "root", lambda: folder)
    monkeypatch.setattr(gpus, "visible", list)                # none, whatever this machine has
    monkeypatch.setattr(sweeping, "PATIENCE", 20)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def commit(folder):
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-q", "--allow-empty", "-m", "now")


def put(checkout, one, date="2026-01-01T00:00:00Z", **changes):
    """A complete run of a configuration, made by the last commit."""
    record = toy_record(experiment=one.experiment, run=one.name, preset=one.preset, parameters=one.values, date=date,
                        git={"commit": git(checkout, "rev-parse", "HEAD").strip(), "dirty": False}) | changes
    folder = checkout / one.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(record))


def edit(path: Path, old: str, new: str):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 1))
