"""Claims: pairs differ in one thing and have one size, the interval is the paired t's, verdicts follow from it."""
import copy
import math

import pytest
import scipy.stats

from lib import claims, evidence, pairs, root, runs, scoreboard
from lib.intervals import Interval

FIRST, SECOND = [5.0, 7.5, 6.0, 9.0], [4.0, 4.5, 5.5, 6.0]
KNOWN = {"toy": ("prior", "size", "seed", "steps", "dataset")}
TEST = {"experiment": "toy", "metric": "ll", "between": {"prior": ["vamp", "standard"]}}
PUBLISHED = {"section": {"title": "A", "work": "toy", "source": "paper",
                         "ll": {"a": {"vamp": 3.5, "standard": 2}, "b": {"vamp": 1, "standard": 2.0}},
                         "compare": [{"published": "ll.{data}.{prior}", "experiment": "toy", "metric": "ll",
                                      "unit": "nats", "tolerance": 1}]}}
CLAIM = {"id": "vamp", "name": "vamp", "work": "toy", "claim": "VampPrior improves.", "claimed": "higher", "test": TEST,
         "published": {"first": "section.ll.*.vamp", "second": "section.ll.*.standard"}}


def record(seed=1, reduced=(), date=1, se=0.5, n=100, parameters=None, **values):
    """A run record of the experiment `toy`; values are its metrics, in nats."""
    own = {"prior": "vamp", "size": 1, "steps": 10, **(parameters or {}), "seed": seed}
    name = "-".join(f"{key}={value}" for key, value in own.items()) + "-".join(reduced)
    metrics = {key: {"value": value, "se": se, "n": n, "unit": "nats"} for key, value in values.items()}
    return {"experiment": "toy", "run": name, "path": f"toy/{name}", "seed": seed, "parameters": own,
            "metrics": metrics, "reduced": list(reduced), "dataset": {"name": "data", "sha256": "ab"},
            "date": f"2026-01-{date:02}", "history": {"step": [5, 10], "loss": [3.0, values.get("ll", 0)]}}


def both(first=FIRST, second=SECOND, **more):
    """A pair of records for each two values, of the seeds 1, 2, ..."""
    parameters = more.pop("parameters", {})
    return [record(seed, ll=value, parameters=parameters | {"prior": prior}, **more)
            for prior, values in (("vamp", first), ("standard", second)) for seed, value in enumerate(values, 1)]


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """A notebook `toy`, without a file."""
    real = runs.parameters
    own = {name: runs.Parameter(name, "int", 0, "") for name in KNOWN["toy"]}
    monkeypatch.setattr(runs, "parameters", lambda experiment: own if experiment == "toy" else real(experiment))


def judged(records, **changes):
    """The one claim, judged by the records."""
    row, = claims.judge([CLAIM | changes], scoreboard.flatten(PUBLISHED), records)
    return row


# ------------------------------------------------------------------------------------------ the interval
def test_the_interval_is_that_of_the_paired_t_test():
    line, = pairs.measure(TEST, both())
    t = scipy.stats.ttest_rel(FIRST, SECOND)
    low, high = t.confidence_interval()
    assert (line.interval.low, line.interval.high) == pytest.approx((low, high))
    assert line.interval.effect == pytest.approx(t.statistic / math.sqrt(4))                  # d_z
    assert (line.interval.n, line.of, line.pairs, line.unit, line.size) == (4, "seeds", 4, "nats", ())
    assert sorted(line.values) == [0.5, 1.0, 3.0, 3.0] and len(line.runs) == 8


def test_two_metrics_of_a_run_are_paired_within_it():
    records = [record(seed, before=b, after=a) for seed, (a, b) in enumerate(zip(FIRST, SECOND, strict=True), 1)]
    line, = pairs.measure({"experiment": "toy", "metrics": ["after", "before"]}, records)
    t = scipy.stats.ttest_rel(FIRST, SECOND).confidence_interval()
    assert (line.interval.low, line.interval.high) == pytest.approx((t.low, t.high))


def test_a_single_pair_has_the_interval_of_its_items_or_none():
    line, = pairs.measure(TEST, both([5.0], [4.0], se=0.3, n=50))
    half = scipy.stats.t.ppf(0.975, 49) * math.hypot(0.3, 0.3)
    assert line.of == "items" and line.interval == Interval(1.0, pytest.approx(half), 50)
    line, = pairs.measure(TEST, both([5.0], [4.0], se=None))
    assert line.of == "nothing" and line.interval.half is None
    own = [record(after=5.0, before=4.0, gain=1.0, se=0.1, n=50)]
    line, = pairs.measure({"experiment": "toy", "metrics": ["after", "before"], "error": "gain"}, own)
    assert line.interval.half == pytest.approx(scipy.stats.t.ppf(0.975, 49) * 0.1)


def test_over_settings_n_counts_settings_each_the_mean_of_its_seeds():
    records = both([1.0, 3.0], [0.0, 0.0], parameters={"size": 1}) + both([5.0], [1.0], parameters={"size": 2})
    line, = pairs.measure(TEST | {"over": ["size"]}, records)
    assert (line.interval.n, line.of, line.pairs) == (2, "settings", 3)
    assert line.interval.mean == pytest.approx((2.0 + 4.0) / 2)


# ------------------------------------------------------------------------------------------ what makes a pair
def test_sizes_are_never_paired_nor_counted_together():
    halves = both([5.0, 6.0], [4.0, 4.0])[:2] + both([5.0, 6.0], [4.0, 4.0], reduced=["steps 10 instead of 99"])[2:]
    assert pairs.measure(TEST, halves) == []
    records = both([5.0, 6.0], [4.0, 4.0]) + both([9.0] * 3, [1.0, 2.0, 3.0], reduced=["steps 10 instead of 99"])
    full, reduced = pairs.measure(TEST, records)
    assert (full.pairs, full.size, reduced.pairs, reduced.size) == (2, (), 3, ("steps 10 instead of 99",))


def test_what_is_varied_is_no_reduction():
    records = both([5.0, 6.0], [4.0, 4.0])
    for one in records[2:]:
        one["reduced"] = ["prior standard instead of vamp"]
    line, = pairs.measure(TEST, records)
    assert (line.pairs, line.size) == (2, ())


def test_sides_that_differ_in_another_parameter_seed_or_data_are_no_pair():
    vamp = record(1, ll=5.0)
    standard = record(1, ll=4.0, parameters={"prior": "standard"})
    for other in (record(2, ll=4.0, parameters={"prior": "standard"}),
                  record(1, ll=4.0, parameters={"prior": "standard", "size": 2}),
                  standard | {"dataset": {"name": "data", "sha256": "cd"}}):
        assert pairs.measure(TEST, [vamp, other]) == []
    assert len(pairs.measure(TEST, [vamp, standard])) == 1
    assert pairs.measure(TEST | {"where": {"size": 2}}, [vamp, standard]) == []
    assert len(pairs.measure(TEST | {"where": {"size": [1, 2], "dataset": "data"}}, [vamp, standard])) == 1


def test_other_parameters_tell_the_lines_apart():
    lines = pairs.measure(TEST, both(parameters={"size": 1}) + both(parameters={"size": 2}))
    assert sorted(line.setting for line in lines) == ["size 1", "size 2"]


def test_the_newest_of_repeated_runs_counts():
    line, = pairs.measure(TEST, [*both([5.0], [4.0]), record(1, ll=7.0, date=2)])
    assert line.values == (3.0,)


def test_only_runs_of_one_instrument_are_compared():
    vamp, standard = both([5.0], [4.0])
    for one, accuracy in ((vamp, 0.9), (standard, 0.8)):
        one["metrics"]["accuracy"] = {"value": accuracy, "se": None, "n": 1, "unit": ""}
    assert pairs.measure(TEST | {"instrument": "accuracy"}, [vamp, standard]) == []
    standard["metrics"]["accuracy"]["value"] = 0.9
    assert len(pairs.measure(TEST | {"instrument": "accuracy"}, [vamp, standard])) == 1


def test_a_stand_in_is_asked_only_where_the_metric_itself_was_never_measured():
    test = TEST | {"metric": "fid", "stand_in": {"metric": "ll"}}
    line, = pairs.measure(test, both([5.0], [4.0]))
    assert line.stands_in and line.metric == "ll"
    records = both([5.0], [4.0])
    for one in records:
        one["metrics"]["fid"] = {"value": 1.0, "se": 0.1, "n": 9, "unit": "FID"}
    line, = pairs.measure(test, records)
    assert not line.stands_in and line.unit == "FID"


def test_a_series_is_compared_where_both_runs_have_been():
    records = both([5.0], [4.0])
    records[1]["parameters"]["steps"] = 20
    test = TEST | {"metric": "loss", "history": {"step": 10, "unit": "nats"}, "apart": ["steps"]}
    line, = pairs.measure(test, records)
    assert (line.values, line.of, line.unit) == ((1.0,), "nothing", "nats")
    with pytest.raises(pairs.PairsError, match="no 'loss' at step 7"):
        pairs.measure(test | {"history": {"step": 7}}, records)


def test_a_metric_that_only_some_runs_have_is_an_error_one_that_none_has_was_not_run():
    records = both([5.0], [4.0])
    assert pairs.measure(TEST | {"metric": "fid"}, records) == []
    del records[1]["metrics"]["ll"]
    with pytest.raises(pairs.PairsError, match="has no metric 'll'"):
        pairs.measure(TEST, records)


def test_units_are_not_mixed():
    records = both([5.0], [4.0])
    records[1]["metrics"]["ll"]["unit"] = "bits"
    with pytest.raises(pairs.PairsError, match="bits and nats"):
        pairs.measure(TEST, records)


# ------------------------------------------------------------------------------------------ verdicts
@pytest.mark.parametrize("first, claimed, verdict", [
    ([6.0, 7.0, 8.5], "higher", "supported"), ([6.0, 7.0, 8.5], "lower", "contradicted"),
    ([2.0, 2.5, 3.5], "higher", "contradicted"), ([2.0, 2.5, 3.5], "lower", "supported"),
    ([3.0, 6.0, 5.0], "higher", "undecided"), ([3.0, 6.0, 5.0], "lower", "undecided")])
def test_the_verdict_is_the_side_of_zero_that_the_interval_lies_on(first, claimed, verdict):
    t = scipy.stats.ttest_rel(first, [4.0, 5.0, 6.0], alternative="greater" if claimed == "higher" else "less")
    own = {name: value for name, value in CLAIM.items() if name != "published"}
    row, = claims.judge([own | {"claimed": claimed, "words": "so"}], [], both(first, [4.0, 5.0, 6.0]))
    low, effect, high = row["effect"]
    assert row["verdict"] == verdict and (t.pvalue < 0.025) == (verdict == "supported")
    assert effect == pytest.approx((t.statistic if claimed == "higher" else -t.statistic) / math.sqrt(3))
    assert (low > 0) == (verdict == "supported") and (high < 0) == (verdict == "contradicted")


def test_one_pair_decides_nothing_however_small_its_error():
    row = judged(both([5.0], [4.0], se=1e-6))
    assert (row["verdict"], row["why"], row["effect"]) == ("undecided", "one pair only, on the claimed side", None)
    assert judged(both([3.0], [4.0]))["why"] == "one pair only, on the other side"


def test_the_size_with_several_pairs_and_the_fewest_reductions_decides():
    near, far = ["steps 10 instead of 99"], ["steps 10 instead of 99", "size 1 instead of 2"]
    row = judged([*both([1.0], [9.0]), *both([6.0, 7.0, 8.5], [4.0, 5.0, 6.0], reduced=near),
                  *both([1.0] * 4, [4.0, 5.0, 5.0, 6.0], reduced=far)])
    assert [len(own["line"].size) for own in row["lines"]] == [1, 2, 0] and row["verdict"] == "supported"
    assert [own["verdict"] for own in row["lines"]] == ["supported", "contradicted", "undecided"]


def test_nothing_run_says_so_and_what_would_run_it():
    real = [claim for claim in claims.load() if claim["id"] == "hashing-disarm"]
    row, = claims.judge(real, scoreboard.flatten(scoreboard.load()), [])
    assert row["verdict"] == "not run" and len(row["commands"]) == 2
    assert row["commands"][1].endswith("--set estimator=arm")


def test_evidence_is_paired_by_the_stars_and_counted():
    row = judged(both())
    assert [(a["published"], b["published"]) for a, b in row["evidence"]] == [(3.5, 2.0), (1.0, 2.0)]
    assert row["holds"] == 1


# ------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize("changes, complaint", [
    ({"claimed": "up"}, "'claimed' must be higher or lower"),
    ({"published": {"first": "section.ll.*.lamp", "second": "section.ll.*.standard"}}, "lamp' names no number"),
    ({"published": {"first": "section.ll.*.vamp", "second": "section.ll.a.*"}}, "is there on one side only"),
    ({"published": "section.ll.a.vamp"}, "give first and second"),
    ({"published": {"first": ["section.ll.a.vamp"], "second": []}}, "lists of different length"),
    ({"published": {"first": "section.ll.b.vamp", "second": "section.ll.b.standard"}}, "numbers contradict the claim"),
    ({"shape": 1}, "unknown key 'shape'"), ({"test": None}, "vamp.test: expected keys and values"),
    ({"test": TEST | {"betwen": {}}}, "unknown key 'betwen': did you mean 'between'"),
    ({"test": {"metric": "ll"}}, "missing key 'experiment'"),
    ({"test": TEST | {"experiment": "gm"}}, "no notebook 'gm': did you mean 'gmm'?"),
    ({"test": TEST | {"where": ["size"]}}, "'where' must be a mapping, got ['size']"),
    ({"test": TEST | {"over": "size"}}, "'over' must be a list, got 'size'"),
    ({"test": {"experiment": "toy", "metric": "ll"}}, "a claim compares"),
    ({"test": TEST | {"metrics": ["a", "b"]}}, "give either 'metric'"),
    ({"test": TEST | {"between": {"prior": ["vamp"]}}}, "prior needs two different sides"),
    ({"test": TEST | {"between": {"prior": ["a", "b"], "size": [1, 2]}}}, "'between' must name one parameter"),
    ({"test": TEST | {"where": {"prio": 1}}}, "toy has no parameter 'prio': did you mean 'prior'"),
    ({"test": TEST | {"stand_in": {"name": "x"}}}, "stand_in: unknown key 'name'")])
def test_a_malformed_claim_is_one_sentence_that_names_file_and_key(changes, complaint):
    with pytest.raises((claims.ClaimsError, pairs.PairsError)) as raised:
        judged([], **changes)
    said = str(raised.value)
    assert complaint in said and said.startswith("claims.yml: vamp") and "\n" not in said


@pytest.mark.parametrize("key", claims.REQUIRED)
def test_a_missing_key_is_named(key):
    with pytest.raises(claims.ClaimsError, match=f"missing key '{key}'"):
        claims.check([{name: value for name, value in CLAIM.items() if name != key}], [])


def test_a_claim_needs_evidence_and_an_id_of_its_own():
    bare = {name: value for name, value in CLAIM.items() if name != "published"}
    with pytest.raises(claims.ClaimsError, match="give the original's evidence"):
        claims.check([bare], [])
    with pytest.raises(claims.ClaimsError, match="this id is there twice"):
        claims.check([CLAIM, copy.deepcopy(CLAIM)], scoreboard.flatten(PUBLISHED))


@pytest.mark.parametrize("text, complaint", [("- {a: [", "cannot be read"), ("a: 1", "must be a list"), ("", "list")])
def test_an_unreadable_file_is_one_sentence(tmp_path, text, complaint):
    path = tmp_path / "claims.yml"
    path.write_text(text)
    with pytest.raises(claims.ClaimsError, match=complaint) as raised:
        claims.load(path)
    assert str(raised.value).startswith("claims.yml") and "\n" not in str(raised.value)
    with pytest.raises(claims.ClaimsError, match="claims.yml cannot be read"):
        claims.load(tmp_path / "none" / "claims.yml")


# ------------------------------------------------------------------------------------------ the book's own
@pytest.fixture(scope="module")
def book():
    return claims.judge(claims.load(), scoreboard.flatten(scoreboard.load()), runs.records())


def test_the_books_claims_are_judged(book):
    assert sum(claims.counts(book).values()) == len(book)
    assert {row["work"] for row in book} == {"approximation-error", "autoencoders", "vampprior", "symmetric-learning"}
    assert all((root() / "book" / f"{row['work']}.md").is_file() for row in book)
    asked = {"vamp-vae", "vamp-hvae", "hashing-e2", "hashing-e3", "symmetric-limiting-reverse", "beta-mig", "beta-dci",
             "celeba-fid", "celeba-elbo", "gmm-elbo", "gmm-evidence"}
    assert asked <= {row["id"] for row in book}


def test_every_metric_that_a_claim_names_was_measured_or_has_a_stand_in(book):
    for row in book:
        measured = {name for one in runs.records(row["test"]["experiment"]) for name in one["metrics"]}
        names = row["test"].get("stand_in", row["test"])
        assert set(names.get("metrics") or [names["metric"]]) <= measured, row["id"]


def test_no_number_is_typed_into_a_claims_words(book):
    for row in book:
        for name in ("claim", "words", "note"):
            words = row[name]
            for known in ("e1", "e2", "e3", "N(0, I)", "known fault 1", "known fault 5", "known fault 8"):
                words = words.replace(known, "")
            assert not any(letter.isdigit() for letter in words), (row["id"], name)


def test_a_line_of_the_table_has_symbol_word_n_size_and_links():
    text = evidence.of_claims([judged(both([6.0, 7.0, 8.5], [4.0, 5.0, 6.0]))]).replace("\N{NO-BREAK SPACE}", " ")
    for part in ("✓ supported", "n = 3 seeds", "d<sub>z</sub> = 7.5", "+2.17 ± 0.72", "claimed above zero",
                 "1 of 2 pairs", "6 runs", 'href="recorded-runs.html#toy--'):
        assert part in text, part
    hostile = evidence.of_claims([judged(both(), claim="<script>", note="<b>")])
    assert "<script>" not in hostile and "<b>" not in hostile
