"""Run recorded runs again, from scratch, and compare their numbers with the recorded ones.

    python -m lib verify                  # every run of book/smoke, the notebooks at their defaults
    python -m lib verify gmm gmm/paper    # its smoke run, and the recorded run book/results/gmm/paper at its size
    python -m lib verify --seeds 4        # on another machine: a run that differs is judged by four more seeds

With the machine and the versions of the record the same seed gives the same digits: "equal". With others sums are
rounded in another order, and training amplifies that until it is as good as another draw. So the tolerance of a
metric with a standard error is 3 standard errors of the difference, as if the two runs were independent and each had
the recorded error: what the book's own intervals would not tell from chance. A metric without one may differ by 10 %
of the recorded value; n and unit may not differ; times are not compared. These errors are over the items of one run.
Short training, of a GAN most, scatters more than that from seed to seed: --seeds trains further seeds here, and a
metric may then also differ by what two seeds do, the 95 % quantile (Student's t) times their deviation times the
square root of 2. A run within tolerance passes; one that DIFFERS or FAILED makes the exit code 1.
"""
import math
from statistics import stdev

from lib import integrity, intervals, launch, runs

ERRORS = 3                                        # standard errors of the difference
RELATIVE = 0.1                                    # of the recorded value, for a metric without a standard error
TIMES = ("ms per ", "steps by ")                  # how the units begin of what measures the machine


def verify(names: list[str], seeds: int = 0) -> int:
    """Run recorded runs again (default: all at smoke size), print a line about each; the exit code.

    seeds: how many further seeds tell by how much a run that differs may differ.
    Raises RunError for an unknown name, or if a record is not what was recorded, before anything is run.
    """
    chosen = {name: integrity.find(name) for name in names}
    chosen = chosen or {name: place for name, place in integrity.known().items() if place[0] == integrity.smoke()}
    if not chosen:
        raise runs.RunError("no run is recorded at smoke size: `python -m lib run NAME`, then `python -m lib record "
                            "runs/NAME/default`")
    records = {}
    for name, (folder, part) in chosen.items():
        integrity.check(folder, part)
        if part.startswith("benchmarks/"):
            raise runs.RunError(f"{name} is a benchmark, not a run: `python -m benchmarks` measures it again")
        records[name] = runs.read(folder / part / "results.json")
    failed = 0
    for name, then in records.items():
        passed, said = again(then, seeds)
        failed += not passed
        print(f"{name}: {said}", flush=True)
    return 1 if failed else 0


def again(then: dict, seeds: int = 0) -> tuple[bool, str]:
    """Run a record's run again in runs/.verify; (whether it is within tolerance, a line about it)."""
    try:
        values, new = _values(then)
        now = _run(then, values)
        passed, said = compared(then["metrics"], now["metrics"])
        if not passed and seeds and "seed" in values:
            more = [_run(then, values | {"seed": values["seed"] + i}) for i in range(1, seeds + 1)]
            passed, said = compared(then["metrics"], now["metrics"], [other["metrics"] for other in more])
            said += f" (by {seeds + 1} seeds)" * passed
    except runs.RunError as error:
        return False, f"FAILED: {error}"
    notes = ([] if passed else [f"recorded at commit {then['git']['commit'][:10]}"]) + new
    if not said.startswith("equal"):
        notes.append(changes(then, now))
    return passed, "; ".join([said, *notes])


def _run(then: dict, values: dict) -> dict:
    """The record of a run with these parameters, on as many threads, made from scratch."""
    seed = f"-seed={values['seed']}" * (values.get("seed") != then["parameters"].get("seed"))
    folder = runs.root() / "runs" / ".verify" / then["experiment"] / (then["run"] + seed)
    threads = then["device"]["threads"] if then["device"]["kind"] == "cpu" else None
    launch.run(then["experiment"], "", values, out=str(folder), threads=threads, again=True)
    return runs.read(folder / "results.json")


def _values(then: dict) -> tuple[dict, list[str]]:
    """The parameters to run again, and a note on those that the notebook has now and the record has not.

    RunError if the notebook is gone, or lacks a parameter that the record has.
    """
    experiment, had = then["experiment"], then["parameters"]
    declared = runs.parameters(experiment)
    if gone := [f"{name}={value!r}" for name, value in had.items() if name not in declared]:
        raise runs.RunError(f"it ran with {', '.join(gone)}, which notebook {experiment} no longer has: only its own "
                            f"code can run it again, commit {then['git']['commit'][:10]}")
    new = [f"{name}={p.default!r}" for name, p in declared.items() if name not in (*had, *runs.HOUSEKEEPING)]
    values = {name: value for name, value in had.items() if name not in runs.HOUSEKEEPING}
    return values, [f"new since then, at the default: {', '.join(new)}"] if new else []


def tolerance(name: str, then: dict, now: dict, others=()) -> float:
    """By how much a metric may differ in two runs' metrics; others: those of other seeds; see the module."""
    one = then[name]
    fixed = ERRORS * math.sqrt(2) * one["se"] if one["se"] else RELATIVE * abs(one["value"])
    values = [other[name]["value"] for other in (now, *others) if name in other]
    return max(fixed, intervals.quantile(len(values)) * math.sqrt(2) * stdev(values)) if len(values) > 1 else fixed


def compared(then: dict[str, dict], now: dict[str, dict], others=()) -> tuple[bool, str]:
    """(whether every metric is within tolerance, "equal…", "within tolerance…" or "DIFFERS…" in words).

    then, now: the metrics of two runs; others: those of runs of other seeds, whose scatter widens the tolerance.
    """
    def told(name):
        return (f"{name} {then[name]['value']:.6g} recorded, {now[name]['value']:.6g} now, tolerance "
                f"{tolerance(name, then, now, others):.3g}")
    fractions, wrong = {}, []
    names = [name for name, metric in then.items() if not metric["unit"].startswith(TIMES)]
    for name in names:
        if name not in now:
            wrong.append(f"{name} is no longer measured")
        elif other := [f"{key} {then[name][key]!r}, now {now[name][key]!r}" for key in ("n", "unit")
                       if then[name][key] != now[name][key]]:
            wrong.append(f"{name} has {' and '.join(other)}")
        elif (then[name]["se"] is None) != (now[name]["se"] is None):
            wrong.append(f"{name} has se {then[name]['se']!r}, now {now[name]['se']!r}")
        elif (apart := abs(now[name]["value"] - then[name]["value"])) or then[name]["se"] != now[name]["se"]:
            allowed = tolerance(name, then, now, others)
            fractions[name] = apart / allowed if allowed else math.inf if apart else 0.0
    beyond = sorted((name for name in fractions if fractions[name] > 1), key=fractions.get, reverse=True)
    wrong += map(told, beyond)
    if wrong:
        more = f" and {len(wrong) - 3} more" * (len(wrong) > 3)
        return False, f"DIFFERS in {len(wrong)} of {len(names)} metrics: {', '.join(wrong[:3])}{more}"
    if not fractions:
        return True, f"equal: {len(names)} metrics to the last digit"
    largest = max(fractions, key=fractions.get)
    return True, f"within tolerance, {fractions[largest]:.2g} of it at most: {told(largest)}"


def changes(then: dict, now: dict) -> str:
    """What differs in versions, device and data between two records, in words."""
    def flat(record):
        device = {f"device {key}": value for key, value in record["device"].items()}
        data = [f"{data['name']} {data['sha256'][:10]}" for data in [record["dataset"]] if data]
        return record["versions"] | device | dict(zip(["data set"], data, strict=False))
    before, after = flat(then), flat(now)
    found = [f"{name} {before.get(name, 'none')} → {after.get(name, 'none')}" for name in before | after
             if before.get(name) != after.get(name)]
    return f"since then {', '.join(found)}" if found else "with the versions, the device and the data of the record"
