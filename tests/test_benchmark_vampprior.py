"""The VampPrior's benchmark: from the same weights and noise both loops learn the same; what it lacks is refused."""
from collections import Counter

import pytest
import small_benchmark
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import harness, records, roofs, vampprior
from lib import train

CPU = torch.device("cpu")
CASES = [(net, model, prior) for net in vampprior.NETS for model in ("vae", "hvae") for prior in ("standard", "vamp")]
TINY = {"components": 10, "dataset": "digits"}
BATCH = {"gated": 300, "port": 10}
DATA = {net: vampprior.data(vampprior.SETTINGS | TINY | {"net": net}) for net in vampprior.NETS}
FULL = dict(vampprior.NETS)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Networks of few units and a short warm-up."""
    monkeypatch.setitem(vampprior.NETS, "gated", FULL["gated"] | {"latent_dim": 6, "hidden": 30, "warmup": 5})
    monkeypatch.setitem(vampprior.NETS, "port", FULL["port"] | {"network_size": 1})


def contestants(case):
    """(plain loop, its model, the book's job, batches that the loop has taken), from one start and one noise."""
    images = DATA[case[0]]
    case = dict(zip(("net", "model", "prior"), case, strict=True))
    own = vampprior.SETTINGS | TINY | {"batch": BATCH[case["net"]]} | case
    job, taken = vampprior.book(own, images, CPU), []

    def batches():
        while True:
            taken.append(job["batches"].batch(len(taken)))
            yield taken[-1]

    loop, model = vampprior.plain(own, images, batches(), CPU)
    with torch.no_grad():                                           # no logit so large that the plain loop clamps it
        [*_, last, _] = job["state"]["model"].decoder.parameters()
        last.mul_(0.2)
    harness.same_weights(model, job["state"])
    torch.manual_seed(7)
    job["state"]["generator"].manual_seed(7)
    return loop, model, job, taken


def gradients(model):
    """Those of the plain model, with the two layers of a gate as the one matrix and vector that the book has."""
    found = []
    for part in model.modules():
        if isinstance(part, vampprior.Gate):
            found += [torch.cat([weight.grad for weight in pair]) for pair in zip(*part.layers, strict=True)]
        else:
            found += [weight.grad for weight in part.parameters(recurse=False)]
    return found


# ------------------------------------------------------------------------------------------------ the same training
@pytest.mark.parametrize("case", CASES)
def test_from_the_same_weights_and_noise_both_have_the_same_loss_and_gradients(case, monkeypatch):
    monkeypatch.setitem(vampprior.NETS[case[0]], "normalised", False)
    loop, model, job, _ = contestants(case)
    (logged,), found = loop(1), job["step"](job["batches"].batch(0))
    assert set(found) - set(logged) == ({"kl_z2", "kl_z1"} if case[1] == "hvae" else set())      # more for nothing
    for name, value in logged.items():
        assert value == pytest.approx(found[name].item(), rel=1e-4, abs=1e-4), name
    for mine, weight in zip(gradients(model), job["state"]["model"].parameters(), strict=True):
        assert mine.shape == weight.shape and weight.grad.any()
        assert (mine - weight.grad).norm() < 1e-4 * weight.grad.norm()


@pytest.mark.parametrize("case", CASES)
def test_both_learn_the_same_over_several_epochs_of_the_warm_up(case, monkeypatch):
    monkeypatch.setitem(vampprior.NETS[case[0]], "normalised", False)
    loop, _, job, taken = contestants(case)
    logged, history = loop(12), train.fit(**job, steps=12, log_every=1)
    assert len(taken) == 12 == job["state"]["model"].done
    for name in logged[0]:
        assert [point[name] for point in logged] == pytest.approx(history[name], rel=1e-4, abs=1e-3), name
    assert history["rec"][-1] < history["rec"][0] - 1


@pytest.mark.parametrize("model", ["vae", "hvae"])
def test_normalised_gradients_are_of_length_one_in_each_tensor_of_either(model):
    """The plain loop has two tensors where the book has one for both layers of a gate, so they part, but slowly."""
    loop, plain, job, _ = contestants(("gated", model, "vamp"))
    logged, history = loop(12), train.fit(**job, steps=12, log_every=1)
    for weights in (vampprior.trained(plain), list(job["state"]["model"].parameters())):
        assert [weight.grad.norm().item() for weight in weights] == pytest.approx([1.0] * len(weights), rel=1e-4)
    assert [point["loss"] for point in logged] == pytest.approx(history["loss"], rel=0.01)


@pytest.mark.parametrize(("model", "prior", "n"), [("vae", "standard", 1_974_501), ("vae", "vamp", 2_366_501),
                                                   ("hvae", "standard", 4_065_939), ("hvae", "vamp", 4_457_939)])
def test_the_plain_port_has_the_works_number_of_parameters(model, prior, n, monkeypatch):
    monkeypatch.setitem(vampprior.NETS, "port", FULL["port"])
    assert sum(weight.numel() for weight in vampprior.trained(vampprior.Model("port", model, prior, 500))) == n


def test_what_is_trained_of_a_gate_lies_in_the_memory_that_the_books_weights_are_copied_to():
    gate, x = vampprior.Gate(5, 3), torch.rand(2, 5)
    with torch.no_grad():
        gate.weight.copy_(torch.arange(30.0).view(6, 5))
        gate.bias.zero_()
    (h, _), (g, _) = gate.layers
    assert torch.equal(h, torch.arange(15.0).view(3, 5)) and torch.equal(g, torch.arange(15.0, 30.0).view(3, 5))
    assert torch.equal(gate(x), (x @ h.T) * torch.sigmoid(x @ g.T))
    assert all(weight.is_leaf and weight.requires_grad and weight.is_contiguous() for weight in vampprior.trained(gate))


def test_only_the_mixtures_product_is_an_operation_more_in_the_book():
    loop, _, job, _ = contestants(("gated", "vae", "vamp"))
    first, encoder, decoder = 784 * 60, 30 * 60 + 30 * 12, 6 * 60 + 30 * 60 + 30 * 784
    plain = 2 * (300 * (2 * first + 3 * encoder + 3 * decoder) + 10 * 3 * (first + encoder))
    assert roofs.needs(lambda: loop(1))["flop"] == plain
    batch = job["batches"].batch(0)
    assert roofs.needs(lambda: job["step"](batch))["flop"] == plain + 3 * 2 * 300 * 10 * 2 * 6


@pytest.mark.parametrize(("model", "n"), [("vae", 2), ("hvae", 8)])
def test_the_compiled_variant_compiles_every_network(model, n, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda net: compiled.append(net))
    own = vampprior.SETTINGS | TINY | {"model": model}
    net = vampprior.book(own, DATA["gated"], CPU, compiled=True)["state"]["model"]
    weights = {id(weight) for part in compiled for weight in part.parameters()}
    assert len(compiled) == n and weights == {id(weight) for weight in net.parameters()} - {id(net.prior.u)}


# ------------------------------------------------------------------------------------------------ a whole benchmark
house = small_benchmark.house


def run(*words, net="gated"):
    tiny = [f"--set={name}={value}" for name, value in (TINY | {"net": net, "batch": BATCH[net]}).items()]
    return command.main(["vampprior", *tiny, "--device", "cpu", "--seconds", "0.05", "--repeats", "2", *words])


@pytest.mark.parametrize(("net", "rows"), [("gated", {"plain", "fit", "bf16"}),
                                           ("port", {"plain", "fit", "bf16", "contiguous"})])
def test_both_nets_are_measured_with_as_many_steps_of_every_contestant(house, net, rows, monkeypatch):
    stepped, step = Counter(), torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: stepped.update([adam]) or step(adam))
    monkeypatch.setattr(vampprior, "data", lambda settings: DATA[net])
    assert run("--variants=bf16,contiguous", net=net) == 0
    record = records.read(next((house / "runs" / "benchmarks").glob("*-vampprior.json")))
    assert record["settings"] == vampprior.SETTINGS | TINY | {"net": net, "batch": BATCH[net]}
    assert set(record["rows"]) == rows and len(record["rows"]) + len(record["failed"]) == 4
    each = 2 * (1 + record["steps_per_turn"]) + 2 * (1 + 1)         # turns and two short ones, each after one untimed
    assert [n for adam, n in stepped.items() if not adam.defaults["fused"]] == [each + 1]      # one is counted, too
    fused = [n for adam, n in stepped.items() if adam.defaults["fused"]]
    assert [n for n in fused if n > 2] == [each] * (len(rows) - 1)  # of two steps: what warms up, what is counted


@pytest.mark.parametrize(("word", "said"), [
    ("net=resnet", "net gated or port, not for 'resnet'"), ("model=convhvae", "model vae or hvae, not for 'convhvae'"),
    ("prior=mog", "prior standard or vamp, not for 'mog'"), ("dataset=celeba", "digits, not for 'celeba'"),
    ("components=0", "components must be at least 1"), ("lr=0", "learning rate must be positive"),
    ("batch=1300", "between 1 and the 1198"), ("hidden=40", "vampprior has no setting 'hidden'"),
    ("components=few", "components must be int")])
def test_what_cannot_be_measured_is_said_in_one_line(house, capsys, word, said):
    assert run(f"--set={word}") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error
