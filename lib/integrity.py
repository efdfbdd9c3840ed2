"""The recorded runs are what was recorded: the form of a results.json, and a checksum for every file.

lib/results.schema.json says what a results.json holds. book/results/SHA256SUMS has a line for every file there, and
book/smoke/SHA256SUMS for every file there; `sha256sum -c SHA256SUMS` in these folders checks them too.
`python -m lib record` renews the lines of what it records, `record --forget` removes a run and its lines.
"""
import contextlib
import fcntl
import functools
import glob
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from lib import runs, write_atomic

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


# ------------------------------------------------------------------------------------------------ the form
@functools.cache
def _validator():
    import fastjsonschema  # jsonschema takes a second to import, in every kernel that draws a table
    return fastjsonschema.compile(json.loads(Path(__file__).with_name("results.schema.json").read_text()))


def validate(record, path: Path) -> None:
    """Raise RunError, with the first fault, unless the record read from `path` is as lib/results.schema.json says."""
    from fastjsonschema import JsonSchemaValueException
    try:
        _validator()(record)
    except JsonSchemaValueException as error:
        where = error.name.removeprefix("data").removeprefix(".") or "it"
        said = f"{where} {error.message.removeprefix(error.name).strip()}"
        if error.rule == "required":
            said = f"{where} lacks {', '.join(sorted(set(error.rule_definition) - set(error.value)))}"
        raise runs.RunError(f"{path} is not a results.json of schema {runs.SCHEMA}: {said}") from None


# ------------------------------------------------------------------------------------------------ the checksums
def results() -> Path:
    """The folder of the recorded runs and benchmarks."""
    return runs.root() / "book" / "results"


def smoke() -> Path:
    """The folder of the recorded runs at smoke size."""
    return runs.root() / "book" / "smoke"


def check(folder: Path, part: str = "") -> None:
    """Compare every file below folder/part with its line in the folder's SHA256SUMS.

    Raises RunError, one sentence: the first file that differs, is missing or has no line, and what to do.
    """
    with _locked(folder, fcntl.LOCK_SH):
        listed = {name: digest for name, digest in lines(folder).items() if _within(name, part)}
        found = {name: _digest(folder / name) for name in _files(folder, part)}
    wrong = sorted(name for name in listed | found if listed.get(name) != found.get(name))
    if not wrong:
        return
    name, more = wrong[0], f" (and {len(wrong) - 1} more)" * (len(wrong) > 1)
    path, own = f"{_shown(folder)}/{name}", f"{_shown(folder)}/{SUMS}"
    if name not in found:
        said = (f"{path} is missing, but has a line in {own}{more}: `git checkout {path}` brings it back; if its run "
                f"was removed on purpose, `python -m lib record --forget {run_of(folder, name)}`")
    elif name not in listed:
        said = (f"{path} has no line in {own}{more}: record the run with `python -m lib record`, or delete the file")
    else:
        said = (f"{path} is not what was recorded, it differs from its line in {own}{more}: `git checkout {path}` "
                "brings the recorded file back, or record the run again")
    raise runs.RunError(said)


def digest(folder: Path | None = None) -> str:
    """Twelve digits that tell one state of the recorded files from another, by default of book/results."""
    return _digest((folder or results()) / SUMS)[:12]


def lines(folder: Path) -> dict[str, str]:
    """What the folder's SHA256SUMS says: file -> sha256. RunError if a line is not `<sha256>  <file>`."""
    try:
        text = (folder / SUMS).read_text()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise runs.RunError(f"{_shown(folder)}/{SUMS} cannot be read: {error}") from None
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = LINE.fullmatch(line)
        if not match or match[2] in found:
            raise runs.RunError(f"{_shown(folder)}/{SUMS}, line {number}: each file has one line `<sha256>  <file>`; "
                                f"`git checkout {_shown(folder)}/{SUMS}` brings back what was recorded")
        found[match[2]] = match[1]
    return found


def renew(folder: Path, part: str = "") -> None:
    """Write the lines of the files below folder/part anew, the others as they are; nothing ever reads half of them."""
    with _locked(folder, fcntl.LOCK_EX):
        _renew(folder, part)


@contextlib.contextmanager
def renewing(folder: Path, part: str):
    """While the body writes below folder/part no other process reads or renews the lines; then they are renewed.

    A body that fails, or a process that dies in it, leaves the lines as they were, and `check` says what to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, fcntl.LOCK_EX):
        yield folder / part
        _renew(folder, part)


def _renew(folder: Path, part: str) -> None:
    others = {name: digest for name, digest in lines(folder).items() if not _within(name, part)}
    found = others | {name: _digest(folder / name) for name in _files(folder, part)}
    text = "".join(f"{found[name]}  {name}\n" for name in sorted(found))
    write_atomic(folder / SUMS, text.encode())


def _files(folder: Path, part: str) -> list[str]:
    """Every file below folder/part, relative to the folder; hidden ones (half-written, an editor's) do not count."""
    top = folder / part
    paths = [top] if top.is_file() else glob.iglob("**", root_dir=top, recursive=True)         # also through links
    names = [path.relative_to(folder).as_posix() for path in (top / path for path in paths) if path.is_file()]
    return [name for name in names if name != SUMS and not any(word.startswith(".") for word in name.split("/"))]


def _within(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}/")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _shown(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


@contextlib.contextmanager
def _locked(folder: Path, kind: int):
    """Hold a lock on the folder itself, so that no file of its own is needed; a missing folder needs none."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield
        return
    try:
        with contextlib.suppress(OSError):                     # some network file systems have no locks
            fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------ names
def run_of(folder: Path, file: str) -> str:
    """The name of the recorded run that a file of the folder belongs to: gmm/paper, or gmm at smoke size."""
    return "/".join(file.split("/")[:1 if folder == smoke() else 2])


def known() -> dict[str, tuple[Path, str]]:
    """Name -> (folder, part) of all that is recorded: gmm (at smoke size), gmm/paper, benchmarks/x.json."""
    return {run_of(folder, file): (folder, run_of(folder, file)) for folder in (smoke(), results())
            for file in sorted({*lines(folder), *_files(folder, "")})}


def find(name: str) -> tuple[Path, str]:
    """(folder, part) of a recorded run by its name or path. RunError with the nearest name if there is none."""
    recorded = known()
    paths = {f"{_shown(folder)}/{part}": (folder, part) for folder, part in recorded.values()}
    short = name.rstrip("/").removesuffix("/results.json")
    if short not in recorded | paths:
        raise runs.RunError(f"no recorded run {name!r}{runs.nearest(short, recorded)}")
    return (recorded | paths)[short]


def forget(name: str) -> str:
    """Remove a recorded run, or what is left of it, and its lines; git keeps it. One line that says so; see `find`."""
    folder, part = find(name)
    with renewing(folder, part) as target:
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        if target.parent != folder and not any(target.parent.glob("*")):
            target.parent.rmdir()
    return f"removed {_shown(folder)}/{part}; git keeps what was committed"
