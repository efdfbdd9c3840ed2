"""Several seeds trained together: each is what it would be alone, also when killed; each has its own folder and record.

The notebook runs in a small checkout with a copy of lib and trains two small models for real.
"""
import json
import shutil

import killed_training
import nbformat
import pytest
import torch
from safetensors.torch import load_file
from toy import taken_for_checkout, toy_checkout

import lib
from lib import evaluate, launch, replicas, runs, train
from lib.__main__ import main

NOTEBOOK = ['''\
steps: int = 12  # gradient steps
seed: int = 1  # of everything
replicas: int = 1  # seeds trained together
forget: bool = False  # to save the added ones
resume: str = ""  # go on from
''', '''\
import os, signal
import torch
from lib import evaluate, runs, train
runs._glue = lambda values: values and print("glued", values)         # slow to import, and another test's matter
runs.device_info = lambda name: {"kind": "cpu", "name": "toy", "threads": 1}
torch.set_num_threads(1)
run = runs.start("toy", globals())
with open(run.folder / "attempts", "a") as file:
    print(resume or "afresh", replicas, file=file)
attempts = len((run.folder / "attempts").read_text().splitlines())
taken = [0]

def replica(one):
    model, noise = torch.nn.Linear(2, 1), train.generator(one.parameters["seed"])
    with torch.no_grad():
        model.weight.normal_(generator=noise), model.bias.zero_()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    def step(x):
        if os.environ.get("DIE") and attempts == 1 and taken[0] == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        taken[0] += 1
        optimizer.zero_grad()
        loss = (model(x + torch.randn(x.shape, generator=noise)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss}
    data = torch.arange(20.0).view(10, 2) / 20
    return {"step": step, "batches": train.Shuffled(data, 4, one.parameters["seed"]), "folder": one.folder,
            "state": {"model": model, "optimizer": optimizer, "noise": noise},
            "config": {"seed": one.parameters["seed"]}}
''', '''\
found = run.replicas(replicas)
histories = train.fit_together([replica(one) for one in found], steps=steps, log_every=3, checkpoint_every=4,
                               resume=resume)
for one, history in reversed(list(zip(found, histories))):
    if one is run or not forget:
        one.save({"loss": evaluate.exact(history["loss"][-1], "nats")}, history=history)
''']


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """lib and the notebook in a checkout of their own."""
    folder = tmp_path_factory.mktemp("template")
    presets = "toy:\n  paper: {steps: 12, replicas: 5}\n  few: {steps: 6, seed: 5}\n"
    return toy_checkout(folder, NOTEBOOK, presets, without=["__pycache__"])


@pytest.fixture
def checkout(template, tmp_path, monkeypatch):
    """A fresh copy that this process and its kernels take for the checkout."""
    folder = shutil.copytree(template, tmp_path / "checkout")
    return taken_for_checkout(folder, monkeypatch)


def record(folder):
    return json.loads((folder / "results.json").read_text())


def begin(**values):
    """A run of the notebook begun by hand."""
    return runs.start("toy", {"replicas": 3} | values)


SCORE = {"score": evaluate.exact(1.0, "nats")}


# ------------------------------------------------------------------------------------------------ training together
def test_each_of_several_models_trained_together_is_as_trained_alone_also_if_killed(tmp_path):
    told = killed_training.run_killed("replicas", tmp_path / "killed")
    histories = killed_training.fit("replicas", tmp_path / "whole")
    for i, history in enumerate(histories):
        alone = killed_training.replica("vae", 3 + 10 * i, tmp_path / "alone" / str(i))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        single = train.fit(**alone, steps=killed_training.STEPS, log_every=4, checkpoint_every=6)
        torch.set_num_threads(threads)
        assert history == single and len(history["loss"]) == killed_training.STEPS / 4
        for folder in ("killed", "whole"):
            killed_training.assert_equal(tmp_path / folder / str(i), tmp_path / "alone" / str(i), told)
    assert histories[0] != histories[1]


def model(seed, folder=None, poison=None, calls=None):
    """The arguments of `fit` for a straight line; its loss is `poison` at the seventh step."""
    weight = torch.nn.Linear(1, 1)
    with torch.no_grad():
        weight.weight.normal_(generator=train.generator(seed))
        weight.bias.zero_()
    optimizer, taken = torch.optim.SGD(weight.parameters(), 0.1), [0]

    def step(x):
        taken[0] += 1
        if calls is not None:
            calls.append(seed)
        optimizer.zero_grad()
        loss = (weight(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss * poison if poison and taken[0] == 7 else loss}
    return {"step": step, "batches": train.Shuffled(torch.ones(8, 1), 4, seed), "config": {"seed": seed},
            "state": {"model": weight, "optimizer": optimizer}, "folder": folder, "title": f"seed {seed}"}


def test_replicas_take_turns_replay_by_replay():
    calls = []
    train.fit_together([model(1, calls=calls), model(2, calls=calls)], steps=14, log_every=10, steps_per_replay=5)
    singly = [1, 2] * 5
    assert calls == singly + ([1] * 5 + [2] * 5) + [1, 2] * 4


def test_replicas_that_stand_at_different_steps_go_on_together(tmp_path):
    """After a kill between two checkpoints; one may also be done already."""
    def together(name, **options):
        return train.fit_together([model(seed, tmp_path / name / str(seed)) for seed in (1, 2, 3)], log_every=3,
                                  checkpoint_every=4, resume="auto", **options)
    for seed, steps in ((1, 8), (2, 3), (3, 14)):
        train.fit(**model(seed, tmp_path / "part" / str(seed)), steps=steps, log_every=3, checkpoint_every=4)
    histories = together("whole", steps=14)
    assert together("part", steps=14) == histories == together("whole", steps=14) and histories[0] != histories[1]
    for seed in "123":
        a, b = (killed_training.meta(tmp_path / name / seed) for name in ("part", "whole"))
        assert (a["step"], a["history"], a["window"]) == (b["step"], b["history"], b["window"]) and a["step"] == 14


def test_one_replica_that_fails_is_named_with_its_last_good_checkpoint(tmp_path):
    replicas = [model(1, tmp_path / "1"), model(2, tmp_path / "2", poison=float("nan"))]
    told = r"seed 2: loss became nan at step 7; the last good checkpoint is .*2/latest.safetensors \(step 4\)"
    with pytest.raises(train.TrainError, match=told):
        train.fit_together(replicas, steps=20, log_every=4, checkpoint_every=4)


def test_replicas_share_nothing_that_changes_and_no_checkpoint(tmp_path):
    data = torch.ones(8, 1)
    one, two = model(1), model(2)
    for shared in ({"state": one["state"]}, {"batches": one["batches"]},
                   {"state": two["state"] | {"optimizer": one["state"]["optimizer"]}}):
        with pytest.raises(train.TrainError, match="two replicas share a part of their state, their batches or"):
            train.fit_together([one, two | shared], steps=1)
    with pytest.raises(train.TrainError, match="or their folder: give each its own"):
        train.fit_together([model(1, tmp_path), model(2, tmp_path)], steps=1)
    with pytest.raises(train.TrainError, match="is one checkpoint, but 2 replicas are to be trained: use auto"):
        train.fit_together([one, two], steps=1, resume="runs/x")
    with pytest.raises(train.TrainError, match="nothing to train"):
        train.fit_together([], steps=1)
    fine = [one | {"batches": train.Whole(data)}, two | {"batches": train.Whole(data)}]       # the data may be shared
    assert [history["step"] for history in train.fit_together(fine, steps=1)] == [[1], [1]]


# ------------------------------------------------------------------------------------------------ runs
def test_how_many_are_trained_together_is_no_part_of_a_runs_identity(checkout):
    one, three = (runs.check("toy", {"steps": 5, "replicas": n}) for n in (1, 3))
    for of in (runs.name_of, runs.command_of):
        assert of("toy", "paper", one) == of("toy", "paper", three)
    assert runs.reduced("toy", three) == ["steps 5 instead of 12"]


def test_each_seed_has_the_name_folder_command_and_parameters_of_a_run_of_its_own(checkout, monkeypatch):
    monkeypatch.setenv("VAEBOOK_PRESET", "few")
    first = begin(steps=6, seed=4)
    found = first.replicas(3)
    assert found[0] is first and [one.name for one in found] == ["few-seed=4", "few", "few-seed=6"]
    assert [one.folder for one in found] == [checkout / "runs" / "toy" / one.name for one in found]
    for seed, one in enumerate(found, 4):
        alone = runs.check("toy", {"steps": 6, "seed": seed, "replicas": 3})
        assert one.parameters == alone and one.name == runs.name_of("toy", "few", alone)
        written = one.save(SCORE, history={"loss": [float(seed)]})
        assert written["command"] == "python -m lib run toy --preset few" + (f" --seed {seed}" if seed != 5 else "")
        assert record(one.folder) == written and written["seed"] == seed and written["run"] == one.name
    assert len({id(one.figures) for one in found}) == 3
    assert runs.table([record(one.folder) for one in found], ["score"], ["steps"])["seeds"].tolist() == [3]


def test_added_runs_are_saved_at_once_and_not_glued(checkout, monkeypatch):
    glued = []
    monkeypatch.setattr(runs, "_glue", lambda values: glued.append(values))
    monkeypatch.setenv("VAEBOOK_RUN", str(checkout / "elsewhere" / "mine"))
    first, second = begin().replicas(2)
    assert second.folder == checkout / "elsewhere" / "seed=2"
    for one in (second, first):
        one.save(SCORE)
    assert [path.name for path in second.folder.iterdir()] == ["results.json"]
    assert [path.name for path in first.folder.iterdir()] == ["results.json.pending"]
    assert glued == [{}, {"score": 1.0}]


def test_a_complete_run_is_never_overwritten_by_a_replica(checkout, capsys):
    begin(seed=2).save(SCORE)
    before = (checkout / "runs" / "toy" / "seed=2" / "results.json").read_bytes()
    assert [one.parameters["seed"] for one in begin().replicas(3)] == [1, 3]
    assert capsys.readouterr().out == "seed 2 is left out: seed=2 is complete\n"
    assert (checkout / "runs" / "toy" / "seed=2" / "results.json").read_bytes() == before
    changed = record(checkout / "runs" / "toy" / "seed=2") | {"parameters": {"steps": 99, "seed": 2}}
    (checkout / "runs" / "toy" / "seed=2" / "results.json").write_text(json.dumps(changed))
    with pytest.raises(runs.RunError, match="runs/toy/seed=2 holds a complete run with steps 99, now 12"):
        begin().replicas(3)


@pytest.mark.parametrize("n", [0, -1])
def test_fewer_than_one_replica_is_refused(checkout, n):
    with pytest.raises(runs.RunError, match=f"replicas must be at least 1 .*, got {n} for toy"):
        begin().replicas(n)


def test_replicas_without_a_seed_are_refused():
    with pytest.raises(runs.RunError, match="need a parameter `seed`, got 2 for toy"):
        replicas.seeds("toy", "", {"replicas": 2}, lib.root())


# ------------------------------------------------------------------------------------------------ python -m lib run
WORDS = ["run", "toy", "--set", "replicas=3"]


def test_replicas_are_run_killed_resumed_and_completed_by_one_command(checkout, capfd, monkeypatch):
    """The kernel dies once in the middle; nothing of that can be seen in the results."""
    folders = [checkout / "runs" / "toy" / name for name in ("default", "seed=2", "seed=3")]
    monkeypatch.setenv("DIE", "once")
    assert main(WORDS) == 0
    out, err = capfd.readouterr()
    assert "the kernel died" in err
    assert [line.split(": loss ")[0] for line in out.splitlines()] == [str(f.relative_to(checkout)) for f in folders]
    assert (folders[0] / "attempts").read_text() == "auto 3\nauto 3\n"
    for seed, folder in enumerate(folders, 1):
        found = record(folder)
        assert found["seed"] == seed and found["parameters"]["replicas"] == 3 and len(found["history"]["loss"]) == 4
        assert [part["steps"] for part in found["made_by"]] == [[0, 4], [4, 12]]
        assert not list(folder.glob("*.pending"))
    outputs = [output for cell in nbformat.read(folders[0] / "notebook.ipynb", 4).cells for output in cell.outputs]
    assert [output.text for output in outputs] == [f"glued {{'loss': {record(folders[0])['history']['loss'][-1]}}}\n"]

    shutil.move(folders[2], checkout / "replica")                  # trained alone, the third is what it was
    assert main(WORDS) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [" is complete" in line for line in lines] == [True, True, False]
    alone, replica = record(folders[2]), record(checkout / "replica")
    assert (folders[2] / "attempts").read_text() == "auto 1\n" and alone["parameters"]["replicas"] == 1
    assert alone["history"] == replica["history"] and alone["command"] == "python -m lib run toy --seed 3"
    one, other = (load_file(folder / "latest.safetensors") for folder in (folders[2], checkout / "replica"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    assert main(WORDS) == 0 and capfd.readouterr().out.count("--again repeats it") == 3
    assert main([*WORDS, "--again"]) == 0
    assert [record(folder)["made_by"][0]["steps"] for folder in folders] == [[0, 12]] * 3


def test_a_notebook_that_saves_only_the_first_of_its_replicas_is_told_so(checkout, capfd):
    assert main([*WORDS, "--set", "forget=true", "--set", "steps=1"]) == 1
    told = "error: toy ended without run.save(): no result in runs/toy/steps=1-seed=2-forget=True\n"
    assert capfd.readouterr().err == told
    assert not (checkout / "runs" / "toy" / "steps=1-forget=True" / "results.json").exists()


def test_a_replica_that_another_process_trains_is_left_to_it(checkout, capfd):
    (checkout / "runs" / "toy" / "seed=2").mkdir(parents=True)
    with launch._lock(checkout / "runs" / "toy" / "seed=2"):
        assert main(WORDS) == 1
    assert "another process runs in runs/toy/seed=2" in capfd.readouterr().err
