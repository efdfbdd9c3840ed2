"""Binary images: the split and the draws of the paper's code, the published static file, and each fault in one line."""
import dataclasses
import hashlib

import numpy as np
import pytest
import torch

from lib import binarised, data, train
from lib.data import DataError

PARTS = ("train", "valid", "test")


@pytest.fixture(autouse=True)
def named(tmp_path, monkeypatch):
    """The data folder, empty: nothing is read from a person's, and nothing is downloaded."""
    monkeypatch.setenv("VAEBOOK_DATA", str(tmp_path / "named"))
    monkeypatch.setattr(data, "root", lambda: tmp_path / "checkout")
    monkeypatch.setattr(data, "fetch", lambda name: pytest.fail(f"{name} was to be downloaded"))
    return tmp_path / "named"


def equal(a, b, parts=PARTS):
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in parts)


def by_hand(rng, grey):
    """What the legacy stream gives for one trial: 1 where u > 1 - p if p <= 1/2, else where u <= p; a u a pixel."""
    p = grey.numpy().astype(np.float32) / np.float32(255)
    p, u = p.astype(np.float64), rng.random_sample(p.shape)
    return torch.from_numpy(np.where(p > 0.5, u <= p, u > 1 - p)).byte() * 255


# ------------------------------------------------------------------------------------------------ drawn here
@pytest.mark.parametrize(("options", "seed"), [({}, 777), ({"seed": 3}, 3)])
def test_digits_are_split_and_drawn_from_numpys_stream_valid_before_test_before_train(options, seed):
    grey, rng = data.load("digits", size=28), np.random.RandomState(seed)
    dynamic, static = (binarised.load("digits", kind, **options) for kind in ("dynamic", "static"))
    for images in (dynamic, static):
        assert torch.equal(images.test_labels, grey.test_labels) and images.label_names == data.DIGITS
        assert (images.name, len(images.sha256)) == ("digits", 64)
        assert [tuple(getattr(images, part).shape) for part in PARTS] == [(n, 1, 28, 28) for n in (1198, 239, 360)]
        assert all(getattr(images, part).dtype == torch.uint8 for part in PARTS)
    assert torch.equal(dynamic.train, grey.train[:1198]) and len(dynamic.train.unique()) > 200
    for images, n in ((dynamic.valid, slice(1198, None)), (dynamic.test, None), (static.train, slice(1198))):
        assert torch.equal(images, by_hand(rng, grey.test if n is None else grey.train[n]))
    assert equal(dynamic, static, ("valid", "test"))


@pytest.mark.parametrize("name", ["mnist", "fashionmnist"])
def test_the_last_sixth_of_the_training_images_is_for_validation(monkeypatch, name):
    """Of 12 images: 10 and 2, as MNIST's are 50,000 and 10,000. They are 0 or 255, so the draws do not change them."""
    images = torch.randint(0, 2, (15, 1, 28, 28), dtype=torch.uint8, generator=train.generator(0)) * 255
    labels = torch.arange(15)
    found = data.Dataset(name, images[:12], images[12:], labels[:12], labels[12:], data.GARMENTS, "0" * 64)
    monkeypatch.setattr(data, "_load", lambda asked: {name: found}[asked])
    for kind in binarised.BINARISATIONS:
        own = binarised.load(name, kind)
        assert torch.equal(torch.cat([own.train, own.valid, own.test]), images)
        assert (len(own.train), len(own.valid), own.label_names) == (10, 2, data.GARMENTS)
        assert torch.equal(own.test_labels, labels[12:])
        paper = (name, kind) == ("mnist", "dynamic")
        assert own.source.endswith("RandomState(777), the same as the paper's code draws") == paper
        assert "paper" not in binarised.load(name, kind, seed=1).source
        assert ("not the published file" in own.source) == ((name, kind) == ("mnist", "static"))
        assert ("afresh in every batch" in own.source) == (kind == "dynamic")


def test_draws_are_a_function_of_the_seed_alone_and_the_checksum_tells_them_apart(monkeypatch):
    images = binarised.load("digits", "static")
    np.random.seed(1)
    torch.manual_seed(1)
    again, other = binarised.load("digits", "static"), binarised.load("digits", "static", seed=778)
    assert equal(images, again) and (images.sha256, images.source) == (again.sha256, again.source)
    assert not any(equal(images, other, (part,)) for part in PARTS) and "778" in other.source
    sums = {images.sha256, other.sha256, binarised.load("digits", "dynamic").sha256}
    changed = dataclasses.replace(data.load("digits"), sha256="0" * 64)
    monkeypatch.setattr(data, "_load", lambda name: changed)
    assert len(sums | {binarised.load("digits", "static").sha256}) == 4


def test_the_chunks_of_a_draw_change_nothing():
    grey = torch.randint(0, 256, (4100, 1, 3, 3), dtype=torch.uint8, generator=train.generator(0))
    rng = np.random.RandomState(5)
    own, following = binarised.once(grey, rng), rng.random_sample()
    rng = np.random.RandomState(5)
    assert np.array_equal(own.numpy(), 255 * rng.binomial(1, grey.float().numpy() / 255))
    assert following == rng.random_sample()


# ------------------------------------------------------------------------------------------------ in each batch
@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"))])
def device(request):
    return request.param


def test_a_draw_of_binary_images_returns_them(device):
    images = binarised.load("digits", "static").train.to(device)
    drawn = binarised.draw(images, train.generator(0, device))
    assert drawn.dtype == torch.float32 and torch.equal(drawn, (images > 0).float())


def test_a_draw_of_grey_images_has_their_means_and_is_another_one_each_time(device):
    grey = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 16, 16)
    noise, n = train.generator(0, device), 4000
    first, second = (binarised.draw(grey.expand(n, -1, -1, -1), noise) for _ in range(2))
    assert not torch.equal(first, second) and set(first.unique().tolist()) == {0, 1}
    assert torch.equal(first, binarised.draw(grey.expand(n, -1, -1, -1), train.generator(0, device)))
    p = grey[0].double() / 255
    z = (torch.stack([first, second]).double().mean((0, 1)) - p) / (p * (1 - p) / (2 * n)).sqrt().clamp(min=1e-9)
    assert z.abs().max() < 5 and 0.8 < z.square().mean() < 1.2


# ------------------------------------------------------------------------------------------------ the published file
BITS = [torch.randint(0, 2, (n, 1, 28, 28), generator=train.generator(n)).byte() * 255 for n in (4, 3, 2)]


def lines(images):
    return [" ".join(str(bit) for bit in (image > 0).byte().flatten().tolist()) for image in images]


def write(folder, contents):
    """The three parts of the file, from their texts; returns their paths."""
    paths = [folder / file for file in data.BINARY["mnist-static"].files]
    for path, content in zip(paths, contents, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return paths


@pytest.fixture
def static(named, monkeypatch):
    """Paths of a file of 4 + 3 + 2 images in the named folder."""
    monkeypatch.setattr(binarised, "LENGTHS", (4, 3, 2))
    return write(named, ["\n".join([*lines(images), ""]).encode() for images in BITS])


def complaint(dataset="mnist", binarisation="static", **options):
    with pytest.raises(DataError) as error:
        binarised.load(dataset, binarisation, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_the_file_is_read_where_it_is(static, monkeypatch):
    found = binarised.load("mnist", "static")
    assert [path.name for path in static] == [f"binarized_mnist_{part}.amat" for part in PARTS]
    for part, images in zip(PARTS, BITS, strict=True):
        assert torch.equal(getattr(found, part), images) and getattr(found, part).dtype == torch.uint8
    assert found.test_labels is None and (found.name, found.binarisation) == ("mnist", "static")
    assert "published" in found.source and "it is not" in found.source
    files = {file: hashlib.sha256(path.read_bytes()).hexdigest()
             for file, path in zip(data.BINARY["mnist-static"].files, static, strict=True)}
    monkeypatch.setitem(data.BINARY, "mnist-static", dataclasses.replace(data.BINARY["mnist-static"], files=files))
    known = binarised.load("mnist", "static", seed=5)                       # there is nothing to draw
    assert known.source == "read from the published file (Larochelle & Murray), by its SHA-256"
    assert known.sha256 == found.sha256 and equal(known, found)


def test_the_checksum_follows_each_part_of_the_file(static):
    sums = {binarised.load("mnist", "static").sha256}
    for path in static:
        content = path.read_bytes()
        path.write_bytes(content[:-2] + content[-2:].translate(bytes.maketrans(b"01", b"10")))     # the last pixel
        sums.add(binarised.load("mnist", "static").sha256)
    assert len(sums) == 4


@pytest.mark.parametrize("change", [
    lambda text: text.replace(b"\n", b"\r\n"), lambda text: text.replace(b"\n", b" \n"), lambda text: text[:-1],
    lambda text: text.replace(b" ", b"\t"), lambda text: b" " + text.replace(b" ", b"  ") + b"\n\n"],
    ids=["windows", "space at the end", "no end of line", "tabs", "aligned"])
def test_white_space_of_the_file_does_not_matter(static, change):
    for path in static:
        path.write_bytes(change(path.read_bytes()))
    found = binarised.load("mnist", "static")
    assert all(torch.equal(getattr(found, part), images) for part, images in zip(PARTS, BITS, strict=True))


def test_the_file_is_for_static_mnist_only(static, monkeypatch):
    for path in static:
        path.write_bytes(b"damaged")
    assert "line 1: 'damaged' where 0 or 1 is expected" in complaint()
    digits = data.load("digits", size=28)
    monkeypatch.setattr(data, "_load", lambda name: digits)
    for dataset, kind in (("mnist", "dynamic"), ("fashionmnist", "static"), ("digits", "static")):
        assert "RandomState" in binarised.load(dataset, kind).source


@pytest.mark.parametrize("missing", range(3))
def test_a_file_with_a_part_missing_is_refused(static, missing):
    static[missing].unlink()
    text = complaint()
    assert text.startswith(f"{static[missing]} is missing") and "`python -m lib data --fetch mnist-static`" in text
    static[missing - 1].unlink()
    assert str(static[missing - 2]) not in complaint()


def test_the_first_folder_with_all_parts_is_read(static, tmp_path):
    write(tmp_path / "checkout" / "data", [path.read_bytes() for path in static])
    static[0].write_bytes(b"damaged")
    assert str(static[0]) in complaint()
    static[1].unlink()
    assert torch.equal(binarised.load("mnist", "static").test, BITS[2])


GOOD = lines(BITS[1])


@pytest.mark.parametrize(("content", "where", "what"), [
    (GOOD[:2], "", "has 2 lines where 3 are expected"), (GOOD * 2, "", "has 6 lines where 3 are expected"),
    ([*GOOD[:2], GOOD[2][:411]], ", line 3:", "206 numbers where 784"),
    ([GOOD[0], GOOD[1] + " 1", GOOD[2]], ", line 2:", "785 numbers where 784"),
    ([GOOD[0], "", *GOOD[1:]], ", line 2:", "0 numbers where 784"), ([], ", line 1:", "0 numbers where 784"),
    ([*GOOD[:2], "2" + GOOD[2][1:]], ", line 3:", "'2' where 0 or 1"),
    ([*GOOD[:2], GOOD[2][:-1] + "-1"], ", line 3:", "'-1' where 0 or 1"),
    ([GOOD[0], "0.5" + GOOD[1][1:], "x" + GOOD[2][1:]], ", line 2:", "'0.5' where 0 or 1"),
    ([GOOD[0], GOOD[1].replace(" ", "", 1), GOOD[2]], ", line 2:", f"'{GOOD[1][0]}{GOOD[1][2]}' where 0 or 1"),
    (["<html>log in first, please</html>"], ", line 1:", "'<html>log' where 0 or 1"),
    (["\x1f\x8b\x08\0\xff" * 9], ", line 1:", r"'\x1f\x8b\x08\x00\xff\x1f\x8b\x08\x00\xff\x1f\x8b' where 0 or 1")],
    ids=["short", "long", "cut", "wide", "blank line", "empty", "2", "-1", "0.5", "joined", "page", "packed"])
def test_a_file_that_is_not_what_it_should_be_is_refused_by_its_line(static, content, where, what):
    static[1].write_bytes("\n".join(content).encode("latin-1"))
    text = complaint()
    assert text.startswith(f"{static[1]}{where} {what}") and "delete it, then `python -m lib data --fetch" in text


def test_a_file_that_cannot_be_opened_is_named(static):
    content = static[2].read_bytes()
    static[2].unlink()
    static[2].symlink_to(static[2].with_name("elsewhere"))                  # to nothing: the part is not there
    assert f"{static[2]} is missing" in complaint()
    with pytest.raises(DataError, match=f"cannot read {static[2]}: No such file"):
        binarised.read_amat(static[2], 2)
    static[2].with_name("elsewhere").write_bytes(content)
    assert torch.equal(binarised.load("mnist", "static").test, BITS[2])


# ------------------------------------------------------------------------------------------------ what is asked for
@pytest.mark.parametrize("dataset", ["shapes", "newsgroups", "topics", "mnits"])
def test_other_data_are_refused(dataset):
    text = complaint(dataset, "dynamic")
    assert text == f"there are no binary images of {dataset!r}: choose one of mnist, fashionmnist, digits"


def test_another_binarisation_is_refused():
    assert complaint("digits", "statik") == "unknown binarisation 'statik': use dynamic or static"


# ------------------------------------------------------------------------------------------------ real files
def test_mnists_validation_and_test_images_are_those_of_the_papers_code(monkeypatch):
    """Checksums of the 0s and 1s that the code's own calls gave, NumPy's global stream after seed(777) at one go."""
    monkeypatch.undo()                                             # of `named`: a person's data folder counts
    if not data.find("mnist"):
        pytest.skip("mnist is not on this machine")
    found, grey = binarised.load("mnist", "dynamic"), data.load("mnist")
    assert torch.equal(found.train, grey.train[:50_000]) and len(found.valid) == len(found.test) == 10_000
    assert torch.equal(found.test_labels, grey.test_labels)
    digests = [hashlib.sha256((images > 0).numpy().tobytes()).hexdigest() for images in (found.valid, found.test)]
    assert digests == ["bf03dc576557652dfc5251be95c792c593a5003e0b9704bd4688048b34b12723",
                       "a700b0d972959b58f1603f074199fd8e80fa8cb858cbf1a908eaaf1b93e1117a"]
    for images, before in ((found.valid, grey.train[50_000:]), (found.test, grey.test)):
        p = before.double() / 255
        assert ((images > 0).double() - p).sum().abs() < 4 * (p * (1 - p)).sum().sqrt()
