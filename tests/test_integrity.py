"""The recorded runs are what was recorded: each way to change one is told in a sentence that says what to do."""
import json
import subprocess
import sys
import threading

import jsonschema
import pytest
from toy import toy_record

import lib
from lib import integrity, recording, runs
from lib.__main__ import main


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A checkout with two recorded runs of a toy, one with a picture, and a benchmark."""
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "presets.yml").write_text("toy: {paper: {steps: 10}}")
    for name, figures in (("paper", ["latent.png"]), ("paper-seed=2", [])):
        folder = tmp_path / "book" / "results" / "toy" / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(runs.as_text(toy_record(run=name, figures=figures)))
    (tmp_path / "book" / "results" / "toy" / "paper" / "latent.png").write_bytes(b"picture")
    (tmp_path / "book" / "results" / "benchmarks").mkdir()
    (tmp_path / "book" / "results" / "benchmarks" / "cpu-toy.json").write_text("{}")
    integrity.renew(integrity.results())
    return tmp_path


def complaint(call, *arguments):
    with pytest.raises(runs.RunError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def sha256sum(folder):
    return subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, capture_output=True).returncode


# ------------------------------------------------------------------------------------------------ the form
SCHEMA = json.loads((lib.root() / "lib" / "results.schema.json").read_text())


def test_the_schema_is_one_and_another_validator_says_the_same():
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(toy_record(), SCHEMA)
    integrity.validate(toy_record(), "here")


def test_every_record_of_the_book_is_as_the_schema_says_and_what_was_recorded():
    assert len(runs.records()) > 100
    assert sha256sum(integrity.results()) == 0


METRIC = {"value": 1.5, "se": None, "n": 1, "unit": "points"}
GIT = {"commit": "a" * 40, "dirty": False}


@pytest.mark.parametrize(("changes", "said"), [
    ({"schema": 2}, "schema must be"), ({"run": "../../elsewhere"}, "run must match pattern"),
    ({"experiment": "a/b"}, "experiment must match pattern"), ({"seed": "2"}, "seed must be integer or null"),
    ({"metrics": [1.5]}, "metrics must be object"),
    ({"metrics": {"a": METRIC | {"value": "1.5"}}}, "metrics.a.value must be number"),
    ({"metrics": {"a": METRIC | {"value": True}}}, "metrics.a.value must be number"),
    ({"metrics": {"a": METRIC | {"value": 1e305}}}, "metrics.a.value must be smaller than"),
    ({"metrics": {"a": METRIC | {"se": -1.0}}}, "metrics.a.se must be bigger than"),
    ({"metrics": {"a": METRIC | {"n": 0}}}, "metrics.a.n must be bigger than"),
    ({"metrics": {"a": METRIC | {"more": 1}}}, "metrics.a must not contain {'more'} properties"),
    ({"metrics": {"a": {"value": 1.5, "se": None}}}, "metrics.a lacks n, unit"),
    ({"git": GIT | {"commit": "main"}}, "git.commit must match"), ({"git": GIT | {"dirty": 0}}, "git.dirty must be"),
    ({"git": {}}, "git lacks commit, dirty"), ({"device": {"kind": "tpu", "name": "x", "threads": 1}}, "device.kind"),
    ({"parameters": {"steps": None}}, "parameters.steps must be"), ({"reduced": "full"}, "reduced must be array"),
    ({"figures": ["../x.png"]}, "figures[0] must match pattern"), ({"figures": ["a.png", "a.png"]}, "figures must"),
    ({"figures": ["x.ipynb"]}, "figures[0] must match"), ({"versions": {"python": 3}}, "versions.python must be"),
    ({"wall_time_s": -1}, "wall_time_s must be"), ({"date": "yesterday"}, "date must match"),
    ({"dataset": {"name": "mnist"}}, "dataset lacks sha256"), ({"history": [1]}, "history must be object"),
    ({"made_by": [GIT]}, "made_by[0] lacks seconds, steps"), ({"chain": [{"git": GIT}]}, "chain[0] lacks command"),
    ({"command": "rm -r"}, "command must match")])
def test_what_is_not_as_the_schema_says_is_told_by_name(tmp_path, changes, said):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(toy_record(**changes)))
    assert complaint(runs.read, path).startswith(f"{path} is not a results.json of schema 1: {said}")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(toy_record(**changes), SCHEMA)


@pytest.mark.parametrize("key", sorted(set(toy_record()) - {"made_by"}))
def test_no_key_may_be_missing(tmp_path, key):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({name: value for name, value in toy_record().items() if name != key}))
    assert complaint(runs.read, path) == f"{path} is not a results.json of schema 1: it lacks {key}"


def test_a_number_that_is_none_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(toy_record()).replace("1.5", "1e999"))
    assert "metrics.score.value must be smaller than" in complaint(runs.read, path)
    path.write_text(json.dumps(toy_record(metrics={"a": METRIC | {"value": float("nan")}})))
    assert complaint(runs.read, path) == f"{path} cannot be read: NaN is no number"


def test_a_record_is_read_without_the_slow_validator():
    code = ("import sys; from lib import runs; runs.records('gmm'); "
            "print({'jsonschema', 'torch', 'pandas', 'nbformat'} & set(sys.modules))")
    found = subprocess.run([sys.executable, "-c", code], cwd=lib.root(), capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


# ------------------------------------------------------------------------------------------------ the checksums
def tampered(folder):
    path = folder / "toy" / "paper" / "results.json"
    path.write_text(path.read_text().replace("1.5", "1.4"))


def truncated(folder):
    path = folder / "toy" / "paper" / "results.json"
    path.write_bytes(path.read_bytes()[:-40])


def other_picture(folder):
    (folder / "toy" / "paper" / "latent.png").write_bytes(b"another")


def no_picture(folder):
    (folder / "toy" / "paper" / "latent.png").unlink()


def unlisted(folder):
    (folder / "toy" / "new").mkdir()
    (folder / "toy" / "new" / "results.json").write_text(runs.as_text(toy_record(run="new")))


def linked(folder):
    new = folder.parent / "elsewhere"
    new.mkdir()
    (new / "results.json").write_text(runs.as_text(toy_record(run="new")))
    (folder / "toy" / "new").symlink_to(new)


def tampered_benchmark(folder):
    (folder / "benchmarks" / "cpu-toy.json").write_text('{"ratio": 100}')


@pytest.mark.parametrize(("change", "file", "said"), [
    (tampered, "toy/paper/results.json", "differs from its line"), (other_picture, "toy/paper/latent.png", "differs"),
    (truncated, "toy/paper/results.json", "differs"), (no_picture, "toy/paper/latent.png", "is missing, but has"),
    (unlisted, "toy/new/results.json", "has no line"), (linked, "toy/new/results.json", "has no line"),
    (tampered_benchmark, "benchmarks/cpu-toy.json", "differs")])
def test_what_was_not_recorded_is_refused(house, change, file, said):
    assert sha256sum(integrity.results()) == 0
    change(integrity.results())
    for experiment in (None, file.partition("/")[0]):
        found = complaint(runs.records, experiment)
        assert found.startswith(f"book/results/{file} ") and said in found and "`" in found, found
    assert sha256sum(integrity.results()) == (0 if change in (unlisted, linked) else 1)
    if "toy" in file.partition("/")[0]:
        runs.records("benchmarks")                                      # of another experiment, so no matter


def test_several_changes_are_counted_and_another_folder_has_no_checksums(house):
    tampered(integrity.results())
    no_picture(integrity.results())
    assert "latent.png is missing, but has a line in book/results/SHA256SUMS (and 1 more): " in complaint(runs.records)
    assert len(runs.records(folder=integrity.results())) == 2


def test_a_hidden_folder_is_no_record(house):
    for hidden in (".evil/toy", "toy/.evil"):
        folder = integrity.results() / hidden
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(runs.as_text(toy_record(run="evil")))
    assert [record["run"] for record in runs.records()] == ["paper", "paper-seed=2"]


@pytest.mark.parametrize("text", ["no sum\n", "<<<<<<< ours\n", "a" * 64 + " one-space\n"])
def test_a_broken_list_is_told_by_its_line(house, text):
    sums = integrity.results() / "SHA256SUMS"
    sums.write_text(sums.read_text() + text)
    assert "book/results/SHA256SUMS, line 5: " in complaint(runs.records)
    sums.write_text(2 * "".join(sums.read_text().splitlines(True)[:1]))
    assert "line 2: each file has one line" in complaint(runs.records)


def test_what_a_killed_write_leaves_does_not_count_and_the_list_is_replaced_whole(house, monkeypatch):
    folder = integrity.results()
    (folder / "toy" / ".results.json.77.partial").write_text("half")
    before = (folder / "SHA256SUMS").read_text()
    runs.records()

    def die(*arguments):
        raise KeyboardInterrupt
    unlisted(folder)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", die)
        with pytest.raises(KeyboardInterrupt):
            integrity.renew(folder, "toy/new")
    assert (folder / "SHA256SUMS").read_text() == before and "has no line" in complaint(runs.records)
    integrity.renew(folder, "toy/new")
    assert len((folder / "SHA256SUMS").read_text().splitlines()) == 5 and len(runs.records()) == 3


def test_two_processes_that_record_at_once_lose_no_line(house):
    code = ("import sys, time; from pathlib import Path; from lib import integrity, runs; "
            "runs.root = lambda: Path(sys.argv[1])\n"
            "for i in range(20):\n"
            "    with integrity.renewing(integrity.results(), f'toy/{sys.argv[2]}{i}') as target:\n"
            "        target.mkdir(); (target / 'results.json').write_text('{}')\n")
    writers = [subprocess.Popen([sys.executable, "-c", code, house, name], cwd=lib.root()) for name in "ab"]
    while any(writer.poll() is None for writer in writers):
        integrity.check(integrity.results())                            # no moment at which they disagree
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(integrity.lines(integrity.results())) == 4 + 40


def test_a_reader_waits_for_one_that_records(house):
    seen = []
    with integrity.renewing(integrity.results(), "toy/slow") as target:
        target.mkdir()
        (target / "results.json").write_text(runs.as_text(toy_record(run="slow")))
        reader = threading.Thread(target=lambda: seen.append(len(runs.records())))
        reader.start()
        reader.join(0.2)
        assert seen == [] and reader.is_alive()
    reader.join(10)
    assert seen == [3]


# ------------------------------------------------------------------------------------------------ removing
def test_a_run_is_forgotten_by_its_name_or_path(house, capsys):
    assert main(["record", "--forget", "toy/paper"]) == 0
    assert capsys.readouterr().out == "removed book/results/toy/paper; git keeps what was committed\n"
    assert [r["path"] for r in runs.records()] == ["toy/paper-seed=2"]
    assert main(["record", "--forget", "book/results/toy/paper-seed=2/", "benchmarks/cpu-toy.json"]) == 0
    assert runs.records() == [] and [p.name for p in integrity.results().iterdir()] == ["SHA256SUMS"]
    assert complaint(integrity.forget, "toy/paper") == "no recorded run 'toy/paper'; it has none"


def test_a_run_that_was_removed_by_hand_is_forgotten_as_it_is_told(house):
    for path in (integrity.results() / "toy" / "paper").iterdir():
        path.unlink()
    assert complaint(runs.records).endswith("`python -m lib record --forget toy/paper`")
    integrity.forget("toy/paper")
    assert len(runs.records()) == 1


@pytest.mark.parametrize("name", ["", "..", "toy", "/", "book/results", "book/results/toy", "toy/papr", "SHA256SUMS"])
def test_nothing_else_is_ever_removed(house, name):
    before = sorted(house.rglob("*"))
    assert complaint(integrity.forget, name).startswith(f"no recorded run {name!r}")
    assert sorted(house.rglob("*")) == before


# ------------------------------------------------------------------------------------------------ recording
@pytest.fixture
def done(house, monkeypatch):
    """done("a", run="x", ...): the folder of a complete run by a commit that git has."""
    monkeypatch.setattr(recording, "_check_code", lambda source, one: None)

    def make(name, **changes):
        folder = house / "runs" / "toy" / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(runs.as_text(toy_record(**{"run": name} | changes)))
        return folder
    return make


def test_several_runs_are_recorded_by_a_pattern_and_their_lines_renewed(house, done):
    for i in range(3):
        done(f"cpu-seed={i}")
    said = recording.record([f"{house}/runs/toy/cpu-*"])
    assert said == [f"recorded book/results/toy/cpu-seed={i}" for i in range(3)]
    assert len(runs.records()) == 5 and sha256sum(integrity.results()) == 0


def test_nothing_is_recorded_unless_all_can_be(house, done):
    done("a")
    done("b", figures=["lost.png"])
    done("c", metrics={"x": METRIC | {"n": 0}})
    before = (integrity.results() / "SHA256SUMS").read_text()
    said = complaint(recording.record, [f"{house}/runs/toy/*"])
    assert said.startswith(f"{house}/runs/toy/b is not complete: lost.png is missing")
    assert said.endswith("(and 1 more; nothing is recorded)")
    assert (integrity.results() / "SHA256SUMS").read_text() == before and not (integrity.results() / "toy/a").exists()
    done("again", run="a")
    twice = complaint(recording.record, [f"{house}/runs/toy/a", f"{house}/runs/toy/again"])
    assert twice == f"{house}/runs/toy/again and {house}/runs/toy/a are both toy/a"


def test_a_run_that_hides_what_is_smaller_is_not_recorded(house, done):
    own = {"seed": 2, "steps": 5}
    assert complaint(recording.record, [str(done("small", parameters=own))]).startswith(
        f"{house}/runs/toy/small does not say that it is reduced (steps 5 instead of 10): ")
    assert recording.record([str(done("honest", parameters=own, reduced=["steps 5 instead of 10"]))])


def test_a_run_recorded_without_its_pictures_loses_the_old_ones(house, done):
    folder = done("paper", figures=["latent.png"])
    (folder / "latent.png").write_bytes(b"picture")
    recording.record([str(folder)], pictures=False)
    assert [p.name for p in (integrity.results() / "toy" / "paper").iterdir()] == ["results.json"]
    assert len(runs.records()) == 2


def test_a_smoke_run_goes_where_no_chapter_reads_and_has_its_checksum(house, done):
    folder = done("default", preset="", figures=["latent.png"])
    assert recording.record([str(folder)]) == ["recorded book/smoke/toy"]
    assert [p.name for p in (integrity.smoke() / "toy").iterdir()] == ["results.json"]
    assert runs.read(integrity.smoke() / "toy" / "results.json")["figures"] == [] and len(runs.records()) == 2
    assert sha256sum(integrity.smoke()) == 0
    tampered_path = integrity.smoke() / "toy" / "results.json"
    tampered_path.write_text(tampered_path.read_text().replace("1.5", "1.4"))
    assert "book/smoke/toy/results.json is not what was recorded" in complaint(integrity.check, integrity.smoke())
    integrity.forget("toy")
    assert integrity.lines(integrity.smoke()) == {} and len(runs.records()) == 2


def notebook(folder, output=(), executed=1):
    from nbformat import v4, write
    write(v4.new_notebook(cells=[v4.new_code_cell("1", outputs=list(output), execution_count=executed)]),
          folder / "notebook.ipynb")


def test_a_notebook_with_an_error_is_not_recorded(house, done):
    from nbformat import v4
    folder = done("a")
    notebook(folder, [v4.new_output("error", ename="ValueError", evalue="no", traceback=[])])
    said = complaint(recording.record, [str(folder)])
    assert said == f"{folder}/notebook.ipynb: code cell 1 raised ValueError: no; run it with --again, then record"
    notebook(folder, executed=None)
    assert "code cells not executed: 1" in complaint(recording.record, [str(folder)])
    (folder / "notebook.ipynb").write_text("{")
    assert "it is no notebook" in complaint(recording.record, [str(folder)])
    notebook(folder)
    assert recording.record([str(folder)]) == ["recorded book/results/toy/a"]


def test_a_commit_that_this_checkout_does_not_have_is_not_recorded(house):
    subprocess.run(["git", "-C", house, "init", "-q"], check=True)
    folder = house / "runs" / "toy" / "a"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(runs.as_text(toy_record(run="a")))
    said = complaint(recording.record, [str(folder)])
    assert said == (f"{folder} was made by commit aaaaaaaaaa (toy), which this checkout does not have: fetch it or run "
                    "again, then record")
