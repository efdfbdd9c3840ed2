"""Sweeps: what their configurations are, and the state of each run on the disk."""
import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from fresh_clone import git
from safetensors.torch import save
from small_sweep import commit, edit, put, sweep_checkout

from lib import launch, locks, root, runs, scoreboard, sweeping, sweeps
from lib.__main__ import main

# ------------------------------------------------------------------------------------------------ the book's own
SIZES = {("semantic-hashing", "smoke"): 36, ("semantic-hashing", "paper"): 36 * 3,
         ("symmetric-learning", "cpu"): 6 * 3, ("symmetric-learning", "smoke"): 4,
         ("vampprior", "paper"): 8, ("vampprior", "smoke"): 4,
         ("vampprior-likelihood", "paper"): (12 + 6 + 4 + 3) * 3, ("autoencoders", "cpu"): 5 * 3,
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


def test_every_published_number_is_made_by_a_run_of_some_sweep_at_its_size():
    made = [one for name in sweeps.definitions() if name != "disentanglement" for one in sweeps.load(name, "paper")]
    for row in scoreboard.flatten(scoreboard.load()):
        known = [one.values for one in made if one.experiment == row["experiment"]]
        fits = [all(str(values.get(key, text)) in (text, f"{text}.0") for key, text in row["where"].items())
                for values in known]
        assert any(fits) or row["wildcards"].get("model") == "pixelhvae", row["key"]      # listed, not built


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
@pytest.fixture
def checkout(tmp_path, monkeypatch):
    return sweep_checkout(tmp_path / "checkout", monkeypatch)


def kinds(name="pair", preset="smoke", seeds=None, **options):
    return [state.kind for state in sweeps.states(sweeps.load(name, preset, seeds), **options)]


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(("runs_of_it", "said"), [
    ("[{run: toy, grid: {stesp: [1]}}]", "sweep bad: toy has no parameter 'stesp': did you mean 'steps'?"),
    ("[{run: toy, set: {steps: many}}]", "sweep bad: parameter steps must be int, got 'many' (str)"),
    ("[{run: toyy}]", "sweep bad: no notebook 'toyy': did you mean 'toy'?"),
    ("[{run: toy, grdi: {}}]", "sweep bad: the part of toy has 'grdi': did you mean 'grid'?"),
    ("[{run: toy, grid: {steps: 3}}]", "sweep bad: `grid` of toy: steps needs a list of values, got 3"),
    ("[{run: toy, grid: [3]}]", "sweep bad: `grid` of toy must name parameters, got [3]"),
    ("[{run: toy, seeds: 0}]", "sweep bad: `seeds` of toy must be a whole number from 1, got 0"),
    ("[{run: toy, set: {resume: auto}}]",
     "sweep bad: `set` of toy has resume, which tells no runs apart: leave it out"),
    ("[{run: toy, grid: {resume: [a, b]}}]", "sweep bad: `grid` of toy has resume, which tells no runs apart"),
    ("[{run: then, grid: {base: [a/b c, a_b_c]}}]", "sweep bad: runs/then/base=a_b_c would be the folder of two runs, "
     "python -m lib run then --set 'base=a/b c' and python -m lib run then --set base=a_b_c"),
    ("[{run: toy}, {run: then, after: {base: [toy]}}]", "sweep bad: then is after ['toy'], which is no earlier part"),
    ("[]", "notebooks/presets.yml: sweep bad needs `runs`, and `seeds` from 1 if it has any"),
    ("[{run: toy}], seeds: 0", "notebooks/presets.yml: sweep bad needs `runs`, and `seeds` from 1 if it has any"),
    ("[{run: toy}], seeds: '3'", "notebooks/presets.yml: sweep bad needs `runs`, and `seeds` from 1 if it has any"),
    ("[{run: toy}], seeds: null", "notebooks/presets.yml: sweep bad needs `runs`, and `seeds` from 1 if it has any"),
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
    ([], "name a sweep: pair, grid, alone, fails (--list shows their sizes)"),
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


def test_make_quotes_what_it_passes_on_and_takes_0_for_no():
    def said(*words):
        told = subprocess.run(["make", "--no-print-directory", "-n", "sweep", *words], cwd=root(), capture_output=True,
                              text=True).stdout
        return " ".join(told[told.index("-m lib sweep"):].replace("\\\n", " ").split())
    assert said("NAME=gmm", "PROFILE=my own/profile", "DRY=0", "AGAIN=0", "GPUS=0", "TIMEOUT=9") == (
        "-m lib sweep 'gmm' --preset 'smoke' --profile 'my own/profile' --gpus '0' --timeout '9'")
    assert said("NAME=gmm", "DRY=1", "AGAIN=1").endswith("--again --dry-run") and "--list" in said()


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


def test_a_checkpoint_of_other_code_goes_on_and_says_so(checkout):
    one = sweeps.load("pair")(0)
    now = {"commit": git(checkout, "rev-parse", "HEAD").strip(), "dirty": False}
    for parts, said in (([], "goes on from its checkpoint"), ([now], "goes on from its checkpoint"),
                        ([now, now | {"dirty": True}],
                         "goes on from its checkpoint, which is of other code: uncommitted changes")):
        begun(checkout, one, one.values)
        meta = {"meta": json.dumps({"made_by": parts})}
        (checkout / one.folder / "latest.safetensors").write_bytes(save({"weight": torch.zeros(1)}, meta))
        assert sweeps.states(sweeps.load("pair"))[0] == sweeps.State("to do", said)
    assert sweeps.states(sweeps.load("pair"), again=True)[0] == sweeps.State("changed", "uncommitted changes")


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


def test_a_folder_is_set_aside_only_while_its_lock_is_held(checkout, monkeypatch):
    one, rename, held = sweeps.load("pair")(0), Path.rename, []
    put(checkout, one)
    monkeypatch.setattr(Path, "rename", lambda path, to: (held.append(launch.running(path)), rename(path, to))[1])
    sweeps.set_aside(one)
    assert held == [True]


def test_who_waited_for_a_folder_that_is_set_aside_works_in_the_new_one(checkout, monkeypatch):
    monkeypatch.setattr(locks, "KERNEL_ENDS", 0)
    one, inside, end = sweeps.load("pair")(0), threading.Event(), threading.Event()
    put(checkout, one)
    folder = checkout / one.folder

    def wait():
        with launch._lock(folder, wait=True):
            inside.set()
            end.wait(60)
    waiting = threading.Thread(target=wait)
    with launch._lock(folder):
        waiting.start()
        assert not inside.wait(1.5)                                   # it has opened the lock that is moved now
        folder.rename(checkout / "elsewhere")
    try:
        assert inside.wait(60)
        assert launch.running(folder) and not launch.running(checkout / "elsewhere")
    finally:
        end.set()
        waiting.join()
