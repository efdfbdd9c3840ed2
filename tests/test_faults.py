"""Known faults: all seventeen are there, measured from records, and mistakes in the file are named."""
import copy
import re

import pytest
import torch

from lib import evidence, faults, pairs, root, runs, scoreboard
from lib.batches import Shuffled

PUBLISHED = scoreboard.flatten(scoreboard.load())


@pytest.fixture(scope="module")
def records():
    return runs.records()


@pytest.fixture(scope="module")
def book(records):
    return {row["n"]: row for row in faults.measure(faults.load(), records, PUBLISHED)}


@pytest.fixture
def written():
    """The book's file, to be spoilt."""
    return copy.deepcopy(faults.load())


# ------------------------------------------------------------------------------------------ the book's own
def test_all_seventeen_are_there_with_the_work_they_belong_to(book):
    assert list(book) == list(range(1, 18))
    works = {"approximation-error": 6, "autoencoders": 3, "vampprior": 5, "symmetric-learning": 3}
    assert {work: sum(row["work"] == work for row in book.values()) for work in works} == works
    for work in works:                                                      # every number is told in its chapter
        text = (root() / "book" / f"{work}.md").read_text()
        told = re.findall(r"\d+", " ".join(re.findall(r"known faults? [\d, and]+", text)))
        told += re.findall(r"\*(\d+)\.\*", text)
        assert {n for n, row in book.items() if row["work"] == work} <= set(map(int, told))


def test_the_state_follows_from_what_was_run(book):
    assert sum(faults.counts(list(book.values())).values()) == 17
    assert {n for n, row in book.items() if row["state"] == "nothing to measure"} == {11, 12, 16, 17}
    for row in book.values():
        assert (row["state"] == "measured") == (bool(row["tests"]) and all(test["lines"] for test in row["tests"]))


def test_without_records_everything_is_not_run_and_says_what_would_run_it(written):
    for fault in written:
        fault.pop("ran", None)
        fault["original"] = "so"
    rows = faults.measure(written, [], PUBLISHED)
    tests = [test for row in rows for test in row["tests"]]
    assert {row["state"] for row in rows} == {"not run", "nothing to measure"}
    assert all(command.startswith("python -m lib run ") for test in tests for command in test["commands"])
    assert all(test["commands"] for test in tests)


def test_every_metric_that_a_fault_names_was_measured_but_the_fid(book, records):
    for n, row in book.items():
        for test in row["tests"]:
            own, kind = test["test"], "history" if "history" in test["test"] else "metrics"
            known = {name for one in records if one["experiment"] == own["experiment"] for name in one[kind]}
            missing = set(own.get("metrics") or [own["metric"]]) - known
            assert not missing or all(name.startswith("fid_") for name in missing), (n, missing)


def test_numbers_are_those_of_the_records(book, records):
    by_path = {one["path"]: one["metrics"] for one in records}
    one, = (line for test in book[7]["tests"][:1] for line in test["lines"])
    vae = by_path["autoencoders/cpu"]
    assert one.interval.mean == pytest.approx(vae["elbo"]["value"] - vae["elbo_best_sigma"]["value"])
    mixture = [test["lines"][0].interval.mean for test in book[3]["tests"][:3]]
    names = ("expected_evidence_code", "expected_evidence_text_variance", "expected_evidence_text_deviation")
    assert mixture == pytest.approx([by_path["gmm/paper"][name]["value"] for name in names])
    rate = book[9]["tests"][0]["lines"][0]
    faces = [by_path[f"celeba-autoencoders/cpu{end}"]["mse"]["value"] for end in ("-lr=0.02", "")]
    assert rate.interval.mean == pytest.approx(faces[0] - faces[1]) and rate.pairs == 1
    assert book[11]["ran"] and all("fashionmnist" in path for path in book[11]["ran"])


def test_no_result_is_typed_into_the_words():
    for fault in faults.load():
        told = [fault.get(name, "") for name in faults.WORDS]
        for words in told + [test["words"] for test in fault.get("tests", [])]:
            for known in ("N(0, I)", "e1", "e2", "e3", "tests/test_faults.py"):
                words = words.replace(known, "")
            assert not re.search(r"\d", faults.REFERENCE.sub("", words)), (fault["n"], words)


def test_here_no_image_is_drawn_twice_in_an_epoch():
    batches = Shuffled(torch.arange(103), 10, seed=3)
    for epoch in range(3):
        drawn = batches.indices(10 * epoch, 10).flatten()
        assert len(drawn) == len(drawn.unique()) == 100


# ------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize("changes, complaint", [
    ({"fault": None}, "missing key 'fault'"), ({"shape": 1}, "unknown key 'shape'"),
    ({"tests": None}, "give either 'tests' or, with the reason, 'nothing'"),
    ({"nothing": "so"}, "give either 'tests' or, with the reason, 'nothing'"),
    ({"tests": [{"test": {}}]}, "tests[0]: give words and test"),
    ({"tests": [{"words": "so", "test": {"experiment": "gmm"}}]}, "tests[0]: give either 'metric'"),
    ({"tests": [{"words": "so", "test": {"experiment": "gmm", "metric": "elbo_joint", "where": {"seeds": 1}}}]},
     "gmm has no parameter 'seeds': did you mean 'seed'?"),
    ({"ran": {"experiment": "gmm"}}, "ran: give experiment and where"),
    ({"used": ["lr"]}, "used: give experiment and parameters"),
    ({"original": "{run gmm/none seed}"}, "{run gmm/none seed} names nothing"),
    ({"here": "{preset gmm paper lr}"}, "{preset gmm paper lr} names nothing"),
    ({"here": "{default gmm lr}"}, "{default gmm lr} names nothing"),
    ({"here": "{published gmm.elbo}"}, "{published gmm.elbo} names nothing"),
    ({"here": "{file x}"}, "{file x} names nothing"),
    ({"ran": {"experiment": "gmm", "where": {"covariance": 7}}}, "no recorded run of gmm has {'covariance': 7}")])
def test_a_malformed_fault_is_one_sentence_that_names_file_and_number(written, records, changes, complaint):
    written[5] = {name: value for name, value in (written[5] | changes).items() if value is not None}
    with pytest.raises((faults.FaultsError, pairs.PairsError)) as raised:
        faults.measure(written, records, PUBLISHED)
    said = str(raised.value)
    assert complaint in said and said.startswith("faults.yml: fault 6") and "\n" not in said


def test_a_fault_that_is_missing_twice_there_or_out_of_order_is_named(written):
    with pytest.raises(faults.FaultsError, match="fault 3 is missing"):
        faults.check(written[:2] + written[3:])
    with pytest.raises(faults.FaultsError, match="once and in order"):
        faults.check([*written, written[0]])
    with pytest.raises(faults.FaultsError, match="once and in order"):
        faults.check(written[::-1])


@pytest.mark.parametrize("text, complaint", [("- {a: [", "cannot be read"), ("a: 1", "must be a list")])
def test_an_unreadable_file_is_one_sentence(tmp_path, text, complaint):
    path = tmp_path / "faults.yml"
    path.write_text(text)
    with pytest.raises(faults.FaultsError, match=complaint) as raised:
        faults.load(path)
    assert str(raised.value).startswith("faults.yml") and "\n" not in str(raised.value)


def test_references_are_filled_in():
    by_path = {"toy/a": {"metrics": {"ll": {"value": -1.23456}}, "parameters": {"steps": 200000, "lr": 2e-5}}}
    by_key = {"s.x": {"published": -3.3, "decimals": 2}}
    text = "{run toy/a ll}, {run toy/a steps}, {run toy/a lr}, {published s.x}, {default gmm joint_steps}"
    assert faults._filled(text, by_path, by_key, "here") == "−1.235, 200,000, 0.00002, −3.30, 2,000"


# ------------------------------------------------------------------------------------------ the table
def test_a_line_of_the_table_tells_both_ways_number_size_and_runs(book):
    text = evidence.of_faults([book[6]]).replace("\N{NO-BREAK SPACE}", " ")
    for part in ("<strong>There:</strong>", "<strong>Here:</strong>", "<code>zero</code>", "last_layer normal in",
                 "nats per code", "one pair, no error known", "● measured"):
        assert part in text, part
    not_run = evidence.of_faults([book[4]])
    assert "◐ in part" in not_run and "○ not run" in not_run and "python -m lib run celeba-joint" in not_run
    assert 'href="recorded-runs.html#vampprior--cpu-' in evidence.of_faults([book[11]])
