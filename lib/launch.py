"""`python -m lib run` and `record`: papermill with checked parameters, a time limit, one retry, resume."""
import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from lib import replicas, root, runs, write_atomic
from lib.execute import ExecutionError, TimeLimitError, execute


def describe() -> str:
    """Every notebook with its parameters (type, default, help) and presets, as text."""
    lines = []
    for name in runs.notebooks():
        lines.append(name)
        lines += [f"  {p.name}: {p.type} = {p.default!r}" + (f"  # {p.help}" if p.help else "")
                  for p in runs.parameters(name).values()]
        lines += [f"  preset {preset}: " + ", ".join(f"{k}={v}" for k, v in values.items())
                  for preset, values in runs.presets(name).items()]
    return "\n".join(lines)


def run(experiment: str, preset: str, changes: dict, out: str | None = None, timeout: float = 6 * 3600,
        threads: int | None = None, again: bool = False) -> str:
    """Execute a notebook into its run folder and return one line that says what there is now, or one for each replica.

    The folder's results.json is written last, so it tells a complete run; such a run is not repeated unless `again`.
    An interrupted one resumes from its checkpoint. With the parameter `replicas` the first of the seeds that is not
    complete is executed and adds the others. Raises RunError for every foreseen failure.
    """
    if not timeout > 0 or (threads is not None and threads < 1):
        raise runs.RunError(f"--timeout and --threads must be positive, got {timeout:g} and {threads}")
    values = _values(experiment, preset, changes)
    folder = Path(out).resolve() if out else root() / "runs" / experiment / runs.name_of(experiment, preset, values)
    seeds = replicas.seeds(experiment, preset, values, folder)
    with contextlib.ExitStack() as locks:
        for _, folder in seeds:
            runs.make_folder(folder)
            locks.enter_context(_lock(folder))
        left = [one for one in seeds if again or not replicas.complete(one[1], experiment, one[0])]
        if left:
            _run(experiment, preset, left, len(seeds) - seeds.index(left[0]), timeout, threads, again)
        return "\n".join(_said(one[1], one in left) for one in seeds)


def _run(experiment: str, preset: str, left: list[tuple[dict, Path]], n: int, timeout: float, threads: int | None,
         again: bool) -> None:
    """Execute the notebook for the first of the runs `left` (parameters, folder), which adds those up to n seeds on."""
    values, main = left[0]
    values = values | ({"replicas": n} if "replicas" in values else {})
    for _, folder in left:
        stale = [folder / "results.json.pending", *folder.glob("**/.*.partial")]
        for file in [*stale, *([folder / "results.json", *folder.glob("**/*.safetensors")] if again else [])]:
            file.unlink(missing_ok=True)
    if "resume" in values and not values["resume"]:
        values["resume"] = "auto"
    environment = {"VAEBOOK_RUN": str(main), "VAEBOOK_PRESET": preset}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    _execute(experiment, values, main, timeout, environment)
    for file in [main / "results.json.pending", *(folder / "results.json" for _, folder in left[1:])]:
        if not file.is_file():
            raise runs.RunError(f"{experiment} ended without run.save(): no result in {_shown(file.parent)}")
    os.replace(main / "results.json.pending", main / "results.json")


def _said(folder: Path, fresh: bool) -> str:
    """One line about a complete run, which this call has made if `fresh`."""
    found = runs.read(folder / "results.json")
    if not fresh:
        return f"{_shown(folder)} is complete ({found['date']}); --again repeats it"
    metrics = ", ".join(f"{key} {metric['value']:.4g} {metric['unit']}" for key, metric in found["metrics"].items())
    return f"{_shown(folder)}: {metrics} ({found['wall_time_s']} s)"


def _values(experiment: str, preset: str, changes: dict) -> dict:
    runs.notebook_path(experiment)                         # first: an unknown notebook is the clearer complaint
    known = runs.presets(experiment)
    if preset and preset not in known:
        raise runs.RunError(f"{experiment} has no preset {preset!r}{runs.nearest(preset, known)}")
    return runs.check(experiment, known.get(preset, {}) | changes)


def _execute(experiment: str, values: dict, folder: Path, timeout: float, environment: dict) -> None:
    """Run the notebook into the folder. RunError with the notebook's own complaint, or why it could not be run."""
    from papermill import PapermillExecutionError

    def prefer_own_checkpoint():                               # it is further than the one the run began with
        if (folder / "latest.safetensors").is_file() and "resume" in values:
            values["resume"] = "auto"
    try:
        execute(runs.notebook_path(experiment), folder / "notebook.ipynb", values, timeout, environment,
                prefer_own_checkpoint)
    except PapermillExecutionError as error:
        raise runs.RunError(_complaint(experiment, error, folder)) from None
    except TimeLimitError:
        then = "goes on from the last checkpoint" if "resume" in values else "starts it again"
        raise runs.RunError(f"{experiment} reached the time limit of {timeout:g} s: the same command {then}, --timeout "
                            "raises the limit") from None
    except ExecutionError as error:
        raise runs.RunError(f"{experiment} in {_shown(folder)}: {error}") from None


def _complaint(experiment: str, error, folder: Path) -> str:
    """One line from a papermill error: the message alone if it is one of this book's, else also where it came from."""
    line = (str(error.evalue).splitlines() or [""])[0]
    if error.ename in ("BookError", "RunError", "DataError", "TrainError", "SearchError"):
        return f"{experiment}: {line}"
    where = _shown(folder / "notebook.ipynb")
    return f"{experiment} stopped in cell [{error.exec_count}] with {error.ename}: {line} (see {where})"


@contextlib.contextmanager
def _lock(folder: Path):
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise runs.RunError(f"another process runs in {_shown(folder)}: wait for it or choose --out") from None
        yield


def _shown(folder: Path) -> str:
    return os.path.relpath(folder, root()) if folder.is_relative_to(root()) else str(folder)


def record(folder: str, pictures: bool = True) -> str:
    """Copy a complete run's results.json and, if asked, its pictures into book/results; one line that says where.

    Raises RunError if the run, or one that it starts from, was made by uncommitted code; if it is not complete, names a
    folder of this machine, or is recorded already with other numbers.
    """
    source = Path(folder)
    found = runs.read(source / "results.json")
    for one in [found, *found.get("chain", [])]:
        if any(code["dirty"] or code["commit"] == "unknown" for code in [one["git"], *one.get("made_by", [])]):
            raise runs.RunError(f"{folder} was made by uncommitted code ({one['experiment']}): commit, run again, then "
                                "record")
        for name, value in one["parameters"].items():
            if isinstance(value, str) and Path(value).is_absolute():
                raise runs.RunError(f"{folder} names a folder of this machine ({name} of {one['experiment']}): give it "
                                    "from the checkout's top, then record")
    found["figures"] = found["figures"] if pictures else []
    target = root() / "book" / "results" / found["experiment"] / found["run"]
    if absent := [name for name in found["figures"] if not (source / name).is_file()]:
        raise runs.RunError(f"{folder} is not complete: {', '.join(absent)} is missing; run it with --again first")
    if (target / "results.json").is_file() and runs.read(target / "results.json")["metrics"] != found["metrics"]:
        raise runs.RunError(f"{_shown(target)} is recorded with other numbers: delete it first if it is to be replaced")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in found["figures"]:
            shutil.copyfile(source / name, target / name)
        write_atomic(target / "results.json", runs.as_text(found).encode())
    except OSError as error:
        raise runs.RunError(f"cannot write to {_shown(target)}: {error.strerror or error}") from None
    return f"recorded {_shown(target)}"
