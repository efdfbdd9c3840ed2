"""The scoreboard: every published number of book/published.yml beside what the recorded runs obtained.

    frame = score(flatten(load()), runs.records())      # one row per published number

Pure functions. `flatten` turns the file into rows, `score` joins them with run records and judges:
    reproduced       full-size runs within the stated tolerance, and in the claimed order where both were run
    direction holds  not that, but in every claimed order that was run at the same size
    not reproduced   neither
    undecided        neither, of reduced runs: no order to check, or one that they leave open
    not run          no recorded run
"Order" asks that the 95 % interval of the difference excludes 0: Student's over the seeds that both sides were run
with, else of two independent means, by both sides' own intervals; without those it is open. Where only a
template's stand-in was measured, such as another Frechet distance for the FID, nothing but the order is judged, between
rows that the same stand-in measured; such a row is never "reproduced". The file explains its templates; lib/front.py
and lib/tables.py draw the rows.
"""
import math
import re
from collections import defaultdict
from pathlib import Path

import pandas as pd

from lib import BookError, intervals, read_yaml, root, runs
from lib.intervals import Interval
from lib.runs import HOUSEKEEPING, shortfall

VERDICTS = ("reproduced", "direction holds", "not reproduced", "undecided", "not run")
SECTION = ("title", "work", "source")
REQUIRED = ("published", "experiment", "metric", "unit", "tolerance")
OPTIONAL = ("where", "order", "resolution", "source", "pivot", "stand_in", "error")
STAND_IN = ("metric", "unit")
PATH = "path"                   # first of a `pivot`: the rest of the number's path goes down instead of a wildcard
RECORD = ("experiment", "run", "seed", "parameters", "metrics", "reduced", "command", "wall_time_s")
METRIC = ("value", "se", "n", "unit")


class ScoreboardError(BookError):
    """published.yml or a run record is malformed, or they do not fit; the message names file and key."""


def _require(mapping, keys, where: str) -> None:
    if not isinstance(mapping, dict):
        raise ScoreboardError(f"{where}: expected keys and values, got {mapping!r}")
    for key in keys:
        if key not in mapping:
            raise ScoreboardError(f"{where}: missing key {key!r}")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ------------------------------------------------------------------------------------------ published numbers
def load(path: Path | None = None) -> dict:
    """The published numbers as {section: {...}}, by default the book's. ScoreboardError if unreadable."""
    path = path or root() / "book" / "published.yml"
    published = read_yaml(path, ScoreboardError)
    _require(published, (), path.name)
    return published


def flatten(published: dict) -> list[dict]:
    """One row per published number, in the file's order, filled in by the first template that matches it.

    A row: section, title, work, key (path in the section), wildcards, source, published, half_width or None,
    decimals, experiment, metric, where, unit, stand_in ({metric, unit, maybe instrument} or None), tolerance, stated
    (the tolerance as written), pivot, rest (parts of the path, without the pivot's wildcards), claims [(key of the
    higher row, of the lower row, words)]. Raises ScoreboardError: missing or unknown key, number without a template or
    the reverse, unknown wildcard, or a claimed order that the published numbers themselves contradict.
    """
    rows = []
    for section, content in published.items():
        where = f"published.yml: {section}"
        _require(content, SECTION, where)
        templates = [_template(t, f"{where}.compare[{i}]") for i, t in enumerate(content.get("compare", []))]
        numbers = _numbers({name: value for name, value in content.items() if name != "compare"}, where)
        found = [_row(section, content, key, number, templates) for key, number in numbers]
        for i, template in enumerate(templates):
            group = [row for row in found if row["template"] == i]
            if not group:
                raise ScoreboardError(f"{template['name']}: {template['published']!r} matches no number")
            _claim_orders(group, template)
            decimals = max(row["decimals"] for row in group)             # yaml drops trailing zeros
            for row in group:
                row["decimals"] = decimals
        rows += found
    return rows


def _numbers(node: dict, where: str, path: tuple = ()):
    """(dotted path, number or [number, half-width]) of every number below the node; words are skipped."""
    for name, value in node.items():
        here = (*path, str(name))
        if isinstance(value, dict):
            yield from _numbers(value, where, here)
        elif isinstance(value, list) and not (len(value) == 2 and all(map(_is_number, value))):
            raise ScoreboardError(f"{where}.{'.'.join(here)}: expected [value, half-width], got {value}")
        elif isinstance(value, list) or _is_number(value):
            yield ".".join(here), value


def _template(template: dict, where: str) -> dict:
    """The template checked, `regex` for its pattern added, `order` as [(wildcard, higher, lower, words)]."""
    _require(template, REQUIRED, where)
    if unknown := sorted(set(template) - {*REQUIRED, *OPTIONAL}):
        raise ScoreboardError(f"{where}: unknown key {unknown[0]!r}")
    tolerance = template["tolerance"]
    if not (_is_number(tolerance) or re.fullmatch(r"\d+(\.\d+)?%", str(tolerance))):
        raise ScoreboardError(f"{where}: tolerance must be a number or a percentage, got {tolerance!r}")
    _check_stand_in(template, where)
    parts = re.split(r"\{(\w+)\}", str(template["published"]))
    texts = [template["metric"], *template.get("where", {}).values(), *template.get("stand_in", {}).values()]
    used = {name for text in texts for name in re.findall(r"\{(\w+)\}", str(text))}
    pivot = template.get("pivot", [])
    used |= {*template.get("order", {}), *(pivot[1:] if pivot[:1] == [PATH] else pivot)}
    if unknown := sorted(used - set(parts[1::2])):
        raise ScoreboardError(f"{where}: 'published' has no wildcard {unknown[0]!r}")
    order = []
    for name, claims in template.get("order", {}).items():
        for claim in str(claims).split(","):
            if not (match := re.fullmatch(r"\s*(\S+)\s*([<>])\s*(\S+)\s*", claim)):
                raise ScoreboardError(f"{where}: order must read 'a > b' or 'a < b', got {claim.strip()!r}")
            left, sign, right = match.groups()
            order.append((name, *((left, right) if sign == ">" else (right, left)), claim.strip()))
    regex = "".join(f"(?P<{part}>[^.]+?)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    return {**template, "name": where, "regex": re.compile(regex), "order": order}


def _check_stand_in(template: dict, where: str) -> None:
    """ScoreboardError unless the template's stand-in, if any, names a metric in a unit of its own."""
    if "stand_in" not in template:
        return
    stand_in = template["stand_in"]
    _require(stand_in, STAND_IN, f"{where}.stand_in")
    if unknown := sorted(set(stand_in) - {*STAND_IN, "instrument"}):
        raise ScoreboardError(f"{where}.stand_in: unknown key {unknown[0]!r}")
    if stand_in["unit"] == template["unit"]:
        raise ScoreboardError(f"{where}.stand_in: its unit must tell it from the metric's, both are "
                              f"{template['unit']!r}")


def _row(section: str, content: dict, key: str, number, templates: list[dict]) -> dict:
    matches = ((i, template, template["regex"].fullmatch(key)) for i, template in enumerate(templates))
    i, template, match = next((m for m in matches if m[2]), (None, None, None))
    if match is None:
        raise ScoreboardError(f"published.yml: {section}.{key}: no template of 'compare' matches this number")
    value, half_width = number if isinstance(number, list) else (number, None)
    wildcards, tolerance, pivot = match.groupdict(), template["tolerance"], tuple(template.get("pivot", ()))
    rest = str(template["published"]).format(**wildcards | dict.fromkeys(pivot, ""))
    return {
        "section": section, "title": content["title"], "work": content["work"], "key": key,
        "wildcards": wildcards, "template": i, "source": template.get("source", content["source"]),
        "published": float(value), "half_width": half_width, "decimals": len(str(value).partition(".")[2]),
        "experiment": template["experiment"], "metric": template["metric"].format(**wildcards),
        "where": _filled(template.get("where", {}), wildcards), "unit": template["unit"],
        "stand_in": _filled(template.get("stand_in", {}), wildcards) or None, "pivot": pivot,
        "error": template.get("error", ""),
        "rest": tuple(part for part in rest.split(".") if part.strip("_")), "claims": [], "stated": str(tolerance),
        "tolerance": tolerance if _is_number(tolerance) else abs(value) * float(tolerance[:-1]) / 100,
    }


def _filled(texts: dict, wildcards: dict) -> dict[str, str]:
    return {name: str(text).format(**wildcards) for name, text in texts.items()}


def _claim_orders(group: list[dict], template: dict) -> None:
    """Add the template's claims to the rows they are about, where the published numbers tell them apart."""
    by_wildcards = {tuple(row["wildcards"].items()): row for row in group}
    for name, higher, lower, words in template["order"]:
        if not {higher, lower} <= {row["wildcards"][name] for row in group}:
            raise ScoreboardError(f"{template['name']}: order {words!r} names a {name} that is not published")
        for row in (row for row in group if row["wildcards"][name] == higher):
            other = by_wildcards.get(tuple({**row["wildcards"], name: lower}.items()))
            if other is None or abs(other["published"] - row["published"]) <= template.get("resolution", 0):
                continue
            if other["published"] > row["published"]:
                raise ScoreboardError(f"{_at(row)}: the published numbers contradict the claim {words!r}")
            for claimant in (row, other):
                claimant["claims"].append((row["key"], other["key"], words))


# ------------------------------------------------------------------------------------------ joined with runs
def score(rows: list[dict], records: list[dict]) -> pd.DataFrame:
    """The rows beside what the records (parsed results.json files) obtained, judged; one line for each row.

    Columns added: obtained, by ("", or the stand-in's unit if `obtained` is of that), instrument, half (of the 95 %
    interval), n and of (what n counts: "seeds", "items" of one run, or "run" if nothing gives an interval), bar (the
    same in words), seeds (seed -> value), deviation (obtained - published; none of a stand-in), size (full or
    reduced: ...), seconds (runs.seconds of all), verdict, why, command, device, runs (paths).
    Raises ScoreboardError: a record without a key, metric or parameter that is asked for, a metric in another
    unit, or records that differ in more than the seed, or in how they measure, where one setting is meant.
    """
    for record in records:
        _require(record, RECORD, _name(record))
    rows = [{**row, **_measure(row, records)} for row in rows]
    by_key = {(row["section"], row["key"]): row for row in rows}
    for row in rows:
        row["verdict"], row["why"] = _judge(row, by_key)
    for row in rows:
        del row["at"]
    numbers = ("published", "half_width", "obtained", "half", "deviation", "tolerance", "seconds")
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, float)) if rows else pd.DataFrame()


def counts(frame: pd.DataFrame) -> dict[str, int]:
    """How many rows have each verdict."""
    return {verdict: int((frame["verdict"] == verdict).sum()) for verdict in VERDICTS}


def _path(record: dict) -> str:
    record = record if isinstance(record, dict) else {}
    return record.get("path") or f"{record.get('experiment', '?')}/{record.get('run', '?')}"


def _name(record: dict) -> str:
    return f"{_path(record)}/results.json"


def _at(row: dict) -> str:
    return f"published.yml: {row['section']}.{row['key']}"


def _measure(row: dict, records: list[dict]) -> dict:
    """What the matching records say: of those closest to the published size, the newest one of each seed."""
    sizes = defaultdict(list)
    for record in sorted((r for r in records if _matches(row, r)), key=lambda r: r.get("date", "")):
        asked = {name for name in row["where"] if name in record["parameters"]}       # is no reduction of this row
        sizes[tuple(text for text in record["reduced"] if text.partition(" ")[0] not in asked)].append(record)
    if not sizes:
        return {"obtained": None, "by": "", "instrument": None, "half": None, "bar": "", "n": 0, "of": "", "seeds": {},
                "deviation": None, "size": "", "seconds": None, "command": "", "device": "", "runs": (), "at": {}}
    at = {_size(reduced): _measured(row, found) for reduced, found in sizes.items()}
    reduced = min(sizes, key=lambda reduced: (*shortfall(reduced), -len(sizes[reduced])))
    return at[_size(reduced)] | {"size": _size(reduced), "at": at}


def _size(reduced: tuple[str, ...]) -> str:
    return f"reduced: {'; '.join(reduced)}" if reduced else "full"


def _measured(row: dict, found: list[dict]) -> dict:
    """What records of one size, the oldest first, say about the row."""
    _same_setting(row, found)
    chosen = list({record["seed"]: record for record in found}.values())
    by = _stand_in(row, chosen)
    metrics = [_metric(row, record, by) for record in chosen]
    seeds = {record["seed"]: metric["value"] for record, metric in zip(chosen, metrics, strict=True)}
    interval, of, bar = _interval(row, metrics)
    return {
        "obtained": interval.mean, "half": interval.half, "bar": bar, "n": interval.n, "of": of,
        "by": by["unit"] if by else "", "instrument": _instrument(row, chosen, by), "seeds": seeds,
        "deviation": None if by else interval.mean - row["published"],
        "command": "\n".join(record["command"] for record in chosen), "runs": tuple(map(_path, chosen)),
        "seconds": sum(map(runs.seconds, chosen)),
        "device": ", ".join(dict.fromkeys(record.get("device", {}).get("name", "") for record in chosen)),
    }


def _interval(row: dict, metrics: list[dict]) -> tuple[Interval, str, str]:
    """(interval of what the runs measured, what its n counts, words for what it is over)."""
    if len(metrics) > 1:
        over = intervals.of_values([metric["value"] for metric in metrics])
        return over, "seeds", f"95 % interval over {over.n} seeds"
    own = intervals.of_metric(metrics[0])
    if own.half is None:
        return Interval(own.mean, None, 1), "run", "one run, no interval"
    return own, "items", f"95 % interval {row['error'] or 'over the items'} of one run, n = {own.n:,}"


def _matches(row: dict, record: dict) -> bool:
    if record["experiment"] != row["experiment"]:
        return False
    known = runs.known(record)
    for name in row["where"]:
        if name not in known:
            names = ", ".join(sorted(known))
            raise ScoreboardError(f"{_at(row)}: 'where' names {name!r}, not a parameter of {_name(record)}: {names}")
    return all(_same(known[name], text) for name, text in row["where"].items())


def _same_setting(row: dict, records: list[dict]) -> None:
    """ScoreboardError unless the records differ in the seed, and where they ran or started from, only."""
    first = records[0]
    for record in records[1:]:
        apart = {"seed", record.get("started_from"), *HOUSEKEEPING}
        for name, value in record["parameters"].items():
            if name not in apart and value != first["parameters"].get(name):
                raise ScoreboardError(f"{_at(row)}: {_name(first)} and {_name(record)} differ in {name}: name it under "
                                      "'where'")


def _same(value, text: str) -> bool:
    try:
        return str(value) == text or float(value) == float(text)
    except ValueError:
        return False


def _stand_in(row: dict, records: list[dict]) -> dict | None:
    """None if the row's own metric was measured, else its stand-in. ScoreboardError if only some records have it."""
    own = [record for record in records if row["metric"] in record["metrics"]]
    if own and len(own) < len(records):
        other = next(record for record in records if record not in own)
        raise ScoreboardError(f"{_at(row)}: {_name(own[0])} has {row['metric']!r} and {_name(other)} has not: record "
                              "that one again with it, or remove it")
    return None if own else row["stand_in"]


def _instrument(row: dict, records: list[dict], by: dict | None) -> float | None:
    """The value of the metric that tells the stand-in's instruments apart. ScoreboardError unless it is one."""
    if not by or "instrument" not in by:
        return None
    values = {_of(record, by["instrument"], row)["value"]: _name(record) for record in reversed(records)}
    if len(values) > 1:
        one, other = sorted(values.values())[:2]
        raise ScoreboardError(f"{_at(row)}: {one} and {other} differ in {by['instrument']}, so their {by['unit']} are "
                              "not on one scale: record them again on one machine")
    return next(iter(values))


def _metric(row: dict, record: dict, by: dict | None) -> dict:
    """What the record holds for the row, or `by` its stand-in."""
    name, unit = (by["metric"], by["unit"]) if by else (row["metric"], row["unit"])
    metric = _of(record, name, row)
    if metric["unit"] != unit or not _is_number(metric["value"]):
        raise ScoreboardError(f"{_name(record)}: metric {name!r} is {metric['value']} in {metric['unit']!r}, "
                              f"{_asker(row)} asks for a number in {unit!r}")
    return metric


def _asker(row: dict) -> str:
    return f"{row['section']}.{row['key']} of published.yml"


def _of(record: dict, name: str, row: dict) -> dict:
    """The record's metric of that name, for the row."""
    if name not in record["metrics"]:
        raise ScoreboardError(f"{_name(record)}: no metric {name!r}, which {_asker(row)} asks for; there are "
                              f"{', '.join(sorted(record['metrics']))}")
    _require(record["metrics"][name], METRIC, f"{_name(record)}: metric {name!r}")
    return record["metrics"][name]


# ------------------------------------------------------------------------------------------ verdicts
def _judge(row: dict, by_key: dict) -> tuple[str, str]:
    """(verdict, one short phrase why)."""
    if row["obtained"] is None:
        return "not run", "no recorded run"
    holds, fails, open_ = orders = _orders(row, by_key)
    if row["by"]:
        verdict, why = _direction(*orders, row["size"]) if any(orders) else ("undecided", "no order to check")
        return verdict, f"by {row['by']}, which is not comparable with {row['unit']}: {why}"
    off = f"off by {abs(row['deviation']):.3g}"
    if row["size"] == "full":
        off += f", tolerance {row['tolerance']:.3g}"
        if abs(row["deviation"]) <= row["tolerance"] and not fails and not open_:
            return "reproduced", off
    verdict, why = _direction(*orders, row["size"])
    return verdict, f"{why}; {off}" if why else off


def _orders(row: dict, by_key: dict) -> tuple[list, list, list]:
    """The row's claims that (hold, fail, are open), of those whose two sides were measured alike at the row's size.

    A claim is (words with the difference in the claimed direction, how that was taken).
    """
    holds, fails, open_ = [], [], []
    for high, low, words in row["claims"]:
        high, low = (by_key[row["section"], side]["at"].get(row["size"]) for side in (high, low))
        if not (high and low and all(high[name] == low[name] for name in ("by", "instrument"))):
            continue
        difference, how = _difference(high, low)
        found = holds if difference.low > 0 else fails if difference.high < 0 else open_
        found.append((f"{words}: {difference.text()}", how))
    return holds, fails, open_


def _direction(holds: list, fails: list, open_: list, size: str) -> tuple[str, str]:
    """(verdict, why) by the claims alone."""
    without = "not reproduced" if size == "full" else "undecided"
    if fails:
        return "not reproduced", f"against {_listed(fails)}"
    if open_:
        return without, f"open: {_listed(open_)}"
    if holds:
        return "direction holds", _listed(holds)
    return without, "" if size == "full" else "only at reduced size, no order to check"


def _listed(claims: list[tuple[str, str]]) -> str:
    """The claims in words; how the differences were taken is said once if it is the same."""
    ways = dict.fromkeys(how for _, how in claims)
    return "; ".join(f"{', '.join(words for words, how in claims if how == way)} ({way})" for way in ways)


def _difference(high: dict, low: dict) -> tuple[Interval, str]:
    """(`high` less `low`, how that was taken): seed by seed if two or more are shared, else as of independent means.

    The latter's half-width is the root of the sum of both squared, and None if either is unknown.
    """
    paired = intervals.of_pairs(high["seeds"], low["seeds"])
    if paired and paired.half is not None:
        return paired, f"{paired.n} seeds"
    half = None if None in (high["half"], low["half"]) else math.hypot(high["half"], low["half"])
    how = "unpaired" if max(len(high["seeds"]), len(low["seeds"])) > 1 else "one run each"
    return Interval(high["obtained"] - low["obtained"], half, 1), how + ", no interval" * (half is None)
