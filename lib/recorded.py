"""Every recorded run on a page of its own kind: how it was made, on what, and all it measured.

    HTML(recorded.page(runs.records()))

A run is a folded <details> with the id `anchor(path)`, which opens when the page's address names it; it can be opened
and read without the script as well.
"""
import json
from html import escape
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from lib import intervals, root, runs

STYLE = """
.runs details.run {border-bottom: 1px solid var(--pst-color-border, #ccc); padding: .2rem 0; scroll-margin-top: 5rem}
.runs details.run > summary {cursor: pointer; overflow-wrap: anywhere}
.runs details.run:target > summary {font-weight: 600}
.runs dl {display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .85rem; margin: .6rem 0}
.runs dt {font-weight: 600; margin: 0}
.runs dd {margin: 0; overflow-wrap: anywhere}
.runs code {background: none; border: 0; padding: 0; color: inherit}
.runs table {font-size: .8rem; margin: .6rem 0 1.2rem}
.runs table :is(th, td) {text-align: left; padding: .1rem .6rem}
.runs td:nth-child(n+2):nth-child(-n+3) {font-variant-numeric: tabular-nums; white-space: nowrap}
.runs h2 {scroll-margin-top: 5rem}
"""
SCRIPT = """
{
  const show = () => {
    const run = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (run?.matches("details.run")) { run.open = true; run.scrollIntoView(); }
  };
  addEventListener("hashchange", show);
  show();
}
"""


def anchor(path: str) -> str:
    """The id of a run, "<experiment>/<run>", on its page: "<experiment>--<run>"."""
    return path.replace("/", "--", 1)


def link(path: str) -> str:
    """Where a page beside it finds a run, "<experiment>/<run>"."""
    return f"recorded-runs.html#{quote(anchor(path), safe='=,')}"


def duration(seconds: float) -> str:
    """Seconds as a reader wants them: 38 s, 27 min, 1.6 h; nothing of what is not known."""
    for limit, unit, size, digits in ((100, "s", 1, 0), (6000, "min", 60, 0), (float("inf"), "h", 3600, 1)):
        if seconds < limit:
            return f"{seconds / size:.{digits}f}\N{NO-BREAK SPACE}{unit}"
    return ""


def page(records: list[dict]) -> str:
    """All records (runs.records) as HTML: what experiments there are, then a section for each."""
    known = {record["path"] for record in records}
    groups = {name: list(found) for name, found in groupby(records, key=lambda record: record["experiment"])}
    top = ", ".join(f'<a href="#{escape(name)}">{escape(name)}</a> ({len(found)})' for name, found in groups.items())
    sections = "\n".join(_section(name, found, known) for name, found in groups.items())
    return (f'<style>{STYLE}</style><div class="runs"><p>{len(records)} runs: {top}.</p>\n{sections}</div>'
            f"<script>{SCRIPT}</script>")


def _section(experiment: str, records: list[dict], known: set[str]) -> str:
    name = escape(experiment)
    own = f'<p><a href="{name}.html">{escape(_title(experiment))}</a></p>' if _title(experiment) else ""
    return f'<h2 id="{name}">{name}</h2>{own}\n' + "\n".join(run(record, known) for record in records)


def _title(experiment: str) -> str:
    """The first heading of the experiment's notebook, or nothing."""
    path = root() / "notebooks" / f"{Path(experiment).name}.ipynb"
    cells = json.loads(path.read_text())["cells"] if path.is_file() else []
    lines = "".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "markdown").splitlines()
    return next((line[2:].strip() for line in lines if line.startswith("# ")), "")


def run(record: dict, known: set[str] = frozenset()) -> str:
    """One record as a folded element; runs of its chain that are among `known` paths are links."""
    size = f"reductions: {len(record['reduced'])}" if record["reduced"] else "full size"
    summary = ", ".join([f"seed {record['seed']}", size, duration(runs.seconds(record)), record["date"][:10]])
    facts = "".join(f"<dt>{name}<dd>{text}" for name, text in _facts(record, known).items() if text)
    lines = "".join(
        f"<tr><td>{escape(name)}<td>{escape(intervals.of_metric(metric).text())}<td>{metric['n']:,}"
        f"<td>{escape(metric['unit'])}" for name, metric in record["metrics"].items())
    return (f'<details class="run" id="{escape(anchor(record["path"]))}"><summary>{escape(record["run"])} '
            f"<small>{escape(summary)}</small></summary><dl>{facts}</dl>"
            f'<table class="dataframe"><thead><tr><th>metric<th>mean ± half-width<th>n<th>unit</thead>'
            f"<tbody>{lines}</tbody></table></details>")


def _facts(record: dict, known: set[str]) -> dict[str, str]:
    """Name -> HTML of how the run was made and on what."""
    data, device = record.get("dataset"), record["device"]
    threads = f", threads: {device['threads']}" if device.get("kind") == "cpu" else ""
    values = ", ".join(f"{name} {json.dumps(value)}" for name, value in record["parameters"].items()
                       if name not in ("seed", *runs.HOUSEKEEPING))
    return {
        "command": _code(record["command"]), "size": "<br>".join(map(escape, record["reduced"])) or "full",
        "seed": escape(str(record["seed"])), "parameters": escape(values),
        "data": _data(data) if data else "", "code": _commit(record["git"]),
        "trained by": "<br>".join(map(_trained, record.get("made_by", []))),
        "starts from": "<br>".join(_stage(stage, known) for stage in record.get("chain", [])),
        "versions": escape(", ".join(map(" ".join, record["versions"].items()))),
        "device": escape(f"{device['name']} ({device.get('kind', '?')}{threads})"),
        "time": f"{duration(runs.seconds(record))}; {record['wall_time_s']:,} s in the process that wrote the record",
        "peak memory": f"{record['peak_memory_mb']:,.0f} MB", "date": escape(record["date"])}


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _data(data: dict) -> str:
    source = f" ({escape(data['source'])})" if data.get("source") else ""
    return f"{escape(data['name'])}{source}, SHA-256 {_code(data['sha256'])}"


def _commit(git: dict) -> str:
    return _code(git["commit"]) + (" and uncommitted changes" if git["dirty"] else "")


def _trained(part: dict) -> str:
    first, last = part["steps"]
    return f"{_commit(part)}, steps {first:,} to {last:,} in {duration(part['seconds'])}"


def _stage(stage: dict, known: set[str]) -> str:
    """An earlier run of a chain: where it is recorded or how to make it, and at which commit it was trained."""
    path = f"{stage['experiment']}/{stage['run']}"
    name = f'<a href="#{escape(quote(anchor(path), safe="=,"))}">{escape(path)}</a>' if path in known else escape(path)
    trained = "".join(f"; {_trained(part)}" for part in stage.get("made_by", []))
    return f"{name}, seed {escape(str(stage['seed']))}: {_code(stage['command'])}{trained}"
