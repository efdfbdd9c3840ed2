"""The front page: every published number once, the same rows to download, working links, nothing unescaped."""
import base64
import html.parser
import io
import json
import math
import re
import subprocess
import sys
from urllib.parse import unquote

import pandas as pd
import pytest
from test_scoreboard import SMALL, grid, record

from lib import front, intervals, recorded, root, runs, scoreboard

HOSTILE = '<script>alert("&")</script>'


def scored(*records, published=SMALL):
    return scoreboard.score(scoreboard.flatten(published), list(records))


@pytest.fixture(scope="module")
def book():
    """The book's rows, and its records."""
    records = runs.records()
    return scored(*records, published=scoreboard.load()), records


class Reader(html.parser.HTMLParser):
    """Ids, links, table cells (by row) and tags of a page; a tag that is closed out of order is an error."""
    OPTIONAL = {"dt", "dd", "tr", "td", "th", "thead", "tbody"}

    def __init__(self, page):
        super().__init__()
        self.ids, self.links, self.rows, self.tags, self.open = [], [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag not in self.OPTIONAL | {"br", "input"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.OPTIONAL:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")


def downloads(page):
    """Kind -> text of the page's data: links."""
    found = re.findall(r'href="data:(\S+?);charset=utf-8;base64,([^"]+)"', page)
    return {kind: base64.b64decode(data).decode() for kind, data in found}


def back(frame):
    """A frame as `rows` gives it, from one that was read: numbers as numbers, nothing as nothing."""
    numbers = ["published", "published_half_width", "tolerance", "obtained", "obtained_half_width", "seconds"]
    return frame.assign(**{name: pd.to_numeric(frame[name].replace("", None)).astype(float) for name in numbers},
                        n=frame["n"].astype(int))


# ---------------------------------------------------------------------------------- the table
def test_every_published_number_has_one_line_with_what_was_obtained(book):
    frame, _ = book
    page = Reader(front.page(frame))
    head, *lines = page.rows
    assert head == list(front.HEADS) and sum(front.HEADS.values()) == 100
    assert len(lines) == len(frame) == 139 and all(len(line) == len(head) for line in lines)
    for line, row in zip(lines, frame.to_dict("records"), strict=True):
        assert line[1].startswith(row["key"].replace(".", " / ").replace("_", " "))
        assert line[7].endswith(f" {row['verdict']}")
        assert ("n=" in line[3]) == (row["n"] > 0) == bool(line[6])


def test_a_line_shows_interval_setting_time_and_runs():
    values = [-3.36, -3.38, -3.40]
    found = [record(i + 1, elbo_before=v, elbo_after=(-3.3, 0.1)) for i, v in enumerate(values)]
    page = Reader(front.page(scored(*found, grid("e1", 8, (41, 0.5), reduced=["steps 1 instead of 2"]))))
    line = dict(zip(front.HEADS, page.rows[1], strict=True))
    space = "\N{NO-BREAK SPACE}"
    assert line["published"] == "−3.37report"
    assert line["obtained"] == f"−3.380{space}±{space}0.050n=3 seeds"        # t(0.975; 2) x 0.02 / sqrt(3)
    assert (line["setting"], line["device"], line["time"]) == ("full", "a CPU", f"38{space}s")
    assert line["run"].startswith("paper-seed=1paper-seed=2paper-seed=3command")
    reduced = next(dict(zip(front.HEADS, row, strict=True)) for row in page.rows if "d0 / e1 / 8" in row[1])
    assert reduced["obtained"] == f"41.00{space}±{space}0.99n=100 items"     # t(0.975; 99) x 0.5
    assert reduced["setting"] == "reducedsteps 1 instead of 2"
    assert page.links.count("recorded-runs.html#toy--paper-seed=2") == 2
    assert "3 numbers were obtained, 2 of them over seeds" in front.page(scored(*found, grid("e1", 8, 41)))
    assert "0 numbers were obtained, 0 of them over seeds" in front.page(scored())


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (5970, "100 min"),
                                               (6000, "1.7 h"), (math.nan, "")])
def test_durations(seconds, text):
    assert recorded.duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == text


# ---------------------------------------------------------------------------------- downloads
def test_the_downloads_are_the_rows_in_full(book):
    frame, _ = book
    rows, found = front.rows(frame), downloads(front.page(frame))
    csv = pd.read_csv(io.StringIO(found["text/csv"]), keep_default_na=False, dtype=str)
    pd.testing.assert_frame_equal(back(csv), rows, check_exact=True)
    read = json.loads(found["application/json"], parse_constant=pytest.fail)
    pd.testing.assert_frame_equal(back(pd.DataFrame(read)), rows, check_exact=True)
    assert list(csv) == list(read[0]) == list(front.NAMES.values())
    assert read[0]["obtained"] == frame["obtained"][0] and len(read) == 139


def test_the_command_prints_the_downloads(book):
    found = downloads(front.page(book[0]))
    for name, kind in (("csv", "text/csv"), ("json", "application/json")):
        printed = subprocess.run([sys.executable, "-m", "lib", "scoreboard", "--format", name], capture_output=True,
                                 cwd=root(), check=True)
        assert printed.stdout.decode() == found[kind]


def test_as_text_each_number_has_a_line_and_the_counts_come_last():
    lines = front.as_text(scored(record(elbo_before=(-3.38, 0.01), elbo_after=(-3.31, 0.01)))).splitlines()
    assert len(lines) == 8
    assert re.fullmatch(r"✓ reproduced +toy\.elbo\.before +−3\.37 +−3\.380 ± 0\.020 n=100 items +nats", lines[0])
    assert re.fullmatch(r"○ not run +toy\.spread\.x +−84\.45 ± 0\.12 +– +nats", lines[-2])
    assert lines[-1] == "7 published numbers: 2 reproduced, 0 direction holds, 0 not reproduced, 0 undecided, 5 not run"


# ---------------------------------------------------------------------------------- recorded runs, and links to them
def test_every_link_to_a_run_has_its_place_on_the_page_of_recorded_runs(book):
    frame, records = book
    page = Reader(recorded.page(records))
    assert len(page.ids) == len(set(page.ids))
    own = {recorded.anchor(record["path"]) for record in records}
    assert own <= set(page.ids) and len(own) == len(records)
    links = [link for link in Reader(front.page(frame)).links if link.startswith("recorded-runs.html#")]
    assert len(links) == sum(map(len, frame["runs"])) > 100
    assert {unquote(link.partition("#")[2]) for link in links} <= own
    inner = {unquote(link[1:]) for link in page.links if link.startswith("#")}
    assert inner <= set(page.ids)


def test_a_recorded_run_says_how_it_was_made_and_all_that_it_measured(book):
    records = {record["path"]: record for record in book[1]}
    for path in ("vampprior-likelihood/paper-prior=standard-epochs=200-n_likelihood=1000", "celeba-fid/narrow"):
        record = records[path]
        page = recorded.run(record, set(records))
        parts = [part for one in [record, *record.get("chain", [])] for part in one.get("made_by", [])]
        for text in (record["command"], record["git"]["commit"], record["dataset"]["sha256"], record["device"]["name"],
                     record["date"], *record["versions"].values(), *(part["commit"] for part in parts)):
            assert text in page, text
        cells = {row[0]: row[1:] for row in Reader(page).rows[1:]}
        assert set(cells) == set(record["metrics"])
        for name, metric in record["metrics"].items():
            assert cells[name] == [intervals.of_metric(metric).text(), f"{metric['n']:,}", metric["unit"]]
    assert 'href="#celeba-gan--narrow"' in page and page.count("steps ") > 2
    assert 'href="#celeba-gan' not in recorded.run(record)                   # an earlier run that is not recorded


# ---------------------------------------------------------------------------------- mistakes and malice
def test_text_of_a_record_or_of_the_published_file_is_no_markup(book):
    words = {"title": HOSTILE, "source": HOSTILE}
    published = {"toy": SMALL["toy"] | words}
    one = record(reduced=[HOSTILE], elbo_before=(-3.38, 0.01), elbo_after=(-3.31, 0.01))
    one |= {"command": HOSTILE, "device": {"name": HOSTILE}, "path": f"toy/{HOSTILE}"}
    page = front.page(scored(one, published=published))
    assert "<script>alert" not in page and page.count("<script>") == 1 and "&lt;script&gt;alert" in page
    assert Reader(page).tags.count("script") == 1

    one = book[1][0]
    metric = {HOSTILE: {"value": 1.0, "se": None, "n": 1, "unit": HOSTILE}}
    bad = one | {name: HOSTILE for name in ("command", "date", "run")} | {"path": f"x/{HOSTILE}", "metrics": metric}
    bad |= {"reduced": [HOSTILE], "dataset": dict.fromkeys(("name", "sha256", "source"), HOSTILE), "seed": HOSTILE,
            "git": {"commit": HOSTILE, "dirty": True}, "versions": {HOSTILE: HOSTILE}, "parameters": {HOSTILE: HOSTILE},
            "device": {"name": HOSTILE, "kind": HOSTILE}, "experiment": HOSTILE,
            "made_by": [{"commit": HOSTILE, "dirty": False, "steps": [0, 1], "seconds": 1.0}]}
    page = recorded.page([bad | {"chain": [bad]}])
    assert "<script>alert" not in page and Reader(page).tags.count("script") == 1


def test_the_committed_pages_hold_the_table_and_its_script():
    """Stored outputs: the table's and the runs' page, neither of a size that would weigh on the checkout."""
    for name, whole in (("scoreboard", "front.js"), ("recorded-runs", None)):
        path = root() / "notebooks" / f"{name}.ipynb"
        assert path.stat().st_size < 1e6
        cells = json.loads(path.read_text())["cells"]
        (cell,) = (cell for cell in cells if "full-width" in cell["metadata"].get("tags", []))
        page = "".join(cell["outputs"][0]["data"]["text/html"])
        assert whole is None or (root() / "lib" / whole).read_text() in page
    script = (root() / "lib" / "front.js").read_text()
    assert len(script.splitlines()) <= 50 and "</" not in script
