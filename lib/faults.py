"""The known faults of the originals, and what the recorded runs say they change: book/faults.yml beside book/results.

    rows = measure(load(), runs.records(), scoreboard.flatten(scoreboard.load()))       # one row for each fault

Pure functions. Where a test compares (lib/pairs.py), its first side is the original's way and its second the right one,
so that the difference is what the fault adds. Nothing is judged. lib/evidence.py draws the rows.
"""
import re
from pathlib import Path

from lib import BookError, pairs, read_yaml, root, runs

NUMBERS = range(1, 18)                # of the list of known faults
REQUIRED = ("n", "work", "kind", "fault", "original", "here")
OPTIONAL = ("tests", "nothing", "used", "ran", "preset")
WORDS = ("fault", "original", "here", "nothing")
STATES = ("measured", "in part", "not run", "nothing to measure")
REFERENCE = re.compile(r"\{(\w+) ([^{}]+)\}")


class FaultsError(BookError):
    """faults.yml is malformed, or names what is not there; the message names the fault and the key."""


def load(path: Path | None = None) -> list[dict]:
    """The faults of a file, by default the book's. FaultsError if it cannot be read or is no list."""
    path = path or root() / "book" / "faults.yml"
    faults = read_yaml(path, FaultsError)
    if not isinstance(faults, list):
        raise FaultsError(f"{path.name} must be a list of faults, got {faults!r}")
    return faults


def check(faults: list[dict]) -> None:
    """FaultsError or PairsError unless every known fault is there once, well formed, and tells how it is measured."""
    for i, fault in enumerate(faults):
        number = fault.get("n", "?") if isinstance(fault, dict) else "?"
        where = f"faults.yml: fault {number} (entry {i + 1})"
        if not isinstance(fault, dict):
            raise FaultsError(f"{where}: expected keys and values, got {fault!r}")
        for key in REQUIRED:
            if key not in fault:
                raise FaultsError(f"{where}: missing key {key!r}")
        if unknown := sorted(set(fault) - {*REQUIRED, *OPTIONAL}):
            raise FaultsError(f"{where}: unknown key {unknown[0]!r}")
        if ("tests" in fault) == ("nothing" in fault):
            raise FaultsError(f"{where}: give either 'tests' or, with the reason, 'nothing'")
        for name, keys in (("used", ("experiment", "parameters")), ("ran", ("experiment", "where"))):
            if name in fault and (not isinstance(fault[name], dict) or set(fault[name]) != set(keys)):
                raise FaultsError(f"{where}.{name}: give {' and '.join(keys)}, got {fault[name]!r}")
        for j, test in enumerate(fault.get("tests", [])):
            if not isinstance(test, dict) or set(test) != {"words", "test"}:
                raise FaultsError(f"{where}.tests[{j}]: give words and test, got {test!r}")
            pairs.check(test["test"], f"{where}.tests[{j}]")
    there = [fault["n"] for fault in faults]
    if missing := sorted(set(NUMBERS) - set(there)):
        raise FaultsError(f"faults.yml: fault {missing[0]} is missing")
    if there != list(NUMBERS):
        raise FaultsError(f"faults.yml: faults must be there once and in order, got {there}")


def measure(faults: list[dict], records: list[dict], published: list[dict]) -> list[dict]:
    """One row for each fault, checked: its keys with the words filled in, and

    tests [{words, test, lines: [pairs.Line], commands (of what was not run)}], used ("parameter value in n runs"), ran
    (paths of records), state (one of STATES). published: rows of `scoreboard.flatten`. Raises FaultsError, PairsError.
    """
    check(faults)
    by_path = {record["path"]: record for record in records}
    by_key = {f"{row['section']}.{row['key']}": row for row in published}
    rows = []
    for fault in faults:
        where = f"faults.yml: fault {fault['n']}"
        words = {name: _filled(fault.get(name, ""), by_path, by_key, where) for name in WORDS}
        tests = [{**_tested(test["test"], records, fault.get("preset", "paper")),
                  "words": _filled(test["words"], by_path, by_key, where)} for test in fault.get("tests", [])]
        run = [bool(test["lines"]) for test in tests]
        state = "nothing to measure" if not run else "measured" if all(run) else "in part" if any(run) else "not run"
        rows.append({**fault, **words, "tests": tests, "state": state,
                     "used": _used(fault.get("used"), records), "ran": _ran(fault, records)})
    return rows


def _tested(test: dict, records: list[dict], preset: str) -> dict:
    lines = sorted(pairs.measure(test, records), key=lambda line: (len(line.size), -line.pairs))
    return {"test": test, "lines": lines, "commands": [] if lines else pairs.commands(test, preset)}


def _used(asked: dict | None, records: list[dict]) -> list[str]:
    """What the recorded runs took of each parameter: "last_layer normal in 4 runs, zero in 2"."""
    if not asked:
        return []
    own = [record["parameters"] for record in records if record["experiment"] == asked["experiment"]]
    found = []
    for name in asked["parameters"]:
        values = [str(parameters[name]) for parameters in own if name in parameters]
        counted = (f"{value} in {values.count(value)}" for value in dict.fromkeys(values))
        found.append(f"{name} {', '.join(counted)} recorded runs" if values else f"{name}: no recorded run")
    return found


def _ran(fault: dict, records: list[dict]) -> list[str]:
    """Paths of the records that `ran` asks for. FaultsError if there is none: then nothing is proven."""
    if "ran" not in fault:
        return []
    test = {"experiment": fault["ran"]["experiment"], "where": fault["ran"]["where"]}
    paths = [record["path"] for record in records if pairs.matches(test, record)]
    if not paths:
        raise FaultsError(f"faults.yml: fault {fault['n']}.ran: no recorded run of {test['experiment']} has "
                          f"{test['where']}")
    return paths


# ------------------------------------------------------------------------------------------ numbers in words
def _filled(text: str, by_path: dict, by_key: dict, where: str) -> str:
    """The text with every {kind words} replaced by what it names."""
    return REFERENCE.sub(lambda found: _named(found[1], found[2].split(), by_path, by_key, where), str(text))


def _named(kind: str, words: list[str], by_path: dict, by_key: dict, where: str) -> str:
    """What a reference {kind words} stands for, as text. FaultsError if it names nothing."""
    try:
        if kind == "preset":
            return _text(runs.presets(words[0])[words[1]][words[2]])
        if kind == "default":
            return _text(runs.parameters(words[0])[words[1]].default)
        if kind == "published":
            row = by_key[words[0]]
            return f"{row['published']:.{row['decimals']}f}".replace("-", "−")
        if kind == "run":
            record, name = by_path[words[0]], words[1]
            return _text(record["metrics"][name]["value"] if name in record["metrics"] else record["parameters"][name])
    except (KeyError, IndexError, runs.RunError):
        pass
    raise FaultsError(f"{where}: {{{kind} {' '.join(words)}}} names nothing") from None


def _text(value) -> str:
    """A value as a reader wants it: 0.00002, 200,000; a float to four digits."""
    if isinstance(value, float):
        return f"{float(f'{value:.4g}'):.12f}".rstrip("0").rstrip(".").replace("-", "−")
    return f"{value:,}" if type(value) is int else str(value)


def counts(rows: list[dict]) -> dict[str, int]:
    """How many faults are in which state."""
    return {state: sum(row["state"] == state for row in rows) for state in STATES}
