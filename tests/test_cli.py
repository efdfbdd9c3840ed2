"""`python -m lib`: what goes well, and every foreseen fault as one line on stderr and exit code 1.

The notebooks run in a small checkout: a copy of lib, a notebook that fails in many ways, and one of the book's own.
"""
import json
import os
import shutil
import signal
import subprocess

import psutil
import pytest
from fresh_clone import ended, launched, until
from toy import toy_checkout, toy_record

import lib
from lib import launch, runs
from lib.__main__ import main

TOY = ['''\
steps: int = 3  # how far to go
how: str = "well"  # well, or a way to fail
flag: bool = False  # of nothing
seed: int = 1  # of nothing
resume: str = ""  # go on from
''', '''\
import os, signal, time
from lib import runs
runs._glue = lambda values: None                       # slow to import, and another test's matter
runs.device_info = lambda name: {"kind": "cpu", "name": "toy", "threads": 1}
run = runs.start("toy", globals())
(run.folder / "pid").write_text(str(os.getpid()))
with open(run.folder / "attempts", "a") as file:
    print(resume or "afresh", os.environ.get("MPLBACKEND"), os.environ.get("OMP_NUM_THREADS"), file=file)
attempts = len((run.folder / "attempts").read_text().splitlines())
''', '''\
if how == "die" or how == "die once" and attempts == 1:
    (run.folder / "latest.safetensors").write_text("a checkpoint")
    os.kill(os.getpid(), signal.SIGKILL)
if how == "sleep":
    time.sleep(100)
if how == "raise":
    raise ValueError("first line\\nsecond line")
if how == "refuse":
    raise runs.RunError("nothing works today")
if how == "assert":
    assert steps < 0
if how == "data":
    from lib import data
    data.load("mnist")
''', '''\
value = float("nan") if how == "nan" else 2.5 * steps
if how != "quiet":
    run.save({"score": {"value": value, "se": None, "n": 1, "unit": "points"}})
''']


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """lib, the toy and the book's autoencoders in a checkout of their own, without data and without git."""
    folder = tmp_path_factory.mktemp("template")
    toy_checkout(folder, TOY, "toy:\n  paper: {steps: 10}\n  wrong: {stesp: 3}\n")
    shutil.copy(lib.root() / "notebooks" / "autoencoders.ipynb", folder / "notebooks")
    return folder


@pytest.fixture
def checkout(template, tmp_path, monkeypatch):
    """A fresh copy that this process and its kernels take for the checkout; nothing can be downloaded."""
    folder = shutil.copytree(template, tmp_path / "checkout")
    for module in (runs, launch):
        monkeypatch.setattr(module, "root", lambda: folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("VAEBOOK_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("urllib.request._opener", None)        # made at its first use, with the proxies of that time
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "VAEBOOK_RUN", "VAEBOOK_PRESET"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def fails(capfd):
    """fails("run", "toy", ...): the line that main says, after checking that it is one line, with exit code 1."""
    def check(*words):
        before = psutil.Process().children(recursive=True)
        assert main([str(word) for word in words]) == 1
        out, err = capfd.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n") and out == "", (out, err)
        assert psutil.Process().children(recursive=True) == before, "a process was left behind"
        return err.removeprefix("error: ").rstrip("\n")
    return check


@pytest.fixture
def succeeds(capfd):
    """succeeds("run", "toy", ...): what main prints, after checking that stderr stays empty, with exit code 0."""
    def check(*words):
        assert main([str(word) for word in words]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        return out
    return check


# ------------------------------------------------------------------------------------------------ before it starts
@pytest.mark.parametrize(("words", "said"), [
    (["toy", "--set", "stesp=3"], "toy has no parameter 'stesp': did you mean 'steps'?"),
    (["toy", "--set", "steps=many"], "parameter steps of toy must be int, got 'many'"),
    (["toy", "--set", "steps=3.5"], "parameter steps of toy must be int, got '3.5'"),
    (["toy", "--set", "flag=1"], "parameter flag of toy must be bool, got '1'"),
    (["toy", "--set", "steps"], "--set needs NAME=VALUE, got 'steps'"),
    (["toy", "--seed", "one"], "parameter seed of toy must be int, got 'one'"),
    (["toy", "--preset", "papper"], "toy has no preset 'papper': did you mean 'paper'?"),
    (["toy", "--preset", "wrong"], "toy has no parameter 'stesp': did you mean 'steps'?"),
    (["autoencoders", "--preset", "paper"], "autoencoders has no preset 'paper'; it has none"),
    (["toyy"], "no notebook 'toyy': did you mean 'toy'?"),
    (["toyy", "--seed", "1"], "no notebook 'toyy': did you mean 'toy'?"),
    ([], "name a notebook: autoencoders, toy (--list shows their parameters)"),
    (["toy", "--timeout", "0"], "--timeout and --threads must be positive, got 0 and None"),
    (["toy", "--timeout", "nan"], "--timeout and --threads must be positive, got nan and None"),
    (["toy", "--threads", "0"], "--timeout and --threads must be positive, got 21600 and 0")])
def test_what_cannot_run_is_refused_before_anything_is_written(checkout, fails, words, said):
    assert fails("run", *words) == said
    assert not (checkout / "runs").exists()


def test_an_output_folder_that_cannot_be_written_is_refused(checkout, fails, tmp_path):
    (tmp_path / "file").write_text("")
    said = fails("run", "toy", "--out", tmp_path / "file" / "run")
    assert said == f"cannot write to the run folder {tmp_path}/file/run: Not a directory; --out chooses another"


def test_the_list_names_every_notebook_parameter_and_preset(succeeds):
    text = succeeds("run", "--list")
    assert runs.notebooks()
    for name in runs.notebooks():
        assert f"\n{name}\n" in "\n" + text
        for p in runs.parameters(name).values():
            assert f"  {p.name}: {p.type} = {p.default!r}  # {p.help}\n" in text
        assert all(f"  preset {preset}: " in text for preset in runs.presets(name))


def test_the_data_sets_are_listed(checkout, fails, succeeds):
    text = succeeds("data")
    assert [line for line in text.splitlines() if line[0] != " "] == [
        "mnist", "fashionmnist", "digits", "shapes", "celeba", "newsgroups", "topics", "newsgroups-texts",
        "mnist-static", "inception"]
    assert text.count("state    embedded") == 3 and text.count("licence") == 10
    assert "get it   python -m lib data --fetch mnist\n" in text
    assert succeeds("data", "--fetch", "digits") == "digits is embedded: nothing to fetch\n"
    said = fails("data", "--fetch", "mnits")
    assert said == ("unknown data set 'mnits': known are mnist, fashionmnist, digits, shapes, celeba, newsgroups, "
                    "topics, newsgroups-texts, mnist-static, inception")


def test_wrong_words_are_argparses_to_refuse(capsys):
    with pytest.raises(SystemExit) as error:
        main(["run", "toy", "--sed", "3"])
    assert error.value.code == 2 and "unrecognized arguments: --sed" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ runs that go well
def test_a_run_ends_with_its_results_and_is_not_repeated(checkout, succeeds, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    folder = checkout / "runs" / "toy" / "paper-flag=True-seed=2"
    words = ["run", "toy", "--preset", "paper", "--set", "flag=true", "--seed", "2"]
    assert succeeds(*words, "--threads", 1).startswith("runs/toy/paper-flag=True-seed=2: score 25 points (")
    assert {p.name for p in folder.iterdir()} == {".lock", "attempts", "notebook.ipynb", "pid", "results.json"}
    record = runs.read(folder / "results.json")
    assert record["command"] == "python -m lib run toy --preset paper --set flag=true --seed 2"
    assert record["reduced"] == []
    assert record["parameters"] == {"steps": 10, "how": "well", "flag": True, "seed": 2, "resume": "auto"}
    assert (folder / "attempts").read_text() == "auto module://matplotlib_inline.backend_inline 1\n"
    assert os.environ["MPLBACKEND"] == "agg" and "VAEBOOK_RUN" not in os.environ

    assert succeeds(*words) == f"runs/toy/paper-flag=True-seed=2 is complete ({record['date']}); --again repeats it\n"
    lock = (folder / ".lock").stat().st_ino
    (folder / "latest.safetensors").write_text("an old checkpoint")
    (folder / "mine.txt").write_text("a person's own file")
    assert "score 25 points" in succeeds(*words, "--again")
    assert [line.split()[0] for line in (folder / "attempts").read_text().splitlines()] == ["auto", "auto"]
    assert (folder / ".lock").stat().st_ino == lock and (folder / "mine.txt").exists()
    assert not (folder / "latest.safetensors").exists()


def test_a_killed_kernel_gets_one_retry_that_resumes(checkout, capfd):
    assert main(["run", "toy", "--set", "how=die once"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("runs/toy/how=die_once: score 7.5 points")
    assert err == "the kernel died (Kernel died): once more\n"
    folder = checkout / "runs" / "toy" / "how=die_once"
    assert [line.split()[0] for line in (folder / "attempts").read_text().splitlines()] == ["auto", "auto"]
    assert (folder / "results.json").exists()


# ------------------------------------------------------------------------------------------------ runs that fail
def unfinished(folder):
    return not (folder / "results.json").exists()


@pytest.mark.parametrize(("how", "said"), [
    ("raise", "toy stopped in cell [4] with ValueError: first line (see runs/toy/how=raise/notebook.ipynb)"),
    ("assert", "toy stopped in cell [4] with AssertionError:  (see runs/toy/how=assert/notebook.ipynb)"),
    ("refuse", "toy: nothing works today"),
    ("nan", "toy: metric score is {'value': nan, 'se': None, 'n': 1, 'unit': 'points'}: "
            "it needs a finite value, se, n and unit"),
    ("quiet", "toy ended without run.save(): no result in runs/toy/how=quiet")])
def test_a_notebook_that_fails_says_why(checkout, fails, how, said):
    folder = checkout / "runs" / "toy" / f"how={how}"
    folder.mkdir(parents=True)
    (folder / "results.json.pending").write_text("{}")              # left by a run that was killed at the wrong moment
    assert fails("run", "toy", "--set", f"how={how}") == said
    assert unfinished(folder) and (folder / "notebook.ipynb").exists()


def test_a_kernel_that_dies_twice_is_given_up(checkout, capfd):
    assert main(["run", "toy", "--set", "how=die"]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["the kernel died (Kernel died): once more",
                     "error: toy in runs/toy/how=die: the kernel died twice (Kernel died): too little memory?"]
    assert unfinished(checkout / "runs" / "toy" / "how=die")


@pytest.mark.parametrize("seconds", [0.05, 4])
def test_the_time_limit_kills_the_kernel_and_says_how_to_go_on(checkout, fails, seconds):
    said = fails("run", "toy", "--set", "how=sleep", "--timeout", seconds)
    assert said == (f"toy reached the time limit of {seconds:g} s: the same command goes on from the last checkpoint, "
                    "--timeout raises the limit")
    assert unfinished(checkout / "runs" / "toy" / "how=sleep")


def test_a_folder_with_another_complete_run_is_not_taken_for_this_one(checkout, fails, succeeds, tmp_path):
    succeeds("run", "toy", "--out", tmp_path / "mine")
    assert "is complete" in succeeds("run", "toy", "--out", tmp_path / "mine", "--set", "resume=latest")
    said = fails("run", "toy", "--out", tmp_path / "mine", "--seed", 2)
    assert said == (f"{tmp_path}/mine holds a complete run with seed 1, now 2: choose another --out, "
                    "or replace it with --again")
    (tmp_path / "mine" / "results.json").write_text('{"schema": 1')
    assert "results.json cannot be read" in fails("run", "toy", "--out", tmp_path / "mine")


def test_papermills_own_file_that_cannot_be_written_is_named(checkout, fails):
    (checkout / "runs" / "toy" / "default" / "notebook.ipynb").mkdir(parents=True)
    assert "toy in runs/toy/default: cannot be executed: [Errno 21] Is a directory" in fails("run", "toy")


def test_plain_papermill_refuses_a_misspelt_parameter(checkout, tmp_path):
    import papermill
    for values, said in (({"stesp": 4}, "toy has no parameter 'stesp': did you mean 'steps'?"),
                         ({"flag": "false"}, "-y 'flag: false'")):
        with pytest.raises(papermill.PapermillExecutionError) as error:
            papermill.execute_notebook(checkout / "notebooks" / "toy.ipynb", tmp_path / "out.ipynb", values,
                                       progress_bar=False, cwd=checkout)
        assert error.value.ename == "RunError" and said in error.value.evalue


def test_missing_data_without_a_network_are_not_fetched(checkout, fails, tmp_path, monkeypatch):
    """With torchvision's own download, through a proxy that is not there."""
    from lib import data
    monkeypatch.setattr(data, "root", lambda: checkout)
    said = fails("data", "--fetch", "mnist")
    file = "MNIST/raw/train-images-idx3-ubyte.gz"
    assert said.startswith(f"data set mnist is not here (looked for {tmp_path}/data/{file}, {checkout}/data/{file})")
    assert "refused" in said and "`python -m lib data --fetch mnist`" in said and "'digits'" in said


def test_corrupt_data_end_a_run(checkout, fails, tmp_path):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{part}-ubyte.gz").write_bytes(b"\x1f\x8b damaged")
    said = fails("run", "toy", "--set", "how=data")
    assert said.startswith(f"toy: {raw}/train-images-idx3-ubyte.gz is corrupt") and "'digits'" in said


def test_training_that_diverges_ends_a_run(checkout, fails):
    """On one of the book's own notebooks."""
    changes = ["--set", "lr=1e30", "--set", "steps=4", "--set", "batch_size=8"]
    said = fails("run", "autoencoders", *changes, "--threads", 1)
    assert said.startswith("autoencoders: ") and "nan at step " in said and "lower the learning rate" in said


# ------------------------------------------------------------------------------------------------ real processes
def test_a_real_command_line_fails_in_one_line(checkout):
    process = launched(checkout, "run", "toy", "--set", "stesp=3", stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (1, "", "error: toy has no parameter 'stesp': did you mean 'steps'?\n")


def test_one_folder_one_process_and_an_interrupt_leaves_nothing_behind(checkout, fails):
    folder = checkout / "runs" / "toy" / "how=sleep"
    process = launched(checkout, "run", "toy", "--set", "how=sleep", stderr=subprocess.PIPE)
    until((folder / "attempts").exists, "the kernel")
    said = fails("run", "toy", "--set", "how=sleep", "--timeout", 20)
    assert said == "another process runs in runs/toy/how=sleep: wait for it or choose --out"
    kernels = psutil.Process(process.pid).children(recursive=True)
    assert [kernel.pid for kernel in kernels] == [int((folder / "pid").read_text())]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert err == "interrupted: `run` goes on from its last checkpoint when repeated\n"
    assert ended(kernels) and unfinished(folder)


def test_a_killed_command_leaves_no_kernel_and_no_lock(checkout, succeeds):
    folder = checkout / "runs" / "toy" / "how=sleep"
    process = launched(checkout, "run", "toy", "--set", "how=sleep", stderr=subprocess.PIPE)
    until((folder / "attempts").exists, "the kernel")
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=120)
    assert len(kernels) == 1 and ended(kernels)
    with launch._lock(folder):
        pass


# ------------------------------------------------------------------------------------------------ recording
@pytest.fixture
def complete(checkout, tmp_path):
    """The folder of a complete run with one picture, made by the checkout's only commit."""
    def git(*words):
        person = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        found = subprocess.run(["git", "-C", checkout, *person, *words], check=True, capture_output=True, text=True)
        return found.stdout.strip()
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "all")
    folder = tmp_path / "run"
    folder.mkdir()
    record = toy_record(figures=["latent.png"], git={"commit": git("rev-parse", "HEAD"), "dirty": False})
    (folder / "results.json").write_text(json.dumps(record))
    (folder / "latent.png").write_bytes(b"picture")
    (folder / "latest.safetensors").write_bytes(b"weights")
    return folder


def changed(folder, **changes):
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_complete_run_is_recorded_with_its_pictures_alone(checkout, complete, succeeds):
    target = checkout / "book" / "results" / "toy" / "paper-seed=2"
    for _ in range(2):
        assert succeeds("record", complete) == "recorded book/results/toy/paper-seed=2\n"
        assert {p.name for p in target.iterdir()} == {"latent.png", "results.json"}
        assert (target / "latent.png").read_bytes() == b"picture"
        assert runs.read(target / "results.json") == runs.read(complete / "results.json")
    assert runs.records()[0]["path"] == "toy/paper-seed=2"


def test_a_run_is_recorded_without_its_pictures_if_asked(checkout, complete, succeeds):
    succeeds("record", "--without-pictures", complete)
    target = checkout / "book" / "results" / "toy" / "paper-seed=2"
    assert [path.name for path in target.iterdir()] == ["results.json"]
    assert runs.read(target / "results.json") == runs.read(complete / "results.json") | {"figures": []}


@pytest.mark.parametrize("git", [{"commit": "a" * 40, "dirty": True}, {"commit": "unknown", "dirty": False}])
def test_a_run_of_uncommitted_code_is_not_recorded(checkout, complete, fails, git):
    changed(complete, git=git)
    assert "made by uncommitted code" in fails("record", complete) and not (checkout / "book").exists()


def test_an_incomplete_run_is_not_recorded(checkout, complete, fails):
    (complete / "latent.png").unlink()
    assert "is not complete: latent.png is missing" in fails("record", complete)
    (complete / "results.json").rename(complete / "results.json.pending")
    assert fails("record", complete) == f"{complete}/results.json is missing: the run did not finish"
    assert "results.json is missing" in fails("record", complete / "nowhere") and not (checkout / "book").exists()


def test_a_record_is_not_overwritten_by_other_numbers(checkout, complete, fails, succeeds):
    succeeds("record", complete)
    target = checkout / "book" / "results" / "toy" / "paper-seed=2" / "results.json"
    before = target.read_bytes()
    changed(complete, metrics={"score": {"value": 2.5, "se": None, "n": 1, "unit": "points"}})
    said = fails("record", complete)
    assert said == ("book/results/toy/paper-seed=2 is recorded with other numbers: if it is to be replaced, "
                    "`python -m lib record --forget toy/paper-seed=2` first")
    assert target.read_bytes() == before
    succeeds("record", "--forget", "toy/paper-seed=2")
    succeeds("record", complete)
    assert target.read_bytes() != before


def test_a_book_that_cannot_be_written_is_named(checkout, complete, fails):
    (checkout / "book").write_text("a file")
    assert fails("record", complete) == "cannot write to book/results/toy/paper-seed=2: Not a directory"


def test_what_a_run_starts_from_is_committed_code_and_no_folder_of_this_machine_or_it_is_not_recorded(complete, fails):
    clean = runs.read(complete / "results.json")["git"]
    before = {"experiment": "first", "run": "cpu", "parameters": {"lr": 0.1}, "git": clean, "made_by": [], "seed": 1,
              "dataset": None, "reduced": [], "command": ""}
    changed(complete, chain=[before | {"git": clean | {"dirty": True}}])
    assert "made by uncommitted code (first)" in fails("record", complete)
    changed(complete, chain=[before | {"made_by": [clean | {"dirty": True, "steps": [0, 5], "seconds": 1.0}]}])
    assert "made by uncommitted code (first)" in fails("record", complete)
    changed(complete, chain=[before | {"parameters": {"gan": "/somewhere/gan"}}])
    assert "names a folder of this machine (gan of first)" in fails("record", complete)


def test_a_run_that_uncommitted_code_began_is_not_recorded(checkout, complete, fails):
    clean = runs.read(complete / "results.json")["git"] | {"steps": [5, 9], "seconds": 1.0}
    changed(complete, made_by=[clean | {"dirty": True, "steps": [0, 5]}, clean])
    assert "made by uncommitted code" in fails("record", complete)
