"""`python -m lib run`: papermill with checked parameters, a time limit, one retry, resume."""
import contextlib
import os
import time
from pathlib import Path

from lib import gpus, locks, replicas, root, runs
from lib.execute import ExecutionError, TimeLimitError, execute


class BusyError(runs.RunError):
    """Another process runs in the folder."""


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
        threads: int | None = None, again: bool = False, wait: bool = False, gpu: bool = False) -> str:
    """Execute a notebook into its run folder and return one line that says what there is now, or one for each replica.

    The folder's results.json is written last, so it tells a complete run; such a run is not repeated unless `again`.
    An interrupted one resumes from its checkpoint. With the parameter `replicas` the first of the seeds that is not
    complete is executed and adds the others. wait: if another process runs this very run, until it has ended, rather
    than refuse. gpu: on a machine with several GPUs take a free one (lib/gpus.py). Raises RunError for every foreseen
    failure.
    """
    if not timeout > 0 or (threads is not None and threads < 1):
        raise runs.RunError(f"--timeout and --threads must be positive, got {timeout:g} and {threads}")
    values = values_of(experiment, preset, changes)
    folder = Path(out).resolve() if out else root() / "runs" / experiment / runs.name_of(experiment, preset, values)
    seeds = replicas.seeds(experiment, preset, values, folder)
    with contextlib.ExitStack() as held:
        for _, folder in seeds:
            held.enter_context(_lock(folder, wait))
        left = [one for one in seeds if again or not replicas.complete(one[1], experiment, one[0])]
        if left:
            device = held.enter_context(gpus.taken()) if gpu else None
            _run(experiment, preset, left, len(seeds) - seeds.index(left[0]), timeout, threads, again, device)
        return "\n".join(_said(one[1], one in left) for one in seeds)


def _run(experiment: str, preset: str, left: list[tuple[dict, Path]], n: int, timeout: float, threads: int | None,
         again: bool, device: str | None) -> None:
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
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
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


def values_of(experiment: str, preset: str, changes: dict) -> dict:
    """All parameters of a run. RunError: an unknown notebook, preset or parameter, a value of the wrong type."""
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
def _lock(folder: Path, wait: bool = False):
    """Hold a run's folder, made if need be, for the body. RunError: it cannot be written; BusyError unless `wait`."""
    waited = False
    while True:
        runs.make_folder(folder)
        with open(folder / ".lock", "a") as file:
            while not locks.locked(file):
                if not wait:
                    raise BusyError(f"another process runs in {_shown(folder)}: wait for it or choose --out")
                if not waited:
                    print(f"another process runs in {_shown(folder)}: waiting for it", flush=True)
                waited = True
                time.sleep(1)
            if _is_there(folder / ".lock", file):
                time.sleep(locks.KERNEL_ENDS if waited else 0)
                yield
                return


def _is_there(path: Path, file) -> bool:
    """Whether the path still leads to an open file: a sweep may have set its folder aside meanwhile."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def move(folder: Path, target: Path) -> None:
    """Rename a run's folder, which nobody works in meanwhile. BusyError if somebody does."""
    with _lock(folder):
        folder.rename(target)


def running(folder: Path) -> bool:
    """Whether a process runs in a run's folder now."""
    try:
        with open(folder / ".lock", "r+") as file:
            return not locks.locked(file)
    except FileNotFoundError:
        return False


def _shown(folder: Path) -> str:
    return os.path.relpath(folder, root()) if folder.is_relative_to(root()) else str(folder)
