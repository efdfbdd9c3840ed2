"""The rows of lib/claims.py and lib/faults.py as HTML tables: they scroll where it is narrow and need no script.

A verdict is a symbol and a word, never only a colour. A number is shown to the second digit of its interval's
half-width, with what its n counts and the size of the runs; the runs link to the page of recorded runs.
"""
import math
from html import escape

from lib import claims, faults, recorded, runs
from lib.pairs import Line, compares

SYMBOLS = dict(zip(claims.VERDICTS, "✓✗?○", strict=True)) | dict(zip(faults.STATES, "●◐○–", strict=True))
MANY = 3                # so many reductions stand in the open


# ------------------------------------------------------------------------------------------ claims
def of_claims(rows: list[dict]) -> str:
    """A line for each claim: its words, the original's evidence, ours, the verdict."""
    return _table({"claim": 25, "the original's evidence": 22, "obtained here": 37, "verdict": 16}, map(_claim, rows))


def counted(rows: list[dict]) -> str:
    """How many claims of each work have which verdict."""
    return _by_work(rows, claims.counts, dict.fromkeys(claims.VERDICTS, 16) | {"claims": 11})


def _claim(row: dict) -> list[str]:
    test = row["test"]
    differ = len({own["verdict"] for own in row["lines"]}) > 1
    sizes = [own["line"].size for own in row["lines"]]
    ours = [_line(own["line"], test, sizes, own["effect"], own["verdict"] * differ) for own in row["lines"]]
    side = "above" if row["claimed"] == "higher" else "below"
    asked = _small(f"{_difference(test, row['lines'])}, claimed {side} zero")
    note = f"<br>{_small(row['note'])}" if row["note"] else ""
    return [f'<span id="{row["id"]}">{escape(row["claim"])}</span>{note}', _published(row),
            "".join([asked, *(f'<div style="margin-top:.5em">{one}</div>' for one in [*ours, _commands(row)])]),
            f"{word(row['verdict'])}<br>{_small(row['why'])}"]


def _published(row: dict) -> str:
    if not row["evidence"]:
        return escape(row["words"])
    unit = row["evidence"][0][0]["unit"]
    source = ", ".join(dict.fromkeys(one["source"] for pair in row["evidence"] for one in pair))
    if len(row["evidence"]) == 1:
        first, second = (_number(one["published"], one["decimals"]) for one in row["evidence"][0])
        text = f"{first} against {second}"
    else:
        decimals = max(one["decimals"] for pair in row["evidence"] for one in pair)
        apart = sorted(first["published"] - second["published"] for first, second in row["evidence"])
        low, high = (_signed(end, decimals) for end in (apart[0], apart[-1]))
        text = f"{row['holds']} of {len(apart)} pairs, differences {low} to {high}"
    return f"{text}<br>{_small(f'{unit}; {source}')}" + (f"<br>{_small(row['words'])}" if row["words"] else "")


def _difference(test: dict, lines: list[dict]) -> str:
    """What is taken from what, in words."""
    stands_in = bool(lines) and lines[0]["line"].stands_in
    asked = test | test["stand_in"] if stands_in else test
    if "between" in test:
        (name, (first, second)), = test["between"].items()
        return f"{asked['metric'].replace('_', ' ')}: {name.replace('_', ' ')} {first} less {second}"
    first, second = asked["metrics"]
    return f"{first.replace('_', ' ')} less {second.replace('_', ' ')}"


# ------------------------------------------------------------------------------------------ faults
def of_faults(rows: list[dict]) -> str:
    """A line for each fault: what it is, the original's way and this book's, what it changes."""
    columns = {"": 4, "fault": 20, "the original's way, and what is done here": 28, "what it changes": 48}
    return _table(columns, map(_fault, rows))


def states(rows: list[dict]) -> str:
    """How many faults of each work are in which state."""
    return _by_work(rows, faults.counts, dict(zip(faults.STATES, (15, 13, 13, 24), strict=True)) | {"faults": 10})


def _fault(row: dict) -> list[str]:
    ways = [f"<strong>There:</strong> {_code(row['original'])}", f"<strong>Here:</strong> {_code(row['here'])}",
            *map(_small, row["used"])]
    found = [_small(row["nothing"])] if row["nothing"] else []
    found += [_links(row["ran"])] if row["ran"] else []
    for test in row["tests"]:
        sizes = [line.size for line in test["lines"]]
        lines = [_line(line, test["test"], sizes) for line in test["lines"]] or [f"{word('not run')} {_commands(test)}"]
        found.append(f"<em>{_code(test['words'])}</em><br>" + "<br>".join(lines))
    return [str(row["n"]), f"{escape(row['fault'])}<br>{_small(row['kind'])}<br>{word(row['state'])}",
            "<br>".join(ways), "".join(f'<div style="margin-bottom:.6em">{one}</div>' for one in found)]


# ------------------------------------------------------------------------------------------ what both show
def _by_work(rows: list[dict], counts, widths: dict[str, int]) -> str:
    """How many rows of each work, and of all, have which verdict or state; the last column is their sum."""
    works = [*dict.fromkeys(row["work"] for row in rows)]
    groups = [(work, [row for row in rows if row["work"] == work]) for work in works] + [("all", rows)]
    lines = ([work.replace("-", " "), *map(str, counts(own).values()), str(len(own))] for work, own in groups)
    heads = {word(name) if name in SYMBOLS else name: width for name, width in widths.items()}
    return _table({"": 25} | heads, lines)


def _line(line: Line, test: dict, sizes: list[tuple], effect=None, verdict: str = "") -> str:
    """One size: the number and its unit, its verdict; what n counts, the effect size, the size, the runs."""
    text = _mean(line).replace(" ", "\N{NO-BREAK SPACE}")
    signed = f"+{text}" if compares(test) and line.interval.mean > 0 else text
    counted = _n(line, compares(test)) + (f", d<sub>z</sub> = {_number(effect[1], 1)}" if effect else "")
    unit = escape(line.unit) + (", a stand-in" if line.stands_in else "")
    setting = f"; {escape(line.setting)}" if line.setting else ""
    return (f"<strong>{signed}</strong> {_small(unit, False)}{f' {word(verdict)}' if verdict else ''}<br>"
            f"{_small(counted + setting, False)} · {_links(line.runs)}<br>{_size(line, test, sizes)}")


def _mean(line: Line) -> str:
    """The number, to the second digit of its half-width; to three digits where there is no interval."""
    digits = 4
    if line.interval.half is None and line.interval.mean:
        digits = max(0, 2 - math.floor(math.log10(abs(line.interval.mean))))
    return line.interval.text(digits)


def _n(line: Line, compared: bool) -> str:
    """What the number rests on."""
    one = "pair" if compared else "run"
    if line.pairs == 1:
        own = f"± of the runs' own errors (n={line.interval.n:,})"
        return f"one {one}, {own if line.of == 'items' else 'no error known'}"
    more = f" ({line.pairs} {one}s)" if line.pairs != line.interval.n else ""
    low, high = (f"{end:.3g}".replace("-", "−") for end in (min(line.values), max(line.values)))
    return f"n = {line.interval.n} {line.of}{more}" + (f", {low} to {high}" if line.of == "settings" else "")


def _size(line: Line, test: dict, sizes: list[tuple]) -> str:
    """The reductions; of many, in the open only what tells the line best from the other `sizes` beside it."""
    if not line.size:
        return _small("published size" if "paper" in runs.presets(test["experiment"]) else "a size of the book's own")
    if len(line.size) <= MANY:
        return _small(f"reduced: {'; '.join(line.size)}")
    shared = {text: sum(text in size for size in sizes) for text in line.size}
    told = [text for text in sorted(line.size, key=shared.get) if shared[text] < len(sizes)]
    told = told[:1] if told and shared[told[0]] == 1 else told[:2]
    return _details(f"reduced in {len(line.size)} ways{': ' * bool(told)}{'; '.join(told)}", map(_small, line.size))


def _links(paths) -> str:
    """The runs, each linked to its place on the page of recorded runs."""
    links = [f'<a href="{recorded.link(path)}">{escape(path)}</a>' for path in paths]
    return _details("1 run" if len(links) == 1 else f"{len(links)} runs", links)


def _commands(row: dict) -> str:
    lines = [f"<code>{escape(command)}</code>" for command in row["commands"]]
    return _details("command" if len(lines) == 1 else "commands", lines) if lines else ""


def word(verdict: str) -> str:
    """A verdict, or a state, as symbol and word."""
    return f'<span style="white-space:nowrap">{SYMBOLS[verdict]} {verdict}</span>'


def _number(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}".replace("-", "−")


def _signed(value: float, decimals: int) -> str:
    return f"{value:+.{decimals}f}".replace("-", "−")


def _code(text: str) -> str:
    """Words between backquotes as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _small(text: str, plain: bool = True) -> str:
    return f'<span style="font-size:.93em;opacity:.8">{escape(text) if plain else text}</span>'


def _details(summary: str, lines) -> str:
    inside = f'<div style="font-size:.93em;overflow-wrap:anywhere">{"<br>".join(lines)}</div>'
    return (f'<details style="display:inline-block;margin:0;vertical-align:top"><summary>{_small(summary)}'
            f"</summary>{inside}</details>")


def _table(columns: dict[str, int], lines) -> str:
    """Headers with their widths in per cent, and lines of cells (all HTML); the first cell of a line is its header."""
    top = "".join(f'<th scope="col" style="width:{width}%;text-align:left">{name}</th>'
                  for name, width in columns.items())
    cell = 'style="text-align:left;vertical-align:top;font-weight:normal"'
    body = "".join(f'<tr><th scope="row" {cell}>{first}</th>{"".join(f"<td {cell}>{one}</td>" for one in rest)}</tr>'
                   for first, *rest in lines)
    return (f'<div style="overflow-x:auto"><table class="dataframe table" style="min-width:50em;table-layout:fixed;'
            f'font-size:.85em;line-height:1.4">'
            f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>")
