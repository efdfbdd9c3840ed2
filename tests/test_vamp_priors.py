"""Densities of the priors and starts of the pseudo-inputs against float64 loops and torch.distributions."""
import math

import pytest
import torch
import torch.nn.functional as F
from small_vamp import make, normal
from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily, Normal

from lib import data, vampprior
from lib.stochastic import bernoulli_log_prob, diagonal_log_prob, mixture_log_prob
from lib.train import generator

X = torch.linspace(0, 1, 3 * 784).view(3, 1, 28, 28)


@pytest.fixture(scope="module")
def images():
    return data.load("digits", size=28).train


# ------------------------------------------------------------------------------------------------ densities
def loop(z, means, log_vars):
    """log of the equal mixture, component by component, in Python's own floats."""
    found = []
    for point in z.tolist():
        logs = [sum(-0.5 * ((a - m) ** 2 / math.exp(v) + v + math.log(2 * math.pi))
                    for a, m, v in zip(point, mean, log_var, strict=True))
                for mean, log_var in zip(means.tolist(), log_vars.tolist(), strict=True)]
        top = max(logs)
        found.append(top + math.log(math.fsum(math.exp(value - top) for value in logs) / len(logs)))
    return torch.tensor(found, dtype=torch.float64)


def plain(z, means, log_vars):
    """The same without a loop, for its gradients."""
    return diagonal_log_prob(z[:, None], means, log_vars).logsumexp(1) - math.log(len(means))


def mixture(spread, away, k=50, d=40):
    """Points near components that lie `spread` apart, `away` from them; variances of e^-6 to e^2. float32."""
    means, log_vars = spread * normal(k, d), torch.rand(k, d, generator=generator(1)) * 8 - 6
    log_vars[::5] = -6
    near = torch.arange(60) % k
    z = means[near] + (away + normal(60, d, seed=2)) * (0.5 * log_vars[near]).exp()
    return z.float(), means.float(), log_vars.float()


@pytest.mark.parametrize("spread", [0.02, 1, 100, 300])
@pytest.mark.parametrize("away", [0, 30, 3000])
def test_the_mixtures_density_and_gradient_are_those_of_a_loop_in_float64(spread, away):
    """Codes of the port span 300 with deviations of 0.05: differences of squares lose all digits in float32."""
    z, means, log_vars = (t.requires_grad_() for t in mixture(spread, away))
    found = mixture_log_prob(z, means, log_vars)
    assert found.dtype == torch.float32 and found.shape == (60,)
    torch.testing.assert_close(found.double(), loop(z, means, log_vars), rtol=3e-6, atol=3e-5)
    twins = [t.detach().double().requires_grad_() for t in (z, means, log_vars)]
    torch.testing.assert_close(plain(*twins), loop(*twins), rtol=1e-12, atol=1e-9)
    expected = torch.autograd.grad(plain(*twins).sum(), twins)
    for own, right in zip(torch.autograd.grad(found.sum(), (z, means, log_vars)), expected, strict=True):
        assert (own - right).norm() < 1e-4 * right.norm()


def test_bf16_does_not_touch_the_mixture():
    z, means, log_vars = mixture(300, 0)
    with torch.autocast("cpu", torch.bfloat16):
        found = mixture_log_prob(z, means, log_vars)
    assert torch.equal(found, mixture_log_prob(z, means, log_vars))


def test_in_float32_alone_the_mixtures_density_would_be_lost():
    z, means, log_vars = mixture(300, 0)
    inverse = torch.exp(-log_vars)
    squares = z.square() @ inverse.T - 2 * z @ (means * inverse).T + (means.square() * inverse).sum(1)
    naive = (-0.5 * (squares + (log_vars + math.log(2 * math.pi)).sum(1))).logsumexp(1) - math.log(50)
    assert (naive - loop(z, means, log_vars)).abs().max() > 1


def test_the_standard_prior_is_a_unit_normal():
    z = 3 * normal(20, 5).float()
    found = mixture_log_prob(z, *vampprior.prior("standard", 7, 5, "noise", "clip", None, None)(None))
    torch.testing.assert_close(found, Independent(Normal(torch.zeros(5), torch.ones(5)), 1).log_prob(z))


@pytest.mark.parametrize(("work", "kind"), [("paper", "vamp"), ("port", "vamp"), ("paper", "vamp-data")])
def test_a_vampprior_of_one_component_is_the_posterior_at_its_pseudo_input(work, kind, images):
    model = make(work, "vae", kind, k=1, images=images, start="images")
    z = normal(20, 2).float()
    mean, log_var = model.encoder(model.prior.images())
    expected = Independent(Normal(mean[0], (0.5 * log_var[0]).exp()), 1).log_prob(z)
    torch.testing.assert_close(mixture_log_prob(z, *model.components()), expected, rtol=1e-5, atol=1e-5)


def test_vampprior_and_mixture_of_gaussians_are_equal_mixtures(images):
    for kind in ("vamp", "mog"):
        model = make(kind=kind, k=9, d=3, images=images)
        if kind == "vamp":
            means, log_vars = model.encoder(model.prior.u.clamp(0, 1))
        else:
            means, log_vars = model.prior.means, model.prior.log_vars
            assert torch.equal(log_vars, torch.zeros(9, 3)) and 0.5 < means.std() < 1.5
        own = MixtureSameFamily(Categorical(torch.ones(9)), Independent(Normal(means, (0.5 * log_vars).exp()), 1))
        z = 2 * normal(20, 3).float()
        torch.testing.assert_close(mixture_log_prob(z, *model.components()), own.log_prob(z), rtol=1e-5, atol=1e-5)
    model.prior.log_vars.data[:2] = torch.tensor([[-9.0], [5.0]])
    assert model.components()[1][:2].tolist() == [[-6.0] * 3, [2.0] * 3]


def test_the_bernoulli_log_probability_is_that_of_bits_and_of_grey_minus_the_cross_entropy():
    logits, grey = 20 * normal(6, 1, 28, 28), torch.rand(6, 1, 28, 28, generator=generator(1)).double()
    bits = torch.bernoulli(grey, generator=generator(2))
    expected = Independent(Bernoulli(logits=logits), 3).log_prob(bits)
    torch.testing.assert_close(bernoulli_log_prob(bits, logits), expected, rtol=1e-10, atol=0)
    expected = -F.binary_cross_entropy_with_logits(logits, grey, reduction="none").sum((1, 2, 3))
    torch.testing.assert_close(bernoulli_log_prob(grey, logits), expected, rtol=1e-10, atol=0)


# ------------------------------------------------------------------------------------------------ pseudo-inputs
def seen(start, squash, images, k=200):
    return vampprior.prior("vamp", k, 2, start, squash, images, generator(1)).images()


def test_the_ports_pseudo_inputs_start_as_training_images_squashed_into_a_narrow_grey(images):
    """Known fault 13: between 0.5 and 0.7, whatever the image."""
    found = seen("images", "hard-sigmoid", images)
    assert 0.5 <= found.min() and found.max() <= 0.7 and found.max() > 0.699 and found.min() < 0.501
    assert are_images((found - 0.5) / 0.2, images)


def are_images(found, images):
    """Whether each is a training image, and they are not the first ones only."""
    place = {image.numpy().tobytes(): i for i, image in enumerate(images)}
    places = [place.get(image.numpy().tobytes(), -1) for image in (255 * found.detach()).round().to(torch.uint8)]
    return min(places) >= 0 and max(places) > len(images) / 2 and len(set(places)) > 0.8 * len(places)


@pytest.mark.parametrize(("start", "squash"), [("inverse", "hard-sigmoid"), ("inverse", "clip"), ("images", "clip")])
def test_through_the_inverse_they_are_training_images_themselves(start, squash, images):
    """But for black and white: they lie half a grey level inside, where they can learn."""
    found = seen(start, squash, images)
    kept = vampprior.prior("vamp-data", 200, 2, start, squash, images, generator(1)).images()
    torch.testing.assert_close(found, kept.clamp(0.5 / 255, 254.5 / 255), rtol=0, atol=1e-6)
    assert are_images(kept, images)


@pytest.mark.parametrize(("start", "squash"), [("inverse", "hard-sigmoid"), ("images", "clip")])
def test_every_pixel_of_a_pseudo_input_can_learn(start, squash, images):
    """Clipping has no slope at 0 and 1 themselves, and four of five pixels of MNIST are black or white."""
    model = make("port" if squash == "hard-sigmoid" else "paper", "vae", images=images, start=start)
    before, (step, _) = model.prior.u.detach().clone(), vampprior.training(model, generator(1), 1e-3)
    step(images[:20])
    assert (model.prior.u != before).float().mean() > 0.99


def test_the_papers_pseudo_inputs_start_as_noise_and_are_clipped(images):
    found = seen("noise", "clip", images)
    n = found.numel()
    assert found.mean().item() == pytest.approx(0.05, abs=4 * 0.01 / math.sqrt(n))
    assert found.std().item() == pytest.approx(0.01, rel=4 / math.sqrt(2 * n))
    u = torch.tensor([-3.0, -0.1, 0.3, 1.0, 1.5]).view(5, 1, 1, 1)
    torch.testing.assert_close(vampprior.PseudoInputs(u, "clip").images().flatten(), torch.tensor([0, 0, 0.3, 1, 1]))
    found = vampprior.PseudoInputs(u, "hard-sigmoid").images().flatten()
    torch.testing.assert_close(found, torch.tensor([0, 0.48, 0.56, 0.7, 0.8]))


def test_pseudo_inputs_for_pictures_are_the_first_and_a_copy(images):
    model = make(images=images, start="images", k=5)
    found = vampprior.pseudo_inputs(model, 3)
    assert torch.equal(found, model.prior.images()[:3]) and not found.requires_grad
    model.prior.u.data.zero_()
    assert found.abs().sum() > 0 and len(vampprior.pseudo_inputs(model, 9)) == 5
    assert vampprior.pseudo_inputs(make(kind="mog"), 3) is vampprior.pseudo_inputs(make(kind="standard"), 3) is None


@pytest.mark.parametrize(("call", "says"), [
    (lambda: make(kind="vampire"), "unknown prior 'vampire': use one of standard, vamp, vamp-data, mog"),
    (lambda: make(start="zeros"), "unknown pseudo_init 'zeros': use images, inverse or noise"),
    (lambda: make(k=0), "components must be at least 1, got 0"),
    (lambda: vampprior.training(make(), generator(1), 0.0), "the learning rate must be positive, got 0"),
    (lambda: vampprior.training(make(), generator(1), 0.1, warmup=-1), "warmup must be at least 0 epochs, got -1")])
def test_what_makes_no_model_is_refused_in_a_sentence(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
