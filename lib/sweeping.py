"""Run a sweep: say what is to do, hand it to Snakemake as a plan, tell what came of it.

One process conducts a sweep at a preset: the head. It writes runs/.sweeps/<sweep>-<preset>/plan.json, which
workflow/Snakefile turns into jobs, each of them `python -m lib run ... --wait --gpu`. Whether a run is done is told by
its results.json alone; what Snakemake looks at are marks in that folder, made anew by every head.
"""
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from lib import gpus, launch, root, runs, sweeps, write_atomic

LOG = "sweep.log"                                             # of a run, in its folder: what every attempt said
PATIENCE = 60                                                 # seconds for jobs to end after an interrupt


def listing() -> str:
    """Every sweep with its number of runs at each size, as text."""
    lines = []
    for name, sweep in sweeps.definitions().items():
        experiments = dict.fromkeys(part["run"] for part in sweep["runs"])
        common = [preset for preset in runs.presets(next(iter(experiments)))
                  if all(preset in runs.presets(one) for one in experiments)]
        sizes = [f"{preset} {len(sweeps.load(name, preset))}" for preset in (sweeps.SMOKE, *common)]
        lines.append(f"{name:22}{', '.join(sizes):45}{', '.join(experiments)}")
    return "\n".join(lines)


def described(sweep: sweeps.Sweep, again: bool = False) -> str:
    """Every configuration with its index, state and command, and their numbers, as text."""
    states, lines = sweeps.states(sweep, again), []
    for one, state in zip(sweep, states, strict=True):
        why = {"other code": f"{state.why}; it stays, --again runs it anew",
               "changed": f"{state.why}; the old one is set aside"}.get(state.kind, state.why)
        told = [f"after {', '.join(map(str, one.needs))}"] if one.needs else []
        told += [why] if why else []
        lines.append(f"{one.index:4}  {state.kind:11}{one.command}" + (f"  ({'; '.join(told)})" if told else ""))
    kinds = [state.kind for state in states]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return "\n".join([*lines, f"{sweep.name} at {sweep.preset}: {len(sweep)} runs: {counts}"])


def run(sweep: sweeps.Sweep, profile: str = "local", cores: int | None = None, n_gpus: int | None = None,
        again: bool = False, timeout: float = 86400) -> int:
    """Run what is to do of a sweep and print what comes of it; returns the exit code: 0 if every run is done.

    profile: a folder of workflow/profiles, or another with a config.yaml; cores, n_gpus: at most so many at once (with
    Slurm: jobs; no GPU asked for if n_gpus is 0); again: also what was made by other code; timeout: of a run, seconds.
    Raises RunError: no Snakemake, an unknown profile, another head at work, a run to be set aside that goes on.
    """
    program, options = _snakemake(), _options(profile, cores, n_gpus)
    work = root() / "runs" / ".sweeps" / f"{sweep.name}-{sweep.preset}"
    work.mkdir(parents=True, exist_ok=True)
    with _head(work):
        before = sweeps.states(sweep, again)
        for one, state in zip(sweep, before, strict=True):
            if state.kind == "other code":
                print(f"{one.folder} stays, though made by other code ({state.why}); --again runs it anew")
            if state.kind == "changed":
                print(f"{one.folder}: {state.why}; set aside as {sweeps.set_aside(one)}")
        left = [one for one, state in zip(sweep, before, strict=True) if not state.stays]
        logs = {one.folder: _size(root() / one.folder / LOG) for one in left}
        print(f"{sweep.name} at {sweep.preset}: {len(sweep)} runs, {len(left)} to do", flush=True)
        began, code, interrupted = time.monotonic(), 0, False
        if left:
            _plan(work, sweep, left, timeout)
            chains = [f"done/{_key(one)}" for one in left if one.needs]       # what others wait for goes first
            first = ["--prioritize", *chains] if chains else []
            code, interrupted = _conduct([program, *options, *first], work, sweep, left)
        return _summary(sweep, left, logs, work, code, interrupted, time.monotonic() - began)


# ------------------------------------------------------------------------------------------------ before
def _snakemake() -> str:
    own = root() / "workflow" / ".venv" / "bin" / "snakemake"
    found = str(own) if own.is_file() else shutil.which("snakemake")
    if not found:
        raise runs.RunError("Snakemake is not installed: `make sweep` installs it into workflow/.venv")
    return found


def _options(profile: str, cores: int | None, n_gpus: int | None) -> list[str]:
    """Snakemake's options for a profile and what is to be used at once. RunError: no such profile."""
    home = root() / "workflow" / "profiles"
    folder = home / profile if (home / profile).is_dir() else Path(profile).expanduser().resolve()
    try:
        executor = yaml.safe_load((folder / "config.yaml").read_text()).get("executor", "local")
    except (OSError, AttributeError, yaml.YAMLError):
        known = sorted(path.name for path in home.iterdir())
        raise runs.RunError(f"no profile {profile!r}{runs.nearest(profile, known)}; or give a folder with a "
                            "config.yaml for Snakemake") from None
    if executor == "local" and n_gpus is None:
        n_gpus = len(gpus.visible()) or None                  # without any, nothing is limited
    options = ["--profile", str(folder), "--snakefile", str(root() / "workflow" / "Snakefile")]
    options += ["--cores" if executor == "local" else "--jobs", str(cores)] if cores else []
    options += ["--resources", f"gpu={n_gpus}"] if n_gpus else ["--set-resources", "run:gpu=0"] * (n_gpus == 0)
    return [*options, "--nolock", "--rerun-incomplete", "--keep-going", "--rerun-triggers", "mtime", "--retries", "1",
            "--quiet", "all"]


@contextlib.contextmanager
def _head(work: Path):
    """The right to conduct a sweep, which ends with this process however it ends. RunError if another one has it."""
    with open(work / "head.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise runs.RunError(f"another process runs this sweep ({file.read().strip()}): wait for it, or end it") \
                from None
        file.truncate(0)
        file.write(f"{os.uname().nodename}, process {os.getpid()}")
        file.flush()
        yield


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _key(one: sweeps.Configuration) -> str:
    """A short name of a run that does not depend on the sweep: a job of an earlier head may still use it."""
    return f"{one.experiment}-{hashlib.sha256(one.folder.encode()).hexdigest()[:8]}"


def _plan(work: Path, sweep: sweeps.Sweep, left: list[sweeps.Configuration], timeout: float) -> None:
    """Write plan.json for workflow/Snakefile: the runs to do, and which of them each starts from."""
    keys = {one.index: _key(one) for one in left}
    common = ["--wait", "--gpu", "--timeout", f"{timeout:g}"]
    jobs = {keys[one.index]: {"folder": one.folder, "needs": [keys[i] for i in one.needs if i in keys],
                              "command": shlex.join([sys.executable, "-m", "lib", *one.words, *common])}
            for one in left}
    shutil.rmtree(work / "done", ignore_errors=True)
    plan = {"sweep": sweep.name, "preset": sweep.preset, "book": str(root()), "log": LOG, "runs": jobs}
    write_atomic(work / "plan.json", (json.dumps(plan, indent=1) + "\n").encode())


# ------------------------------------------------------------------------------------------------ while it runs
def _conduct(command: list[str], work: Path, sweep: sweeps.Sweep, left: list) -> tuple[int, bool]:
    """Run Snakemake to its end and print each run that ends; returns (its exit code, interrupted or not)."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with open(work / "snakemake.log", "w") as log:
        process = subprocess.Popen([*command, "--directory", str(work)], stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=log, start_new_session=True, preexec_fn=_die_with_parent)
        waiting = list(left)
        try:
            while True:
                code = process.poll()                         # first: then what ended before it did is seen
                for one in [one for one in waiting if (root() / one.folder / "results.json").is_file()]:
                    waiting.remove(one)
                    seconds = runs.from_json(root() / one.folder / "results.json")["wall_time_s"]
                    print(f"{len(sweep) - len(waiting)}/{len(sweep)}  {one.folder}  {seconds} s", flush=True)
                if code is not None:
                    return code, False
                time.sleep(0.5)
        except KeyboardInterrupt:
            print("interrupted: the jobs are being ended", flush=True)
            return _end(process), True
        finally:
            signal.signal(signal.SIGTERM, before)


def _die_with_parent() -> None:
    """Snakemake does not outlive a killed head; the runs that it has started do, and the next head waits for them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)            # PR_SET_PDEATHSIG


def _end(process: subprocess.Popen) -> int:
    """End Snakemake and its jobs, which are its process group here and cancelled by it on a cluster."""
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(PATIENCE)
    return process.wait()


# ------------------------------------------------------------------------------------------------ after
def _summary(sweep: sweeps.Sweep, left: list, logs: dict, work: Path, code: int, interrupted: bool,
             seconds: float) -> int:
    """Print how many runs are done, why the others are not; returns the exit code."""
    missing = {i: sweep(i) for i, state in enumerate(sweeps.states(sweep)) if not state.stays}
    print(f"{len(sweep) - len(missing)} of {len(sweep)} runs are done, {len(sweep) - len(left)} of them were before "
          f"({seconds:.0f} s)")
    if interrupted:
        print("interrupted: the same command goes on from what there is")
        return 130
    reasons = {i: _reason(one, logs.get(one.folder, 0)) for i, one in missing.items()}
    for i, one in missing.items():
        if reasons[i]:
            print(f"failed: {one.folder}: {reasons[i]}")
        else:
            first = next((f": {sweep(j).folder} failed" for j in _roots(sweep, i) if reasons.get(j)), "")
            print(f"not started: {one.folder}{first}")
    if missing and not any(reasons.values()):
        log = work / "snakemake.log"
        last = [line for line in log.read_text().splitlines() if line.strip()] or ["without a word"]
        print(f"Snakemake ended with code {code}: {last[-1]} (see {log.relative_to(root())})")
    return 1 if missing else 0


def _roots(sweep: sweeps.Sweep, i: int) -> list[int]:
    """The runs that run i starts from, directly or not, those that come first first."""
    return sorted({j for need in sweep(i).needs for j in (need, *_roots(sweep, need))})


def _reason(one: sweeps.Configuration, offset: int) -> str:
    """Why a run has no result, from what its last attempt said since `offset` of its log; "": it was not started."""
    path = root() / one.folder / LOG
    if _size(path) <= offset:
        return ""
    last = re.split(r"(?m)^--- \d{4}-", path.read_bytes()[offset:].decode(errors="replace"))[-1]
    said = re.findall(r"(?m)^error: (.+)", last)
    if launch.running(root() / one.folder):
        return f"still runs, without this sweep (see {one.folder}/{LOG}): the same command waits for it"
    return said[-1] if said else f"ended without a word (killed?), see {one.folder}/{LOG}"
