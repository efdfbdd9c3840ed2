"""Disentanglement over beta: the scenes, exact training of several seeds, claims over pairs of runs."""
import math

import pytest
import torch

from lib import autoencoders, data, entanglement, plots_faces, runs, train

LOOKING = {"steps", "n_test", "sample_seed", "replicas", "n_traverse", "traverse_range", "device", "resume"}
SMALL = {"beta": 4.0, "sigma": 0.5, "z_dim": 3, "dim": 2, "n_train": 24, "n_test": 16, "steps": 4, "batch_size": 8,
         "lr": 1e-3, "seed": 1, "precision": "fp32", "replicas": 1}


def test_the_scenes_are_the_data_sets_at_its_size():
    found, shapes = entanglement.scenes(4096, 512), data.load("shapes")
    assert found.sha256 == shapes.sha256 and found.name == "shapes"
    assert torch.equal(found.test, shapes.test) and torch.equal(found.train_labels, shapes.train_labels)
    assert all(torch.equal(value, shapes.factors["test"][name]) for name, value in found.factors["test"].items())


def test_other_sizes_are_other_scenes():
    found = entanglement.scenes(24, 16)
    assert found.train.shape == (24, 3, 64, 64) and found.test.shape == (16, 3, 64, 64)
    assert {len(value) for value in found.factors["train"].values()} == {24}
    assert found.sha256 != entanglement.scenes(24, 17).sha256


def test_every_parameter_that_the_weights_depend_on_is_in_the_checkpoints_configuration():
    declared = set(runs.parameters("disentanglement"))
    assert set(entanglement.LEARNT_FROM) == declared - LOOKING and LOOKING < declared
    assert declared >= set(SMALL)


def test_the_step_is_beta_vaes_with_the_given_sigma():
    scenes = entanglement.scenes(24, 16)
    job = entanglement.replica(SMALL, scenes.train, torch.device("cpu"))
    model, noise = job["state"]["model"], train.generator(1)
    assert model.kind == "beta-vae" and model.z_dim == 3 and job["config"]["beta"] == 4.0
    batch = job["batches"].batch(0)
    twin = autoencoders.Autoencoder("beta-vae", (3, 64), 3, 2, (1, 2, 4, 8)).double().train()
    twin.load_state_dict(model.state_dict())
    x = batch.double() / 127.5 - 1
    mean, log_var = twin.encoder(x)
    z = mean + torch.randn(8, 3, generator=noise).double() * torch.exp(log_var / 2)
    kl = 0.5 * (mean ** 2 + log_var.exp() - log_var - 1).sum(1).mean()
    mse = (twin.decoder(z) - x).square().mean()
    found = job["step"](batch)
    price = (12288 / 2) * (found["loss"].item() - 2 * math.log(0.5))
    assert price == pytest.approx((12288 * mse / (2 * 0.25) + 4 * kl).item(), rel=1e-4)


def test_seeds_trained_together_are_those_trained_alone_and_go_on_exactly(tmp_path):
    scenes = entanglement.scenes(24, 16)

    def trained(seeds, name, steps, resume=""):
        cpu = torch.device("cpu")
        jobs = [entanglement.replica(SMALL | {"seed": seed}, scenes.train, cpu, tmp_path / f"{name}{seed}")
                for seed in seeds]
        histories = train.fit_together(jobs, steps=steps, checkpoint_every=2, log_every=2, resume=resume)
        return [job["state"]["model"].state_dict() for job in jobs], histories

    together, histories = trained((1, 2), "together", 6)
    trained((1, 2), "parts", 2)
    resumed, resumed_histories = trained((1, 2), "parts", 6, "latest")
    assert resumed_histories == histories and histories[0] != histories[1]
    for seed, own in enumerate(together, 1):
        alone = trained((seed,), "alone", 6)[0][0]
        for other in (alone, resumed[seed - 1]):
            assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize(("changed", "message"), [
    ({"z_dim": 1}, "z_dim must be at least 2, got 1"), ({"n_test": 1}, "n_test must be at least 2"),
    ({"replicas": 0}, "replicas must be at least 1"), ({"beta": -1.0}, "beta must not be negative, got -1.0"),
    ({"batch_size": 25}, "a batch of 25 needs as many training scenes, got n_train = 24")])
def test_senseless_values_are_clear_errors(changed, message):
    entanglement.check(SMALL)
    with pytest.raises(ValueError, match=message):
        entanglement.check(SMALL | changed)


# ------------------------------------------------------------------------------------------------ many runs
def record(beta, seed, value, sigma=1.0, date="2026-01-01", **more):
    metrics = {name: {"value": value, "se": None, "n": 1, "unit": ""} for name in entanglement.SCORES}
    return {"parameters": {"beta": beta, "sigma": sigma, "seed": seed, "dim": 4, "replicas": seed} | more, "date": date,
            "metrics": metrics, "dataset": {"sha256": "0" * 64}}


RECORDS = [record(1.0, 1, 0.10), record(4.0, 1, 0.20), record(1.0, 2, 0.30), record(4.0, 2, 0.41),
           record(4.0, 3, 0.99), record(20.0, 1, 0.05), record(20.0, 2, 0.06),
           record(1.0, 1, 0.7, sigma=0.1), record(4.0, 1, 0.6, sigma=0.1),
           record(1.0, 1, 0.9, date="2025-01-01")]                              # older than the first: does not count


def test_runs_are_grouped_by_all_but_beta_and_seed():
    found = entanglement.by_beta(RECORDS, "mig")
    assert found == {"sigma 0.1": {1.0: {1: 0.7}, 4.0: {1: 0.6}},
                     "sigma 1.0": {1.0: {1: 0.10, 2: 0.30}, 4.0: {1: 0.20, 2: 0.41, 3: 0.99}, 20.0: {1: 0.05, 2: 0.06}}}
    wider = entanglement.by_beta([*RECORDS, record(1.0, 1, 0.5, dim=8)], "mig")
    assert wider["sigma 1.0, dim 8"] == {1.0: {1: 0.5}} and wider["sigma 1.0, dim 4"] == found["sigma 1.0"]
    assert entanglement.by_beta([], "mig") == {}


def test_claims_pair_the_seeds_of_two_betas():
    table = entanglement.claims(RECORDS)
    first = table[table["score"] == "MIG"].set_index("beta")
    assert list(first.index) == ["4 against 1", "20 against 1", "20 against 4"] and set(first["pairs"]) == {2}
    assert first.loc["4 against 1", "difference"] == "+0.105"
    half = 12.7062 * 0.005                                                      # Student's t, one degree of freedom
    assert first.loc["4 against 1", "95 % interval"] == f"+{0.105 - half:.3f} to +{0.105 + half:.3f}"
    assert first["less entangled"].to_dict() == {"4 against 1": "yes", "20 against 1": "undecided",
                                                 "20 against 4": "undecided"}
    swapped = [record({1.0: 4.0, 4.0: 1.0}[one["parameters"]["beta"]], one["parameters"]["seed"],
                      one["metrics"]["mig"]["value"]) for one in RECORDS[:4]]
    assert set(entanglement.claims(swapped)["less entangled"]) == {"no"}
    assert len(entanglement.claims(RECORDS[:2])) == len(entanglement.claims([])) == 0


def test_the_figure_shows_each_run_and_the_interval():
    fig = plots_faces.by_beta({"MIG": entanglement.by_beta(RECORDS, "mig")})
    ax, = fig.axes
    dots = [y for line in ax.lines if line.get_linestyle() == "None" for y in line.get_ydata()]
    assert sorted(dots) == sorted([0.10, 0.30, 0.20, 0.41, 0.99, 0.05, 0.06, 0.7, 0.6])
    means = {line.get_label(): list(line.get_ydata()) for line in ax.lines if line.get_linestyle() != "None"}
    assert means["sigma 0.1"] == [0.7, 0.6] and means["sigma 1.0"][0] == pytest.approx(0.2)
    assert len(ax.collections) == 3                                             # of settings with several seeds
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "4", "20"]
    assert plots_faces.by_beta({"MIG": {}}).legends == []


def test_measuring_scores_means_draws_and_the_scenes(monkeypatch):
    scenes = entanglement.scenes(1200, 100)
    model = entanglement.replica(SMALL, scenes.train[:24], torch.device("cpu"))["state"]["model"]
    seen = []

    def code(model, images):
        factors = scenes.factors["test" if len(images) == 100 else "train"]
        x, y, radius = (factors[name][:len(images)] for name in ("x", "y", "radius"))
        seen.append(len(images))
        return torch.stack([x, y, radius, 1e-3 * x], 1), torch.tensor([-12.0, -12.0, -12.0, 0.0]).expand(len(images), 4)

    monkeypatch.setattr(entanglement, "encode", code)
    metrics, information = entanglement.measure(model, scenes, train.generator(1), n_train=1000)
    assert sorted(seen) == [100, 1000] and set(entanglement.METRICS) <= set(metrics)
    assert metrics["mig_x"]["value"] == pytest.approx(0, abs=1e-6)      # the collapsed fourth tells as much of x
    expected = (0.8 + 0.8 + 0.8) / 6                                    # of six factors three are told, less the bins
    assert metrics["mig_draws"]["value"] == pytest.approx(expected, abs=0.1)
    assert metrics["mig_draws"]["value"] > metrics["mig"]["value"] + 0.1
    assert metrics["active_units"]["value"] == 2                        # radius: variance 0.25^2 / 12
    assert set(information) == set(scenes.factors["test"]) and len(information["angle"]) == 4
    assert metrics["kl"]["n"] == metrics["mse"]["n"] == 100 and metrics["mig"]["n"] == 1000


def test_the_information_is_drawn_in_the_order_of_use():
    found = {"x": torch.tensor([0.1, 2.0, -0.01]), "y": torch.tensor([0.5, 0.0, 0.3])}
    ax, = plots_faces.information(found, torch.tensor([1.0, 3.0, 0.2])).axes
    assert [text.get_text() for text in ax.texts] == ["2.00", "0.10", "0.00", "0.00", "0.50", "0.30"]
    assert [label.get_text().split("\n")[1] for label in ax.get_xticklabels()] == ["3", "1", "0.2"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["x", "y"]
