"""Recorded runs in pairs that differ in one thing: what the claims and the known faults are measured by.

    lines = measure(test, runs.records())           # a Line for each size and setting

A test is a mapping, in book/claims.yml and book/faults.yml, of

    experiment  the notebook whose records it asks
    between     {parameter: [a, b]}: runs with a less runs with b, alike in every other parameter and in the seed
    metric      what they differ in; without `between` the metric itself, of each run
    metrics     [a, b], instead of both: two metrics of the same run, a less b
    where       parameters the runs must have, by name (a list: one of these)
    over        parameters that may differ from pair to pair: then n counts settings, each the mean of its seeds
    history     optional {step: n}: `metric` is a series of the history, taken there; {last: true}: its last value
    apart       optional, parameters in which the two sides of a pair may differ as well, such as the length of a run of
                which only the beginning is compared
    error       optional, of `metrics`: the metric that holds the difference of one run with its own standard error
    instrument  optional, a metric by which instruments are told apart: only runs of the same one are compared
    stand_in    optional, {metric or metrics, instrument}: asked where no record has the metric itself

Runs of different size (`reduced`) are never paired, nor counted together.
"""
import json
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import mean

from lib import BookError, runs
from lib.intervals import Interval, of_error, of_pairs, of_values

STAND_IN = {"metric", "metrics", "instrument"}
KINDS = {"between": dict, "where": dict, "history": dict, "stand_in": dict, "over": list, "apart": list}
KEYS = {"experiment", "between", "where", "over", "history", "apart", "error", "stand_in", *STAND_IN}


class PairsError(BookError):
    """A test is malformed or asks of the records what they do not have; the message names it."""


@dataclass(frozen=True)
class Line:
    """What the runs of one size and setting say: the interval of a difference, or of a value where nothing is compared.

    n counts `of`: "seeds", "settings" or, of a single pair or run, its "items" (or "nothing": no error is known).
    pairs: how many pairs, or runs; values: theirs. size: the reductions; setting: what else tells the lines apart.
    """
    interval: Interval
    of: str
    pairs: int
    unit: str
    metric: str
    size: tuple[str, ...]
    setting: str
    values: tuple[float, ...]
    runs: tuple[str, ...]
    stands_in: bool = False


# ------------------------------------------------------------------------------------------------ a test
def check(test, where: str) -> None:
    """PairsError, which begins with `where`, unless the test is well formed and names what the notebook declares."""
    if not isinstance(test, dict):
        raise PairsError(f"{where}: expected keys and values, got {test!r}")
    if unknown := sorted(set(test) - KEYS):
        raise PairsError(f"{where}: unknown key {unknown[0]!r}{runs.nearest(unknown[0], KEYS)}")
    if "experiment" not in test:
        raise PairsError(f"{where}: missing key 'experiment'")
    for name, kind in KINDS.items():
        if not isinstance(test.get(name, kind()), kind):
            raise PairsError(f"{where}: {name!r} must be a {'mapping' if kind is dict else 'list'}, got {test[name]!r}")
    if ("metric" in test) == ("metrics" in test) or {"between", "metrics"} <= set(test):
        raise PairsError(f"{where}: give either 'metric', alone or with 'between', or 'metrics'")
    for name, sides in (test.get("between") or {name: test[name] for name in ("metrics",) if name in test}).items():
        if not isinstance(sides, list) or len(sides) != 2 or sides[0] == sides[1]:
            raise PairsError(f"{where}: {name} needs two different sides, got {sides}")
    if len(test.get("between", {"": 0})) != 1:
        raise PairsError(f"{where}: 'between' must name one parameter, so that the pairs differ in nothing else")
    if unknown := sorted(set(test.get("stand_in", {})) - STAND_IN):
        raise PairsError(f"{where}.stand_in: unknown key {unknown[0]!r}")
    named = [*test.get("between", {}), *test.get("where", {}), *test.get("over", []), *test.get("apart", [])]
    try:
        declared = runs.parameters(test["experiment"])
    except runs.RunError as error:
        raise PairsError(f"{where}: {error}") from None
    for name in named:
        if name not in declared and name != "dataset":
            raise PairsError(f"{where}: {test['experiment']} has no parameter {name!r}{runs.nearest(name, declared)}")


def compares(test: dict) -> bool:
    """Whether the test's lines are of differences, not of plain values."""
    return "between" in test or "metrics" in test


def commands(test: dict, preset: str = "paper") -> list[str]:
    """The command lines of the runs that a test needs, one for each side; `preset` where the notebook has none such."""
    known = runs.presets(test["experiment"])
    preset = preset if preset in known else next(iter(known), "")
    declared = runs.parameters(test["experiment"])
    fixed = {name: value for name, value in test.get("where", {}).items()
             if name in declared and not isinstance(value, list)}
    found = []
    for side in _sides(test) if "between" in test else [{}]:
        values = runs.check(test["experiment"], known.get(preset, {}) | fixed | side)
        found.append(runs.command_of(test["experiment"], preset, values))
    return found


def _sides(test: dict) -> list[dict]:
    (name, values), = test["between"].items()
    return [{name: value} for value in values]


# ------------------------------------------------------------------------------------------------ its lines
def measure(test: dict, records: list[dict]) -> list[Line]:
    """What the records (parsed results.json files) say of a test: the sizes with several pairs first, of these the one
    closest to the published (runs.shortfall), of these the one with the most pairs. [] if nothing was run.

    Raises PairsError: two sides in other units, a metric that only some of the runs have, or no such series.
    """
    matching = [record for record in records if matches(test, record)]
    test, stands_in = _or_stand_in(test, matching)
    kind = "history" if "history" in test else "metrics"
    if not any(_names(test)[0] in record[kind] for record in matching):
        return []
    lines = defaultdict(lambda: defaultdict(dict))
    for record in sorted(matching, key=lambda record: record.get("date", "")):          # the newest of a kind counts
        for side, needed in enumerate(_sides(test) if "between" in test else [{}]):
            if all(_same(record["parameters"].get(name), value) for name, value in needed.items()):
                line, cell = _keys(test, record)
                lines[line][cell][side] = record
    found = [_line(test, key, cells, stands_in) for key, cells in lines.items()]
    found = sorted((line for line in found if line),
                   key=lambda line: (line.pairs < 2, *runs.shortfall(line.size), -line.pairs))
    return _told_apart(found)


def matches(test: dict, record: dict) -> bool:
    """Whether a record is of the test's experiment and has the parameters of its `where`."""
    if record["experiment"] != test["experiment"]:
        return False
    known = runs.known(record)
    return all(any(_same(known.get(name), one) for one in (value if isinstance(value, list) else [value]))
               for name, value in test.get("where", {}).items())


def _same(value, wanted) -> bool:
    """Equal, a number also if one side is an int and the other a float; True is not 1."""
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _names(test: dict) -> list[str]:
    return test.get("metrics") or [test["metric"]]


def _or_stand_in(test: dict, records: list[dict]) -> tuple[dict, bool]:
    """(the test, False), or (asking for its stand-in, True) where there is one and no record has the metric itself."""
    if "stand_in" not in test or any(name in record["metrics"] for record in records for name in _names(test)):
        return test, False
    return {name: value for name, value in test.items() if name not in ("metric", "metrics")} | test["stand_in"], True


def _keys(test: dict, record: dict) -> tuple[tuple, tuple]:
    """(what all runs of a line share, what the two sides of one pair share beside it)."""
    varied, own = {*test.get("between", {}), *test.get("over", []), *test.get("apart", [])}, record["parameters"]
    apart = {"seed", record.get("started_from"), *runs.HOUSEKEEPING, *varied}
    setting = {name: value for name, value in own.items() if name not in apart}
    asked = {*varied, *(name for name in test.get("where", {}) if name in own)}         # no reductions of this test
    size = tuple(text for text in record["reduced"] if text.partition(" ")[0] not in asked)
    if name := test.get("instrument"):
        setting[name] = _metric(record, name)["value"]
    over = {name: own.get(name) for name in test.get("over", [])}
    data = (record.get("dataset") or {}).get("sha256")
    chain = [step["run"] for step in record.get("chain", [])]
    return (size, json.dumps(setting, sort_keys=True)), (json.dumps(over), json.dumps([own.get("seed"), data, chain]))


def _line(test: dict, key: tuple, cells: dict, stands_in: bool) -> Line | None:
    """The line of these pairs, {(setting, seed and data): {side: record}}; None if no pair has both sides."""
    whole = {cell: sides for cell, sides in cells.items() if "between" not in test or len(sides) == 2}
    if not whole:
        return None
    pairs = {cell: _values(test, sides) for cell, sides in whole.items()}
    names = _names(test)
    units = {metric["unit"] for pair in pairs.values() for metric in pair}
    if len(units) > 1:
        raise PairsError(f"{test['experiment']}: {' and '.join(names)} are in {' and '.join(sorted(units))}")
    interval, of = _interval(test, pairs, whole)
    values = tuple(pair[0]["value"] - sum(metric["value"] for metric in pair[1:]) for pair in pairs.values())
    used = tuple(dict.fromkeys(record["path"] for sides in whole.values() for record in sides.values()))
    return Line(interval, of, len(pairs), units.pop(), names[0], key[0], key[1], values, used, stands_in)


def _interval(test: dict, pairs: dict, whole: dict) -> tuple[Interval, str]:
    """The interval of the pairs' differences (or of single values), and what its n counts."""
    settings = {cell[0] for cell in pairs}
    if len(pairs) == 1:
        (pair,), (sides,) = pairs.values(), whole.values()
        held = [_metric(sides[0], test["error"])] if "error" in test else pair
        ses = [metric["se"] for metric in held]
        value = pair[0]["value"] - sum(metric["value"] for metric in pair[1:])
        se = None if None in ses else math.hypot(*ses)
        interval = of_error(value, se, min(metric["n"] for metric in held))
        return interval, "items" if interval.half is not None else "nothing"
    grouped = defaultdict(list)
    for cell, pair in pairs.items():
        grouped[cell[0] if len(settings) > 1 else cell].append(pair)
    first, *second = ({key: mean(pair[side]["value"] for pair in group) for key, group in grouped.items()}
                      for side in range(len(next(iter(pairs.values())))))
    interval = of_pairs(first, *second) if second else of_values(list(first.values()))
    return interval, "settings" if len(settings) > 1 else "seeds"


def _values(test: dict, sides: dict) -> list[dict]:
    """The metrics of one pair: first and second side, or the one value."""
    if "metrics" in test:
        return [_metric(sides[0], name) for name in test["metrics"]]
    return [_metric(sides[side], test["metric"], test.get("history")) for side in sorted(sides)]


def _metric(record: dict, name: str, history: dict | None = None) -> dict:
    if history:
        return {"value": _from_history(record, name, history), "se": None, "n": 1, "unit": history.get("unit", "")}
    if name not in record["metrics"]:
        raise PairsError(f"{record['path']}/results.json has no metric {name!r}; it has "
                         f"{', '.join(sorted(record['metrics']))}")
    return record["metrics"][name]


def _from_history(record: dict, name: str, at: dict) -> float:
    series = record.get("history", {})
    column, where = next((key, value) for key, value in at.items() if key != "unit")
    if name not in series or where not in series.get(column, []):
        raise PairsError(f"{record['path']}/results.json has no {name!r} at {column} {where} in its history")
    return series[name][series[column].index(where)]


def _told_apart(lines: list[Line]) -> list[Line]:
    """The lines with `setting` in words: what differs between those of one size."""
    settings = [json.loads(line.setting) for line in lines]
    found = []
    for line, own in zip(lines, settings, strict=True):
        alike = [setting for other, setting in zip(lines, settings, strict=True) if other.size == line.size]
        names = [name for name in own if len({json.dumps(setting.get(name)) for setting in alike}) > 1]
        found.append(replace(line, setting=", ".join(f"{name} {own[name]}" for name in names)))
    return found
