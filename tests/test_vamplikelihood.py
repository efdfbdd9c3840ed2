"""The experiment on test log-likelihoods: when it stops, whose weights it keeps, what it measures on which images."""
import copy
import random

import pytest
import torch
from killed_training import meta
from safetensors.torch import load_file

from lib import binarised, runs, train, vamplikelihood, vampprior
from lib.binarised import Binarised
from lib.evaluate import active_units, estimate, log_likelihood
from lib.train import generator

CPU = torch.device("cpu")
PARAMETERS = {"model": "hvae", "prior": "vamp", "dataset": "digits", "binarisation": "dynamic", "components": 10,
              "pseudo_init": "noise", "hidden": 30, "latent_dim": 4, "epochs": 12, "warmup": 4, "patience": 50,
              "batch_size": 50, "lr": 2e-3, "normalised": True, "samples": 500, "n_likelihood": 0, "seed": 1,
              "precision": "fp32"}


@pytest.fixture(scope="module")
def images():
    return binarised.load("digits", "dynamic")


def fit(job, epochs, **options):
    every = job["batches"].per_epoch
    return train.fit(**job, steps=epochs * every, log_every=every, checkpoint_every=every, numerics="fp32", **options)


@pytest.fixture(scope="module", params=["vae", "hvae"])
def trained(request, images):
    """(model, history) after a few epochs."""
    job = vamplikelihood.replica(PARAMETERS | {"model": request.param}, images, CPU)
    history = fit(job, PARAMETERS["epochs"])
    return job["state"]["model"].eval(), history


def tiny(images, n=60):
    """Few of the images, for what does not depend on them."""
    few = {name: getattr(images, name)[:n] for name in ("train", "valid", "test", "test_labels")}
    return Binarised(**vars(images) | few)


SMALL = PARAMETERS | {"hidden": 5, "latent_dim": 2, "components": 3, "batch_size": 20}      # 3 steps an epoch of `tiny`


# ------------------------------------------------------------------------------------------------ early stopping
def epochs_of_the_papers_code(losses, warmup, patience):
    """How many epochs its loop trains, its counter kept as it keeps it, while the losses last."""
    best, counter = 100_000, 0
    for epoch, loss in enumerate(losses, 1):
        if loss < best:
            counter, best = 0, loss
        else:
            counter += 1
            if epoch < warmup:
                counter = 0
            if counter > patience:
                return epoch
    return len(losses)


def epochs_here(losses, warmup, patience):
    ends = (n for n in range(1, len(losses) + 1) if vamplikelihood.exhausted(losses[:n], warmup, patience))
    return next(ends, len(losses))


@pytest.mark.parametrize(("losses", "warmup", "patience", "expected"), [
    ([5, 4, 3, 4, 5, 6, 7], 0, 2, 6),                     # the best is the third: two more are allowed, not three
    ([5, 4, 3, 4, 5, 6, 7], 0, 3, 7),
    ([1, 2, 3, 4, 5, 6, 7, 8], 5, 2, 7),                  # counted from the 5th epoch on: 1, 2, 3
    ([1, 2, 3, 4, 0, 6, 7, 8], 5, 2, 8),                  # the 5th is the best: the 8th exceeds
    ([1, 2, 3, 4, 5, 0, 7, 8], 5, 2, 8),                  # none exceeds
    ([3, 3, 3, 3, 3], 0, 2, 4),                           # as low is no better
    ([3, 3, 3, 2, 3, 3], 0, 2, 6), ([9, 8, 7, 6, 5], 0, 1, 5), ([7], 1, 1, 1), ([], 1, 1, 0)])
def test_training_ends_more_than_patience_epochs_after_the_best_once_the_kl_has_its_weight(
        losses, warmup, patience, expected):
    assert epochs_here(losses, warmup, patience) == expected == epochs_of_the_papers_code(losses, warmup, patience)


def test_the_rule_is_that_of_the_papers_code_on_any_losses():
    rng, stopped = random.Random(1), 0
    for _ in range(2000):
        losses = [rng.choice([rng.randrange(5), 9 - i / 3]) for i in range(rng.randrange(30))]
        warmup, patience = rng.randrange(12), rng.randrange(1, 6)
        expected = epochs_of_the_papers_code(losses, warmup, patience)
        stopped += expected < len(losses)
        assert epochs_here(losses, warmup, patience) == expected, (losses, warmup, patience)
    assert stopped > 500


def test_the_best_epoch_is_the_first_of_the_lowest():
    assert [vamplikelihood.best_epoch(losses) for losses in ([], [4], [4, 2, 3, 2], [1, 2])] == [0, 1, 2, 1]


def scripted(images, folder, losses, **changed):
    """A replica of three steps an epoch whose validation losses are given, and the weights it has at each of them."""
    job = vamplikelihood.replica(SMALL | changed, tiny(images), CPU, folder)
    weights = []

    def look():
        weights.append(copy.deepcopy(job["state"]["model"].state_dict()))
        return {"val_loss": torch.tensor(float(losses[len(weights) - 1]))}
    return job | {"look": look}, weights


def test_a_replica_stops_by_the_rule_and_gets_the_weights_of_its_best_epoch_back(images, tmp_path):
    losses = [1, 2, 9, 8, 3, 4, 5, 0, 0]                  # the 1st is the best, the 4th the last of the warm-up
    job, weights = scripted(images, tmp_path, losses, warmup=4, patience=2)
    history = fit(job, 9)
    assert history["val_loss"] == losses[:6] and epochs_of_the_papers_code(losses, 4, 2) == 6
    assert meta(tmp_path)["step"] == 18 and meta(tmp_path, "best")["step"] == 3
    model = job["state"]["model"]
    assert all(torch.equal(value, weights[5][name]) for name, value in model.state_dict().items())
    vamplikelihood.restore(job)
    assert all(torch.equal(value, weights[0][name]) for name, value in model.state_dict().items())
    assert not torch.equal(weights[0]["prior.u"], weights[5]["prior.u"])


def test_without_a_step_or_of_another_training_nothing_is_restored(images, tmp_path):
    job, _ = scripted(images, tmp_path, [])
    fit(job, 0)
    before = copy.deepcopy(job["state"]["model"].state_dict())
    vamplikelihood.restore(job)
    assert all(torch.equal(value, before[name]) for name, value in job["state"]["model"].state_dict().items())
    other, _ = scripted(images, tmp_path, [3, 2], lr=1e-4)
    fit(other, 2)
    with pytest.raises(train.TrainError, match="trained with lr = 0.0001, this run has 0.002"):
        vamplikelihood.restore(job)


def test_a_replica_is_what_its_parameters_say(images, tmp_path):
    job = vamplikelihood.replica(PARAMETERS | {"seed": 4}, images, CPU, tmp_path)
    model = job["state"]["model"]
    assert (job["title"], job["folder"], job["best_by"], job["batches"].size) == ("seed 4", tmp_path, "val_loss", 50)
    assert job["batches"].data is images.train and len(images.train) // 50 == job["batches"].per_epoch
    assert job["state"].keys() == {"model", "optimizer", "generator", "validation"}
    assert job["state"]["optimizer"].param_groups[0]["lr"] == 2e-3
    assert model.prior.u.shape == (10, 1, 28, 28) and model.encoder.heads.mean.weight.shape == (4, 30)
    same, other = (vamplikelihood.replica(PARAMETERS | {"seed": seed}, images, CPU) for seed in (4, 5))
    for name, value in model.state_dict().items():
        assert torch.equal(value, same["state"]["model"].state_dict()[name])
    assert not torch.equal(model.prior.u, other["state"]["model"].prior.u)
    fit(job, 1)
    kept = {name.split("/")[0] for name in load_file(tmp_path / "latest.safetensors")}
    assert kept == job["state"].keys()
    assert meta(tmp_path)["config"] == {name: (PARAMETERS | {"seed": 4})[name] for name in vamplikelihood.LEARNT_FROM}


def test_training_sees_other_bits_in_each_epoch_warms_up_by_epochs_and_looks_at_the_validation_images(
        images, monkeypatch):
    batches, draw = [], binarised.draw
    monkeypatch.setattr(binarised, "draw", lambda batch, noise: batches.append(draw(batch, noise)) or batches[-1])
    few = tiny(images)
    job = vamplikelihood.replica(SMALL | {"warmup": 2}, few, CPU)
    history = fit(job, 3)
    loss, rec, kl = (torch.tensor(history[name]) for name in ("loss", "rec", "kl"))
    assert ((loss - rec) / kl).tolist() == pytest.approx([0.5, 1, 1], abs=0.02)
    assert all(set(batch.unique().tolist()) == {0, 1} for batch in batches) and len(batches) == 9
    first, second, _ = torch.stack(batches).split(3)                     # each epoch sees every image once
    assert not torch.equal(first.sum((0, 1)), second.sum((0, 1)))
    assert first.mean().item() == pytest.approx(second.mean().item(), rel=0.05)
    noise = torch.Generator()
    noise.set_state(job["state"]["validation"].get_state())
    expected = -vampprior.evaluate(job["state"]["model"], few.valid, noise)["elbo"].mean()
    assert job["look"]()["val_loss"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("model", vamplikelihood.MODELS)
@pytest.mark.parametrize("kind", vampprior.PRIORS)
def test_every_model_takes_a_step_with_every_prior(model, kind, images):
    own = {"model": model, "prior": kind, "pseudo_init": "images" if model == "vae" else "noise", "batch_size": 6}
    job = vamplikelihood.replica(SMALL | own, tiny(images, 6), CPU)
    history = fit(job, 1)
    assert history["step"] == [1] and 300 < history["val_loss"][0] < 5000
    assert len(job["state"]["model"].components()[0]) == (1 if kind == "standard" else 3)


@pytest.mark.parametrize(("change", "says"), [
    ({"epochs": 0}, "epochs must be at least 1, got 0"), ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"samples": 0}, "samples must be at least 1, got 0"), ({"warmup": -1}, "warmup must be at least 0, got -1"),
    ({"n_likelihood": -1}, "n_likelihood must be at least 0, got -1"),
    ({"patience": 0}, "patience must be at least 1, got 0"),
    ({"pseudo_init": "inverse"}, "unknown pseudo_init 'inverse': use noise or images")])
def test_bad_parameters_are_refused_before_anything_is_trained(change, says):
    vamplikelihood.check(PARAMETERS | {"epochs": 1, "n_likelihood": 0, "warmup": 0})
    with pytest.raises(ValueError, match=says):
        vamplikelihood.check(PARAMETERS | change)


@pytest.mark.parametrize(("change", "says"), [
    ({"model": "cvae"}, "unknown model 'cvae': use vae, hvae or convhvae"), ({"prior": "gtm"}, "unknown prior 'gtm'"),
    ({"pseudo_init": "zero"}, "unknown pseudo_init 'zero': use images, inverse or noise"),
    ({"components": 0}, "components must be at least 1, got 0"), ({"warmup": -1}, "warmup must be at least 0 epochs"),
    ({"hidden": 0}, "latent_dim and hidden must be at least 1, got 2 and 0"), ({"lr": 0.0}, "must be positive, got 0"),
    ({"batch_size": 61}, "batch size must be between 1 and the 60 training items, got 61")])
def test_what_cannot_be_trained_is_refused_in_a_sentence(change, says, images):
    with pytest.raises((ValueError, train.TrainError), match=says) as error:
        vamplikelihood.replica(SMALL | change, tiny(images), CPU)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ measuring
def measured(trained, images, n=40, samples=100, seed=1):
    model, history = trained
    return vamplikelihood.measure(model, images, samples, n, history["val_loss"], generator(seed))


def test_what_is_measured_and_of_how_many_images(trained, images):
    model, history = trained
    metrics, means = measured(trained, images)
    names = {"log_likelihood", "iwae_1", "iwae_10", "ess", "elbo", "rec", "kl_z2", "active_z2", "epochs_done",
             "best_epoch"}
    assert metrics.keys() == names | ({"kl_z1", "active_z1"} if model.lower else set())
    units = {"ess": "draws", "active_z2": "active units", "active_z1": "active units",
             "epochs_done": "epochs", "best_epoch": "epochs"}
    for name, metric in metrics.items():
        assert metric["unit"] == units.get(name, "nats per image"), name
        of = 40 if name in ("log_likelihood", "iwae_1", "iwae_10", "ess") else 1 if name in units else len(images.test)
        assert metric["n"] == of and (metric["se"] is None) == (name in units and name != "ess"), name
    assert metrics["epochs_done"]["value"] == len(history["val_loss"]) == PARAMETERS["epochs"]
    assert metrics["best_epoch"]["value"] == vamplikelihood.best_epoch(history["val_loss"])
    assert means.keys() == ({"z2", "z1"} if model.lower else {"z2"})
    for name, mean in means.items():
        assert mean.shape == (len(images.test), 4) and metrics[f"active_{name}"] == active_units(mean)
    kl = metrics["kl_z2"]["value"] + (metrics["kl_z1"]["value"] if model.lower else 0)
    assert metrics["elbo"]["value"] == pytest.approx(metrics["rec"]["value"] - kl, rel=1e-9)


def test_the_likelihood_is_of_the_same_random_images_for_every_seed_and_of_all_for_0(images, monkeypatch):
    seen = []

    def noted(log_weights, x, samples, bounds):
        seen.append(x)
        return log_likelihood(log_weights, x[:2], samples, bounds)
    monkeypatch.setattr(vamplikelihood, "log_likelihood", noted)
    for seed, n in ((1, 30), (2, 30), (1, 0), (1, 10_000)):
        job = vamplikelihood.replica(SMALL | {"seed": seed}, images, CPU)
        vamplikelihood.measure(job["state"]["model"], images, 20, n, [1.0], generator(seed))
    test = {image.numpy().tobytes(): i for i, image in enumerate(images.test)}
    order = [[test[(255 * image).to(torch.uint8).numpy().tobytes()] for image in x] for x in seen]
    assert torch.equal(seen[0], seen[1]) and [len(x) for x in seen] == [30, 30, 360, 360]
    assert max(order[0]) > 180 > min(order[0]) and order[0] != sorted(order[0])
    assert sorted(order[2]) == sorted(range(360)) or len(set(order[2])) == len(test)


def test_the_mean_log_weight_is_the_elbo(trained, images, monkeypatch):
    """Paired over the images, at other draws: no term is missing or of another sign."""
    found = {}

    def noted(log_weights, x, samples, bounds):
        found["x"], found["elbo"] = x, log_weights(x, 20).double().mean(1)
        return log_likelihood(log_weights, x, samples, bounds)
    monkeypatch.setattr(vamplikelihood, "log_likelihood", noted)
    measured(trained, images, n=200, samples=1)
    terms = vampprior.evaluate(trained[0], (255 * found["x"]).to(torch.uint8), generator(2))
    apart = estimate(found["elbo"] - terms["elbo"], "nats")
    assert abs(apart["value"]) < 4 * apart["se"]
    for name in terms.keys() & {"kl", "kl_z1", "kl_z2"}:
        assert terms[name].mean() > 12 * apart["se"], name                # it would be seen


def test_the_log_likelihood_is_above_the_elbo_and_near_that_of_other_draws(trained, images):
    """On all test images; the second estimate has noise of its own."""
    first, second = (measured(trained, images, n=0, samples=200, seed=seed)[0] for seed in (1, 2))
    assert first["log_likelihood"]["value"] > first["elbo"]["value"] + first["elbo"]["se"] / 10
    assert first["log_likelihood"]["value"] != second["log_likelihood"]["value"]
    assert abs(first["log_likelihood"]["value"] - second["log_likelihood"]["value"]) < 0.5
    assert 1 < first["ess"]["value"] < 200
    lowest = 784 * -0.6931
    assert lowest < first["elbo"]["value"] < first["iwae_10"]["value"] < first["log_likelihood"]["value"] < 0


def test_the_bounds_rise_with_the_draws_which_are_independent(trained, images):
    """IWAE-1 <= IWAE-10 <= IWAE-500, each from draws of its own: paired over the images, by many standard errors."""
    model, x, components = trained[0], vampprior.pixels(images.test[:240]), trained[0].components()
    found = []
    for k in (1, 10, 500):
        noise = generator(k)

        def log_weights(x, k, noise=noise):
            rec, *kls = model.terms(x, noise, components, k)
            return rec - sum(kls)
        found.append(log_likelihood(log_weights, x, k)["log_likelihood"])
    for lower, higher in zip(found, found[1:], strict=False):
        gap = estimate(higher - lower, "nats")
        assert gap["value"] > 3 * gap["se"] > 0


def test_the_bounds_that_are_reported_divide_the_samples():
    assert {samples: vamplikelihood.bounds(samples) for samples in (1, 10, 20, 100, 500, 505, 5000)} == {
        1: (), 10: (), 20: (10,), 100: (10,), 500: (10, 100), 505: (), 5000: (10, 100)}


# ------------------------------------------------------------------------------------------------ many runs
def record(value, date="2026-01-01", data="a" * 64, **changed):
    metric = {"value": value, "se": 0.5, "n": 40, "unit": "nats per image"}
    return {"parameters": PARAMETERS | changed, "date": date, "dataset": {"name": "digits", "sha256": data},
            "metrics": {"log_likelihood": metric}}


def test_runs_are_paired_with_those_of_the_standard_prior_that_differ_in_nothing_else():
    """A standard prior has no components, so one such run serves all K; other data, or any other parameter, do not."""
    found = [record(-80.0), record(-81.0, seed=2), record(-82.0, seed=3), record(-90.0, prior="standard"),
             record(-92.0, prior="standard", seed=2, device="cuda", replicas=2), record(-1.0, prior="standard", seed=4),
             record(-3.0, prior="mog"), record(-2.0, prior="standard", seed=3, lr=1e-4),
             record(-99.0, date="2025-12-31"), record(-70.0, model="vae"), record(-75.0, model="vae", prior="standard"),
             record(-76.0, components=1), record(-60.0, seed=7, data="b" * 64), record(-61.0, prior="standard", seed=7)]
    random.Random(1).shuffle(found)
    assert "device" in runs.HOUSEKEEPING
    gained = {(gain["prior"], gain["setting"]): (gain["ours"], gain["standard"])
              for gain in vamplikelihood.gains(found)}
    rest = "12 epochs, data aaaaaaaa"
    assert gained == {("vamp", f"hvae, digits dynamic, K = 10, {rest}"): ([-80.0, -81.0], [-90.0, -92.0]),
                      ("vamp", f"vae, digits dynamic, K = 10, {rest}"): ([-70.0], [-75.0]),
                      ("vamp", f"hvae, digits dynamic, K = 1, {rest}"): ([-76.0], [-90.0]),
                      ("mog", f"hvae, digits dynamic, K = 10, {rest}"): ([-3.0], [-90.0])}
    assert vamplikelihood.gains([]) == []


def test_settings_that_differ_in_an_unusual_parameter_stay_apart():
    found = [record(value, prior=kind, hidden=hidden) for value, kind, hidden in (
        (-80.0, "vamp", 20), (-82.0, "standard", 20), (-70.0, "vamp", 30), (-75.0, "standard", 30))]
    gained = {gain["setting"]: gain["ours"] for gain in vamplikelihood.gains(found)}
    assert gained == {"hvae, digits dynamic, K = 10, 12 epochs, hidden 20": [-80.0],
                      "hvae, digits dynamic, K = 10, 12 epochs, hidden 30": [-70.0]}


def test_a_gain_has_an_interval_over_seeds_and_stands_beside_the_published_one():
    paper = {"model": "vae", "dataset": "mnist", "components": 500}
    found = [record(value, seed=seed, prior=kind, **paper)
             for kind, values in (("vamp", (-83.0, -82.0, -82.0)), ("standard", (-85.0, -84.5, -84.0)))
             for seed, value in enumerate(values)]
    row, = vamplikelihood.claims(found).to_dict("records")
    assert row["pairs"] == 3 and row["gain"] == "+2.17" and row["published"] == "+2.12"
    half = 4.302653 * 0.288675 / 3 ** 0.5                                 # Student's t; the deviation of 2, 2.5, 2
    assert row["95 % interval"] == f"{13 / 6 - half:+.2f} to {13 / 6 + half:+.2f}"
    alone, = vamplikelihood.claims(found[:1] + found[3:4]).to_dict("records")
    assert alone["pairs"] == 1 and alone["95 % interval"] == "–"


def test_the_effect_of_k_is_of_the_seeds_that_all_k_have():
    found = [record(-80.0, components=10), record(-84.0, components=10, seed=2), record(-90.0, components=1),
             record(-50.0, components=10, pseudo_init="images")]
    name = "hvae, digits dynamic, 12 epochs"
    assert sorted(vamplikelihood.by_components(found)) == [(1, -90.0, 0.5, name), (10, -80.0, 0.5, name)]
    two = sorted(vamplikelihood.by_components([*found, record(-92.0, components=1, seed=2)]))
    assert [point[:2] for point in two] == [(1, -91.0), (10, -82.0)]
    assert [point[2] for point in two] == pytest.approx([1.0, 2.0])
