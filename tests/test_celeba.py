"""CelebA: found wherever it lies, cropped as torchvision does, decoded once; each fault is one clear line."""
import contextlib
import errno
import hashlib
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import small_faces
import torch
from PIL import Image
from small_faces import FACES, REAL, N, complaint, expected, flipped, frame, jpeg, noise, packed, together, unpacked
from torchvision import transforms
from torchvision.transforms import functional

from lib import celeba, data, runs

place = small_faces.place
cache = small_faces.cache


# ------------------------------------------------------------------------------------------------ where they are
LAYOUTS = {"torchvision": lambda place: unpacked(place / "img_align_celeba"), "folder": lambda place: unpacked(place),
           "any folder": lambda place: unpacked(place / "faces"), "zip": lambda place: packed(place / "a.zip"),
           "torchvision's zip": lambda place: packed(place / "img_align_celeba.zip", inside="img_align_celeba/")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images_in_order(place, layout):
    path = LAYOUTS[layout](place)
    found = data.load("celeba", 16)
    assert found.name == "celeba" and found.train.dtype == torch.uint8 and found.train.shape == (21, 3, 16, 16)
    assert torch.equal(together(found), expected()) and len(found.test) == 2
    for labels in (found.train_labels, found.test_labels):
        assert labels.dtype == torch.int64 and labels.shape == (0,)
    assert found.label_names == () and found.source == f"23 images in {path.name}, resize"
    assert data.find("celeba") == path == data.fetch("celeba")


def test_a_folder_of_the_checkout_serves_where_the_named_one_has_none(place, tmp_path):
    path = unpacked(tmp_path / "checkout" / "data" / "celeba" / "img_align_celeba")
    assert celeba.find().path == path
    packed(place / "few.zip", dict(itertools.islice(FACES.items(), 3)))
    assert celeba.find().path == place / "few.zip"


def test_the_source_with_most_images_is_read_and_a_zip_before_what_was_unpacked_from_it(place):
    few = dict(itertools.islice(FACES.items(), 3))
    packed(place / "few.zip", few)
    unpacked(place / "img_align_celeba")
    assert celeba.find().path == place / "img_align_celeba"
    packed(place / "all.zip")
    assert celeba.find().path == place / "all.zip"
    unpacked(place, FACES | {"more.JPEG": FACES["000001.jpg"]})
    assert celeba.find().path == place and len(celeba.find().names) == N + 1


def test_what_is_no_image_of_the_set_is_passed_over(place):
    strange = {"list_eval_partition.txt": b"1", "._000001.jpg": b"", ".DS_Store": b"", "000001.jpg.part": b""}
    packed(place / "a.zip", FACES | strange | {"__MACOSX/._000002.jpg": b""})
    unpacked(place / "b", FACES | strange)
    (place / "b" / "folder.jpg").mkdir()
    assert [len(source.names) for source in celeba._sources(place)] == [N, 0, N]
    assert torch.equal(together(celeba.load(16)), expected())


def test_the_checksum_is_of_the_zip_or_of_the_names_and_contents_in_a_folder(place, tmp_path):
    path = packed(place / "a.zip")
    assert celeba.load(16).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.unlink()
    digests = set()
    renamed = dict(zip(["000000.jpg", *list(FACES)[1:]], FACES.values(), strict=True))
    for faces in (FACES, FACES | {"000003.jpg": FACES["000004.jpg"]}, renamed):
        folder = unpacked(tmp_path / "named" / "celeba" / "faces", faces)
        digests.add(celeba.load(16).sha256)
        for file in folder.iterdir():
            file.unlink()
    assert len(digests) == 3 and all(len(digest) == 64 for digest in digests)


def test_the_list_of_data_sets_tells_the_state(place):
    def row():
        return next(row for row in data.listing() if row["name"] == "celeba")
    assert row()["state"] == "missing" and row()["licence"] == "non-commercial research only"
    packed(place / "a.zip")
    assert row()["state"] == f"{N} images in {place / 'a.zip'}"
    (place / "a.zip").write_bytes((place / "a.zip").read_bytes()[:900])
    assert "a.zip is cut short" in row()["state"]


# ------------------------------------------------------------------------------------------------ the partition
def test_the_partition_is_by_file_number_where_the_files_reach_the_test_images():
    numbers = [1, 2, 162_770, 162_771, 182_637, 182_638, 202_599]
    for form in ("{:06}.jpg", "{}.jpg", "img/{:06}.png"):
        names = celeba._ordered([form.format(n) for n in reversed(numbers)])
        assert names == tuple(form.format(n) for n in numbers)
        train, test = celeba.partition(names)
        assert train == [form.format(n) for n in numbers[:3]] and test == [form.format(n) for n in numbers[5:]]


def test_the_whole_set_has_celebas_own_sizes():
    names = celeba._ordered(f"{n:06}.jpg" for n in range(1, 202_600))
    train, test = celeba.partition(names)
    assert (len(names), len(train), len(test)) == (202_599, 162_770, 19_962)


@pytest.mark.parametrize("numbers", [range(1, 31), range(182_638, 182_668), [*range(1, 15), *range(162_771, 162_787)],
                                     [*range(1, 30), 202_600], [0, *range(182_610, 182_639)]])
def test_of_a_part_of_the_set_the_last_tenth_is_the_test_set(numbers):
    names = celeba._ordered(f"{n:06}.jpg" for n in numbers)
    assert celeba.partition(names) == (list(names[:27]), list(names[27:]))


def test_names_that_are_no_numbers_and_numbers_met_twice_are_ordered_by_name():
    names = celeba._ordered(["b/000001.jpg", "a/200000.jpg", "a/000001.jpg", "b/200000.jpg"])
    assert names == ("a/000001.jpg", "a/200000.jpg", "b/000001.jpg", "b/200000.jpg")
    assert celeba.partition(names) == (list(names[:3]), list(names[3:]))
    assert celeba._ordered(["200000.jpg", "9.jpg", "z.jpg"]) == ("200000.jpg", "9.jpg", "z.jpg")


def test_the_validation_images_are_left_out_and_train_and_test_are_views(place, cache):
    numbers = [5, 6, 170_000, 182_638, 190_000]
    faces = {f"{n:06}.jpg": jpeg(noise(n)) for n in numbers}
    unpacked(place, faces)
    found, images = celeba.load(16), expected(faces)
    assert torch.equal(found.train, images[:2]) and torch.equal(found.test, images[3:])
    assert found.train.untyped_storage().data_ptr() == found.test.untyped_storage().data_ptr()
    kept = np.load(next(cache.glob("*.npy")))
    assert kept.dtype == np.uint8 and torch.equal(torch.from_numpy(kept), images[[0, 1, 3, 4]])


# ------------------------------------------------------------------------------------------------ crops and flips
REFERENCE = {
    "resize-centre": lambda size: transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)]),
    "face-128": lambda size: lambda image: functional.resize(functional.crop(image, 57, 25, 128, 128), [size, size]),
    "resize": lambda size: transforms.Resize((size, size)),
    "centre-140": lambda size: transforms.Compose([transforms.CenterCrop(140), transforms.Resize(size)])}


@pytest.mark.parametrize("size", [64, 33, 200])
@pytest.mark.parametrize("crop", celeba.CROPS)
def test_crops_are_torchvisions_to_the_bit(crop, size):
    for image in (noise(0, celeba.FRAME), *frame()):
        assert celeba.cropped(image, crop, size).tobytes() == REFERENCE[crop](size)(image).tobytes()


@pytest.mark.parametrize("side", [(89, 109), (218, 178), (45, 31), (64, 64), (1, 3)])
def test_resize_and_centre_is_torchvisions_for_images_of_any_size(side):
    image = noise(1, side)
    assert celeba.cropped(image, "resize-centre", 24).tobytes() == REFERENCE["resize-centre"](24)(image).tobytes()


# Left, upper, right, lower of what is seen, in pixels of the 178x218 frame; 218 * 64 / 178 = 78 rows, 7 cut off.
SEEN = {"resize-centre": (0, 7 * 218 / 78, 178, 71 * 218 / 78), "resize": (0, 0, 178, 218),
        "face-128": (89 - 64, 121 - 64, 89 + 64, 121 + 64), "centre-140": (19, 39, 159, 179)}


@pytest.mark.parametrize("side", [(178, 218), (89, 109), (356, 436)])
@pytest.mark.parametrize("crop", celeba.CROPS)
def test_crops_see_the_same_part_of_the_frame_whatever_the_images_size(crop, side):
    left, upper, right, lower = SEEN[crop]
    inner = slice(2, -2)                                        # at the frame's edges the filter is one-sided
    for picture, low, high, way in zip(frame(side), (left, upper), (right, lower), (0, 1), strict=True):
        found = np.asarray(celeba.cropped(picture, crop, 64))[inner, inner]
        seen = (low + (np.arange(64) + 0.5) * (high - low) / 64 - 0.5)[inner]
        assert np.abs(found - (seen[:, None] if way else seen)).max() < 0.25              # pixels of the frame


def test_a_box_on_half_pixels_sees_nothing_beyond_the_pixels_it_touches():
    """In the half-size copy face-128 begins at 12.5: column 12 has its half, column 11 nothing."""
    image = np.zeros((109, 89, 3), np.uint8)
    image[:, 12], image[:, 11] = 100, 255
    found = np.asarray(celeba.cropped(Image.fromarray(image), "face-128", 64))[..., 0]
    assert found[:, 0].tolist() == [50] * 64 and not found[:, 1:].any()


def test_images_of_several_sizes_and_kinds_may_lie_together(place):
    whole = noise(0, (6, 7)).resize(celeba.FRAME, Image.Resampling.BICUBIC)
    half = jpeg(whole.resize((89, 109)), "PNG")
    unpacked(place, {"a.jpg": jpeg(whole), "b.PNG": half, "c.jpeg": jpeg(noise(2, (7, 5)))})
    found = together(celeba.load(16, "face-128")).float()
    assert found.shape == (3, 3, 16, 16) and found[0].std() > 20 and (found[0] - found[1]).abs().mean() < 3


def test_flips_mirror_each_image_with_probability_one_half():
    images = torch.arange(2000 * 3 * 2 * 4).remainder(251).to(torch.uint8).view(2000, 3, 2, 4)
    found = celeba.flip(images, torch.Generator().manual_seed(0))
    kept, mirrored = (found == images).flatten(1).all(1), (found == images.flip(3)).flatten(1).all(1)
    assert found.dtype == torch.uint8 and bool((kept ^ mirrored).all()) and 920 < mirrored.sum() < 1080
    assert torch.equal(celeba.flip(images, torch.Generator().manual_seed(0)), found)
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(celeba.flip(images, generator), celeba.flip(images, generator))
    assert celeba.flip(images[0, 0], generator).shape == (2, 4)


# ------------------------------------------------------------------------------------------------ faults
def with_fault(place, kind, content, name="000013.jpg"):
    faces = FACES | {name: content}
    return packed(place / "a.zip", faces) if kind == "zip" else unpacked(place / "faces", faces)


def gif():
    return jpeg(noise(0), "GIF")


FAULTS = {
    "cut": (FACES["000013.jpg"][:700], "is corrupt (image file is truncated"),
    "page": (b"<html>not found</html>", "is corrupt (it is no JPEG or PNG image): get it again or take it out"),
    "empty": (b"", "is corrupt (it is no JPEG or PNG image)"), "another format": (gif(), "it is no JPEG or PNG image"),
    "damaged PNG": (jpeg(noise(0), "PNG")[:90] + b"x" * 40, "is corrupt ("),
    "grey": (jpeg(noise(0).convert("L")), "is not RGB (it is grey): convert it or take it out"),
    "grey of 16 bits": (jpeg(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG"), "is not RGB (I;16)"),
    "palette": (jpeg(noise(0).convert("P"), "PNG"), "is not RGB (it has a palette)"),
    "transparent": (jpeg(noise(0).convert("RGBA"), "PNG"), "is not RGB (it has transparency)"),
    "print colours": (jpeg(noise(0).convert("CMYK")), "is not RGB (CMYK)")}


@pytest.mark.parametrize("kind", ["zip", "folder"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_image_is_named(place, cache, fault, kind):
    content, why = FAULTS[fault]
    path = with_fault(place, kind, content)
    text = complaint()
    assert text.startswith(f"{path}: the image 000013.jpg ") and why in text
    assert not list(cache.glob("*.npy"))


@pytest.mark.parametrize("limit", [45 * 55 - 1, (45 * 55) // 3])
def test_an_image_that_is_too_large_is_named(place, monkeypatch, limit):
    """Pillow warns above its limit and refuses above twice that; here both are refused, and the book's own limit."""
    path = packed(place / "a.zip")
    with monkeypatch.context() as patch, pytest.warns(Image.DecompressionBombWarning) if limit > 1000 \
            else contextlib.nullcontext():
        patch.setattr(celeba, "LARGEST", limit)
        patch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert complaint() == f"{path}: the image 000001.jpg is larger than any photograph: take it out"
    monkeypatch.setattr(celeba, "LARGEST", 45 * 55 - 1)
    assert "is larger than any photograph" in complaint()


def test_the_first_faulty_image_is_named_however_many_threads_there_are(place, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    packed(place / "a.zip", FACES | {f"{i:06}.jpg": b"no image" for i in (3, 5, 6, 22)})
    assert "the image 000003.jpg is corrupt" in complaint()


def test_a_damaged_member_of_a_zip_is_named(place):
    """Pillow would decode it without a word; the checksum in the zip tells."""
    path = packed(place / "a.zip")
    where = path.read_bytes().index(FACES["000004.jpg"]) + len(FACES["000004.jpg"]) - 100
    flipped(path, where)
    assert "the image 000004.jpg is corrupt (Bad CRC-32" in complaint()


def test_a_locked_member_of_a_zip_is_named(place):
    path = packed(place / "a.zip")
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1             # the encryption flag of the last member
    path.write_bytes(content)
    assert "the image 000023.jpg is corrupt (" in (text := complaint()) and "encrypted" in text


@pytest.mark.parametrize("content", [lambda whole: whole[:len(whole) // 2], lambda whole: whole[:-10],
                                     lambda whole: b"", lambda whole: b"<html>log in first</html>"],
                         ids=["half", "end", "empty", "page"])
def test_a_zip_that_is_cut_short_is_refused_even_beside_a_sound_one(place, content):
    path = packed(place / "b.zip")
    packed(place / "a.zip")
    path.write_bytes(content(path.read_bytes()))
    text = complaint()
    assert text.startswith(f"{path} is cut short or not a zip (") and "delete it and get img_align_celeba.zip" in text


def test_dots_in_a_name_lead_nowhere(place):
    packed(place / "a.zip", FACES | {"img..x/a..b...jpg": FACES["000001.jpg"], "x/...": b"", "..c": b""})
    assert len(celeba.find().names) == N + 1


@pytest.mark.parametrize("name", ["../000099.jpg", "img/..", "img/../../x.txt", "/etc/000099.jpg", "..\\000099.jpg",
                                  "C:\\000099.jpg", "\\\\host\\share\\000099.jpg"])
def test_a_zip_that_names_paths_outside_its_folder_is_refused(place, tmp_path, name):
    path = packed(place / "a.zip", FACES | {name: FACES["000001.jpg"]})
    before = sorted(tmp_path.rglob("*"))
    assert complaint().startswith(f"{path} names a path outside its folder ({name}): that is no archive to trust")
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_images_say_where_they_were_looked_for_and_how_to_get_them(place, tmp_path):
    text = complaint()
    assert f"looked for a folder or a zip of images in {place} (has no image), " in text
    assert f"{tmp_path / 'checkout' / 'data' / 'celeba'} (is not there))" in text
    assert "mmlab.ie.cuhk.edu.hk" in text and "non-commercial research only" in text
    assert f"put it, as it is or unpacked, into {place}" in text and "embedded data set 'shapes' needs no file" in text
    with pytest.raises(data.DataError) as error:
        data.fetch("celeba")
    assert str(error.value) == text and data.find("celeba") is None


def test_an_empty_folder_and_a_zip_without_images_are_no_images(place):
    (place / "img_align_celeba").mkdir()
    packed(place / "list.zip", {"list_attr_celeba.txt": b"1"})
    assert f"{place} (has no image)" in complaint()


def test_one_image_is_too_few(place):
    unpacked(place, {"000001.jpg": FACES["000001.jpg"]})
    assert "has 1 image, and two at least are needed" in complaint()
    unpacked(place, {"000002.jpg": FACES["000002.jpg"]})
    found = celeba.load(16)
    assert len(found.train) == len(found.test) == 1


def test_files_that_cannot_be_read_are_named(place, monkeypatch):
    unpacked(place)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert complaint() == f"cannot read {place / '000001.jpg'}: Permission denied"
    monkeypatch.setattr(os, "scandir", refuse)
    assert complaint() == f"cannot read {place}: Permission denied"


def test_images_that_change_while_they_are_decoded_are_not_kept(place, cache, monkeypatch):
    path, pixels = packed(place / "a.zip"), celeba._pixels

    def meddled(*arguments):
        os.utime(path, (1, 1))
        return pixels(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(celeba, "_pixels", meddled)
        assert complaint() == f"{path} was changed while it was read: repeat when it is complete"
    assert not list(cache.glob("*.npy")) and not list(cache.glob("*.partial"))
    assert torch.equal(together(celeba.load(16)), expected())


@pytest.mark.parametrize(("crop", "near"), [("face128", "face-128"), ("resize-center", "resize-centre")])
def test_an_unknown_crop_is_refused_with_the_nearest_one(crop, near):
    assert complaint(64, crop) == (f"unknown crop {crop!r}: did you mean {near!r}? Known are resize-centre, face-128, "
                                   "resize, centre-140")


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_one_pixel_is_refused(size):
    assert complaint(size) == f"image size must be at least 1 pixel, got {size}"
    with pytest.raises(data.DataError, match="at least 1 pixel"):
        data.load("celeba", size)


def test_a_crop_of_another_data_set_is_refused():
    for name in ("shapes", "topics"):
        with pytest.raises(data.DataError, match=f"{name} has no crops, got 'resize': leave the crop empty, or"):
            data.load(name, crop="resize")


def test_the_size_is_64_and_the_crop_resize_unless_told(place, monkeypatch):
    monkeypatch.setattr(celeba, "CHUNK", 2 ** 24)
    packed(place / "a.zip")
    assert torch.equal(data.load("celeba").train, data.load("celeba", 64, "resize").train)
    assert data.load("celeba").train.shape == (21, 3, 64, 64)
    assert not torch.equal(data.load("celeba", crop="face-128").train, data.load("celeba").train)


# ------------------------------------------------------------------------------------------------ real files
def test_real_files_where_they_are(monkeypatch):
    """Aligned faces are symmetric on average, and skin is redder than it is blue."""
    monkeypatch.setenv("VAEBOOK_DATA", REAL or "")
    source = celeba.find()
    if not source:
        pytest.skip("celeba is not on this machine")
    with celeba._decoding(source, celeba._fingerprint(source), source.names, 64, "face-128", 0) as make:
        images = torch.from_numpy(make(0, 200)).float()
    mean = images.mean(0)
    assert torch.corrcoef(torch.stack([mean.flatten(), mean.flip(2).flatten()]))[0, 1] > 0.95
    assert mean[0].mean() > 1.1 * mean[2].mean() and images.std() > 50


def test_a_part_of_the_set_is_reduced(place, tmp_path):
    packed(place / "a.zip")
    paper = runs.check("celeba-gan", runs.presets("celeba-gan")["paper"])
    run = runs.Run("celeba-gan", "paper", "paper", paper, tmp_path, {"commit": "a" * 40, "dirty": False}, added=True)
    record = run.save({}, celeba.load(64, "resize-centre"))
    assert record["reduced"] == ["21 training images instead of 162,770"]
    assert record["dataset"]["source"].startswith("23 images in a.zip")
    assert run.save({}, data.load("shapes"))["reduced"] == []
