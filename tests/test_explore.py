"""The explorer: weights come back as they were, faults say what is wrong, sliders change what is seen."""
import io
import json
import time

import ipywidgets.embed
import numpy as np
import pytest
import torch
from PIL import Image

from lib import autoencoders, data, explore, runs, train


def make_run(folder, z_dim=2, **changes):
    """A run of `autoencoders` after two steps; returns its model."""
    values = runs.check("autoencoders", {"z_dim": z_dim, "steps": 2, **changes})
    digits = data.load("digits", size=32)
    model = autoencoders.Autoencoder(values["model"], (1, 32), z_dim).initialise(train.generator(1))
    step, state = autoencoders.training(model, train.generator(1))
    folder.mkdir(parents=True)
    train.fit(step, train.Shuffled(digits.train, 16, 1), steps=2, state=state, folder=folder, config=values)
    run = runs.Run("autoencoders", folder.name, "", values, folder, {"commit": "unknown", "dirty": True})
    run.save({}, digits)
    return model


def edit(folder, **changes):
    path = folder / "results.json"
    record = json.loads(path.read_text())
    record["parameters"].update(changes.pop("parameters", {}))
    path.write_text(json.dumps(record | changes))


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explore") / "tiny"
    make_run(folder)
    model, images, _ = explore.load(str(folder))
    return explore.Explorer(model, images)


def pixels(widget):
    return np.asarray(Image.open(io.BytesIO(widget.value)).convert("RGB")).astype(int)


# ---------------------------------------------------------------------------- loading
def test_loaded_weights_decode_as_the_trained_ones(tmp_path):
    trained = make_run(tmp_path / "aae", z_dim=3, model="aae", seed=4)
    loaded, images, record = explore.load(str(tmp_path / "aae"))
    z = torch.randn(5, 3, generator=train.generator(0))
    assert not loaded.training
    assert torch.equal(autoencoders.decode(loaded, z), autoencoders.decode(trained, z))
    assert loaded.kind == "aae" and images.name == "digits" and record["parameters"]["seed"] == 4


def cut(folder):
    path = folder / "latest.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def other_network(folder):
    """Weights of three latent dimensions under a configuration of two."""
    make_run(folder.parent / "three", z_dim=3)
    source = (folder.parent / "three" / "latest.safetensors").read_bytes()
    (folder / "latest.safetensors").write_bytes(source.replace(b'\\"z_dim\\": 3', b'\\"z_dim\\": 2'))


FAULTS = {
    "weights are missing": (lambda f: (f / "latest.safetensors").unlink(), "no latest.safetensors: make them with `"),
    "weights are cut off": (cut, "cannot be read"),
    "weights of another network": (other_network, "does not fit this model"),
    "weights of another run": (lambda f: edit(f, parameters={"seed": 2}), "trained with seed = 1, this run has 2"),
    "results are missing": (lambda f: (f / "results.json").unlink(), "the run did not finish"),
    "results are cut off": (lambda f: (f / "results.json").write_text("{"), "cannot be read"),
    "another experiment": (lambda f: edit(f, experiment="gmm"), "is a run of gmm, not of autoencoders"),
    "an unknown parameter": (lambda f: edit(f, parameters={"zdim": 2}), "no parameter 'zdim': did you mean 'z_dim'"),
    "an unknown model": (lambda f: edit(f, parameters={"model": "gan"}), "unknown model 'gan'"),
    "other data": (lambda f: edit(f, dataset={"name": "digits", "sha256": 64 * "0"}), "another version of digits"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_run_is_refused_in_one_line(tmp_path, fault):
    spoil, message = FAULTS[fault]
    make_run(tmp_path / "tiny")
    spoil(tmp_path / "tiny")
    with pytest.raises(runs.RunError, match=message) as caught:
        explore.load(str(tmp_path / "tiny"))
    assert "\n" not in str(caught.value)


def test_runs_with_weights_are_listed_and_named_by_the_error(tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "root", lambda: tmp_path)
    assert len(explore.available()) == 0
    for name in ("one", "bare"):
        make_run(tmp_path / "runs" / "autoencoders" / name)
    (tmp_path / "runs" / "autoencoders" / "bare" / "latest.safetensors").unlink()
    assert list(explore.available().index) == ["runs/autoencoders/one"]
    assert explore.available().loc["runs/autoencoders/one", "model"] == "vae"
    with pytest.raises(runs.RunError, match="no run folder runs/x; those with weights: runs/autoencoders/one"):
        explore.load("runs/x")
    assert explore.load("runs/autoencoders/one")[0].z_dim == 2


def test_the_default_run_is_made_once_and_again_when_the_defaults_change(tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "root", lambda: tmp_path)
    folder, asked = tmp_path / "runs" / "autoencoders" / "default", []
    defaults = {p.name: p.default for p in runs.parameters("autoencoders").values()}

    def make(experiment, preset, changes, again):
        asked.append((experiment, preset, changes, again))
        if not again:
            make_run(folder)
        edit(folder, parameters=defaults)

    monkeypatch.setattr(explore.launch, "run", make)
    explore.load()
    explore.load()
    assert asked == [("autoencoders", "", {}, False)]
    edit(folder, parameters={"steps": 7})
    explore.load()
    assert asked[1:] == [("autoencoders", "", {}, True)]


def test_a_misspelt_parameter_of_the_notebook_is_an_error():
    injected = {"In": ["# Parameters\nsorce = 'runs/autoencoders/default'\n"], "sorce": "runs/autoencoders/default"}
    with pytest.raises(runs.RunError, match="explore has no parameter 'sorce': did you mean 'source'"):
        runs.start("explore", injected)


# ---------------------------------------------------------------------------- sliders
def test_a_slider_changes_the_image_the_map_and_the_text(view):
    view.picker.value = view.choices[0][1]
    image, latent_map, text = view.image.value, view.map.value, view.text.value
    view.sliders[0].value = 2.5
    view.sliders[1].value = -1.5
    assert view.image.value != image and view.map.value != latent_map and view.text.value != text
    assert view.text.value.startswith("z = (2.50, -1.50); nearest test code: ")
    assert view.picker.value == -1
    shown = (255 * view.decode(torch.tensor([[2.5, -1.5]]))[0, 0]).round().int().numpy()
    at = (np.arange(32) * explore.THUMB + explore.THUMB // 2) // 32           # the middles of the enlarged pixels
    assert (pixels(view.image)[at][:, at, 0] == shown).all()


def test_the_cross_stands_where_the_sliders_are_and_leaves_no_trace(view):
    bare = np.asarray(view._background).astype(int)
    for z in ([-2.0, 1.0], [1.5, -2.5]):
        for slider, value in zip(view.sliders, z, strict=True):
            slider.value = value
        changed = np.argwhere((pixels(view.map) != bare).any(-1))
        x, y = view._pixel(torch.tensor(z))
        assert np.abs((changed.min(0) + changed.max(0)) / 2 - [y, x]).max() < 1.5
        assert (pixels(view.map)[round(y), round(x)] == 0).all()
    left, right = view._pixel(torch.tensor([-1.0, 0.0])), view._pixel(torch.tensor([1.0, 1.0]))
    assert left[0] < right[0] and left[1] > right[1]                          # z₁ to the right, z₂ upwards


def test_the_picker_goes_to_the_code_of_a_test_image_and_back(view):
    name, i = view.choices[-1]
    view.picker.value = i
    first = view.image.value, view.map.value
    assert name == f"9: test image {i}" and view.images.test_labels[i] == 9
    torch.testing.assert_close(view.z, view.codes[i], atol=explore.STEP / 2 + 1e-6, rtol=0)
    assert (view.z / explore.STEP).round().mul(explore.STEP).sub(view.z).abs().max() < 1e-6    # on a step of its slider
    middle = (np.arange(32) * explore.THUMB + explore.THUMB // 2) // 32
    assert (pixels(view.original)[middle][:, middle, 0] == view.images.test[i, 0].numpy()).all()
    view.sliders[0].value += 1e-15                                            # as a browser does
    assert view.picker.value == i
    view.sliders[1].value += 0.5
    assert view.picker.value == -1 and view.map.value != first[1]
    assert view.caption.value == f"test image {i}"
    view.picker.value = i
    assert (view.image.value, view.map.value) == first


def test_a_move_is_quick_and_the_saved_state_small(view):
    times = []
    for k in range(7):
        start = time.perf_counter()
        view.sliders[0].value = -1 + 0.1 * k
        times.append(time.perf_counter() - start)
    print(f"one move: {1000 * sorted(times)[3]:.0f} ms")
    assert sorted(times)[3] < 1
    assert len(json.dumps(ipywidgets.embed.dependency_state(view.box), default=str)) < 300_000


def test_every_slider_has_a_name_and_its_value(view):
    assert [slider.description for slider in view.sliders] == ["z₁", "z₂"]
    assert all(slider.readout and slider.tooltip for slider in view.sliders)


def test_other_numbers_of_latent_dimensions():
    digits = data.load("digits", size=32)
    wide = explore.Explorer(autoencoders.Autoencoder("ae", (1, 32), 12), digits)
    assert [slider.description for slider in wide.sliders][-3:] == ["z₁₀", "z₁₁", "z₁₂"]
    before = wide.text.value
    wide.sliders[11].value = 1.25
    assert wide.z[11] == 1.25 and wide.text.value != before and wide.text.value.startswith("|z| = ")
    assert len(wide.figure().axes) == 4
    with pytest.raises(runs.RunError, match="at least two latent dimensions, this model has 1"):
        explore.Explorer(autoencoders.Autoencoder("ae", (1, 32), 1), digits)


def test_the_picture_shows_the_same_point_and_image(view):
    view.picker.value = view.choices[4][1]
    latent_map, decoded, *strips = view.figure().axes
    cross = next(line for line in latent_map.lines if line.get_marker() == "+")
    assert [cross.get_xdata()[0], cross.get_ydata()[0]] == view.z.tolist()
    assert (decoded.images[0].get_array() == view.decode(view.z[None])[0, 0].numpy()).all()
    assert [strip.images[0].get_array().shape for strip in strips] == [(32, 9 * 32)] * 2
