"""Images of 0 and 255 for the likelihoods of Tomczak & Welling 2018, split and binarised as the paper's code does it.

    images = binarised.load("mnist", "dynamic")
    x = binarised.draw(images.train[:100], noise)            # [100, 1, 28, 28] of 0.0 and 1.0, other ones at each call

dynamic: the training images stay grey, every batch draws its own x ~ Bernoulli(grey / 255); valid and test are drawn
once. static: all are drawn once, or read from the published file if MNIST_static/binarized_mnist_*.amat is there.
"""
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib import data
from lib.data import DataError

BINARISATIONS = ("dynamic", "static")
GREY = ("mnist", "fashionmnist", "digits")
SIDE = 28
SEED = 777                                                   # of the paper's code
FILE = "mnist-static"
LENGTHS = (50_000, 10_000, 10_000)                           # images of its train, valid and test
KIND = np.full(256, 2, np.uint8)                             # of a byte: 0 white space, 1 a number, 2 anything else
KIND[list(b" \t\n\r\v\f")], KIND[list(b"01")] = 0, 1


@dataclass(frozen=True)
class Binarised:
    """Images uint8 [N, 1, 28, 28] of 0 and 255 (dynamic: train is grey); labels int64 [N], None: the file has none.

    source: a sentence that says where the binary images come from. sha256: of the data set's, how it was binarised and
    the seed; of the file's three and "static" where the file was read.
    """
    name: str
    binarisation: str
    train: Tensor
    valid: Tensor
    test: Tensor
    test_labels: Tensor | None
    label_names: tuple[str, ...]
    sha256: str
    source: str


def load(dataset: str, binarisation: str, seed: int = SEED) -> Binarised:
    """Binary images of a data set of GREY; binarisation: of BINARISATIONS; seed: of the draws, unused with the file.

    The last sixth of the training images is for validation: MNIST's last 10,000. Raises DataError: no such
    binarisation, no grey images of that name, `data.load`'s errors, a file that is incomplete or is not what it should
    be; ValueError: a seed outside 0 .. 2^32 - 1.
    """
    if binarisation not in BINARISATIONS:
        raise DataError(f"unknown binarisation {binarisation!r}: use {' or '.join(BINARISATIONS)}")
    if dataset not in GREY:
        raise DataError(f"there are no binary images of {dataset!r}: choose one of {', '.join(GREY)}")
    folder = _folder() if (dataset, binarisation) == ("mnist", "static") else None
    return _read(folder) if folder else _drawn(dataset, binarisation, seed)


def draw(batch: Tensor, generator: torch.Generator) -> Tensor:
    """x ~ Bernoulli(grey / 255) of a batch uint8 [B, 1, S, S]: float32 of 0 and 1. Binary images stay what they are.

    For the training step, whatever the binarisation: drawn on the batch's device, which is the generator's.
    """
    return torch.bernoulli(batch / 255, generator=generator)


# ------------------------------------------------------------------------------------------------ drawn here
def _drawn(dataset: str, binarisation: str, seed: int) -> Binarised:
    """Draws valid, then test, as the paper's code does; static's train comes last, so it keeps dynamic's test set."""
    grey = data.load(dataset, size=SIDE)
    n, rng = len(grey.train) - len(grey.train) // 6, np.random.RandomState(seed)
    train, valid = grey.train[:n], once(grey.train[n:], rng)
    test = once(grey.test, rng)
    told = f"drawn once, Bernoulli(grey/255) by NumPy's RandomState({seed})"
    if binarisation == "static":
        train = once(train, rng)
        told = f"all images {told}, which is not the published file" if dataset == "mnist" else f"all images {told}"
    else:
        told = f"training images drawn afresh in every batch, validation and test images {told}"
        told += ", the same as the paper's code draws" if (dataset, seed) == ("mnist", SEED) else ""
    return Binarised(dataset, binarisation, train, valid, test, grey.test_labels, grey.label_names,
                     _digest(grey.sha256, binarisation, f"seed {seed}"), told)


def once(grey: Tensor, rng: np.random.RandomState) -> Tensor:
    """Images of 0 and 255 drawn for grey ones, uint8 [N, 1, S, S], from NumPy's legacy stream, image after image.

    The paper's code: binomial(1, x) of x = grey / 255 in float32. NumPy guarantees that this stream stays the one of
    its version 1.16. The stream goes on from chunk to chunk, so their size changes nothing.
    """
    parts = [rng.binomial(1, part.float().numpy() / 255).astype(np.uint8) for part in grey.split(2000)]
    return torch.from_numpy(np.concatenate(parts)) * 255


def _digest(*told: str) -> str:
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ the published file
def _folder() -> Path | None:
    """The first data folder with all parts of the file, None if there are none; DataError if there are only some."""
    files, how = data.BINARY[FILE].files, data.BINARY[FILE].how
    if folder := data.find(FILE):
        return folder
    for folder in data.folders():
        missing = [file for file in files if not (folder / file).is_file()]
        if len(missing) < len(files):
            raise DataError(f"{folder / missing[0]} is missing but other parts of the static file are there: get it by "
                            f"`{how}`, or remove the others to have MNIST binarised here")
    return None


def _read(folder: Path) -> Binarised:
    """The images of the file in the data folder; it is told whether they are the published ones, by the SHA-256."""
    files = data.BINARY[FILE].files
    parts = [read_amat(folder / file, n) for file, n in zip(files, LENGTHS, strict=True)]
    images, digests = zip(*parts, strict=True)
    published = digests == tuple(files.values())
    told = ("read from the published file (Larochelle & Murray), by its SHA-256" if published else
            "read from a file with the layout of the published one, which by its SHA-256 it is not")
    return Binarised("mnist", "static", *images, None, data.DIGITS, _digest(*digests, "static"), told)


def read_amat(path: Path, n: int) -> tuple[Tensor, str]:
    """A text file of n lines with 784 numbers 0 or 1 each -> uint8 [n, 1, 28, 28] of 0 and 255, SHA-256 of the file.

    Raises DataError naming the file, and the line where one is wrong.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {data.instead(FILE)}") from None
    again = f"delete it, then `{data.BINARY[FILE].how}`"
    raw = np.frombuffer(content.rstrip() + b"\n", np.uint8)
    kind = KIND[raw]
    wrong = kind > 1
    wrong[1:] |= (kind[1:] & kind[:-1]) > 0                   # two digits in a row, such as 10
    if wrong.any():
        line = 1 + int((raw[:wrong.argmax()] == ord("\n")).sum())
        words = content.split(b"\n", line)[line - 1].split()
        word = next(word for word in words if word not in (b"0", b"1"))[:12].decode("latin-1")
        raise DataError(f"{path}, line {line}: {word!a} where 0 or 1 is expected; {again}")
    ends = np.flatnonzero(raw == ord("\n"))
    counts = np.add.reduceat(kind, np.concatenate([[0], ends[:-1] + 1]), dtype=np.int64)
    if (counts != SIDE ** 2).any():
        line = int((counts != SIDE ** 2).argmax())
        raise DataError(f"{path}, line {line + 1}: {counts[line]} numbers where {SIDE ** 2} are expected; {again}")
    if len(counts) != n:
        raise DataError(f"{path} has {len(counts):,} lines where {n:,} are expected, one for each image; {again}")
    pixels = torch.from_numpy(raw[kind == 1] - ord("0")) * 255
    return pixels.view(n, 1, SIDE, SIDE), hashlib.sha256(content).hexdigest()
