"""Stand-ins on the scoreboard: where the published quantity was not measured, another one tells the order only."""

import copy
import math
import re

import pytest
from test_scoreboard import record, rows

from lib import scoreboard, tables

PICTURES = {
    "toy": {
        "title": "Pictures",
        "work": "toy",
        "source": "report",
        "fid": {"a_x": {"old": {"first": 3.2227, "last": 36.6}, "new": {"first": 1.6543, "last": 4.1}},
                "b_x": {"old": {"first": 37.8}, "new": {"first": 43.6}}},
        "compare": [
            {"published": "fid.a_{net}.{way}.{code}", "experiment": "pictures", "metric": "fid_{code}", "unit": "FID",
             "where": {"data": "a", "way": "{way}", "held_out": False}, "tolerance": "10%", "pivot": ["path", "way"],
             "order": {"way": "new < old"},
             "stand_in": {"metric": "cfd_{code}", "unit": "CFD", "instrument": "accuracy"}},
            {"published": "fid.b_{net}.{way}.first", "experiment": "pictures", "metric": "fid_first", "unit": "FID",
             "where": {"data": "b", "way": "{way}", "held_out": False}, "tolerance": "10%", "pivot": ["path", "way"],
             "stand_in": {"metric": "cfd_first", "unit": "CFD"}},
        ],
    },
}
NO_FID = ["steps 8 instead of 200", "fid False instead of True"]


def picture(way, first=None, last=None, data="a", reduced=NO_FID, held_out=False, accuracy=0.99, fid=None, **more):
    """A record with CFDs, and with `fid` (of both codes) too if given."""
    own = {"data": data, "way": way, "held_out": held_out}
    found = record(experiment="pictures", reduced=reduced, parameters=own, unit="CFD", cfd_first=first,
                   cfd_last=last, **more)
    found["path"] = f"pictures/{way}-{data}-{held_out}-{found['seed']}"
    fids = {f"fid_{code}": (fid, "FID") for code in ("first", "last") if fid is not None}
    for name, (value, unit) in {**fids, "accuracy": (accuracy, "fraction")}.items():
        found["metrics"][name] = {"value": value, "se": None, "n": 10, "unit": unit}
    return found


def pictures(*records):
    return rows(*records, published=PICTURES)


def test_a_stand_in_is_named_and_judges_the_order_only():
    found = pictures(picture("old", (21, 0.4), (41, 0.4)), picture("new", (16, 0.4), (11, 0.4)))
    row = found["fid.a_x.old.first"]
    assert (row["obtained"], row["by"], row["verdict"]) == (21, "CFD", "direction holds")
    assert math.isnan(row["deviation"])
    why = "by CFD, which is not comparable with FID: new < old: 5.0 ± 1.1 (one run each)"  # 1.984 sqrt(2) 0.4
    assert row["why"] == why
    assert row["size"] == "reduced: steps 8 instead of 200; fid False instead of True"
    assert {found[f"fid.a_x.{way}.last"]["verdict"] for way in ("old", "new")} == {"direction holds"}
    assert found["fid.b_x.old.first"]["verdict"] == "not run" and found["fid.b_x.old.first"]["by"] == ""


def test_a_stand_in_is_never_reproduced_however_close():
    found = pictures(picture("old", (3.2227, 0.1), (36.6, 1), reduced=()),
                     picture("new", (1.6543, 0.1), (4.1, 1), reduced=()))
    assert {row["verdict"] for key, row in found.items() if ".a_" in key} == {"direction holds"}
    assert not any("tolerance" in row["why"] or "off by" in row["why"] for row in found.values())
    row = pictures(picture("old", 37.8, data="b", reduced=()))["fid.b_x.old.first"]
    assert (row["verdict"], row["why"]) == ("undecided", "by CFD, which is not comparable with FID: no order to check")


def test_the_order_by_a_stand_in_can_fail_or_be_open():
    found = pictures(picture("old", (10, 0.1), (20, 3)), picture("new", (12, 0.1), (18, 3)))
    assert found["fid.a_x.new.first"]["verdict"] == "not reproduced"
    assert found["fid.a_x.new.first"]["why"].endswith("FID: against new < old: −2.00 ± 0.28 (one run each)")
    assert found["fid.a_x.new.last"]["verdict"] == "undecided"
    assert found["fid.a_x.new.last"]["why"].endswith("FID: open: new < old: 2.0 ± 8.4 (one run each)")
    found = pictures(picture("old", 20, (20, 3), reduced=()), picture("new", 10, (18, 3), reduced=()))
    assert found["fid.a_x.new.last"]["verdict"] == "not reproduced"


def test_the_order_by_a_stand_in_is_judged_seed_by_seed():
    values = {1: 10, 2: 20, 3: 30}
    records = [picture("old", v + 0.8 + s / 10, 1, seed=s) for s, v in values.items()]
    records += [picture("new", v, 1, seed=s) for s, v in values.items()]
    row = pictures(*records)["fid.a_x.old.first"]
    assert row["obtained"] == pytest.approx(21)
    assert (row["bar"], row["verdict"]) == ("95 % interval over 3 seeds", "direction holds")


@pytest.mark.parametrize(
    "other",
    [
        picture("new", 1, 1, reduced=NO_FID[1:]),
        picture("new", 1, 1, fid=1, reduced=NO_FID),
        picture("new", 1, 1, accuracy=0.98),
        picture("new", 1, 1, held_out=True),
    ],
    ids=["another size", "measured by FID", "another classifier", "another setting"],
)
def test_a_stand_in_is_compared_with_its_like_only(other):
    found = pictures(picture("old", 2, 2), other)
    assert found["fid.a_x.old.first"]["verdict"] == "undecided"
    assert found["fid.a_x.old.first"]["why"].endswith("FID: no order to check")
    assert "new < old" not in found["fid.a_x.new.first"]["why"]


def test_a_stand_in_without_an_instrument_is_not_compared_with_the_metric_either():
    published = copy.deepcopy(PICTURES)
    del published["toy"]["compare"][0]["stand_in"]["instrument"]
    found = rows(picture("old", (2, 0.1), 2), picture("new", (1, 0.1), 1, accuracy=0.5), published=published)
    assert found["fid.a_x.old.first"]["verdict"] == "direction holds"
    found = rows(picture("old", 2, 2), picture("new", 1, 1, fid=1), published=published)
    assert found["fid.a_x.old.first"]["verdict"] == found["fid.a_x.new.first"]["verdict"] == "undecided"


def test_a_measured_metric_closer_to_the_published_size_replaces_the_stand_in():
    short = [picture(way, v, v, seed=s) for way, v in (("old", 9), ("new", 1)) for s in (1, 2, 3)]
    row = pictures(*short, picture("old", 9, 9, reduced=(), fid=3.3))["fid.a_x.old.first"]
    assert (row["obtained"], row["by"], row["n"], row["verdict"]) == (3.3, "", 1, "reproduced")
    row = pictures(*short, picture("old", 8, 8, reduced=["a", "b", "c"], fid=3.3))["fid.a_x.old.first"]
    assert (row["obtained"], row["by"], row["verdict"]) == (9, "CFD", "direction holds")


def test_seeds_of_a_row_are_measured_alike():
    def fails(message, *records):
        with pytest.raises(scoreboard.ScoreboardError) as error:
            pictures(*records)
        assert message in str(error.value)

    one = picture("old", 2, 2)
    fails("old-a-False-2/results.json has 'fid_first' and pictures/old-a-False-1/results.json has not: record that one "
          "again", one, picture("old", 2, 2, seed=2, fid=3))
    fails("old-a-False-2/results.json differ in accuracy, so their CFD are not on one scale: record them again on one",
          one, picture("old", 2, 2, seed=2, accuracy=0.5))
    accuracy = {"accuracy": one["metrics"]["accuracy"]}
    fails("no metric 'cfd_first', which toy.fid.a_x.old.first of published.yml asks for", one | {"metrics": accuracy})
    fails("asks for a number in 'CFD'", picture("old", math.nan, 2))
    del one["metrics"]["accuracy"]
    fails("no metric 'accuracy'", one)


@pytest.mark.parametrize(("dataset", "short"), [("mnist", "mnist"), ("fashionmnist", "fmnist")])
def test_the_books_rows_take_one_setting_of_symmetric_learning(dataset, short):
    """Held-out, other bits and other precisions are variants: beside the published setting, neither mixed nor taken."""
    setting = {"dataset": dataset, "encoder": "ladder", "learning": "elbo", "held_out": False, "z0_bits": 30,
               "z1_bits": 100, "precision": "tf32", "fid": False}
    variants = [{}, {"held_out": True}, {"z0_bits": 50}, {"z1_bits": 200}, {"precision": "bf16"}]
    metrics = {f"cfd_{code}": {"value": 1.0, "se": 0.1, "n": 10, "unit": "CFD"} for code in ("random_code", "limiting")}
    metrics["classifier_accuracy"] = {"value": 0.9, "se": None, "n": 10, "unit": "fraction"}
    found = [record(experiment="symmetric-learning", parameters=setting | v) | {"metrics": metrics, "path": str(i)}
             for i, v in enumerate(variants)]
    frame = scoreboard.score(scoreboard.flatten(scoreboard.load()), found)
    taken = frame[frame["by"] == "CFD"]
    assert set(taken["key"]) == {f"fid.{short}_ladder.elbo.{code}" for code in ("random_code", "limiting")}
    assert set(taken["runs"]) == {("0",)}


def test_a_table_says_what_stands_in_and_that_it_is_reduced():
    """One table of both templates: a line for each path, a column for each way; other quantities with their unit."""
    records = [picture("old", (21.04, 0.123), (41, 1)), picture("new", (16.04, 0.4), (11, 1))]
    records.append(picture("new", 9, data="b"))
    page = tables.scoreboard(scoreboard.score(scoreboard.flatten(PICTURES), records))
    assert page.count("<table") == 1
    assert re.findall(r'scope="row">([^<]*)<', page) == ["a x / first", "a x / last", "b x / first"]
    assert re.findall(r'scope="col">([^/]*)</th', page) == ["", "way old", "way new"]
    space, note = "\N{NO-BREAK SPACE}", '<small style="font-weight:normal">n=100 items, reduced</small>'
    assert f"<td>3.2227<br>CFD 21.04{space}±{space}0.24 {note}<br>↗ direction holds</td>" in page
    assert f"<td>1.6543<br>CFD 16.04{space}±{space}0.79 {note}<br>↗ direction holds</td>" in page
    assert f"<td>36.6000<br>CFD 41.0{space}±{space}2.0 {note}<br>↗ direction holds</td>" in page
    assert "<td>43.6<br>CFD 9.00 <small style" in page and "n=1 run, reduced" in page
    assert "<td>37.8<br>–<br>○ not run</td>" in page
    assert not re.search(r">(21|16|41|9)\.\d", page)  # never a bare number in the column of another quantity
    assert "FID: published (report), obtained, verdict; tolerance 10%. CFD stands in where no FID was measured" in page
    assert page.count("educed: steps 8 instead of 200; fid False instead of True") == 1
    full = scoreboard.score(scoreboard.flatten(PICTURES), [picture("old", 9, 9, reduced=(), fid=3.3)])
    page = tables.scoreboard(full)
    assert "<td>3.2227<br>3.3000<br>✓ reproduced</td>" in page
    assert "CFD" not in page and "educed:" not in page


def test_a_plain_row_names_the_stand_in_too():
    published = copy.deepcopy(PICTURES)
    for template in published["toy"]["compare"]:
        del template["pivot"]
    page = tables.scoreboard(scoreboard.score(scoreboard.flatten(published), [picture("old", (21.04, 0.123), 41)]))
    assert "<td>CFD 21.04\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.24<br>" in page
    assert "<td>reduced: steps 8 instead of 200; fid False instead of True</td>" in page
