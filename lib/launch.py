"""`python -m lib run` and `record`: papermill with checked parameters, a time limit, one retry, resume."""
import contextlib
import fcntl
import os
import shutil
import signal
import sys
from pathlib import Path

from lib import root, runs


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
    """Execute a notebook into its run folder and return one line that says what there is now.

    The folder's results.json is written last, so it tells a complete run; such a run is not repeated unless `again`.
    An interrupted one resumes from its checkpoint. Raises RunError for every foreseen failure.
    """
    values = _values(experiment, preset, changes)
    name = runs.name_of(experiment, preset, values)
    folder = Path(out).resolve() if out else root() / "runs" / experiment / name
    results = folder / "results.json"
    runs.make_folder(folder)
    with _lock(folder):
        if results.is_file() and not again:
            return f"{_shown(folder)} is complete ({runs.read(results)['date']}); --again repeats it"
        if again:
            for file in folder.glob("*"):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        if "resume" in values and not values["resume"] and (folder / "latest.safetensors").is_file():
            values["resume"] = "latest"
        environment = {"VAEBOOK_RUN": str(folder), "VAEBOOK_PRESET": preset}
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        with _environment(environment):
            _execute(experiment, values, folder, timeout)
        try:
            os.replace(folder / "results.json.pending", results)
        except FileNotFoundError:
            raise runs.RunError(f"{experiment} ended without run.save(): nothing to record in {_shown(folder)}") from None
    found = runs.read(results)
    metrics = ", ".join(f"{key} {metric['value']:.4g} {metric['unit']}" for key, metric in found["metrics"].items())
    return f"{_shown(folder)}: {metrics} ({found['wall_time_s']} s)"


def _values(experiment: str, preset: str, changes: dict) -> dict:
    runs.notebook_path(experiment)                         # first: an unknown notebook is the clearer complaint
    known = runs.presets(experiment)
    if preset and preset not in known:
        raise runs.RunError(f"{experiment} has no preset {preset!r}{runs.nearest(preset, known)}")
    return runs.check(experiment, known.get(preset, {}) | changes)


def _execute(experiment: str, values: dict, folder: Path, timeout: float) -> None:
    """Papermill with one retry if the kernel dies or does not start. RunError with the notebook's own last line."""
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError
    for attempt in (1, 2):
        try:
            with _time_limit(timeout):
                execute_notebook(str(runs.notebook_path(experiment)), str(folder / "notebook.ipynb"), values,
                                 kernel_name="python3", cwd=str(root() / "notebooks"), progress_bar=False, log_output=False)
            return
        except PapermillExecutionError as error:
            raise runs.RunError(f"{experiment} stopped with {error.ename}: {error.evalue}") from None
        except TimeoutError:
            _kill_children()
            raise runs.RunError(f"{experiment} reached the time limit of {timeout:g} s: the same command goes on from the last "
                                "checkpoint, --timeout raises the limit") from None
        except (DeadKernelError, RuntimeError) as error:
            _kill_children()
            if attempt == 2:
                raise runs.RunError(f"{experiment}: the kernel died twice ({error}): is there enough memory?") from None
            print(f"the kernel died ({error}): once more", file=sys.stderr)
            if "resume" in values and (folder / "latest.safetensors").is_file():
                values["resume"] = "latest"


@contextlib.contextmanager
def _time_limit(seconds: float):
    def stop(signum, frame):
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _kill_children() -> None:
    import psutil
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@contextlib.contextmanager
def _environment(values: dict):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _lock(folder: Path):
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise runs.RunError(f"another process is running in {_shown(folder)}: wait for it or choose --out") from None
        yield


def _shown(folder: Path) -> str:
    return os.path.relpath(folder, root()) if folder.is_relative_to(root()) else str(folder)


def record(folder: str) -> str:
    """Copy a complete run's results.json and pictures into book/results; one line that says where.

    Raises RunError if the run is not complete, was made by uncommitted code, or is recorded already with other numbers.
    """
    source = Path(folder)
    found = runs.read(source / "results.json")
    if found["git"]["dirty"] or found["git"]["commit"] == "unknown":
        raise runs.RunError(f"{folder} was made by uncommitted code: commit, run again, then record")
    target = root() / "book" / "results" / found["experiment"] / found["run"]
    if (target / "results.json").is_file() and runs.read(target / "results.json")["metrics"] != found["metrics"]:
        raise runs.RunError(f"{_shown(target)} is recorded with other numbers: delete it first if it is to be replaced")
    target.mkdir(parents=True, exist_ok=True)
    for name in [*found["figures"], "results.json"]:
        shutil.copyfile(source / name, target / name)
    return f"recorded {_shown(target)}"
