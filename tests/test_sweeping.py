"""The head of a sweep: what it starts, sets aside and tells, and what is left when it or a run is killed.

In place of Snakemake it calls a script that does with each run as it is told; the slow tests have the real one.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from fresh_clone import ended, launched, skip_without_snakemake, until
from small_sweep import commit, edit, put, sweep_checkout
from toy import toy_record

import lib
from lib import launch, runs, sweeping, sweeps
from lib.__main__ import main


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    return sweep_checkout(tmp_path / "check {out}", monkeypatch)            # a path that papermill would fill in


FAKE = '''#!{python}
"""In place of Snakemake: does with each run of the plan, in order, what behaviour.json says of its folder."""
import json, subprocess, sys, time
from pathlib import Path
work = Path(sys.argv[sys.argv.index("--directory") + 1])
plan = json.loads((work / "plan.json").read_text())
book = Path(plan["book"])
told = json.loads((book / "behaviour.json").read_text())
(work / "arguments").write_text(" ".join(sys.argv[1:]))
done = set()
for key, job in plan["runs"].items():
    how = told["runs"].get(job["folder"], "well")
    folder = book / job["folder"]
    if not set(job["needs"]) <= done:
        continue
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / plan["log"], "a") as log:
        print("--- 2026-01-01T00:00:00Z here", file=log)
        print({{"well": "made", "late": "made", "killed": "Killed"}}.get(how, "error: " + how), file=log)
    result = json.dumps(told["results"].get(job["folder"]))
    if how == "well":
        (folder / "results.json").write_text(result)
        done.add(key)
    if how == "late":                                     # seen later than the mark
        (work / "done").mkdir(exist_ok=True)
        (work / "done" / key).touch()
        (folder / "late").write_text(result)
        subprocess.Popen(["sh", "-c", "sleep 2; mv late results.json"], cwd=folder)
time.sleep(told["seconds"])
print("Snakemake's last words")
sys.exit(told["code"])
'''


@pytest.fixture
def fake(checkout):
    """fake({folder: "well" | "killed" | what it complains of}, ...): a Snakemake that does so."""
    def install(behaviour=(), name="pair", seeds=None, code=0, seconds=0):
        results = {one.folder: toy_record(experiment=one.experiment, run=one.name, preset="", parameters=one.values)
                   for one in sweeps.load(name, seeds=seeds)}
        (checkout / "behaviour.json").write_text(json.dumps({"runs": dict(behaviour), "results": results, "code": code,
                                                             "seconds": seconds}))
        path = checkout / "workflow" / ".venv" / "bin" / "snakemake"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE.format(python=sys.executable))
        path.chmod(0o755)
        return checkout / "runs" / ".sweeps" / f"{name}-smoke"
    return install


def test_a_sweep_that_goes_well(checkout, fake, capsys):
    work = fake(seeds=2)
    assert main(["sweep", "pair", "--seeds", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "pair at smoke: 4 runs, 4 to do" and out[4].startswith("4/4  runs/") and out[4].endswith("  1.0 s")
    assert sorted(line.split()[1] for line in out[1:5]) == sorted(one.folder for one in sweeps.load("pair", seeds=2))
    assert out[5].startswith("4 of 4 runs are done, 0 of them were before (")
    plan = json.loads((work / "plan.json").read_text())
    needs = [job["needs"] for job in plan["runs"].values()]
    assert needs == [[], [], [list(plan["runs"])[0]], [list(plan["runs"])[1]]]
    command = next(iter(plan["runs"].values()))["command"]
    assert command == f"{sys.executable} -m lib run toy --wait --gpu --timeout 86400"
    arguments = (work / "arguments").read_text()
    assert "--retries 1" in arguments and "--nolock" in arguments and "gpu" not in arguments
    assert f"--prioritize done/{list(plan['runs'])[2]} done/{list(plan['runs'])[3]}" in arguments
    assert main(["sweep", "pair", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert "pair at smoke: 4 runs, 0 to do\n4 of 4 runs are done, 4 of them were before (0 s)\n" in out


def test_failures_are_listed_with_their_reason_and_what_they_kept_from_starting(checkout, fake, capsys):
    fake({"runs/toy/default": "toy: nothing works today", "runs/toy/seed=2": "killed"}, seeds=3, code=1)
    log = checkout / "runs" / "toy" / "seed=2" / "sweep.log"
    log.parent.mkdir(parents=True)
    log.write_text("--- 2025-01-01T00:00:00Z here\nerror: an old complaint\n")
    assert main(["sweep", "pair", "--seeds", "3"]) == 1
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "failed: runs/toy/default: toy: nothing works today",
        "failed: runs/toy/seed=2: ended without a word (killed?), see runs/toy/seed=2/sweep.log",
        "not started: runs/then/base=runs_toy_default: runs/toy/default failed",
        "not started: runs/then/base=runs_toy_seed=2-seed=2: runs/toy/seed=2 failed"]
    fake(seeds=3)
    assert main(["sweep", "pair", "--seeds", "3"]) == 0
    assert "6 of 6 runs are done, 2 of them were before" in capsys.readouterr().out


def test_a_snakemake_that_fails_itself_is_quoted(checkout, fake, capsys):
    fake({one.folder: "well" for one in sweeps.load("pair")}, code=3)
    (checkout / "behaviour.json").write_text(json.dumps({"runs": {}, "results": {}, "seconds": 0, "code": 3}))
    path = checkout / "workflow" / ".venv" / "bin" / "snakemake"
    path.write_text(f"#!{sys.executable}\nprint('no such option')\nraise SystemExit(3)\n")
    assert main(["sweep", "pair"]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        "0 of 2 runs are done, 0 of them were before (1 s)", "not started: runs/toy/default",
        "not started: runs/then/base=runs_toy_default",
        "Snakemake ended with code 3: no such option (see runs/.sweeps/pair-smoke/snakemake.log)"]


def test_what_changed_is_set_aside_and_run_again(checkout, fake, capsys):
    fake()
    put(checkout, sweeps.load("pair")(0), parameters={"steps": 1})
    assert main(["sweep", "pair"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("runs/toy/default: steps 1, now 3; base None, now ''; seconds None, now 0.0; ")
    assert "set aside as runs/.set-aside/toy/default.20" in out and "2 of 2 runs are done, 0 of them were before" in out


def test_other_code_stays_and_is_said_to_unless_it_is_to_be_run_anew(checkout, fake, capsys):
    fake()
    put(checkout, sweeps.load("pair")(0))
    edit(checkout / "lib" / "runs.py", '"""A run: ', '"""The run: ')
    assert main(["sweep", "pair"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("runs/toy/default stays, though made by other code (lib/runs.py); --again runs it anew\n")
    assert "1 to do" in out
    for words in ([], ["--dry-run"]):
        assert main(["sweep", "pair", "--again", *words]) == 1    # it would repeat everything each time
        assert capsys.readouterr() == ("", "error: --again repeats what other code made, and uncommitted changes are "
                                           "other code for ever: commit first\n")
    commit(checkout)
    assert main(["sweep", "pair", "--again"]) == 0
    assert "runs/toy/default: lib/runs.py; set aside as" in capsys.readouterr().out


def test_a_result_that_is_seen_late_is_waited_for(checkout, fake, capsys):
    fake({one.folder: "late" for one in sweeps.load("alone")}, name="alone")
    assert main(["sweep", "alone"]) == 0
    assert "1 of 1 runs are done" in capsys.readouterr().out


def test_parameters_that_were_edited_meanwhile_are_named(checkout, fake, capsys):
    fake(name="alone")
    told = json.loads((checkout / "behaviour.json").read_text())
    told["results"]["runs/alone/default"]["parameters"]["steps"] = 4
    (checkout / "behaviour.json").write_text(json.dumps(told))
    assert main(["sweep", "alone"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        "failed: runs/alone/default: steps 4, now 3: parameters were edited while the sweep ran; the same command goes "
        "by what they are now")


def test_no_gpu_means_that_none_is_seen(checkout, fake, capsys):
    work = fake(name="alone")
    assert main(["sweep", "alone", "--gpus", "0"]) == 0
    command = next(iter(json.loads((work / "plan.json").read_text())["runs"].values()))["command"]
    assert command == f"CUDA_VISIBLE_DEVICES= {sys.executable} -m lib run alone --wait --timeout 86400"


@pytest.mark.parametrize("words", [("--cores", "0"), ("--cores", "-2"), ("--gpus", "-1"), ("--timeout", "0"),
                                   ("--timeout", "-1"), ("--timeout", "nan")])
def test_numbers_that_make_no_sense_are_refused(checkout, fake, words, capsys):
    fake(name="alone")
    assert main(["sweep", "alone", *words]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: --timeout and --cores must be positive and --gpus not negative, got ") \
        and not (checkout / "runs").exists()


def test_what_a_killed_head_left_waiting_in_the_queue_is_cancelled(checkout, fake, tmp_path, monkeypatch):
    work = fake(name="alone")
    work.mkdir(parents=True)
    (work / "snakemake.log").write_text("Building DAG of jobs...\nSLURM run ID: 0e70af5c-7ad8\nUsing shell: bash\n")
    programs(tmp_path, monkeypatch, scancel=f"echo \"$@\" >> '{tmp_path}/cancelled'")
    assert main(["sweep", "alone"]) == 0
    assert (tmp_path / "cancelled").read_text() == "--state=PENDING --name=0e70af5c-7ad8\n"


def test_whatever_goes_wrong_in_the_head_ends_snakemake(checkout, fake, monkeypatch):
    fake(name="alone", seconds=1000)

    def fails(path):
        raise ValueError("unforeseen")
    monkeypatch.setattr(runs, "from_json", fails)
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(sweeping.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(ValueError, match="unforeseen"):
        sweeping.run(sweeps.load("alone"))
    assert started[-1].poll() is not None


def test_why_slurm_ended_a_job_is_told(checkout):
    one = sweeps.load("alone")(0)
    log = checkout / one.folder / "sweep.log"
    log.parent.mkdir(parents=True)
    log.write_text("--- 2026-01-01T00:00:00Z here job 7\n")
    told = ("Error in rule run:\n    message: SLURM-job '7' failed, SLURM status is: 'TIMEOUT'.\n"
            "    log: 7.log (check log file(s) for error details)\n    jobid: 1\n    output: done/KEY\n    shell:\n"
            "Error in rule run:\n    message: SLURM-job '8' failed, SLURM status is: 'FAILED'.\n    jobid: 2\n"
            "    output: done/another\n").replace("KEY", sweeping._key(one))
    assert sweeping._reason(one, sweeps.State("to do"), 0, told) == (
        "ended without a word (SLURM-job '7' failed, SLURM status is: 'TIMEOUT'.), see runs/alone/default/sweep.log")


def test_one_head_at_a_time(checkout, fake, capsys):
    fake()
    work = checkout / "runs" / ".sweeps" / "pair-smoke"
    work.mkdir(parents=True)
    with sweeping._head(work):
        assert main(["sweep", "pair"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: another process runs this sweep (") and f"process {os.getpid()})" in err
    assert main(["sweep", "pair"]) == 0


@pytest.mark.parametrize(("there", "asked", "found"), [
    (0, None, ""), (4, None, "--resources gpu=4"), (4, 2, "--resources gpu=2"), (4, 0, "--set-resources run:gpu=0")])
def test_as_many_runs_at_once_as_there_are_gpus(checkout, monkeypatch, there, asked, found):
    monkeypatch.setattr(sweeping.gpus, "visible", lambda: [f"GPU-{i}" for i in range(there)])
    options = " ".join(sweeping._options("local", 3, asked))
    assert "--cores 3" in options and (found in options if found else "gpu" not in options)
    assert "--jobs 3" in " ".join(sweeping._options("slurm", 3, asked))
    assert "gpu=4" not in " ".join(sweeping._options("slurm", None, None))           # the cluster counts its own


def test_a_profile_is_one_of_the_books_or_a_folder(checkout, tmp_path):
    (tmp_path / "config.yaml").write_text("executor: slurm\n")
    assert "--jobs" in sweeping._options(str(tmp_path), 2, None)
    with pytest.raises(runs.RunError, match="no profile 'slrum': did you mean 'slurm'.; or give a folder"):
        sweeping._options("slrum", None, None)


# ------------------------------------------------------------------------------------------------ real processes
def programs(tmp_path, monkeypatch, **scripts):
    """Put shell scripts of these names first in the path."""
    (tmp_path / "bin").mkdir()
    for name, script in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)


def test_a_killed_head_takes_snakemake_along_and_an_interrupted_one_ends_it(checkout, fake):
    fake({one.folder: "well" for one in sweeps.load("pair")}, seconds=1000)
    for how, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)):
        head = launched(checkout, "sweep", "pair")
        until(lambda head=head: psutil.Process(head.pid).children(), "Snakemake")
        children = psutil.Process(head.pid).children(recursive=True)
        time.sleep(1)
        head.send_signal(how)
        out, _ = head.communicate(timeout=60)
        assert ended(children) and head.returncode == code, out
        shutil.rmtree(checkout / "runs" / "toy", ignore_errors=True)


def test_what_papermill_refuses_is_one_sentence(checkout, monkeypatch, capsys):
    import papermill

    def refuses(*words, **more):
        raise papermill.exceptions.PapermillMissingParameterException("Missing parameter 'out'")
    monkeypatch.setattr(papermill, "execute_notebook", refuses)
    assert main(["run", "toy"]) == 1
    assert capsys.readouterr().err == (
        "error: toy in runs/toy/default: papermill refuses it: Missing parameter 'out'\n")


def test_two_processes_of_one_run_make_one_result(checkout):
    first = launched(checkout, "run", "toy", "--set", "seconds=3")
    folder = checkout / "runs" / "toy" / "seconds=3.0"
    until(lambda: launch.running(folder), "the first")
    second = launched(checkout, "run", "toy", "--set", "seconds=3", "--wait")
    assert "points" in first.communicate(timeout=120)[0]
    said = second.communicate(timeout=120)[0].splitlines()
    assert not launch.running(folder)
    assert said[0] == "another process runs in runs/toy/seconds=3.0: waiting for it"
    assert said[1].startswith("runs/toy/seconds=3.0 is complete (") and second.returncode == 0
    assert (checkout / "made").read_text() == "toy 1 \n"


def test_who_waits_begins_when_the_kernel_of_a_killed_process_is_ended(checkout):
    first = launched(checkout, "run", "toy", "--set", "seconds=1000")
    kernels = []
    until(lambda: kernels.extend(psutil.Process(first.pid).children()) or kernels, "its kernel")
    time.sleep(3)                                                     # it looks after its parent by now
    threading.Timer(0.5, first.kill).start()
    with launch._lock(checkout / "runs" / "toy" / "seconds=1000.0", wait=True):
        assert ended(kernels, 0)
    first.communicate(timeout=20)


def test_two_runs_at_once_have_a_gpu_each(checkout, tmp_path, monkeypatch):
    programs(tmp_path, monkeypatch, **{"nvidia-smi": "echo 'GPU 0: A (UUID: GPU-1)\nGPU 1: A (UUID: GPU-2)'"})
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    both = [launched(checkout, "run", "toy", "--set", "seconds=5", "--seed", seed, "--gpu") for seed in "12"]
    assert all("points" in process.communicate(timeout=120)[0] for process in both)
    assert sorted(line.split()[2] for line in (checkout / "made").read_text().splitlines()) == ["GPU-1", "GPU-2"]


@pytest.fixture
def snakemake(checkout):
    """The checkout with the real Snakemake."""
    skip_without_snakemake()
    (checkout / "workflow" / ".venv").symlink_to(lib.root() / "workflow" / ".venv")
    return checkout


def test_what_sbatch_complains_of_is_quoted(snakemake, tmp_path, monkeypatch, capsys):
    text = (snakemake / "workflow" / "profiles" / "slurm" / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("checks: 20", "checks: 1"))
    programs(tmp_path, monkeypatch, sbatch="echo 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1",
             **dict.fromkeys(("squeue", "sinfo", "sacct", "scancel"), "exit 0"))
    assert main(["sweep", "pair", "--profile", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[2:] == [
        "not started: runs/toy/default", "not started: runs/then/base=runs_toy_default",
        "Snakemake ended with code 1: SLURM sbatch failed. The error message was 'sbatch: error: invalid partition "
        "specified: gpuu'. (see runs/.sweeps/pair-smoke/snakemake.log)"]


@pytest.mark.slow
def test_a_sweep_goes_on_after_its_worker_and_its_head_are_killed(snakemake):
    """Each of six results is made once: a worker's run is retried, the head's are waited for by the next head."""
    words = ("sweep", "pair", "--preset", "slow", "--cores", "2")
    head = launched(snakemake, *words)
    began = time.monotonic()

    def say(text):
        print(f"{time.monotonic() - began:5.1f} s  {text}")

    def workers():
        found = [p for p in psutil.Process(head.pid).children(recursive=True) if p.name().startswith("python")]
        return [p for p in found if "run" in p.cmdline() and "--wait" in p.cmdline()]
    until(lambda: len(workers()) == 2 and list(snakemake.glob("runs/*/*/notebook.ipynb")), "two workers")
    time.sleep(3)                                                 # so that its second attempt outlasts the other run
    victim = workers()[0]
    say(f"kill -9 of the worker `{' '.join(victim.cmdline()[3:])}`")
    victim.kill()
    until(lambda: len(list(snakemake.glob("runs/toy/*/results.json"))) >= 1 and workers(), "a result")
    children, orphans = psutil.Process(head.pid).children(), workers()
    head.kill()
    told = head.communicate(timeout=60)[0]
    assert ended(children) and any(process.is_running() for process in orphans)
    say(f"kill -9 of the head, which had said:\n{told}")
    head = launched(snakemake, *words)
    told = head.communicate(timeout=300)[0]
    say(f"the next head:\n{told}")
    assert head.returncode == 0 and "6 of 6 runs are done" in told
    assert ended(orphans)
    results = [runs.read(path) for path in snakemake.glob("runs/*/*/results.json")]
    assert len({(one["experiment"], one["seed"]) for one in results}) == len(results) == 6
    made = (snakemake / "made").read_text().splitlines()
    assert len(made) == 6, made                                   # none made twice
    logs = "".join(path.read_text() for path in snakemake.glob("runs/*/*/sweep.log"))
    say(f"{logs.count('--- 20')} attempts made {len(made)} results")


@pytest.mark.slow
def test_a_run_that_fails_is_tried_twice_and_the_others_go_on(snakemake):
    head = launched(snakemake, "sweep", "fails")
    told = head.communicate(timeout=300)[0]
    print(told)
    assert head.returncode == 1 and "2 of 4 runs are done, 0 of them were before" in told
    where = "runs/toy/steps=13"
    assert (f"failed: {where}: toy stopped in cell [3] with ValueError: thirteen (see {where}/notebook.ipynb)\n"
            "not started: runs/then/steps=13-base=runs_toy_steps=13: runs/toy/steps=13 failed\n") in told
    assert (snakemake / where / "sweep.log").read_text().count("--- 20") == 2
    assert "thirteen" in (snakemake / where / "notebook.ipynb").read_text()
