"""Scoreboard rows as HTML tables for notebooks and pages: they scroll where it is narrow and need no script.

A verdict is a symbol and a word, never only a colour. `score` in lib/scoreboard.py makes the rows.
"""
import math
from html import escape

import pandas as pd

from lib.scoreboard import PATH, VERDICTS, counts

SYMBOLS = dict(zip(VERDICTS, "✓↗✗○", strict=True))
COLUMNS = ("", "published", "obtained", "size", "verdict", "why")


def scoreboard(frame: pd.DataFrame) -> str:
    """The rows, a table per section, headed if there are several; those of a `pivot` become one table.

    A row measured by a stand-in shows its unit before the number.
    """
    parts, several = [], frame["title"].nunique() > 1
    for title, section in frame.groupby("title", sort=False):
        parts.append(f"<p><strong>{escape(title)}</strong></p>" if several else "")
        own = section["template"].where(section["pivot"].map(lambda names: names[:1] != (PATH,)), -1)
        for pivot, rows in section.groupby(["pivot", own], sort=False):
            parts.append(_pivoted(rows.to_dict("records"), pivot[0]) if pivot[0] else "")
        plain = section[section["pivot"].map(len) == 0].to_dict("records")
        parts.append(_table(COLUMNS, map(_plain, plain)) if plain else "")
    return "".join(parts)


def summary(frame: pd.DataFrame) -> str:
    """How many numbers of each work have which verdict."""
    groups = [*frame.groupby("work", sort=False), ("all", frame)]
    lines = ([work.replace("-", " "), *counts(rows).values(), len(rows)] for work, rows in groups)
    return _table(("", *map(_verdict, VERDICTS), "numbers"), lines)


def _plain(row: dict) -> list[str]:
    obtained = _obtained(row) + (f"<br>{_note(row['bar'])}" if row["bar"] else "")
    why = escape(row["why"]) + (_details("command", [escape(row["command"])]) if row["command"] else "")
    return [f"{_label(row)}<br>{_note(row['unit'])}", f"{_published(row)}<br>{_note(row['source'])}", obtained,
            escape(row["size"]), _verdict(row["verdict"]), why]


def _pivoted(rows: list[dict], names: tuple[str, ...]) -> str:
    """A cell per row with published, obtained and verdict; below the table why, and how each was run."""
    parts = zip(*(row["key"].split(".") for row in rows), strict=False)
    shared = [part[0] for part in parts if len(set(part)) == 1]
    cells = {(_line(row, shared), *(row["wildcards"][name] for name in names[1:])): row for row in rows}
    down = dict.fromkeys(key[0] for key in cells)
    across = dict.fromkeys(key[1:] for key in cells)
    first = "" if names[0] == PATH else names[0]
    head = [first, *("<br>".join(map(" ".join, zip(names[1:], key, strict=True))) for key in across)]
    lines = ([line, *(_cell(cells.get((line, *column))) for column in across)] for line in down)
    sizes = {row["size"] for row in rows if row["size"]}
    said = next(iter(sizes)) if len(sizes) == 1 and sizes != {"full"} else ""
    run = [f"<strong>{_label(row)}</strong>: {escape('; '.join((row['why'], *{row['size']} - {said}, row['bar'])))}<br>"
           f"<code>{escape(row['command'])}</code>" for row in rows if row["command"]]
    return _table(head, lines, _caption(rows, shared, said)) + (_details("why, and the commands", run) if run else "")


def _line(row: dict, shared: list[str]) -> str:
    """The header of a row's line: its value of the pivot's first wildcard, or what its path does not share."""
    first = row["pivot"][0]
    return _words_of(part for part in row["rest"] if part not in shared) if first == PATH else row["wildcards"][first]


def _caption(rows: list[dict], shared: list[str], size: str) -> str:
    """What the cells of a table hold, what stands in for what, and the size, if it is one, of what was run."""
    unit, source, tolerance = (", ".join(dict.fromkeys(row[name] for row in rows)) for name in
                               ("unit", "source", "stated"))
    name = (" / ".join(shared) or rows[0]["metric"]).replace("_", " ")
    name = unit if name.lower() == unit.lower() else f"{name}, {unit}"
    by = ", ".join(dict.fromkeys(row["by"] for row in rows if row["by"]))
    instead = f"{by} stands in where no {unit} was measured: another quantity, of which only the order is judged"
    text = f"{name}: published ({source}), obtained, verdict; tolerance {tolerance}"
    return ". ".join([text, *[instead] * bool(by), *[size.replace("reduced", "Reduced", 1)] * bool(size)])


def _cell(row: dict | None) -> str:
    if not row:
        return ""
    size = f" {_note('reduced')}" if row["size"] not in ("", "full") else ""
    return "<br>".join((_published(row), _obtained(row) + size, _words(row["verdict"])))


def _label(row: dict) -> str:
    return _words_of(row["key"].split("."))


def _words_of(parts) -> str:
    return escape(" / ".join(parts).replace("_", " "))


def _published(row: dict) -> str:
    return _number(row["published"], row["decimals"], row["half_width"])


def _obtained(row: dict) -> str:
    if pd.isna(row["obtained"]):
        return "–"
    if not row["by"]:
        return _number(row["obtained"], min(row["decimals"] + 1, 4), row["se"])
    decimals = max(0, min(4, 1 - math.floor(math.log10(row["se"])))) if row["se"] > 0 else 2
    return f"{escape(row['by'])}\N{NO-BREAK SPACE}{_number(row['obtained'], decimals, row['se'])}"


def _number(value: float, decimals: int, error: float | None) -> str:
    text = f"{value:.{decimals}f}".replace("-", "−")
    return text if pd.isna(error) else f"{text}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{error:.{decimals}f}"


def _words(verdict: str) -> str:
    return f"{SYMBOLS[verdict]} {verdict}"


def _verdict(verdict: str) -> str:
    return f'<span style="white-space:nowrap">{_words(verdict)}</span>'


def _note(words: str) -> str:
    return f'<small style="font-weight:normal">{escape(words)}</small>'


def _details(summary: str, lines: list[str]) -> str:
    return f'<details style="margin-bottom:1em"><summary>{summary}</summary>{"<br>".join(lines)}</details>'


def _table(head, lines, caption: str = "") -> str:
    """Header cells and lines of cells (all HTML); the first cell of a line is its header."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
                   for first, *rest in lines)
    caption = f"<p>{_note(caption)}</p>" if caption else ""
    return (f'{caption}<div style="overflow-x:auto"><table class="dataframe table" style="min-width:40em">'
            f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>")
