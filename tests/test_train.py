"""The training loop: exact resume after SIGKILL, stops on NaN, refuses what does not fit."""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import killed_training

from lib import train


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


@pytest.mark.parametrize("kind", ["vae", "aae"])
def test_a_run_killed_at_random_and_resumed_is_bit_equal_to_an_uninterrupted_one(kind, tmp_path):
    seed = random.SystemRandom().randrange(10 ** 6)
    child = subprocess.run([sys.executable, killed_training.__file__, kind, str(tmp_path / "killed"), str(seed)],
                           capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    told = f"seed {seed}\n{child.stdout}{child.stderr}"
    assert child.returncode == 0, told
    assert child.stdout.count("killed") >= 5, told
    threads = torch.get_num_threads()
    history = killed_training.fit(kind, tmp_path / "whole")
    torch.set_num_threads(threads)
    for name in ("latest", "best"):
        killed, whole = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("killed", "whole"))
        assert killed.keys() == whole.keys() and len(whole) > 40
        different = [key for key in whole if not torch.equal(killed[key], whole[key])]
        assert not different, f"{different}\n{told}"
    assert meta(tmp_path / "killed")["history"] == meta(tmp_path / "whole")["history"] == history, told
    parts = [entry["steps"] for entry in train.made_by(tmp_path / "killed")]          # one process after the other
    assert parts[0][0] == 0 and parts[-1][1] == killed_training.STEPS and len(parts) > 1
    assert [last for _, last in parts[:-1]] == [first for first, _ in parts[1:]]


def meta(folder, name="latest"):
    """What a folder's checkpoint says of itself."""
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["meta"])


def test_a_checkpoint_without_the_noise_would_not_resume_exactly(tmp_path):
    """The bit-equality above is no formality: forgetting one part of the state breaks it."""
    killed_training.fit("vae", tmp_path, stop=30)
    images = killed_training.data.load("digits", size=32).train
    ends = []
    for forget in ((), ("generator",), ("optimizer",)):
        model = killed_training.autoencoders.Autoencoder("vae", (1, 32), dim=4).initialise(train.generator(3))
        step, state = killed_training.autoencoders.training(model, train.generator(4), learn_sigma=True)
        kept = {name: item for name, item in state.items() if name not in forget}
        done, _ = train.load_checkpoint(tmp_path / "latest.safetensors", kept)
        for t in range(done, done + 4):
            step(train.Shuffled(images, 16, seed=5).batch(t))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
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
    monkeypatch.setattr(train, "write_atomic", full)
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
