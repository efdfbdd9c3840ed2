"""The works trained by CUDA graphs: replays are the eager steps to the bit, and a GPU learns what the CPU does.

As in test_cuda.py, what is not of the GPU alone runs on the CPU as well, where `recorded_graph` stands for CUDA graphs.
"""
import pytest
import recorded_graph
import small_gan
import torch

from lib import bags, binarised, data, dcgan, documents, hvae, semhash, symmetric, train, vampprior
from lib import vamplikelihood as paper
from lib import vampport as port

GPU, deterministic, device = recorded_graph.GPU, recorded_graph.deterministic, recorded_graph.device
replays, assert_same_state = recorded_graph.replays, recorded_graph.assert_same_state


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
    assert_same_state(own, eager)


def test_most_steps_of_semantic_hashing_are_replayed_and_learn(device, replays):
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
    assert_same_state(own, eager)


def test_the_warm_up_goes_on_in_replays_and_most_steps_are_replayed(device, replays):
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


# ------------------------------------------------------------------------------------------------ GAN as ground truth
@pytest.mark.parametrize("numerics", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["gan", "encoder", "joint"])
def test_replays_of_the_gans_steps_are_the_eager_ones(kind, numerics, device, replays):
    """Running statistics, the clock and what the joint step tracks included."""
    one, other = (small_gan.steps(kind, device) for _ in range(2))
    histories = [train.fit(**each, steps=14, log_every=4, checkpoint_every=4, numerics=numerics, graph=graph)
                 for each, graph in ((one, True), (other, False))]
    assert histories[0] == histories[1] and histories[0]["step"] == [4, 8, 12, 14] and len(replays) == 2
    assert int(one["state"]["clock"].steps) == 14
    assert_same_state(one["state"], other["state"])


@GPU
@pytest.mark.parametrize(("kind", "names"), [
    ("gan", ("loss_d", "loss_g", "d_real")), ("encoder", ("loss", "error")), ("joint", ("rec", "kl"))])
def test_cpu_and_cuda_agree_on_the_gans_steps(kind, names):
    """The noise differs, so the training agrees in distribution."""
    jobs = [small_gan.steps(kind, place, batch=24, lr=1e-4) for place in ("cpu", "cuda")]
    z = torch.randn(5, small_gan.NZ, generator=train.generator(1))
    nets = [job["state"]["generator" if kind == "gan" else "truth"] for job in jobs]
    images = [dcgan.generate(net, z.to(place)).cpu() for net, place in zip(nets, ("cpu", "cuda"), strict=True)]
    torch.testing.assert_close(images[1], images[0], rtol=1e-4, atol=1e-4)
    cpu, cuda = (train.fit(**job, steps=40, log_every=20, numerics="fp32") for job in jobs)
    for name in names:
        assert cuda[name] == pytest.approx(cpu[name], rel=0.1), name
