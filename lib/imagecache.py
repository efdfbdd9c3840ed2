"""A large uint8 array that is made once, chunk by chunk, and kept in a file, from where it is mapped into memory.

    images = imagecache.cached(path, shape, setting, chunk, making)
Three files: NAME.npy, the array; NAME.json, its setting and the SHA-256 of every chunk that is in it, written after the
chunk has reached the disk; NAME.lock, held while the array is made. As long as chunks are missing the array is called
NAME.partial. Whoever was interrupted, or finds a file that is damaged, makes only the chunks that are not sound.
"""
import errno
import fcntl
import hashlib
import io
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from lib import write_atomic
from lib.data import DataError


class StaleError(DataError):
    """What has been made so far is of no use, for what it was made from has changed: `cached` forgets it."""


def cached(path: Path, shape: tuple[int, ...], setting: dict, chunk: int,
           making: Callable[[int], AbstractContextManager[Callable[[int, int], np.ndarray]]]) -> np.ndarray:
    """The array of the shape from the file NAME.npy, mapped copy on write; made first if it is not there, whole.

    setting: what the array is, JSON-able; a file of another one is not used. chunk: images [shape[0]] made at once.
    making(done): a context that gives `make(start, stop)`, the images start..stop-1; `done` images are there already.
    Other processes that want the same array wait for the one that makes it. Raises DataError: the files cannot be
    written (the space is reserved before anything is made); whatever making raises.
    """
    array = _Array(path, shape, json.loads(json.dumps(setting | {"chunk": chunk})), chunk)
    try:
        if (images := array.whole()) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)                # another process may have made it meanwhile
                if (images := array.whole()) is None:
                    array.make(making)
                    images = array.mapped(path)
    except OSError as error:
        size = f"{math.prod(shape) / 1e6:.1f} MB"
        raise DataError(f"cannot keep {path.name} ({size}) in {path.parent}: {error.strerror}; free space or make "
                        "it writable, then repeat: it goes on where it was") from None
    return images


class _Array:
    def __init__(self, path: Path, shape: tuple[int, ...], setting: dict, chunk: int):
        self.path, self.shape, self.setting, self.chunk = path, shape, setting, chunk
        self.journal, self.partial = path.with_suffix(".json"), path.with_suffix(".partial")
        self.starts = range(0, shape[0], chunk)
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        self.header = file.getvalue()
        self.bytes = len(self.header) + math.prod(shape)

    def mapped(self, path: Path) -> np.ndarray:
        """The array that the file holds. Raises OSError, ValueError: it is not there, not as long as that."""
        if path.stat().st_size != self.bytes:
            raise ValueError(f"{path.name} is cut short")
        return np.memmap(path, np.uint8, "c", len(self.header), self.shape)

    def whole(self) -> np.ndarray | None:
        """The array, if all of it is there and undamaged."""
        try:
            images = self.mapped(self.path)
            with open(self.path, "rb") as file:
                whole = file.read(len(self.header)) == self.header and len(self.sound(images)) == len(self.starts)
        except (OSError, ValueError):
            return None
        return images if whole else None

    def sound(self, images: np.ndarray) -> dict[str, str]:
        """{first image: SHA-256} of the chunks that were written and still are what they were."""
        try:
            journal = json.loads(self.journal.read_text())
            listed = journal["chunks"] if journal["setting"] == self.setting else {}
            starts = [start for start in self.starts if str(start) in listed]
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                digests = pool.map(lambda start: _sha256(images[start:start + self.chunk]), starts)
                found = {str(start): digest for start, digest in zip(starts, digests, strict=True)}
            return {start: digest for start, digest in found.items() if listed[start] == digest}
        except (OSError, ValueError, LookupError, TypeError):
            return {}

    def make(self, making: Callable) -> None:
        """Make what is missing and give the file its name."""
        if self.path.exists():
            os.replace(self.path, self.partial)                 # damaged
        done = self.reserve()
        there = sum(min(self.chunk, self.shape[0] - int(start)) for start in done)
        try:
            with open(self.partial, "r+b") as file, making(there) as make:
                for start in self.starts:
                    if str(start) not in done:
                        images = make(start, min(start + self.chunk, self.shape[0]))
                        file.seek(len(self.header) + start * math.prod(self.shape[1:]))
                        file.write(images)
                        file.flush()
                        os.fsync(file.fileno())
                        done[str(start)] = _sha256(images)
                        write_atomic(self.journal, json.dumps({"setting": self.setting, "chunks": done}).encode())
        except StaleError:
            self.partial.unlink()
            raise
        os.replace(self.partial, self.path)

    def reserve(self) -> dict[str, str]:
        """Give the partial file its header and full length on the disk; returns `sound` of it."""
        try:
            done = self.sound(self.mapped(self.partial))
        except (OSError, ValueError):
            done = {}
        try:
            with open(self.partial, "r+b" if done else "wb") as file:
                file.write(self.header)
                file.truncate(self.bytes)
                _allocate(file.fileno(), self.bytes)
        except OSError:
            if not done:
                self.partial.unlink(missing_ok=True)
            raise
        return done


def _allocate(file: int, size: int) -> None:
    """Take the space on the disk, where system and file system know how to."""
    try:
        if hasattr(os, "posix_fallocate"):                      # not on macOS
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _sha256(images: np.ndarray) -> str:
    return hashlib.sha256(images).hexdigest()
