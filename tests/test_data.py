"""Data sets: the embedded ones are what they say, files are looked for in order, and each fault is one clear line."""
import dataclasses
import gzip
import hashlib
import http.client
import os
import struct
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib import data, shapes

MNIST = data.SOURCES["mnist"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No test downloads, reads a person's data folder (this gives its name) or leaves data of its own in the cache."""
    real = os.environ.get("VAEBOOK_DATA")
    monkeypatch.delenv("VAEBOOK_DATA", raising=False)
    monkeypatch.setattr(data, "_download", offline)
    monkeypatch.setattr(data, "_mirrors", lambda name: ["https://mirror.invalid/"])
    yield real
    if data.SOURCES["mnist"] is not MNIST:
        data._load.cache_clear()


def offline(mirrors, target, sha256):
    raise urllib.error.URLError("no network")


# ------------------------------------------------------------------------------------------------ embedded
@pytest.mark.parametrize(("name", "train", "test", "image", "classes"), [
    ("digits", 1437, 360, (1, 8, 8), 10), ("shapes", 4096, 512, (3, 64, 64), 3)])
def test_embedded_data_have_their_sizes_and_types(name, train, test, image, classes):
    found = data.load(name)
    assert found.name == name and found.train.shape == (train, *image) and found.test.shape == (test, *image)
    assert found.train.dtype == found.test.dtype == torch.uint8
    assert found.train_labels.dtype == found.test_labels.dtype == torch.int64
    assert found.train_labels.shape == (train,) and found.test_labels.shape == (test,)
    assert set(found.train_labels.tolist()) == set(range(classes)) and len(found.label_names) == classes
    assert found.train.max() > 240 and found.train.min() < 30


def test_embedded_data_are_the_same_every_time():
    before = {name: data.load(name) for name in ("digits", "shapes")}
    data._load.cache_clear()
    for name, old in before.items():
        new = data.load(name)
        assert new is not old and new.sha256 == old.sha256 and len(new.sha256) == 64
        for part in ("train", "test", "train_labels", "test_labels"):
            assert torch.equal(getattr(new, part), getattr(old, part))
    assert before["digits"].sha256 == hashlib.sha256(digits_of_scikit_learn()[0].tobytes()).hexdigest()


def digits_of_scikit_learn():
    from sklearn.datasets import load_digits
    bunch = load_digits()
    return np.rint(bunch.images * 255 / 16).astype(np.uint8), bunch.target


def test_digits_are_split_once_over_and_keep_their_labels():
    found = data.load("digits")
    images, labels = digits_of_scikit_learn()
    expected = sorted((image.tobytes(), label) for image, label in zip(images, labels, strict=True))
    parts = ((found.train, found.train_labels), (found.test, found.test_labels))
    got = [[(image.numpy().tobytes(), label.item()) for image, label in zip(*part, strict=True)] for part in parts]
    assert sorted(got[0] + got[1]) == expected
    assert not {image for image, _ in got[0]} & {image for image, _ in got[1]}


def test_shapes_are_split_disjointly():
    found = data.load("shapes")
    train, test = ({image.tobytes() for image in part.numpy()} for part in (found.train, found.test))
    assert len(train) == 4096 and len(test) == 512 and not train & test
    for part, labels in (("train", found.train_labels), ("test", found.test_labels)):
        assert torch.equal(found.factors[part]["shape"].long(), labels)


def drawn(**changes):
    """Float images [n, 3, 64, 64] of squares at the centre unless a factor is given as a list of n values."""
    n = len(next(iter(changes.values())))
    factors = {"shape": 0.0, "x": 0.0, "y": 0.0, "radius": 0.4, "angle": 0.0, "hue": 0.0, "ground": 0.5}
    return shapes.draw({name: torch.tensor(changes.get(name, [value] * n)) for name, value in factors.items()}).float()


def coverage(images):
    """How much of each pixel the object covers, by the colours of a corner and of the object's middle: [n, 64, 64]."""
    ground = images[:, :, :1, :1]
    difference = images - ground
    middle = difference.abs().sum(1).flatten(1).argmax(1)[:, None, None].expand(-1, 3, 1)
    whole = difference.flatten(2).gather(2, middle)
    return (difference * whole[..., None]).sum(1) / whole.square().sum((1, 2))[:, None, None]


def test_the_centre_of_mass_of_a_shape_is_its_position():
    images, factors = data.shapes(300, seed=3)
    inner = (factors["hue"] - factors["ground"]).abs().sub(0.5).abs() < 0.4          # colours that differ clearly
    symmetric = (factors["shape"] < 2) & inner
    mask = coverage(images.float())[symmetric]
    axis = (torch.arange(64) + 0.5) / 32 - 1
    area = mask.sum((1, 2))
    x, y = (mask.sum(1) * axis).sum(1) / area, (mask.sum(2) * axis).sum(1) / area
    assert symmetric.sum() > 100
    torch.testing.assert_close(x, factors["x"][symmetric], atol=0.003, rtol=0)
    torch.testing.assert_close(y, factors["y"][symmetric], atol=0.003, rtol=0)


def test_the_area_of_a_shape_follows_from_its_radius():
    radius = torch.tensor([0.2, 0.3, 0.4])
    area = {0: (1.6 * radius) ** 2, 1: torch.pi * radius ** 2, 2: 3 * 3 ** 0.5 * (0.6 * radius) ** 2}
    for shape, expected in area.items():
        covered = coverage(drawn(shape=[float(shape)] * 3, radius=radius.tolist())).sum((1, 2)) / 32 ** 2
        torch.testing.assert_close(covered, expected, atol=0, rtol=0.02)


def test_hue_goes_round_the_colour_circle_and_the_ground_is_darker():
    images = drawn(hue=[0.0, 1 / 3, 2 / 3, 1 / 6, 0.5, 5 / 6], ground=[0.0, 1 / 3, 2 / 3, 1 / 6, 0.5, 5 / 6])
    colour, ground = images[:, :, 32, 32], images[:, :, 0, 0]
    assert colour[:3].argmax(1).tolist() == [0, 1, 2]                              # red, green, blue
    assert colour[3:].argmin(1).tolist() == [2, 0, 1]                              # yellow, cyan, magenta
    assert (colour.amax(1) > 240).all() and (ground.amax(1) < 120).all()


def test_turning_a_square_by_a_right_angle_changes_nothing_and_by_an_eighth_does():
    images = drawn(angle=[0.0, np.pi / 2, np.pi / 4])
    assert (images[0] - images[1]).abs().max() <= 2 and (images[0] - images[2]).abs().max() > 50


# ------------------------------------------------------------------------------------------------ resizing
@pytest.mark.parametrize(("name", "size"), [("digits", 32), ("digits", 5), ("shapes", 32), ("shapes", 1)])
def test_resizing_agrees_with_pillow(name, size):
    original, resized = data.load(name), data.load(name, size)
    assert resized.train.shape == (*original.train.shape[:2], size, size) and resized.train.dtype == torch.uint8
    assert resized.sha256 == original.sha256 and resized.factors is original.factors
    for before, after in zip(original.test[:40], resized.test[:40], strict=True):
        for channel, found in zip(before, after, strict=True):
            expected = np.asarray(Image.fromarray(channel.numpy()).resize((size, size), Image.Resampling.BILINEAR))
            assert np.abs(found.numpy().astype(int) - expected).max() <= 1


def test_resizing_to_the_same_size_keeps_the_images():
    assert data.load("digits", 8) is data.load("digits")


def test_resizing_in_chunks_is_resizing_at_once():
    images = torch.randint(0, 256, (4100, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(data.resize(images, 9)[4090:], data.resize(images[4090:], 9))


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_below_one_pixel_is_refused(size):
    with pytest.raises(data.DataError, match=f"at least 1 pixel, got {size}"):
        data.load("digits", size)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(data.DataError, match="unknown data set 'mnits': known are mnist, fashionmnist, digits, shapes"):
        data.load("mnits")


# ------------------------------------------------------------------------------------------------ files
IMAGES = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
PARTS = (IMAGES, np.array([7, 0, 9], np.uint8), IMAGES[:2] + 100, np.array([1, 2], np.uint8))


def idx(array):
    return pack(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def pack(content):
    return gzip.compress(content, mtime=0)


def tiny_mnist(folder, monkeypatch, contents=None):
    """Four small files in place of MNIST's in the folder, with their checksums; returns their paths."""
    data._load.cache_clear()
    contents = contents or [idx(part) for part in PARTS]
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    files = data._idx_files("MNIST", *digests)
    monkeypatch.setitem(data.SOURCES, "mnist", dataclasses.replace(MNIST, files=files))
    paths = [folder / file for file in files]
    for path, content in zip(paths, contents, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return paths


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """Paths of a tiny MNIST in the folder that VAEBOOK_DATA names."""
    monkeypatch.setenv("VAEBOOK_DATA", str(tmp_path / "named"))
    monkeypatch.setattr(data, "root", lambda: tmp_path / "checkout")
    return tiny_mnist(tmp_path / "named", monkeypatch)


def complaint(name="mnist"):
    data._load.cache_clear()
    with pytest.raises(data.DataError) as error:
        data.load(name)
    text = str(error.value)
    assert "\n" not in text and "'digits'" in text
    return text


def test_idx_files_become_tensors(mnist):
    found = data.load("mnist")
    assert torch.equal(found.train, torch.from_numpy(IMAGES)[:, None])
    assert torch.equal(found.test, torch.from_numpy(IMAGES[:2] + 100)[:, None])
    assert found.train_labels.tolist() == [7, 0, 9] and found.test_labels.tolist() == [1, 2]
    assert found.train_labels.dtype == torch.int64 and found.label_names == data.DIGITS
    assert data.load("mnist", 32).train.shape == (3, 1, 32, 32)


def test_the_named_folder_goes_before_the_checkouts(mnist, tmp_path, monkeypatch):
    assert data.folders() == [tmp_path / "named", tmp_path / "checkout" / "data"]
    assert data.find("mnist") == tmp_path / "named"
    (tmp_path / "checkout").mkdir()
    (tmp_path / "named").rename(tmp_path / "checkout" / "data")
    assert data.find("mnist") == tmp_path / "checkout" / "data" and len(data.load("mnist").train) == 3
    tiny_mnist(tmp_path / "named", monkeypatch)
    assert data.find("mnist") == tmp_path / "named"
    monkeypatch.delenv("VAEBOOK_DATA")
    assert data.folders() == [tmp_path / "checkout" / "data"] == [data.find("mnist")]


def test_a_folder_is_the_same_from_wherever_the_caller_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "root", lambda: tmp_path)
    monkeypatch.setenv("VAEBOOK_DATA", "elsewhere")
    monkeypatch.chdir("/")
    assert data.folders() == [tmp_path / "elsewhere", tmp_path / "data"]
    monkeypatch.setenv("VAEBOOK_DATA", "~/elsewhere")
    assert data.folders()[0] == Path.home() / "elsewhere"


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"", idx(IMAGES)[:40], idx(IMAGES[::-1])],
                         ids=["page", "empty", "cut", "other"])
def test_a_file_with_another_checksum_is_corrupt(mnist, content):
    mnist[2].write_bytes(content)
    text = complaint()
    assert str(mnist[2]) in text and "corrupt" in text and "python -m lib data --fetch mnist" in text


@pytest.mark.parametrize(("content", "why"), [
    (idx(IMAGES)[:40], "end-of-stream"), (b"<html>not found</html>", "gzip"), (b"", "range"),
    (pack(b"ab"), "range"), (idx(IMAGES)[:10] + b"\xff" * 60, "invalid block type"),
    (pack(gzip.decompress(idx(IMAGES))[:-5]), "reshape"),
    (pack(b"\0\0\x08\x03\0\0"), "requires")],
    ids=["cut", "page", "empty", "short", "noise", "fewer bytes", "no sizes"])
def test_a_file_that_is_no_idx_file_is_named(tmp_path, monkeypatch, content, why):
    """Even if its checksum were the expected one."""
    monkeypatch.setenv("VAEBOOK_DATA", str(tmp_path))
    paths = tiny_mnist(tmp_path, monkeypatch, [content, *map(idx, PARTS[1:])])
    text = complaint()
    assert f"{paths[0]} cannot be read as an IDX file" in text and why in text


def test_a_file_that_cannot_be_opened_is_named(mnist, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert f"cannot read {mnist[0]}: Permission denied" in complaint()


def test_missing_data_without_a_network_say_what_to_do(mnist, tmp_path):
    mnist[1].unlink()
    text = complaint()
    assert f"looked for {mnist[1]}, {tmp_path}/checkout/data/MNIST/raw/train-images-idx3-ubyte.gz)" in text
    assert "no network" in text and "`python -m lib data --fetch mnist`" in text and "VAEBOOK_DATA" in text
    assert not list((tmp_path / "checkout").glob("*"))


def test_missing_data_of_fashionmnist_too(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "root", lambda: tmp_path)
    assert "--fetch fashionmnist" in complaint("fashionmnist")


def test_a_data_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VAEBOOK_DATA", str(tmp_path / "file" / "data"))
    monkeypatch.setattr(data, "root", lambda: tmp_path)
    text = complaint()
    assert str(tmp_path / "file" / "data") in text and "Not a directory" in text


# ------------------------------------------------------------------------------------------------ downloading
@pytest.fixture
def mirrors(mnist, monkeypatch):
    """Two mirrors, {address: {file name: content}}, the right files on both; and the real `_download` in use again."""
    import torchvision.datasets.utils
    shelves = {f"https://{m}.invalid/": {path.name: path.read_bytes() for path in mnist} for m in ("first", "second")}
    for path in mnist:
        path.unlink()

    def download_url(url, folder, name):
        shelf, _, file = url.rpartition("/")
        found = shelves[shelf + "/"][file]
        if isinstance(found, Exception):
            raise found
        Path(folder, name).write_bytes(found)
    monkeypatch.undo()
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download_url)
    monkeypatch.setattr(data, "_mirrors", lambda name: list(shelves))
    return shelves


@pytest.fixture
def bare(mirrors, mnist, tmp_path, monkeypatch):
    """The mirrors, and an empty data folder to download into."""
    folder = tmp_path / "empty"
    contents = [mirrors["https://first.invalid/"][path.name] for path in mnist]
    paths = tiny_mnist(folder, monkeypatch, contents)
    for path in paths:
        path.unlink()
    monkeypatch.setenv("VAEBOOK_DATA", str(folder))
    return paths


def test_missing_files_are_downloaded_into_the_named_folder(mirrors, bare, tmp_path):
    assert data.load("mnist").train_labels.tolist() == [7, 0, 9]
    assert sorted(p for p in (tmp_path / "empty").rglob("*") if p.is_file()) == sorted(bare)


@pytest.mark.parametrize("fault", [b"<html>log in first</html>", urllib.error.URLError("refused"), TimeoutError("late"),
                                   RuntimeError("corrupted"), http.client.IncompleteRead(b"half")],
                         ids=lambda fault: type(fault).__name__)
def test_the_second_mirror_serves_where_the_first_does_not(mirrors, bare, fault):
    mirrors["https://first.invalid/"][bare[0].name] = fault
    assert len(data.load("mnist").train) == 3


def test_a_wrong_file_on_every_mirror_is_refused_and_not_kept(mirrors, bare):
    for shelf in mirrors.values():
        shelf[bare[1].name] = b"<html>log in first</html>"
    text = complaint()
    assert "another file" in text and str(bare[1]) in text
    assert not bare[1].exists() and [p.name for p in bare[0].parent.iterdir()] == [bare[0].name]


def test_what_needs_no_file_is_not_fetched_and_what_is_unknown_neither():
    assert data.fetch("digits") is None
    with pytest.raises(data.DataError, match="unknown data set 'mnits'"):
        data.fetch("mnits")


def test_fetching_does_not_call_a_corrupt_file_present(mirrors, bare):
    data.fetch("mnist")
    bare[3].write_bytes(b"damaged")
    with pytest.raises(data.DataError, match=f"{bare[3]} is corrupt"):
        data.fetch("mnist")


# ------------------------------------------------------------------------------------------------ the list
def test_the_list_tells_present_missing_corrupt_and_embedded(mnist, tmp_path):
    rows = {row["name"]: row for row in data.listing()}
    assert list(rows) == [*data.SOURCES, *data.TEXTS, *data.BINARY, *data.WEIGHTS]
    assert all(all(row.values()) for row in rows.values())
    assert rows["mnist"]["state"] == f"present in {tmp_path / 'named'}"
    assert (rows["fashionmnist"]["state"], rows["digits"]["state"]) == ("missing", "embedded")
    mnist[0].write_bytes(b"damaged")
    assert f"{mnist[0]} is corrupt" in data.listing()[0]["state"]


def test_the_static_file_of_binary_images_is_listed_and_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("VAEBOOK_DATA", str(tmp_path))
    contents = {f"MNIST_static/binarized_mnist_{part}.amat": part.encode() for part in ("train", "valid", "test")}
    assert list(data.BINARY["mnist-static"].files) == list(contents)
    digests = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
    monkeypatch.setitem(data.BINARY, "mnist-static", dataclasses.replace(data.BINARY["mnist-static"], files=digests))

    def state():
        return next(row["state"] for row in data.listing() if row["name"] == "mnist-static")
    assert state() == "missing"
    with pytest.raises(data.DataError, match="data set mnist-static is not here .*no network.* binarised here"):
        data.fetch("mnist-static")
    monkeypatch.setattr(data, "_download", lambda mirrors, target, sha256: target.write_bytes(
        contents[f"MNIST_static/{target.name}"]))
    assert data.fetch("mnist-static") == tmp_path and state() == f"present in {tmp_path}"
    (tmp_path / list(contents)[2]).write_bytes(b"damaged")
    assert "binarized_mnist_test.amat is corrupt" in state()
    (tmp_path / list(contents)[2]).unlink()
    assert state() == "missing"


# ------------------------------------------------------------------------------------------------ real files
@pytest.mark.parametrize(("name", "classes", "mean"), [
    ("mnist", data.DIGITS, 0.1307), ("fashionmnist", data.GARMENTS, 0.2860)])
def test_real_files_where_they_are(fresh, monkeypatch, name, classes, mean):
    """The means are those that are in everybody's normalisation of these data sets."""
    monkeypatch.setenv("VAEBOOK_DATA", fresh or "")
    if not data.find(name):
        pytest.skip(f"{name} is not on this machine")
    found = data.load(name)
    assert found.train.shape == (60_000, 1, 28, 28) and found.test.shape == (10_000, 1, 28, 28)
    counts = found.test_labels.bincount().tolist()
    assert counts == ([980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009] if name == "mnist" else [1000] * 10)
    assert found.label_names == classes and found.train.float().mean().item() / 255 == pytest.approx(mean, abs=1e-4)
