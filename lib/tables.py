"""Scoreboard rows as HTML tables for the chapters: they scroll where it is narrow and need no script.

A verdict is a symbol and a word, never only a colour; a number obtained is shown to the second digit of its 95 %
interval's half-width, and words say what the interval is over. `score` in lib/scoreboard.py makes the rows;
lib/front.py draws all of them as one table.
"""
from html import escape

import pandas as pd

from lib.intervals import Interval
from lib.scoreboard import PATH, VERDICTS, counts

SYMBOLS = dict(zip(VERDICTS, "✓↗✗?○", strict=True))
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
    return _table(("", *map(_words, VERDICTS), "numbers"), lines)


def _plain(row: dict) -> list[str]:
    said = obtained(row) + (f"<br>{note(row['bar'])}" if row["bar"] else "")
    why = escape(row["why"]) + (_details("command", [escape(row["command"])]) if row["command"] else "")
    return [f"{label(row)}<br>{note(row['unit'])}", f"{published(row)}<br>{note(row['source'])}", said,
            escape(row["size"]), verdict(row["verdict"]), why]


def _pivoted(rows: list[dict], names: tuple[str, ...]) -> str:
    """A cell per row with published, obtained and verdict; below the table why, and how each was run."""
    parts = zip(*(row["key"].split(".") for row in rows), strict=False)
    shared = [part[0] for part in parts if len(set(part)) == 1]
    cells = {(_line(row, shared), *(row["wildcards"][name] for name in names[1:])): row for row in rows}
    down = dict.fromkeys(key[0] for key in cells)
    across = dict.fromkeys(key[1:] for key in cells)
    first = "" if names[0] == PATH else names[0]
    head = [first, *("<br>".join(map(" ".join, zip(names[1:], key, strict=True))) for key in across)]
    said = {name: _one(row[name] for row in rows if row[name]) for name in ("size", "bar")}
    lines = ([line, *(_cell(cells.get((line, *column)), said["bar"]) for column in across)] for line in down)
    once = {"full", *said.values()}
    run = [f"<strong>{label(row)}</strong>: "
           f"{escape('; '.join((row['why'], *(row[name] for name in said if row[name] not in once))))}<br>"
           f"<code>{escape(row['command'])}</code>" for row in rows if row["command"]]
    return _table(head, lines, _caption(rows, shared, **said)) + (_details("why, and the commands", run) if run else "")


def _one(words) -> str:
    """The words if they are the same everywhere, else none."""
    different = set(words)
    return different.pop() if len(different) == 1 else ""


def _line(row: dict, shared: list[str]) -> str:
    """The header of a row's line: its value of the pivot's first wildcard, or what its path does not share."""
    first = row["pivot"][0]
    return _words_of(part for part in row["rest"] if part not in shared) if first == PATH else row["wildcards"][first]


def _caption(rows: list[dict], shared: list[str], size: str, bar: str) -> str:
    """What the cells of a table hold, what stands in for what; of what was run the size and the interval, if one."""
    unit, source, tolerance = (", ".join(dict.fromkeys(row[name] for row in rows)) for name in
                               ("unit", "source", "stated"))
    name = (" / ".join(shared) or rows[0]["metric"]).replace("_", " ")
    name = unit if name.lower() == unit.lower() else f"{name}, {unit}"
    by = ", ".join(dict.fromkeys(row["by"] for row in rows if row["by"]))
    instead = f"{by} stands in where no {unit} was measured: another quantity, of which only the order is judged"
    text = f"{name}: published ({source}), obtained, verdict; tolerance {tolerance}"
    over = f"Obtained ± its {bar}" if bar and not bar.startswith("one run") else bar.capitalize()
    size = size.replace("reduced", "Reduced", 1) if size != "full" else ""
    return ". ".join(filter(None, (text, over, instead if by else "", size)))


def _cell(row: dict | None, bar: str) -> str:
    """Published, obtained and verdict; with n unless the caption says `bar`, what the interval is over."""
    if not row:
        return ""
    small = [counted(row)] * bool(row["bar"] and not bar) + ["reduced"] * (row["size"] not in ("", "full"))
    return "<br>".join((published(row), obtained(row) + (f" {note(', '.join(small))}" if small else ""),
                        _words(row["verdict"])))


def label(row: dict) -> str:
    """The number's path in words."""
    return _words_of(row["key"].split("."))


def _words_of(parts) -> str:
    return escape(" / ".join(parts).replace("_", " "))


def published(row: dict) -> str:
    """The published number with its digits and, where one is published, its error bar."""
    text = f"{row['published']:.{row['decimals']}f}"
    error = "" if pd.isna(row["half_width"]) else f" ± {row['half_width']:.{row['decimals']}f}"
    return _unbroken(text.replace("-", "−") + error)


def obtained(row: dict) -> str:
    """The number obtained ± its half-width, after the unit of what stands in; a dash where there is none."""
    if pd.isna(row["obtained"]):
        return "–"
    half = None if pd.isna(row["half"]) else row["half"]
    digits = 2 if row["by"] else min(row["decimals"] + 1, 4)
    return f"{escape(row['by'])} {_unbroken(Interval(row['obtained'], half, row['n']).text(digits))}".strip()


def counted(row: dict) -> str:
    """What the interval is over: "n=5 seeds", "n=7,505 items", or "n=1 run" where there is none."""
    return f"n={row['n']:,} {row['of']}" if row["of"] else ""


def _unbroken(text: str) -> str:
    return escape(text).replace(" ", "\N{NO-BREAK SPACE}")


def _words(word: str) -> str:
    return f"{SYMBOLS[word]} {word}"


def verdict(word: str) -> str:
    """A verdict's symbol and word on one line."""
    return f'<span style="white-space:nowrap">{_words(word)}</span>'


def note(words: str) -> str:
    """Small print."""
    return f'<small style="font-weight:normal">{escape(words)}</small>'


def _details(summary: str, lines: list[str]) -> str:
    return f'<details style="margin-bottom:1em"><summary>{summary}</summary>{"<br>".join(lines)}</details>'


def _table(head, lines, caption: str = "") -> str:
    """Header cells and lines of cells (all HTML); the first cell of a line is its header."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
                   for first, *rest in lines)
    caption = f"<p>{note(caption)}</p>" if caption else ""
    return (f'{caption}<div style="overflow-x:auto"><table class="dataframe table" style="min-width:40em">'
            f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>")
