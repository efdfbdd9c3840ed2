"""Early stopping and the best checkpoint: a resumed run stops where an uninterrupted one does, and keeps the best.

The values that decide are scripted: a model that counts its steps looks its validation loss up.
"""
import os

import pytest
import recorded_graph
import torch
from killed_training import meta
from safetensors.torch import load_file
from tqdm import tqdm

from lib import checkpoint, train

SCRIPT = (5, 4, 3, 3.5, 2, 2.5, 2, 3, 1, 0)              # lowest at the 5th point; three points later patience ends
EVERY, BEST, END = 4, 20, 32                              # steps of a point, of the best one, of the end
OPTIONS = {"steps": 40, "log_every": EVERY, "checkpoint_every": EVERY}
device = recorded_graph.device
replays = recorded_graph.replays


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The hundreds of trainings here wait neither for the disk nor for git."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(train, "git_state", dict)


class Killed(BaseException):
    """The end of a process, as far as its files are concerned."""


def patience(points, metric="val"):
    """Stop once the lowest value is so many points ago."""
    def stop(history):
        values = history[metric]
        return len(values) - 1 - values.index(min(values)) >= points
    return stop


class Scripted(torch.nn.Module):
    """A straight line with dropout that counts its steps."""

    def __init__(self, seed):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, generator=train.generator(seed, use="weights")))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))


def replica(folder=None, seed=1, script=SCRIPT, device="cpu", die_at=None, **options):
    """The arguments of `fit`, with "weights": {step: the weight then}, of which `fit` knows nothing."""
    model, noise = Scripted(seed).to(device), train.generator(seed, device)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    values, weights, called = torch.tensor(script, dtype=torch.float, device=device), {}, [0]

    def step(x):
        if die_at is not None and called[0] == die_at:
            raise Killed
        called[0] += 1
        optimizer.zero_grad()
        loss = (model.weight * (x + torch.randn(x.shape, generator=noise, device=device)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        model.steps += 1
        return {"loss": loss, "norm": model.weight.square().sum()}

    def look():
        weights[model.steps.item()] = model.weight.detach().clone()
        return {"val": values[model.steps // EVERY - 1], "noise": torch.rand((), generator=noise, device=device)}

    data = torch.randn(14, 3, generator=train.generator(0)).to(device)
    return {"step": step, "batches": train.Shuffled(data, 4, seed), "folder": folder, "look": look, "config": {},
            "state": {"model": model, "optimizer": optimizer, "noise": noise}, "title": f"seed {seed}",
            "stop": patience(3), "best_by": "val"} | options, weights


def fit(*arguments, fit_options=None, **options):
    """(history, replica, weights) of `fit` with OPTIONS."""
    one, weights = replica(*arguments, **options)
    return train.fit(**one, **OPTIONS | (fit_options or {})), one, weights


def assert_same(folder, other, told=""):
    """Both checkpoints of two folders hold the same, to the bit."""
    for name in ("latest", "best"):
        a, b = (load_file(each / f"{name}.safetensors") for each in (folder, other))
        assert a.keys() == b.keys() and len(b) == 4, told
        assert not [key for key in b if not torch.equal(a[key], b[key])], told
        for key in ("step", "history", "window", "best"):
            assert meta(folder, name)[key] == meta(other, name)[key], f"{key} {told}"


# ------------------------------------------------------------------------------------------------ the stop
def test_a_rule_of_patience_stops_at_its_step_with_a_checkpoint_and_leaves_the_best_weights(tmp_path):
    history, one, weights = fit(tmp_path)
    assert history["step"] == list(range(EVERY, END + 1, EVERY)) and history["val"] == list(SCRIPT[:8])
    assert meta(tmp_path)["history"] == history and meta(tmp_path)["step"] == END == one["state"]["model"].steps
    assert torch.equal(load_file(tmp_path / "latest.safetensors")["model/weight"], weights[END])
    best = load_file(tmp_path / "best.safetensors")["model/weight"]
    assert meta(tmp_path, "best")["step"] == BEST and meta(tmp_path)["best"] == 2
    assert torch.equal(best, weights[BEST]) and not torch.equal(best, weights[28])      # as low, but later
    never, _, _ = fit(stop=None)
    assert never["step"][-1] == 40 and {name: values[:8] for name, values in never.items()} == history


def test_the_stop_is_asked_at_every_point_but_one_of_a_shorter_windows_end_and_saves_between_checkpoints(tmp_path):
    asked = []

    def stop(history):
        asked.append(list(history["step"]))
        return len(asked) == 3
    fit(tmp_path, stop=stop, fit_options={"checkpoint_every": 1000})
    assert asked == [[4], [4, 8], [4, 8, 12]] and meta(tmp_path)["step"] == 12
    assert meta(tmp_path, "best")["step"] == 12                          # the only checkpoint
    asked.clear()
    assert fit(stop=stop, fit_options={"steps": 6})[0]["step"] == [4, 6] and asked == [[4]]


def test_a_stop_needs_no_look():
    history, one, _ = fit(look=None, best_by="loss", stop=lambda history: history["loss"][-1] < history["loss"][0])
    last = next(i for i, loss in enumerate(history["loss"]) if loss < history["loss"][0])
    assert history["step"][-1] == one["state"]["model"].steps == EVERY * (last + 1) < OPTIONS["steps"]
    assert history.keys() == {"step", "loss", "norm"}


def test_a_stop_at_the_last_step_is_an_end_like_any_other(tmp_path):
    history, _, _ = fit(tmp_path / "stopped", fit_options={"steps": END})
    assert history == fit(tmp_path / "ended", stop=None, fit_options={"steps": END})[0]
    assert_same(tmp_path / "stopped", tmp_path / "ended")
    assert fit(tmp_path / "stopped", fit_options={"resume": "latest"})[0] == history
    assert len(fit(tmp_path / "stopped", stop=None, fit_options={"resume": "latest"})[0]["step"]) == 10


# ------------------------------------------------------------------------------------------------ resuming
@pytest.mark.parametrize("intervals", [{}, {"checkpoint_every": 6}], ids=["at points", "between points"])
def test_a_run_killed_at_any_step_or_write_stops_as_an_uninterrupted_one(intervals, tmp_path, monkeypatch):
    options = {"fit_options": {"resume": "auto"} | intervals}
    whole, _, _ = fit(tmp_path / "whole", **options)
    assert whole["step"][-1] == END

    def resumed(name, told):
        assert fit(tmp_path / name, **options)[0] == whole, told
        assert_same(tmp_path / name, tmp_path / "whole", told)

    for step in range(END):
        with pytest.raises(Killed):
            fit(tmp_path / f"step {step}", die_at=step, **options)
        resumed(f"step {step}", f"killed at step {step}")
    writes = 0
    while True:
        writes, left = writes + 1, [writes + 1]
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_atomic", dying(left))
            try:
                fit(tmp_path / f"write {writes}", **options)
                break
            except Killed:
                pass
        resumed(f"write {writes}", f"killed at write {writes}")
    assert writes > 8                                                    # both files of some checkpoints


def dying(left):
    """As write_atomic, but the process is killed instead of write number left[0]."""
    def write(path, content):
        left[0] -= 1
        if not left[0]:
            raise Killed
        write_atomic(path, content)
    write_atomic = checkpoint.write_atomic
    return write


def test_a_run_killed_again_and_again_stops_as_an_uninterrupted_one(tmp_path):
    fit(tmp_path / "whole")
    for steps in (5, 1, 7, 4, 9, 3, 6):
        with pytest.raises(Killed):
            fit(tmp_path / "killed", die_at=steps, fit_options={"resume": "auto"})
    fit(tmp_path / "killed", fit_options={"resume": "auto"})
    assert_same(tmp_path / "killed", tmp_path / "whole")
    assert len(meta(tmp_path / "killed")["made_by"]) > 3


@pytest.mark.parametrize("end", [3, 10, BEST, 30])
def test_a_longer_run_stops_as_if_it_had_not_been_a_shorter_one(end, tmp_path):
    short, _, _ = fit(tmp_path / "longer", fit_options={"steps": end})
    assert short["step"][-1] == end
    fit(tmp_path / "longer", fit_options={"resume": "latest"})
    fit(tmp_path / "whole")
    assert_same(tmp_path / "longer", tmp_path / "whole")


@pytest.mark.parametrize("steps", [40, 1000])
def test_a_run_that_has_stopped_trains_no_further(steps, tmp_path):
    history, _, _ = fit(tmp_path)
    before = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("latest", "best")]
    again, one, weights = fit(tmp_path, die_at=0, fit_options={"resume": "latest", "steps": steps})
    assert again == history and one["state"]["model"].steps == END and not weights      # not even looked at
    assert [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("latest", "best")] == before
    assert fit(tmp_path, fit_options={"resume": "best"})[0] == history                  # from its step on once more


def test_more_patience_goes_on_from_the_stop(tmp_path):
    fit(tmp_path / "longer")
    fit(tmp_path / "longer", stop=patience(4), fit_options={"resume": "latest"})
    history, _, weights = fit(tmp_path / "whole", stop=patience(4))
    assert_same(tmp_path / "longer", tmp_path / "whole")
    best = load_file(tmp_path / "longer" / "best.safetensors")["model/weight"]
    assert history["step"][-1] == 40 and torch.equal(best, weights[40])


# ------------------------------------------------------------------------------------------------ the best checkpoint
@pytest.mark.parametrize("metric", ["val", "loss", "norm", "noise"])
def test_the_best_checkpoint_is_the_point_with_the_lowest_value(metric, tmp_path):
    history, _, weights = fit(tmp_path, stop=None, best_by=metric)
    at = history["step"][history[metric].index(min(history[metric]))]
    found = meta(tmp_path, "best")
    assert found["step"] == at and found["best"] == meta(tmp_path)["best"] == min(history[metric])
    assert torch.equal(load_file(tmp_path / "best.safetensors")["model/weight"], weights[at])


def test_the_best_checkpoint_is_by_default_that_of_the_loss(tmp_path):
    one, _ = replica(tmp_path)
    del one["best_by"]
    history = train.fit(**one, **OPTIONS)
    found = meta(tmp_path, "best")
    assert found["best"] == min(history["loss"]) == found["history"]["loss"][-1] and found["step"] != BEST


def test_a_best_one_ahead_of_the_latest_is_not_replaced_by_a_worse_one(tmp_path, monkeypatch):
    """Killed between the two writes, resumed to other values, as of kernels that are not deterministic."""
    one, weights = replica(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "write_atomic", dying([9]))            # 5, 4, 3: both files; 3.5: one; 2: the best
        train.fit(**one, **OPTIONS)
    assert meta(tmp_path, "best")["step"] == BEST and meta(tmp_path)["step"] == BEST - EVERY
    fit(tmp_path, script=(*SCRIPT[:4], 2.5, 2.5, 2.25, 2.25, 2.25, 2.25), stop=None,
        fit_options={"resume": "latest"})
    assert meta(tmp_path)["step"] == 40 and meta(tmp_path, "best")["step"] == BEST
    assert torch.equal(load_file(tmp_path / "best.safetensors")["model/weight"], weights[BEST])


def test_a_run_that_goes_on_in_another_folder_takes_its_best_along(tmp_path):
    fit(tmp_path / "one")
    fit(tmp_path / "two", fit_options={"resume": str(tmp_path / "one")})
    assert_same(tmp_path / "two", tmp_path / "one")
    fit(tmp_path / "short", fit_options={"steps": 24})
    fit(tmp_path / "long", fit_options={"resume": str(tmp_path / "short" / "latest.safetensors")})
    assert_same(tmp_path / "long", tmp_path / "one")


def test_a_best_of_another_training_is_not_taken_along(tmp_path):
    fit(tmp_path / "one", fit_options={"steps": 24})
    fit(tmp_path / "two", seed=2, script=(0,) * 10)
    (tmp_path / "one" / "best.safetensors").write_bytes((tmp_path / "two" / "best.safetensors").read_bytes())
    _, _, weights = fit(tmp_path / "three", fit_options={"resume": str(tmp_path / "one")})
    found = load_file(tmp_path / "three" / "best.safetensors")["model/weight"]
    assert meta(tmp_path / "three", "best")["step"] == 28 and torch.equal(found, weights[28])   # the lowest from there


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"rubbish")])
def test_a_best_checkpoint_that_is_gone_is_the_next(spoil, tmp_path):
    fit(tmp_path, fit_options={"steps": 24})
    spoil(tmp_path / "best.safetensors")
    fit(tmp_path, fit_options={"resume": "latest"})
    assert meta(tmp_path, "best")["step"] == 28


@pytest.mark.parametrize(("before", "after"), [("loss", "val"), ("val", "loss"), ("norm", "loss")])
def test_another_metric_judges_the_best_checkpoint_anew(before, after, tmp_path):
    """What the next has to get below is its value in that metric, not the hundreds or ones of the one before."""
    script = [100 + value for value in SCRIPT]
    fit(tmp_path, script=script, best_by=before, stop=None, fit_options={"steps": BEST})
    kept = meta(tmp_path, "best")["step"]
    history, _, _ = fit(tmp_path, script=script, best_by=after, stop=None, fit_options={"resume": "latest"})
    values = {step: value for step, value in zip(history["step"], history[after], strict=True)
              if step == kept or step > BEST}
    assert meta(tmp_path, "best")["step"] == min(values, key=values.get)
    assert meta(tmp_path)["best"] == min(values.values())


def test_a_best_by_that_is_no_metric_is_refused_with_the_nearest():
    for look, told in (({}, r"seed 1 has no metric 'vall' to choose the best checkpoint by: did you mean 'val'\?"),
                       ({"look": None}, "'vall' to choose the best checkpoint by; it has loss, norm")):
        with pytest.raises(train.TrainError, match=told):
            fit(best_by="vall", **look)


# ------------------------------------------------------------------------------------------------ several, replays, bar
def pair(folder, first, second, **options):
    """Two replicas with their rules trained together; (histories, replicas)."""
    found = [replica(folder / str(seed), seed, stop=stop)[0] for seed, stop in ((1, first), (2, second))]
    return train.fit_together(found, **OPTIONS | options), found


def alone(folder, seed, stop):
    return fit(folder, seed, stop=stop)[0]


@pytest.mark.parametrize("rules", [(3, 99), (99, 3), (3, 1), (3, 3)])
def test_a_replica_that_stops_leaves_the_others_as_trained_alone(rules, tmp_path):
    histories, _ = pair(tmp_path / "pair", *map(patience, rules))
    for seed, points, history in zip((1, 2), rules, histories, strict=True):
        assert history == alone(tmp_path / str(seed), seed, patience(points))
        assert history["step"][-1] == {1: 16, 3: END, 99: 40}[points]
        assert_same(tmp_path / "pair" / str(seed), tmp_path / str(seed))


def test_replicas_of_which_one_has_stopped_go_on_after_a_kill(tmp_path):
    alone(tmp_path / "pair" / "1", 1, patience(1))
    fit(tmp_path / "pair" / "2", 2, stop=patience(3), fit_options={"steps": 10})
    histories, found = pair(tmp_path / "pair", patience(1), patience(3), resume="auto")
    assert [history["step"][-1] for history in histories] == [16, END]
    assert [one["state"]["model"].steps.item() for one in found] == [16, END]
    for seed, points in ((1, 1), (2, 3)):
        alone(tmp_path / str(seed), seed, patience(points))
        assert_same(tmp_path / "pair" / str(seed), tmp_path / str(seed))


def test_replayed_steps_stop_where_eager_ones_do(device, tmp_path, replays):
    graph, one, _ = fit(tmp_path / "graph", device=device, fit_options={"steps_per_replay": 4})
    assert len(replays) == (END - 4) / 4 and one["state"]["model"].steps == END
    eager, _, _ = fit(tmp_path / "eager", device=device, fit_options={"graph": False})
    assert graph == eager and len(replays) == (END - 4) / 4
    assert_same(tmp_path / "graph", tmp_path / "eager")
    fit(tmp_path / "resumed", device=device, fit_options={"steps": 18})
    fit(tmp_path / "resumed", device=device, fit_options={"resume": "latest"})
    assert_same(tmp_path / "resumed", tmp_path / "eager")


def test_the_bar_is_full_at_the_end(tmp_path, monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            bars.append(self)
    monkeypatch.setattr(train, "interactive", lambda: True)
    monkeypatch.setattr(train, "tqdm", Bar)
    pair(tmp_path, patience(1), patience(3))
    for _ in range(2):                                                   # the second time nothing is left to do
        pair(tmp_path, patience(1), patience(99), resume="latest")
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(0, 48, 48), (48, 56, 56), (56, 56, 56)]
