"""The study of the gradient estimators, on a dense stand-in whose every draw can be enumerated."""
import itertools
import time

import pytest
import torch
from torch import nn

from lib import documents, estimators, plots_bits, runs, semhash, stochastic
from lib.train import generator

BITS, WORDS, DOCUMENTS = 3, 12, 5


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


@pytest.fixture(scope="module")
def toy():
    """Documents, a linear encoder and a decoder whose NLL is far from quadratic in the bits."""
    x = torch.poisson(torch.full((DOCUMENTS, WORDS), 1.5, dtype=torch.float64), generator=generator(1))
    encoder = nn.Linear(WORDS, BITS).double()
    weights = normal(BITS, 4, seed=2), 2 * normal(4, WORDS, seed=3)
    with torch.no_grad():
        encoder.weight.copy_(0.3 * normal(BITS, WORDS, seed=4))
        encoder.bias.copy_(normal(BITS, seed=5))

    def nll(z):
        f = -(x * (torch.tanh(2 * z @ weights[0]) @ weights[1]).log_softmax(-1)).sum(-1)
        return f.sum(), f.detach()
    return x, encoder, nll


@pytest.fixture(scope="module")
def tables(toy):
    """f and slope of all codes, without the code under test."""
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=BITS)), dtype=torch.float64)

    def f(z):
        return toy[2](z.expand(DOCUMENTS, BITS)[None])[1][0]
    small = 1e-5 * torch.eye(BITS, dtype=torch.float64)
    slope = torch.stack([torch.stack([f(z + h) - f(z - h) for h in small], 1) for z in every], 1) / 2e-5
    return every, torch.stack([f(z) for z in every], 1), slope


def log_q(z, logits):
    return torch.distributions.Bernoulli(logits=logits).log_prob(z).sum(-1)


def negative_elbo(toy, tables, logits):
    every, f, _ = tables
    entropy = torch.distributions.Bernoulli(logits=logits).entropy().sum(-1)
    q = log_q(every, logits[:, None]).exp()
    return ((q * f).sum(1) - entropy).mean() + BITS * torch.log(torch.tensor(2.0))


def test_codes_and_their_nll_are_enumerated(toy, tables):
    f, slope = estimators.enumerate_nll(toy[2], DOCUMENTS, tables[0])
    assert torch.equal(estimators.codes(BITS, f), tables[0])
    torch.testing.assert_close(f, tables[1])
    torch.testing.assert_close(slope, tables[2], atol=1e-6, rtol=1e-6)


def test_the_exact_gradient_is_the_derivative_of_the_enumerated_expectation(toy, tables):
    every, f, _ = tables
    logits = toy[1](toy[0])
    expected = torch.autograd.grad((log_q(every, logits[:, None]).exp() * f).sum(), logits)[0]
    torch.testing.assert_close(estimators.exact(logits, f), expected)


def enumerated(name, logits, f, slope):
    """Mean [b] and trace of the covariance of one document's estimate, over all outcomes of its draws."""
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=BITS)), dtype=torch.float64)
    p, powers = logits.sigmoid(), torch.tensor([4, 2, 1])
    if name == "zgr":
        q, g = log_q(every, logits).exp(), slope * (every * (1 - p) + (1 - every) * p) / 2
        return (q[:, None] * g).sum(0), (q @ g.square() - (q @ g).square()).sum()
    mean, second = torch.zeros(BITS, dtype=torch.float64), 0.0
    for z, other in itertools.product(every, every):
        difference = f[(z.long() * powers).sum()] - f[(other.long() * powers).sum()]
        if name == "reinforce-loo":
            weight, g, more = (log_q(z, logits) + log_q(other, logits)).exp(), difference / 2 * (z - other), 0.0
        else:                       # u lies above 1 - p where z = 1, below p where the other is: in an interval
            low, high = torch.maximum((1 - p) * z, p * (1 - other)), torch.minimum(1 - p * (1 - z), 1 - (1 - p) * other)
            width = (high - low).clamp_min(0)
            weight, g = width.prod(), difference * ((low + high) / 2 - 0.5)
            more = difference.square() * (width.square() / 12).sum() if name == "arm" else 0.0
        mean, second = mean + weight * g, second + weight * (g.square().sum() + more)
    return mean, second - mean.square().sum()


@pytest.fixture(scope="module", params=["sampled", "analytic"])
def found(toy, request):
    x, encoder, nll = toy
    own = list(encoder.parameters())
    return request.param, estimators.measure(encoder(x), own, nll, generator(7), request.param, draws=10_000)


@pytest.mark.parametrize("name", stochastic.ESTIMATORS)
def test_bias_and_variance_are_the_enumerated_ones(toy, tables, found, name):
    (x, encoder, _), (every, f, slope), (kl, found) = toy, tables, found
    logits = encoder(x)
    whole = torch.autograd.grad(negative_elbo(toy, tables, logits), list(encoder.parameters()), retain_graph=True)
    whole = torch.cat([g.flatten() for g in whole])
    if kl == "sampled" and name != "zgr":
        f = f + log_q(every, logits.detach()[:, None])
    every = [enumerated(name, *parts) for parts in zip(logits.detach(), f, slope, strict=True)]
    error = torch.stack([mean for mean, _ in every]) - estimators.exact(logits, f)
    error = torch.cat([(error.T @ x).flatten(), error.sum(0)]) / DOCUMENTS
    traces = torch.stack([trace for _, trace in every]) * (x.square().sum(1) + 1) / DOCUMENTS ** 2
    expected = {"bias2": error.square().sum() / whole.square().sum(), "variance": traces.sum() / whole.square().sum()}
    for key, true in expected.items():
        assert abs(found[name][key]["value"] - true.item()) < 3 * found[name][key]["se"], key
    assert found[name]["variance"]["se"] < 0.05 * found[name]["variance"]["value"]
    if name == "zgr":
        assert found[name]["bias2"]["value"] > 10 * found[name]["bias2"]["se"] > 0
        assert found[name]["enumerated"]["value"] == pytest.approx(expected["bias2"].item(), rel=1e-5)
    else:
        assert expected["bias2"] < 1e-20


def test_the_choice_of_documents_has_the_variance_of_their_gradients(toy, tables, found):
    x, encoder, _ = toy
    own = []
    for i in range(DOCUMENTS):
        alone = negative_elbo(toy, (tables[0], tables[1][i:i + 1], None), encoder(x[i:i + 1]))
        own.append(torch.cat([g.flatten() for g in torch.autograd.grad(alone, list(encoder.parameters()))]))
    own = torch.stack(own)
    expected = own.var(0).sum() / DOCUMENTS / own.mean(0).square().sum()
    assert found[1]["documents"]["variance"]["value"] == pytest.approx(expected.item())


def test_a_flipped_sign_is_seen_as_a_bias_of_twice_the_gradient(toy, tables, monkeypatch):
    x, encoder, nll = toy
    right = stochastic.disarm
    monkeypatch.setattr(stochastic, "disarm", lambda logits, z, other, *f: right(logits, other, z, *f))
    bias2 = estimators.measure(encoder(x), list(encoder.parameters()), nll, generator(7), "analytic")
    bias2, logits = bias2["disarm"]["bias2"], encoder(x)
    own, part = estimators.metric(logits, list(encoder.parameters())), estimators.exact(logits, tables[1]).flatten()
    whole = part + (logits * logits.sigmoid() * (-logits).sigmoid()).flatten()
    expected = 4 * (part @ own @ part / (whole @ own @ whole)).item()
    assert abs(bias2["value"] - expected) < 3 * bias2["se"] < 0.2 * expected


@pytest.mark.parametrize("bias", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("scales", [[1.0] * 30, [1.0] + [0.1] * 29])
def test_intervals_cover_the_truth(bias, scales):
    """Two standard errors about the squared bias, also where it is zero, and about the variance."""
    scales = torch.tensor(scales, dtype=torch.float64)
    whole, off, own = normal(30, seed=1), bias * normal(30, seed=2) / 30 ** 0.5, torch.eye(30, dtype=torch.float64)
    inside = {"bias2": 0, "variance": 0}
    true = {"bias2": (off.square().sum() / whole.square().sum()).item(),
            "variance": (scales.square().sum() / whole.square().sum()).item()}
    for i in range(300):
        told = estimators.describe(off + scales * normal(20, 10, 30, seed=100 + i), whole, own)
        for key in inside:
            inside[key] += abs(told[key]["value"] - true[key]) < 2 * told[key]["se"]
    assert min(inside.values()) > 0.9 * 300, inside


def test_the_cosine_is_that_of_a_single_step():
    errors, whole, root = normal(6, 50, 8), normal(8, seed=1), normal(8, 8, seed=2)
    told = estimators.describe(errors, whole, root @ root.T)["cosine"]
    each = torch.cosine_similarity((whole + errors) @ root, whole @ root, dim=-1)
    assert told["value"] == pytest.approx(each.mean().item()) and told["n"] == 300
    assert told["se"] == pytest.approx((each.mean(1).std() / 6 ** 0.5).item())


def test_what_cannot_be_measured_is_refused(toy):
    x, encoder, nll = toy
    own, logits = list(encoder.parameters()), encoder(x)
    with pytest.raises(ValueError, match="bits must be between 1 and 8, got 9"):
        estimators.codes(9, x)
    with pytest.raises(ValueError, match="bits must be between 1 and 8, got 0"):
        estimators.measure(logits[:, :0], own, nll, generator(1))
    with pytest.raises(ValueError, match="at least 3 blocks"):
        estimators.measure(logits, own, nll, generator(1), draws=10)
    with pytest.raises(ValueError, match="2 documents"):
        estimators.measure(logits[:1], own, nll, generator(1))
    with pytest.raises(ValueError, match="unknown estimator 'rebar'"):
        estimators.draw("rebar", logits, x, x, generator(1))
    with pytest.raises(ValueError, match="gradient is zero"):
        estimators.measure(0 * logits, own, lambda z: (0 * z.sum(), 0 * z.sum(-1)), generator(1))


# ------------------------------------------------------------------------------------------------ over training
PARAMETERS = {"dataset": "topics", "encoder": "e1", "input": "", "bits": 3, "decoder_depth": 0, "hidden": 8,
              "estimator": "disarm", "kl": "sampled", "epochs": 3, "batch_size": 200, "lr": 0.01, "documents": 4,
              "draws": 80, "seed": 1, "precision": "fp32"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def texts():
    return documents.load("topics")


def test_a_study_measures_at_its_milestones_and_does_not_disturb_the_learning(texts, tmp_path):
    found, history, job = estimators.study(PARAMETERS, texts, CPU, tmp_path / "study")
    assert list(found) == estimators.milestones(3) == [0, 1, 3] and history["epoch"] == [1, 2, 3]
    for told in found.values():
        assert set(told) == {*stochastic.ESTIMATORS, "documents"}
    own = PARAMETERS | estimators.ALONE
    alone = semhash.replica(own, *semhash.corpora(texts, CPU), CPU, tmp_path / "alone")
    assert semhash.learn([alone])[0]["loss"] == history["loss"]
    for a, b in zip(alone["state"]["model"].parameters(), job["state"]["model"].parameters(), strict=True):
        assert torch.equal(a, b)
    kept = estimators.history_of(found)
    assert kept["epoch"] == [0, 1, 3] and kept["variance_reinforce_loo"][2] > 0
    assert kept["bias2_zgr_se"][0] == found[0]["zgr"]["bias2"]["se"]


def test_milestones_end_with_the_last_epoch():
    assert estimators.milestones(0) == [0] and estimators.milestones(10) == [0, 1, 3, 10]
    assert estimators.milestones(50) == [0, 1, 3, 10, 30, 50]


@pytest.mark.parametrize(("encoder", "depth"), [("e1", 0), ("e2", 1), ("e3", 2)])
def test_what_is_measured_is_the_model(texts, monkeypatch, encoder, depth):
    """Its logits, the last layer of its encoder and, for every code, its NLL by a direct formula."""
    train, _ = semhash.corpora(texts, CPU)
    model = semhash.initialise(semhash.SemanticHashing(len(train.smoothing), 3, encoder, depth, 8), generator(2))
    items = torch.tensor([5, 100, 1300])
    monkeypatch.setattr(estimators, "measure", lambda *given: given)
    logits, parameters, nll, _, kl, draws = estimators.at_model(model, train.batch(items), generator(1), "analytic", 70)
    assert (kl, draws) == ("analytic", 70) and logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), model.encode(train.batch(items)))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    inputs = len(train.smoothing) if encoder != "e2" else 8
    assert sum(p.numel() for p in parameters) == 3 * (inputs + 1)
    x = texts.train.to_dense()[items].double() + train.smoothing.double()
    every = estimators.codes(3, x)
    output = model.double().words_out(model.hidden(every))
    f, slope = estimators.enumerate_nll(nll, 3, every)
    torch.testing.assert_close(f, -x @ output.log_softmax(1).T, rtol=1e-6, atol=0)
    z = every.clone().requires_grad_()
    total = -(x[1] * model.words_out(model.hidden(z)).log_softmax(1)).sum()
    torch.testing.assert_close(slope[1], torch.autograd.grad(total, z)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("change", "complaint"), [
    ({"bits": 9}, "bits must be between 1 and 8"), ({"documents": 1}, "documents must be between 2 and 1600, got 1"),
    ({"documents": 1601}, "got 1601"), ({"estimator": "gumbel"}, "unknown estimator 'gumbel'"),
    ({"draws": 10}, "at least 3 blocks"), ({"kl": "none"}, "unknown kl 'none'")])
def test_a_study_of_nothing_is_refused(texts, tmp_path, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        estimators.study(PARAMETERS | {"epochs": 0} | change, texts, CPU, tmp_path)


# ------------------------------------------------------------------------------------------------ cost, verdict
def test_costs_are_ratios_to_the_first_measured_in_turns():
    told = estimators.in_turns({"one": lambda: time.sleep(0.002), "three": lambda: time.sleep(0.006)}, CPU, rounds=17)
    assert told["one"]["cost"]["value"] == 1 and told["one"]["cost"]["se"] == 0
    assert 1.5 < told["three"]["cost"]["value"] < 3.5 and told["three"]["ms"]["value"] >= 6
    assert told["three"]["cost"]["n"] == 3 and told["three"]["cost"]["unit"] == "steps by one"
    with pytest.raises(ValueError, match="at least 5 rounds, got 4"):
        estimators.in_turns({}, CPU, rounds=4)


def test_every_estimator_takes_its_own_step_and_leaves_the_model_as_it_was(texts, monkeypatch):
    own = PARAMETERS | estimators.ALONE
    job = semhash.replica(own, *semhash.corpora(texts, CPU), CPU)
    before, asked, training = [p.clone() for p in job["state"]["model"].parameters()], [], semhash.training

    def seen(*given, **more):
        asked.append((more["estimator"], more["size"]))
        return training(*given, **more)
    monkeypatch.setattr(semhash, "training", seen)
    told = estimators.costs(job, rounds=5)
    assert asked == [(name, 200) for name in stochastic.ESTIMATORS] and set(told) == set(stochastic.ESTIMATORS)
    assert all(map(torch.equal, before, job["state"]["model"].parameters()))
    assert all(own["ms"]["value"] > 0 for own in told.values())


def metric(value, se=0.1):
    return {"value": value, "se": se, "n": 100, "unit": "u"}


@pytest.fixture
def made_up():
    """Two epochs of known numbers: ZGR is better up to 1000 documents, then worse whatever their number."""
    variances = {0: (4.0, 8.0, 6.0, 1.0), 5: (4.0, 8.0, 6.0, 20.0)}
    found = {epoch: {name: {"bias2": metric(0.0), "variance": metric(v), "cosine": metric(1.0)}
                     for name, v in zip(stochastic.ESTIMATORS, values, strict=True)}
             for epoch, values in variances.items()}
    for told in found.values():
        told["zgr"] |= {"bias2": metric(0.36, 0.01), "enumerated": metric(0.35, None)}
        told["documents"] = {"variance": metric(0.5)}
    cost = {name: {"ms": metric(2.0), "cost": metric(0.5 if name == "zgr" else 1.0)} for name in stochastic.ESTIMATORS}
    return found, cost


def test_the_verdict_weighs_bias_variance_and_cost(made_up):
    found, cost = made_up
    told = estimators.verdict(found, cost, documents=100, batch_size=200)
    assert told["variance x cost: zgr"].tolist() == [0.12, 2.5] and told["variance x cost: arm"].tolist() == [2.0, 2.0]
    assert told["zgr before disarm up to [documents]"].tolist() == ["1,000", "0"]
    assert told["least error of a step"].tolist() == ["zgr", "disarm"]
    assert told["bias of zgr [%]"].tolist() == [59.16, 59.16]
    late = estimators.verdict(found, cost, documents=100, batch_size=2000)
    assert late["least error of a step"].tolist() == ["disarm", "disarm"]


def test_the_table_shows_the_bias_as_an_interval_and_metrics_are_a_runs(made_up):
    found, cost = made_up
    table = estimators.table(found[0], found[5], cost)
    assert table.loc["disarm", "bias [%]"] == "0 to 45" and table.loc["zgr", "bias [%]"] == "58 to 62"
    assert table.loc["zgr", "variance, KL sampled"] == "1 ± 0.1"
    assert table.loc["zgr", "variance, KL analytic"] == "20 ± 0.1"
    told = estimators.metrics(found[0], cost)
    assert told["variance_reinforce_loo"]["value"] == 6 and told["cost_zgr"]["value"] == 0.5
    assert len(runs.metrics_table(told)) == 4 * 5 + 2


def test_recorded_runs_are_told_apart_and_judged_at_their_end(made_up):
    found, cost = made_up
    own = PARAMETERS | {"documents": 100, "batch_size": 200}
    records = [{"parameters": own | {"decoder_depth": depth, "epochs": epoch},
                "metrics": estimators.metrics(found[epoch], cost)} for depth, epoch in ((1, 5), (0, 0))]
    told = estimators.recorded(records)
    assert told["decoder_depth"].tolist() == [0, 1] and told["epochs"].tolist() == [0, 5]
    assert told["least error of a step"].tolist() == ["zgr", "disarm"]
    assert estimators.recorded([]).empty


def test_the_figure_lets_an_interval_with_zero_reach_the_bottom(made_up):
    found, _ = made_up
    left, right = plots_bits.bias_and_variance(found, stochastic.ESTIMATORS, "title").axes
    bars = [[path.vertices[:, 1].tolist() for path in own.get_paths()] for own in left.collections]
    assert bars[0][0] == pytest.approx([1e-9, 100 * 0.2 ** 0.5])
    assert bars[3][1] == pytest.approx([100 * 0.34 ** 0.5, 100 * 0.38 ** 0.5])
    assert left.get_ylim()[0] > 1e-3 and left.lines[-1].get_ydata() == pytest.approx(100 * 0.35 ** 0.5)
    assert right.lines[3].get_ydata().tolist() == [1.0, 20.0]
    assert [label.get_text() for label in right.get_xticklabels()] == ["0", "5"]
