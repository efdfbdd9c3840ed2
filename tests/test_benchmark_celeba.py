"""The benchmarks of the GAN chain: from the same weights and noise both loops learn the same, by as many operations."""
from collections import Counter

import pytest
import small_benchmark
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import celeba_gan, celeba_joint, harness, records, roofs
from lib import autoencoders, train

CPU = torch.device("cpu")
TINY = {"batch": 8, "nz": 6, "ngf": 4, "ndf": 4}
CASES = {"gan": (celeba_gan, TINY | {"dataset": "shapes"}), "encoder": (celeba_joint, TINY | {"stage": "encoder"}),
         "joint": (celeba_joint, TINY | {"stage": "joint"})}
SHAPES = celeba_gan.data({"dataset": "shapes"})[:64]
METRICS = {"gan": {"loss_d", "loss_g", "d_real", "d_fake", "d_fake_after"}, "encoder": {"loss", "error", "sigma"},
           "joint": {"loss", "rec", "kl", "elbo_running", "moment_1", "moment_2"}}


pytestmark = pytest.mark.usefixtures("one_thread")


def contestants(case, **changes):
    """(plain loop, its model, the book's job) from one start and one noise, on the same batches."""
    work, own = CASES[case]
    own = work.SETTINGS | own | changes
    images = SHAPES if case == "gan" else work.data(own)
    job = work.book(own, images, CPU)
    batches = (job["batches"].batch(t) for t in range(1000))
    batches = (celeba_gan.Images(batch)[:] for batch in batches) if case == "gan" else batches
    loop, model = work.plain(own, images, batches, CPU)
    harness.same_weights(model, job["state"])
    torch.manual_seed(7)
    job["state"]["noise"].manual_seed(7)
    return loop, model, job


def networks(job):
    return nn.ModuleList([item for item in job["state"].values() if isinstance(item, nn.Module)][:-1])     # no clock


@pytest.fixture
def gradients(monkeypatch):
    """Those that every step of an Adam is made with, one after the other."""
    seen, step = [], torch.optim.Adam.step

    def look(adam):
        seen.append([weight.grad.clone() for group in adam.param_groups for weight in group["params"]])
        step(adam)

    monkeypatch.setattr(torch.optim.Adam, "step", look)
    return seen


# ------------------------------------------------------------------------------------------------ the same training
@pytest.mark.parametrize("case", CASES)
def test_from_the_same_weights_and_noise_both_have_the_same_losses_and_gradients(case, gradients):
    loop, _, job = contestants(case)
    (logged,), mine = loop(1), gradients.copy()
    gradients.clear()
    found = job["step"](job["batches"].batch(0))
    assert set(found) == set(logged) == METRICS[case]
    for name, value in logged.items():
        assert value == pytest.approx(found[name].item(), rel=1e-5, abs=1e-6), name
    assert len(mine) == len(gradients) == (2 if case == "gan" else 1)
    for plain, book in zip(sum(mine, []), sum(gradients, []), strict=True):
        assert plain.shape == book.shape and (plain - book).norm() < 1e-4 * book.norm()


@pytest.mark.parametrize("case", CASES)
def test_both_learn_the_same_over_some_steps(case):
    loop, model, job = contestants(case, lr=2e-4)
    start = [weight.detach().clone() for weight in model.parameters()]
    logged, history = loop(8), train.fit(**job, steps=8, log_every=1)
    for name in logged[0]:
        assert [point[name] for point in logged] == pytest.approx(history[name], rel=1e-4, abs=1e-5), name
    for before, plain, book in zip(start, model.parameters(), networks(job).parameters(), strict=True):
        assert (plain - book).norm() <= 1e-3 * (plain - before).norm()      # of the truth neither has moved
        assert torch.equal(plain, before) == (not plain.requires_grad)
    assert sum(not weight.requires_grad for weight in model.parameters()) == (0 if case == "gan" else 13)
    pairs = list(zip(model.named_buffers(), networks(job).buffers(), strict=True))
    assert pairs and all(torch.allclose(plain, book, rtol=1e-4, atol=1e-5) for (_, plain), book in pairs)
    counted = [int(plain) for (name, plain), _ in pairs if name.endswith("tracked")]
    assert counted == {"gan": [8] * 4 + [24] * 3, "encoder": [0] * 4 + [8] * 3,    # D is run three times a step
                       "joint": [0] * 4 + [8] * 7}[case]


def test_the_gan_in_the_book_saves_the_discriminators_gradients_that_are_thrown_away():
    loop, model, job = contestants("gan")
    batch = job["batches"].batch(0)
    plain, book = roofs.needs(lambda: loop(1)), roofs.needs(lambda: job["step"](batch))
    image = celeba_gan.Images(batch)[:]
    assert plain["flop"] - book["flop"] == roofs.needs(lambda: model[1](image))["flop"] > 0.05 * book["flop"]


@pytest.mark.parametrize("case", ["encoder", "joint"])
def test_nothing_else_is_an_operation_more_or_less(case):
    loop, _, job = contestants(case)
    batch = job["batches"].batch(0)
    assert roofs.needs(lambda: loop(1))["flop"] == roofs.needs(lambda: job["step"](batch))["flop"] > 0


@pytest.mark.parametrize(("case", "sizes"), [("gan", [3_576_704, 2_765_568]), ("encoder", [3_576_704, 4_395_976]),
                                             ("joint", [3_576_704, 4_395_976, 3_576_704])])
def test_the_plain_networks_have_the_works_number_of_parameters(case, sizes):
    work, own = CASES[case]
    model = work.plain(work.SETTINGS | {"stage": case}, None, None, CPU)[1]
    assert [sum(weight.numel() for weight in net.parameters()) for net in model] == sizes


@pytest.mark.parametrize("case", CASES)
def test_the_compiled_variant_compiles_every_network(case, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda net: compiled.append(net))
    work, own = CASES[case]
    own = work.SETTINGS | own
    job = work.book(own, SHAPES if case == "gan" else work.data(own), CPU, compiled=True)
    assert compiled == list(networks(job)) and len(compiled) == (3 if case == "joint" else 2)


# ------------------------------------------------------------------------------------------------ the plain loop's feed
@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_gives_every_image_once_an_epoch_on_the_books_scale(workers):
    (feed,) = celeba_gan.feeds({"workers": workers}, CPU).values()
    images = SHAPES[:9]
    batches, book = feed(images, 4), autoencoders.pixels(images)
    for _ in range(2):
        seen = torch.cat([next(batches) for _ in range(2)])
        assert seen.dtype == torch.float32 and seen.min() >= -1 and seen.max() <= 1
        same = (seen[:, None] - book[None]).abs().flatten(2).amax(2) < 1e-6
        assert same.sum(1).tolist() == [1] * 8 and same.sum(0).max() == 1       # 8 of 9 images, each once


def test_a_work_with_feeds_of_its_own_has_only_those(monkeypatch):
    own = celeba_gan.SETTINGS | CASES["gan"][1]
    plain = harness.Plain(celeba_gan, own, SHAPES, CPU)
    assert plain.feed == "DataLoader, image by image, no workers" and set(plain.feeding) == {plain.feed}
    assert plain.feeding[plain.feed] > 0
    assert harness.fed(celeba_gan, SHAPES, torch.device("meta")) is SHAPES        # not copied to the device


# ------------------------------------------------------------------------------------------------ a whole benchmark
house = small_benchmark.house


def run(name, *words):
    work, own = CASES[name]
    tiny = [f"--set={key}={value}" for key, value in own.items()]
    return command.main([f"celeba-{'gan' if work is celeba_gan else 'joint'}", *tiny, "--device", "cpu", "--seconds",
                         "0.05", "--repeats", "2", "--threads", "1", *words])


@pytest.mark.parametrize("case", ["gan", "joint"])
def test_both_are_measured_with_as_many_steps_of_every_contestant(case, house, monkeypatch):
    stepped, step = Counter(), torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: stepped.update([adam]) or step(adam))
    monkeypatch.setattr(celeba_gan, "data", lambda settings: SHAPES)
    assert run(case, "--variants=bf16,contiguous") == 0
    work, own = CASES[case]
    record = records.read(next((house / "runs" / "benchmarks").glob("*.json")))
    assert record["work"] == ("celeba-gan" if case == "gan" else "celeba-joint")
    assert record["settings"] == work.SETTINGS | own and record["metric"] == work.METRIC
    assert set(record["rows"]) == {"plain", "fit", "bf16", "contiguous"} and record["failed"] == {}
    assert (record["needed"]["plain"]["flop"] > record["needed"]["tf32"]["flop"]) == (case == "gan")
    adams = 2 if case == "gan" else 1
    each = 2 * (1 + record["steps_per_turn"]) + 2 * (1 + 1)         # turns and two short ones, each after one untimed
    assert [n for adam, n in stepped.items() if not adam.defaults["fused"]] == [each + 1] * adams      # one counted
    fused = [n for adam, n in stepped.items() if adam.defaults["fused"]]
    assert [n for n in fused if n > 2] == [each] * 3 * adams


def test_celeba_is_replaced_by_the_shapes_only_where_it_is_not_at_hand(monkeypatch):
    monkeypatch.setattr(command.data, "find", lambda name: None)
    assert command.settings_of("celeba-gan", celeba_gan.SETTINGS, {})["dataset"] == "shapes"
    assert command.settings_of("celeba-gan", celeba_gan.SETTINGS, {"dataset": "celeba"})["dataset"] == "celeba"
    monkeypatch.setattr(command.data, "find", lambda name: name == "celeba" and "there")
    assert command.settings_of("celeba-gan", celeba_gan.SETTINGS, {})["dataset"] == "celeba"


@pytest.mark.parametrize(("case", "word", "said"), [
    ("gan", "dataset=digits", "64x64 images in colour, got 'digits'"), ("gan", "workers=-1", "at least 0, got -1"),
    ("gan", "nz=0", "nz must be at least 1"), ("gan", "lr=0", "learning rate must be positive"),
    ("gan", "batch=5000", "between 1 and the 4096"), ("gan", "stage=joint", "celeba-gan has no setting 'stage'"),
    ("joint", "stage=gan", "stage must be encoder or joint, got 'gan'"), ("joint", "ndf=0", "ndf must be at least 1"),
    ("joint", "lr=-1", "learning rate must be positive"), ("joint", "workers=1", "has no setting 'workers'")])
def test_what_cannot_be_measured_is_said_in_one_line(case, word, said, house, capsys):
    assert run(case, f"--set={word}") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error


@pytest.mark.parametrize(("rate", "met"), [(666.0, False), (667.0, True)])
def test_the_joint_training_aims_at_a_million_steps_in_25_minutes_at_the_published_size(rate, met):
    row = {"ratio": {"median": 9.0}, "achieved": {"share": 0.9}, "steps_per_second": {"median": rate}}
    published = celeba_joint.SETTINGS | celeba_joint.CUDA
    (found,) = harness.judged(celeba_joint.AIMS, published, torch.device("cuda"), row)
    assert (found["what"], found["got"], found["met"]) == ("rate", rate, met)
    assert records.aim(found) == f"667 steps/s: {'met' if met else 'missed'}"
    assert harness.judged(celeba_joint.AIMS, published, CPU, row) == []
    assert harness.judged(celeba_joint.AIMS, celeba_joint.SETTINGS, torch.device("cuda"), row) == []
