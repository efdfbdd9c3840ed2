"""The classifier of the CFD: what it sees, how it is trained and kept, and that the CFD tells worse from better."""
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib import BookError, classifier, data, evaluate, root
from lib.train import generator

THRESHOLD = 0.4375


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", 16)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The classifier of binarised digits by the whole recipe, and the folder of its cache."""
    folder = tmp_path_factory.mktemp("checkout")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "root", lambda: folder)
        return classifier.load_or_train(digits, THRESHOLD, device="cpu"), folder


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A recipe of five steps and a cache of its own: the folder of it."""
    monkeypatch.setattr(classifier, "root", lambda: tmp_path)
    monkeypatch.setattr(classifier, "RECIPE", classifier.RECIPE | {"epochs": 0, "least_steps": 5})
    return tmp_path / "runs" / "classifier"


def untrained(side=16, threshold=None, channels=1, seed=0):
    return classifier.Classifier((channels, side), 10, threshold).initialise(generator(seed))


def grey(n, side=16, channels=1, seed=0):
    return torch.randint(0, 256, (n, channels, side, side), generator=generator(seed), dtype=torch.uint8)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def no_training(*_, **__):
    pytest.fail("it was trained again")


# ------------------------------------------------------------------------------------------------ what it sees
@pytest.mark.parametrize(("side", "channels"), [(4, 1), (8, 1), (28, 1), (30, 3)])
def test_features_are_what_the_last_layer_reads(side, channels):
    net, images = untrained(side, channels=channels), grey(7, side, channels)
    found = classifier.features(net, images, batch_size=3)
    assert found.shape == (7, 128) and found.dtype == torch.float32 and not found.requires_grad and found.min() >= 0
    assert not net.training
    torch.testing.assert_close(net.head(found), net(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, classifier.features(net, images, batch_size=7), rtol=1e-5, atol=1e-5)


def test_features_of_an_image_do_not_depend_on_its_neighbours(trained):
    """Nor on the mode that the network was left in: batch norms neither see the batch nor learn from it."""
    net, images = trained[0], grey(9)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    alone = torch.cat([classifier.features(net.train(), image[None]) for image in images])
    torch.testing.assert_close(classifier.features(net.train(), images), alone, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_binarised_and_grey_images_are_of_one_kind_to_a_binarising_classifier():
    images = grey(5)
    binarised = ((images.double() / 255 > THRESHOLD) * 255).to(torch.uint8)
    assert torch.equal(*(classifier.features(untrained(threshold=THRESHOLD), x) for x in (images, binarised)))
    seen = [classifier.features(untrained(), x) for x in (images, binarised)]
    assert (seen[0] - seen[1]).abs().max() > 0.1


def test_the_threshold_itself_is_black():
    """111.5625 is the threshold in pixels."""
    net = untrained(threshold=THRESHOLD)
    values = torch.tensor([0, 111, 112, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 16, 16)
    black, dark, light, white = classifier.features(net, values)
    assert torch.equal(black, dark) and torch.equal(light, white) and not torch.equal(dark, light)


@pytest.mark.parametrize("images", [grey(3).float(), grey(3, side=8), grey(3, channels=3), grey(3)[:, 0]])
def test_other_images_are_refused(images):
    for call in (classifier.features, classifier.moments, lambda *of: classifier.accuracy(*of, torch.zeros(3))):
        with pytest.raises(ValueError, match=r"needs uint8 images \[N, 1, 16, 16\], got torch"):
            call(untrained(), images)


def test_images_of_less_than_four_pixels_are_refused():
    with pytest.raises(ValueError, match="side 4 at least, got 3"):
        untrained(side=3)


def test_accuracy_is_the_fraction_of_right_labels():
    net, images = untrained(), grey(8)
    guess = net.eval()(images).argmax(1)
    labels = torch.where(torch.arange(8) < 6, guess, (guess + 1) % 10)
    found = classifier.accuracy(net, images, labels)
    assert found == evaluate.estimate((torch.arange(8) < 6).float(), "fraction") and found["value"] == 0.75
    assert classifier.accuracy(net, images, guess)["value"] == 1


# ------------------------------------------------------------------------------------------------ its training
@pytest.mark.parametrize(("by", "channels"), [(1, 1), (2, 3), (0, 1)])
def test_images_are_shifted_each_by_itself_and_zero_comes_in(by, channels):
    images = 1 + grey(1, 6, channels) % 250
    found = classifier._shifted(images.expand(600, -1, -1, -1), by, generator(0))
    padded = F.pad(images[0], (by,) * 4)
    moves = range(2 * by + 1)
    expected = {(i, j): padded[:, i:i + 6, j:j + 6] for i in moves for j in moves}
    counts = {move: sum(torch.equal(image, e) for image in found) for move, e in expected.items()}
    assert sum(counts.values()) == 600 and found.dtype == torch.uint8
    assert all(0.5 < count * len(expected) / 600 < 1.6 for count in counts.values())


def test_the_rate_rises_over_a_fifth_of_the_steps_and_falls_to_nothing(digits):
    net = untrained()
    step, state = classifier.training(net, digits.train, digits.train_labels, 10, generator(0))
    rates = []
    for i in range(10):
        before = net.head.weight.clone()
        step(torch.arange(32 * i, 32 * i + 32))
        rates.append(state["optimizer"].param_groups[0]["lr"].item())
    peak = classifier.RECIPE["lr"]
    assert rates == pytest.approx([peak * f for f in (0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0)])
    assert torch.equal(before, net.head.weight) and net.steps_done == 10


def test_it_can_learn_noise_by_heart():
    net, images, labels = untrained(), grey(40), torch.arange(40) % 10
    step, _ = classifier.training(net, images, labels, 100, generator(0))
    losses = [step(torch.arange(40))["loss"].item() for _ in range(100)]
    assert losses[0] > 2 and losses[-1] < 0.05 and classifier.accuracy(net, images, labels)["value"] == 1


def test_it_knows_digits(trained, digits):
    net, _ = trained
    assert classifier.accuracy(net, digits.test, digits.test_labels)["value"] > 0.96
    assert classifier.features(net, digits.test).std(0).gt(0).float().mean() > 0.9           # hardly a dead unit


def test_the_recipe_says_how_it_was_made(trained, digits):
    recipe = json.loads(json.dumps(trained[0].recipe, allow_nan=False))
    assert recipe == trained[0].recipe
    assert recipe["accuracy"] == classifier.accuracy(trained[0], digits.test, digits.test_labels)
    assert recipe.items() >= {"dataset": "digits", "sha256": digits.sha256, "side": 16, "threshold": THRESHOLD,
                              "seed": 0, "train_images": 1437, "device": "cpu", "steps": 300, "batch_size": 128}.items()


def test_the_test_images_are_not_trained_on(digits, quick):
    other = dataclasses.replace(digits, test=255 - digits.test, test_labels=(digits.test_labels + 1) % 10)
    one, two = (classifier.load_or_train(of, device="cpu") for of in (digits, other))
    assert same(one, two) and one.recipe["accuracy"] != two.recipe["accuracy"]


def test_training_depends_on_the_seed_alone(digits, quick):
    torch.manual_seed(1)
    first = classifier.load_or_train(digits, seed=3, device="cpu")
    next(quick.iterdir()).unlink()
    torch.manual_seed(2)
    assert same(first, classifier.load_or_train(digits, seed=3, device="cpu"))
    other = classifier.load_or_train(digits, seed=4, device="cpu")
    assert not same(first, other) and first.recipe["weights"] != other.recipe["weights"]


# ------------------------------------------------------------------------------------------------ the cache
def test_it_is_trained_once(digits, quick, monkeypatch):
    first = classifier.load_or_train(digits, device="cpu")
    monkeypatch.setattr(classifier, "fit", no_training)
    again = classifier.load_or_train(digits, device="cpu")
    assert same(first, again) and first.recipe == again.recipe and not first.training and not again.training
    assert torch.equal(classifier.features(first, digits.test), classifier.features(again, digits.test))
    path, = quick.iterdir()
    assert path.name.startswith("digits-16-seed=0-") and path.suffix == ".safetensors"


@pytest.mark.parametrize("change", ["seed", "threshold", "side", "images", "labels", "recipe"])
def test_what_it_depends_on_tells_one_from_another(digits, quick, monkeypatch, change):
    classifier.load_or_train(digits, device="cpu")
    other, arguments = digits, {}
    if change in ("seed", "threshold"):
        arguments = {change: 1 if change == "seed" else 0.5}
    elif change == "recipe":
        monkeypatch.setitem(classifier.RECIPE, "lr", 1e-3)
    else:
        changes = {"side": {"train": grey(64, 8), "train_labels": torch.arange(64) % 10, "test": grey(9, 8),
                            "test_labels": torch.zeros(9)},
                   "images": {"train": digits.train[:1000], "train_labels": digits.train_labels[:1000]},
                   "labels": {"train_labels": digits.train_labels.flip(0)}}
        other = dataclasses.replace(digits, **changes[change])
    classifier.load_or_train(other, device="cpu", **arguments)
    assert len(list(quick.iterdir())) == 2
    monkeypatch.setattr(classifier, "fit", no_training)
    classifier.load_or_train(digits if change != "recipe" else other, device="cpu")


def damage(path, how):
    content, tensors = bytearray(path.read_bytes()), load_file(path)
    with safe_open(path, "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    if how == "flipped":
        content[-100] ^= 1
    new = {"empty": b"", "cut": content[:-50], "page": b"<html>not found</html>", "flipped": content}.get(how)
    if new is not None:
        return path.write_bytes(new)
    if how == "layer missing":
        tensors.pop("head.bias")
    if how == "other shape":
        tensors["head.bias"] = torch.zeros(11)
    if how == "other recipe":
        recipe["lr"] = 1.0
    metadata = {"no recipe": None, "no json": {"recipe": "{"}, "a list": {"recipe": "[]"}}
    return save_file(tensors, path, metadata.get(how, {"recipe": json.dumps(recipe)}))


@pytest.mark.parametrize("how", ["empty", "cut", "page", "flipped", "layer missing", "other shape", "other recipe",
                                 "no recipe", "no json", "a list"])
def test_a_damaged_cache_is_replaced(digits, quick, monkeypatch, how):
    whole = classifier.load_or_train(digits, device="cpu")
    path, = quick.iterdir()
    content = path.read_bytes()
    damage(path, how)
    assert path.read_bytes() != content
    again = classifier.load_or_train(digits, device="cpu")
    assert same(whole, again) and whole.recipe == again.recipe
    monkeypatch.setattr(classifier, "fit", no_training)
    assert same(whole, classifier.load_or_train(digits, device="cpu")) and list(quick.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_is_named(digits, quick):
    quick.parent.write_text("a file where the folder should be")
    with pytest.raises(BookError, match=f"cannot keep the trained classifier in {quick}: Not a directory") as error:
        classifier.load_or_train(digits, device="cpu")
    assert "\n" not in str(error.value)


def test_processes_that_train_at_once_do_not_disturb_each_other(digits, quick):
    """Each writes the whole file under a name of its own and renames it."""
    code = ("from lib import classifier, data; import pathlib; "
            f"classifier.root = lambda: pathlib.Path({str(quick.parent.parent)!r}); "
            "classifier.RECIPE.update(epochs=0, least_steps=5); "
            "print(classifier.load_or_train(data.load('digits', 16), device='cpu').recipe['weights'])")
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root(),
                             env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2)]
    printed = {process.communicate(timeout=120)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(list(quick.iterdir())) == 1
    assert printed == {classifier.load_or_train(digits, device="cpu").recipe["weights"] + "\n"}


# ------------------------------------------------------------------------------------------------ the CFD
def test_the_cfd_is_the_frechet_distance_of_the_features(trained, digits):
    net, a, b = trained[0], digits.train, digits.test
    found = classifier.cfd(net, b, a)
    features = [classifier.features(net, x) for x in (a, b)]
    assert found["value"] == pytest.approx(evaluate.frechet_distance(*features), rel=1e-5)
    assert (found["n"], found["unit"]) == (360, "CFD") and 0 < found["se"] < found["value"]
    kept = classifier.cfd(net, iter(b.split(100)), classifier.moments(net, a.split(500)))
    assert kept == {**found, "value": pytest.approx(found["value"], rel=1e-5), "se": pytest.approx(found["se"], 1e-3)}
    assert classifier.cfd(net, a, a)["value"] < 1e-9
    assert classifier.cfd(net, b, a, debias=True)["value"] < found["value"] / 2


def test_the_cfd_grows_as_images_get_worse(trained, digits):
    net, real = trained[0], classifier.moments(trained[0], digits.train)
    pixels = digits.test.float() / 255 > THRESHOLD
    flips = torch.rand(pixels.shape, generator=generator(1))
    worse = [255 * (pixels ^ (flips < share)).to(torch.uint8) for share in (0, 0.02, 0.1, 0.3)]
    found = [classifier.cfd(net, images, real) for images in worse]
    gaps = [(b["value"] - a["value"]) / (a["se"] ** 2 + b["se"] ** 2) ** 0.5
            for a, b in zip(found, found[1:], strict=False)]
    assert all(gap > 3 for gap in gaps[1:]) and gaps[0] > 1
    one_class = classifier.cfd(net, digits.test[digits.test_labels == 3], real)
    assert one_class["value"] > 5 * found[0]["value"]


# ------------------------------------------------------------------------------------------------ real data
@pytest.mark.slow
@pytest.mark.parametrize(("name", "threshold", "least"), [("mnist", THRESHOLD, 0.99), ("fashionmnist", None, 0.91)])
def test_it_knows_the_real_data_sets(tmp_path, monkeypatch, name, threshold, least):
    """About a minute each on one thread."""
    if not data.find(name):
        pytest.skip(f"{name} is not on this machine")
    monkeypatch.setattr(classifier, "root", lambda: tmp_path)
    net = classifier.load_or_train(data.load(name), threshold, device="cpu")
    assert net.recipe["accuracy"]["value"] >= least and net.recipe["accuracy"]["n"] == 10_000
