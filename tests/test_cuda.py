"""Training by CUDA graphs: replays are the eager steps to the bit, and the host does not wait between log points.

Everything runs on a GPU if there is one; what is not of the GPU alone runs on the CPU as well, where `recorded_graph`
stands for CUDA graphs. One step holds all that a step of the book may: convolutions, channels last, batch norm, noise,
a running mean and two fused Adams.
"""
import pytest
import recorded_graph
import torch
import torch.nn.functional as F
from killed_training import meta
from safetensors.torch import load_file
from torch import nn

from lib import autoencoders, train

OPTIONS = {"steps": 63, "log_every": 20, "checkpoint_every": 20, "numerics": "fp32"}
EPOCH = 7                                                         # batches: replays of ten cross a border each
GPU, deterministic, device = recorded_graph.GPU, recorded_graph.deterministic, recorded_graph.device
replays = recorded_graph.replays


class Small(nn.Module):
    """A convolutional encoder and decoder of 8x8 images with a code of 4 numbers, and a running mean of the code."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.Flatten(),
                                     nn.Linear(128, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 128), nn.Tanh(), nn.Unflatten(1, (8, 4, 4)),
                                     nn.ConvTranspose2d(8, 1, 4, 2, 1))
        self.register_buffer("mean", torch.zeros(4))


def replica(device, seed=1, folder=None, spoil=None):
    """The arguments of `fit`; spoil(model, loss) may do in the step what a step must not."""
    model = Small()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.1, generator=train.generator(seed, use="weights"))
    model.to(device, memory_format=torch.channels_last)
    noise = train.generator(seed, device)
    first, second = (train.adam(part.parameters(), 1e-2) for part in (model.encoder, model.decoder))

    def step(batch):
        x = (batch.float() / 255).contiguous(memory_format=torch.channels_last)
        first.zero_grad()
        second.zero_grad()
        mean, log_var = model.encoder(x).float().chunk(2, 1)
        z = mean + (log_var / 2).exp() * torch.randn(mean.shape, generator=noise, device=x.device)
        flipped = (x - torch.bernoulli(torch.full_like(x, 0.01), generator=noise)).abs()
        model.mean.lerp_(z.detach().mean(0), 0.01)
        rec = F.mse_loss(model.decoder(z).float(), flipped)
        kl = 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum(1).mean()
        loss = rec + 0.01 * kl
        loss.backward()
        if spoil:
            spoil(model, loss)
        first.step()
        second.step()
        return {"loss": loss, "kl": kl, "mean": model.mean.mean()}

    images = torch.randint(256, (16 * EPOCH + 5, 1, 8, 8), generator=train.generator(0), dtype=torch.uint8)
    return {"step": step, "batches": train.Shuffled(images.to(device), 16, seed), "folder": folder,
            "state": {"model": model, "first": first, "second": second, "noise": noise}, "config": {"seed": seed}}


def end_of(one):
    """All that training changed, on the CPU."""
    parts = {f"model/{key}": value for key, value in one["state"]["model"].state_dict().items()}
    for name in ("first", "second"):
        for i, moments in one["state"][name].state_dict()["state"].items():
            parts |= {f"{name}/{i}/{key}": value for key, value in moments.items()}
    return {name: value.cpu() for name, value in parts.items()} | {"noise": one["state"]["noise"].get_state()}


def assert_same(one, other):
    a, b = end_of(one), end_of(other)
    assert a.keys() == b.keys() and len(a) > 30
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("steps_per_replay", [1, 10])
def test_replays_are_eager_steps_to_the_bit(device, steps_per_replay):
    eager, graph = replica(device), replica(device)
    expected = train.fit(**eager, **OPTIONS, graph=False)
    assert train.fit(**graph, **OPTIONS, steps_per_replay=steps_per_replay) == expected
    assert_same(graph, eager)
    assert expected["loss"][-1] < expected["loss"][0] and expected["step"] == [20, 40, 60, 63]


def test_most_steps_are_replayed(device, replays):
    """Were nothing captured, the comparisons here would compare eager steps with eager steps."""
    train.fit(**replica(device), **OPTIONS)
    assert len(replays) == 5                                      # 10 warm up and come into step, 3 are left at the end
    train.fit(**replica(device), **OPTIONS, graph=False)
    assert len(replays) == 5


def test_the_noise_of_a_replay_is_that_of_the_steps_it_stands_for(device):
    """The generator alone: draws, and where it stands after them, eager and replayed."""
    noises, drawn = [], []
    for graph in (False, True):
        noise = train.generator(5, device)
        model = nn.Linear(1, 1).to(device)

        def step(x, noise=noise):
            normal, uniform = (draw(1000, generator=noise, device=device) for draw in (torch.randn, torch.rand))
            return {"noise": normal[0] + uniform[-1]}
        history = train.fit(step, train.Whole(torch.ones(1, device=device)), steps=50, log_every=10, graph=graph,
                            state={"model": model, "noise": noise}, config={})
        noises.append(noise.get_state())
        drawn.append(history["noise"])
    assert torch.equal(*noises) and drawn[0] == drawn[1] and len(set(drawn[0])) == 5


@pytest.mark.parametrize("stop", [4, 20, 37, 63])
def test_a_resumed_run_is_an_uninterrupted_one_to_the_bit(device, stop, tmp_path):
    """Stopped while warming up, at a checkpoint, between two replays, at the end."""
    whole = replica(device, folder=tmp_path / "whole")
    expected = train.fit(**whole, **OPTIONS)
    train.fit(**replica(device, folder=tmp_path / "stopped"), **OPTIONS | {"steps": stop})
    resumed = replica(device, folder=tmp_path / "stopped")
    assert train.fit(**resumed, **OPTIONS, resume="latest") == expected
    assert_same(resumed, whole)
    a, b = (load_file(tmp_path / name / "latest.safetensors") for name in ("stopped", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert meta(tmp_path / "stopped")["history"] == meta(tmp_path / "whole")["history"]


def test_several_trained_together_are_each_as_trained_alone(device, tmp_path):
    together = [replica(device, seed, folder=tmp_path / str(seed)) for seed in (1, 2, 3)]
    histories = train.fit_together(together, **OPTIONS)
    for one, history in zip(together, histories, strict=True):
        alone = replica(device, one["config"]["seed"])
        assert train.fit(**alone, **OPTIONS) == history
        assert_same(one, alone)
    assert histories[0] != histories[1]


@pytest.mark.parametrize("stop", [1, 3])
def test_together_they_resume_from_where_each_of_them_is(device, stop, tmp_path):
    """As after a kill: one has a checkpoint, the others none; or each is a checkpoint ahead of the one before."""
    for seed in range(1, stop + 1):
        train.fit(**replica(device, seed, folder=tmp_path / str(seed)), **OPTIONS | {"steps": 20 * seed})
    resumed = [replica(device, seed, folder=tmp_path / str(seed)) for seed in (1, 2, 3)]
    train.fit_together(resumed, **OPTIONS, resume="auto")
    for one in resumed:
        alone = replica(device, one["config"]["seed"])
        train.fit(**alone, **OPTIONS)
        assert_same(one, alone)


@GPU
def test_the_host_does_not_wait_between_log_points():
    """Not even where an epoch ends and a permutation goes to the device."""
    run = train._Training(**replica("cuda"), steps=1000, resume="", chunk=10, graph=True)
    with train.precision("tf32", run.device):
        while run.done < 30:                                      # warm up, capture, first replays
            run.advance(1000)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            while run.done < 30 + 4 * 10:
                run.advance(1000)
            with pytest.raises(RuntimeError, match="synchroniz"):    # it would be seen
                run.fresh[0].sum().item()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        run.collect()
    assert run.done == 70 and len(run.window["loss"]) == 70


@GPU
def test_the_first_step_is_that_of_the_cpu():
    """Batches and weights are alike on every device; the noise is not, so it is left out."""
    found = {}
    for device in ("cpu", "cuda"):
        model = Small()
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0, 0.1, generator=train.generator(1))
        model.to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def step(batch, model=model, optimizer=optimizer):
            x = batch.float() / 255
            optimizer.zero_grad()
            loss = F.mse_loss(model.decoder(model.encoder(x)[:, :4]), x)
            loss.backward()
            optimizer.step()
            return {"loss": loss}
        images = torch.randint(256, (64, 1, 8, 8), generator=train.generator(0), dtype=torch.uint8).to(device)
        state = {"model": model, "optimizer": optimizer}
        history = train.fit(step, train.Shuffled(images, 16, 3), steps=1, state=state, config={}, numerics="fp32")
        found[device] = history["loss"][0], {name: p.detach().cpu() for name, p in model.named_parameters()}
    assert found["cpu"][0] == pytest.approx(found["cuda"][0], rel=1e-5)
    for name, weight in found["cpu"][1].items():
        assert torch.allclose(weight, found["cuda"][1][name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("numerics", ["tf32", "bf16"])
def test_lower_precision_trains_and_replays_what_it_does_eagerly(device, numerics):
    eager, graph, exact = replica(device), replica(device), replica(device)
    expected = train.fit(**eager, **OPTIONS | {"numerics": numerics}, graph=False)
    assert train.fit(**graph, **OPTIONS | {"numerics": numerics}) == expected
    assert_same(graph, eager)
    full = train.fit(**exact, **OPTIONS)
    assert full["loss"] == pytest.approx(expected["loss"], rel=0.05) and expected["loss"][-1] < expected["loss"][0]
    assert (full["loss"] != expected["loss"]) or numerics == "tf32"


@pytest.mark.parametrize("kind", autoencoders.KINDS)
def test_the_autoencoders_can_be_captured(device, kind):
    ends = []
    for graph in (False, True):
        model = autoencoders.Autoencoder(kind, (1, 32), dim=4).initialise(train.generator(3)).to(device)
        step, state = autoencoders.training(model, train.generator(4, device))
        images = torch.randint(256, (100, 1, 32, 32), generator=train.generator(0), dtype=torch.uint8).to(device)
        train.fit(step, train.Shuffled(images, 16, 5), steps=40, state=state, config={}, log_every=10, graph=graph)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]).cpu())
    assert torch.equal(*ends)


def test_a_step_that_the_cpu_takes_part_in_is_refused_with_the_remedy(device):
    def look(model, loss):
        loss.item()
    told = r"the step cannot be captured in a CUDA graph \(.*\): keep the CPU out of it, or pass graph=False"
    with pytest.raises(train.TrainError, match=told) as error:
        train.fit(**replica(device, spoil=look), **OPTIONS)
    assert "\n" not in str(error.value)
    assert train.fit(**replica(device, spoil=look), **OPTIONS, graph=False) == train.fit(**replica(device), **OPTIONS)


def test_a_step_that_replaces_a_buffer_is_refused(device):
    def replace(model, loss):
        model.mean = model.mean * 0.5
    with pytest.raises(train.TrainError, match="the step replaces model/mean, which a CUDA graph cannot repeat"):
        train.fit(**replica(device, spoil=replace), **OPTIONS)


@GPU
def test_data_that_are_not_on_the_gpu_are_refused():
    one = replica("cuda")
    one["batches"] = train.Shuffled(one["batches"].data.cpu(), 16, 1)
    with pytest.raises(train.TrainError, match="the data are on the cpu, the model is on CUDA: move the data there"):
        train.fit(**one, **OPTIONS)


def test_not_a_number_in_a_replay_is_named_with_its_step(device):
    one = replica(device)
    step, steps = one["step"], torch.zeros((), device=device)

    def spoilt(batch):
        steps.add_(1)
        found = step(batch)
        return found | {"loss": found["loss"].masked_fill(steps == 34, float("nan"))}
    with pytest.raises(train.TrainError, match="loss became nan at step 34; no checkpoint was written before"):
        train.fit(**one | {"step": spoilt}, **OPTIONS)
