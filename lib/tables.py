"""Scoreboard rows as HTML tables for notebooks and pages: they scroll where it is narrow and need no script.

A verdict is a symbol and a word, never only a colour. `score` in lib/scoreboard.py makes the rows.
"""
from html import escape

import pandas as pd

from lib.scoreboard import VERDICTS, counts

SYMBOLS = dict(zip(VERDICTS, "✓↗✗○", strict=True))
COLUMNS = ("", "published", "obtained", "size", "verdict", "why")


def scoreboard(frame: pd.DataFrame) -> str:
    """The rows, a table per section, headed if there are several; those of a `pivot` become one table."""
    parts, several = [], frame["title"].nunique() > 1
    for title, section in frame.groupby("title", sort=False):
        parts.append(f"<p><strong>{escape(title)}</strong></p>" if several else "")
        for pivot, rows in section.groupby(["pivot", "template"], sort=False):
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
    cells = {tuple(row["wildcards"][name] for name in names): row for row in rows}
    down = dict.fromkeys(key[0] for key in cells)
    across = dict.fromkeys(key[1:] for key in cells)
    head = [names[0], *("<br>".join(map(" ".join, zip(names[1:], key, strict=True))) for key in across)]
    lines = ([line, *(_cell(cells.get((line, *column))) for column in across)] for line in down)
    first, parts = rows[0], zip(*(row["key"].split(".") for row in rows), strict=True)
    shared = " / ".join(part[0] for part in parts if len(set(part)) == 1) or first["metric"]
    caption = (f"{shared.replace('_', ' ')}, {first['unit']}: "
               f"published ({first['source']}), obtained, verdict; tolerance {first['tolerance']:g}")
    run = [f"<strong>{_label(row)}</strong>: {escape('; '.join((row['why'], row['size'], row['bar'])))}<br>"
           f"<code>{escape(row['command'])}</code>" for row in rows if row["command"]]
    return _table(head, lines, caption) + (_details("why, and the commands", run) if run else "")


def _cell(row: dict | None) -> str:
    return "<br>".join((_published(row), _obtained(row), _words(row["verdict"]))) if row else ""


def _label(row: dict) -> str:
    return escape(row["key"].replace(".", " / ").replace("_", " "))


def _published(row: dict) -> str:
    return _number(row["published"], row["decimals"], row["half_width"])


def _obtained(row: dict) -> str:
    if pd.isna(row["obtained"]):
        return "–"
    return _number(row["obtained"], min(row["decimals"] + 1, 4), row["se"])


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
