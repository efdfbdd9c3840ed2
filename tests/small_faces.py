"""Small sets of pictures laid out as CelebA is, and what loading them must give."""
import contextlib
import io
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from lib import celeba, data

N = 23
REAL = os.environ.get("VAEBOOK_DATA")


def frame(side=celeba.FRAME):
    """Two pictures of numbers, not of bytes: at each pixel, where it is in the 178x218 frame, across and down."""
    across, down = ((np.arange(n) + 0.5) * full / n - 0.5 for n, full in zip(side, celeba.FRAME, strict=True))
    return [Image.fromarray(part.astype(np.float32)) for part in np.meshgrid(across, down)]


def noise(i, size=(45, 55)):
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def jpeg(image, form="JPEG"):
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


FACES = {f"{i:06}.jpg": jpeg(noise(i)) for i in range(1, N + 1)}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The folder `celeba` that VAEBOOK_DATA holds; the cache is below tmp_path too, eight images to a chunk."""
    monkeypatch.setenv("VAEBOOK_DATA", str(tmp_path / "named"))
    for module in (data, celeba):
        monkeypatch.setattr(module, "root", lambda: tmp_path / "checkout")
    monkeypatch.setattr(celeba, "CHUNK", 8 * 3 * 16 * 16)
    monkeypatch.setattr(celeba, "BLOCK", 2)
    place = tmp_path / "named" / "celeba"
    place.mkdir(parents=True)
    return place


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "checkout" / "build" / "celeba"


def unpacked(folder, faces=FACES):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in faces.items():
        (folder / name).write_bytes(content)
    return folder


def packed(path, faces=FACES, inside=""):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in faces.items():
            archive.writestr(inside + name, content)
    return path


def expected(faces=FACES, size=16):
    """What the faces are, each by Pillow alone, squeezed to a square."""
    images = [Image.open(io.BytesIO(content)).resize((size, size), Image.Resampling.BILINEAR)
              for content in faces.values()]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def together(found):
    return torch.cat([found.train, found.test])


def complaint(*arguments):
    with pytest.raises(data.DataError) as error:
        celeba.load(*arguments or (16,))
    text = str(error.value)
    assert "\n" not in text
    return text


@contextlib.contextmanager
def counted(monkeypatch):
    """The names of the images that are decoded meanwhile."""
    names, pixels = [], celeba._pixels
    with monkeypatch.context() as patch:
        patch.setattr(celeba, "_pixels", lambda source, read, name, *rest: names.append(name) or pixels(
            source, read, name, *rest))
        yield names


def flipped(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
