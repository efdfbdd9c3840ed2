"""Symmetric learning: the work's networks, its steps, generation, and what the notebook asks for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib import data, hvae, symmetric, train

BOTH = pytest.mark.parametrize("encoder", hvae.ENCODERS)
DIGITS = data.load("digits", size=28)


def make(encoder="ladder", learning="symmetric", dataset="digits", width=4, lr=1e-3, seed=1):
    """A narrow model of the work with its step and state."""
    model = hvae.initialise(hvae.build(dataset, encoder, (5, 9), width, 60), train.generator(seed))
    step, state = symmetric.training(model, train.generator(seed + 1), learning, lr)
    return model, step, state


# ------------------------------------------------------------------------------------------------ the work's networks
def test_parameter_counts_are_the_works():
    """The published counts include the sigma of Fashion-MNIST and, for the reverse encoder, one scalar never used."""
    def count(*args):
        return sum(p.numel() for p in hvae.build(*args).parameters())
    assert count("mnist", "ladder") == 3_020_143
    assert count("mnist", "reverse") == 3_080_744 - 1
    assert count("fashionmnist", "ladder") == 5_172_543 + 1


@pytest.mark.parametrize("dataset", ["mnist", "fashionmnist"])
def test_the_spatial_sizes_are_the_works(dataset):
    model, x = hvae.build(dataset, "ladder", width=2), torch.rand(1, 1, 28, 28)
    sizes = []
    for layer in model.encoder.trunk[:-1]:
        x = layer(x)
        sizes += [x.shape[-1]] * isinstance(layer, nn.Conv2d)
    assert sizes == [28, 27, 13, 11, 9, 4, 1]
    x, sizes = torch.rand(1, 100), []
    for layer in model.decoder:
        x = layer(x)
        sizes += [x.shape[-1]] * isinstance(layer, nn.ConvTranspose2d | nn.Conv2d)
    assert sizes == [4, 9, 11, 13, 27, 28, 28]
    assert type(model.decoder[2]) is (nn.ReLU if dataset == "fashionmnist" else hvae.Tanh)


def test_the_faster_layers_are_the_layers_they_stand_for():
    x = torch.randn(6, 8, 4, 4, dtype=torch.float64, generator=train.generator(1)).requires_grad_()
    torch.testing.assert_close(hvae.Tanh()(x), torch.tanh(x), atol=1e-12, rtol=0)
    tanh = hvae.Tanh()(x.float())
    assert (tanh - torch.tanh(x.float())).abs().max() < 3e-7
    for fast, plain, given in ((hvae.FullConv2d(8, 5, 4), nn.Conv2d(8, 5, 4), x),
                               (hvae.FullConvTranspose2d(8, 5, 4), nn.ConvTranspose2d(8, 5, 4), x[:, :, :1, :1])):
        fast.double(), plain.double().load_state_dict(fast.state_dict())
        for layer in (fast, fast.to(memory_format=torch.channels_last)):
            own, expected = layer(given), plain(given)
            torch.testing.assert_close(own, expected)
            gradients = (torch.autograd.grad(y.square().sum(), [given, *layer_.parameters()]) for y, layer_ in
                         ((own, layer), (expected, plain)))
            torch.testing.assert_close(*gradients)


def test_initial_weights_are_pytorchs_and_depend_on_the_generator_only():
    model, again = (make(seed=3)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    torch.manual_seed(0)
    for name, parameter in hvae.build("digits", "ladder", (5, 9), 4, 60).named_parameters():    # PyTorch's own
        own = model.get_parameter(name)
        assert own.numel() < 100 or own.std().item() == pytest.approx(parameter.std().item(), rel=0.15), name


# ------------------------------------------------------------------------------------------------ steps
@BOTH
def test_the_symmetric_step_is_two_adam_steps_on_the_two_likelihoods(encoder):
    """Replayed with the same noise by plain autograd and an unfused Adam, nothing shared, nothing reused."""
    model, step, _ = make(encoder)
    plain = hvae.build("digits", encoder, (5, 9), 4, 60)
    plain.load_state_dict(model.state_dict())
    noise, batch = train.generator(2), DIGITS.train[:8]
    metrics = step(batch)

    x = symmetric.observed(batch, False, noise)
    z0, z1 = (z.detach() for z in plain.draw_q(plain.encoder(torch.cat([x, plain.chain])), noise)[:2])
    p_adam = torch.optim.Adam([*plain.prior.parameters(), *plain.decoder.parameters()], lr=1e-3)
    logits, output = plain.prior(z0[:8]), plain.decoder(z1[:8])
    p_z1 = F.binary_cross_entropy_with_logits(logits, z1[:8], reduction="sum") / 8
    p_x = F.binary_cross_entropy_with_logits(output, x, reduction="sum") / 8
    (p_z1 + p_x).backward()
    p_adam.step()
    own_z0, own_z1, _ = (z.detach() for z in plain.draw_z(8, noise))
    drawn = plain.draw_x(plain.decoder(torch.cat([own_z1, z1[8:]])), noise)
    own_x, chain = drawn[:8].detach(), drawn[8:]
    q_adam = torch.optim.Adam(plain.encoder.parameters(), lr=1e-3)
    if encoder == "ladder":
        logits0, extra = plain.encoder(own_x)
        logits1 = plain.prior(own_z0).detach() + extra
    else:
        logits0, logits1 = plain.encoder.to_z0(own_z1), plain.encoder(own_x)[0]
    q_z0 = F.binary_cross_entropy_with_logits(logits0, own_z0, reduction="sum") / 8
    q_z1 = F.binary_cross_entropy_with_logits(logits1, own_z1, reduction="sum") / 8
    q_adam.zero_grad()
    (q_z0 + q_z1).backward()
    q_adam.step()

    for name, value in {"p_x": p_x / 784, "p_z1": p_z1 / 9, "q_z0": q_z0 / 5, "q_z1": q_z1 / 9}.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-5)
    assert torch.equal(model.chain, chain)
    for (name, own), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (own - other).abs().max() < 2e-4, name        # a step is 1e-3; Adam amplifies gradients near 0


def test_the_q_step_leaves_p_alone():
    model, _, state = make("ladder")
    x = symmetric.images(DIGITS.train[:8], False)
    z0, z1, prior = model.draw_z(8, train.generator(1))
    sum(loss.mean() for loss in symmetric.q_loss(model, model.encoder(x), z0, z1, model.prior(z0))).backward()
    assert all(p.grad is None for p in model.generative())
    assert all(p.grad is not None for p in model.encoder.parameters())
    assert {id(p) for p in model.parameters()} == {id(p) for name in ("p_optimizer", "q_optimizer")
                                                   for group in state[name].param_groups for p in group["params"]}


@BOTH
@pytest.mark.parametrize("learning", symmetric.LEARNING)
@pytest.mark.parametrize("dataset", ["digits", "fashionmnist"])
def test_learning_lowers_its_losses(encoder, learning, dataset):
    model, step, state = make(encoder, learning, dataset, width=4)
    history = train.fit(step, train.Shuffled(DIGITS.train, 32, 1), steps=30, state=state, config={}, log_every=10)
    assert history["loss"][-1] < history["loss"][0] - 15
    assert set(history) >= {"step", "loss", "mi_p_z1", "mi_q_z0", "mi_q_z1"} | ({"sigma"} if model.gaussian else set())
    assert history["mi_q_z1"][-1] > 0


def test_elbo_trains_p_and_q_with_one_adam():
    model, step, state = make("ladder", "elbo")
    before = [p.clone() for p in model.parameters()]
    step(DIGITS.train[:16])
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert sorted(state) == ["generator", "model", "optimizer"]


def test_running_statistics_are_exponential_means_of_the_works_estimate():
    model = make()[0]
    mean, mi = torch.full((9,), 0.5), torch.zeros(9)
    for seed in range(3):
        logits = 3 * torch.randn(20, 9, generator=train.generator(seed))
        symmetric._track(model, "q_z1", logits)
        p = logits.sigmoid()
        mean = 0.99 * mean + 0.01 * p.mean(0)

        def entropy(p):
            return -p * torch.log2(p) - (1 - p) * torch.log2(1 - p)
        mi = 0.99 * mi + 0.01 * (entropy(mean) - entropy(p).mean(0))
    torch.testing.assert_close(model.mean_q_z1, mean)
    torch.testing.assert_close(model.mi_q_z1, mi, atol=1e-6, rtol=1e-4)


def test_observations_are_binarised_or_noisy():
    batch = torch.tensor([111, 112], dtype=torch.uint8).repeat(50_000).view(100, 1, 1, -1)
    assert symmetric.images(batch, False).flatten()[:2].tolist() == [0.0, 1.0]              # 112 / 255 > 0.4375
    flipped = (symmetric.observed(batch, False, train.generator(1)) != symmetric.images(batch, False)).double().mean()
    assert flipped.item() == pytest.approx(0.001, abs=4 * (0.001 / 100_000) ** 0.5)
    noise = symmetric.observed(batch, True, train.generator(1)) - batch / 255
    assert noise.std().item() == pytest.approx(0.01, rel=0.02) and abs(noise.mean().item()) < 2e-4


# ------------------------------------------------------------------------------------------------ generation
@BOTH
def test_the_limiting_images_are_those_of_so_many_sweeps_and_one_more_encode_decode(encoder):
    model, found = make(encoder)[0], symmetric.limiting(make(encoder)[0], 6, [0, 2], train.generator(1), hard=False)
    noise = train.generator(1)
    x = symmetric._start(model, 6, noise)
    for _ in range(2):
        x = symmetric.sweep(model, x, noise)
    last = model.picture(model.decode(model.draw_q(model.encoder(x), noise)[1]), hard=False)
    assert torch.equal(found[2], symmetric.as_bytes(last))


@BOTH
@pytest.mark.parametrize("dataset", ["digits", "fashionmnist"])
def test_generated_images_are_pictures_and_follow_from_the_seed(encoder, dataset):
    model = make(encoder, dataset=dataset)[0]
    with torch.no_grad():                                   # as drawn at first, the decoder hardly looks at its code
        for layer in model.decoder:
            if isinstance(layer, nn.ConvTranspose2d):
                layer.weight.mul_(5), layer.bias.zero_()
        model.decoder[-1].bias.zero_()
    first, again = (symmetric.random_code(model, 7, train.generator(1)) for _ in range(2))
    assert first.shape == (7, 1, 28, 28) and torch.equal(first, again)
    found = symmetric.limiting(model, 7, [0, 3], train.generator(1))
    assert list(found) == [0, 3] and found[3].shape == (7, 1, 28, 28) and not torch.equal(found[0], found[3])
    assert found[3].dtype == torch.uint8 and 0 <= first.min() and first.max() <= 1
    if dataset != "fashionmnist":
        assert set(first.unique().tolist()) <= {0.0, 1.0} and set(found[0].unique().tolist()) <= {0, 255}


def test_reconstructions_stand_beside_what_the_model_sees():
    pair = symmetric.reconstruct(make()[0], DIGITS.test[:5], train.generator(1))
    assert pair.shape == (5, 2, 1, 28, 28)
    assert torch.equal(pair[:, 0], (DIGITS.test[:5] > 111).float())


def test_pictures_become_bytes_as_in_a_file():
    assert symmetric.as_bytes(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 128, 255]


# ------------------------------------------------------------------------------------------------ the notebook's pieces
PARAMETERS = {"dataset": "digits", "encoder": "reverse", "learning": "symmetric", "z0_bits": 5, "z1_bits": 9,
              "width": 2, "batch_size": 16, "lr": 1e-3, "held_out": True, "seed": 3, "precision": "tf32",
              "compiled": False}


def test_held_out_images_are_neither_learnt_from_nor_missing():
    learnt, compared = symmetric.split(DIGITS, True)
    assert learnt is DIGITS.train and compared is DIGITS.test
    learnt, compared = symmetric.split(DIGITS, False)
    assert len(learnt) == 1797 and torch.equal(learnt, compared)


def test_a_replica_is_what_its_parameters_say():
    one, again, other = (symmetric.replica(PARAMETERS | {"seed": seed}, DIGITS.train, torch.device("cpu"))
                         for seed in (3, 3, 4))
    assert set(one["config"]) == set(symmetric.LEARNT_FROM) and one["config"]["seed"] == 3
    histories = train.fit_together([one, other], steps=4, log_every=2)
    assert histories[0] == train.fit(**again, steps=4, log_every=2) and histories[0] != histories[1]


def test_a_compiled_model_is_the_same_model():
    """Whether a compiler is there is not this test's matter: `eager` compiles to the same calls."""
    one, other = (symmetric.replica(PARAMETERS, DIGITS.train, torch.device("cpu")) for _ in range(2))
    for part in (one["state"]["model"].encoder.trunk, one["state"]["model"].decoder):
        part.compile(backend="eager")
    histories = [train.fit(**each, steps=3, log_every=1) for each in (one, other)]
    assert histories[0]["loss"] == pytest.approx(histories[1]["loss"], rel=1e-5)
    assert list(one["state"]["model"].state_dict()) == list(other["state"]["model"].state_dict())


def test_measuring_gives_every_metric_of_the_tables_and_a_perfect_generator_has_the_distance_of_a_sample(monkeypatch):
    judge = symmetric.judge(DIGITS, torch.device("cpu"))
    assert judge.threshold == symmetric.THRESHOLD
    model = symmetric.replica(PARAMETERS, DIGITS.train, torch.device("cpu"))["state"]["model"]
    target = symmetric.known(DIGITS.test, DIGITS, judge, torch.device("cpu"))
    metrics, pictures, told = symmetric.measure(model, DIGITS, target, judge, 100, 2, train.generator(1))
    assert set(metrics) == {*symmetric.METRICS, "rec", "kl", "mi_p_z1", "classifier_accuracy", "cfd_after_0",
                            "cfd_after_1"} - {"fid_random_code", "fid_limiting"}
    assert {name: p.shape for name, p in pictures.items()} == dict.fromkeys(["random_code", "limiting"],
                                                                            (100, 1, 28, 28))
    assert target["images"].shape == (360, 1, 28, 28) and set(target["images"].unique().tolist()) == {0, 255}
    assert {name: len(mi) for name, mi in told.items()} == {"p_z1": 9, "q_z0": 5, "q_z1": 9}
    same = DIGITS.test[torch.randperm(360, generator=train.generator(2))] / 255
    monkeypatch.setattr(symmetric, "random_code", lambda *_: same)
    perfect = symmetric.measure(model, DIGITS, target, judge, 100, 2, train.generator(1))[0]
    assert abs(perfect["cfd_random_code"]["value"]) < 1e-6 < metrics["cfd_random_code"]["value"]


def test_the_way_to_the_limiting_distribution_is_looked_at_more_often_at_its_start():
    assert symmetric.milestones(20) == [0, 1, 2, 5, 10, 20] and symmetric.milestones(1000)[-2:] == [500, 1000]
    metric = {"value": 1.0, "se": 0.1, "n": 2, "unit": "CFD"}
    own = {"dataset": "mnist", "encoder": "ladder", "learning": "elbo", "held_out": True, "sweeps": 20, "steps": 9,
           "batch_size": 2, "precision": "tf32"}
    found = {"cfd_after_0": metric, "cfd_limiting": metric | {"value": 2.0}, "elbo": metric}
    one, smaller = {"parameters": own, "metrics": found}, {"parameters": own | {"steps": 8}, "metrics": {}}
    assert symmetric.sweeps_of([smaller, one]) == {"mnist, ladder, elbo, held out": {0: metric,
                                                                                  20: metric | {"value": 2.0}}}
    other = {"parameters": own, "metrics": found | {"cfd_after_0": metric | {"value": 4.0}}}
    (curve,) = symmetric.sweeps_of([one, other]).values()
    assert curve[0] == {"value": 2.5, "se": pytest.approx(1.5), "n": 2, "unit": "CFD"} and curve[20]["value"] == 2.0


# ------------------------------------------------------------------------------------------------ complaints
@pytest.mark.parametrize(("change", "says"), [
    ({"encoder": "rverse"}, "unknown encoder 'rverse': use ladder, reverse"),
    ({"precision": "fp16"}, "use fp32, tf32, bf16"),
    ({"learning": "vae"}, "use symmetric, elbo"), ({"n_generated": 1}, "n_generated must be at least 2, got 1"),
    ({"sweeps": -1}, "sweeps must be at least 0"), ({"width": 0}, "width must be at least 1"),
    ({"lr": 0.0}, "positive"), ({"z1_bits": 0}, "z1_bits must be at least 1"),
    ({"replicas": 0}, "replicas must be at least 1")])
def test_bad_parameters_are_refused_before_anything_is_trained(change, says):
    good = PARAMETERS | {"steps": 1, "log_every": 0, "n_generated": 2, "sweeps": 0, "replicas": 1}
    symmetric.check(good, DIGITS.train[0])
    with pytest.raises(ValueError, match=says):
        symmetric.check(good | change, DIGITS.train[0])
    with pytest.raises(ValueError, match="grey images of 28x28 pixels, shapes has 3 x 28 x 28"):
        symmetric.check(good | {"dataset": "shapes"}, torch.zeros(3, 28, 28))


@pytest.mark.parametrize(("call", "says"), [
    (lambda: hvae.build("mnist", "ladders"), "unknown encoder 'ladders': use ladder or reverse"),
    (lambda: hvae.build("mnist", "ladder", (0, 100)), "at least one bit"),
    (lambda: symmetric.training(make()[0], train.generator(1), "vae"), "unknown learning 'vae': use symmetric or elbo"),
    (lambda: symmetric.training(make()[0], train.generator(1), lr=0.0), "learning rate must be positive"),
    (lambda: symmetric.limiting(make()[0], 3, [], train.generator(1)), "at least one number of sweeps"),
    (lambda: symmetric.limiting(make()[0], 3, [-1], train.generator(1)), "none negative"),
])
def test_bad_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
