"""Named data sets as tensors in memory. `python -m lib data` lists them.

Files are looked for in $VAEBOOK_DATA, then ./data of the checkout, then downloaded; every file is checked by SHA-256.
`digits`, `shapes` and `topics` need no file: they are the embedded defaults of the notebooks.
"""
import gzip
import hashlib
import io
import lzma
import os
import socket
import struct
import tarfile
import tempfile
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib import BookError, root
from lib.shapes import shapes

if TYPE_CHECKING:
    from lib.documents import Documents

DIGITS = tuple(str(i) for i in range(10))
GARMENTS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SHAPES = ("square", "disc", "triangle")


class DataError(BookError):
    """A data set is missing, corrupt or unknown; the message says what to do."""


@dataclass(frozen=True)
class Dataset:
    """Images uint8 [N, C, H, W] in 0..255, labels int64 [N]; `sha256` is of the source, before any resizing.

    `factors` (generated data only): {"train" | "test": {factor: float tensor [N]}}; `source` (celeba): what was read;
    `lacks`: what of the whole set it has not, in words, for a record's `reduced`.
    """
    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor
    label_names: tuple[str, ...]
    sha256: str
    factors: dict = field(default_factory=dict, repr=False)
    source: str = ""
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Where a data set comes from: `files` maps path below the data folder -> SHA-256 (empty: embedded).

    `instead`: files that serve as well as `files`, where they are there.
    """
    what: str
    licence: str
    how: str
    files: dict[str, str]
    size: str
    instead: dict[str, str] = field(default_factory=dict)


_IDX = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")


def _idx_files(folder: str, *digests: str) -> dict[str, str]:
    return {f"{folder}/raw/{name}": digest for name, digest in zip(_IDX, digests, strict=True)}


SOURCES = {
    "mnist": Source(
        "handwritten digits 28x28, 60,000 train + 10,000 test", "CC BY-SA 3.0", "python -m lib data --fetch mnist",
        _idx_files("MNIST", "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                   "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                   "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                   "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"), "12 MB"),
    "fashionmnist": Source(
        "garments 28x28, 60,000 train + 10,000 test", "MIT", "python -m lib data --fetch fashionmnist",
        _idx_files("FashionMNIST", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                   "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                   "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                   "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"), "31 MB"),
    "digits": Source(
        "handwritten digits 8x8 (scikit-learn), 1,437 train + 360 test", "CC BY 4.0", "embedded", {}, "in memory"),
    "shapes": Source(
        "generated 64x64 RGB scenes with known factors, 4,096 train + 512 test", "as the book", "embedded", {},
        "in memory"),
    "celeba": Source(
        "aligned faces, 178x218 RGB, 162,770 train + 19,962 test, or any part of them",
        "non-commercial research only", "by hand: `python -m lib data --fetch celeba` says how", {}, "1.4 GB"),
    "newsgroups": Source(
        "20 Newsgroups as word counts, 11,269 train + 7,505 test documents", "none stated",
        "python -m lib data --fetch newsgroups",
        {"20news/20news-bydate-matlab.tgz": "5381eae1ca6cf78b76a19c74f18a74b28b61811d379077930116f95cd515e192",
         "20news/vocabulary.txt": "3c0f0d64a814ba8836334a0f23925cef751fb3636baea55772f1f8ede4b791bc"}, "8 MB"),
    "topics": Source(
        "generated documents on eight known topics, 1,600 train + 400 test", "as the book", "embedded", {},
        "in memory"),
}
DOCUMENTS = ("newsgroups", "topics")                            # the others are images
TEXTS = {
    "newsgroups-texts": Source(
        "texts of newsgroups' documents", "none stated",
        "python -m lib data --fetch newsgroups-texts",
        {"20news/20news-bydate.tar.gz": "8f1b2514ca22a5ade8fbb9cfa5727df95fa587f4c87b786e15c759fa66d95610"}, "14 MB",
        {"20news/20news-bydate.tar.xz": "8c7055d7d61c133ccb47904f337307e35d12c8b5da3d92ae3c1cdc85eda5556b"}),
}
BINARY = {"mnist-static": Source(
    "MNIST's images binarised once (Larochelle & Murray)", "none stated", "python -m lib data --fetch mnist-static",
    {"MNIST_static/binarized_mnist_train.amat": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
     "MNIST_static/binarized_mnist_valid.amat": "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
     "MNIST_static/binarized_mnist_test.amat": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"},
    "110 MB")}                                                  # lib/binarised.py reads it
WEIGHTS = {
    "inception": Source(
        "weights of the FID's Inception network (pytorch-fid)", "Apache 2.0", "python -m lib data --fetch inception",
        {"pt_inception-2015-12-05-6726825d.pth": "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"},
        "96 MB"),
}
# An archive that is packed in more than one way (other dates and owners): its SHA-256 -> members that matter, theirs.
PACKED = {SOURCES["newsgroups"].files["20news/20news-bydate-matlab.tgz"]: (
    [f"20news-bydate/matlab/{part}" for part in ("train.data", "train.label", "test.data", "test.label")],
    "862eb5a0ab6fea15cdf56b55b29ba8b14ce128ad4a46b8fe65ff36fe7c655ba9")}
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, struct.error, ValueError, LookupError,
              AttributeError)                                   # what reading a damaged archive or file may raise


def load(name: str, size: int | None = None, crop: str = "") -> "Dataset | Documents":
    """The data set `name` (a key of SOURCES), images resized to size x size (bilinear, antialiased) if given.

    crop: of celeba only, one of `celeba.CROPS` (default "resize"); its size is 64 if not given.
    Raises DataError: unknown name, file missing and not downloadable, or corrupt, a size for documents, a crop of
    another data set, `celeba.load`'s errors.
    """
    _known(name, SOURCES)
    if name == "celeba":
        return _celeba().load(64 if size is None else size, crop or "resize")
    if crop:
        raise DataError(f"{name} has no crops, got {crop!r}: leave the crop empty, or choose celeba")
    if size is not None and name in DOCUMENTS:
        images = [known for known in SOURCES if known not in DOCUMENTS]
        raise DataError(f"{name} has documents, not images: choose one of {', '.join(images)}")
    if size is not None and size < 1:
        raise DataError(f"image size must be at least 1 pixel, got {size}")
    data = _load(name)
    if size is None or size == data.train.shape[-1]:
        return data
    return Dataset(**{**vars(data), "train": resize(data.train, size), "test": resize(data.test, size)})


def _celeba():
    from lib import celeba
    return celeba


def _known(name: str, names) -> None:
    if name not in names:
        raise DataError(f"unknown data set {name!r}: known are {', '.join(names)}")


def _source(name: str) -> Source:
    return (SOURCES | TEXTS | BINARY | WEIGHTS)[name]


@lru_cache(maxsize=2)
def _load(name: str) -> "Dataset | Documents":
    if name in DOCUMENTS:
        from lib import documents
        return {"newsgroups": documents.newsgroups, "topics": documents.topics}[name]()
    return {"digits": _digits, "shapes": _shapes}[name]() if name in ("digits", "shapes") else _mnist_like(name)


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 [N, C, H, W] -> uint8 [N, C, size, size], bilinear with antialiasing, in chunks."""
    parts = (F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True) for part in images.split(4096))
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


# ------------------------------------------------------------------------------------------------ files
def folders() -> list[Path]:
    """Where files are looked for, in order: $VAEBOOK_DATA (if set), then data/; relative to the checkout."""
    named = os.environ.get("VAEBOOK_DATA")
    return ([root() / Path(named).expanduser()] if named else []) + [root() / "data"]


def _places(name: str) -> list[Path]:
    return folders() + ([Path(torch.hub.get_dir()) / "checkpoints"] if name in WEIGHTS else [])


def find(name: str) -> Path | None:
    """The first folder that holds all files of `name`; None if there is none (or nothing to hold).

    Weights are also looked for in torch's hub cache. Of celeba it is the folder or the zip that has the images.
    """
    if name == "celeba":
        return source.path if (source := _celeba().find()) else None
    return next((folder for folder in _places(name) if held(name, folder)), None)


def held(name: str, folder: Path) -> dict[str, str]:
    """Files of `name` -> SHA-256, if the folder has all of them, or of those that serve instead; else none."""
    either = (_source(name).files, _source(name).instead)
    return next((files for files in either if files and all((folder / file).is_file() for file in files)), {})


def read_checked(name: str, folder: Path, file: str) -> bytes:
    """The bytes of one file of `name`; DataError if it cannot be read or its SHA-256 is another one."""
    expected = (_source(name).files | _source(name).instead)[file]
    try:
        content = (folder / file).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {folder / file}: {error.strerror}; {instead(name)}") from None
    if not _is(content, expected):
        found = hashlib.sha256(content).hexdigest()
        raise DataError(f"{folder / file} is corrupt (SHA-256 {found[:12]}…, expected {expected[:12]}…): "
                        f"delete it, then `{_source(name).how}`; {instead(name)}")
    return content


def _is(content: bytes, sha256: str) -> bool:
    """Whether the content has this SHA-256, or is another packing of the archive that has it."""
    if hashlib.sha256(content).hexdigest() == sha256:
        return True
    if sha256 not in PACKED:
        return False
    members, expected = PACKED[sha256]
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            parts = [tar.extractfile(member).read() for member in members]
    except UNREADABLE:
        return False
    return hashlib.sha256(b"".join(parts)).hexdigest() == expected


def fetch(name: str) -> Path | None:
    """Download a data set, its texts or weights into the first data folder, checked.

    Returns the folder, None if no file is needed. Raises DataError: unknown name, no network, a folder that cannot be
    written, a file there already that is corrupt.
    """
    _known(name, SOURCES | TEXTS | BINARY | WEIGHTS)
    if name == "celeba":
        return _celeba().by_hand()
    if not _source(name).files:
        return None
    folder = find(name) or folders()[0]
    for file, sha256 in (held(name, folder) or _source(name).files).items():
        if (folder / file).is_file():
            read_checked(name, folder, file)
            continue
        try:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            _download(_mirrors(name), folder / file, sha256)
        except (OSError, RuntimeError, HTTPException) as error:
            raise DataError(_missing(name, error)) from None
    return folder


def _mirrors(name: str) -> list[str]:
    if name in WEIGHTS:
        from pytorch_fid.inception import FID_WEIGHTS_URL
        return [FID_WEIGHTS_URL.rpartition("/")[0] + "/"]
    if name in ("newsgroups", "newsgroups-texts"):
        return ["http://qwone.com/~jason/20Newsgroups/", "https://people.csail.mit.edu/jrennie/20Newsgroups/"]
    if name in BINARY:
        return ["http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"]
    from torchvision import datasets  # slow to import: only when something is to be downloaded

    return {"mnist": datasets.MNIST, "fashionmnist": datasets.FashionMNIST}[name].mirrors


def _download(mirrors: list[str], target: Path, sha256: str) -> None:
    """Get one file from the first mirror that has the right one; the last mirror's error if none has."""
    from torchvision.datasets.utils import download_url

    socket.setdefaulttimeout(30)
    failure = None
    for mirror in mirrors:
        with tempfile.TemporaryDirectory(dir=target.parent) as part:       # same file system: the rename is atomic
            try:
                download_url(mirror + target.name, part, target.name)
                if not _is(Path(part, target.name).read_bytes(), sha256):
                    raise OSError(f"{mirror} gave another file, by its SHA-256")
                os.replace(Path(part, target.name), target)
                return
            except (OSError, RuntimeError, HTTPException) as error:
                failure = error
    raise failure


def _missing(name: str, error: Exception) -> str:
    files = _source(name).files
    absent = [next(folder / file for file in files if not (folder / file).is_file()) for folder in _places(name)]
    what = f"data set {name} is" if name in SOURCES | BINARY else f"{_source(name).what} are"
    return (f"{what} not here (looked for {', '.join(map(str, absent))}) and could not be downloaded "
            f"({error}): run `{_source(name).how}` with a network, or set VAEBOOK_DATA to a folder that has it; "
            f"{instead(name)}")


def instead(name: str) -> str:
    """What there is for somebody who has not the files of `name`, as the end of a sentence."""
    if name in WEIGHTS:
        return "the classifier Frechet distance (CFD) needs no file and is used instead of the FID"
    if name in TEXTS:
        return "without it, documents are shown as their words and counts"
    if name in BINARY:
        return "without it, MNIST is binarised here, by a fixed seed"
    embedded = {"celeba": "shapes", "newsgroups": "topics"}.get(name, "digits")
    return f"the embedded data set {embedded!r} needs no file"


def _read_idx(name: str, folder: Path, file: str) -> Tensor:
    """A gzipped IDX file of unsigned bytes -> uint8 tensor."""
    content = read_checked(name, folder, file)
    try:
        raw = gzip.decompress(content)
        dims = struct.unpack(f">{raw[3]}I", raw[4:4 + 4 * raw[3]])
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * len(dims)).reshape(dims).copy())
    except UNREADABLE as error:
        raise DataError(f"{folder / file} cannot be read as an IDX file ({error}); {instead(name)}") from None


def _mnist_like(name: str) -> Dataset:
    folder = find(name) or fetch(name)
    x, y, x_test, y_test = (_read_idx(name, folder, file) for file in SOURCES[name].files)
    names = DIGITS if name == "mnist" else GARMENTS
    return Dataset(name, x[:, None], x_test[:, None], y.long(), y_test.long(), names, digest_of_files(name))


def digest_of_files(name: str) -> str:
    """SHA-256 of the SHA-256 of the files of a data set, in order."""
    return hashlib.sha256("".join(SOURCES[name].files.values()).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ embedded
def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * 255 / 16).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    return Dataset("digits", images[train], images[test], labels[train], labels[test], DIGITS, _digest(images))


def _shapes() -> Dataset:
    (x, train), (x_test, test) = shapes(4096, seed=0), shapes(512, seed=1)
    labels, test_labels = train["shape"].long(), test["shape"].long()
    return Dataset("shapes", x, x_test, labels, test_labels, SHAPES, _digest(torch.cat([x, x_test])),
                   {"train": train, "test": test})


def _digest(images: Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def listing() -> list[dict[str, str]]:
    """For `python -m lib data`, a row per data set, texts and weights: what, where, size, checksum, licence, ..."""
    rows = []
    for name, source in (SOURCES | TEXTS | BINARY | WEIGHTS).items():
        folder = find(name) if name != "celeba" else None
        state = "embedded" if not source.files else "missing"
        if folder:
            try:
                for file in held(name, folder):
                    read_checked(name, folder, file)
                state = f"present in {folder}"
            except DataError as error:
                state = str(error)
        state = _celeba().state() if name == "celeba" else state
        sums = [f"{digest}  {file}" for file, digest in (source.files | source.instead).items()]
        sums = sums or ["of its content, in each results.json"]
        rows.append({"name": name, "what": source.what, "state": state, "size": source.size, "sha256": "\n".join(sums),
                     "licence": source.licence, "get it": source.how})
    return rows
