"""The port's experiment: faults 10, 13 and 14 measured, every option of its command line, complaints in a sentence."""
import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import nn
from toy import toy_record

import lib
from lib import classifier, data, launch, runs, train, vampport, vampprior
from lib.__main__ import main
from lib.evaluate import exact
from lib.train import generator

CPU = torch.device("cpu")
PARAMETERS = {"model": "vae", "prior": "vamp", "dataset": "digits", "lr": 1e-3, "epochs": 1, "batch_size": 64,
              "latent_dim": 2, "network_size": 1, "activation": "relu", "gs_key": "", "components": 20,
              "pseudo_init": "images", "n_train": 0, "n_generated": 50, "seed": 1, "sample_seed": 8888,
              "precision": "fp32"}


@pytest.fixture(scope="module")
def images():
    return data.load("digits", size=28)


def few(images, train_images=64, test_images=20):
    """The first images of a data set."""
    return dataclasses.replace(images, train=images.train[:train_images], test=images.test[:test_images],
                               train_labels=images.train_labels[:train_images],
                               test_labels=images.test_labels[:test_images])


# ------------------------------------------------------------------------------------------------ the model
@pytest.mark.parametrize("model", ["vae", "hvae"])
@pytest.mark.parametrize("kind", ["standard", "vamp"])
def test_a_replica_is_what_its_parameters_say(model, kind, images, tmp_path):
    own = PARAMETERS | {"model": model, "prior": kind, "latent_dim": 6, "network_size": 2, "activation": "elu",
                        "seed": 3}
    job = vampport.replica(own, images, CPU, tmp_path)
    net, d = job["state"]["model"], 6 if model == "vae" else 3
    assert (job["title"], job["folder"], job["batches"].size) == ("seed 3", tmp_path, 64)
    assert job["batches"].data is images.train and job["batches"].per_epoch == len(images.train) // 64
    assert job["state"]["optimizer"].param_groups[0]["lr"] == 1e-3
    assert job["state"].keys() == {"model", "optimizer", "generator", "validation"}
    assert [net.encoder.trunk[i].out_channels for i in (0, 2, 4, 6)] == [16, 32, 32, 64]
    assert isinstance(net.encoder.trunk[1], nn.ELU) and net.encoder.heads.mean.out_features == d
    assert net.components()[0].shape == ((20, d) if kind == "vamp" else (1, d)) and (net.lower is None) == (d == 6)
    assert job["config"] == {name: own[name] for name in vampport.LEARNT_FROM} and "gs_key" not in job["config"]
    same, other = (vampport.replica(own | {"seed": seed}, images, CPU)["state"]["model"] for seed in (3, 4))
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in net.state_dict().items())
    assert not torch.equal(net.encoder.heads.mean.weight, other.encoder.heads.mean.weight)
    assert all(layer.bias.abs().max() == 0 for layer in net.modules() if isinstance(layer, nn.Linear | nn.Conv2d))


@pytest.mark.parametrize(("start", "low", "high"), [("images", 0.5, 0.7), ("inverse", 0, 1)])
def test_pseudo_inputs_start_in_a_narrow_grey_or_as_they_are_and_learn(start, low, high, images):
    """Known fault 13 and its remedy."""
    job = vampport.replica(PARAMETERS | {"pseudo_init": start}, few(images), CPU)
    before = vampprior.pseudo_inputs(job["state"]["model"], 20)
    assert low <= before.min() < low + 0.01 and high - 0.01 < before.max() <= high
    train.fit(**job, steps=1, numerics="fp32")
    after = vampprior.pseudo_inputs(job["state"]["model"], 20)
    assert 0 < (after - before).abs().max() < 3e-4                        # a step of Adam, a fifth of it is seen


def test_training_is_on_grey_images_without_warm_up_and_looks_at_the_test_images(images):
    own = few(images)
    job = vampport.replica(PARAMETERS, own, CPU)
    history = train.fit(**job, steps=2, log_every=1, numerics="fp32")
    assert history["loss"] == pytest.approx([rec + kl for rec, kl in zip(history["rec"], history["kl"], strict=True)])
    noise = torch.Generator()
    noise.set_state(job["state"]["validation"].get_state())
    expected = vampprior.evaluate(job["state"]["model"], own.test, noise)
    looked = job["look"]()
    assert looked["val_loss"].item() == pytest.approx(-expected["elbo"].mean().item(), rel=1e-6)
    assert {"val_loss", "val_rec", "val_kl"} < history.keys() and "stop" not in job


@pytest.mark.skipif(not os.environ.get("VAEBOOK_DATA"), reason="needs the real data")
@pytest.mark.parametrize("model", ["vae", "hvae"])
def test_fashion_mnist_with_a_vampprior_trains_at_the_ports_size(model):
    """Known fault 11: the data set has one name here."""
    if not data.find("fashionmnist"):
        pytest.skip("needs Fashion-MNIST")
    images = data.load("fashionmnist", size=28)
    assert len(images.train) == 60_000 and len(images.test) == 10_000
    own = PARAMETERS | {"model": model, "dataset": "fashionmnist", "components": 500, "network_size": 4, "lr": 1e-4}
    job = vampport.replica(own | {"batch_size": 8}, few(images, 60_000, 20), CPU)
    assert sum(p.numel() for p in job["state"]["model"].parameters()) == {"vae": 2_366_501, "hvae": 4_457_939}[model]
    history = train.fit(**job, steps=2, log_every=1, numerics="fp32")
    assert all(300 < value < 800 for name in ("loss", "val_loss") for value in history[name])


@pytest.mark.parametrize(("change", "says"), [
    ({"activation": "rleu"}, "unknown activation 'rleu': use one of relu, elu, selu,"),
    ({"model": "hvae", "latent_dim": 3}, "an hvae shares latent_dim between its two layers: it must be even, got 3"),
    ({"model": "convhvae"}, "unknown model 'convhvae': use vae or hvae"),
    ({"prior": "vmap"}, "unknown prior 'vmap': use one of standard, vamp,"),
    ({"components": 0}, "components must be at least 1, got 0"),
    ({"latent_dim": 0}, "latent_dim and network_size must be at least 1, got 0 and 1"),
    ({"network_size": 0}, "latent_dim and network_size must be at least 1, got 2 and 0"),
    ({"lr": 0.0}, "the learning rate must be positive, got 0.0"),
    ({"batch_size": 65}, "batch size must be between 1 and the 64 training items, got 65"),
    ({"batch_size": 0}, "batch size must be between 1 and the 64 training items, got 0")])
def test_what_cannot_be_trained_is_refused_in_a_sentence(change, says, images):
    with pytest.raises((ValueError, train.TrainError), match=says) as error:
        vampport.replica(PARAMETERS | change, few(images), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("change", "says"), [
    ({"epochs": 0}, "epochs must be at least 1, got 0"), ({"n_train": -5}, "n_train must be at least 0, got -5"),
    ({"n_generated": 1}, "n_generated must be at least 2, got 1"), ({"components": 0}, "components must be at least 1"),
    ({"pseudo_init": "noise"}, "unknown pseudo_init 'noise': use images, inverse"),
    ({"prior": "mog"}, "unknown prior 'mog': use standard, vamp"), ({"dataset": "shapes"}, "unknown dataset 'shapes'"),
    ({"activation": "rleu"}, "unknown activation 'rleu'"), ({"model": "hvae", "latent_dim": 3}, "even, got 3")])
def test_bad_parameters_are_refused_before_anything_is_trained(change, says):
    vampport.check(PARAMETERS | {"epochs": 1})
    with pytest.raises(ValueError, match=says):
        vampport.check(PARAMETERS | change)


# ------------------------------------------------------------------------------------------------ measuring
class Looked(nn.Module):
    """q(z|x) whose mean is a multiple of the image's first pixels, and whose draws are the mean."""

    def __init__(self, d, scale=1.0):
        super().__init__()
        self.d, self.scale = d, scale

    def forward(self, x):
        mean = self.scale * x.flatten(1)[:, :self.d]
        return mean, torch.full_like(mean, -60.0)


class Below(nn.Module):
    """q(z1|x, z2) from the image's last pixels; p(z1|z2) far away from N(0, I)."""

    def __init__(self, d, scale=1.0):
        super().__init__()
        self.d, self.scale = d, scale

    def features(self, x):
        return self.scale * x.flatten(1)[:, -self.d:]

    def posterior(self, features, z2):
        return features, torch.full_like(features, -60.0)

    def prior(self, z2):
        return torch.full_like(z2, 300.0), torch.zeros_like(z2)


class Shade(nn.Module):
    """Images as grey as sigmoid(sum of the codes)."""

    def forward(self, *codes):
        return torch.cat(codes, 1).sum(1).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)


def pictures(n, seed):
    return torch.randint(256, (n, 1, 28, 28), generator=generator(seed), dtype=torch.uint8)


def known(n_train=30, n_test=70):
    labels = (torch.zeros(n, dtype=torch.long) for n in (n_train, n_test))
    return data.Dataset("known", pictures(n_train, 1), pictures(n_test, 2), *labels, ("0",), "")


def model_of(lower, d=2, scale=1.0):
    """A VAE, or an HVAE, whose prior of z2 has one component at 300."""
    prior = vampprior.Mog(1, d, generator(1))
    prior.means.data.fill_(300.0)
    return vampprior.VAE(prior, Looked(d, scale), Shade(), Below(d, scale) if lower else None)


@pytest.fixture
def compared(monkeypatch):
    """Stands for the classifier: what is compared with what, as [(images, the moments they are compared with)]."""
    found = []
    monkeypatch.setattr(classifier, "moments", lambda net, images: ("moments", images))
    monkeypatch.setattr(classifier, "cfd", lambda net, images, known: found.append((images, known)) or exact(1, "CFD"))
    return found


@pytest.mark.parametrize("lower", [False, True], ids=["vae", "hvae"])
def test_images_of_the_learned_prior_and_of_a_unit_normal_are_compared_with_the_test_images(compared, lower):
    """Known fault 10: codes at 300 give white images, codes of N(0, I) grey ones."""
    own = known()
    metrics = vampport.measure(model_of(lower), own, None, 32, 0, 25, generator(1))
    (prior, a), (normal, b), (real, c) = compared
    assert all(name == "moments" and torch.equal(images, own.test) for name, images in (a, b, c))
    assert prior.shape == normal.shape == (25, 1, 28, 28) and prior.dtype == normal.dtype == torch.uint8
    assert prior.min() == 255 and 20 < normal.float().mean() < 235 and normal.max() < 255
    assert torch.equal(real, own.train[:25])
    assert {name for name in metrics if name.startswith("cfd")} == {"cfd_prior", "cfd_normal", "cfd_train"}


@pytest.mark.parametrize(("n", "batch_size"), [(70, 32), (70, 64), (64, 32), (20, 32)])
def test_averaging_over_batches_gives_the_images_of_the_last_one_another_weight(compared, n, batch_size, images):
    """Known fault 14: off by (1/B - n_last/N) (m_last - m_rest), nothing where the batches are equal."""
    own, job = known(n_test=n), vampport.replica(PARAMETERS, few(images), CPU)
    own.test[-6:] = 0                                                     # the last are other images
    model = job["state"]["model"]
    metrics = vampport.measure(model, own, None, batch_size, 0, 2, generator(1))
    elbo = vampprior.evaluate(model, own.test, generator(1))["elbo"]
    last = n % batch_size or batch_size
    batches, rest = -(-n // batch_size), elbo[:-last].mean().item() if n > last else 0.0
    off = (1 / batches - last / n) * (elbo[-last:].mean().item() - rest)
    assert metrics["elbo_val"]["value"] == pytest.approx(elbo.mean().item(), rel=1e-12)
    found = metrics["elbo_val_by_batches"]["value"] - metrics["elbo_val"]["value"]
    assert found == pytest.approx(off, rel=1e-6, abs=1e-9)
    assert (abs(off) > 0.1) == (n % batch_size > 0 and n > batch_size)


@pytest.mark.parametrize("lower", [False, True], ids=["vae", "hvae"])
def test_codes_inside_the_unit_normal_are_counted_over_all_layers(compared, lower):
    """49 of 70 test images have codes just inside the radius that holds 99 %, the others just outside."""
    own, d = known(), 4 if lower else 2
    radius = chi2.ppf(0.99, d) ** 0.5
    own.test[:49], own.test[49:] = 128, 129
    scale = radius / d ** 0.5 / (128.5 / 255)
    metrics = vampport.measure(model_of(lower, 2, scale), own, None, 32, 0, 2, generator(1))
    assert metrics["inside_normal"]["value"] == pytest.approx(0.7) and metrics["inside_normal"]["n"] == 70
    spread = np.std(np.repeat([128, 129], [49, 21]), ddof=1) * scale / 255
    assert metrics["code_spread"]["value"] == pytest.approx(spread, rel=1e-4)


@pytest.mark.parametrize("model", ["vae", "hvae"])
def test_what_is_measured_and_of_how_many_images(compared, model, images):
    own, net = few(images), vampport.replica(PARAMETERS | {"model": model}, few(images), CPU)["state"]["model"]
    metrics = vampport.measure(net, own, None, 16, 0, 10, generator(1))
    names = {"elbo_val", "rec_val", "kl_val", "elbo_val_by_batches", "elbo_train", "cfd_prior", "cfd_normal",
             "cfd_train", "inside_normal", "code_spread"}
    assert metrics.keys() == names | ({"kl_z2_val", "kl_z1_val"} if model == "hvae" else set())
    assert set(vampport.METRICS) <= names
    assert all(set(metric) == {"value", "se", "n", "unit"} for metric in metrics.values())
    assert metrics["elbo_val"]["n"] == 20 and metrics["elbo_train"]["n"] == 64
    assert metrics["elbo_val"]["value"] == pytest.approx(metrics["rec_val"]["value"] - metrics["kl_val"]["value"])
    part = vampport.measure(net, own, None, 16, 30, 10, generator(1))["elbo_train"]
    assert part["n"] == 30 and part["value"] != metrics["elbo_train"]["value"]


# ------------------------------------------------------------------------------------------------ looking
@pytest.mark.parametrize(("model", "latent_dim", "axes", "means"), [
    ("vae", 1, ("$z$", "at random"), 1), ("vae", 2, ("first of $z$", "second of $z$"), 2),
    ("vae", 4, ("UMAP 1", "UMAP 2"), None), ("hvae", 2, ("$z_2$", "$z_1$"), 1),
    ("hvae", 4, ("UMAP 1", "UMAP 2"), None)])
def test_latent_maps_show_draws_and_means_of_all_layers(model, latent_dim, axes, means, images, monkeypatch):
    embedded = []
    monkeypatch.setattr(vampport.embedding, "umap", lambda z: embedded.append(z) or z[:, :2] + 100)
    own = PARAMETERS | {"model": model, "latent_dim": latent_dim}
    net = vampport.replica(own, few(images), CPU)["state"]["model"]
    panels, named, prior = vampport.latent_maps(net, images.test[:20], generator(1))
    found = vampprior.codes(net, images.test[:20], generator(1))
    draws, centres = (torch.cat([found[kind + z] for z in ("z2", "z1") if kind + z in found], 1)
                      for kind in ("", "mean_"))
    assert named == axes and all(z.shape == (20, 2) for z in panels.values())
    before = "UMAP of " if latent_dim == 4 else ""
    assert list(panels) == [before + "a draw of q(z|x)", before + "mean of q(z|x)"]
    for z, expected in zip(panels.values(), (draws, centres), strict=True):
        if latent_dim == 4:
            torch.testing.assert_close(z, expected[:, :2] + 100)
        else:
            torch.testing.assert_close(z[:, :latent_dim], expected)
    assert [z.shape for z in embedded] == [(20, 4)] * 2 * (latent_dim == 4)
    if latent_dim == 1:                                                   # what is at random is no code
        assert all(0.5 < z[:, 1].std() < 1.6 for z in panels.values())
    assert (prior is None) if means is None else torch.equal(prior, net.components()[0]) and prior.shape == (20, means)


def test_a_grid_search_is_a_table_of_its_complete_runs_and_of_what_differs_between_them(tmp_path, monkeypatch):
    monkeypatch.setattr(vampport, "root", lambda: tmp_path)

    def record(name, value, key="lr", **changed):
        metrics = {metric: {"value": value, "se": 0.5, "n": 9, "unit": "nats"} for metric in vampport.METRICS}
        return toy_record(experiment="vampprior", run=name, metrics=metrics,
                          parameters=PARAMETERS | {"gs_key": key} | changed)

    def write(found, file="results.json"):
        folder = tmp_path / "runs" / "vampprior" / found["run"]
        folder.mkdir(parents=True)
        (folder / file).write_text(json.dumps(found))
    for found in (record("a", -100.0), record("b", -110.0, lr=0.1, seed=2), record("own", -3.0, lr=0.1),
                  record("c", -120.0, lr=0.1, seed=3, device="cuda"), record("other", -4.0, key="size", lr=7.0)):
        write(found)
    write(record("unfinished", -5.0, lr=9.0), "results.json.pending")
    saved = [record("own", -130.0, lr=0.5, latent_dim=4), record("c", -120.0, lr=0.1, seed=3),
             record("d", -130.0, lr=0.5, latent_dim=4, seed=2)]
    table = vampport.grid_search("lr", saved)
    assert list(table.columns) == ["lr", "latent_dim", "seeds", "elbo_val", "elbo_train", "kl_val"]
    rows = {row.lr: (row.latent_dim, row.seeds, row.elbo_val) for row in table.itertuples()}
    assert rows == {"0.001": ("2", 1, "−100.0 ± 1.2 (n=9 items)"), "0.1": ("2", 2, "−115 ± 64"),
                    "0.5": ("4", 2, "−130.0000")}
    assert list(vampport.grid_search("new", [record("own", -1.0, key="new")]).columns)[0] == "seeds"


# ------------------------------------------------------------------------------------------------ the command line
def idx(array):
    return gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes(), mtime=0)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """lib and the notebook as a checkout of their own, where what takes its time is small: Fashion-MNIST and the
    training of the classifier; and UMAP, which compiles for 10 s, shows two of the dimensions."""
    folder = tmp_path_factory.mktemp("port") / "checkout"
    shutil.copytree(lib.root() / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "notebooks").mkdir()
    for name in ("vampprior.ipynb", "presets.yml"):
        shutil.copy(lib.root() / "notebooks" / name, folder / "notebooks")
    source = (folder / "lib" / "data.py").read_text()
    rng = np.random.RandomState(1)
    parts = [array for n in (200, 60) for array in (rng.randint(256, size=(n, 28, 28)), np.arange(n) % 10)]
    for (file, digest), array in zip(data.SOURCES["fashionmnist"].files.items(), parts, strict=True):
        content = idx(array.astype(np.uint8))
        path = folder / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        assert source.count(digest) == 1
        source = source.replace(digest, hashlib.sha256(content).hexdigest())
    (folder / "lib" / "data.py").write_text(source)
    source = (folder / "lib" / "classifier.py").read_text()
    assert '"epochs": 10, "least_steps": 300' in source
    source = source.replace('"epochs": 10, "least_steps": 300', '"epochs": 1, "least_steps": 2')
    (folder / "lib" / "classifier.py").write_text(source)
    (folder / "lib" / "embedding.py").write_text("def umap(z):\n    return z[:, :2].cpu()\n")
    return folder


@pytest.fixture
def here(checkout, monkeypatch):
    """This process and its kernels take the checkout for theirs."""
    for module in (runs, launch):
        monkeypatch.setattr(module, "root", lambda: checkout)
    monkeypatch.setenv("PYTHONPATH", str(checkout))
    for name in ("VAEBOOK_DATA", "VAEBOOK_RUN", "VAEBOOK_PRESET"):
        monkeypatch.delenv(name, raising=False)
    return checkout


OPTIONS = {"model": "hvae", "prior": "standard", "dataset": "fashionmnist", "lr": 0.002, "epochs": 1, "batch_size": 40,
           "latent_dim": 4, "network_size": 2, "activation": "elu", "gs_key": "mine"}
BESIDE = {"components": 5, "n_generated": 20}


def last_table(path):
    """What the last cell of an executed notebook shows, in words."""
    output, = json.loads(path.read_text())["cells"][-1]["outputs"]
    return "".join(output["data"]["text/plain"]).split()


def test_every_option_of_the_port_works_from_papermill_and_from_the_command_line(here, capsys):
    """All changed at once, Fashion-MNIST in both; the second run finds the first one in their grid search."""
    from papermill.cli import papermill
    notebook, out = here / "notebooks" / "vampprior.ipynb", here / "out.ipynb"
    assert all(runs.parameters("vampprior")[name].default != value for name, value in OPTIONS.items())
    words = [word for name, value in (OPTIONS | BESIDE).items() for word in ("-p", name, str(value))]
    papermill.main([str(notebook), str(out), *words, "--cwd", str(here), "--no-progress-bar", "--log-level", "ERROR"],
                   standalone_mode=False)
    first = runs.records("vampprior", here / "runs")[0]
    own = OPTIONS | BESIDE | {"prior": "vamp", "activation": "tanh", "lr": 0.003}
    words = [word for name, value in own.items() for word in ("--set", f"{name}={value}")]
    assert main(["run", "vampprior", *words]) == 0
    second = next(one for one in runs.records("vampprior", here / "runs") if one["run"] != first["run"])
    for record, values in ((first, OPTIONS | BESIDE), (second, own)):
        assert {name: record["parameters"][name] for name in values} == values
        assert record["dataset"]["name"] == "fashionmnist" and record["metrics"]["elbo_train"]["n"] == 200
        assert len(record["history"]["loss"]) == 1 and record["history"]["step"] == [200 // 40]
        figures = {"losses.png", "latents.png", "reconstructions.png", "samples.png"}
        assert set(record["figures"]) == figures | ({"pseudo-inputs.png"} if values["prior"] == "vamp" else set())
    assert last_table(out)[:2] == ["seeds", "elbo_val"]
    shown = last_table(here / "runs" / "vampprior" / second["run"] / "notebook.ipynb")
    assert shown[:4] == ["prior", "lr", "activation", "seeds"]
    assert shown[shown.index("0"):][:4] == ["0", "standard", "0.002", "elu"]
    assert shown[shown.index("vamp") - 1:][:4] == ["1", "vamp", "0.003", "tanh"]


@pytest.mark.parametrize(("changes", "says"), [
    (["activation=rleu"], "ValueError: unknown activation 'rleu': use one of relu, elu, selu,"),
    (["model=hvae", "latent_dim=3"], "ValueError: an hvae shares latent_dim between its two layers: it must be even")])
def test_what_cannot_be_trained_is_one_line_of_the_command_line(here, capsys, changes, says):
    words = [word for change in [*changes, "dataset=fashionmnist"] for word in ("--set", change)]
    assert main(["run", "vampprior", *words]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: vampprior") and err.count("\n") == 1 and says in err and out == ""
