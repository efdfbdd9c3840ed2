"""Many runs as one table: means, intervals over seeds or items, settings kept apart."""
import numpy as np
import pytest
import torch

from lib import evaluate, runs

GOOD = {"nelbo": evaluate.exact(3.25, "nats"), "acc": evaluate.estimate(torch.tensor([0.0, 1.0]), "fraction")}
PARAMETERS = {"steps": 300, "lr": 0.001, "model": "a # b", "seed": 1, "device": "auto", "resume": ""}


def run_of(value, se=None, reduced=(), **parameters):
    metric = {"value": value, "se": se, "n": 9, "unit": "nats"}
    return {"parameters": PARAMETERS | parameters, "reduced": list(reduced), "metrics": {"nelbo": metric}}


def test_a_table_has_mean_and_interval_over_seeds_or_items():
    """t(0.975; 2) = 4.302653 and t(0.975; 8) = 2.306004, from tables."""
    values = [3.0, 3.5, 3.1]
    found = [run_of(v, 0.1, seed=i) for i, v in enumerate(values)]
    found += [run_of(7.0, 0.02, model="b"), run_of(8.0, model="c")]
    table = runs.table(found, ["nelbo", "absent"], ["model"])
    assert list(table.columns) == ["model", "seeds", "size", "nelbo", "absent"]
    assert table["model"].tolist() == ["a # b", "b", "c"] and table["seeds"].tolist() == [3, 1, 1]
    mean, half = np.mean(values), 4.302653 * np.std(values, ddof=1) / 3 ** 0.5
    assert table["nelbo"].tolist() == [f"{mean:.2f} ± {half:.2f}", "7.000 ± 0.046 (n=9 items)", "8.0000"]
    assert 2.306004 * 0.02 == pytest.approx(0.046, abs=5e-4)
    assert set(table["absent"]) == {"–"} and set(table["size"]) == {"full"}


def test_a_metric_that_only_some_seeds_have_says_how_many():
    found = [run_of(v, seed=i) for i, v in enumerate([3.0, 5.0, 4.0])]
    found[0]["metrics"]["new"] = found[1]["metrics"]["new"] = {"value": 1.0, "se": None, "n": 1, "unit": "nats"}
    found[2]["metrics"]["alone"] = {"value": 2.0, "se": 0.1, "n": 9, "unit": "nats"}
    table = runs.table(found, ["new", "alone", "nelbo"], [])
    assert table.loc[0].tolist()[2:] == ["1.0000 (n=2)", "2.00 ± 0.23 (n=9 items)", "4.0 ± 2.5"]


def test_a_table_keeps_sizes_apart_and_takes_older_runs():
    found = [run_of(3.0, seed=1), run_of(9.0, reduced=["steps 3 instead of 9"], seed=2, steps=3), run_of(5.0, seed=3)]
    table = runs.table(found, ["nelbo"], ["model", "kernel"])
    assert table["size"].tolist() == ["full", "steps 3 instead of 9"] and table["seeds"].tolist() == [2, 1]
    assert table["nelbo"].tolist() == ["4 ± 13", "9.0000"] and set(table["kernel"]) == {"–"}
    none = runs.table([], ["nelbo"], ["model"])
    assert none.empty and list(none) == ["model", "seeds", "size", "nelbo"]


@pytest.mark.parametrize(("value", "se", "text"), [
    (3.14159, None, "3.1416"), (3.14159, 0.0, "3.1416"), (1234.5678, 12.3, "1235 ± 34"),
    (1234.5678, 123.0, "1235 ± 342"), (0.012345, 0.00123, "0.0123 ± 0.0034"), (-3.3712, 0.0151, "−3.371 ± 0.042"),
    (1.2e-5, 1.3e-7, "0.00001200 ± 0.00000036")])
def test_a_number_is_shown_to_the_second_digit_of_its_half_width(value, se, text):
    """t(0.975; 4) = 2.776445, from tables."""
    assert runs.metrics_table({"m": {"value": value, "se": se, "n": 5, "unit": "nats"}}).loc["m", "value"] == text


def test_metrics_as_a_table():
    table = runs.metrics_table(GOOD)
    assert table.index.tolist() == ["nelbo", "acc"] and table["n"].tolist() == [1, 2]
    assert table["unit"].tolist() == ["nats", "fraction"]
    assert table["value"].tolist() == ["3.2500", "0.5 ± 6.4"]      # t(0.975; 1) = 12.706


@pytest.mark.parametrize(("wall", "parts", "seconds"), [(9.5, None, 9.5), (9.5, [4, 3], 9.5), (9.5, [6, 7.5], 13.5)])
def test_a_runs_time_is_that_of_its_training_where_it_was_measured_again_later(wall, parts, seconds):
    made_by = {} if parts is None else {"made_by": [{"seconds": part} for part in parts]}
    assert runs.seconds({"wall_time_s": wall} | made_by) == seconds
