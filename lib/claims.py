"""What the four works claim, and how paired runs decide it: book/claims.yml beside the records of book/results.

    rows = judge(load(), scoreboard.flatten(scoreboard.load()), runs.records())      # one row for each claim

Pure functions. A claim is decided by the differences of pairs of runs that are alike in all but one thing, and of one
size (lib/pairs.py), and by their 95 % interval:
    supported     it lies on the claimed side of zero
    contradicted  it lies on the other side
    undecided     it contains zero; or there is one pair only, which cannot tell what another seed would do
    not run       there is no such pair
A claim has a line for each size that was run. Its verdict is that of the first: the one with several pairs that is
closest to the published size, of these the one with the most pairs. lib/evidence.py draws the rows.
"""
import re
from pathlib import Path

from lib import BookError, intervals, pairs, read_yaml, root

VERDICTS = ("supported", "contradicted", "undecided", "not run")
REQUIRED = ("id", "name", "work", "claim", "claimed", "test")
OPTIONAL = ("published", "words", "note", "preset")
DIRECTIONS = {"higher": 1, "lower": -1}


class ClaimsError(BookError):
    """claims.yml is malformed or does not fit what is published; the message names the file and the key."""


# ------------------------------------------------------------------------------------------------ the file
def load(path: Path | None = None) -> list[dict]:
    """The claims of a file, by default the book's. ClaimsError if it cannot be read or is no list of claims."""
    path = path or root() / "book" / "claims.yml"
    claims = read_yaml(path, ClaimsError)
    if not isinstance(claims, list) or not claims:
        raise ClaimsError(f"{path.name} must be a list of claims, got {claims!r}")
    return claims


def check(claims: list[dict], published: list[dict]) -> None:
    """ClaimsError or PairsError unless every claim is well formed and its evidence is there.

    published: rows of `scoreboard.flatten`. A claim that most of the published pairs speak against is refused.
    """
    seen = set()
    for i, claim in enumerate(claims):
        where = f"claims.yml: {claim.get('id', f'number {i + 1}') if isinstance(claim, dict) else f'number {i + 1}'}"
        if not isinstance(claim, dict):
            raise ClaimsError(f"{where}: expected keys and values, got {claim!r}")
        for key in REQUIRED:
            if key not in claim:
                raise ClaimsError(f"{where}: missing key {key!r}")
        if unknown := sorted(set(claim) - {*REQUIRED, *OPTIONAL}):
            raise ClaimsError(f"{where}: unknown key {unknown[0]!r}")
        if claim["id"] in seen:
            raise ClaimsError(f"{where}: this id is there twice")
        seen.add(claim["id"])
        if claim["claimed"] not in DIRECTIONS:
            raise ClaimsError(f"{where}: 'claimed' must be higher or lower (the first side), got {claim['claimed']!r}")
        if "published" not in claim and "words" not in claim:
            raise ClaimsError(f"{where}: give the original's evidence, 'published' or 'words'")
        pairs.check(claim["test"], f"{where}.test")
        if not pairs.compares(claim["test"]):
            raise ClaimsError(f"{where}.test: a claim compares, give 'between' or 'metrics'")
        found = evidence(claim, published)
        if found and 2 * sum(_holds(claim, pair) for pair in found) < len(found):
            raise ClaimsError(f"{where}: most of the published numbers contradict the claim")


def evidence(claim: dict, published: list[dict]) -> list[tuple[dict, dict]]:
    """The published pairs (first side, second side) that a claim's `published: {first, second}` names.

    Both are keys of published.yml, section and path, or equally long lists of them; a * stands for the same characters,
    without a dot, in both. Raises ClaimsError if one names nothing.
    """
    if "published" not in claim:
        return []
    where, sides = f"claims.yml: {claim['id']}.published", claim["published"]
    if not isinstance(sides, dict) or set(sides) != {"first", "second"}:
        raise ClaimsError(f"{where}: give first and second, keys of published.yml, got {sides!r}")
    listed = [side if isinstance(side, list) else [side] for side in (sides["first"], sides["second"])]
    if len(listed[0]) != len(listed[1]):
        raise ClaimsError(f"{where}: first and second are lists of different length")
    return [pair for patterns in zip(*listed, strict=True) for pair in _paired(*patterns, published, where)]


def _paired(first: str, second: str, published: list[dict], where: str) -> list[tuple[dict, dict]]:
    """The published numbers of two patterns, paired by what the stars stand for."""
    found = [_matching(pattern, published) for pattern in (first, second)]
    for pattern, numbers in zip((first, second), found, strict=True):
        if not numbers:
            raise ClaimsError(f"{where}: {pattern!r} names no number of published.yml")
    if alone := set(found[0]) ^ set(found[1]):
        raise ClaimsError(f"{where}: * = {', '.join(min(alone))} is there on one side only")
    return [(number, found[1][stars]) for stars, number in found[0].items()]


def _matching(pattern: str, published: list[dict]) -> dict[tuple, dict]:
    regex = re.compile("([^.]+?)".join(map(re.escape, str(pattern).split("*"))))
    matches = ((regex.fullmatch(f"{row['section']}.{row['key']}"), row) for row in published)
    return {match.groups(): row for match, row in matches if match}


def _holds(claim: dict, pair: tuple[dict, dict]) -> bool:
    return (pair[0]["published"] - pair[1]["published"]) * DIRECTIONS[claim["claimed"]] > 0


# ------------------------------------------------------------------------------------------------ the verdicts
def judge(claims: list[dict], published: list[dict], records: list[dict]) -> list[dict]:
    """One row for each claim, checked: the claim's keys, and

    evidence [(row, row)], holds (how many of them are as claimed), lines [{line: pairs.Line, verdict, why, effect}],
    verdict, why, effect (low, mean, high in standard deviations of the differences, positive on the claimed side; None
    of a single pair), commands (that run what was not). Raises ClaimsError or PairsError.
    """
    check(claims, published)
    rows = []
    for claim in claims:
        found = evidence(claim, published)
        lines = [_judged(claim, line) for line in pairs.measure(claim["test"], records)]
        head = lines[0] if lines else {"verdict": "not run", "why": "no pair of recorded runs", "effect": None}
        rows.append({**dict.fromkeys(OPTIONAL, ""), **claim, "evidence": found,
                     "holds": sum(_holds(claim, pair) for pair in found), "lines": lines,
                     "commands": [] if lines else pairs.commands(claim["test"], claim.get("preset", "paper")),
                     **{name: head[name] for name in ("verdict", "why", "effect")}})
    return rows


def _judged(claim: dict, line: pairs.Line) -> dict:
    sign = DIRECTIONS[claim["claimed"]]
    verdict, why = decide(line, sign)
    return {"line": line, "verdict": verdict, "why": why, "effect": standardised(line, sign)}


def decide(line: pairs.Line, sign: int) -> tuple[str, str]:
    """(verdict, why if it is undecided) of a line; sign: 1 if its difference is claimed to be positive, else -1."""
    low, high = sorted((sign * line.interval.low, sign * line.interval.high))
    if line.pairs == 1:
        side = "on the claimed side" if sign * line.interval.mean > 0 else "on the other side"
        return "undecided", f"one pair only, {side if line.interval.mean else 'no difference'}"
    if low > 0:
        return "supported", ""
    if high < 0:
        return "contradicted", ""
    return "undecided", "the interval contains zero"


def standardised(line: pairs.Line, sign: int) -> tuple[float, float, float] | None:
    """(low, Cohen's d_z, high), the claimed side positive; see `intervals.of_effect`."""
    effect = intervals.of_effect(line.interval)
    return tuple(sign * end for end in effect[::sign]) if effect else None


def counts(rows: list[dict]) -> dict[str, int]:
    """How many claims have each verdict."""
    return {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
