"""The autoencoders at 64x64: flips in the step, exact resume, images without labels, how images look in numbers."""
import math

import pytest
import torch
import torch.nn.functional as F

from lib import autoencoders, celeba, plots, plots_faces, runs, sampling, train
from lib.data import Dataset
from lib.evaluate import mmd

IMAGES = torch.randint(0, 256, (48, 3, 64, 64), dtype=torch.uint8, generator=train.generator(0))
NONE = torch.empty(0, dtype=torch.int64)
FACES = Dataset("celeba", IMAGES[:32], IMAGES[32:], NONE, NONE, (), "0" * 64)
LOOKING = {"steps", "sample_seed", "n_samples", "sample_batch_size", "n_interpolate", "n_traverse", "traverse_range",
           "traverse_dims", "save_images", "device", "resume"}


def network(kind="vae", z_dim=6, dim=2):
    """A small autoencoder of 64x64 images."""
    model = autoencoders.Autoencoder(kind, (3, 64), z_dim, dim, autoencoders.MULTIPLIERS[64])
    return model.initialise(train.generator(1))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_presets_are_the_works_network_and_the_papers_is_not_reduced():
    presets = runs.presets("celeba-autoencoders")
    paper = runs.check("celeba-autoencoders", presets["paper"])
    assert runs.reduced("celeba-autoencoders", paper) == []
    for values in presets.values():
        own = runs.check("celeba-autoencoders", values)
        model = autoencoders.Autoencoder("vae", (3, 64), own["z_dim"], own["dim"], autoencoders.MULTIPLIERS[64])
        assert (count(model.encoder), count(model.decoder)) == (7_282_624, 3_807_043)
        assert own["crop"] in celeba.CROPS and own["flip"]


def test_every_parameter_that_the_weights_depend_on_is_in_the_checkpoints_configuration():
    declared = set(runs.parameters("celeba-autoencoders"))
    assert set(autoencoders.LEARNT_FROM_64) == declared - LOOKING and LOOKING < declared


# ------------------------------------------------------------------------------------------------ flips
def first_losses(kind, batch, noise):
    """rec and the other terms of a kind's first step on a batch, by hand in float64, the noise from a generator."""
    model = network(kind).double().train()
    x = batch.double() / 127.5 - 1
    mean, log_var = model.encoder(x)
    z = mean
    if model.variational:
        z = mean + torch.randn(mean.shape, generator=noise).double() * torch.exp(log_var / 2)
    found = {"rec": F.mse_loss(model.decoder(z), x)}
    if kind == "mmd-vae":
        found["mmd"] = mmd(torch.randn(mean.shape, generator=noise).double(), z)
    return found


@pytest.mark.parametrize("kind", autoencoders.KINDS)
def test_the_step_flips_each_image_by_the_generator_before_anything_else(kind):
    noise, batch = train.generator(2), IMAGES[:8]
    coin = torch.rand(8, generator=noise) < 0.5
    assert 0 < coin.sum() < 8
    flipped = torch.stack([x.flip(-1) if c else x for x, c in zip(batch, coin, strict=True)])
    expected = first_losses(kind, flipped, noise)
    step, _ = autoencoders.training(network(kind), train.generator(2), augment=celeba.flip)
    before = batch.clone()
    found = step(batch)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-4)
    assert torch.equal(batch, before)


@pytest.mark.parametrize("kind", ["ae", "vae"])
def test_without_flips_the_generator_makes_the_noise_alone(kind):
    noise = train.generator(2)
    expected = first_losses(kind, IMAGES[:8], noise)
    generator = train.generator(2)
    step, _ = autoencoders.training(network(kind), generator)
    assert step(IMAGES[:8])["rec"].item() == pytest.approx(expected["rec"].item(), rel=1e-4)
    assert torch.equal(generator.get_state(), noise.get_state())


@pytest.mark.parametrize(("kind", "numerics"), [("aae", "fp32"), ("mmd-vae", "fp32"), ("beta-vae", "bf16")])
def test_a_resumed_run_is_bit_equal_to_one_that_went_on(kind, numerics, tmp_path):
    def trained(folder, steps, resume=""):
        model = network(kind)
        step, state = autoencoders.training(model, train.generator(2), augment=celeba.flip)
        history = train.fit(step, train.Shuffled(FACES.train, 8, 1), steps=steps, state=state, folder=tmp_path / folder,
                            config={"model": kind}, resume=resume, numerics=numerics, log_every=3, checkpoint_every=2)
        return model.state_dict(), history

    whole, history = trained("whole", 9)
    trained("parts", 4)
    parts, resumed = trained("parts", 9, "latest")
    assert resumed == history
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    without = network(kind)
    step, state = autoencoders.training(without, train.generator(2))
    train.fit(step, train.Shuffled(FACES.train, 8, 1), steps=9, state=state, config={}, numerics=numerics)
    assert any(not torch.equal(whole[name], value) for name, value in without.state_dict().items())


# ------------------------------------------------------------------------------------------------ measuring
@pytest.mark.parametrize("kind", ["aae", "vae"])
def test_images_without_labels_are_measured_all_but_the_labels(kind):
    found = autoencoders.measure(network(kind), FACES, train.generator(1))
    labelled = Dataset("shapes", FACES.train, FACES.test, torch.zeros(32).long(), torch.zeros(16).long(), ("a",), "")
    named = autoencoders.measure(network(kind), labelled, train.generator(1))
    assert set(named) - set(found) == {"knn_accuracy"}
    assert all(found[name] == named[name] for name in found)


def test_sharpness_is_the_root_mean_square_gradient():
    axis = torch.arange(64.0)
    ramp = (0.01 * axis).expand(3, 64, 64)
    board = ((axis[:, None] + axis) % 2).expand(3, 64, 64)
    slanted = (0.003 * axis[:, None] + 0.004 * axis).expand(3, 64, 64)
    values = [0.01, math.sqrt(2), 0.005, 0.0]
    images = torch.stack([ramp, board, slanted, torch.full((3, 64, 64), 0.3)])
    torch.testing.assert_close(sampling.sharpness(images), torch.tensor(values), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sampling.sharpness(0.5 * images), torch.tensor(values) / 2, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sampling.sharpness(images.mT), torch.tensor(values), rtol=1e-4, atol=1e-7)


def test_a_soft_edge_is_less_sharp_although_it_is_as_high():
    edge = (torch.arange(64) >= 32).float().expand(1, 3, 64, 64)
    soft = F.avg_pool2d(F.pad(edge, (4, 4, 4, 4), mode="replicate"), 9, 1)
    torch.testing.assert_close(soft.diff(dim=-1).abs().mean(), edge.diff(dim=-1).abs().mean())
    assert sampling.sharpness(soft).item() == pytest.approx(sampling.sharpness(edge).item() / 3, rel=1e-4)


def test_distance_is_a_squared_error_on_the_scale_of_the_losses():
    images = (IMAGES[:5].float() / 255)
    expected = [F.mse_loss(autoencoders.pixels(IMAGES[i:i + 1]), autoencoders.pixels(IMAGES[7:8])) for i in range(5)]
    torch.testing.assert_close(sampling.distance(images, IMAGES[7].float() / 255), torch.stack(expected))


def test_appearance_compares_samples_and_reconstructions_with_the_test_images(monkeypatch):
    test, average = IMAGES[32:], IMAGES[32:].double().mean(0)
    faded = 0.5 * (test.double() - average) + average                # half the contrast: half as sharp, a quarter apart
    model = network()
    monkeypatch.setattr(sampling, "decode", lambda model, z, size: (faded / 255).float())
    found = sampling.appearance(model, test, train.generator(1))
    assert found["sharpness_test"]["value"] == pytest.approx(sampling.sharpness(test / 255).mean().item(), rel=1e-5)
    variance = (test / 127.5).double().var(0, correction=0).mean().item()
    assert found["diversity_test"]["value"] == pytest.approx(variance, rel=1e-5)
    for name in ("samples", "reconstructions"):
        assert found[f"diversity_{name}"]["value"] == pytest.approx(0.25, rel=1e-5)
        assert 0.5 < found[f"sharpness_{name}"]["value"] < 0.7        # of noise: what the average has is not halved
        assert found[f"diversity_{name}"]["n"] == 16
    monkeypatch.setattr(sampling, "decode", lambda model, z, size: (average / 255).float().expand(len(z), -1, -1, -1))
    found = sampling.appearance(model, test, train.generator(1), batch_size=5)
    assert found["diversity_samples"]["value"] == pytest.approx(0, abs=1e-10)


def test_appearance_tells_samples_from_reconstructions_and_knows_no_batches():
    model = network("ae").eval()
    test, found = IMAGES[32:], sampling.appearance(model, IMAGES[32:], train.generator(1), batch_size=16)
    noise = train.generator(1)
    with torch.no_grad():
        drawn = (model.decoder(torch.randn(16, 6, generator=noise)) + 1) / 2
        copies = (model.decoder(model.encoder(autoencoders.pixels(test))[0]) + 1) / 2
    for name, images in {"samples": drawn, "reconstructions": copies}.items():
        expected = sampling.sharpness(images).mean() / sampling.sharpness(test / 255).mean()
        assert found[f"sharpness_{name}"]["value"] == pytest.approx(expected.item(), rel=1e-4)
    other = sampling.appearance(model, test, train.generator(1), batch_size=5)
    for name in found:
        if "samples" not in name:
            assert other[name]["value"] == pytest.approx(found[name]["value"], rel=1e-5)


# ------------------------------------------------------------------------------------------------ looking
def test_a_traversal_row_changes_its_own_dimension_only(monkeypatch):
    seen = []
    monkeypatch.setattr(sampling, "decode", lambda model, z, size: seen.append(z) or torch.zeros(len(z), 3, 64, 64))
    grid = sampling.traverse_each(network(), [4, 0, 4], 5, 2.0, train.generator(3))
    z = seen[0].unflatten(0, (3, 5))
    code = torch.randn(1, 6, generator=train.generator(3))[0]
    for row, dim in zip(z, (4, 0, 4), strict=True):
        assert row[:, dim].tolist() == [-2, -1, 0, 1, 2]
        others = [j for j in range(6) if j != dim]
        assert torch.equal(row[:, others], code[others].expand(5, 5))
    assert grid.shape == (3, 5, 3, 64, 64)


def test_the_most_used_dimensions_have_the_highest_kl_or_variance(monkeypatch):
    mean = torch.tensor([[0.0, 2.0, 0.5, 0.0], [0.0, -2.0, 0.5, 0.1]])
    log_var = torch.tensor([-3.0, 0.0, 0.0, -0.1]).expand(2, 4)
    monkeypatch.setattr(sampling, "encode", lambda model, images: (mean, log_var))
    dims, use = sampling.most_used(network("vae", 4), IMAGES, 2)
    assert dims == [1, 0]
    torch.testing.assert_close(use[:3], torch.tensor([(math.exp(-3) + 3 - 1) / 2, 2.0, 0.125]))
    assert sampling.most_used(network("aae", 4), IMAGES, 9)[0][:2] == [1, 3]       # the variance of the mean alone


@pytest.mark.parametrize(("dims", "message"), [([], "no dimensions"), ([0, 6], "traverse_dim must be between 0 and 5"),
                                               ([-1], "between 0 and 5")])
def test_dimensions_that_are_not_there_are_clear_errors(dims, message):
    with pytest.raises(ValueError, match=message):
        sampling.traverse_each(network(), dims, 5, 2.0, train.generator(1))


# ------------------------------------------------------------------------------------------------ figures
def record(lr, beta=1.0, seed=1, model="vae", blur=0.5, date="2026"):
    metrics = {f"{measure}_{kind}": {"value": blur, "se": 0.01, "n": 9, "unit": ""}
               for measure in ("sharpness", "diversity") for kind in ("samples", "reconstructions")}
    return {"parameters": {"model": model, "lr": lr, "beta": beta, "seed": seed}, "metrics": metrics, "date": date,
            "history": {"step": [1, 2, 3], "rec": [0.3, 0.2 * lr, 0.1]}}


def test_learning_rates_have_a_panel_each_on_one_scale_and_a_run_one_look():
    fig = plots_faces.learning_rates([record(0.02), record(0.001), record(0.02, 20.0), record(0.001, 20.0)])
    assert [ax.get_title("left") for ax in fig.axes] == ["learning rate 0.02", "learning rate 0.001"]
    assert fig.axes[0].get_ylim() == fig.axes[1].get_ylim() and fig.axes[0].get_yscale() == "log"
    colours = [[line.get_color() for line in ax.lines] for ax in fig.axes]
    assert colours[0] == colours[1] and len(set(colours[0])) == 2
    assert [line.get_ydata()[1] for line in fig.axes[1].lines] == [0.2 * 0.001] * 2
    assert [text.get_text() for text in fig.legends[0].texts] == ["vae, beta 1.0", "vae, beta 20.0"]


def test_appearance_has_a_row_for_each_record_and_skips_those_without():
    plain = record(0.02) | {"metrics": {}}
    fig = plots_faces.appearance([record(0.02, blur=0.25), plain, record(0.001, blur=0.75)])
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["vae, lr 0.02", "vae, lr 0.001"]
    drawn = [list(line.get_xdata()) for line in fig.axes[1].lines if line.get_label() in plots_faces.LOOKS or
             line.get_marker() in "os"]
    assert drawn == [[0.25, 0.75]] * 2


def test_training_draws_what_there_is_on_a_logarithmic_axis():
    fig = plots.curves({"step": [1, 2], "rec": [0.3, 0.1]}, autoencoders.CURVES, "a title", log=True)
    assert [ax.get_yscale() for ax in fig.axes] == ["log"] and fig.axes[0].lines[0].get_ydata().tolist() == [0.3, 0.1]


@pytest.mark.parametrize("dims", [[10], [-1], [1.5], ["2"], [True]])
def test_dimensions_that_the_code_has_not_are_refused_before_training(dims):
    with pytest.raises(ValueError, match=r"traverse_dims must be whole numbers between 0 and 9, got"):
        sampling.check_dims(10, [0, *dims])
    sampling.check_dims(10, [0, 9])


@pytest.mark.parametrize("sizes", [(-1, 8), (10, 1)])
def test_sizes_that_cannot_be_trained_with_are_refused(sizes):
    with pytest.raises(ValueError, match="steps >= 0 and batch_size >= 2 are needed"):
        autoencoders.check_sizes(*sizes)
