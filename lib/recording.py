"""`python -m lib record`: runs are checked, all of them, then copied into the book with their checksums.

    python -m lib record runs/gmm/paper 'runs/semantic-hashing/short*'
    python -m lib record runs/gmm/default              # at smoke size: into book/smoke, which `verify` runs again
    python -m lib record --forget gmm/paper            # remove a recorded run
"""
import glob
import os
import shutil
import subprocess
from pathlib import Path

from lib import integrity, runs, write_atomic


def record(folders: list[str], pictures: bool = True) -> list[str]:
    """Copy complete runs into the book: results.json and, if asked, pictures; one line for each that says where.

    folders: run folders or patterns of them. A run at the defaults, without a preset, goes to book/smoke (numbers
    only), any other to book/results. Nothing is copied unless all can be. Raises RunError, naming the first that
    cannot: one that is not complete or not as the schema says; with an error in its notebook; of uncommitted code or
    of a commit that this checkout does not have, its own or one that it starts from; that names a folder of this
    machine; that is recorded already with other numbers; two of one name.
    """
    paths = [path for word in folders for path in sorted(glob.glob(word)) or [word]]
    chosen, refused = {}, []
    for path in dict.fromkeys(map(Path, paths)):
        try:
            target, found = _checked(path, pictures)
            if target in chosen:
                raise runs.RunError(f"{path} and {chosen[target][0]} are both {found['experiment']}/{found['run']}")
            chosen[target] = (path, found)
        except runs.RunError as error:
            refused.append(str(error))
    if refused:
        raise runs.RunError(refused[0] + f" (and {len(refused) - 1} more; nothing is recorded)" * (len(refused) > 1))
    return [_copied(source, found, *target) for target, (source, found) in chosen.items()]


def _checked(source: Path, pictures: bool) -> tuple[tuple[Path, str], dict]:
    """((folder, part) in the book, what is to be recorded) of one run. RunError if it cannot be."""
    found = runs.read(source / "results.json")
    for one in [found, *found.get("chain", [])]:
        _check_code(source, one)
        for name, value in one["parameters"].items():
            if isinstance(value, str) and Path(value).is_absolute():
                raise runs.RunError(f"{source} names a folder of this machine ({name} of {one['experiment']}): give it "
                                    "from the checkout's top, then record")
    if hidden := set(runs.reduced(found["experiment"], found["parameters"])) - set(found["reduced"]):
        raise runs.RunError(f"{source} does not say that it is reduced ({', '.join(sorted(hidden))}): the preset "
                            "`paper` has changed since, or the record; run it with --again first")
    _check_notebook(source)
    smoke = not found["preset"] and found["run"] == "default"
    found["figures"] = found["figures"] if pictures and not smoke else []
    if absent := [name for name in found["figures"] if not (source / name).is_file()]:
        raise runs.RunError(f"{source} is not complete: {', '.join(absent)} is missing; run it with --again first")
    folder = integrity.smoke() if smoke else integrity.results()
    part = found["experiment"] if smoke else f"{found['experiment']}/{found['run']}"
    old = folder / part / "results.json"
    if old.is_file() and runs.read(old)["metrics"] != found["metrics"]:
        raise runs.RunError(f"{_shown(old.parent)} is recorded with other numbers: if it is to be replaced, "
                            f"`python -m lib record --forget {part}` first")
    return (folder, part), found


def _check_code(source: Path, one: dict) -> None:
    """RunError unless a run's code, and that of each part of its training, is a clean commit of this checkout's git."""
    for code in [one["git"], *one.get("made_by", [])]:
        if code["dirty"] or code["commit"] == "unknown":
            raise runs.RunError(f"{source} was made by uncommitted code ({one['experiment']}): commit, run again, then "
                                "record")
        words = ["git", "-C", str(runs.root()), "cat-file", "-e", f"{code['commit']}^{{commit}}"]
        try:
            known = subprocess.run(words, capture_output=True).returncode == 0
        except OSError as error:
            raise runs.RunError(f"git cannot say whether it has commit {code['commit']}: {error.strerror}") from None
        if not known:
            raise runs.RunError(f"{source} was made by commit {code['commit'][:10]} ({one['experiment']}), which this "
                                "checkout does not have: fetch it or run again, then record")


def _check_notebook(source: Path) -> None:
    """RunError if the executed notebook beside a run, where there is one, holds an error or a cell that did not run."""
    if not (source / "notebook.ipynb").is_file():              # of a replica, or run in JupyterLab
        return
    import nbformat

    from lib import report
    try:
        problems = report.gate(nbformat.read(source / "notebook.ipynb", as_version=4))
    except (OSError, ValueError, nbformat.ValidationError) as error:
        problems = [f"it is no notebook: {' '.join(str(error).split())[:100]}"]
    if problems:
        raise runs.RunError(f"{source}/notebook.ipynb: {problems[0]}; run it with --again, then record")


def _copied(source: Path, found: dict, folder: Path, part: str) -> str:
    """Copy one run, its results.json last, and renew its checksums; pictures that it no longer has are removed."""
    try:
        with integrity.renewing(folder, part) as target:
            target.mkdir(parents=True, exist_ok=True)
            for old in target.glob("*.png"):
                old.unlink()
            for name in found["figures"]:
                shutil.copyfile(source / name, target / name)
            write_atomic(target / "results.json", runs.as_text(found).encode())
    except OSError as error:
        raise runs.RunError(f"cannot write to {_shown(folder / part)}: {error.strerror or error}") from None
    return f"recorded {_shown(folder / part)}"


def _shown(folder: Path) -> str:
    return os.path.relpath(folder, runs.root())
