"""Training by CUDA graphs: replays are the eager steps to the bit, and the host does not wait between log points.

Everything runs on a GPU if there is one; what is not of the GPU alone runs on the CPU as well, where `recorded_graph`
stands for CUDA graphs. One step holds all that a step of the book may: convolutions, channels last, batch norm, noise,
a running mean and two fused Adams.
"""
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")       # deterministic products, as torch asks for

import pytest
import recorded_graph
import torch
import torch.nn.functional as F
from killed_training import meta
from safetensors.torch import load_file
from torch import nn

from lib import autoencoders, bags, binarised, data, documents, hvae, semhash, symmetric, train, vampprior
from lib import vamplikelihood as paper
from lib import vampport as port

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
OPTIONS = {"steps": 63, "log_every": 20, "checkpoint_every": 20, "numerics": "fp32"}
EPOCH = 7                                                         # batches: replays of ten cross a border each


@pytest.fixture(autouse=True)
def deterministic():
    """Kernels that add in a fixed order: then equal means equal to the bit."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request, monkeypatch):
    """Where graphs are captured: on a GPU, or recorded on the CPU."""
    if request.param == "cpu":
        recorded_graph.install(monkeypatch)
    return request.param


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


def test_most_steps_are_replayed(device, monkeypatch):
    """Were nothing captured, the comparisons here would compare eager steps with eager steps."""
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph)))
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


# ------------------------------------------------------------------------------------------------ symmetric learning
def binary(device, encoder, learning, seed=1, width=2, hidden=20, bits=(5, 9), batch=16, lr=1e-3):
    """The arguments of `fit` for the HVAE of symmetric learning on the embedded digits."""
    model = hvae.build("digits", encoder, bits, width, hidden)
    hvae.initialise(model, train.generator(seed, use="weights")).to(device)
    step, state = symmetric.training(model, train.generator(seed, device), learning, lr)
    images = data.load("digits", size=28).train.to(device)
    return {"step": step, "batches": train.Shuffled(images, batch, seed), "state": state, "config": {}}


@pytest.mark.parametrize("encoder", hvae.ENCODERS)
@pytest.mark.parametrize("learning", symmetric.LEARNING)
def test_replays_of_symmetric_learning_are_its_eager_steps(device, encoder, learning):
    """Both optimizers, the running statistics and the chain of images included."""
    one, other = (binary(device, encoder, learning) for _ in range(2))
    histories = [train.fit(**each, steps=23, log_every=10, numerics="fp32", graph=graph)
                 for each, graph in ((one, True), (other, False))]
    assert histories[0] == histories[1]
    own, eager = (each["state"]["model"].state_dict() for each in (one, other))
    assert all(torch.equal(own[name], eager[name]) for name in eager)


@GPU
@pytest.mark.parametrize("encoder", hvae.ENCODERS)
@pytest.mark.parametrize("learning", symmetric.LEARNING)
def test_cpu_and_cuda_agree_on_the_first_step_and_in_distribution_on_the_next_500(encoder, learning):
    """The noise differs, so at step 1 only what hardly depends on it agrees closely; losses are of 64 images."""
    histories = []
    for place in ("cpu", "cuda"):
        one = binary(place, encoder, learning, width=8, hidden=600, bits=(30, 100), batch=64, lr=3e-4)
        histories.append(train.fit(**one, steps=500, log_every=1, numerics="fp32"))
    cpu, cuda = histories
    assert cuda["loss"][0] == pytest.approx(cpu["loss"][0], rel=0.01)
    for name in set(cpu) - {"step"}:
        late = [torch.tensor(history[name][-100:]) for history in histories]
        apart, noise = (late[0].mean() - late[1].mean()).abs(), max(values.std() for values in late)   # of a step
        assert apart < max(0.03 * late[0].mean().abs(), noise), name


# ------------------------------------------------------------------------------------------------ semantic hashing
def hashing(device, dense=True, estimates=1, **changed):
    """The arguments of `fit` for semantic hashing of the embedded documents: six batches an epoch, 100 in the last."""
    texts = documents.load("topics")
    s = documents.smoothing(texts.train)
    own = {"dataset": "topics", "encoder": "e1", "input": "", "bits": 16, "decoder_depth": 0, "hidden": 32,
           "estimator": "disarm", "kl": "sampled", "batch_size": 300, "lr": 3e-3, "seed": 1, "precision": "fp32",
           "epochs": 5, "finetune_estimates": estimates} | changed
    corpora = bags.Corpus(texts.train, s, device, dense=dense), bags.Corpus(texts.test, s, device)
    one = semhash.replica(own, *corpora, torch.device(device))
    return semhash.job(one, estimates=estimates)


HASHING = {"steps": 26, "log_every": 6, "checkpoint_every": 600, "steps_per_replay": 6}


@pytest.mark.parametrize("numerics", ["fp32", "bf16"])
@pytest.mark.parametrize("changed", [
    {}, {"kl": "analytic", "estimates": 3}, {"estimator": "arm", "encoder": "e3"},
    {"estimator": "reinforce-loo", "encoder": "e2", "decoder_depth": 1}, {"estimator": "zgr", "decoder_depth": 2}])
def test_replays_of_semantic_hashing_are_its_eager_steps(device, changed, numerics):
    """Weights, moments, noise, history with its evaluations; what fills up the last batch is in the graph, too."""
    one, other = (hashing(device, **changed) for _ in range(2))
    histories = [train.fit(**each, **HASHING, numerics=numerics, graph=graph)
                 for each, graph in ((one, True), (other, False))]
    assert histories[0] == histories[1] and histories[0]["step"] == [6, 12, 18, 24, 26]
    own, eager = (each["state"] for each in (one, other))
    assert all(map(torch.equal, own["model"].parameters(), eager["model"].parameters()))
    for name in ("generator", "test_generator"):
        assert torch.equal(own[name].get_state(), eager[name].get_state())
    for moments, others in zip(*(each["optimizer"].state.values() for each in (own, eager)), strict=True):
        assert all(torch.equal(moments[key], others[key]) for key in others)


def test_most_steps_of_semantic_hashing_are_replayed_and_learn(device, monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph)))
    history = train.fit(**hashing(device), **HASHING)
    assert len(replays) == 3                                      # steps 6 to 23; the others warm up or are left over
    assert history["test_nelbo"][-1] < history["test_nelbo"][0] - 5


@GPU
def test_on_cuda_training_documents_are_dense_for_sparse_ones_cannot_be_captured():
    train_set, test_set = semhash.corpora(documents.load("topics"), torch.device("cuda"))
    assert train_set.dense.dtype == torch.int16 and train_set.dense.is_cuda and test_set.dense is None
    with pytest.raises(train.TrainError, match="cannot be captured in a CUDA graph"):
        train.fit(**hashing("cuda", dense=False), **HASHING)


@GPU
@pytest.mark.parametrize("dense", [False, True])
def test_bags_on_cuda_are_those_of_the_cpu(dense):
    """Projection, cross-entropy and every gradient, of documents that are absent or empty too."""
    counts = torch.poisson(torch.full((50, 40), 0.4), generator=train.generator(1))
    counts[[0, 7, 49]] = 0
    items, s = torch.tensor([7, 49, 3, -1, 0, 12, 12]), torch.full((40,), 1 / 40)
    values = [torch.randn(*shape, generator=train.generator(i)) for i, shape in enumerate([(2, 7, 9), (40, 9), (40,)])]
    seen = []
    for place in ("cpu", "cuda"):
        bag = bags.Corpus(counts.to_sparse_csr(), s, place, dense=dense and place == "cuda").batch(items.to(place))
        h, weight, bias = (value.to(place).requires_grad_() for value in values)
        with train.precision("fp32", torch.device(place)):
            found = bags.cross_entropy(h, weight, bias, bag, torch.arange(7.0, device=place))
            projected = bag.project(weight)
            gradients = torch.autograd.grad(found[0] + projected.square().sum(), (h, weight, bias))
        seen.append([part.detach().cpu() for part in (*found, projected, *gradients)])
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)


@GPU
@pytest.mark.parametrize("changed", [{}, {"encoder": "e2", "decoder_depth": 1}, {"estimator": "zgr"}])
def test_cpu_and_cuda_agree_on_semantic_hashing(changed):
    """The same evaluation of the same weights; the noise differs, so the training agrees in distribution."""
    jobs = [hashing(place, place == "cuda", **changed) for place in ("cpu", "cuda")]
    before = [job["look"]() for job in jobs]
    for name in ("test_kl", "bit_entropy", "bit_correlation"):
        assert before[1][name].item() == pytest.approx(before[0][name].item(), rel=1e-3, abs=1e-4), name
    assert before[1]["test_nelbo"].item() == pytest.approx(before[0]["test_nelbo"].item(), rel=0.01)
    cpu, cuda = (train.fit(**job, steps=120, log_every=6, numerics="fp32") for job in jobs)
    for name in ("loss", "kl", "nll_per_word", "test_nelbo", "test_kl"):
        assert cuda[name][0] == pytest.approx(cpu[name][0], rel=0.03), name
        assert cuda[name][-1] == pytest.approx(cpu[name][-1], rel=0.03), name


# ------------------------------------------------------------------------------------------------ VampPrior
VAMP = {"model": "hvae", "prior": "vamp", "dataset": "digits", "components": 7, "latent_dim": 4, "batch_size": 100,
        "lr": 1e-3, "seed": 1, "precision": "fp32", "binarisation": "dynamic", "pseudo_init": "noise", "hidden": 20,
        "warmup": 3, "patience": 50, "normalised": True}                  # 11 steps an epoch
PORT = VAMP | {"network_size": 1, "activation": "relu", "pseudo_init": "images"}


def vamp(device, changed):
    """The arguments of `fit` for the paper's HVAE, or for the port's if `changed` has its options."""
    if "network_size" in changed:
        return port.replica(changed, data.load("digits", size=28), torch.device(device))
    return paper.replica(VAMP | changed, binarised.load("digits", "dynamic"), torch.device(device))


@pytest.mark.parametrize(("changed", "numerics"), [
    ({}, "fp32"), ({}, "bf16"), ({"model": "vae", "prior": "mog", "normalised": False}, "fp32"),
    ({"model": "convhvae", "prior": "vamp-data", "batch_size": 1}, "fp32"),
    (PORT | {"batch_size": 10}, "fp32"), (PORT | {"batch_size": 10, "model": "vae"}, "bf16")])
def test_replays_of_a_vampprior_are_its_eager_steps(device, changed, numerics):
    """The warm-up's weight rises in the middle of a replay; bits and codes are drawn in it."""
    one, other = (vamp(device, changed) for _ in range(2))
    for job in (one, other):                                              # looking at all takes longer than the steps
        job["look"] = vampprior.validation(job["state"]["model"], job["batches"].data[:20], job["state"]["validation"])
    histories = [train.fit(**each, steps=31, log_every=10, numerics=numerics, graph=graph)
                 for each, graph in ((one, True), (other, False))]
    assert histories[0] == histories[1] and histories[0]["step"] == [10, 20, 30, 31]
    own, eager = (each["state"] for each in (one, other))
    assert own["model"].done == 31
    assert all(map(torch.equal, own["model"].parameters(), eager["model"].parameters()))
    for name in ("generator", "validation"):
        assert torch.equal(own[name].get_state(), eager[name].get_state())
    for moments, others in zip(*(each["optimizer"].state.values() for each in (own, eager)), strict=True):
        assert all(torch.equal(moments[key], others[key]) for key in others)


def test_the_warm_up_goes_on_in_replays_and_most_steps_are_replayed(device, monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph)))
    history = train.fit(**vamp(device, {}), steps=44, log_every=11, checkpoint_every=11, steps_per_replay=11)
    assert len(replays) == 3                                              # 11 steps warm up and come into step
    loss, rec, kl = (torch.tensor(history[name]) for name in ("loss", "rec", "kl"))
    assert ((loss - rec) / kl).tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1], abs=0.01)


@GPU
@pytest.mark.parametrize("changed", [{}, PORT], ids=["paper", "port"])
def test_cpu_and_cuda_agree_on_a_vampprior(changed):
    """The same networks evaluated; the noise differs, so the training agrees in distribution."""
    jobs = [vamp(place, changed) for place in ("cpu", "cuda")]
    for own, other in zip(*(job["state"]["model"].components() for job in jobs), strict=True):
        torch.testing.assert_close(other.cpu(), own, rtol=1e-3, atol=1e-4)
    before = [{name: value.item() for name, value in job["look"]().items()} for job in jobs]
    assert before[1] == pytest.approx(before[0], rel=0.05)
    cpu, cuda = (train.fit(**job, steps=88, log_every=11, numerics="fp32") for job in jobs)
    for name in ("loss", "rec", "val_loss"):
        assert cuda[name][0] == pytest.approx(cpu[name][0], rel=0.05), name
        assert cuda[name][-1] == pytest.approx(cpu[name][-1], rel=0.05), name
