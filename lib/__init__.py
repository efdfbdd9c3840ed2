"""The book's one package: models, training loops, evaluation, runs. See `python -m lib --help`."""
import os
from pathlib import Path


class BookError(Exception):
    """Something foreseen went wrong; the message is one line that says what, and what to do."""


def root() -> Path:
    """Top folder of the checkout; every path of the project starts here, whatever the caller's folder is."""
    return Path(__file__).resolve().parent.parent


def read_yaml(path: Path, error: type[BookError]):
    """What a YAML file holds; raises `error`, which names the file, if it cannot be read."""
    import yaml
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as why:
        raise error(f"{path.name} cannot be read: {' '.join(str(why).split())}") from None


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader, a crash or a full disk never leaves half of it: write, fsync, rename.

    Raises OSError when the disk is full or the folder cannot be written; an older file of that name then stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
