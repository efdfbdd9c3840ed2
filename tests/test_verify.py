"""Recorded runs that are run again: equal, within tolerance, or different, each in a line that says why."""
import json
import math

import pytest
from toy import taken_for_checkout, toy_checkout, toy_record

from lib import execute, integrity, launch, runs, verify
from lib.__main__ import main

TOY = ['''\
steps: int = 3  # how far to go
seed: int = 1  # of nothing
kernel: str = "imq"  # of nothing
resume: str = ""  # go on from
device: str = "auto"  # where
''', '''\
from lib import runs
runs._glue = lambda values: None                       # slow to import, and another test's matter
runs.device_info = lambda name: {"kind": "cpu", "name": "toy", "threads": 1}
run = runs.start("toy", globals())
run.save({"score": {"value": steps / 3 + seed, "se": 0.1, "n": 9, "unit": "points"}})
''']
SCORE = {"value": 2.0, "se": 0.1, "n": 9, "unit": "points"}
HAD = {"steps": 3, "seed": 1, "kernel": "imq", "resume": "auto", "device": "cpu"}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with the toy's notebook."""
    folder = toy_checkout(tmp_path / "checkout", TOY, "toy:\n  paper: {steps: 30}\n")
    return taken_for_checkout(folder, monkeypatch)


@pytest.fixture
def recorded(checkout):
    """recorded("toy", metrics=...): writes a record, at smoke size or by its path, with its checksum."""
    def write(name, **changes):
        folder = integrity.smoke() if "/" not in name else integrity.results()
        experiment, _, run = name.partition("/")
        path = folder / name / "results.json"
        path.parent.mkdir(parents=True)
        own = {"experiment": experiment, "run": run or "default", "preset": "", "parameters": HAD,
               "metrics": {"score": SCORE}, "versions": runs.versions()}
        path.write_text(runs.as_text(toy_record(**own | changes)))
        integrity.renew(folder)
    return write


@pytest.fixture
def outcome(checkout, monkeypatch):
    """outcome(score={...}): what the notebook will find, without a kernel; a list of what it was asked for."""
    asked = []

    def put(metrics=None, **changes):
        def run(experiment, preset, values, out, **options):
            asked.append((experiment, preset, values, out, options))
            launch.values_of(experiment, preset, values)
            record = {"experiment": experiment, "metrics": metrics or {"score": SCORE}, "versions": runs.versions()}
            runs.make_folder(integrity.Path(out))
            (integrity.Path(out) / "results.json").write_text(json.dumps(toy_record(**record | changes)))
        monkeypatch.setattr(launch, "run", run)
        return asked
    return put


def verified(capsys, *names):
    """(exit code, lines) of `python -m lib verify`."""
    code = main(["verify", *names])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out.splitlines()


# ------------------------------------------------------------------------------------------------ with a kernel
def test_a_smoke_run_is_run_again_from_scratch_and_found_equal_or_not(checkout, recorded, capsys, monkeypatch):
    recorded("toy")
    folder = checkout / "runs" / ".verify" / "toy" / "default"
    executed = []
    monkeypatch.setattr(launch, "execute", lambda *words: (executed.append(1), execute.execute(*words)))
    for time in (1, 2):                                                 # the second time it is not taken for done
        assert verified(capsys) == (0, ["toy: equal: 1 metrics to the last digit"]) and len(executed) == time
        assert runs.read(folder / "results.json")["metrics"] == {"score": SCORE}
    assert runs.records(folder=checkout / "runs") == []                 # no working run of anybody
    recorded("toy/paper-seed=2", parameters=HAD | {"steps": 30, "seed": 2}, metrics={"score": SCORE})
    code, (line,) = verified(capsys, "toy/paper-seed=2")
    assert code == 1 and line.startswith("toy/paper-seed=2: DIFFERS in 1 of 1 metrics: score 2 recorded, 12 now")


# ------------------------------------------------------------------------------------------------ what is compared
def test_the_same_parameters_are_run_on_as_many_threads(recorded, outcome, capsys):
    recorded("toy", parameters=HAD | {"steps": 7}, device={"kind": "cpu", "name": "toy", "threads": 3})
    asked = outcome()
    assert verified(capsys)[0] == 0
    (experiment, preset, values, _, options), = asked
    assert (experiment, preset, values) == ("toy", "", {"steps": 7, "seed": 1, "kernel": "imq"})
    assert options == {"threads": 3, "again": True}


@pytest.mark.parametrize(("value", "passed", "said"), [
    (2.0, True, "equal: 1 metrics to the last digit"),
    (2.1, True, "within tolerance, 0.24 of it at most: score 2 recorded, 2.1 now, tolerance 0.424"),
    (2.0 + 2.99 * math.hypot(0.1, 0.1), True, "within tolerance, 1 of it at most"),
    (2.0 - 3.01 * math.hypot(0.1, 0.1), False, "DIFFERS in 1 of 1 metrics: score 2 recorded, 1.57432 now, "
                                               "tolerance 0.424; recorded at commit aaaaaaaaaa")])
def test_a_metric_with_an_error_may_differ_by_three_errors_of_the_difference(recorded, outcome, capsys, value, passed,
                                                                            said):
    recorded("toy")
    outcome({"score": SCORE | {"value": value}})
    code, (line,) = verified(capsys)
    assert code == (not passed) and line.startswith(f"toy: {said}")


@pytest.mark.parametrize(("before", "now", "passed"), [
    (10.0, 10.99, True), (10.0, 11.01, False), (-10.0, -9.01, True), (0.0, 0.0, True), (0.0, 1e-9, False)])
def test_a_metric_without_an_error_may_differ_by_a_tenth(before, now, passed):
    plain = SCORE | {"se": None}
    assert verify.compared({"a": plain | {"value": before}}, {"a": plain | {"value": now}})[0] is passed
    exact = SCORE | {"se": 0.0}
    assert verify.compared({"a": exact | {"value": before}}, {"a": exact | {"value": now}})[0] is passed


def test_an_error_that_grows_does_not_widen_the_tolerance():
    before = SCORE | {"value": -82.0, "se": 0.01}
    assert not verify.compared({"a": before}, {"a": SCORE | {"value": -150.0, "se": 50.0}})[0]
    assert verify.compared({"a": before}, {"a": SCORE | {"value": -82.0, "se": None}}) == (
        False, "DIFFERS in 1 of 1 metrics: a has se 0.01, now None")


def test_the_worst_metrics_are_named_and_the_others_counted():
    before = {name: SCORE for name in "abcdefg"}
    now = before | {"a": SCORE | {"value": 3.0}, "b": SCORE | {"n": 8}, "c": SCORE | {"unit": "nats"},
                    "e": SCORE | {"value": 4.0}, "extra": SCORE}
    del now["d"]
    passed, said = verify.compared(before, now)
    assert not passed
    assert said == ("DIFFERS in 5 of 7 metrics: b has n 9, now 8, c has unit 'points', now 'nats', d is no longer "
                    "measured and 2 more")
    passed, said = verify.compared({"a": SCORE, "e": SCORE}, now)
    assert "DIFFERS in 2 of 2 metrics: e 2 recorded, 4 now, tolerance 0.424, a 2 recorded, 3 now" in said


def test_times_are_not_compared():
    before = {"score": SCORE, "ms": SCORE | {"unit": "ms per step"}, "cost": SCORE | {"unit": "steps by disarm"}}
    now = before | {"ms": SCORE | {"unit": "ms per step", "value": 99.0}, "cost": SCORE | {"unit": "steps by disarm",
                                                                                          "value": 9.0}}
    assert verify.compared(before, now) == (True, "equal: 1 metrics to the last digit")


def test_what_has_changed_since_is_named(recorded, outcome, capsys):
    now, data = runs.versions(), {"name": "x", "sha256": 64 * "a"}
    old = now | {"torch": "1.0", "numpy": "1.0"}
    recorded("toy", versions=old, dataset=data)
    outcome({"score": SCORE | {"value": 2.1}}, device={"kind": "cuda", "name": "A100", "threads": 1})
    line = verified(capsys)[1][0]
    assert line.endswith(f"; since then torch 1.0 → {now['torch']}, numpy 1.0 → {now['numpy']}, device kind cpu → "
                         "cuda, device name toy → A100, data set x aaaaaaaaaa → none")
    outcome({"score": SCORE | {"value": 2.1}}, dataset=data, versions=old)
    assert verified(capsys)[1][0].endswith("; with the versions, the device and the data of the record")


def test_other_seeds_scatter_widens_the_tolerance_of_a_run_that_differs(recorded, outcome, capsys, monkeypatch):
    recorded("toy")
    found = {1: 3.0, 2: 2.0, 3: 4.0}
    asked = outcome()

    def run(experiment, preset, values, **options):
        outcome({"score": SCORE | {"value": found[values["seed"]]}})
        inner = launch.run
        monkeypatch.setattr(launch, "run", run)
        inner(experiment, preset, values, **options)
    monkeypatch.setattr(launch, "run", run)
    code, (line,) = verified(capsys)
    assert code == 1 and "score 2 recorded, 3 now, tolerance 0.424" in line and len(asked) == 1
    code, (line,) = verified(capsys, "--seeds", "2")
    allowed = 4.302652729911275 * math.sqrt(2) * 1.0                    # t of two degrees of freedom
    assert code == 0 and line.startswith(f"toy: within tolerance, {1 / allowed:.2g} of it at most: score 2 recorded, 3 "
                                         f"now, tolerance {allowed:.3g} (by 3 seeds)")
    assert [values["seed"] for _, _, values, _, _ in asked[1:]] == [1, 2, 3]
    assert len({out for _, _, _, out, _ in asked[1:]}) == 3
    found |= {1: 12.0, 2: 12.5, 3: 11.5}                                # the seeds agree with each other alone
    code, (line,) = verified(capsys, "--seeds", "2")
    assert code == 1 and "DIFFERS in 1 of 1 metrics: score 2 recorded, 12 now, tolerance 3.04" in line


# ------------------------------------------------------------------------------------------------ what cannot be run
def test_a_parameter_that_is_gone_or_new_is_told(recorded, outcome, capsys):
    outcome()
    recorded("toy", parameters=HAD | {"bits": 8})
    recorded("toy/old", parameters={name: value for name, value in HAD.items() if name != "kernel"})
    code, lines = verified(capsys, "toy", "toy/old")
    assert code == 1 and lines == [
        "toy: FAILED: it ran with bits=8, which notebook toy no longer has: only its own code can run it again, commit "
        "aaaaaaaaaa",
        "toy/old: equal: 1 metrics to the last digit; new since then, at the default: kernel='imq'"]


def test_a_notebook_that_is_gone_fails_and_the_next_run_is_still_verified(checkout, recorded, outcome, capsys):
    outcome()
    recorded("lost")
    recorded("toy")
    code, lines = verified(capsys)
    assert code == 1 and lines == ["lost: FAILED: no notebook 'lost'; it has toy",
                                   "toy: equal: 1 metrics to the last digit"]


def refused(capsys, *names):
    assert main(["verify", *names]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").rstrip("\n")


def test_unknown_names_benchmarks_and_tampered_records_are_refused_before_anything_runs(recorded, outcome, capsys):
    asked = outcome()
    assert refused(capsys).startswith("no run is recorded at smoke size: `python -m lib run NAME`")
    recorded("toy")
    recorded("toy/paper")
    assert refused(capsys, "toy", "toy/papr") == "no recorded run 'toy/papr': did you mean 'toy/paper'?"
    (integrity.results() / "benchmarks").mkdir()
    (integrity.results() / "benchmarks" / "cpu.json").write_text("{}")
    integrity.renew(integrity.results())
    assert refused(capsys, "benchmarks/cpu.json").startswith("benchmarks/cpu.json is a benchmark, not a run")
    path = integrity.smoke() / "toy" / "results.json"
    path.write_text(path.read_text().replace("2.0", "2.1"))
    assert refused(capsys).startswith("book/smoke/toy/results.json is not what was recorded")
    assert asked == []


def test_the_help_states_the_rule(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    said = capsys.readouterr().out
    assert f"{verify.ERRORS} standard errors of the difference" in " ".join(said.split())
    assert f"{verify.RELATIVE:.0%}".replace("%", " %") in said
