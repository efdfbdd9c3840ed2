"""Many runs as one table: means, errors over seeds, settings kept apart."""
import numpy as np
import pytest
import torch

from lib import evaluate, runs

GOOD = {"nelbo": evaluate.exact(3.25, "nats"), "acc": evaluate.estimate(torch.tensor([0.0, 1.0]), "fraction")}
PARAMETERS = {"steps": 300, "lr": 0.001, "model": "a # b", "seed": 1, "device": "auto", "resume": ""}


def run_of(value, se=None, reduced=(), **parameters):
    metric = {"value": value, "se": se, "n": 9, "unit": "nats"}
    return {"parameters": PARAMETERS | parameters, "reduced": list(reduced), "metrics": {"nelbo": metric}}


def test_a_table_has_mean_and_standard_error_over_seeds():
    values = [3.0, 3.5, 3.1]
    found = [run_of(v, 0.1, seed=i) for i, v in enumerate(values)]
    found += [run_of(7.0, 0.02, model="b"), run_of(8.0, model="c")]
    table = runs.table(found, ["nelbo", "absent"], ["model"])
    assert list(table.columns) == ["model", "seeds", "size", "nelbo", "absent"]
    assert table["model"].tolist() == ["a # b", "b", "c"] and table["seeds"].tolist() == [3, 1, 1]
    mean, se = np.mean(values), np.std(values, ddof=1) / 3 ** 0.5
    assert table["nelbo"].tolist() == [f"{mean:.2f} ± {se:.2f}", "7.000 ± 0.020", "8.0000"]
    assert set(table["absent"]) == {"–"} and set(table["size"]) == {"full"}


def test_a_table_keeps_sizes_apart_and_takes_older_runs():
    found = [run_of(3.0, seed=1), run_of(9.0, reduced=["steps 3 instead of 9"], seed=2, steps=3), run_of(5.0, seed=3)]
    table = runs.table(found, ["nelbo"], ["model", "kernel"])
    assert table["size"].tolist() == ["full", "steps 3 instead of 9"] and table["seeds"].tolist() == [2, 1]
    assert table["nelbo"].tolist() == ["4.0 ± 1.0", "9.0000"] and set(table["kernel"]) == {"–"}
    none = runs.table([], ["nelbo"], ["model"])
    assert none.empty and list(none) == ["model", "seeds", "size", "nelbo"]


@pytest.mark.parametrize(("value", "se", "text"), [
    (3.14159, None, "3.1416"), (3.14159, 0.0, "3.1416"), (1234.5678, 12.3, "1235 ± 12"),
    (1234.5678, 123.0, "1235 ± 123"), (0.012345, 0.00123, "0.0123 ± 0.0012"), (-3.3712, 0.0451, "-3.371 ± 0.045"),
    (1.2e-5, 1.3e-6, "0.000012 ± 0.000001")])
def test_a_number_is_shown_to_its_errors_second_digit(value, se, text):
    assert runs.metrics_table({"m": {"value": value, "se": se, "n": 5, "unit": "nats"}}).loc["m", "value"] == text


def test_metrics_as_a_table():
    table = runs.metrics_table(GOOD)
    assert table.index.tolist() == ["nelbo", "acc"] and table["n"].tolist() == [1, 2]
    assert table["unit"].tolist() == ["nats", "fraction"] and table["value"].tolist() == ["3.2500", "0.50 ± 0.50"]
