"""CelebA's aligned faces (Liu et al. 2015) as one uint8 array: a folder or a zip of them, decoded once, then cached.

    faces = data.load("celeba", size=64, crop="resize-centre")      # or celeba.load(64, "resize-centre")
Below each of the data folders ($VAEBOOK_DATA, then ./data) are looked at: celeba/img_align_celeba/ (as torchvision lays
it out), every other folder celeba/*/, celeba/ itself and the zips in them; the one with most images is read. An archive
is read member by member, nothing is extracted. The cache, build/celeba/, is keyed by the source's SHA-256, crop, size.

Crops: those of torchvision on PIL images (bilinear, antialiased). "resize-centre" resizes the shorter side, then cuts
the centre square; "resize" squeezes the whole frame; "face-128" and "centre-140" cut a box out of the aligned frame of
178x218 pixels, 128 around (89, 121) or 140 in the middle. Images of another size are taken to show the same frame, and
the box scales with them: in a copy at half size, 89x109, "face-128" is the 64x64 pixels from (12.5, 28.5), found by
interpolation, so that at 64 nothing is shrunk, and "centre-140" 70x70.
"""
import contextlib
import difflib
import fcntl
import hashlib
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from lib import data, root, write_atomic
from lib.data import DataError, Dataset
from lib.train import interactive

CROPS = ("resize-centre", "face-128", "resize", "centre-140")
FRAME = (178, 218)                                              # width and height that the boxes are given in
BOXES = {"face-128": (25, 57, 153, 185), "centre-140": (19, 39, 159, 179)}          # left, upper, right, lower
TRAIN, TEST = range(1, 162_771), range(182_638, 202_600)        # CelebA's own partition; what is between: validation
DECODING = 1                                                    # to be raised when the same files give other pixels
CHUNK = 2 ** 24                                                 # bytes that are decoded, written and journalled at once
LARGEST = 2 ** 26                                               # bytes of a file that is still taken for an image
SUFFIXES = (".jpg", ".jpeg", ".png")
PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
BY_HAND = (f"get img_align_celeba.zip (1.4 GB) from {PAGE}, for non-commercial research only, by hand: the book does "
           "not download it")
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
    of one array, mapped into memory from the cache (copy on write), which takes N x 3 x size^2 bytes of disk.
    Decoding takes as many threads as torch does; a decoding that was interrupted goes on where it was.
    Raises DataError: no images or fewer than 2, one that is corrupt, not RGB or too large, a damaged or odd zip,
    unknown crop, size below 1, the cache cannot be written.
    """
    if crop not in CROPS:
        near = difflib.get_close_matches(crop, CROPS, 1, 0)
        raise DataError(f"unknown crop {crop!r}: did you mean {near[0]!r}? Known are {', '.join(CROPS)}")
    if size < 1:
        raise DataError(f"image size must be at least 1 pixel, got {size}")
    source = find()
    if source is None:
        raise DataError(missing())
    train, test = partition(source.names)
    names = train + test
    setting = {"sha256": _sha256(source), "crop": crop, "size": size, "decoding": DECODING, "images": len(names),
               "chunk": max(1, CHUNK // (3 * size * size))}
    images = torch.from_numpy(_cached(source, names, setting))
    none = torch.empty(0, dtype=torch.int64)
    return Dataset("celeba", images[:len(train)], images[len(train):], none, none, (), setting["sha256"])


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
    x, y = int(left), int(upper)                                # the filter reads no pixel that is outside the box
    image = image.crop((x, y, -int(-right // 1), -int(-lower // 1)))
    return image.resize((size, size), Image.Resampling.BILINEAR, (left - x, upper - y, right - x, lower - y))


# ------------------------------------------------------------------------------------------------ finding
def find() -> Source | None:
    """The folder or zip with most images, in the first of the data folders that has any; None if none has."""
    for folder in data.folders():
        best = max(_sources(folder / "celeba"), key=lambda source: len(source.names), default=None)
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
        yield Source(folder, _ordered(entry.name for entry in os.scandir(folder)))


def _of_zip(path: Path) -> tuple[str, ...]:
    with _zip(path) as archive:
        members = archive.infolist()
    for member in members:
        parts = member.filename.replace("\\", "/").split("/")
        if ".." in parts or not parts[0] or ":" in parts[0]:
            raise DataError(f"{path} names a path outside its folder ({member.filename}): it is no archive of images, "
                            "delete it")
    return _ordered(member.filename for member in members)


def _ordered(names) -> tuple[str, ...]:
    """The names of images: by number where all have CelebA's numbers, else by name."""
    names = sorted(name for name in names if name.lower().endswith(SUFFIXES) and not _stem(name).startswith("."))
    numbers = _numbers(names)
    return tuple(sorted(names, key=dict(zip(names, numbers, strict=True)).get) if numbers else names)


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0]


def _numbers(names) -> list[int]:
    """The images' numbers; none if any has no number of CelebA's, or two have the same."""
    stems = [_stem(name) for name in names]
    if not all(re.fullmatch("[0-9]{1,6}", stem) for stem in stems):
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


def missing() -> str:
    """That there is no CelebA here, where it was looked for, and how to get it by hand."""
    places = [str(folder / "celeba") for folder in data.folders()]
    return (f"data set celeba is not here (no images, nor a zip of any, in {', '.join(places)}): {BY_HAND} and put it, "
            f"as it is or unpacked, into {places[0]}; the embedded data set 'shapes' needs no file")


def by_hand() -> Path:
    """The data folder that has CelebA. Raises DataError: there is none; it is not downloaded, but got by hand."""
    source = find()
    if source is None:
        raise DataError(missing())
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
        raise DataError(f"{path} is cut short or not a zip ({error}): get it again, from {PAGE}") from None
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


def _pixels(source: Source, read: Callable, name: str, setting: dict) -> np.ndarray:
    """uint8 [3, size, size] of one image."""
    where = f"{source.path}: the image {name}"
    try:
        with Image.open(io.BytesIO(read(name)), formats=("JPEG", "PNG")) as image:
            if image.mode != "RGB":
                raise DataError(f"{where} is not RGB but of mode {image.mode}: convert it, or take it out")
            return np.asarray(cropped(image, setting["crop"], setting["size"])).transpose(2, 0, 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{where} is larger than any photograph: take it out") from None
    except UNREADABLE as error:
        raise DataError(f"{where} is corrupt ({error}): get it again, or take it out") from None


def _sha256(source: Source) -> str:
    if source.path.is_dir():
        digest = hashlib.sha256()
        for name in source.names:
            content = (source.path / name).read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()
    with open(source.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ the cache
def _cached(source: Source, names: list[str], setting: dict) -> np.ndarray:
    """The array of the setting from the cache, decoded into it first if it is not there, whole and undamaged."""
    key = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:12]
    path = root() / "build" / "celeba" / f"{setting['crop']}-{setting['size']}-{key}.npy"
    if not _whole(path, setting):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)                # another process may be at it: wait, then look again
                if not _whole(path, setting):
                    _decode(source, names, setting, path)
        except OSError as error:
            need = setting["images"] * _bytes(setting) / 1e9
            raise DataError(f"cannot keep the decoded images in {path.parent} ({need:.1f} GB): {error.strerror}; free "
                            "space or make the folder writable, and repeat: it goes on where it was") from None
    return _mapped(path, setting)


def _bytes(setting: dict) -> int:
    return 3 * setting["size"] ** 2


def _shape(setting: dict) -> tuple[int, ...]:
    return setting["images"], 3, setting["size"], setting["size"]


def _header(setting: dict) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": _shape(setting)})
    return file.getvalue()


def _mapped(path: Path, setting: dict) -> np.ndarray:
    return np.memmap(path, np.uint8, "c", len(_header(setting)), _shape(setting))


def _whole(path: Path, setting: dict) -> bool:
    try:
        header = _header(setting)
        with open(path, "rb") as file:
            if file.read(len(header)) != header:
                return False
        return len(_sound(path, path, setting)) == -(-setting["images"] // setting["chunk"])
    except OSError:
        return False


def _sound(array: Path, path: Path, setting: dict) -> dict[str, str]:
    """The journal of the chunks, {first image: SHA-256}, without those that the file does not hold as it says."""
    try:
        journal = json.loads(path.with_suffix(".json").read_text())
        if journal["setting"] != setting:
            return {}
        images = _mapped(array, setting) if array.stat().st_size == len(_header(setting)) + (
            setting["images"] * _bytes(setting)) else None
        return {i: digest for i, digest in journal["chunks"].items()
                if hashlib.sha256(images[int(i):int(i) + setting["chunk"]]).hexdigest() == digest}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _decode(source: Source, names: list[str], setting: dict, path: Path) -> None:
    """Decode the images that are not yet in the cache, chunk by chunk; the cache gets its name when it is whole."""
    partial, journal = path.with_suffix(".partial"), path.with_suffix(".json")
    if path.exists():
        os.replace(path, partial)                               # damaged: what is sound of it is kept
    done = _sound(partial, path, setting)
    header, each = _header(setting), _bytes(setting)
    with open(partial, "r+b" if partial.exists() else "w+b") as file:
        _reserve(file, len(header) + len(names) * each)
        file.write(header)
        with _progress(setting, done) as bar:
            for start, pixels in _chunks(source, names, setting, done, bar):
                file.seek(len(header) + start * each)
                file.write(pixels)
                file.flush()
                os.fsync(file.fileno())
                done[str(start)] = hashlib.sha256(pixels).hexdigest()
                write_atomic(journal, json.dumps({"setting": setting, "chunks": done}).encode())
    os.replace(partial, path)


def _reserve(file, size: int) -> None:
    """Make the file that large, so that a disk that is too full is known before the work."""
    file.truncate(size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def _chunks(source: Source, names: list[str], setting: dict, done: dict, bar: tqdm) -> Iterator[tuple[int, np.ndarray]]:
    """(first image, uint8 [chunk, 3, size, size]) of the chunks that are not done."""
    def fill(i: int) -> int:
        for j, name in enumerate(part[i:i + 16], i):
            pixels[j] = _pixels(source, read, name, setting)
        return len(part[i:i + 16])

    with (_reader(source.path) as read, ThreadPoolExecutor(torch.get_num_threads()) as pool, warnings.catch_warnings()):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(names), setting["chunk"]):
            if str(start) not in done:
                part = names[start:start + setting["chunk"]]
                pixels = np.empty((len(part), *_shape(setting)[1:]), np.uint8)
                for count in pool.map(fill, range(0, len(part), 16)):
                    bar.update(count)
                yield start, pixels


def _progress(setting: dict, done: dict) -> tqdm:
    n = sum(min(setting["chunk"], setting["images"] - int(start)) for start in done)
    return tqdm(total=setting["images"], initial=n, desc="decoding celeba", unit="image", leave=False,
                disable=not interactive())
