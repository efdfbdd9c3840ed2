"""The scoreboard: every published number has one row, verdicts follow the stated rule, mistakes are named."""

import copy
import math
import re

import pytest

from lib import root, runs, scoreboard, tables

SMALL = {
    "toy": {
        "title": "Toy",
        "work": "toy",
        "source": "report",
        "elbo": {"before": -3.37, "after": -3.3},
        "test": {"d0": {"e1": {8: 40, 64: 30}, "e2": {8: 44, 64: 46}}},
        "spread": {"x": [-84.45, 0.12]},
        "compare": [
            {
                "published": "elbo.{stage}",
                "experiment": "toy",
                "metric": "elbo_{stage}",
                "unit": "nats",
                "tolerance": 0.04,
                "order": {"stage": "after > before"},
            },
            {
                "published": "test.d{depth}.{encoder}.{bits}",
                "experiment": "grid",
                "metric": "nelbo",
                "unit": "nats",
                "where": {"bits": "{bits}", "encoder": "{encoder}", "depth": "{depth}"},
                "tolerance": "10%",
                "order": {"encoder": "e1 < e2"},
            },
            {
                "published": "spread.x",
                "experiment": "other",
                "metric": "ll",
                "unit": "nats",
                "tolerance": 1,
                "source": "replication",
            },
        ],
    },
}


def record(seed=1, reduced=(), experiment="toy", parameters=None, unit="nats", **values):
    """A run record; a value is a number or (number, standard error)."""
    pairs = {name: value if isinstance(value, tuple) else (value, None) for name, value in values.items()}
    metrics = {name: {"value": v, "se": se, "n": 100, "unit": unit} for name, (v, se) in pairs.items()}
    return {
        "schema": 1,
        "experiment": experiment,
        "run": f"paper-seed={seed}",
        "path": f"{experiment}/paper-seed={seed}",
        "seed": seed,
        "parameters": {"seed": seed, **(parameters or {})},
        "metrics": metrics,
        "reduced": list(reduced),
        "command": f"python -m lib run {experiment} --preset paper --seed {seed}",
        "date": f"2026-01-0{seed}T00:00:00Z",
        "device": {"name": "a CPU"},
        "wall_time_s": 12.5,
    }


def grid(encoder, bits, value, **more):
    return record(
        experiment="grid", parameters={"encoder": encoder, "bits": bits, "depth": 0}, nelbo=value, **more
    )


def rows(*records, published=SMALL):
    """key -> row of the scored small example."""
    frame = scoreboard.score(scoreboard.flatten(published), list(records))
    return {row["key"]: row for row in frame.to_dict("records")}


def changed(**changes):
    """The small example with keys of its first template changed; None removes a key."""
    published = copy.deepcopy(SMALL)
    template = published["toy"]["compare"][0] | changes
    published["toy"]["compare"][0] = {key: value for key, value in template.items() if value is not None}
    return published


# ---------------------------------------------------------------------------------- the book's own file
def test_every_published_number_has_exactly_one_row():
    """Counted in the text of the file, without the parser that the scoreboard uses."""
    text = (root() / "book" / "published.yml").read_text()
    text = re.sub(r"^  compare:\n(?:    .*\n|       .*\n)*", "", text, flags=re.M)
    text = re.sub(r"#.*$|^  (?:source|metric|note|title|work):.*$", "", text, flags=re.M)
    values = re.findall(r": +(-?\d+(?:\.\d+)?)(?=[,}\s])|\[(-?[\d.]+), [\d.]+\]", text)
    found = scoreboard.flatten(scoreboard.load())
    assert len(found) == len(values) == 139
    assert sorted(row["published"] for row in found) == sorted(float(a or b) for a, b in values)
    assert len({(row["section"], row["key"]) for row in found}) == 139
    assert sum(row["half_width"] is not None for row in found) == 12


def test_some_rows_as_they_are_published():
    found = {(row["section"], row["key"]): row for row in scoreboard.flatten(scoreboard.load())}
    row = found["semantic_hashing", "test_nelbo_min_over_epochs.d2.e3.32"]
    assert row["published"] == 473
    assert row["where"] == {"dataset": "newsgroups", "encoder": "e3", "input": "", "bits": "32", "decoder_depth": "2",
                            "estimator": "disarm", "kl": "sampled", "precision": "tf32"}
    row = found["symmetric_learning", "fid.fmnist_ladder.symmetric.random_code"]
    assert row["published"] == 43.6204
    assert row["metric"] == "fid_random_code"
    assert row["where"]["dataset"] == "fashionmnist"
    assert row["stand_in"] == {"metric": "cfd_random_code", "unit": "CFD", "instrument": "classifier_accuracy"}
    assert found["symmetric_learning", "fid.mnist_reverse.elbo.limiting"]["stand_in"]["metric"] == "cfd_limiting"
    row = found["vampprior_likelihood", "replication.dynamic_mnist.convhvae_vamp"]
    assert (row["published"], row["half_width"], row["decimals"]) == (-79.67, 0.09, 2)
    assert row["source"] == "replication"
    assert found["vampprior", "elbo.fashionmnist.vae_vamp.val"]["claims"] == []


def test_recorded_runs_fit_the_file():
    """Whatever is recorded can be scored, and templates name parameters that the written notebooks have."""
    frame = scoreboard.score(scoreboard.flatten(scoreboard.load()), runs.records())
    assert sum(scoreboard.counts(frame).values()) == len(frame) == 139
    for experiment in set(frame["experiment"]) & set(runs.notebooks()):
        declared = runs.parameters(experiment)
        for where in frame.loc[frame["experiment"] == experiment, "where"]:
            assert set(where) <= {*declared, "dataset"}                  # of a chain, its first run has it


# ---------------------------------------------------------------------------------- verdicts
def test_without_records_nothing_is_run():
    found = rows()
    assert {row["verdict"] for row in found.values()} == {"not run"}
    assert math.isnan(found["elbo.before"]["obtained"])


def test_full_size_within_tolerance_is_reproduced():
    row = rows(record(elbo_before=(-3.38, 0.01), elbo_after=(-3.31, 0.01)))["elbo.before"]
    assert row["verdict"] == "reproduced"
    assert row["size"] == "full"
    assert row["deviation"] == pytest.approx(-0.01)
    assert (row["bar"], row["n"], row["of"]) == ("95 % interval over the items of one run, n = 100", 100, "items")
    assert row["half"] == pytest.approx(1.984217 * 0.01)  # t(0.975; 99), from tables
    assert (row["runs"], row["seconds"]) == (("toy/paper-seed=1",), 12.5)
    assert row["command"] == "python -m lib run toy --preset paper --seed 1"


def test_reduced_runs_are_never_reproduced():
    short = ["steps 3 instead of 10"]
    found = rows(record(reduced=short, elbo_before=(-3.37, 0.01), elbo_after=(-3.3, 0.01)))
    assert found["elbo.before"]["verdict"] == "direction holds"
    assert found["elbo.before"]["size"] == "reduced: steps 3 instead of 10"
    found = rows(record(experiment="other", reduced=short, ll=-84.45))
    assert found["spread.x"]["verdict"] == "undecided"
    assert "reduced" in found["spread.x"]["why"]


def test_out_of_tolerance_the_direction_may_hold():
    found = rows(record(elbo_before=(-4.0, 0.01), elbo_after=(-3.9, 0.01)))
    assert found["elbo.before"]["verdict"] == found["elbo.after"]["verdict"] == "direction holds"
    assert found["elbo.before"]["why"] == "after > before: 0.100 ± 0.028 (one run each); off by 0.63, tolerance 0.04"


def test_within_tolerance_but_against_the_claim_is_not_reproduced():
    found = rows(record(elbo_before=(-3.34, 0.001), elbo_after=(-3.335, 0.001)))
    assert found["elbo.before"]["verdict"] == "reproduced"
    found = rows(record(elbo_before=(-3.335, 0.001), elbo_after=(-3.34, 0.001)))
    assert found["elbo.before"]["verdict"] == found["elbo.after"]["verdict"] == "not reproduced"
    assert found["elbo.after"]["why"].startswith("against after > before: −0.0050 ± 0.0028 (one run each); off by")


def test_a_difference_whose_interval_contains_0_is_no_direction():
    """Of two runs of 100 items: 1.984217 sqrt(2) s is 0.0982 for s = 0.035, and 0.1010 for s = 0.036."""
    apart = {"elbo_before": (-4.0, 0.035), "elbo_after": (-3.9, 0.035)}
    assert rows(record(**apart))["elbo.after"]["verdict"] == "direction holds"
    close = {"elbo_before": (-4.0, 0.036), "elbo_after": (-3.9, 0.036)}
    row = rows(record(**close))["elbo.after"]
    assert row["verdict"] == "not reproduced"
    assert row["why"] == "open: after > before: 0.10 ± 0.10 (one run each); off by 0.6, tolerance 0.04"


@pytest.mark.parametrize("errors", [(None, None), (None, 0.01), (0.01, None)])
def test_an_order_is_open_where_an_error_is_unknown(errors):
    row = rows(record(elbo_before=(-4.0, errors[0]), elbo_after=(-3.0, errors[1])))["elbo.before"]
    assert row["verdict"] == "not reproduced"
    assert row["why"].startswith("open: after > before: 1.0000 (one run each, no interval); off by")
    found = rows(record(elbo_before=(-3.37, errors[0]), elbo_after=(-3.3, errors[1])))
    assert found["elbo.before"]["verdict"] == found["elbo.after"]["verdict"] == "not reproduced"


def test_seeds_that_are_not_shared_are_compared_as_independent_means():
    """Of three values of deviation 0.1 each: 4.302653 x 0.1 / sqrt(3) = 0.2484 and sqrt(2) of it, 0.3513."""
    def found(higher):
        own = [record(s, parameters={"side": "before"}, elbo_before=-4.2 + s / 10) for s in (1, 2, 3)]
        own += [record(s, parameters={"side": "after"}, elbo_after=higher - 0.5 + s / 10) for s in (4, 5, 6)]
        return rows(*own, published=changed(where={"side": "{stage}"}))["elbo.after"]

    assert found(-3.6)["why"].startswith("after > before: 0.40 ± 0.35 (unpaired)")
    assert found(-3.7)["why"].startswith("open: after > before: 0.30 ± 0.35 (unpaired)")


def test_order_is_judged_seed_by_seed():
    """A small difference that every seed shows is an order, however far apart the seeds are; else it is none."""
    spread = {1: -4.0, 2: -4.5, 3: -5.0}
    same = rows(*(record(seed=s, elbo_before=v, elbo_after=v + 0.01 + s / 1e4) for s, v in spread.items()))
    assert same["elbo.after"]["verdict"] == "direction holds"
    assert same["elbo.after"]["why"].startswith("after > before: 0.01020 ± 0.00025 (3 seeds); ")
    two = rows(*(record(seed=s, elbo_before=v, elbo_after=v + s / 10) for s, v in list(spread.items())[:2]))
    assert two["elbo.after"]["why"].startswith("open: after > before: 0.15 ± 0.64 (2 seeds)")
    mixed = rows(*(record(seed=s, elbo_before=v, elbo_after=v + 0.01 * (s - 1)) for s, v in spread.items()))
    assert mixed["elbo.after"]["verdict"] == "not reproduced"


def test_numbers_published_as_equal_claim_no_order():
    found = rows(record(elbo_before=(-3.3, 0.01), elbo_after=(-3.4, 0.01)), published=changed(resolution=0.1))
    assert found["elbo.after"]["why"] == "off by 0.1, tolerance 0.04"
    assert found["elbo.after"]["claims"] == []
    assert len(rows(published=changed(resolution=0.05))["elbo.after"]["claims"]) == 1


def test_out_of_tolerance_without_a_claim_is_not_reproduced():
    row = rows(record(experiment="other", ll=-86))["spread.x"]
    assert (row["verdict"], row["why"]) == ("not reproduced", "off by 1.55, tolerance 1")


def test_order_is_not_compared_between_sizes():
    found = rows(grid("e1", 8, 60), grid("e2", 8, 50, reduced=["steps 1 instead of 2"]))
    assert found["test.d0.e1.8"]["verdict"] == "not reproduced"
    assert "e1 < e2" not in found["test.d0.e1.8"]["why"]
    assert found["test.d0.e2.8"]["verdict"] == "undecided"
    found = rows(grid("e1", 64, (33, 1)), grid("e2", 64, (46, 1)))
    assert found["test.d0.e1.64"]["verdict"] == found["test.d0.e2.64"]["verdict"] == "reproduced"
    assert found["test.d0.e1.64"]["tolerance"] == pytest.approx(3)


def test_a_reduced_row_is_compared_with_a_reduced_run_of_one_that_also_has_the_full_size():
    reduced = ["steps 1 instead of 2"]
    found = rows(grid("e1", 64, 33), grid("e1", 64, (90, 1), reduced=reduced),
                 grid("e2", 64, (95, 1), reduced=reduced))
    assert (found["test.d0.e1.64"]["size"], found["test.d0.e1.64"]["verdict"]) == ("full", "reproduced")
    assert found["test.d0.e2.64"]["size"] == f"reduced: {reduced[0]}"
    assert (found["test.d0.e2.64"]["verdict"], found["test.d0.e2.64"]["obtained"]) == ("direction holds", 95)
    assert "at" not in found["test.d0.e2.64"]


def test_a_template_says_what_a_runs_own_error_is():
    drawn = copy.deepcopy(SMALL)
    next(t for t in drawn["toy"]["compare"] if t["experiment"] == "grid")["error"] = "of drawing the codes"
    own = grid("e1", 64, (33, 0.1))
    assert rows(own)["test.d0.e1.64"]["bar"] == "95 % interval over the items of one run, n = 100"
    drawn_of = rows(own, published=drawn)["test.d0.e1.64"]["bar"]
    assert drawn_of == "95 % interval of drawing the codes of one run, n = 100"


def test_several_seeds_give_mean_and_their_own_interval():
    values = [-3.36, -3.38, -3.40]
    found = rows(*(record(seed=i + 1, elbo_before=(v, 9.0), elbo_after=-3.3) for i, v in enumerate(values)))
    row = found["elbo.before"]
    assert row["obtained"] == pytest.approx(-3.38)
    assert row["half"] == pytest.approx(4.302653 * 0.02 / math.sqrt(3))  # t(0.975; 2), from tables
    assert (row["n"], row["of"], row["bar"]) == (3, "seeds", "95 % interval over 3 seeds")
    assert row["seconds"] == 3 * 12.5
    assert row["command"].count("--seed") == 3


def test_the_full_size_and_the_newest_run_of_a_seed_count():
    old = record(elbo_before=-3.0, elbo_after=-2.9) | {"date": "2025-01-01T00:00:00Z"}
    new = record(elbo_before=-3.37, elbo_after=-3.3)
    short = [
        record(seed=s, reduced=["steps 1 instead of 2"], elbo_before=-9.0, elbo_after=-8.0) for s in (1, 2, 3)
    ]
    row = rows(new, *short, old)["elbo.before"]
    assert (row["obtained"], row["n"], row["size"]) == (-3.37, 1, "full")
    assert (row["of"], row["bar"]) == ("run", "one run, no interval") and math.isnan(row["half"])


# ---------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": None}, "toy.compare[0]: missing key 'metric'"),
        ({"tolerence": 1}, "toy.compare[0]: unknown key 'tolerence'"),
        ({"tolerance": "small"}, "tolerance must be a number or a percentage, got 'small'"),
        ({"published": "elbo.before", "metric": "elbo", "order": None}, "toy.elbo.after: no template"),
        ({"published": "bound.{stage}"}, "toy.elbo.before: no template"),
        ({"metric": "elbo_{when}"}, "'published' has no wildcard 'when'"),
        (
            {"order": {"stage": "after >> before"}},
            "order must read 'a > b' or 'a < b', got 'after >> before'",
        ),
        ({"order": {"stage": "after > during"}}, "names a stage that is not published"),
        (
            {"order": {"stage": "before > after"}},
            "the published numbers contradict the claim 'before > after'",
        ),
        ({"stand_in": "cfd"}, "toy.compare[0].stand_in: expected keys and values, got 'cfd'"),
        ({"stand_in": {"metric": "cfd"}}, "toy.compare[0].stand_in: missing key 'unit'"),
        ({"stand_in": {"metric": "cfd", "unit": "CFD", "by": 1}}, "toy.compare[0].stand_in: unknown key 'by'"),
        ({"stand_in": {"metric": "cfd", "unit": "nats"}}, "unit must tell it from the metric's, both are 'nats'"),
        ({"stand_in": {"metric": "cfd_{when}", "unit": "CFD"}}, "'published' has no wildcard 'when'"),
        ({"pivot": ["stage", "path"]}, "'published' has no wildcard 'path'"),
    ],
)
def test_a_malformed_template_is_named(changes, message):
    with pytest.raises(scoreboard.ScoreboardError) as error:
        scoreboard.flatten(changed(**changes))
    assert message in str(error.value)
    assert str(error.value).startswith("published.yml: ")
    assert "\n" not in str(error.value)


def test_other_malformed_files_are_named(tmp_path):
    unused = copy.deepcopy(SMALL)
    del unused["toy"]["spread"]
    with pytest.raises(scoreboard.ScoreboardError, match=r"toy.compare\[2\]: 'spread.x' matches no number"):
        scoreboard.flatten(unused)
    pair = copy.deepcopy(SMALL)
    pair["toy"]["spread"]["x"] = [1, 2, 3]
    with pytest.raises(scoreboard.ScoreboardError, match=r"toy.spread.x: expected \[value, half-width\]"):
        scoreboard.flatten(pair)
    with pytest.raises(scoreboard.ScoreboardError, match="toy: missing key 'title'"):
        scoreboard.flatten({"toy": {}})
    broken = tmp_path / "published.yml"
    broken.write_text("gmm: {elbo: [1")
    with pytest.raises(scoreboard.ScoreboardError, match="^published.yml cannot be read: "):
        scoreboard.load(broken)


def test_a_record_that_does_not_fit_is_named():
    def fails(message, *records):
        with pytest.raises(scoreboard.ScoreboardError) as error:
            rows(*records)
        assert message in str(error.value)

    good = grid("e1", 8, 40.0)
    fails(
        "grid/paper-seed=1/results.json: missing key 'metrics'",
        {k: v for k, v in good.items() if k != "metrics"},
    )
    fails("grid/paper-seed=1/results.json: no metric 'nelbo', which toy.test.d0.e1.8", good | {"metrics": {}})
    fails(
        "metric 'nelbo' is 40.0 in 'bits', toy.test.d0.e1.8 of published.yml asks for a number in 'nats'",
        grid("e1", 8, 40.0, unit="bits"),
    )
    fails("metric 'nelbo' is nan", grid("e1", 8, math.nan))
    fails(
        "metric 'nelbo': missing key 'se'",
        good | {"metrics": {"nelbo": {"value": 1.0, "n": 1, "unit": "nats"}}},
    )
    fails(
        "'where' names 'bits', not a parameter of grid/paper-seed=1/results.json: depth, encoder",
        good | {"parameters": {"encoder": "e1", "depth": 0}},
    )
    other = copy.deepcopy(good) | {"path": "grid/other", "seed": 2}
    other["parameters"] |= {"seed": 2, "lr": 0.1}
    good["parameters"]["lr"] = 0.2
    fails(
        "toy.test.d0.e1.8: grid/paper-seed=1/results.json and grid/other/results.json differ in lr",
        good,
        other,
    )


def test_chains_are_one_setting_whatever_folder_they_start_from_and_have_their_first_runs_data():
    published = changed(where={"dataset": "celeba"})
    chains = [record(seed, elbo_before=1.0 + seed, elbo_after=5.0) for seed in (1, 2)]
    for seed, one in enumerate(chains, 1):
        one |= {"started_from": "joint", "parameters": {"joint": f"runs/joint/paper-seed={seed}"},
                "dataset": {"name": "celeba", "sha256": "0"}}
    found = rows(*chains, published=published)["elbo.before"]
    assert (found["obtained"], found["n"]) == (2.5, 2)
    for one in chains:
        one["dataset"]["name"] = "shapes"
    assert rows(*chains, published=published)["elbo.before"]["verdict"] == "not run"
    chains[0] |= {"started_from": None, "dataset": {"name": "celeba", "sha256": "0"}}
    chains[1] |= {"started_from": None, "dataset": {"name": "celeba", "sha256": "0"}}
    with pytest.raises(scoreboard.ScoreboardError, match="differ in joint"):
        rows(*chains, published=published)


# ---------------------------------------------------------------------------------- tables
def test_tables_say_verdicts_in_words_and_escape():
    published = copy.deepcopy(SMALL)
    published["toy"]["compare"][1]["pivot"] = ["bits", "encoder"]
    frame = scoreboard.score(
        scoreboard.flatten(published),
        [
            record(elbo_before=(-3.371, 0.0123), elbo_after=(-3.3, 0.01)) | {"command": "run <b>&</b>"},
            grid("e1", 8, 41),
        ],
    )
    page = tables.scoreboard(frame)
    assert "✓ reproduced" in page
    assert "○ not run" in page
    assert "−3.371\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.024" in page
    assert "−84.45\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.12" in page
    assert "run &lt;b&gt;&amp;&lt;/b&gt;" in page
    assert page.count("<table") == 2
    assert page.count('scope="row"') == 2 + 3  # two numbers of bits; three plain rows
    assert "40<br>41.0<br>" in page and "One run, no interval" in page
    assert page.count("<table") == page.count("overflow-x:auto") == page.count("</table></div>")
    assert "<td>3</td>" in tables.summary(frame)
    assert scoreboard.counts(frame) == {
        "reproduced": 3,
        "direction holds": 0,
        "not reproduced": 0,
        "undecided": 0,
        "not run": 4,
    }


def test_what_a_row_asks_for_is_no_reduction_of_it_and_the_closest_size_is_shown():
    assert runs.shortfall(["steps 100 instead of 1000"]) < runs.shortfall(["steps 10 instead of 1000"])
    assert runs.shortfall([]) < runs.shortfall(["dataset a instead of b"]) < runs.shortfall(["a 1 instead of 2", "b"])
    own = ["encoder e1 instead of e2", "bits 8 instead of 64"]
    assert rows(grid("e1", 8, 40.0, reduced=own))["test.d0.e1.8"]["verdict"] == "reproduced"
    sizes = [grid("e1", 8, value, reduced=[f"steps {steps} instead of 1,000"], seed=steps // 10)
             for steps, value in ((10, 50.0), (90, 45.0))]
    for order in (sizes, sizes[::-1]):
        row = rows(*order)["test.d0.e1.8"]
        assert (row["obtained"], row["size"]) == (45.0, "reduced: steps 90 instead of 1,000")
