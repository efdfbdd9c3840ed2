"""Run a sweep: say what is to do, hand it to Snakemake as a plan, tell what came of it.

One process conducts a sweep at a preset: the head. It writes runs/.sweeps/<sweep>-<preset>/plan.json, which
workflow/Snakefile turns into jobs, each of them `python -m lib run ... --wait --gpu`. Whether a run is done is told by
its results.json alone; what Snakemake looks at are marks in that folder, made anew by every head.
"""
import contextlib
import ctypes
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

from lib import gpus, launch, locks, provenance, root, runs, sweeps, write_atomic

LOG = "sweep.log"                                             # of a run, in its folder: what every attempt said
PATIENCE = 60                                                 # seconds for jobs to end, and for files to be seen here


def listing() -> str:
    """Every sweep with its number of runs at each size, as text."""
    lines = []
    for name, sweep in sweeps.definitions().items():
        experiments = dict.fromkeys(part["run"] for part in sweep["runs"])
        common = [preset for preset in runs.presets(next(iter(experiments)))
                  if all(preset in runs.presets(one) for one in experiments)]
        sizes = [f"{preset} {len(sweeps.load(name, preset))}" for preset in (sweeps.SMOKE, *common)]
        lines.append(f"{name:22}{', '.join(sizes):43}  {', '.join(experiments)}")
    return "\n".join(lines)


def described(sweep: sweeps.Sweep, again: bool = False) -> str:
    """Every configuration with its index, state and command, and their numbers, as text.

    again: as by `run`, which raises the same RunError.
    """
    _check_again(again)
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


def _check_again(again: bool) -> None:
    if again and provenance.git_state()["dirty"]:
        raise runs.RunError("--again repeats what other code made, and uncommitted changes are other code for ever: "
                            "commit first")


def run(sweep: sweeps.Sweep, profile: str = "local", cores: int | None = None, n_gpus: int | None = None,
        again: bool = False, timeout: float = 86400) -> int:
    """Run what is to do of a sweep and print what comes of it; returns the exit code: 0 if every run is done.

    profile: a folder of workflow/profiles, or another with a config.yaml; cores, n_gpus: at most so many at once (with
    Slurm: jobs; no GPU asked for if n_gpus is 0); again: also what was made by other code; timeout: of a run, seconds.
    Raises RunError: a number that makes no sense, `again` with uncommitted changes, no Snakemake, an unknown profile,
    another head at work, a run to be set aside that goes on.
    """
    if not timeout > 0 or (cores is not None and cores < 1) or (n_gpus is not None and n_gpus < 0):
        raise runs.RunError(f"--timeout and --cores must be positive and --gpus not negative, got {timeout:g}, {cores} "
                            f"and {n_gpus}")
    _check_again(again)
    program, options = _snakemake(), _options(profile, cores, n_gpus)
    work = root() / "runs" / ".sweeps" / f"{sweep.name}-{sweep.preset}"
    work.mkdir(parents=True, exist_ok=True)
    with _head(work):
        before = sweeps.states(sweep, again)
        for one, state in zip(sweep, before, strict=True):
            _prepare(one, state)
        left = [one for one, state in zip(sweep, before, strict=True) if not state.stays]
        logs = {one.folder: _size(root() / one.folder / LOG) for one in left}
        print(f"{sweep.name} at {sweep.preset}: {len(sweep)} runs, {len(left)} to do", flush=True)
        began, code, interrupted = time.monotonic(), 0, False
        if left:
            _cancel_pending(work)
            _plan(work, sweep, left, timeout, n_gpus != 0)
            chains = [f"done/{_key(one)}" for one in left if one.needs]       # what others wait for goes first
            first = ["--prioritize", *chains] if chains else []
            code, interrupted = _conduct([program, *options, *first], work, sweep, left)
            _wait_to_see(work, left)
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
            "--quiet", "progress", "host"]


@contextlib.contextmanager
def _head(work: Path):
    """The right to conduct a sweep, which ends with this process however it ends. RunError if another one has it."""
    with open(work / "head.lock", "a+") as file:
        if not locks.locked(file):
            file.seek(0)
            raise runs.RunError(f"another process runs this sweep ({file.read().strip()}): wait for it, or end it")
        file.truncate(0)
        file.write(f"{os.uname().nodename}, process {os.getpid()}")
        file.flush()
        yield


def _prepare(one: sweeps.Configuration, state: sweeps.State) -> None:
    """Set aside a run that is to be made again; say so, or what else is to be known of it."""
    if state.kind == "other code":
        print(f"{one.folder} stays, though made by other code ({state.why}); --again runs it anew")
    if state.kind == "to do" and state.why:
        print(f"{one.folder} {state.why}")
    if state.kind == "changed":
        print(f"{one.folder}: {state.why}; set aside as {sweeps.set_aside(one)}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _key(one: sweeps.Configuration) -> str:
    """A short name of a run that does not depend on the sweep: a job of an earlier head may still use it."""
    return f"{one.experiment}-{hashlib.sha256(one.folder.encode()).hexdigest()[:8]}"


def _plan(work: Path, sweep: sweeps.Sweep, left: list[sweeps.Configuration], timeout: float, gpu: bool) -> None:
    """Write plan.json for workflow/Snakefile: the runs to do, and which of them each starts from; gpu: or on none."""
    keys = {one.index: _key(one) for one in left}
    common = ["--wait", *(["--gpu"] if gpu else []), "--timeout", f"{timeout:.12g}"]
    hidden = "" if gpu else "CUDA_VISIBLE_DEVICES= "
    jobs = {keys[one.index]: {"folder": one.folder, "needs": [keys[i] for i in one.needs if i in keys],
                              "command": hidden + shlex.join([sys.executable, "-m", "lib", *one.words, *common])}
            for one in left}
    shutil.rmtree(work / "done", ignore_errors=True)
    plan = {"sweep": sweep.name, "preset": sweep.preset, "book": str(root()), "log": LOG, "runs": jobs}
    write_atomic(work / "plan.json", (json.dumps(plan, indent=1) + "\n").encode())


def _cancel_pending(work: Path) -> None:
    """Cancel what a killed head left waiting in Slurm's queue: this one submits it anew. What runs is waited for."""
    name = re.search(r"(?m)^SLURM run ID: (\S+)$", _told(work))
    if name:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["scancel", "--state=PENDING", f"--name={name[1]}"], capture_output=True, timeout=60)


def _told(work: Path) -> str:
    """What Snakemake said, last time or until now."""
    path = work / "snakemake.log"
    return path.read_text(errors="replace") if path.is_file() else ""


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
        except BaseException:
            _end(process)
            raise
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
def _wait_to_see(work: Path, left: list) -> None:
    """Wait, but not for ever, until the results of runs that went well are seen here, on a network file system."""
    end = time.monotonic() + PATIENCE
    for folder in [root() / one.folder for one in left if (work / "done" / _key(one)).exists()]:
        while not (folder / "results.json").is_file() and time.monotonic() < end:
            time.sleep(1)
            with contextlib.suppress(OSError):
                os.listdir(folder)                            # which makes the system ask the server


def _summary(sweep: sweeps.Sweep, left: list, logs: dict, work: Path, code: int, interrupted: bool,
             seconds: float) -> int:
    """Print how many runs are done, why the others are not; returns the exit code."""
    after = sweeps.states(sweep)
    missing = {i: sweep(i) for i, state in enumerate(after) if not state.stays}
    print(f"{len(sweep) - len(missing)} of {len(sweep)} runs are done, {len(sweep) - len(left)} of them were before "
          f"({seconds:.0f} s)")
    if interrupted:
        print("interrupted: the same command goes on from what there is")
        return 130
    reasons = {i: _reason(one, after[i], logs.get(one.folder, 0), _told(work)) for i, one in missing.items()}
    unexplained = False
    for i, one in missing.items():
        if reasons[i]:
            print(f"failed: {one.folder}: {reasons[i]}")
        else:
            first = next((f": {sweep(j).folder} failed" for j in _roots(sweep, i) if reasons.get(j)), "")
            unexplained |= not first
            print(f"not started: {one.folder}{first}")
    if unexplained:
        print(f"Snakemake ended with code {code}: {_complaint(_told(work))} (see "
              f"{(work / 'snakemake.log').relative_to(root())})")
    return 1 if missing else 0


def _complaint(told: str) -> str:
    """What Snakemake's log complains of first; its last line if nothing looks like a complaint."""
    found = re.search(r"(?m)^ *message: *(\S.*)|^\w+(?:Error|Exception)\b.*?:\s*(\S.*)", told)
    lines = [line for line in told.splitlines() if line.strip()] or ["without a word"]
    return (found[1] or found[2]) if found else lines[-1]


def _roots(sweep: sweeps.Sweep, i: int) -> list[int]:
    """The runs that run i starts from, directly or not, those that come first first."""
    return sorted({j for need in sweep(i).needs for j in (need, *_roots(sweep, need))})


def _reason(one: sweeps.Configuration, state: sweeps.State, offset: int, told: str) -> str:
    """Why a run has no result, from what its last attempt said since `offset` of its log; "": it was not started.

    told: Snakemake's log, with what Slurm says of a job that it ended.
    """
    if state.kind == "changed" and (root() / one.folder / "results.json").is_file():
        return f"{state.why}: parameters were edited while the sweep ran; the same command goes by what they are now"
    path = root() / one.folder / LOG
    if _size(path) <= offset:
        return ""
    last = re.split(r"(?m)^--- \d{4}-", path.read_bytes()[offset:].decode(errors="replace"))[-1]
    said = re.findall(r"(?m)^error: (.+)", last)
    if launch.running(root() / one.folder):
        return f"still runs, without this sweep (see {one.folder}/{LOG}): the same command waits for it"
    if said:
        return said[-1]
    slurm = re.findall(rf"message: (SLURM.*)\n(?:    .*\n)*?    output: done/{_key(one)}\n", told)
    return f"ended without a word ({slurm[-1] if slurm else 'killed?'}), see {one.folder}/{LOG}"
