"""The Gaussian mixture against an independent enumeration in float64, plain loops over points and states."""
import copy
import itertools
import math

import matplotlib.pyplot as plt
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from lib import gmm, plots, train

MOVED = ((1.1, 0.9), (1.1, -0.9), (-0.6, 0.5), (-0.6, -0.55))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[(1.0, gmm.CENTRES), (0.3, MOVED), (0.01, gmm.CENTRES), (0.0001, gmm.CENTRES)],
                ids=lambda param: str(param[0]))
def model(request):
    """Points, an encoder that is far from uniform, and a decoder."""
    covariance, centres = request.param
    encoder = gmm.make_encoder(seed=5)
    with torch.no_grad():
        encoder[-1].weight.mul_(12)
    return gmm.sample(15, covariance, seed=3).train, encoder, gmm.Decoder(covariance, centres)


def forward(encoder, point):
    """The encoder's scores of one point, in plain Python floats."""
    hidden = [float(value) for value in point]
    for layer in (encoder[0], encoder[2], encoder[4]):
        weight, bias = layer.weight.double().tolist(), layer.bias.double().tolist()
        hidden = [max(0.0, value) if layer is not encoder[4] else value for value in
                  (math.fsum(w * h for w, h in zip(row, hidden, strict=True)) + b
                   for row, b in zip(weight, bias, strict=True))]
    return hidden


def enumerate_point(encoder, decoder, point):
    """Everything about one point, by the definitions, as floats; q and the posterior as lists over states."""
    scores, variance = forward(encoder, point), decoder.covariance
    codes = list(itertools.product((0, 1), repeat=2))
    unnormalised = [math.exp(sum(s * bit for s, bit in zip(scores, code, strict=True))) for code in codes]
    q = [u / sum(unnormalised) for u in unnormalised]
    log_joint = []
    for centre in decoder.centres.double().tolist():
        squared = sum((float(v) - c) ** 2 for v, c in zip(point, centre, strict=True))
        log_joint.append(math.log(0.25) - math.log(2 * math.pi * variance) - squared / (2 * variance))
    top = max(log_joint)
    evidence = top + math.log(sum(math.exp(value - top) for value in log_joint))
    posterior = [math.exp(value - evidence) for value in log_joint]
    elbo = sum(p * (value - math.log(p)) for p, value in zip(q, log_joint, strict=True))
    return {"elbo": elbo, "evidence": evidence, "q": q, "posterior": posterior,
            "gap": sum(p * (math.log(p) - value + evidence) for p, value in zip(q, log_joint, strict=True))}


def test_parameter_counts():
    assert sum(p.numel() for p in gmm.make_encoder(seed=0).parameters()) == 4482
    assert [tuple(p.shape) for p in gmm.Decoder().parameters()] == [(4, 2)]


def test_everything_equals_an_independent_enumeration(model):
    x, encoder, decoder = model
    found = gmm.diagnose(x, encoder, decoder)
    expected = [enumerate_point(encoder, decoder, point) for point in x.double().tolist()]
    for name in ("elbo", "evidence", "gap"):
        oracle = torch.tensor([point[name] for point in expected], dtype=torch.float64)
        torch.testing.assert_close(found[name], oracle, rtol=1e-9, atol=1e-9)
        assert found[name].dtype == torch.float64
    with torch.no_grad():
        q = gmm.log_q(encoder.double()(x.double())).exp()
        posterior = gmm.log_posterior(decoder.double()(x.double())).exp()
    for got, name in ((q, "q"), (posterior, "posterior")):
        oracle = torch.tensor([point[name] for point in expected], dtype=torch.float64)
        torch.testing.assert_close(got, oracle, rtol=1e-7, atol=1e-12)


def test_the_training_objective_is_the_elbo_of_the_enumeration():
    x, encoder, decoder = gmm.sample(15, 1.0, seed=3).train, gmm.make_encoder(seed=5), gmm.Decoder()
    points = [enumerate_point(encoder, decoder, point) for point in x.double().tolist()]
    metrics = gmm.build_step(encoder, decoder, lr=1e-3, joint=True)[0](x)
    for name in ("elbo", "evidence"):
        mean = sum(point[name] for point in points) / len(points)
        assert metrics[name].item() == pytest.approx(mean, abs=1e-5)


def test_the_gap_is_the_divergence_from_the_decoders_posterior(model):
    x, encoder, decoder = model
    found = gmm.diagnose(x, encoder, decoder)
    torch.testing.assert_close(found["evidence"] - found["elbo"], found["gap"], rtol=1e-9, atol=1e-9)
    assert (found["gap"] > -1e-9).all()


def test_kl_to_the_truth_is_measured_from_where_the_decoder_started():
    x, encoder, decoder = gmm.sample(15, seed=3).train, gmm.make_encoder(seed=5), gmm.Decoder()
    before = gmm.diagnose(x, encoder, decoder)
    torch.testing.assert_close(before["kl"], before["gap"])
    with torch.no_grad():
        decoder.centres.copy_(torch.tensor(MOVED))
    after = gmm.diagnose(x, encoder, decoder)
    torch.testing.assert_close(after["kl"], before["kl"])
    assert not torch.allclose(after["gap"], before["gap"], atol=1e-3)
    distances = [math.dist(a, b) for a, b in zip(MOVED, gmm.CENTRES, strict=True)]
    assert decoder.drift().tolist() == pytest.approx(distances, abs=1e-6)


def test_evidence_is_that_of_a_mixture_distribution(model):
    x, encoder, decoder = model
    centres = decoder.centres.detach().double()
    scale = torch.full_like(centres, math.sqrt(decoder.covariance))
    mixture = MixtureSameFamily(Categorical(torch.ones(4).double()), Independent(Normal(centres, scale), 1))
    found = gmm.diagnose(x, encoder, decoder)["evidence"]
    torch.testing.assert_close(found, mixture.log_prob(x.double()), rtol=1e-9, atol=1e-9)


def test_posterior_satisfies_bayes(model):
    x, _, decoder = model
    log_pxz = gmm.log_joint(x.double(), decoder.centres.detach().double(), decoder.covariance)
    posterior = gmm.log_posterior(log_pxz)
    torch.testing.assert_close(posterior + gmm.log_evidence(log_pxz)[:, None], log_pxz)
    torch.testing.assert_close(posterior.exp().sum(1), torch.ones(len(x)).double())


def test_q_factorises_over_the_bits_into_sigmoids():
    scores = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    q, one = gmm.log_q(scores).exp(), scores.sigmoid()
    for state, (first, second) in enumerate(gmm.CODES):
        first_bit = one[:, 0] if first else 1 - one[:, 0]
        second_bit = one[:, 1] if second else 1 - one[:, 1]
        torch.testing.assert_close(q[:, state], first_bit * second_bit)


def test_the_posteriors_interaction_is_constant_for_parallelograms_and_zero_for_rectangles():
    x = gmm.sample(10, seed=0).train.double()
    corners = ((1.0, 1.0), (1.0, -1.0), (-1.0, 0.5), (-1.0, -1.5))
    rectangle = ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0))
    for centres, constant, factorises in ((rectangle, True, True), (corners, True, False), (gmm.CENTRES, False, False)):
        decoder = gmm.Decoder(0.7, centres).double()
        log_p = gmm.log_posterior(decoder(x)).detach()
        products = log_p[:, 0] - log_p[:, 1] - log_p[:, 2] + log_p[:, 3]
        none = torch.zeros(len(x)).double()
        assert torch.allclose(products, none, atol=1e-9) == factorises
        assert torch.allclose(products - products[0], none, atol=1e-9) == constant
        assert (decoder.interaction().item() < 1e-6) == constant
    assert gmm.Decoder().interaction().item() == pytest.approx(math.sqrt(5))


def test_best_factorised_elbo_is_that_of_a_grid_search():
    x = gmm.sample(6, seed=1).train.double()
    for centres in (gmm.CENTRES, MOVED):
        log_pxz = gmm.log_joint(x, torch.tensor(centres, dtype=torch.float64), 1.0)
        log_qz = gmm.log_q(torch.cartesian_prod(*[torch.linspace(-9, 9, 361, dtype=torch.float64)] * 2))
        grid = torch.stack([gmm.elbo(log_qz, point.expand(len(log_qz), 4)).max() for point in log_pxz])
        best = gmm.best_factorised_elbo(log_pxz)
        torch.testing.assert_close(best, grid, rtol=0, atol=1e-3)
        assert (best >= grid - 1e-12).all() and (best < gmm.log_evidence(log_pxz)).all()


@pytest.mark.parametrize(("covariance", "near"), [(1.0, -3.29), (0.01, 0.38), (0.0001, 4.99)])
def test_expected_log_evidence_by_another_quadrature(covariance, near):
    """A sum over a fine square grid about each centre, with torch's mixture; the values of known fault 3."""
    scale = math.sqrt(covariance)
    offsets = torch.linspace(-8 * scale, 8 * scale, 321, dtype=torch.float64)
    centres = torch.tensor(gmm.CENTRES, dtype=torch.float64)
    normals = Independent(Normal(centres, torch.full_like(centres, scale)), 1)
    mixture = MixtureSameFamily(Categorical(torch.ones(4).double()), normals)
    total = 0.0
    for state, centre in enumerate(centres):
        x = centre + torch.cartesian_prod(offsets, offsets)
        density = normals.log_prob(x[:, None])[:, state].exp() * (offsets[1] - offsets[0]) ** 2
        assert density.sum().item() == pytest.approx(1.0, abs=1e-9)
        total += (density * mixture.log_prob(x)).sum().item() / 4
    assert gmm.expected_log_evidence(covariance) == pytest.approx(total, abs=1e-7)
    assert gmm.expected_log_evidence(covariance) == pytest.approx(near, abs=0.005)


def test_expected_gap_is_that_of_fresh_points():
    log_pxz = gmm.log_joint(gmm.sample(5000, seed=2).train.double(), torch.tensor(gmm.CENTRES).double(), 1.0)
    gap = gmm.log_evidence(log_pxz) - gmm.best_factorised_elbo(log_pxz)
    assert gmm.expected_gap(1.0) == pytest.approx(gap.mean().item(), abs=4 * gap.std().item() / len(gap) ** 0.5)
    assert gmm.expected_gap(1.0) == pytest.approx(gmm.expected_gap(1.0, nodes=60), abs=1e-5)
    assert gmm.expected_gap(0.01) == pytest.approx(0, abs=1e-9)      # components that do not overlap


def test_data_are_seeded_balanced_and_of_the_stated_covariance():
    data = gmm.sample(4000, 0.25, seed=7)
    assert data.train.shape == data.test.shape == (16000, 2) and data.train.dtype == torch.float32
    assert data.train_labels.bincount().tolist() == [4000] * 4
    for state in range(4):
        own = data.train[data.train_labels == state]
        torch.testing.assert_close(own.mean(0), torch.tensor(gmm.CENTRES[state]), atol=0.04, rtol=0)
        torch.testing.assert_close(own.T.cov(), 0.25 * torch.eye(2), atol=0.025, rtol=0)
    assert torch.equal(data.train, gmm.sample(4000, 0.25, seed=7).train)
    assert data.sha256 == gmm.sample(4000, 0.25, seed=7).sha256 != gmm.sample(4000, 0.25, seed=8).sha256
    assert not torch.equal(data.train, data.test)


def test_an_encoder_depends_on_its_seed_alone():
    state = torch.get_rng_state()
    first, again, other = gmm.make_encoder(1), gmm.make_encoder(1), gmm.make_encoder(2)
    assert torch.equal(first[0].weight, again[0].weight) and not torch.equal(first[0].weight, other[0].weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_only_stage_two_moves_the_centres():
    x, encoder, decoder = gmm.sample(50, seed=1).train, gmm.make_encoder(1), gmm.Decoder()
    weight = encoder[0].weight.clone()
    gmm.build_step(encoder, decoder, lr=1e-3, joint=False)[0](x)
    assert decoder.centres.grad is None and torch.equal(decoder.centres, decoder.start)
    assert not torch.equal(encoder[0].weight, weight)
    weight = encoder[0].weight.clone()
    gmm.build_step(encoder, decoder, lr=1e-3, joint=True)[0](x)
    assert (decoder.drift() > 1e-4).all() and not torch.equal(encoder[0].weight, weight)


def test_gradient_of_the_centres_is_that_of_the_enumeration():
    x, encoder, decoder = gmm.sample(5, seed=1).train, gmm.make_encoder(1).double(), gmm.Decoder().double()
    gmm.elbo(gmm.log_q(encoder(x.double())), decoder(x.double())).mean().backward()
    points, step = x.double().tolist(), 1e-5

    def mean_elbo(shift):
        with torch.no_grad():
            decoder.centres[2, 1] += shift
        value = sum(enumerate_point(encoder, decoder, point)["elbo"] for point in points) / len(points)
        with torch.no_grad():
            decoder.centres[2, 1] -= shift
        return value

    difference = (mean_elbo(step) - mean_elbo(-step)) / (2 * step)
    assert decoder.centres.grad[2, 1].item() == pytest.approx(difference, abs=1e-8)


@pytest.fixture(scope="module")
def short_run():
    """300 + 300 steps on 400 points: the data, both stages' (encoder, decoder) and history."""
    torch.set_num_threads(1)
    data, encoder, decoder = gmm.sample(100, seed=1), gmm.make_encoder(1), gmm.Decoder()
    step, optimizer = gmm.build_step(encoder, decoder, lr=3e-3, joint=False)
    state = {"encoder": encoder, "optimizer": optimizer}
    first = train.fit(step, train.Whole(data.train), steps=300, state=state, config={})
    before = copy.deepcopy(encoder), copy.deepcopy(decoder)
    step, optimizer = gmm.build_step(encoder, decoder, lr=3e-3, joint=True)
    state = {"encoder": encoder, "decoder": decoder, "optimizer": optimizer}
    second = train.fit(step, train.Whole(data.train), steps=300, state=state, config={})
    return data, before, (encoder, decoder), gmm.joined(first, second)


def test_training_shows_the_approximation_error(short_run):
    data, before, after, history = short_run
    metrics = gmm.measure(data, before, after)
    value = {name: metric["value"] for name, metric in metrics.items()}
    for stage in ("encoder_only", "joint"):
        assert value[f"elbo_{stage}"] <= value[f"elbo_best_{stage}"] <= value[f"evidence_{stage}"]
        assert value[f"elbo_best_{stage}"] - value[f"elbo_{stage}"] < 0.01      # so the network is large enough
    assert value["elbo_gain"] > 0.03 and value["gap_joint"] < 0.5 * value["gap_encoder_only"]
    assert value["kl_rise"] > 0 and value["drift_mean"] > 0.2
    assert value["interaction_joint"] < value["interaction_encoder_only"]
    assert value["elbo_gain"] == pytest.approx(value["elbo_joint"] - value["elbo_encoder_only"])
    assert value["elbo_test_joint"] == gmm.diagnose(data.test, *after)["elbo"].mean().item()
    assert metrics["elbo_gain"]["se"] < metrics["elbo_joint"]["se"] and metrics["elbo_joint"]["n"] == 400
    assert history["step"][-1] == 600 and history["step"] == sorted(set(history["step"]))
    assert all(e <= evidence for e, evidence in zip(history["elbo"], history["evidence"], strict=True))


def test_preferred_states_and_their_square(short_run):
    data, (encoder, decoder), _, _ = short_run
    axis = gmm.axis_of(data.train, side=5)
    assert len(axis) == 5 and axis[2] == 0 and axis[-1] == -axis[0]
    assert (data.train.abs() <= axis[-1]).float().mean() == pytest.approx(0.995, abs=0.005)
    states = gmm.preferred(data.train, decoder, encoder)
    nearest = torch.cdist(data.train, decoder.start).argmin(1)
    assert states.shape == (2, 400) and torch.equal(states[0], nearest)
    bits = (encoder(data.train) > 0).long()
    assert torch.equal(states[1], 2 * bits[:, 0] + bits[:, 1])


def test_figures_show_the_run(short_run):
    data, before, (encoder, decoder), history = short_run
    names, axis = data.label_names, gmm.axis_of(data.train, side=41)
    states = gmm.preferred(data.train, decoder, before[0], encoder)
    regions = gmm.preferred(torch.cartesian_prod(axis, axis), decoder, before[0], encoder)
    centres = {"truth": decoder.start, "before": decoder.start, "after": decoder.centres}
    maps = plots.gmm_maps(data.train, states, axis, regions, centres, names)
    assert [ax.get_title(loc="left") for ax in maps.axes] == list(centres)
    shaded = maps.axes[2].collections[0].get_array().reshape(41, 41)         # rows are x_2
    assert torch.equal(torch.as_tensor(shaded.data).long(), regions[2].reshape(41, 41).T)
    drift = plots.gmm_drift(decoder.start, decoder.centres, names).axes[0]
    labels = [text.get_text() for text in drift.texts if text.get_text()]
    assert labels == [f"z = {name}\nmoved {moved:.2f}" for name, moved in
                      zip(names, decoder.drift().tolist(), strict=True)]
    curves = plots.gmm_curves(history, 300, (-3.37, -3.31)).axes[0]
    assert history["elbo"] in [list(line.get_ydata()) for line in curves.lines]
    assert {text.get_text() for text in curves.texts} >= {"ELBO", "log evidence"}
    assert curves.get_legend().get_texts()[0].get_text() == "published ELBO: −3.37, −3.31"
    plt.close("all")


@pytest.mark.parametrize(("call", "message"), [
    (lambda: gmm.sample(0), "points_per_component must be at least 1, got 0"),
    (lambda: gmm.sample(10, covariance=-1.0), "covariance must be positive and finite, got -1.0"),
    (lambda: gmm.sample(10, covariance=0.0), "covariance must be positive and finite, got 0.0"),
    (lambda: gmm.Decoder(math.inf), "covariance must be positive and finite, got inf"),
    (lambda: gmm.expected_log_evidence(math.nan), "covariance must be positive and finite, got nan"),
])
def test_misuse_is_one_clear_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
