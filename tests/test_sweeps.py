"""Sweeps: what their configurations are, the state of each run on the disk, and a head that tells what came of them.

The heads here run in a small checkout; in place of Snakemake they call a script that does with each run as it is told.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fresh_clone import environment, git
from toy import toy_checkout, toy_record

import lib
from lib import launch, runs, sweeping, sweeps
from lib.__main__ import main

# ------------------------------------------------------------------------------------------------ the book's own
SIZES = {("semantic-hashing", "smoke"): 36, ("semantic-hashing", "paper"): 36 * 3,
         ("symmetric-learning", "cpu"): 6 * 3, ("symmetric-learning", "smoke"): 4,
         ("vampprior", "paper"): 8, ("vampprior", "smoke"): 4,
         ("vampprior-likelihood", "paper"): (12 + 6 + 3) * 3 + 2, ("autoencoders", "cpu"): 5 * 3,
         ("celeba", "paper"): 7, ("celeba", "cpu"): 4,
         ("celeba-autoencoders", "paper"): 10, ("disentanglement", "cpu"): 6 * 3,
         ("gmm", "paper"): 5, ("gmm", "smoke"): 1, ("rehearsal", "smoke"): 12}


@pytest.mark.parametrize(("name", "preset"), SIZES)
def test_the_sweeps_have_the_runs_of_the_published_tables(name, preset):
    sweep = sweeps.load(name, preset)
    assert len(sweep) == SIZES[name, preset] == len({one.folder for one in sweep})
    assert [one.index for one in sweep] == list(range(len(sweep)))
    for one in sweep:
        again = launch.values_of(one.experiment, one.preset, one.changes)          # what its command line does
        assert one.values == again and one.name == runs.name_of(one.experiment, one.preset, again)
        assert all(i < one.index for i in one.needs)


def test_every_sweep_can_be_loaded_at_smoke_size_and_says_its_numbers():
    said = sweeping.listing().splitlines()
    assert [line.split()[0] for line in said] == list(sweeps.definitions())
    line = next(line for line in said if line.startswith("semantic-hashing "))
    assert "smoke 36, paper 108, cpu 108, short 108" in line
    assert all(len(sweeps.load(name)) for name in sweeps.definitions())


def test_a_sweep_is_a_pure_function(tmp_path, monkeypatch):
    first, second = sweeps.load("semantic-hashing", "paper"), sweeps.load("semantic-hashing", "paper")
    monkeypatch.chdir(tmp_path)
    assert [second(i) for i in range(108)] == list(first)
    one = first(1)
    assert (one.experiment, one.preset, one.changes) == ("semantic-hashing", "paper", {"bits": 8, "decoder_depth": 1})
    assert one.command == "python -m lib run semantic-hashing --preset paper --set bits=8 --set decoder_depth=1"
    assert one.folder == "runs/semantic-hashing/paper-bits=8-decoder_depth=1" and one.needs == ()
    assert {first(i).values["seed"] for i in range(36)} == {1} and first(36).values["seed"] == 2
    with pytest.raises(runs.RunError, match="has configurations 0 to 107, not 108"):
        first(108)


def test_a_chain_starts_each_run_from_the_one_of_its_own_seed_and_variant():
    sweep = sweeps.load("celeba", "paper", seeds=2)
    chains = [one for one in sweep if one.experiment == "celeba-fid"]
    assert len(sweep) == 14 and len(chains) == 4
    for fid in chains:
        joint = sweep(fid.needs[0])
        encoder = sweep(joint.needs[0])
        gan = sweep(encoder.needs[0])
        assert [fid.values["joint"], joint.values["encoder"], encoder.values["gan"]] == [
            joint.folder, encoder.folder, gan.folder]
        assert joint.values["seed"] == encoder.values["seed"] == gan.values["seed"]
        assert (joint.values["lr"], encoder.values["lr"]) in [(0.00001, 0.00002), (0.0002, 0.0002)]
    assert len({(sweep(fid.needs[0]).values["lr"], sweep(fid.needs[0]).values["seed"]) for fid in chains}) == 4


def test_a_chain_of_a_preset_has_the_names_that_the_preset_alone_gives():
    for preset in ("cpu", "narrow"):
        assert [one.folder for one in sweeps.load("celeba", preset)] == [
            f"runs/celeba-{stage}/{preset}" for stage in ("gan", "encoder", "joint", "fid")]
    assert sweeps.load("celeba", "paper")(3).folder == "runs/celeba-joint/paper"


def test_at_smoke_size_data_are_embedded_and_there_is_one_seed_unless_asked():
    sweep = sweeps.load("symmetric-learning")
    assert all("dataset" not in one.changes for one in sweep) and {one.values["seed"] for one in sweep} == {1}
    assert len(sweeps.load("symmetric-learning", seeds=3)) == 12
    assert len(sweeps.load("celeba", seeds=2)) == 14 and len(sweeps.load("rehearsal", "paper", seeds=1)) == 5


# ------------------------------------------------------------------------------------------------ a small checkout
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
  slow: {seconds: 3}
then:
  paper: {steps: 20}
  slow: {seconds: 1}
alone: {}
sweeps:
  pair: {seeds: 3, runs: [{run: toy}, {run: then, after: {base: toy}}]}
  grid: {runs: [{run: toy, set: {base: x}, grid: {steps: [1, 2], seed: [7, 8]}}]}
  fails: {runs: [{run: toy, grid: {steps: [3, 13]}}, {run: then, grid: {steps: [3, 13]}, after: {base: toy}}]}
'''


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """lib, workflow and two toys in a checkout of one commit, which this process takes for its own."""
    folder = toy_checkout(tmp_path / "checkout", [TOY, BODY.replace("NAME", "toy")], PRESETS, ["__pycache__"])
    text = (folder / "notebooks" / "toy.ipynb").read_text()
    for name in ("then", "alone"):
        (folder / "notebooks" / f"{name}.ipynb").write_text(text.replace('\\"toy\\"', f'\\"{name}\\"'))
    shutil.copytree(lib.root() / "workflow", folder / "workflow", ignore=shutil.ignore_patterns(".venv"))
    (folder / ".gitignore").write_text("runs/\n.venv\n__pycache__/\nmade\n")
    git(folder, "init", "-q")
    commit(folder)
    for module in (runs, launch, sweeps, sweeping):
        monkeypatch.setattr(module, "root", lambda: folder)
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


def kinds(name="pair", preset="smoke", seeds=None, **options):
    return [state.kind for state in sweeps.states(sweeps.load(name, preset, seeds), **options)]


def edit(path: Path, old: str, new: str):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 1))


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(("runs_of_it", "said"), [
    ("[{run: toy, grid: {stesp: [1]}}]", "sweep bad: toy has no parameter 'stesp': did you mean 'steps'?"),
    ("[{run: toy, set: {steps: many}}]", "sweep bad: parameter steps must be int, got 'many' (str)"),
    ("[{run: toyy}]", "sweep bad: no notebook 'toyy': did you mean 'toy'?"),
    ("[{run: toy, grdi: {}}]", "sweep bad: the part of toy has 'grdi': did you mean 'grid'?"),
    ("[{run: toy, grid: {steps: 3}}]", "sweep bad: `grid` of toy: steps needs a list of values, got 3"),
    ("[{run: toy, grid: [3]}]", "sweep bad: `grid` of toy must name parameters, got [3]"),
    ("[{run: toy, seeds: 0}]", "sweep bad: `seeds` of toy must be a whole number from 1, got 0"),
    ("[{set: {steps: 3}}]", "sweep bad: a part has no `run`, the notebook: {'set': {'steps': 3}}"),
    ("[{run: toy, after: {base: then}}, {run: then, after: {base: toy}}]",
     "sweep bad: toy is after 'then', which is no earlier part: put it before toy"),
    ("[{run: toy}, {run: then, after: {bsae: toy}}]", "sweep bad: then has no parameter 'bsae': did you mean 'base'?"),
    ("[{run: toy}, {run: then, seeds: 2, after: {base: toy}}]",
     "sweep bad: then with {'seed': 2} has no run of toy to start from: give both the same seeds and values"),
    ("3", "notebooks/presets.yml: each of `sweeps` needs `runs`, a list of parts (TypeError: 'int' object is not "
          "iterable)")])
def test_a_sweep_that_is_wrong_says_so_in_one_sentence(checkout, runs_of_it, said, capfd):
    with open(checkout / "notebooks" / "presets.yml", "a") as file:
        file.write(f"  bad: {{runs: {runs_of_it}}}\n")
    assert main(["sweep", "bad", "--dry-run"]) == 1
    out, err = capfd.readouterr()
    assert err.startswith(f"error: {said}") and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(("words", "said"), [
    (["piar"], "no sweep 'piar': did you mean 'pair'?"),
    (["pair", "--preset", "papper"], "sweep pair: toy has no preset 'papper': did you mean 'paper'?"),
    (["pair", "--seeds", "0"], "--seeds must be at least 1, got 0"),
    ([], "name a sweep: pair, grid, fails (--list shows their sizes)"),
    (["pair"], "Snakemake is not installed: `make sweep` installs it into workflow/.venv")])
def test_what_cannot_be_swept_is_refused(checkout, words, said, capfd, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["sweep", *words]) == 1
    assert capfd.readouterr() == ("", f"error: {said}\n") and not (checkout / "runs").exists()


def test_the_dry_run_prints_everything_and_runs_nothing(checkout, capsys):
    put(checkout, sweeps.load("pair", "paper")(0))
    assert main(["sweep", "pair", "--preset", "paper", "--seeds", "2", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "   0  done       python -m lib run toy --preset paper",
        "   1  to do      python -m lib run toy --preset paper --seed 2",
        "   2  to do      python -m lib run then --preset paper --set base=runs/toy/paper  (after 0)",
        "   3  to do      python -m lib run then --preset paper --set base=runs/toy/paper-seed=2 --seed 2  (after 1)",
        "pair at paper: 4 runs: 1 done, 3 to do"]
    assert [path.name for path in (checkout / "runs").iterdir()] == ["toy"]


# ------------------------------------------------------------------------------------------------ states
def test_a_grid_may_give_the_seeds_itself(checkout):
    assert [one.name for one in sweeps.load("grid")] == ["steps=1-base=x-seed=7", "steps=2-base=x-seed=7",
                                                         "steps=1-base=x-seed=8", "steps=2-base=x-seed=8"]


def test_a_changed_preset_reruns_what_it_must_and_nothing_else(checkout):
    sweep = sweeps.load("pair", "paper", 2)
    for one, minute in zip(sweep, "0011", strict=True):
        put(checkout, one, f"2026-01-01T00:0{minute}:00Z")
    assert kinds("pair", "paper", 2) == ["done"] * 4
    edit(checkout / "notebooks" / "presets.yml", "{steps: 20}", "{steps: 21}")
    assert kinds("pair", "paper", 2) == ["done", "done", "changed", "changed"]
    assert sweeps.states(sweeps.load("pair", "paper"))[3].why == "steps 20, now 21"
    edit(checkout / "notebooks" / "presets.yml", "{steps: 21}", "{steps: 20}")
    edit(checkout / "notebooks" / "presets.yml", "{steps: 10}", "{steps: 11}")
    assert kinds("pair", "paper", 2) == ["changed"] * 4
    assert sweeps.states(sweeps.load("pair", "paper"))[3].why == "starts from 0, which is to be run"


def test_a_run_older_than_the_one_that_it_starts_from_is_made_anew(checkout):
    sweep = sweeps.load("pair", "paper", 1)
    put(checkout, sweep(0), "2026-01-01T00:02:00Z")
    put(checkout, sweep(1), "2026-01-01T00:01:00Z")
    assert kinds("pair", "paper", 1) == ["done", "changed"]
    shutil.rmtree(checkout / sweep(0).folder)
    assert kinds("pair", "paper", 1) == ["to do", "changed"]


def test_a_result_that_cannot_be_read_is_made_anew(checkout):
    put(checkout, sweeps.load("pair")(0))
    (checkout / "runs" / "toy" / "default" / "results.json").write_text("{")
    assert sweeps.states(sweeps.load("pair"))[0] == sweeps.State("changed", "its results.json cannot be read")


def begun(checkout, one, parameters, start="2026-01-01T00:01:00.123456"):
    """An interrupted run of a configuration: a checkpoint, and what papermill wrote at its start."""
    folder = checkout / one.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest.safetensors").write_bytes(b"weights")
    told = {"cells": [], "metadata": {"papermill": {"parameters": parameters, "start_time": start}}}
    (folder / "notebook.ipynb").write_text(json.dumps(told))


def test_an_interrupted_run_goes_on_only_with_its_own_parameters(checkout):
    sweep = sweeps.load("pair", "paper", 1)
    put(checkout, sweep(0))
    begun(checkout, sweep(1), sweep(1).values | {"resume": "auto"})
    assert sweeps.states(sweep) == [sweeps.State("done"), sweeps.State("to do", "goes on from its checkpoint")]
    begun(checkout, sweep(1), sweep(1).values | {"steps": 19})
    assert sweeps.states(sweep)[1] == sweeps.State("changed", "steps 19, now 20")
    begun(checkout, sweep(1), sweep(1).values, "2025-12-31T00:00:00.123456")
    assert sweeps.states(sweep)[1] == sweeps.State("changed", "older than 0, from which it starts")
    (checkout / sweep(1).folder / "latest.safetensors").unlink()
    assert sweeps.states(sweep)[1] == sweeps.State("to do")


def test_other_code_is_named_and_only_what_the_notebook_imports(checkout):
    put(checkout, sweeps.load("pair", "smoke", 1)(0))
    (checkout / "lib" / "gmm.py").write_text("# another\n")                       # no toy imports it
    edit(checkout / "notebooks" / "alone.ipynb", "thirteen", "fourteen")
    assert kinds() == ["done", "to do"]
    edit(checkout / "lib" / "runs.py", '"""A run: ', '"""The run: ')
    assert sweeps.states(sweeps.load("pair"))[0] == sweeps.State("other code", "lib/runs.py")
    commit(checkout)
    edit(checkout / "notebooks" / "toy.ipynb", "thirteen", "fourteen")
    assert sweeps.states(sweeps.load("pair"))[0] == sweeps.State("other code", "lib/runs.py, notebooks/toy.ipynb")
    assert kinds(again=True) == ["changed", "to do"]
    for git_state, said in (({"commit": "unknown", "dirty": True}, "of a commit that is not known here"),
                            ({"commit": "b" * 40, "dirty": False}, "of a commit that is not known here")):
        put(checkout, sweeps.load("pair")(0), git=git_state)
        assert sweeps.states(sweeps.load("pair"))[0].why == said
    commit(checkout)
    put(checkout, sweeps.load("pair")(0), git={"commit": git(checkout, "rev-parse", "HEAD").strip(), "dirty": True})
    assert sweeps.states(sweeps.load("pair"))[0].why == "uncommitted changes"


def test_renewed_outputs_of_a_notebook_are_no_other_code(checkout):
    put(checkout, sweeps.load("pair")(0))
    edit(checkout / "notebooks" / "toy.ipynb", '"outputs": []', '"outputs": [{"name": "stdout"}]')
    assert kinds() == ["done", "to do"]


def test_what_is_set_aside_is_kept_and_does_not_look_like_a_run(checkout):
    one = sweeps.load("pair")(0)
    put(checkout, one)
    where = checkout / sweeps.set_aside(one)
    assert where.parent == checkout / "runs" / ".set-aside" / "toy" and where.name.startswith("default.2")
    assert (where / "results.json").is_file() and not (checkout / one.folder).exists()
    assert runs.records(folder=checkout / "runs") == runs.records("toy", checkout / "runs") == []
    put(checkout, one)
    assert len(runs.records("toy", checkout / "runs")) == 1
    with launch._lock(checkout / one.folder), pytest.raises(runs.RunError, match="but a process runs in it: wait"):
        sweeps.set_aside(one)


# ------------------------------------------------------------------------------------------------ a head
FAKE = '''#!{python}
"""In place of Snakemake: does with each run of the plan, in order, what behaviour.json says of its folder."""
import json, sys, time
from pathlib import Path
work = Path(sys.argv[sys.argv.index("--directory") + 1])
plan = json.loads((work / "plan.json").read_text())
book = Path(plan["book"])
told = json.loads((book / "behaviour.json").read_text())
(work / "arguments").write_text(" ".join(sys.argv[1:]))
done = set()
for key, job in plan["runs"].items():
    how = told["runs"].get(job["folder"], "well")
    folder = book / job["folder"]
    if not set(job["needs"]) <= done:
        continue
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / plan["log"], "a") as log:
        print("--- 2026-01-01T00:00:00Z here", file=log)
        print({{"well": "made", "killed": "Killed"}}.get(how, "error: " + how), file=log)
    if how == "well":
        (folder / "results.json").write_text(json.dumps(told["results"][job["folder"]]))
        done.add(key)
time.sleep(told["seconds"])
print("Snakemake's last words")
sys.exit(told["code"])
'''


@pytest.fixture
def fake(checkout):
    """fake({folder: "well" | "killed" | what it complains of}, ...): a Snakemake that does so."""
    def install(behaviour=(), name="pair", seeds=None, code=0, seconds=0):
        results = {one.folder: toy_record(experiment=one.experiment, run=one.name, preset="", parameters=one.values)
                   for one in sweeps.load(name, seeds=seeds)}
        (checkout / "behaviour.json").write_text(json.dumps({"runs": dict(behaviour), "results": results, "code": code,
                                                             "seconds": seconds}))
        path = checkout / "workflow" / ".venv" / "bin" / "snakemake"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE.format(python=sys.executable))
        path.chmod(0o755)
        return checkout / "runs" / ".sweeps" / f"{name}-smoke"
    return install


def test_a_sweep_that_goes_well(checkout, fake, capsys):
    work = fake(seeds=2)
    assert main(["sweep", "pair", "--seeds", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "pair at smoke: 4 runs, 4 to do" and out[4].startswith("4/4  runs/") and out[4].endswith("  1.0 s")
    assert sorted(line.split()[1] for line in out[1:5]) == sorted(one.folder for one in sweeps.load("pair", seeds=2))
    assert out[5].startswith("4 of 4 runs are done, 0 of them were before (")
    plan = json.loads((work / "plan.json").read_text())
    needs = [job["needs"] for job in plan["runs"].values()]
    assert needs == [[], [], [list(plan["runs"])[0]], [list(plan["runs"])[1]]]
    command = next(iter(plan["runs"].values()))["command"]
    assert command == f"{sys.executable} -m lib run toy --wait --gpu --timeout 86400"
    arguments = (work / "arguments").read_text()
    assert "--retries 1" in arguments and "--nolock" in arguments and "gpu" not in arguments
    assert f"--prioritize done/{list(plan['runs'])[2]} done/{list(plan['runs'])[3]}" in arguments
    assert main(["sweep", "pair", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert "pair at smoke: 4 runs, 0 to do\n4 of 4 runs are done, 4 of them were before (0 s)\n" in out


def test_failures_are_listed_with_their_reason_and_what_they_kept_from_starting(checkout, fake, capsys):
    fake({"runs/toy/default": "toy: nothing works today", "runs/toy/seed=2": "killed"}, seeds=3, code=1)
    log = checkout / "runs" / "toy" / "seed=2" / "sweep.log"
    log.parent.mkdir(parents=True)
    log.write_text("--- 2025-01-01T00:00:00Z here\nerror: an old complaint\n")
    assert main(["sweep", "pair", "--seeds", "3"]) == 1
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "failed: runs/toy/default: toy: nothing works today",
        "failed: runs/toy/seed=2: ended without a word (killed?), see runs/toy/seed=2/sweep.log",
        "not started: runs/then/base=runs_toy_default: runs/toy/default failed",
        "not started: runs/then/base=runs_toy_seed=2-seed=2: runs/toy/seed=2 failed"]
    fake(seeds=3)
    assert main(["sweep", "pair", "--seeds", "3"]) == 0
    assert "6 of 6 runs are done, 2 of them were before" in capsys.readouterr().out


def test_a_snakemake_that_fails_itself_is_quoted(checkout, fake, capsys):
    fake({one.folder: "well" for one in sweeps.load("pair")}, code=3)
    (checkout / "behaviour.json").write_text(json.dumps({"runs": {}, "results": {}, "seconds": 0, "code": 3}))
    path = checkout / "workflow" / ".venv" / "bin" / "snakemake"
    path.write_text(f"#!{sys.executable}\nprint('no such option')\nraise SystemExit(3)\n")
    assert main(["sweep", "pair"]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        "0 of 2 runs are done, 0 of them were before (1 s)", "not started: runs/toy/default",
        "not started: runs/then/base=runs_toy_default",
        "Snakemake ended with code 3: no such option (see runs/.sweeps/pair-smoke/snakemake.log)"]


def test_what_changed_is_set_aside_and_run_again(checkout, fake, capsys):
    fake()
    put(checkout, sweeps.load("pair")(0), parameters={"steps": 1})
    assert main(["sweep", "pair"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("runs/toy/default: steps 1, now 3; base None, now ''; seconds None, now 0.0; ")
    assert "set aside as runs/.set-aside/toy/default.20" in out and "2 of 2 runs are done, 0 of them were before" in out


def test_other_code_stays_and_is_said_to_unless_it_is_to_be_run_anew(checkout, fake, capsys):
    fake()
    put(checkout, sweeps.load("pair")(0))
    edit(checkout / "lib" / "runs.py", '"""A run: ', '"""The run: ')
    assert main(["sweep", "pair"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("runs/toy/default stays, though made by other code (lib/runs.py); --again runs it anew\n")
    assert "1 to do" in out
    assert main(["sweep", "pair", "--again"]) == 0
    assert "runs/toy/default: lib/runs.py; set aside as" in capsys.readouterr().out


def test_one_head_at_a_time(checkout, fake, capsys):
    fake()
    work = checkout / "runs" / ".sweeps" / "pair-smoke"
    work.mkdir(parents=True)
    with sweeping._head(work):
        assert main(["sweep", "pair"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: another process runs this sweep (") and f"process {os.getpid()})" in err
    assert main(["sweep", "pair"]) == 0


@pytest.mark.parametrize(("there", "asked", "found"), [
    (0, None, ""), (4, None, "--resources gpu=4"), (4, 2, "--resources gpu=2"), (4, 0, "--set-resources run:gpu=0")])
def test_as_many_runs_at_once_as_there_are_gpus(checkout, monkeypatch, there, asked, found):
    monkeypatch.setattr(sweeping.gpus, "visible", lambda: [f"GPU-{i}" for i in range(there)])
    options = " ".join(sweeping._options("local", 3, asked))
    assert "--cores 3" in options and (found in options if found else "gpu" not in options)
    assert "--jobs 3" in " ".join(sweeping._options("slurm", 3, asked))
    assert "gpu=4" not in " ".join(sweeping._options("slurm", None, None))           # the cluster counts its own


def test_a_profile_is_one_of_the_books_or_a_folder(checkout, tmp_path):
    (tmp_path / "config.yaml").write_text("executor: slurm\n")
    assert "--jobs" in sweeping._options(str(tmp_path), 2, None)
    with pytest.raises(runs.RunError, match="no profile 'slrum': did you mean 'slurm'.; or give a folder"):
        sweeping._options("slrum", None, None)


# ------------------------------------------------------------------------------------------------ real processes
def launched(checkout, *words):
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)   # noqa: E731   (in the background shells ignore it)
    return subprocess.Popen([sys.executable, "-m", "lib", *words], cwd=checkout, text=True, env=environment(checkout),
                            preexec_fn=heed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def until(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def gone(processes, seconds=60):
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def test_a_killed_head_takes_snakemake_along_and_an_interrupted_one_ends_it(checkout, fake):
    fake({one.folder: "well" for one in sweeps.load("pair")}, seconds=1000)
    for how, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)):
        head = launched(checkout, "sweep", "pair")
        until(lambda head=head: psutil.Process(head.pid).children(), "Snakemake")
        children = psutil.Process(head.pid).children(recursive=True)
        time.sleep(1)
        head.send_signal(how)
        out, _ = head.communicate(timeout=60)
        assert gone(children) and head.returncode == code, out
        shutil.rmtree(checkout / "runs" / "toy", ignore_errors=True)


def test_two_processes_of_one_run_make_one_result(checkout):
    first = launched(checkout, "run", "toy", "--set", "seconds=3")
    folder = checkout / "runs" / "toy" / "seconds=3.0"
    until(lambda: launch.running(folder), "the first")
    second = launched(checkout, "run", "toy", "--set", "seconds=3", "--wait")
    assert "points" in first.communicate(timeout=120)[0] and not launch.running(folder)
    said = second.communicate(timeout=120)[0].splitlines()
    assert said[0] == "another process runs in runs/toy/seconds=3.0: waiting for it"
    assert said[1].startswith("runs/toy/seconds=3.0 is complete (") and second.returncode == 0
    assert (checkout / "made").read_text() == "toy 1 \n"


def test_two_runs_at_once_have_a_gpu_each(checkout, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-1)\nGPU 1: A (UUID: GPU-2)'\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    both = [launched(checkout, "run", "toy", "--set", "seconds=5", "--seed", seed, "--gpu") for seed in "12"]
    assert all("points" in process.communicate(timeout=120)[0] for process in both)
    assert sorted(line.split()[2] for line in (checkout / "made").read_text().splitlines()) == ["GPU-1", "GPU-2"]


@pytest.fixture
def snakemake(checkout):
    """The checkout with the real Snakemake."""
    own = lib.root() / "workflow" / ".venv"
    if not (own / "bin" / "snakemake").is_file():
        pytest.skip("Snakemake is not installed: `make sweep NAME=gmm` installs it into workflow/.venv")
    (checkout / "workflow" / ".venv").symlink_to(own)
    return checkout


@pytest.mark.slow
def test_a_sweep_goes_on_after_its_worker_and_its_head_are_killed(snakemake):
    """Each of six results is made once: a worker's run is retried, the head's are waited for by the next head."""
    words = ("sweep", "pair", "--preset", "slow", "--cores", "2")
    head = launched(snakemake, *words)
    began = time.monotonic()

    def say(text):
        print(f"{time.monotonic() - began:5.1f} s  {text}")

    def workers():
        found = [p for p in psutil.Process(head.pid).children(recursive=True) if p.name().startswith("python")]
        return [p for p in found if "run" in p.cmdline() and "--wait" in p.cmdline()]
    until(lambda: len(workers()) == 2 and list(snakemake.glob("runs/*/*/notebook.ipynb")), "two workers")
    victim = workers()[0]
    say(f"kill -9 of the worker `{' '.join(victim.cmdline()[3:])}`")
    victim.kill()
    until(lambda: len(list(snakemake.glob("runs/toy/*/results.json"))) >= 1 and workers(), "a result")
    children, orphans = psutil.Process(head.pid).children(), workers()
    head.kill()
    told = head.communicate(timeout=60)[0]
    assert gone(children) and any(process.is_running() for process in orphans)
    say(f"kill -9 of the head, which had said:\n{told}")
    head = launched(snakemake, *words)
    told = head.communicate(timeout=300)[0]
    say(f"the next head:\n{told}")
    assert head.returncode == 0 and "6 of 6 runs are done" in told
    assert gone(orphans)
    results = [runs.read(path) for path in snakemake.glob("runs/*/*/results.json")]
    assert len({(one["experiment"], one["seed"]) for one in results}) == len(results) == 6
    made = (snakemake / "made").read_text().splitlines()
    assert len(made) == 6, made                                   # none made twice
    logs = "".join(path.read_text() for path in snakemake.glob("runs/*/*/sweep.log"))
    say(f"{logs.count('--- 20')} attempts made {len(made)} results")


@pytest.mark.slow
def test_a_run_that_fails_is_tried_twice_and_the_others_go_on(snakemake):
    head = launched(snakemake, "sweep", "fails")
    told = head.communicate(timeout=300)[0]
    print(told)
    assert head.returncode == 1 and "2 of 4 runs are done, 0 of them were before" in told
    where = "runs/toy/steps=13"
    assert (f"failed: {where}: toy stopped in cell [3] with ValueError: thirteen (see {where}/notebook.ipynb)\n"
            "not started: runs/then/steps=13-base=runs_toy_steps=13: runs/toy/steps=13 failed\n") in told
    assert (snakemake / where / "sweep.log").read_text().count("--- 20") == 2
    assert "thirteen" in (snakemake / where / "notebook.ipynb").read_text()
