"""The book's front page: every row of the scoreboard as one table to filter, sort and download, or as text.

    python -m lib scoreboard --format csv

The page holds its script (front.js) and both downloads, so it works from disk; without the script the whole table
stands there. `as_csv` and `as_json` give the downloads' bytes. `score` in lib/scoreboard.py makes the rows.
"""
import base64
import json
from html import escape
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from lib import recorded
from lib.scoreboard import VERDICTS, counts
from lib.tables import SYMBOLS, counted, label, note, obtained, published

NAMES = {"work": "work", "section": "section", "key": "number", "unit": "unit", "published": "published",
         "half_width": "published_half_width", "source": "source", "tolerance": "tolerance", "obtained": "obtained",
         "half": "obtained_half_width", "n": "n", "of": "n_of", "by": "stand_in", "size": "size", "device": "device",
         "seconds": "seconds", "verdict": "verdict", "why": "why", "command": "command", "runs": "runs"}
HEADS = {"work": 10, "number": 13, "published": 9, "obtained": 13, "setting": 11, "device": 7, "time": 6, "verdict": 10,
         "why": 12, "run": 9}                                    # and their part of the width, in per cent
NUMBERS = ("published", "obtained", "time", "verdict")            # columns sorted as numbers
STYLE = """
.board {--line: var(--pst-color-border, var(--jp-border-color2, #ccc));
  --page: var(--pst-color-background, var(--jp-layout-color0, #fff));
  --head: var(--pst-color-surface, var(--jp-layout-color2, #eee))}
.board .scroll {overflow: auto; max-height: 85vh; border: 1px solid var(--line)}
.board table {font-size: .8rem; line-height: 1.35; border-collapse: collapse; width: 100%; min-width: 58rem; margin: 0;
  table-layout: fixed !important}
.board table :is(th, td) {vertical-align: top; text-align: left; padding: .35rem .45rem; white-space: normal;
  overflow-wrap: break-word; border: 0; border-bottom: 1px solid var(--line); max-width: none}
.board tbody :is(tr, th) {background: var(--page) !important}
.board tbody tr:hover, .board tbody tr:hover th {background: var(--head) !important}
.board :is(tbody th, thead th:nth-child(2)) {position: sticky; left: 0; z-index: 1; font-weight: 600}
.board td:first-child {font-size: .75rem}
.board thead th {position: sticky; top: 0; z-index: 2; background: var(--head) !important}
.board thead th:nth-child(2) {z-index: 3}
.board thead button {all: unset; cursor: pointer}
.board button:focus-visible {outline: 2px solid currentColor; outline-offset: 2px}
.board thead button::after {content: "\\a0↕"; opacity: .4}
.board [aria-sort=ascending] button::after {content: "\\a0↑"; opacity: 1}
.board [aria-sort=descending] button::after {content: "\\a0↓"; opacity: 1}
.board small {display: block; opacity: .8; font-size: .72rem}
.board td:last-child, .board code {overflow-wrap: anywhere; font-size: .7rem; padding-right: .1rem}
.board code {background: none; border: 0; padding: 0; color: inherit}
.board .tools {display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; margin: .5rem 0; font-size: .85rem}
.board .tools :is(input, select) {font: inherit; padding: .15rem .4rem; color: inherit; background: var(--page);
  border: 1px solid var(--line); border-radius: 3px}
.board:not(.live) .needs {display: none}
@media print {.board .scroll {max-height: none}}
"""


def rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The scored rows as they are downloaded: plain values of full precision, a column for each of NAMES."""
    found = frame[list(NAMES)].rename(columns=NAMES)
    return found.assign(runs=found["runs"].map(" ".join))


def as_csv(frame: pd.DataFrame) -> str:
    """The scored rows as CSV; what there is not is empty."""
    return rows(frame).to_csv(index=False, lineterminator="\n")


def as_json(frame: pd.DataFrame) -> str:
    """The scored rows as a JSON list of objects, one to a line; what there is not is null."""
    plain = ({name: None if pd.isna(value) else value for name, value in row.items()}
             for row in rows(frame).to_dict("records"))
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in plain) + "\n]\n"


def as_text(frame: pd.DataFrame) -> str:
    """The scored rows for a terminal: verdict, number, published, obtained with n, and the counts below."""
    lines = [(f"{SYMBOLS[row['verdict']]} {row['verdict']}", f"{row['section']}.{row['key']}", published(row),
              f"{obtained(row)} {counted(row)}".strip(), row["unit"]) for row in frame.to_dict("records")]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    told = ", ".join(f"{n} {word}" for word, n in counts(frame).items())
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, f"{len(frame)} published numbers: {told}"]).replace("\N{NO-BREAK SPACE}", " ") + "\n"


FORMATS = {"text": as_text, "csv": as_csv, "json": as_json}


def page(frame: pd.DataFrame) -> str:
    """The table with its filters and downloads, as HTML that needs no other file."""
    heads = "".join(f'<th scope="col" style="width:{width}%"{" data-kind=number" * (name in NUMBERS)}>{name}</th>'
                    for name, width in HEADS.items())
    body = "\n".join(map(_line, frame.to_dict("records")))
    script = Path(__file__).with_name("front.js").read_text()
    return (f'<style>{STYLE}</style><div class="board">{_told(frame)}{_tools(frame)}'
            '<div class="scroll" tabindex="0" role="region" aria-label="scoreboard"><table class="dataframe">'
            f"<thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div></div><script>{script}</script>")


def _told(frame: pd.DataFrame) -> str:
    """What the ± of the table is, and how often it is over seeds."""
    of = frame["of"].value_counts()
    return ("<p>Obtained is a mean ± the half-width of its 95 % interval: over n seeds or, of a single run, over its n "
            "items, which says nothing of what another seed would train. "
            f"{sum(of.drop('', errors='ignore'))} numbers were obtained, {of.get('seeds', 0)} of them over seeds.</p>")


def _tools(frame: pd.DataFrame) -> str:
    works = {work: work.replace("-", " ") for work in frame["work"].unique()}
    verdicts = {word: f"{SYMBOLS[word]} {word}" for word in VERDICTS}
    links = " ".join(_download(name, kind, FORMATS[name](frame))
                     for name, kind in (("csv", "text/csv"), ("json", "application/json")))
    return (f'<div class="tools"><label class="needs">filter <input type="search" placeholder="words, e.g. joint fid" '
            f'size="22"></label>{_choice("work", works)}{_choice("verdict", verdicts)}'
            f'<output class="needs" aria-live="polite"></output><span>all {len(frame)} rows: {links}</span></div>')


def _choice(name: str, texts: dict[str, str]) -> str:
    options = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in texts.items())
    return (f'<label class="needs">{name} <select name="{name}" aria-label="{name}"><option value="">all</option>'
            f"{options}</select></label>")


def _download(name: str, kind: str, text: str) -> str:
    data = base64.b64encode(text.encode()).decode()
    return f'<a download="scoreboard.{name}" href="data:{kind};charset=utf-8;base64,{data}">{name.upper()}</a>'


def _line(row: dict) -> str:
    """A row of the table; a cell whose text is not what it is sorted by says that in data-v."""
    work, over = escape(row["work"]), note(counted(row)) if row["of"] else ""
    cells = {"work": f'<a href="../book/{quote(row["work"])}.html">{work.replace("-", " ")}</a>',
             "number": f"{label(row)}{note(row['title'])}{note(row['unit'])}",
             "published": published(row) + note(row["source"]), "obtained": obtained(row) + over,
             "setting": _setting(row["size"]), "device": escape(row["device"]),
             "time": recorded.duration(row["seconds"]), "verdict": f"{SYMBOLS[row['verdict']]} {row['verdict']}",
             "why": escape(row["why"]), "run": _runs(row)}
    values = {name: "" if pd.isna(row[key]) else row[key]
              for name, key in (("published", "published"), ("obtained", "obtained"), ("time", "seconds"))}
    values["verdict"] = VERDICTS.index(row["verdict"])
    kinds = {"number": 'th scope="row"'} | {name: f'td data-v="{value}"' for name, value in values.items()}
    line = "".join(f"<{kinds.get(name, 'td')}>{cell}</{'th' if name == 'number' else 'td'}>"
                   for name, cell in cells.items())
    return f'<tr data-work="{work}" data-verdict="{row["verdict"]}">{line}</tr>'


def _setting(size: str) -> str:
    """What was run: full, or what is reduced; more than two things are folded away."""
    kind, _, words = size.partition(": ")
    differ = [escape(word) for word in words.split("; ")] if words else []
    if len(differ) < 3:
        return escape(kind) + "".join(f"<small>{word}</small>" for word in differ)
    return f"<details><summary>{kind}: {len(differ)} things</summary><small>{'<br>'.join(differ)}</small></details>"


def _runs(row: dict) -> str:
    """A link to each run of the row, and the commands that make them again."""
    links = "<br>".join(f'<a href="{recorded.link(path)}">{escape(path.partition("/")[2])}</a>' for path in row["runs"])
    commands = "<br>".join(f"<code>{escape(line)}</code>" for line in row["command"].splitlines())
    return f"{links}<details><summary>command</summary>{commands}</details>" if links else ""
