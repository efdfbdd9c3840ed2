"""CelebA's aligned faces (Liu et al. 2015) as one uint8 array: a folder or a zip of them, decoded once, then cached.

    faces = data.load("celeba", size=64, crop="resize-centre")      # or celeba.load(64, "resize-centre")
Below each of the data folders ($VAEBOOK_DATA, then ./data) are looked at: celeba/img_align_celeba/ (as torchvision lays
it out), every other folder celeba/*/, celeba/ itself and the zips in them; the one with most images is read. A zip is
read member by member, nothing is unpacked. The cache, build/celeba/, is keyed by the source's SHA-256, crop and size;
it may be deleted at any time.

Crops: those of torchvision on PIL images (bilinear, antialiased). "resize-centre" resizes the shorter side, then cuts
the centre square; "resize" squeezes the whole frame; "face-128" and "centre-140" cut a box out of the aligned frame of
178x218 pixels, 128 around (89, 121) or 140 in the middle. Images of another size are taken to show the same frame, and
the box scales with them: in a copy at half size, 89x109, "face-128" is the 64x64 pixels from (12.5, 28.5), found by
interpolation, and "centre-140" 70x70 pixels: at size 64 hardly anything is shrunk, and faces are softer than from
178x218, where 128 pixels are averaged to 64.
"""
import contextlib
import difflib
import hashlib
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

from lib import data, imagecache, root, write_atomic
from lib.data import DataError, Dataset
from lib.imagecache import StaleError
from lib.train import interactive

CROPS = ("resize-centre", "face-128", "resize", "centre-140")
FRAME = (178, 218)                                              # width and height that the boxes are given in
BOXES = {"face-128": (25, 57, 153, 185), "centre-140": (19, 39, 159, 179)}          # left, upper, right, lower
TRAIN, TEST = range(1, 162_771), range(182_638, 202_600)        # CelebA's own partition; what is between: validation
DECODING = 1                                                    # to be raised when the same files give other pixels
CHUNK = 2 ** 24                                                 # bytes that are decoded, written and journalled at once
BLOCK = 16                                                      # images that a thread takes at once
LARGEST = 2 ** 26                                               # pixels of what is still taken for a photograph
KINDS = {"L": "it is grey", "1": "it is black and white", "P": "it has a palette", "RGBA": "it has transparency"}
SUFFIXES = (".jpg", ".jpeg", ".png")
OUTSIDE = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)")                 # absolute, with a drive, or with ".."
PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
BY_HAND = f"get img_align_celeba.zip (1.4 GB, for non-commercial research only, not downloaded from here) from {PAGE}"
UNREADABLE = (*data.UNREADABLE, SyntaxError, RuntimeError, zipfile.BadZipFile)      # a damaged image or archive's


@dataclass(frozen=True)
class Source:
    """Where the images are: a folder or a zip, and their names in it, in order."""
    path: Path
    names: tuple[str, ...]


def load(size: int = 64, crop: str = "resize") -> Dataset:
    """The faces, uint8 [N, 3, size, size] RGB, without labels (`train_labels`, `test_labels`: int64 [0]).

    Train and test are CelebA's own partition by file number where the files reach its test images (182638..202599; the
    validation images are left out); of a part of the set, the last tenth in name order is the test set. Both are views
    of one array, mapped into memory from the cache (copy on write), which takes N x 3 x size^2 bytes of disk and is
    checked whenever it is read. `source` says what was read. Decoding takes as many threads as torch does; if it is
    interrupted it goes on where it was.
    Raises DataError: no images or fewer than 2, one that is corrupt, too large or not RGB (a grey one is not made a
    colour one here), a damaged or odd zip, unknown crop, size below 1, the cache cannot be written.
    """
    if crop not in CROPS:
        near = difflib.get_close_matches(crop, CROPS, 1, 0)
        raise DataError(f"unknown crop {crop!r}: did you mean {near[0]!r}? Known are {', '.join(CROPS)}")
    if size < 1:
        raise DataError(f"image size must be at least 1 pixel, got {size}")
    source = find()
    if source is None:
        raise _missing()
    train, test = partition(source.names)
    names = train + test
    seen = _fingerprint(source)
    setting = {"sha256": _sha256(source, seen), "crop": crop, "size": size, "decoding": DECODING, "images": len(names)}
    key = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:12]
    images = torch.from_numpy(imagecache.cached(
        _folder() / f"{crop}-{size}-{key}.npy", (len(names), 3, size, size), setting, max(1, CHUNK // (3 * size ** 2)),
        lambda done: _decoding(source, seen, names, size, crop, done)))
    none = torch.empty(0, dtype=torch.int64)
    lacks = [f"{len(train):,} training images instead of {len(TRAIN):,}"] if len(train) != len(TRAIN) else []
    return Dataset("celeba", images[:len(train)], images[len(train):], none, none, (), setting["sha256"],
                   source=f"{len(source.names):,} images in {source.path.name}, {crop}", lacks=tuple(lacks))


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each of the images [B, ..., W] mirrored left to right with probability 1/2, drawn on the generator's device."""
    coin = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(coin.view(-1, *[1] * (images.ndim - 1)), images.flip(-1), images)


def cropped(image: Image.Image, crop: str, size: int) -> Image.Image:
    """The image cropped and resized to size x size in one of the CROPS."""
    width, height = image.size
    if crop == "resize-centre":
        short = min(width, height)
        image = image.resize((size * width // short, size * height // short), Image.Resampling.BILINEAR)
        left, upper = (round((side - size) / 2) for side in image.size)
        return image.crop((left, upper, left + size, upper + size))
    if crop == "resize":
        return image.resize((size, size), Image.Resampling.BILINEAR)
    left, upper, right, lower = (edge * image.size[i % 2] / FRAME[i % 2] for i, edge in enumerate(BOXES[crop]))
    x, y = int(left), int(upper)
    image = image.crop((x, y, math.ceil(right), math.ceil(lower)))             # the filter is to see nothing outside
    return image.resize((size, size), Image.Resampling.BILINEAR, (left - x, upper - y, right - x, lower - y))


# ------------------------------------------------------------------------------------------------ finding
def find() -> Source | None:
    """The folder or zip with most images, in the first of the data folders that has any; None if none has.

    Raises DataError: a zip that is damaged or names paths outside its folder, a folder that cannot be read.
    """
    for folder in data.folders():
        try:
            best = max(_sources(folder / "celeba"), key=lambda source: len(source.names), default=None)
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}") from None
        if best and best.names:
            return best
    return None


def _sources(top: Path) -> Iterator[Source]:
    """Zips before folders, so that of a zip and what was unpacked from it the zip is read."""
    if not top.is_dir():
        return
    folders = [top, *sorted(path for path in top.iterdir() if path.is_dir())]
    for folder in folders:
        yield from (Source(path, _of_zip(path)) for path in sorted(folder.glob("*.zip")))
    for folder in folders:
        with os.scandir(folder) as entries:
            yield Source(folder, _ordered(entry.name for entry in entries if entry.is_file()))


def _of_zip(path: Path) -> tuple[str, ...]:
    with _zip(path) as archive:
        names = archive.namelist()
    for name in names:
        if OUTSIDE.search(name):
            raise DataError(f"{path} names a path outside its folder ({name}): that is no archive to trust, delete it "
                            f"and {BY_HAND}")
    return _ordered(names)


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    """The names of images: by number where all have CelebA's numbers, else by name."""
    names = sorted(name for name in set(names) if name.lower().endswith(SUFFIXES) and not _stem(name).startswith("."))
    numbers = _numbers(names)
    return tuple(sorted(names, key=dict(zip(names, numbers, strict=True)).get) if numbers else names)


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0]


def _numbers(names: Iterable[str]) -> list[int]:
    """The images' numbers; none if any has no number of CelebA's, or two have the same."""
    stems = [_stem(name) for name in names]
    if not all(stem.isascii() and stem.isdigit() for stem in stems):
        return []
    numbers = [int(stem) for stem in stems]
    return numbers if len(set(numbers)) == len(numbers) and all(0 < n < TEST.stop for n in numbers) else []


def partition(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(train, test): see `load`. Raises DataError: fewer than two images."""
    numbers = _numbers(names)
    train, test = ([name for name, n in zip(names, numbers, strict=False) if n in part] for part in (TRAIN, TEST))
    if train and test:
        return train, test
    if len(names) < 2:
        raise DataError(f"celeba has {len(names)} image, and two at least are needed, to train and to test")
    held_out = max(1, len(names) // 10)
    return list(names[:-held_out]), list(names[-held_out:])


def _missing() -> DataError:
    places = [folder / "celeba" for folder in data.folders()]
    looked = ", ".join(f"{place} ({'has no image' if place.is_dir() else 'is not there'})" for place in places)
    return DataError(f"data set celeba is not here (looked for a folder or a zip of images in {looked}): {BY_HAND}, "
                     f"and put it, as it is or unpacked, into {places[0]}; "
                     "the embedded data set 'shapes' needs no file")


def by_hand() -> Path:
    """The folder or zip that has CelebA. Raises DataError: there is none; how to get it by hand."""
    source = find()
    if source is None:
        raise _missing()
    return source.path


def state() -> str:
    """Of `python -m lib data`: how many images are where, or what is wrong."""
    try:
        source = find()
    except DataError as error:
        return str(error)
    return f"{len(source.names):,} images in {source.path}" if source else "missing"


# ------------------------------------------------------------------------------------------------ reading
@contextlib.contextmanager
def _zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except UNREADABLE as error:
        raise DataError(f"{path} is cut short or not a zip ({error}): delete it and {BY_HAND}") from None
    with archive:
        yield archive


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[Callable[[str], bytes]]:
    """A function that gives the content of the image of a name; it may be called from several threads."""
    if path.is_dir():
        yield lambda name: (path / name).read_bytes()
    else:
        with _zip(path) as archive:
            yield archive.read


@contextlib.contextmanager
def _decoding(source: Source, seen: str, names: list[str], size: int, crop: str, done: int) -> Iterator[Callable]:
    """`imagecache.cached`'s making: decodes the images of the names, several threads at once."""
    with (_reader(source.path) as read, ThreadPoolExecutor(torch.get_num_threads()) as pool,
          _bar(None, "decoding", len(names), done) as bar):
        def make(start: int, stop: int) -> np.ndarray:
            images = np.empty((stop - start, 3, size, size), np.uint8)

            def fill(block: int) -> int:
                part = range(block, min(block + BLOCK, stop))
                for i in part:
                    images[i - start] = _pixels(source, read, names[i], size, crop)
                return len(part)

            for count in pool.map(fill, range(start, stop, BLOCK)):
                bar.update(count)
            return images

        yield make
    if _fingerprint(source) != seen:
        raise StaleError(f"{source.path} was changed while it was read: repeat when it is complete")


def _pixels(source: Source, read: Callable[[str], bytes], name: str, size: int, crop: str) -> np.ndarray:
    """uint8 [3, size, size] of one image. Raises DataError: it is corrupt, too large, not RGB."""
    where = f"{source.path}: the image {name}"
    try:
        with Image.open(io.BytesIO(read(name)), formats=("JPEG", "PNG")) as image:
            if image.width * image.height > LARGEST:
                raise Image.DecompressionBombError
            if image.mode != "RGB":
                raise DataError(f"{where} is not RGB ({KINDS.get(image.mode, image.mode)}): convert it or take it out")
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
        raise DataError(f"{where} is larger than any photograph: take it out") from None
    except UNREADABLE as error:
        why = "it is no JPEG or PNG image" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{where} is corrupt ({why}): get it again or take it out") from None
    return np.asarray(cropped(image, crop, size)).transpose(2, 0, 1)


# ------------------------------------------------------------------------------------------------ which source it is
def _sha256(source: Source, seen: str) -> str:
    """SHA-256 of a zip, or of the names and contents of a folder's images; remembered with the fingerprint `seen`."""
    memory = _folder() / "sources.json"
    try:
        known = json.loads(memory.read_text())
        if known[str(source.path)][0] == seen:
            return str(known[str(source.path)][1])
    except (OSError, ValueError, LookupError, TypeError):
        known = {}
    try:
        digest = _digest(source)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or source.path}: {error.strerror}") from None
    with contextlib.suppress(OSError):                          # it is then read again
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(memory, json.dumps(known | {str(source.path): [seen, digest]}, indent=1).encode())
    return digest


def _fingerprint(source: Source) -> str:
    """Changes with the names, sizes and times of the files."""
    files = [source.path / name for name in source.names] if source.path.is_dir() else [source.path]
    digest = hashlib.sha256()
    try:
        for file in files:
            stat = file.stat()
            digest.update(f"{file.name}\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\0".encode())
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None
    return digest.hexdigest()


def _digest(source: Source) -> str:
    if source.path.is_file():
        with open(source.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for name in _bar(source.names, "reading"):
        content = (source.path / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _folder() -> Path:
    return root() / "build" / "celeba"


def _bar(items: Iterable | None, what: str, total: int | None = None, done: int = 0) -> tqdm:
    return tqdm(items, desc=f"{what} celeba", total=total, initial=done, unit="image", leave=False,
                disable=not interactive())
