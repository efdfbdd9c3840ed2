"""The GAN as ground truth: its networks, and its three steps against naive loops in float64."""
import copy
import math

import pytest
import small_gan
import torch
from small_gan import NDF, NGF, NZ, faces, networks, plain_discriminator, plain_encoder, plain_generator
from small_vamp import within
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from lib import dcgan, gandistance
from lib.autoencoders import pixels
from lib.train import generator

SIGMA = 0.05


# ------------------------------------------------------------------------------------------------ networks
def test_parameter_counts_shapes_and_ranges_are_the_works():
    nets = dcgan.Generator(), dcgan.Discriminator(), dcgan.Encoder()
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [3_576_704, 2_765_568, 4_395_976]
    net, discriminator, encoder = (dcgan.initialise(each, generator(1)) for each in nets)
    x = net(5 * torch.randn(3, 100, generator=generator(1)))
    assert x.shape == (3, 3, 64, 64) and x.dtype == torch.float32 and -1 <= x.min() < -0.01 < 0.01 < x.max() <= 1
    assert discriminator(x).shape == (3,) and [part.shape for part in encoder(x)] == [(3, 100), (3, 100)]
    assert [part.shape for part in encoder(x[:1])] == [(1, 100), (1, 100)] and discriminator(x[:1]).shape == (1,)


@pytest.mark.parametrize("training", [True, False])
def test_networks_compute_what_the_plain_ones_do(training):
    net, discriminator, encoder = (each.train(training) for each in networks())
    plain = plain_generator(net), plain_discriminator(discriminator), plain_encoder(encoder)
    z = torch.randn(5, NZ, generator=generator(1))
    x = net(z)
    assert x.std() > 0.1
    torch.testing.assert_close(x.double(), plain[0](z.double()[:, :, None, None]), rtol=1e-4, atol=1e-5)
    p = discriminator(x).sigmoid()
    assert p.std() > 0.005
    torch.testing.assert_close(p.double(), plain[1](x.double()).flatten(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(encoder(x), 1).double(), plain[2](x.double()).flatten(1), rtol=1e-4, atol=1e-4)
    for own, other in zip((net, discriminator, encoder), plain, strict=True):
        small_gan.assert_close(own, other, 1e-4, 1e-5)                    # the running statistics too


def test_initial_weights_have_the_works_deviations_and_depend_on_the_generator_only():
    first, second, other = (dcgan.initialise(dcgan.Encoder(8, 16), generator(seed)) for seed in (1, 1, 2))
    convolutions = [part for part in first.modules() if isinstance(part, nn.Conv2d)]
    norms = [part for part in first.modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(convolutions) == 5 and len(norms) == 3
    for part in convolutions:
        assert abs(part.weight.mean()) < 0.003 and part.weight.std().item() == pytest.approx(0.02, rel=0.1)
    drawn = torch.cat([part.weight for part in norms])
    assert drawn.mean().item() == pytest.approx(1, abs=0.006) and drawn.std().item() == pytest.approx(0.02, rel=0.2)
    assert all(part.bias.eq(0).all() for part in [*norms, convolutions[-1]])
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert not torch.equal(first.head.weight, other.head.weight)
    deconvolutions = [part.weight for part in dcgan.initialise(dcgan.Generator(8, 8), generator(1)).modules()
                      if isinstance(part, nn.ConvTranspose2d)]
    assert len(deconvolutions) == 5 and all(w.std().item() == pytest.approx(0.02, rel=0.1) for w in deconvolutions)


def test_a_last_layer_of_zeros_starts_q_at_the_prior_and_leaves_the_rest_as_it_was():
    normal, zero = (dcgan.initialise(dcgan.Encoder(NZ, NDF), generator(1), last) for last in ("normal", "zero"))
    x = pixels(faces().train[:3])
    assert all(part.eq(0).all() for part in zero(x)) and not any(part.eq(0).any() for part in normal(x))
    assert all(map(torch.equal, normal.trunk.parameters(), zero.trunk.parameters()))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: dcgan.initialise(dcgan.Encoder(NZ, NDF), generator(1), "zeros"), "unknown last_layer 'zeros': use one of"),
    (lambda: dcgan.Generator(0, 2), "nz must be at least 1, got 0"),
    (lambda: dcgan.Generator(2, 0), "ngf must be at least 1, got 0"),
    (lambda: dcgan.Discriminator(0), "ndf must be at least 1, got 0"),
    (lambda: dcgan.Encoder(0, 2), "nz must be at least 1, got 0"),
    (lambda: dcgan.Encoder(2, -1), "ndf must be at least 1, got -1"),
    (lambda: small_gan.steps("gan", lr=0.0), "learning rate must be positive, got 0.0"),
    (lambda: small_gan.steps("encoder", lr=-1.0), "learning rate must be positive, got -1.0"),
    (lambda: small_gan.steps("joint", lr=0.0), "learning rate must be positive, got 0.0"),
    (lambda: dcgan.generate(networks()[0], torch.zeros(1, NZ), "batch"), "unknown norm 'batch': use one of running")])
def test_wrong_arguments_are_clear_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------ the GAN's step
def naive_gan(net, discriminator, batches, lr, seed):
    """Plain copies of both networks after the original's loop, its values, the discriminator's last own gradient."""
    net, discriminator = plain_generator(net), plain_discriminator(discriminator)
    cross_entropy, noise, values = nn.BCELoss(), generator(seed), []
    optimizers = [torch.optim.Adam(own.parameters(), lr, betas=(0.5, 0.999)) for own in (discriminator, net)]
    one, zero = torch.ones(len(batches[0])).double(), torch.zeros(len(batches[0])).double()
    for batch in batches:
        discriminator.zero_grad()
        real = discriminator(batch.double() / 127.5 - 1).flatten()
        loss_real = cross_entropy(real, one)
        loss_real.backward()
        fake = net(torch.randn(len(batch), NZ, generator=noise).double()[:, :, None, None])
        score = discriminator(fake.detach()).flatten()
        loss_fake = cross_entropy(score, zero)
        loss_fake.backward()
        gradients = [p.grad.clone() for p in discriminator.parameters()]
        optimizers[0].step()
        net.zero_grad()
        after = discriminator(fake).flatten()
        loss_g = cross_entropy(after, one)
        loss_g.backward()
        optimizers[1].step()
        values.append({"loss_d": loss_real + loss_fake, "loss_g": loss_g, "d_real": real.mean(), "d_fake": score.mean(),
                       "d_fake_after": after.mean()})
    return net, discriminator, values, gradients


def test_the_gan_step_is_the_originals_loop():
    """Three steps, so that Adam's second beta and what each update sees of the other show."""
    job, batches = small_gan.steps("gan"), faces().train[:12].split(4)
    net, discriminator = job["state"]["generator"], job["state"]["discriminator"]
    start = [p.detach().clone() for p in (*net.parameters(), *discriminator.parameters())]
    plain_net, plain_judge, values, gradients = naive_gan(net, discriminator, batches, 2e-3, 1)
    for batch, expected in zip(batches, values, strict=True):
        found = job["step"](batch)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].item() == pytest.approx(value.item(), rel=1e-4), name
    small_gan.assert_close(net, plain_net)                    # a step moves a weight by 2e-3
    small_gan.assert_close(discriminator, plain_judge)
    moved = [(a - b).abs().max() for a, b in zip(start, (*net.parameters(), *discriminator.parameters()), strict=True)]
    assert min(moved) > 1e-3
    counts = [{int(part.num_batches_tracked) for part in own.modules() if isinstance(part, nn.BatchNorm2d)}
              for own in (net, discriminator)]
    assert counts == [{3}, {9}] and int(job["state"]["clock"].steps) == 3
    for own, expected in zip(discriminator.parameters(), gradients, strict=True):      # none of the generator's update
        assert own.requires_grad
        torch.testing.assert_close(own.grad.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_real_and_generated_images_are_normalised_apart():
    job, batch = small_gan.steps("gan"), faces().train[:4]
    net, judge = (copy.deepcopy(job["state"][name]).train() for name in ("generator", "discriminator"))
    both = torch.cat([pixels(batch), net(torch.randn(4, NZ, generator=generator(1)))])
    together = judge(both).detach().split(4)
    apart = [judge(part).detach() for part in both.split(4)]
    values = job["step"](batch)
    expected = [(-torch.log(real.sigmoid()) - torch.log(1 - fake.sigmoid())).mean().item()
                for real, fake in (apart, together)]
    assert values["loss_d"].item() == pytest.approx(expected[0], rel=1e-5) and abs(expected[0] - expected[1]) > 1e-3


def test_the_losses_are_safe_where_a_probability_is_0_or_1():
    job = small_gan.steps("gan")
    with torch.no_grad():
        job["state"]["discriminator"].score.weight.mul_(1e4)
    values = job["step"](faces().train[:4])
    assert all(value.isfinite() for value in values.values())
    assert max(values["loss_d"], values["loss_g"]) > 200                  # BCELoss ends at 100


# ------------------------------------------------------------------------------------------------ the other two steps
def test_pairs_are_drawn_from_the_ground_truth():
    truth = dcgan.frozen(networks()[0])
    z, x = dcgan.draw(truth, 40, generator(1), 0.3)
    assert z.shape == (40, NZ) and x.shape == (40, 3, 64, 64) and x.abs().max() > 1        # not clipped
    noise = (x - truth(z)).flatten() / 0.3
    assert within(noise, 0) and within(noise.square(), 1) and within(z.flatten(), 0) and within(z.square().flatten(), 1)
    assert not x.requires_grad and abs(noise[:-1] @ noise[1:]) / len(noise) < 0.01
    torch.testing.assert_close(dcgan.draw(truth, 40, generator(1))[1] - truth(z), SIGMA / 0.3 * (x - truth(z)),
                               rtol=1e-3, atol=1e-5)


def snapshot(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_unchanged(net, before):
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net.training and not any(p.requires_grad or p.grad is not None for p in net.parameters())


def test_the_encoders_step_maximises_the_log_density_of_the_code():
    job = small_gan.steps("encoder")
    truth, encoder = job["state"]["truth"], job["state"]["encoder"]
    before, plain, noise = snapshot(truth), plain_encoder(encoder), generator(1)
    optimizer = torch.optim.Adam(plain.parameters(), 2e-3, betas=(0.5, 0.999))
    for _ in range(3):
        z, x = dcgan.draw(truth, 4, noise)
        mean, log_sigma = plain(x.double()).flatten(1).split(NZ, 1)
        loss = -Independent(Normal(mean, log_sigma.exp()), 1).log_prob(z.double()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found = job["step"](torch.empty(4, 0))
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
        assert found["error"].item() == pytest.approx((z - mean).square().mean().item(), rel=1e-4)
        assert found["sigma"].item() == pytest.approx(log_sigma.exp().mean().item(), rel=1e-4)
    small_gan.assert_close(encoder, plain)
    assert_unchanged(truth, before)
    assert int(job["state"]["clock"].steps) == 3


def test_the_joint_step_maximises_the_elbo_in_both_networks():
    """One draw of z, the KL in closed form, both networks normalised by their batch; the truth stays as it is."""
    job = small_gan.steps("joint")
    truth, encoder, decoder = (job["state"][name] for name in ("truth", "encoder", "decoder"))
    before, plain, plain_decoder = snapshot(truth), plain_encoder(encoder), plain_generator(decoder)
    assert plain.training and plain_decoder.training
    optimizer = torch.optim.Adam([*plain.parameters(), *plain_decoder.parameters()], 2e-3, betas=(0.5, 0.999))
    noise = generator(1)
    for _ in range(3):
        x = dcgan.draw(truth, 4, noise)[1].double()
        mean, log_sigma = plain(x).flatten(1).split(NZ, 1)
        z = mean + log_sigma.exp() * torch.randn(4, NZ, generator=noise).double()
        rec = Independent(Normal(plain_decoder(z[:, :, None, None]), SIGMA), 3).log_prob(x).mean()
        prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
        kl = kl_divergence(Normal(mean, log_sigma.exp()), prior).sum(1).mean()
        optimizer.zero_grad()
        (kl - rec).backward()
        optimizer.step()
        found = job["step"](torch.empty(4, 0))
        for name, value in {"loss": kl - rec, "rec": rec, "kl": kl}.items():
            assert found[name].item() == pytest.approx(value.item(), rel=1e-4), name
    small_gan.assert_close(encoder, plain)
    small_gan.assert_close(decoder, plain_decoder)
    assert_unchanged(truth, before)
    drift = max((value - before[name]).abs().max().item() for name, value in decoder.named_parameters())
    assert 5e-3 < drift < 7e-3                                            # the copy left, three steps far


def test_the_elbos_terms_are_the_distributions_own():
    _, _, encoder = networks()
    decoder, x = networks(2)[0].eval(), pixels(faces().train[:6])
    decoded, rec, kl, mean, log_sigma = dcgan.elbo_terms(encoder.eval(), decoder, x, generator(3), 0.2)
    q = Normal(*(part.double() for part in (mean, log_sigma.exp())))
    z = q.mean + q.stddev * torch.randn(6, NZ, generator=generator(3)).double()
    expected = plain_generator(decoder)(z[:, :, None, None])
    torch.testing.assert_close(decoded.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rec.double(), Normal(expected, 0.2).log_prob(x.double()).flatten(1).sum(1), rtol=1e-5,
                               atol=1e-3)
    torch.testing.assert_close(kl.double(), kl_divergence(q, Normal(0.0, 1.0)).sum(1), rtol=1e-5, atol=1e-5)


def test_running_means_are_those_of_a_plain_loop():
    running, noise = dcgan.Running(2, rate=0.9), generator(1)
    elbo, first, second = None, [0.0, 0.0], [1.0, 1.0]
    for _ in range(6):
        values, mean, log_sigma = (torch.randn(*shape, generator=noise) for shape in ((5,), (5, 2), (5, 2)))
        found = running.update(values, mean, log_sigma)
        now = sum(values.tolist()) / 5
        elbo = now if elbo is None else 0.9 * elbo + 0.1 * now
        for i in range(2):
            column, spread = mean[:, i].tolist(), log_sigma[:, i].tolist()
            first[i] = 0.9 * first[i] + 0.1 * sum(column) / 5
            second[i] = 0.9 * second[i] + 0.1 * sum(m * m + math.exp(2 * s)
                                                    for m, s in zip(column, spread, strict=True)) / 5
        assert found["elbo_running"].item() == pytest.approx(elbo, rel=1e-5)
        assert found["moment_1"].item() == pytest.approx(math.sqrt((first[0] ** 2 + first[1] ** 2) / 2), rel=1e-5)
        assert found["moment_2"].item() == pytest.approx(sum(second) / 2, rel=1e-5)
    assert dcgan.Running(2).rate == 0.999


def test_the_joint_step_tracks_its_own_elbo_and_moments():
    job, elbo = small_gan.steps("joint"), None
    for _ in range(3):
        found = job["step"](torch.empty(4, 0))
        now = -found["loss"].item()
        elbo = now if elbo is None else 0.999 * elbo + 0.001 * now
        assert found["elbo_running"].item() == pytest.approx(elbo, rel=1e-6)
        assert found["rec"].item() - found["kl"].item() == pytest.approx(now, rel=1e-6)
    assert 0 < found["moment_1"] < 0.1 and 0 < abs(found["moment_2"] - 1) < 0.5


# ------------------------------------------------------------------------------------------------ looking
def test_batch_1_is_training_mode_at_batch_size_1_and_leaves_no_trace():
    for net, shape in zip(networks(), ((5, NZ), (5, 3, 64, 64), (5, 3, 64, 64)), strict=True):
        net.train()
        x, before = torch.randn(*shape, generator=generator(1)), snapshot(net)
        single, hooks = copy.deepcopy(net), {part: len(part._forward_hooks) for part in net.modules()}
        as_one = lambda found: torch.cat(found, 1) if isinstance(found, tuple) else found          # noqa: E731
        with torch.no_grad():
            expected = torch.cat([as_one(single(part)) for part in x.split(1)])
            with dcgan.normalised("batch-1", net):
                found = as_one(net(x))
            with dcgan.normalised("running", net):
                evaluated = as_one(net(x))
            torch.testing.assert_close(evaluated, as_one(copy.deepcopy(net).eval()(x)), rtol=0, atol=0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found - evaluated).abs().max() > 0.01
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()) and net.training
        assert hooks == {part: len(part._forward_hooks) for part in net.modules()}


@pytest.mark.parametrize("training", [True, False])
def test_after_an_exception_modes_are_restored_and_hooks_gone(training):
    net, _, encoder = networks()
    net.train(training), encoder.train(not training)
    with pytest.raises(KeyError), dcgan.normalised("batch-1", net, encoder):
        assert not net.training and not encoder.training
        raise KeyError
    assert net.training == training and encoder.training != training
    assert all(part.training == training and not part._forward_hooks for part in net.modules())


@pytest.mark.parametrize("norm", dcgan.NORMS)
def test_generated_images_do_not_depend_on_the_batches_they_are_made_in(norm):
    net, z = networks()[0].train(), torch.randn(7, NZ, generator=generator(1))
    whole, parts = (dcgan.generate(net, z, norm, batch_size=size) for size in (7, 3))
    torch.testing.assert_close(parts, whole)
    plain = plain_generator(net)
    codes = z.double()[:, :, None, None]
    expected = plain.eval()(codes) if norm == "running" else torch.cat([plain.train()(one) for one in codes.split(1)])
    torch.testing.assert_close(whole.double(), expected, rtol=1e-4, atol=1e-5)
    assert net.training and not whole.requires_grad


def test_images_are_rounded_clipped_and_with_noise_spread():
    x = torch.tensor([-1.5, -1, -0.5, 0.0, 0.5, 1, 1.5])
    assert dcgan.to_uint8(x).tolist() == [0, 0, 64, 128, 191, 255, 255]   # 63.75, 127.5 (to even), 191.25
    noisy = dcgan.to_uint8(torch.full((4, 3, 64, 64), 0.2), generator(1), 0.1).float() / 127.5 - 1
    assert noisy.std().item() == pytest.approx(0.1, rel=0.02) and noisy.mean().item() == pytest.approx(0.2, abs=0.002)
    same = dcgan.to_uint8(torch.zeros(1, 3, 64, 64), generator(1))
    assert torch.equal(same, dcgan.to_uint8(SIGMA * torch.randn(1, 3, 64, 64, generator=generator(1))))


# ------------------------------------------------------------------------------------------------ likelihoods
def test_the_ceiling_is_the_mean_log_density_of_drawn_images():
    truth = dcgan.frozen(networks()[0])
    z, x = dcgan.draw(truth, 300, generator(1), 0.1)
    density = Independent(Normal(truth(z).double(), 0.1), 3).log_prob(x.double())
    assert within(density, gandistance.ceiling(0.1)) and not within(density, gandistance.ceiling(0.101))


def test_no_elbo_passes_the_ceiling_and_where_images_tell_nothing_the_prior_reaches_it():
    truth, _, encoder = networks()
    assert gandistance.terms(truth, encoder, truth, 260, generator(1))["elbo"].mean() < gandistance.ceiling() - 100
    blind, prior = dcgan.Generator(NZ, NGF), dcgan.initialise(dcgan.Encoder(NZ, NDF), generator(1), "zero")
    blind.load_state_dict({name: torch.zeros_like(value) if value.is_floating_point() else value
                           for name, value in blind.state_dict().items()})
    found = gandistance.terms(blind, prior, blind, 260, generator(1))
    assert within(found["elbo"], gandistance.ceiling()) and found["kl"].eq(0).all() and found["mse"].eq(0).all()
    assert within(found["code_error"], 1) and within(found["log_q"], -0.5 * NZ * (1 + math.log(2 * math.pi)))
    assert torch.equal(found["elbo"], found["rec"]) and {len(value) for value in found.values()} == {260}


def test_terms_are_the_distributions_own_whatever_mode_the_networks_are_in():
    truth, _, encoder = networks()
    decoder, before = networks(2)[0].train(), snapshot(encoder.train())
    found = gandistance.terms(truth, encoder, decoder, 6, generator(3), 0.2)
    assert encoder.training and all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    noise = generator(3)
    z, x = dcgan.draw(truth.eval(), 6, noise, 0.2)
    mean, log_sigma = plain_encoder(encoder).eval()(x.double()).flatten(1).split(NZ, 1)
    q = Normal(mean, log_sigma.exp())
    drawn = (mean + log_sigma.exp() * torch.randn(6, NZ, generator=noise).double())[:, :, None, None]
    decoded = plain_generator(decoder).eval()(drawn)
    rec = Normal(decoded, 0.2).log_prob(x.double()).flatten(1).sum(1)
    kl = kl_divergence(q, Normal(0.0, 1.0)).sum(1)
    noiseless = plain_generator(truth).eval()(z.double()[:, :, None, None])
    expected = {"elbo": rec - kl, "rec": rec, "kl": kl, "log_q": q.log_prob(z.double()).sum(1),
                "mse": (decoded - noiseless).square().mean((1, 2, 3)), "code_error": (z - mean).square().mean(1)}
    assert found.keys() == expected.keys() <= gandistance.UNITS.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-3, atol=1e-4)


def test_all_pairs_see_the_same_images(monkeypatch):
    """In the second batch too, before which the pairs have drawn codes."""
    monkeypatch.setattr(gandistance, "BATCH", 20)
    truth, _, encoder = networks()
    pairs = {"wide": (dcgan.Encoder(NZ, 5), networks(2)[0]), "own": (encoder, truth)}
    seen = {name: [] for name in pairs}
    for name, (own, _) in pairs.items():
        own.trunk[0].register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].clone()))
    found = {name: gandistance.terms(truth, *pair, 33, generator(5)) for name, pair in pairs.items()}
    wide, own = (torch.cat(images) for images in seen.values())
    assert len(wide) == 33 and torch.equal(wide, own)
    noise = generator(5)
    metrics = gandistance.likelihoods(truth, pairs, 33, noise)
    for name, terms in found.items():
        for term, values in terms.items():
            metric = metrics.pop(f"{term}_{name}")
            assert (metric["n"], metric["unit"]) == (33, gandistance.UNITS[term])
            assert metric["value"] == pytest.approx(values.double().mean().item())
            assert metric["se"] == pytest.approx(values.double().std().item() / 33 ** 0.5)
    gain = (found["own"]["elbo"] - found["wide"]["elbo"]).double()        # image by image
    assert metrics["elbo_gain"]["value"] == pytest.approx(gain.mean().item(), rel=1e-5)
    assert metrics["elbo_gain"]["se"] == pytest.approx(gain.std().item() / 33 ** 0.5, rel=1e-4)
    assert metrics["ceiling"]["value"] == pytest.approx(gandistance.ceiling())
    assert not torch.equal(noise.get_state(), generator(5).get_state())   # what is measured next sees other draws


def test_drift_is_the_root_mean_square_difference_of_images_at_the_same_codes():
    truth, other = networks()[0], networks(2)[0]
    assert gandistance.drift(truth, truth, 33, generator(1))["value"] == 0
    found = gandistance.drift(truth, other, 33, generator(1))
    z = torch.randn(33, NZ, generator=generator(1)).double()[:, :, None, None]
    apart = (plain_generator(truth).eval()(z) - plain_generator(other).eval()(z)).square().mean((1, 2, 3))
    value = apart.mean().sqrt().item()
    assert found["value"] == pytest.approx(value, rel=1e-4) and (found["n"], found["unit"]) == (33, "pixels in [-1, 1]")
    assert found["se"] == pytest.approx(apart.std().item() / 33 ** 0.5 / (2 * value), rel=1e-3)       # delta method
