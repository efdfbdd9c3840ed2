"""The training loop: exact resume after SIGKILL, stops on NaN, refuses what does not fit."""
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import killed_training
from killed_training import meta

from lib import checkpoint, train


class Line(torch.nn.Module):
    """y = w x, fitted by SGD to y = 3 x: small enough to follow by hand."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))


def line(steps=20, spoil=None, config=None, **options):
    """Fit a Line; `spoil(t, model)` may break something before step t."""
    model, count = Line(), [0]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(x):
        if spoil:
            spoil(count[0], model)
        count[0] += 1
        optimizer.zero_grad()
        loss = ((model.w - 3) * x).square().mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    options = {"log_every": 2, "checkpoint_every": 4} | options
    history = train.fit(step, train.Shuffled(torch.ones(8), 4, seed=0), steps=steps,
                        state={"model": model, "optimizer": optimizer}, config=config or {}, **options)
    return history, model


@pytest.mark.parametrize("kind", ["vae", "aae", "symmetric", "vamp"])
def test_a_run_killed_at_random_and_resumed_is_bit_equal_to_an_uninterrupted_one(kind, tmp_path):
    """It resumes in the middle of a log window too: checkpoints are 6 steps apart, log points 4."""
    told = killed_training.run_killed(kind, tmp_path / "killed")
    history, = killed_training.fit(kind, tmp_path / "whole")
    killed_training.assert_equal(tmp_path / "killed" / "0", tmp_path / "whole" / "0", told)
    assert meta(tmp_path / "whole" / "0")["history"] == history
    assert history["step"] == list(range(4, killed_training.STEPS + 1, 4))
    parts = [entry["steps"] for entry in train.made_by(tmp_path / "killed")]          # one process after the other
    assert parts[0][0] == 0 and parts[-1][1] == killed_training.STEPS and len(parts) > 1
    assert [last for _, last in parts[:-1]] == [first for first, _ in parts[1:]]


def test_a_checkpoint_without_the_noise_would_not_resume_exactly(tmp_path):
    """The bit-equality above is no formality: forgetting one part of the state breaks it."""
    killed_training.fit("vae", tmp_path, stop=30)
    ends = []
    for forget in ((), ("generator",), ("optimizer",)):
        one = killed_training.replica("vae", 3, tmp_path / "0")
        kept = {name: item for name, item in one["state"].items() if name not in forget}
        done, _ = train.load_checkpoint(tmp_path / "0" / "latest.safetensors", kept)
        for t in range(done, done + 4):
            one["step"](one["batches"].batch(t))
        ends.append(torch.cat([p.detach().flatten() for p in one["state"]["model"].parameters()]))
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_history_holds_the_means_of_each_window_and_a_longer_run_continues_a_shorter_one(tmp_path):
    history, model = line(8)
    w, losses = 0.0, []
    for _ in range(8):
        losses.append((w - 3) ** 2)
        w -= 0.1 * 2 * (w - 3)
    assert history["step"] == [2, 4, 6, 8]
    assert history["loss"] == pytest.approx([sum(losses[i:i + 2]) / 2 for i in range(0, 8, 2)], rel=1e-5)
    assert model.w.item() == pytest.approx(w, rel=1e-5)
    line(8, folder=tmp_path)
    longer, resumed = line(12, folder=tmp_path, resume="latest")
    straight, whole = line(12)
    assert longer == straight and torch.equal(resumed.w, whole.w)
    same, loaded = line(12, folder=tmp_path, resume="auto")           # nothing left to do: only loads
    assert same == straight and torch.equal(loaded.w, whole.w)
    with pytest.raises(train.TrainError, match="has done 12 steps, more than the 5 asked for"):
        line(5, folder=tmp_path, resume="latest")
    assert line(4, folder=tmp_path / "empty", resume="auto")[0] == line(4)[0]


def test_a_metric_that_is_not_finite_stops_with_step_metric_and_last_good_checkpoint(tmp_path):
    def spoil(t, model):
        if t == 10:
            model.w.data.fill_(float("nan"))
    told = r"loss became nan at step 11; the last good checkpoint is .*latest.safetensors \(step 8\)"
    with pytest.raises(train.TrainError, match=told):
        line(20, spoil, folder=tmp_path)
    assert load_file(tmp_path / "latest.safetensors")["model/w"].isfinite()


def test_weights_that_are_not_finite_never_reach_a_checkpoint(tmp_path):
    model = Line()
    model.w.data.fill_(float("inf"))
    with pytest.raises(train.TrainError, match="model/w is not finite after step 4; no checkpoint was written before"):
        train.fit(lambda x: {"loss": torch.zeros(())}, train.Whole(torch.ones(1)), steps=4, state={"model": model},
                  config={}, folder=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("end", [1, 5, 9, 14])
def test_a_longer_run_goes_on_from_any_end_of_a_shorter_one_without_a_trace(end, tmp_path):
    """The shorter run's last point stands for fewer steps than a window; the longer one logs the whole window."""
    short, _ = line(end, folder=tmp_path, log_every=6)
    assert short["step"] == [*range(6, end + 1, 6), *[end] * (end % 6 > 0)]
    assert line(end, folder=tmp_path, log_every=6, resume="latest")[0] == short
    longer, resumed = line(20, folder=tmp_path, log_every=6, resume="latest")
    straight, whole = line(20, log_every=6)
    assert longer == straight and straight["step"] == [6, 12, 18, 20] and torch.equal(resumed.w, whole.w)


def test_a_run_that_begins_at_its_end_leaves_a_checkpoint_in_its_own_folder(tmp_path):
    """Else a later stage, killed and started again from that folder, would not find where it had begun."""
    done, _ = line(9, folder=tmp_path / "one")
    assert line(9, folder=tmp_path / "other", resume=str(tmp_path / "one"))[0] == done
    assert line(9, folder=tmp_path / "other", resume="latest")[0] == done
    assert meta(tmp_path / "other")["made_by"][0] == meta(tmp_path / "one")["made_by"][0]


def test_checkpoints_leave_no_mark_in_the_history_and_are_judged_by_the_steps_since_its_last_point(tmp_path):
    history, _ = line(12, folder=tmp_path, log_every=5, checkpoint_every=4)
    assert history == line(12, log_every=5, checkpoint_every=100)[0]
    losses, told = line(12, log_every=1)[0]["loss"], meta(tmp_path)
    assert told["window"] == {"loss": losses[10:]} and told["history"]["step"] == [5, 10]
    assert told["best"] == pytest.approx(sum(losses[10:]) / 2)


# ------------------------------------------------------------------------------------------------ looks
def looked_at(steps, **options):
    """A Line whose w is looked at with noise of its own: (history, how often it was looked at, autocast there)."""
    noise, seen = train.generator(3), []

    def look():
        seen.append(torch.is_autocast_enabled("cpu"))
        return {"w": model.w.double().detach(), "noise": torch.rand((), generator=noise)}

    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(x):
        optimizer.zero_grad()
        loss = ((model.w - 3) * x).square().mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    history = train.fit(step, train.Shuffled(torch.ones(8), 4, seed=0), steps=steps, look=look, config={},
                        state={"model": model, "optimizer": optimizer, "noise": noise}, **options)
    return history, seen


def test_what_is_looked_at_joins_every_point_of_the_history():
    history, seen = looked_at(11, log_every=4)
    plain, _ = line(11, log_every=4)
    assert len(seen) == 3 and history["step"] == [4, 8, 11] and history["loss"] == plain["loss"]
    assert history["w"] == pytest.approx([3 - 3 * 0.8 ** t for t in (4, 8, 11)])
    assert history["noise"] == torch.rand(3, generator=train.generator(3)).tolist()
    assert looked_at(0)[0] == {"step": []}


@pytest.mark.parametrize("end", [3, 8, 10])
def test_looks_leave_no_trace_in_a_resumed_run(end, tmp_path):
    """Neither the last one of a shorter run, which the longer one has not, nor the noise that it took."""
    looked_at(end, log_every=4, checkpoint_every=5, folder=tmp_path)
    longer, _ = looked_at(14, log_every=4, checkpoint_every=5, folder=tmp_path, resume="latest")
    assert longer == looked_at(14, log_every=4, checkpoint_every=5)[0]
    again, seen = looked_at(14, log_every=4, checkpoint_every=5, folder=tmp_path, resume="latest")
    assert again == longer and len(seen) == 1                             # of the last point, which stands for 2 steps


def test_looks_are_taken_in_the_precision_of_the_steps():
    """The last one too, after the loop."""
    assert looked_at(11, log_every=4, numerics="bf16")[1] == [True, True, True]


# ------------------------------------------------------------------------------------------------ replays
class Noted(train.Shuffled):
    """Batches that note which steps were asked for together."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked = []

    def indices(self, first, count):
        self.asked.append((first, count))
        return super().indices(first, count)


def noisy(steps, **options):
    """A model with noise, momentum and a running mean on batches of 7 epochs; (history, state, chunks asked for)."""
    model, noise = torch.nn.Linear(3, 2), train.generator(7)
    with torch.no_grad():
        model.weight.normal_(generator=train.generator(8))
        model.bias.zero_()
    model.register_buffer("mean", torch.zeros(2))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    batches = Noted(torch.randn(20, 3, generator=train.generator(9)), 3, 1)

    def step(x):
        optimizer.zero_grad()
        y = model(x + 0.1 * torch.randn(x.shape, generator=noise))
        model.mean.lerp_(y.detach().mean(0), 0.1)
        loss = y.square().mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss, "mean": model.mean.mean()}

    state = {"model": model, "optimizer": optimizer, "noise": noise}
    history = train.fit(step, batches, steps=steps, state=state, config={}, **options)
    ends = {**model.state_dict(), "noise": noise.get_state(),
            **{str(i): moment["momentum_buffer"] for i, moment in enumerate(optimizer.state.values())}}
    return history, ends, batches.asked[1:]               # the first is only looked at


def same(a, b):
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(a[1][key], b[1][key]) for key in b[1])


@pytest.mark.parametrize("steps_per_replay", [2, 5, 10])
def test_steps_taken_together_are_the_steps_taken_one_by_one(steps_per_replay):
    """Six batches an epoch, so that every replay of ten crosses a border."""
    together = noisy(47, log_every=20, checkpoint_every=10, steps_per_replay=steps_per_replay)
    assert same(together, noisy(47, log_every=20, checkpoint_every=10, steps_per_replay=1))
    assert sum(count for _, count in together[2]) == 47
    assert [first for first, _ in together[2]] == [sum(n for _, n in together[2][:i]) for i in range(len(together[2]))]
    assert {count for _, count in together[2]} == {1, steps_per_replay}


def test_a_replay_ends_where_something_is_logged_or_saved():
    """The most steps that divide both intervals; single ones to warm up, to come into step and at the end."""
    assert noisy(23, log_every=8, checkpoint_every=12, steps_per_replay=10)[2] == [
        *[(t, 1) for t in range(4)], (4, 4), (8, 4), (12, 4), (16, 4), (20, 1), (21, 1), (22, 1)]  # 4 divides 8 and 12
    asked = noisy(50, log_every=20, checkpoint_every=1000)[2]
    assert asked == [*[(t, 1) for t in range(10)], (10, 10), (20, 10), (30, 10), (40, 10)]
    assert set(noisy(9, log_every=7, checkpoint_every=100)[2]) == {(t, 1) for t in range(9)}


def test_a_run_resumed_between_two_replays_takes_the_same_steps(tmp_path):
    options = {"log_every": 20, "checkpoint_every": 10, "steps_per_replay": 10}
    whole = noisy(45, **options)
    noisy(13, folder=tmp_path, **options)
    resumed = noisy(45, folder=tmp_path, resume="latest", **options)
    assert same(resumed, whole) and resumed[2] == [*[(t, 1) for t in range(13, 20)], (20, 10), (30, 10),
                                                   *[(t, 1) for t in range(40, 45)]]


def test_the_batches_of_several_steps_are_those_of_each():
    batches = train.Shuffled(torch.arange(10), 3, seed=4)
    for first, count in ((0, 1), (0, 3), (1, 7), (2, 2), (5, 13)):
        rows = batches.indices(first, count)
        assert rows.shape == (count, 3) and rows.dtype == torch.long
        each = [train.Shuffled(torch.arange(10), 3, seed=4).batch(t) for t in range(first, first + count)]
        assert torch.equal(torch.stack([batches.at(row) for row in rows]), torch.stack(each))
    data = torch.rand(4, 2)
    whole = train.Whole(data)
    assert whole.indices(3, 5).shape == (5, 0) and whole.at(whole.indices(3, 5)[0]) is data is whole.batch(9)


def test_a_graph_needs_a_tensor_to_stay_where_it_is():
    """What `_capture` compares: found for every weight, buffer and moment, and different once one is replaced."""
    model = torch.nn.BatchNorm1d(2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(4, 2)).sum().backward()
    optimizer.step()
    state = {"net": model, "adam": optimizer, "noise": train.generator(1)}
    before = train._addresses(state)
    assert len(before) == 2 + 3 + 2 * 3 and "net/running_mean" in before and "adam/0/exp_avg" in before
    model(torch.rand(4, 2)).sum().backward()
    optimizer.step()
    assert train._addresses(state) == before
    model.running_mean = 0.9 * model.running_mean
    moved = [name for name, address in train._addresses(state).items() if before[name] != address]
    assert moved == ["net/running_mean"]


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"log_every": 0}, {"checkpoint_every": 0}, {"steps_per_replay": 0}])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(train.TrainError, match=r"steps must be >= 0, log_every, checkpoint_every and .* >= 1, got"):
        noisy(**{"steps": 4} | wrong)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda path: path.unlink(), "nothing to resume from"),
    (lambda path: path.write_bytes(path.read_bytes()[:-20]), "cannot be read"),
    (lambda path: path.write_bytes(b"rubbish"), "cannot be read")])
def test_a_missing_or_corrupt_checkpoint_is_one_clear_line(tmp_path, spoil, message):
    line(4, folder=tmp_path)
    spoil(tmp_path / "latest.safetensors")
    with pytest.raises(train.TrainError, match=message) as error:
        line(8, folder=tmp_path, resume="latest")
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_configuration_or_architecture_is_refused(tmp_path):
    line(4, folder=tmp_path, config={"lr": 0.1})
    with pytest.raises(train.TrainError, match="trained with lr = 0.1, this run has 0.2"):
        line(8, folder=tmp_path, config={"lr": 0.2}, resume="latest")
    with pytest.raises(train.TrainError, match="does not fit this model"):
        train.load_checkpoint(tmp_path / "latest.safetensors", {"model": torch.nn.Linear(2, 2)})


def test_a_full_disk_names_the_step_and_keeps_the_older_checkpoint(tmp_path, monkeypatch):
    line(4, folder=tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "write_atomic", full)
    told = r"step 8 to .*No space left on device; the last good checkpoint .*step 4"
    with pytest.raises(train.TrainError, match=told):
        line(8, folder=tmp_path, resume="latest")


def test_best_is_the_checkpoint_with_the_lowest_loss_also_after_a_resume(tmp_path):
    """Checkpoints at 4, 8, 12 and 16, the one at 12 has the lowest logged loss."""
    def spoil(t, model):
        if t in (10, 12):
            model.w.data.fill_({10: 2.99, 12: -50.0}[t])
    line(16, spoil, folder=tmp_path / "whole")
    line(12, spoil, folder=tmp_path / "resumed")
    line(16, lambda t, model: spoil(t + 12, model), folder=tmp_path / "resumed", resume="latest")
    for name in ("latest", "best"):
        whole, resumed = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("whole", "resumed"))
        assert torch.equal(whole["model/w"], resumed["model/w"])
    assert meta(tmp_path / "whole", "best")["step"] == meta(tmp_path / "resumed", "best")["step"] == 12
    assert meta(tmp_path / "whole")["step"] == 16


def test_batches_are_permutations_of_each_epoch_and_a_function_of_seed_and_step():
    data = torch.arange(10)
    batches = train.Shuffled(data, 4, seed=1)
    epochs = [torch.cat([batches.batch(2 * e + i) for i in range(2)]) for e in range(3)]
    assert all(len(set(epoch.tolist())) == 8 for epoch in epochs) and not torch.equal(epochs[0], epochs[1])
    assert torch.equal(train.Shuffled(data, 4, seed=1).batch(5), batches.batch(5))
    long = torch.arange(1000)
    assert not torch.equal(train.Shuffled(long, 99, seed=2).batch(0), train.Shuffled(long, 99, seed=1).batch(0))
    with pytest.raises(train.TrainError, match="batch size"):
        train.Shuffled(data, 11, seed=1)


@pytest.mark.parametrize(("n", "size", "per_epoch"), [(10, 4, 3), (12, 4, 3), (3, 8, 1), (1, 1, 1)])
def test_items_are_all_seen_in_every_epoch_and_the_last_batch_is_filled_up(n, size, per_epoch):
    batches = train.Items(n, size, 1, torch.device("cpu"))
    assert batches.per_epoch == per_epoch
    epochs = batches.indices(0, 3 * per_epoch).view(3, -1)
    for epoch in epochs:
        assert sorted(epoch[:n].tolist()) == list(range(n))
        assert epoch[n:].tolist() == [-1] * (per_epoch * min(size, n) - n)
    assert n < 4 or not torch.equal(epochs[0], epochs[1])


def test_items_are_a_function_of_seed_and_step():
    def items(seed):
        return train.Items(10, 4, seed, torch.device("cpu"))
    each = torch.stack([items(1).batch(t) for t in range(20)])
    for first, count in ((0, 20), (1, 7), (2, 1), (5, 13)):
        assert torch.equal(items(1).indices(first, count), each[first:first + count])
    assert not torch.equal(items(2).indices(0, 20), each)
    assert not torch.equal(items("1 finetuning").indices(0, 20), each) and torch.equal(items("1").batch(3), each[3])
    whole = train.Shuffled(torch.arange(10), 4, 1)                       # the same order, its incomplete batch kept
    assert torch.equal(whole.batch(1), each[1]) and torch.equal(whole.batch(2), each[3])
    for n, size in ((10, 0), (0, 4)):
        with pytest.raises(train.TrainError, match="batch size must be between 1 and the"):
            train.Items(n, size, 1, torch.device("cpu"))


def test_bf16_changes_the_numerics_and_fp32_does_not():
    seen = []
    linear = torch.nn.Linear(64, 64)

    def step(x):
        seen.append(linear(x).dtype)
        return {"loss": linear(x).float().mean()}
    for name in ("fp32", "tf32", "bf16"):
        train.fit(step, train.Whole(torch.ones(2, 64)), steps=1, state={"model": linear}, config={}, numerics=name)
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    with pytest.raises(train.TrainError, match="unknown precision"):
        train.fit(step, train.Whole(torch.ones(2, 64)), steps=1, state={"model": linear}, config={}, numerics="fp8")


def test_bf16_computes_with_the_weights_of_this_step_not_of_the_first():
    linear = torch.nn.Linear(8, 1, bias=False)
    optimizer = torch.optim.SGD(linear.parameters(), 0.05)

    def step(x):
        optimizer.zero_grad()
        with torch.no_grad():
            linear(x)                                     # nor may a pass without gradient spoil the one with it
        loss = (linear(x).float() - 2).square().mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss}
    history = train.fit(step, train.Whole(torch.ones(2, 8)), steps=20, state={"model": linear, "optimizer": optimizer},
                        config={}, numerics="bf16", log_every=1)
    assert history["loss"][-1] < 0.01 * history["loss"][0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_a_clear_error():
    with pytest.raises(train.TrainError, match="no CUDA GPU"):
        train.device("cuda")
    assert train.device("auto").type == "cpu"


def test_generators_differ_by_seed_and_by_use():
    draws = [torch.randn(4, generator=train.generator(seed, use=use))
             for seed in (1, 2, 1 + 2 ** 32) for use in ("noise", "weights")]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(torch.randn(4, generator=train.generator(1)), draws[0])
