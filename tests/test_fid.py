"""The FID against pytorch-fid's program, its network's weights, and images exported for it."""
import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_fid import inception as original
from pytorch_fid.fid_score import get_activations

from lib import BookError, data, evaluate, inception, sampling
from lib.train import generator


# ------------------------------------------------------------------------------------------------ FID
@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file in pytorch-fid's format, drawn at random at a scale that keeps signals alive."""
    with patch.object(original, "load_state_dict_from_url", lambda *_, **__: {}), \
            patch.object(torch.nn.Module, "load_state_dict", lambda *_, **__: None):
        net = original.fid_inception_v3()
    g = generator(0)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=g)
    path = tmp_path_factory.mktemp("weights") / inception.FILE
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)         # as old as the public file
    yield path
    path.unlink()                                                                    # 100 MB


@pytest.fixture
def installed(weights, tmp_path, monkeypatch):
    """These weights in a folder that VAEBOOK_DATA names, under their own checksum; torch's cache is elsewhere."""
    bare(tmp_path, monkeypatch)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setitem(data.WEIGHTS["inception"].files, inception.FILE, digest)
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / inception.FILE).symlink_to(weights)
    return tmp_path / "named" / inception.FILE


def bare(tmp_path, monkeypatch):
    monkeypatch.setenv("VAEBOOK_DATA", str(tmp_path / "named"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(data, "root", lambda: tmp_path / "checkout")
    monkeypatch.setattr(data, "_download", offline)


def offline(mirrors, target, sha256):
    raise OSError("no network")


def pictures(n, channels, seed, side=28):
    """uint8 [n, channels, side, side]: soft blots, so that the sets differ in more than noise."""
    x = torch.rand(n, channels, 7, 7, generator=generator(seed)) ** (1 + seed)
    return (255 * torch.nn.functional.interpolate(x, (side, side), mode="bilinear")).to(torch.uint8)


def saved(images, folder):
    sampling.export_images(images, folder)
    return sorted(folder.glob("*.png"))


def test_the_fid_is_what_the_program_prints_for_the_saved_images(installed, weights, tmp_path):
    """Grey against coloured images, of the 64 features of the first layers: those of 2048 take minutes here."""
    a, b = pictures(70, 1, seed=1), pictures(66, 3, seed=2)
    folders = [tmp_path / "a", tmp_path / "b"]
    for images, folder in zip((a, b), folders, strict=True):
        saved(images, folder)
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / inception.FILE).symlink_to(weights)
    words = [sys.executable, "-m", "pytorch_fid", "--dims", "64", "--device", "cpu", "--num-workers", "0"]
    printed = subprocess.run([*words, *map(str, folders)], capture_output=True, text=True, check=True,
                             env={**os.environ, "TORCH_HOME": str(tmp_path / "torch")}).stdout
    found = evaluate.fid(a, b, device="cpu", batch_size=32, dims=64)
    assert found["value"] == pytest.approx(float(printed.split("FID:")[1]), rel=1e-4, abs=1e-3)
    assert found["value"] > 1 and (found["n"], found["unit"]) == (66, "FID") and found["se"] > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_the_2048_features_are_those_of_pytorch_fid_on_the_saved_images(installed, tmp_path, channels):
    images = pictures(4, channels, seed=1)
    files = [tmp_path / "a" / f"{i}.png" for i in range(4)]
    saved(images, tmp_path / "a")
    net = inception.load("cpu")
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    expected = get_activations(files, net, batch_size=4, num_workers=0)
    found = torch.cat(list(inception.features(net, images, batch_size=3)))
    assert found.shape == (4, 2048) and found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected - expected.mean(0)).max() > 0.01 * np.abs(expected).max()


@pytest.mark.slow
def test_the_fid_of_2048_features_is_what_the_program_prints(installed, weights, tmp_path):
    """Takes a minute or more: the root of a 2048 x 2048 matrix, and Inception on 120 images twice."""
    a, b = pictures(60, 1, seed=1), pictures(60, 1, seed=2)
    for images, name in ((a, "a"), (b, "b")):
        saved(images, tmp_path / name)
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / inception.FILE).symlink_to(weights)
    words = [sys.executable, "-m", "pytorch_fid", "--device", "cpu", "--num-workers", "0"]
    printed = subprocess.run([*words, str(tmp_path / "a"), str(tmp_path / "b")], capture_output=True, text=True,
                             check=True, env={**os.environ, "TORCH_HOME": str(tmp_path / "torch")}).stdout
    one = [evaluate.fid_moments(images, "cpu", blocks=1) for images in (a, b)]
    assert evaluate.fid(*one)["value"] == pytest.approx(float(printed.split("FID:")[1]), rel=1e-4, abs=1e-3)


def test_images_in_chunks_and_kept_moments_give_the_same_fid(installed):
    a, b = pictures(9, 1, seed=1), pictures(8, 1, seed=2)
    whole = evaluate.fid(a, b, device="cpu", dims=64)
    chunks = evaluate.fid(iter(a.split(4)), evaluate.fid_moments(b, "cpu", 3, 64), device="cpu", batch_size=3, dims=64)
    assert chunks == {**whole, "value": pytest.approx(whole["value"], rel=1e-5), "se": pytest.approx(whole["se"], 1e-4)}


@pytest.mark.parametrize(("call", "complaint"), [
    (lambda net: inception.features(net, torch.zeros(2, 1, 8, 8)), "uint8 images.*got torch.float32"),
    (lambda net: inception.features(net, torch.zeros(2, 2, 8, 8, dtype=torch.uint8)), r"\[N, 1 or 3, H, W\]"),
    (lambda net: inception.features(net, torch.zeros(2, 8, 8, dtype=torch.uint8)), r"got torch.uint8 \[2, 8, 8\]"),
    (lambda net: inception.features(net, torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 0), "at least 1, got 0")])
def test_what_is_no_image_is_refused_by_the_fid(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        list(call(torch.nn.Conv2d(3, 64, 3)))


def test_an_unknown_layer_is_refused():
    with pytest.raises(ValueError, match="64, 192, 768, 2048 features, not 100"):
        inception.load("cpu", dims=100)


# ------------------------------------------------------------------------------------------------ weights
def test_the_weights_expected_are_the_public_ones():
    """torch's hub writes the first eight digits of a file's SHA-256 into its name."""
    (name, digest), = data.WEIGHTS["inception"].files.items()
    assert name == Path(original.FID_WEIGHTS_URL).name == f"pt_inception-2015-12-05-{digest[:8]}.pth"
    assert len(digest) == 64 and data._mirrors("inception")[0] + name == original.FID_WEIGHTS_URL


def test_without_weights_it_says_where_they_were_looked_for_and_what_serves_instead(tmp_path, monkeypatch):
    bare(tmp_path, monkeypatch)
    assert not inception.available()
    with pytest.raises(BookError) as error:
        evaluate.fid(pictures(2, 1, seed=1), pictures(2, 1, seed=2), device="cpu")
    text = str(error.value)
    for place in ("named", "checkout/data", "torch/hub/checkpoints"):
        assert str(tmp_path / place / inception.FILE) in text
    for part in ("no network", "`python -m lib data --fetch inception`", "VAEBOOK_DATA", "CFD"):
        assert part in text
    assert "\n" not in text and "data set" not in text and not list((tmp_path / "checkout").glob("*"))


@pytest.mark.parametrize("place", ["named", "checkout/data", "torch/hub/checkpoints"])
def test_weights_are_found_wherever_they_may_lie(tmp_path, monkeypatch, place):
    bare(tmp_path, monkeypatch)
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / inception.FILE).write_bytes(b"")
    assert inception.available() and data.find("inception") == tmp_path / place


def test_other_weights_than_the_public_ones_are_refused_before_they_are_read(tmp_path, monkeypatch):
    bare(tmp_path, monkeypatch)
    (tmp_path / "named").mkdir()
    torch.save({"a": torch.zeros(1)}, tmp_path / "named" / inception.FILE)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(BookError, match="is corrupt") as error:
        inception.load("cpu")
    assert "expected 6726825d0af5" in str(error.value) and "\n" not in str(error.value)


def test_weights_are_downloaded_checked_and_then_found(tmp_path, monkeypatch):
    import torchvision.datasets.utils
    download = data._download
    bare(tmp_path, monkeypatch)
    asked = []

    def download_url(url, folder, name):
        asked.append(url)
        Path(folder, name).write_bytes(b"weights")
    monkeypatch.setattr(data, "_download", download)
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download_url)
    with pytest.raises(BookError, match="another file"):
        data.fetch("inception")
    assert asked == [original.FID_WEIGHTS_URL] and not inception.available()
    monkeypatch.setitem(data.WEIGHTS["inception"].files, inception.FILE, hashlib.sha256(b"weights").hexdigest())
    assert data.fetch("inception") == tmp_path / "named" and inception.available()


def test_the_weights_are_no_data_set():
    with pytest.raises(BookError, match="unknown data set 'inception': known are mnist"):
        data.load("inception")


def test_weights_that_hold_code_are_not_run(installed, tmp_path, monkeypatch):
    """A pickle of the right checksum still may not call anything."""
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))
    installed.unlink()
    torch.save({"a": Evil()}, installed)
    digest = hashlib.sha256(installed.read_bytes()).hexdigest()
    monkeypatch.setitem(data.WEIGHTS["inception"].files, inception.FILE, digest)
    with pytest.raises(Exception, match="(?i)weights.only"):
        inception.load("cpu")
    assert not (tmp_path / "harm").exists()


# ------------------------------------------------------------------------------------------------ exported images
@pytest.mark.parametrize("channels", [1, 3])
def test_exported_images_read_back_equal(tmp_path, channels):
    images = pictures(12, channels, seed=1)
    assert sampling.export_images(images, tmp_path / "a" / "b") == 12
    sampling.export_images(images.float() / 255, tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 12
    for i, image in enumerate(images):
        for folder in ("a/b", "c"):
            read = np.asarray(Image.open(tmp_path / folder / f"{i}.png"))
            assert (read.reshape(28, 28, channels) == image.permute(1, 2, 0).numpy()).all()


def test_exporting_again_replaces_but_does_not_mix(tmp_path):
    sampling.export_images(pictures(5, 1, seed=1), tmp_path)
    sampling.export_images(pictures(5, 1, seed=2), tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert (np.asarray(Image.open(tmp_path / "0.png")) == pictures(5, 1, seed=2)[0, 0].numpy()).all()
    for images, other in ((pictures(4, 1, seed=1), "4.png"), (pictures(5, 1, seed=1), "x.jpg")):
        (tmp_path / "x.jpg").write_bytes(b"") if other == "x.jpg" else None
        with pytest.raises(BookError, match=f"holds another image, {other}"):
            sampling.export_images(images, tmp_path)


def test_images_cannot_be_exported_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BookError, match="cannot write images to .*Not a directory"):
        sampling.export_images(pictures(2, 1, seed=1), tmp_path / "file" / "images")


@pytest.mark.parametrize("images", [
    torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2, 2, 8, 8), torch.zeros(0, 1, 8, 8),
    torch.full((2, 1, 8, 8), math.nan), torch.zeros(2, 1, 8, 8, dtype=torch.int64)])
def test_what_is_no_image_is_not_exported(tmp_path, images):
    with pytest.raises(ValueError, match="images to export must be"):
        sampling.export_images(images, tmp_path / "a")
    assert not (tmp_path / "a").exists()
